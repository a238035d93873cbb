"""Rungs 2, 3, 5: compiled float64 against the reference, float32 against float64, sizes that expose tails."""

import itertools
import math

import numpy as np
import pytest
from conftest import (
    CELLS,
    GATES,
    STATES,
    TILE_ROWS,
    VECTOR_BYTES,
    WITH_C,
    close,
    expected,
    make,
    named,
    problem,
    teams,
    telling,
    train,
)

import fastlstm
from fastlstm import engine

RAGGED = (3, 7, 0, 1, 5)  # of T = 7
LENGTHS = {"whole": None, "ragged": RAGGED, "falling": (7, 6, 4, 2, 1), "short": (2, 0, 1, 3, 0)}


def check(layer, p, threads=None):
    """Training and inference of a float64 layer against the reference."""
    if threads is not None:
        fastlstm.set_num_threads(threads)
    got, masks = train(layer, p)
    want = expected(layer, p, masks)
    telling(layer, p, want)
    close(got, want)
    close(named(layer, *layer(p.x, p.state, p.lengths)), expected(layer, p))


# ---- rung 2


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("directions", (1, 2))
@pytest.mark.parametrize("layers", (1, 2, 3))
@pytest.mark.parametrize("cell", CELLS)
def test_reference(isa, cell, layers, directions, lengths):
    layer = make(cell, 3, 11, num_layers=layers, bidirectional=directions == 2, dtype=np.float64)
    check(layer, problem(layer, 7, 5, LENGTHS[lengths]))


SHARED = [
    {"direction": "reverse"},
    {"direction": "reverse", "num_layers": 2, "dropout": 0.3, "recurrent_dropout": 0.3},
    {"bias": False},
    {"num_layers": 3, "dropout": 0.4},
    {"recurrent_dropout": 0.3},
    {"num_layers": 2, "dropout": 0.3, "recurrent_dropout": 0.4, "bias": False},
]
PAIRS = [
    {"activation": a, "recurrent_activation": r}
    for a, r in itertools.product(("tanh", "relu", "softsign", "hard_tanh", "identity"), ("sigmoid", "hard_sigmoid"))
]
CHOSEN = [  # activations with numbers, limits of what goes into them
    {"activation": "sigmoid", "recurrent_activation": ("hard_sigmoid", 0.2, 0.5)},
    {"activation": ("hard_sigmoid", 0.3, 0.1)},
    {"activation": "elu"},
    {"activation": ("elu", 0.4), "clip": 0.6},
    {"activation": ("leaky_relu", 0.2)},
    {"activation": "softplus"},
    {"activation": ("scaled_tanh", 1.7, 0.6), "recurrent_activation": "hard_sigmoid", "clip": 0.5},
    {"clip": 0.4},
    {"clip": 0.7, "num_layers": 2, "dropout": 0.3, "recurrent_dropout": 0.3},
]
OPTIONS = {
    "lstm": [
        *SHARED,
        *PAIRS,
        *CHOSEN,
        {"activation": "relu", "output_activation": "tanh"},
        {"output_activation": ("scaled_tanh", 0.8, 1.2), "clip": 0.5},
        {"output_activation": "softplus", "cell_clip": 0.4},
        {"cell_clip": 0.5},
        {"cell_clip": 0.5, "zoneout": (0.3, 0.2), "recurrent_dropout": 0.3},
        {"proj_size": 4, "proj_clip": 0.1},
        {"proj_size": 5, "proj_clip": 0.1, "cell_clip": 0.5, "clip": 0.8, "zoneout": (0.3, 0.2), "num_layers": 2},
        {"proj_size": 4},
        {"proj_size": 9, "bias": False},
        {"zoneout": (0.3, 0.0)},
        {"zoneout": (0.0, 0.4)},
        {"zoneout": (0.3, 0.2), "recurrent_dropout": 0.3},
        {"proj_size": 5, "zoneout": (0.3, 0.2), "recurrent_dropout": 0.3},
        {"proj_size": 5, "recurrent_dropout": 0.3},
        {"proj_size": 5, "zoneout": (0.25, 0.0), "num_layers": 2, "dropout": 0.3},
        {
            "proj_size": 3,
            "activation": "softsign",
            "recurrent_activation": "hard_sigmoid",
            "zoneout": (0.2, 0.2),
        },
    ],
    "gru": [
        *SHARED,
        *PAIRS,
        *CHOSEN,
        {"zoneout": 0.3},
        {"zoneout": 0.3, "recurrent_dropout": 0.3},
        {"zoneout": 0.3, "recurrent_dropout": 0.3, "num_layers": 2, "dropout": 0.3, "activation": "softsign"},
    ],
    "rnn": [
        *SHARED,
        {"nonlinearity": "relu"},
        *({"nonlinearity": a} for a in (("elu", 0.4), ("leaky_relu", 0.2), "softplus", ("scaled_tanh", 1.7, 0.6))),
        {"nonlinearity": "softsign", "clip": 0.3},
        {"nonlinearity": "relu", "bias": False, "bidirectional": True},
        {"zoneout": 0.3},
        {"zoneout": 0.3, "recurrent_dropout": 0.3},
        {"zoneout": 0.3, "recurrent_dropout": 0.3, "num_layers": 2, "dropout": 0.3, "nonlinearity": "relu"},
    ],
}
OPTIONS |= {"lstm_peephole": OPTIONS["lstm"], "lstm_coupled": OPTIONS["lstm"], "gru_reset_before": OPTIONS["gru"]}
OPTIONS["lstm_norm"] = [*OPTIONS["lstm"], {"layer_norm_eps": 0.1}]
OPTIONS["slstm"] = [
    *SHARED,
    *({"num_heads": k, "forget_gate": gate} for k, gate in ((2, "sigmoid"), (3, "exponential"), (12, "sigmoid"))),
    {"num_heads": 4, "zoneout": 0.3, "recurrent_dropout": 0.3},
    {"num_heads": 2, "direction": "reverse", "bias": False, "forget_gate": "exponential"},
    {"num_heads": 3, "zoneout": 0.3, "recurrent_dropout": 0.3, "num_layers": 2, "dropout": 0.3},
]


@pytest.mark.parametrize(
    "cell, options",
    [pytest.param(c, o, id=f"{c}-{'-'.join(f'{k}{v}' for k, v in o.items())}") for c in CELLS for o in OPTIONS[c]],
)
@pytest.mark.parametrize("stacked", (False, True))
def test_options(isa, cell, options, stacked):
    options = dict(options)
    if stacked and "direction" in options:
        options |= {"num_layers": 3, "batch_first": True}
    elif stacked:
        options |= {"num_layers": options.get("num_layers", 2), "bidirectional": True, "batch_first": True}
    layer = make(cell, 3, 12 if "num_heads" in options else 11, dtype=np.float64, **options)
    if "relu" in options.values() and not layer.bias:
        layer.flat_params[:] += 0.05
    check(layer, problem(layer, 7, 5, RAGGED if stacked else None))


@pytest.mark.parametrize("cell", CELLS)
def test_no_gradient_of_output_or_state(isa, cell):
    layer = make(cell, 3, 11, num_layers=2, dtype=np.float64)
    p = problem(layer, 7, 5, RAGGED)
    for missing in ("dy", "dstate"):
        q = problem(layer, 7, 5, RAGGED)
        setattr(q, missing, None)
        got, masks = train(layer, q)
        close(got, expected(layer, q, masks))
    q.state = None  # with dstate None
    got, masks = train(layer, q)
    close(got, expected(layer, q, masks))
    if cell in WITH_C:
        q.dstate = None, p.dstate[1]
        got, masks = train(layer, q)
        q.dstate = np.zeros_like(p.dstate[0]), p.dstate[1]
        close(got, expected(layer, q, masks))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("batch_first", (False, True))
def test_one_sequence_without_a_batch_axis(isa, cell, batch_first):
    layer = make(cell, 3, 11, num_layers=2, bidirectional=True, batch_first=batch_first, dtype=np.float64)
    p = problem(layer, 7, 1, single=True)
    check(layer, p)
    p.lengths = [4]
    got, masks = train(layer, p)
    close(got, expected(layer, p, masks))


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_add_up(isa, cell):
    layer = make(cell, 3, 11, bidirectional=True, dtype=np.float64)
    ps = [problem(layer, 7, 5, RAGGED, seed=seed) for seed in range(2)]
    single = [train(layer, p)[0] for p in ps]
    layer.zero_grad()
    for p in ps:
        layer.backward(layer.forward(p.x, p.state, p.lengths)[2], p.dy, p.dstate)
    close({"d" + k: v for k, v in layer.grads.items()},
          {k: single[0][k] + single[1][k] for k in single[0] if k[1:] in layer.grads})  # fmt: skip


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("T, N, lengths", [(0, 3, None), (4, 0, None), (4, 3, [0, 0, 0]), (0, 0, None)])
def test_nothing_to_do(isa, cell, T, N, lengths):
    layer = make(cell, 3, 11, num_layers=2, bidirectional=True, dtype=np.float64)
    p = problem(layer, T, N, lengths)
    for every in (None, 2):
        got, _ = train(layer, p, checkpoint_every=every)
        same_states = zip(STATES[cell], p.state if len(STATES[cell]) > 1 else (p.state,), strict=True)
        for name, state in same_states:
            np.testing.assert_array_equal(got[name], state)
        gradients = zip(STATES[cell], p.dstate if len(STATES[cell]) > 1 else (p.dstate,), strict=True)
        for name, state in gradients:
            np.testing.assert_array_equal(got["d" + name], state)
        assert got["y"].shape == (T, N, 22) and not got["y"].any()
        assert got["dx"].shape == (T, N, 3) and not got["dx"].any()
        assert not layer.flat_grads.any()
        close(named(layer, *layer(p.x, p.state, p.lengths)), {k: got[k] for k in ("y", *STATES[cell])})


@pytest.mark.parametrize("cell", CELLS)
def test_windows_of_stacked_layers_end_before_the_sequences(isa, cell, monkeypatch):
    """Inference runs stacked layers in windows of steps; some hold no row at all."""
    monkeypatch.setattr(fastlstm._weights, "_WINDOW", 10)
    layer = make(cell, 3, 11, num_layers=3, dtype=np.float64)
    for lengths in (None, (3, 0, 1, 5, 2), (9, 1, 4, 4, 9)):
        p = problem(layer, 9, 5, lengths)
        close(named(layer, *layer(p.x, p.state, p.lengths)), expected(layer, p))


# ---- rung 3


def norm_rule(layer, got, want, T, backward_names):
    """|got - want| / |want| <= 4 (1 + backward) ceil(log2((2G + 1) T)) eps in the 2-norm."""
    steps = math.ceil(math.log2((2 * GATES[layer.config["cell"]] + 1) * T))
    for name in want:
        bound = 4 * (1 + (name in backward_names)) * steps * np.finfo(np.float32).eps
        error = np.linalg.norm(got[name].astype(float) - want[name]) / np.linalg.norm(want[name])
        assert error <= bound, f"{name}: {error:.3g}, allowed {bound:.3g}"


def check_float32(cell, D, H, T, N, lengths=None, seed=0, **options):
    single = make(cell, D, H, dtype=np.float32, **options)
    double = make(cell, D, H, dtype=np.float64, **options)
    double.flat_params[:] = single.flat_params
    p = problem(single, T, N, lengths, seed)
    got, _ = train(single, p)
    want, _ = train(double, p)  # the same values: float32 arrays are taken as they are
    telling(double, p, want)
    assert all(a.dtype == np.float32 for a in got.values())
    norm_rule(single, got, want, T, [name for name in want if name.startswith("d")])
    called, wanted = (
        named(single, *single(p.x, p.state, lengths)),
        named(double, *double(p.x, p.state, lengths)),
    )
    norm_rule(single, called, wanted, T, ())


@pytest.mark.parametrize("lengths", ("whole", "ragged"))
@pytest.mark.parametrize("layers, directions", [(1, 1), (2, 2)])
@pytest.mark.parametrize("cell", CELLS)
def test_float32(isa, cell, layers, directions, lengths):
    check_float32(cell, 6, 37, 7, 5, LENGTHS[lengths], num_layers=layers, bidirectional=directions == 2)


@pytest.mark.parametrize("cell, options", [
    ("lstm", {"proj_size": 5, "recurrent_activation": "hard_sigmoid"}),
    ("lstm", {"activation": "softsign", "zoneout": (0.2, 0.3), "recurrent_dropout": 0.2}),
    ("lstm", {"num_layers": 2, "dropout": 0.3, "bias": False, "activation": "hard_tanh"}),
    ("gru", {"zoneout": 0.2, "recurrent_dropout": 0.2}),
    ("gru_reset_before", {"zoneout": 0.2, "recurrent_dropout": 0.2}),
    ("rnn", {"zoneout": 0.2, "recurrent_dropout": 0.2, "nonlinearity": "relu"}),
])  # fmt: skip
def test_float32_options(isa, cell, options):
    check_float32(cell, 6, 37, 7, 5, RAGGED, **options)


# ---- rung 5


def sizes(isa, itemsize):
    """(T, N, D, H), all distinct: every H with every N, the D in turn, around an ISA's vectors and tile."""
    lanes, rows = VECTOR_BYTES[isa] // itemsize, TILE_ROWS[isa]
    hidden = [1, lanes - 1, lanes, lanes + 1, 2 * lanes + 3, 4 * lanes + 5]
    batch = [1, rows - 1, rows, rows + 1, 2 * rows + 3]
    inputs = [1, 3, 3 * lanes + 1]
    for (i, H), (j, N) in itertools.product(enumerate(hidden), enumerate(batch)):
        D = next(d for d in inputs[(i + j) % 3 :] + inputs + [10] if d not in (N, H))
        T = next(t for t in (4, 5, 6, 2) if t not in (N, D, H))
        yield T, N, D, H


@pytest.mark.parametrize("cell", CELLS)
def test_sizes(isa, cell):
    for k, (T, N, D, H) in enumerate(sizes(isa, 8)):
        if cell == "lstm_norm" and H < 3:  # one unit is its own mean, of two only the sign is left
            continue
        layer = make(cell, D, H, dtype=np.float64, bidirectional=k % 2 == 1)
        lengths = None if k % 3 else [T, *(n % (T + 1) for n in range(2, N + 1))]
        p = problem(layer, T, N, lengths, seed=k)
        got, masks = train(layer, p)
        want = expected(layer, p, masks)
        telling(layer, p, want)
        close(got, want)


@pytest.mark.parametrize("cell", CELLS)
def test_sizes_float32(isa, cell):
    for k, (T, N, D, H) in enumerate(sizes(isa, 4)):
        if H > (4 if cell == "lstm_norm" else 1):  # few sum too little for a norm, and theirs is ill conditioned
            check_float32(cell, D, H, T, N, seed=k)


@pytest.mark.parametrize("cell", CELLS)
def test_sizes_with_everything_on(isa, cell):
    """Tails with masks, zoneout and, for the LSTM, a projection of another width."""
    lanes = VECTOR_BYTES[isa] // 8
    for k, H in enumerate((5 if cell == "lstm_norm" else 2, lanes + 1, 2 * lanes + 3, 4 * lanes + 5)):
        options = {"zoneout": (0.3, 0.3) if cell in WITH_C else 0.3, "recurrent_dropout": 0.3}
        if cell in WITH_C:
            options["proj_size"] = (1, lanes, lanes + 2, 4 * lanes + 1)[k]
        layer = make(cell, 3, H, dtype=np.float64, bidirectional=True, num_layers=2, dropout=0.2, **options)
        check(layer, problem(layer, 7, 9, (7, 3, 5, 1, 0, 6, 7, 2, 4)))


@pytest.mark.parametrize("threads", (1, 3))
@pytest.mark.parametrize("cell", CELLS)
def test_more_rows_than_a_block_and_a_chunk(isa, cell, threads):
    """Over 96 sequences and over 512 rows in all."""
    N, T = 203, 6
    lengths = np.random.default_rng(3).integers(0, T + 1, N)
    for wanted in (None, lengths):
        layer = make(cell, 5, 9, bidirectional=True, dtype=np.float64)
        assert N > 96 * 2 and T * N > 1024 and (wanted is None or wanted.sum() > 512)
        check(layer, problem(layer, T, N, wanted), threads)


@pytest.mark.parametrize("threads, H", [(1, 21), (2, 131)])
@pytest.mark.parametrize("cell", CELLS)
def test_input_part_in_chunks(isa, cell, threads, H):
    """Small batch, many steps: bias + W x for several steps at once."""
    for N, D, lengths in ((1, 16, None), (2, 19, (90, 61))):
        T = 90
        with teams(by_units=True):
            team, _, chunk = engine.plan(T, N, D, H, 1 if cell == "rnn" else 4, 8, 1, threads, 9)
            assert chunk and T * N > chunk and team == threads
            layer = make(cell, D, H, dtype=np.float64)
            check(layer, problem(layer, T, N, lengths), threads)
    if threads == 1:
        layer = make(cell, D, H, dtype=np.float64, bidirectional=True, num_layers=2)
        check(layer, problem(layer, T, N, lengths), threads)


@pytest.mark.parametrize("options", ({"proj_size": 70}, {"zoneout": (0.2, 0.2), "recurrent_dropout": 0.2}))
def test_units_shared_out(isa, options):
    """Options in the mode where every thread has its own units."""
    layer = make("lstm", 17, 131, dtype=np.float64, bidirectional=True, **options)
    with teams(by_units=True):
        assert engine.plan(9, 2, 17, 131, 4, 8, 2, 2, 5)[:2] == (2, True)
        check(layer, problem(layer, 9, 2, (9, 4)), threads=2)


# ---- the comparison itself


def test_a_comparison_that_cannot_fail_is_refused():
    layer = make("lstm", 3, 11, dtype=np.float64)
    p = problem(layer, 7, 5)
    _, masks = train(layer, p)
    want = expected(layer, p, masks)
    telling(layer, p, want)
    with pytest.raises(AssertionError, match="mostly zeros"):
        telling(layer, p, want | {"y": want["y"] * (np.arange(7) < 3)[:, None, None]})
    with pytest.raises(AssertionError, match="saturated"):
        telling(layer, p, want | {"y": np.sign(want["y"])})
    for name in want:
        wrong = want[name].copy()
        wrong.flat[wrong.size // 2] += 1e-11 * abs(wrong).max()
        with pytest.raises(AssertionError, match=name):
            close(want | {name: wrong}, want)
