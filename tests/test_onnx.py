"""ONNX Runtime as another opinion: outputs and final states of LSTM, GRU and RNN over random configurations.

onnx.reference would not do: it ignores lengths and activations.
"""

import numpy as np
import pytest

import fastlstm

onnx = pytest.importorskip("onnx", reason="onnx is not installed: no parity test with ONNX Runtime")
ort = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: no parity test with it")

CONFIGURATIONS = 120  # a seed each
KINDS = ("LSTM", "GRU after", "GRU before", "RNN", "LSTM coupled")
# Our gates in ONNX's order: LSTM i, f, g, o -> i, o, f, c; GRU r, z, n -> z, r, h.
ORDER = {"LSTM": [0, 3, 1, 2], "GRU": [1, 0, 2], "RNN": [0]}
LINE = ("hard_sigmoid", 0.2, 0.5)
# Our choices, with ONNX's names, alphas and betas.
ONNX_ACTIVATIONS = {
    "tanh": ("Tanh",), "relu": ("Relu",), "softsign": ("Softsign",), "sigmoid": ("Sigmoid",),
    "hard_sigmoid": ("HardSigmoid", 1 / 6, 0.5), LINE: ("HardSigmoid", 0.2, 0.5), "elu": ("Elu", 1.0),
    ("elu", 0.5): ("Elu", 0.5), ("leaky_relu", 0.2): ("LeakyRelu", 0.2), "softplus": ("Softplus",),
    ("scaled_tanh", 1.5, 0.7): ("ScaledTanh", 1.5, 0.7),
}  # fmt: skip
CANDIDATES = ["tanh", "tanh", "tanh", "softsign", "relu", "elu", ("elu", 0.5), ("leaky_relu", 0.2), "softplus",
              ("scaled_tanh", 1.5, 0.7), "sigmoid", LINE]  # fmt: skip


def configuration(seed):
    """What is tried under a seed; kinds, directions and lengths take turns so that all of them meet."""
    rng = np.random.default_rng(seed)
    kind = KINDS[seed % 5]
    gated = not kind.startswith("RNN")
    return {
        "kind": kind,
        "direction": ("forward", "bidirectional", "reverse")[seed // 5 % 3],
        "ragged": seed // 15 % 2 == 1,
        "with_state": seed // 30 % 2 == 1,
        "bias": bool(rng.random() < 0.8),
        "peepholes": kind == "LSTM" and seed // 5 % 2 == 1,
        "activation": CANDIDATES[rng.integers(len(CANDIDATES))],
        "output_activation": CANDIDATES[rng.integers(len(CANDIDATES))] if kind[:4] == "LSTM" and seed % 2 else None,
        "recurrent_activation": ("sigmoid", "sigmoid", "hard_sigmoid", LINE)[rng.integers(4)] if gated else "sigmoid",
        "clip": float(rng.uniform(0.2, 1.5)) if seed // 5 % 4 == 1 else None,
        "T": int(rng.integers(1, 14)),
        "N": int(rng.integers(1, 12)),
        "D": int(rng.integers(1, 24)),
        "H": int(rng.integers(2, 40)),
    }


def our_layer(c, seed):
    options = {"bias": c["bias"], "bidirectional": c["direction"] != "forward", "clip": c["clip"], "rng": seed}
    if c["kind"] == "RNN":
        layer = fastlstm.RNN(c["D"], c["H"], nonlinearity=c["activation"], **options)
    else:
        options |= {"activation": c["activation"], "recurrent_activation": c["recurrent_activation"]}
        if c["kind"].startswith("LSTM"):
            options |= {"coupled": c["kind"] == "LSTM coupled", "output_activation": c["output_activation"]}
            layer = fastlstm.LSTM(c["D"], c["H"], peepholes=c["peepholes"], **options)
        else:
            layer = fastlstm.GRU(c["D"], c["H"], reset_after=c["kind"] == "GRU after", **options)
    return layer


def onnx_session(c, params):
    """A model of one node with these weights."""
    op = c["kind"].split()[0]
    suffixes = {"forward": ["_l0"], "reverse": ["_l0_reverse"]}.get(c["direction"], ["_l0", "_l0_reverse"])

    def reordered(name):
        gates = [params[name + s].reshape(-1, c["H"], params[name + s][0].size) for s in suffixes]
        if c["kind"] == "LSTM coupled":  # ONNX's i is 1 - f: sigmoid(-a); its own rows of f are not read
            gates = [np.stack([-f, 7 * np.ones_like(f), g, o]) for f, g, o in gates]
        gates = [g[ORDER[op]] for g in gates]
        return np.stack([g.reshape(-1, g.shape[2]) for g in gates])

    weights = {"W": reordered("weight_ih"), "R": reordered("weight_hh")}
    if c["bias"]:
        weights["B"] = np.concatenate([reordered("bias_ih"), reordered("bias_hh")], 1)[:, :, 0]
    if c["peepholes"]:
        weights["P"] = np.stack([np.concatenate([params[f"weight_c{gate}{s}"] for gate in "iof"]) for s in suffixes])
    ours = {"LSTM": [c["recurrent_activation"], c["activation"], c["output_activation"] or c["activation"]],
            "GRU": [c["recurrent_activation"], c["activation"]], "RNN": [c["activation"]]}[op]  # fmt: skip
    chosen = [ONNX_ACTIVATIONS[choice] for choice in ours] * len(suffixes)
    attributes = {"hidden_size": c["H"], "direction": c["direction"], "activations": [name for name, *_ in chosen]}
    for i, name in enumerate(("activation_alpha", "activation_beta")):
        if numbers := [values[i] for _, *values in chosen if len(values) > i]:
            attributes[name] = numbers
    if c["clip"]:
        attributes["clip"] = c["clip"]
    if c["kind"] == "LSTM coupled":
        attributes["input_forget"] = 1
    if op == "GRU":
        attributes["linear_before_reset"] = int(c["kind"] == "GRU after")

    inputs = {"X": onnx.TensorProto.FLOAT}
    if c["ragged"]:
        inputs["lens"] = onnx.TensorProto.INT32
    if c["with_state"]:
        inputs["h"] = onnx.TensorProto.FLOAT
        if op == "LSTM":
            inputs["c"] = onnx.TensorProto.FLOAT
    slots = [
        "X",
        "W",
        "R",
        "B" if c["bias"] else "",
        "lens" if c["ragged"] else "",
        "h" if "h" in inputs else "",
    ]
    if op == "LSTM":
        slots += ["c" if "c" in inputs else "", "P" if c["peepholes"] else ""]
    outputs = ["Y", "Y_h", "Y_c"] if op == "LSTM" else ["Y", "Y_h"]
    helper = onnx.helper
    graph = helper.make_graph(
        [helper.make_node(op, slots, outputs, **attributes)],
        "one_layer",
        [helper.make_tensor_value_info(name, kind, None) for name, kind in inputs.items()],
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(w), name) for name, w in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def same(ours, theirs, name):
    assert ours.shape == theirs.shape, name
    error, norm = np.linalg.norm((ours - theirs).astype("f8")), np.linalg.norm(theirs.astype("f8"))
    assert norm > 0, name
    assert error <= 2e-5 * norm, f"{name}: error {error:.3g} of norm {norm:.3g}"


@pytest.mark.parametrize("seed", range(CONFIGURATIONS))
def test_outputs(seed):
    c = configuration(seed)
    layer = our_layer(c, seed)
    rng = np.random.default_rng((seed, 1))
    T, N, H = c["T"], c["N"], c["H"]
    both = layer.bidirectional
    part = slice(1, 2) if c["direction"] == "reverse" else slice(None)  # ours has no reverse without forward
    feeds = {"X": rng.standard_normal((T, N, c["D"])).astype(np.float32)}
    lengths = None
    if c["ragged"]:
        lengths = rng.integers(1, T + 1, N)
        feeds["lens"] = lengths.astype(np.int32)
    state = None
    if c["with_state"]:
        h, cell = rng.standard_normal((2, 1 + both, N, H)).astype(np.float32)
        feeds["h"] = h[part]
        if c["kind"].startswith("LSTM"):
            feeds["c"] = cell[part]
        state = (h, cell) if c["kind"].startswith("LSTM") else h
    expected = onnx_session(c, layer.params).run(None, feeds)

    y, end = layer(feeds["X"], state, lengths)
    y = y.reshape(T, N, 1 + both, H).swapaxes(1, 2)[:, part]
    end = [s[part] for s in end] if isinstance(end, tuple) else [end[part]]
    valid = np.arange(T)[:, None] < (np.full(N, T) if lengths is None else lengths)
    used = expected[0].swapaxes(1, 2)[valid]
    bounded = (c["output_activation"] or c["activation"]) in ("tanh", "softsign", "sigmoid", LINE)
    saturated = np.mean(np.abs(used) > 0.99) < 0.25 or not bounded
    assert np.mean(used != 0) > 0.1 and saturated  # an output that can tell something
    same(y, expected[0], "Y")
    for name, ours, theirs in zip(("Y_h", "Y_c")[: len(end)], end, expected[1:], strict=True):
        same(ours, theirs, name)


def test_the_configurations_cover_the_options():
    assert CONFIGURATIONS >= 60
    tried = [configuration(seed) for seed in range(CONFIGURATIONS)]
    assert len({tuple(c.values()) for c in tried}) == CONFIGURATIONS
    for kind in KINDS:
        for direction in ("forward", "reverse", "bidirectional"):
            for name in ("ragged", "with_state"):
                found = {c[name] for c in tried if (c["kind"], c["direction"]) == (kind, direction)}
                assert found == {True, False}, (kind, direction, name)
    for choice in ("hard_sigmoid", LINE):
        assert sum(c["recurrent_activation"] == choice for c in tried) >= 8
    assert sum(c["peepholes"] for c in tried) >= 10 and sum(bool(c["clip"]) for c in tried) >= 20
    assert sum(c["output_activation"] not in (None, c["activation"]) for c in tried) >= 20
    assert {c["activation"] for c in tried} == set(CANDIDATES)
