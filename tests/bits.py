"""Every bit that the layers compute, as SHA-256 by configuration, to tell whether a change of the engine changed any.

    python tests/bits.py record before.json         on the code before the change
    python tests/bits.py check before.json          on the code after it: exit status 1 and the names, if a hash differs

Both for the instruction set in use (FASTLSTM_ISA), with products of the engine's own. Hashes of two machines or
compilers agree as far as these compile the same multiply-adds.
"""

import hashlib
import itertools
import json
import sys

import numpy as np

import fastlstm

# (T, N, D, H): tails and whole vectors, one row and many, a team that shares rows and one that shares units
SHAPES = [(5, 3, 3, 5), (9, 7, 4, 17), (6, 1, 20, 33), (12, 13, 7, 64), (4, 2, 17, 131), (7, 97, 1, 16)]
SHAPES += [(70, 1, 20, 130)]
CELLS = {
    "lstm": (fastlstm.LSTM, {}),
    "gru": (fastlstm.GRU, {}),
    "gru_reset_before": (fastlstm.GRU, {"reset_after": False}),
    "rnn": (fastlstm.RNN, {}),
}
OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "stack": {"num_layers": 2, "bidirectional": True, "dropout": 0.3},
    "three layers": {"num_layers": 3, "batch_first": True},
    "dropped": {"recurrent_dropout": 0.4, "bidirectional": True},
    "zoneout": {"zoneout": 0.3},
    "both": {"recurrent_dropout": 0.2, "zoneout": 0.2, "num_layers": 2},
    "other activations": {"activation": "softsign", "recurrent_activation": "hard_sigmoid"},
    "relu": {"activation": "relu"},
    "projection": {"proj_size": 3},
    "projection, all": {
        "proj_size": 2,
        "recurrent_dropout": 0.3,
        "zoneout": 0.3,
        "bidirectional": True,
        "num_layers": 2,
    },
}


def build(cell, option, D, H, dtype):
    make, more = CELLS[cell]
    options = dict(OPTIONS[option]) | more
    if "proj_size" in options and cell != "lstm":
        return None
    if cell == "rnn" and "activation" in options:
        if options.pop("activation") != "relu" or options.pop("recurrent_activation", None):
            return None
        options["nonlinearity"] = "relu"
    if cell == "lstm" and "zoneout" in options:
        options["zoneout"] = options["zoneout"], options["zoneout"] / 2
    return make(D, H, dtype=dtype, rng=3, **options)


def arrays(value):
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, dict):
        for key in sorted(value):
            yield from arrays(value[key])
    elif value is not None:
        for part in value:
            yield from arrays(part)


def digest(*values):
    found = hashlib.sha256()
    for array in arrays(values):
        found.update(str((array.shape, array.dtype.str)).encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def inputs(layer, T, N, ragged):
    rng = np.random.default_rng(11)
    shape = (N, T) if layer.batch_first else (T, N)
    width = (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)
    x = rng.standard_normal((*shape, layer.input_size)).astype(layer.dtype)
    dy = rng.standard_normal((*shape, width)).astype(layer.dtype)
    lengths = rng.integers(0, T + 1, N) if ragged else None
    return x, dy, lengths


def train(layer, x, dy, lengths, **options):
    layer.zero_grad()
    y, state, tape = layer.forward(x, None, lengths, **options)
    dstate = tuple(0.5 * s for s in state) if isinstance(state, tuple) else 0.5 * state
    y = y.copy()
    masks = tape.masks["recurrent"]
    return y, state, [masks[key] for key in sorted(masks)], layer.backward(tape, dy, dstate), layer.flat_grads


def cases():
    """(name, function) of every configuration."""
    plan = itertools.product(CELLS, OPTIONS, (np.float32, np.float64), (False, True), (1, 2))
    for index, (cell, option, dtype, ragged, threads) in enumerate(plan):
        T, N, D, H = SHAPES[index // 2 % len(SHAPES)]
        layer = build(cell, option, D, H, dtype)
        if layer is None:
            continue
        name = f"{cell}, {option}, {T} x {N} x {D} x {H}, {np.dtype(dtype)}, ragged {ragged}, threads {threads}"

        def both(layer=layer, T=T, N=N, ragged=ragged):
            x, dy, lengths = inputs(layer, T, N, ragged)
            out = [layer(x, None, lengths), train(layer, x, dy, lengths)]
            if not ragged:
                out.append(layer.freeze()(x))
                layer.unfreeze()
            return out

        yield name, threads, both
    for index, (cell, option, dtype) in enumerate(itertools.product(CELLS, OPTIONS, (np.float32, np.float64))):
        T, N, D, H = SHAPES[index % len(SHAPES)]
        layer = build(cell, option, D, H, dtype)
        if layer is None:
            continue

        def checkpoints(layer=layer, T=T, N=N):
            return train(layer, *inputs(layer, T, N, True), checkpoint_every=3)

        def steps(layer=layer, T=T, N=N):
            x = np.random.default_rng(5).standard_normal((T, N, layer.input_size)).astype(layer.dtype)
            out = []
            for weights in (None, "bfloat16") if layer.dtype == np.float32 else (None,):
                stream = layer.stream(N, weights=weights)
                out += [stream.step(x_t) for x_t in x] + [stream.state]
                out.append(layer.freeze(weights)(x.swapaxes(0, 1) if layer.batch_first else x))
                layer.unfreeze()
            return out

        yield f"{cell}, {option}, {T} x {N} x {D} x {H}, {np.dtype(dtype)}, checkpoints", 1, checkpoints
        if not layer.bidirectional:
            yield f"{cell}, {option}, {T} x {N} x {D} x {H}, {np.dtype(dtype)}, stream", 1, steps
    for cell in CELLS:  # longer than the windows of stacked inference
        layer = build(cell, "three layers", 3, 19, np.float32)
        yield f"{cell}, 5000 x 3", 2, lambda layer=layer: layer(inputs(layer, 5000, 3, False)[0])


def hashes():
    found = {}
    for name, threads, run in cases():
        fastlstm.set_num_threads(threads)
        found[name] = digest(run())
    fastlstm.set_num_threads(None)
    return found


def main(what, path):
    found = hashes()
    if what == "record":
        with open(path, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=0)
        print(f"{len(found)} hashes in {path}")
        return 0
    with open(path, encoding="utf-8") as file:
        wanted = json.load(file)
    wrong = [name for name in wanted if found.get(name) != wanted[name]]
    for name in wrong:
        print("differs:", name)
    print(f"{len(wanted) - len(wrong)} of {len(wanted)} hashes are the same")
    return 1 if wrong or not wanted else 0


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("record", "check"):
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
