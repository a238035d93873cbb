"""ONNX files: what is written runs in ONNX Runtime with our numbers, and what others wrote loads."""

import copy
import warnings

import numpy as np
import pytest
from conftest import WITH_C, make

import fastlstm

onnx = pytest.importorskip("onnx", reason="onnx is not installed: no test of its files")
ort = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: no test of ONNX files")
import fastlstm.onnx as exchange  # noqa: E402

LAYERS = 200
HELPER = onnx.helper


def random_layer(seed):
    """A layer that ONNX can say, kinds and options in turn."""
    rng = np.random.default_rng(seed)
    cell = ("lstm", "gru", "gru_reset_before", "rnn")[seed % 4]
    if cell == "lstm":
        cell = ("lstm", "lstm_peephole", "lstm_coupled")[seed // 4 % 5 % 3]
    options = {
        "num_layers": 1 + seed // 4 % 3,
        "bidirectional": bool(seed // 12 % 2),
        "batch_first": bool(seed // 24 % 2),
        "bias": bool(rng.random() < 0.8),
        "rng": seed,
    }
    if not options["bidirectional"] and seed % 5 < 2:
        options["direction"] = "reverse"
    if cell == "rnn":
        options["nonlinearity"] = str(rng.choice(["tanh", "relu"]))
    else:
        choices = ["tanh", "tanh", "softsign", "identity", ("elu", 0.5), ("scaled_tanh", 1.5, 0.7), "softplus"]
        options["activation"] = choices[rng.integers(len(choices))]
        gates = ["sigmoid", "hard_sigmoid", ("hard_sigmoid", 0.25, 0.5)]
        options["recurrent_activation"] = gates[rng.integers(len(gates))]
        if cell in WITH_C and seed % 3 == 1 and options["activation"] != "tanh":
            options["output_activation"] = "tanh"
    if seed % 7 == 2:
        options["clip"] = 0.75
    layer = make(cell, int(rng.integers(1, 20)), int(rng.integers(2, 30)), **options)
    T, N = int(rng.integers(1, 12)), int(rng.integers(1, 9))
    x = rng.standard_normal((N, T, layer.input_size) if layer.batch_first else (T, N, layer.input_size))
    shape = (layer.num_layers * (2 if layer.bidirectional else 1), N, layer.hidden_size)
    state = [rng.standard_normal(shape).astype("f4") for _ in range(2 if cell in WITH_C else 1)]
    return layer, x.astype("f4"), state, rng.integers(1, T + 1, N).astype("i4")


def run(path, feeds):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    assert {i.name for i in session.get_inputs()} == feeds.keys()
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds), strict=True))


def near(got, want, tolerance=2e-6):
    assert got.shape == want.shape
    norm = np.linalg.norm(want.astype("f8"))
    assert norm > 0
    error = np.linalg.norm(got.astype("f8") - want) / norm
    assert error <= tolerance, error
    return error


def same_layer(got, want):
    assert got.options | {"init": 0} == want.options | {"init": 0}
    assert got.flat_params.tobytes() == want.flat_params.tobytes()


@pytest.mark.parametrize("seed", range(LAYERS))
def test_round_trip(seed, tmp_path):
    layer, x, state, lengths = random_layer(seed)
    path = tmp_path / "layer.onnx"
    with_state, with_lengths = bool(seed % 3), bool(seed % 5)
    exchange.save(layer, path, state=with_state, lengths=with_lengths)
    feeds = {"x": x}
    if with_lengths:
        feeds["lengths"] = lengths
    if with_state:
        feeds |= dict(zip(("h_0", "c_0"), state, strict=False))
    found = run(path, feeds)
    pair = (tuple(state) if len(state) == 2 else state[0]) if with_state else None
    y, end = layer(x, pair, lengths if with_lengths else None)
    near(y, found["y"])
    for name, part in zip(("h_n", "c_n"), end if isinstance(end, tuple) else (end,), strict=False):
        near(part, found[name])
    (back,) = exchange.load(path).values()
    want = copy.deepcopy(layer)
    if layer.batch_first:  # written as layout 0 and a Transpose
        want = time_first(layer)
    same_layer(back, want)


def time_first(layer):
    options = {
        "direction": layer.direction,
        "num_layers": layer.num_layers,
        "bidirectional": layer.bidirectional,
        "bias": layer.bias,
    }
    if isinstance(layer, fastlstm.RNN):
        options["nonlinearity"] = layer.nonlinearity
    else:
        options |= {"activation": layer.activation, "recurrent_activation": layer.recurrent_activation}
    for name in ("reset_after", "peepholes", "coupled", "output_activation", "clip"):
        if name in layer.options:
            options[name] = getattr(layer, name)
    other = type(layer)(layer.input_size, layer.hidden_size, **options)
    other.load_state_dict(layer.state_dict())
    return other


def test_the_layers_cover_the_options():
    tried = [random_layer(seed)[0] for seed in range(LAYERS)]
    assert LAYERS >= 200
    for kind in (fastlstm.LSTM, fastlstm.GRU, fastlstm.RNN):
        mine = [layer for layer in tried if isinstance(layer, kind)]
        assert {layer.direction for layer in mine} == {"forward", "reverse"}
        if kind is fastlstm.LSTM:
            forms = {(layer.peepholes, layer.coupled) for layer in mine}
            assert forms == {(False, False), (True, False), (False, True)}
        for name, values in (("num_layers", {1, 2, 3}), ("bidirectional", {True, False}), ("bias", {True, False}),
                             ("batch_first", {True, False})):  # fmt: skip
            assert {getattr(layer, name) for layer in mine} == values, (kind, name)


# ---- what others wrote ----


def tensors(**arrays):
    return [onnx.numpy_helper.from_array(np.array(a, order="C"), name) for name, a in arrays.items()]


def weights_of(layer, kind, i=0):
    return fastlstm._onnx_write._weights(layer, kind, i)


def one_node(op="LSTM", opset=14, held=None, slots=("x", "W", "R", "B"), extra=(), layer=None, **attributes):
    """A model of one node, by default a right one for an LSTM of 3 inputs and 4 units."""
    layer = layer or fastlstm.LSTM(3, 4, rng=0)
    if held is None:
        held = {key[0]: array for key, array in weights_of(layer, "LSTM").items()}
    attributes = {"hidden_size": 4} | attributes
    node = HELPER.make_node(op, slots, ["Y", "Y_h"], name="cell", **attributes)
    info = [HELPER.make_tensor_value_info("x", onnx.TensorProto.FLOAT, None)]
    out = [HELPER.make_tensor_value_info("Y", onnx.TensorProto.FLOAT, None)]
    graph = HELPER.make_graph([*extra, node], "g", info, out, tensors(**held))
    return HELPER.make_model(graph, opset_imports=[HELPER.make_opsetid("", opset)], ir_version=8)


@pytest.mark.parametrize("opset", [7, 11, 14, 22])
def test_every_opset(opset):
    layer = fastlstm.LSTM(3, 4, rng=0)
    model = one_node(opset=opset, layer=layer)
    same_layer(exchange.load(model)["cell"], layer)


def test_layout_1_is_batch_first():
    layer = exchange.load(one_node(layout=1))["cell"]
    assert layer.batch_first
    x = np.random.default_rng(0).standard_normal((2, 5, 3)).astype("f4")
    want = onnx.reference.ReferenceEvaluator(one_node()).run(None, {"x": x.swapaxes(0, 1).copy()})[0]
    near(layer(x)[0], want[:, 0].swapaxes(0, 1))


def test_weights_that_other_weights_make():
    """Quantised and cast weights, concatenated biases."""
    layer = fastlstm.LSTM(3, 4, rng=0)
    held = {key[0]: a for key, a in weights_of(layer, "LSTM").items()}
    scale = np.float32(1 / 64)
    whole = {
        "W_q": np.clip(np.round(held["W"] / scale), -127, 127).astype("i1"), "scale": scale,
        "R_h": held["R"].astype("f2"), "b_1": held["B"][:, :16], "b_2": held["B"][:, 16:],
    }  # fmt: skip
    extra = [
        HELPER.make_node("DequantizeLinear", ["W_q", "scale"], ["W"]),
        HELPER.make_node("Cast", ["R_h"], ["R"], to=onnx.TensorProto.FLOAT),
        HELPER.make_node("Concat", ["b_1", "b_2"], ["B"], axis=1),
    ]
    found = exchange.load(one_node(held=whole, extra=extra))["cell"]
    want = held | {"W": whole["W_q"].astype("f4") * scale, "R": whole["R_h"].astype("f4")}
    same_layer(found, exchange.load(one_node(held=want))["cell"])


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("slot", ["W", "R", "B", "initial_h"])
def test_sparse_initializers_are_named(slot, inside):
    """Also where another operator computes the weight from one, and where the node is in a branch."""
    held = {key[0]: a for key, a in weights_of(fastlstm.LSTM(3, 4, rng=0), "LSTM").items()}
    held["initial_h"] = np.ones((1, 2, 4), "f4")
    whole = held.pop(slot)
    places = np.arange(whole.size)
    (values,) = tensors(stored=whole.reshape(-1))
    sparse = HELPER.make_sparse_tensor(values, tensors(places=places)[0], whole.shape)
    extra = [HELPER.make_node("Identity", ["stored"], [slot])]
    model = one_node(held=held, slots=("x", "W", "R", "B", "", "initial_h"), extra=extra)
    if inside:
        model = in_a_branch(model)
    model.graph.sparse_initializer.append(sparse)
    text = rf"^node 'cell' \(LSTM\): {slot}: expected a dense initializer, found 'stored' in sparse_initializer"
    with pytest.raises(ValueError, match=text):
        exchange.nodes(model)


def test_half_precision_becomes_float32():
    held = {key[0]: a.astype("f2") for key, a in weights_of(fastlstm.LSTM(3, 4, rng=0), "LSTM").items()}
    found = exchange.load(one_node(held=held))["cell"]
    assert found.dtype == np.float32
    same_layer(found, exchange.load(one_node(held={k: a.astype("f4") for k, a in held.items()}))["cell"])


def in_a_branch(whole):
    """A model with the weights in the outer graph, the node in a branch of If."""
    branch = HELPER.make_graph(list(whole.graph.node), "then", [], list(whole.graph.output))
    other = HELPER.make_graph([HELPER.make_node("Identity", ["x"], ["Y"])], "else", [], list(whole.graph.output))
    choice = HELPER.make_node("If", ["flag"], ["out"], then_branch=branch, else_branch=other)
    flag = HELPER.make_tensor_value_info("flag", onnx.TensorProto.BOOL, [])
    out = HELPER.make_tensor_value_info("out", onnx.TensorProto.FLOAT, None)
    graph = HELPER.make_graph([choice], "g", [*whole.graph.input, flag], [out], list(whole.graph.initializer))
    return HELPER.make_model(graph, opset_imports=whole.opset_import)


def test_a_node_inside_a_branch():
    same_layer(exchange.load(in_a_branch(one_node()))["cell"], fastlstm.LSTM(3, 4, rng=0))


def test_what_is_read_elsewhere_is_not_merged(tmp_path):
    path = tmp_path / "two.onnx"
    exchange.save(fastlstm.GRU(3, 4, num_layers=2, rng=0), path)
    model = onnx.load(path)
    assert len(exchange.load(model)) == 1
    between = HELPER.make_tensor_value_info("y_l0", onnx.TensorProto.FLOAT, None)
    model.graph.output.append(between)
    assert [layer.num_layers for layer in exchange.load(model).values()] == [1, 1]


def test_two_axes_swapped_between_nodes_are_not_a_stack(tmp_path):
    """The same operators as in a stack, but directions and features interleaved: the numbers differ."""
    path = tmp_path / "two.onnx"
    exchange.save(fastlstm.GRU(3, 4, num_layers=2, bidirectional=True, rng=0), path)
    model = onnx.load(path)
    assert len(exchange.load(model)) == 1
    (turn,) = [node for node in model.graph.node if node.output[0] == "Y_l0_t"]
    turn.attribute[0].ints[:] = [0, 2, 3, 1]
    assert len(exchange.load(model)) == 2


def test_constant_initial_states_are_not_lost():
    h = np.full((1, 2, 4), 0.5, "f4")
    layer = fastlstm.LSTM(3, 4, rng=0)
    held = {key[0]: a for key, a in weights_of(layer, "LSTM").items()} | {"h": h}
    model = one_node(held=held, slots=("x", "W", "R", "B", "", "h"))
    with pytest.raises(ValueError, match="initial_h.*nodes"):
        exchange.load(model)
    (node,) = exchange.nodes(model)
    assert np.array_equal(node.state[0], h) and not node.state[1].any()
    held["h"] = np.zeros_like(h)
    same_layer(exchange.load(one_node(held=held, slots=("x", "W", "R", "B", "", "h")))["cell"], layer)


def test_constant_lengths_are_not_lost():
    lengths = np.array([5, 2, 4], "i4")
    layer = fastlstm.LSTM(3, 4, rng=0)
    held = {key[0]: array for key, array in weights_of(layer, "LSTM").items()} | {"lens": lengths}
    model = one_node(held=held, slots=("x", "W", "R", "B", "lens"))
    with pytest.raises(ValueError, match="sequence_lens.*nodes"):
        exchange.load(model)
    (node,) = exchange.nodes(model)
    assert np.array_equal(node.lengths, lengths)
    x = np.random.default_rng(0).standard_normal((5, 3, 3)).astype("f4")
    near(node.layer(x, lengths=node.lengths)[0], run(model.SerializeToString(), {"x": x})["Y"][:, 0])
    held["lens"] = np.full(3, 5, "i4")  # all of T, which the model states
    for sizes, whole in ((None, False), ((4, 3, 3), False), ((5, 3, 3), True)):
        model = one_node(held=held, slots=("x", "W", "R", "B", "lens"))
        model.graph.input[0].CopyFrom(HELPER.make_tensor_value_info("x", onnx.TensorProto.FLOAT, sizes))
        (node,) = exchange.nodes(model)
        assert (node.lengths is None) == whole


@pytest.mark.parametrize("between", ["Slice", "Cast", "Mul"])
def test_what_changes_the_numbers_between_nodes_parts_them(between, tmp_path):
    """A cut at a step that a short sample has not, a cast that whole numbers survive, a product."""
    path = tmp_path / "two.onnx"
    exchange.save(fastlstm.GRU(3, 4, num_layers=2, rng=0), path, state=False, lengths=False)
    model = onnx.load(path)
    assert len(exchange.load(model)) == 1
    upper = [node for node in model.graph.node if node.op_type == "GRU"][1]
    x = upper.input[0]
    upper.input[0] = "changed"
    held = {"begin": np.array([0]), "end": np.array([100]), "axis": np.array([0]), "two": np.float32(2)}
    model.graph.initializer.extend(tensors(**held))
    made = {
        "Slice": [HELPER.make_node("Slice", [x, "begin", "end", "axis"], ["changed"])],
        "Cast": [HELPER.make_node("Cast", [x], ["whole"], to=onnx.TensorProto.INT32),
                 HELPER.make_node("Cast", ["whole"], ["changed"], to=onnx.TensorProto.FLOAT)],
        "Mul": [HELPER.make_node("Mul", [x, "two"], ["changed"])],
    }[between]  # fmt: skip
    place = list(model.graph.node).index(upper)
    for i, node in enumerate(made):
        model.graph.node.insert(place + i, node)
    assert [layer.num_layers for layer in exchange.load(model).values()] == [1, 1]


EXPORTED = {
    "LSTM": {"num_layers": 2, "bidirectional": True},
    "GRU": {"num_layers": 2, "batch_first": True, "bias": False},
    "RNN": {"nonlinearity": "relu"},
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("dynamo", [False, True], ids=["script", "dynamo"])
@pytest.mark.parametrize("kind", EXPORTED)
def test_exported_by_torch(kind, dynamo, dynamic, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: none of its exporters to try")
    if dynamo:
        pytest.importorskip("onnxscript", reason="onnxscript is not installed, the newer exporter needs it")
    torch.manual_seed(3)
    module = getattr(torch.nn, kind)(3, 5, **EXPORTED[kind]).eval()
    x, path = torch.randn(4, 2, 3), tmp_path / "exported.onnx"
    options = {"dynamo": dynamo, "verbose": False}
    if dynamic and dynamo:
        size = torch.export.Dim
        options["dynamic_shapes"] = ({0: size("a", min=1, max=64), 1: size("b", min=1, max=64)},)
    elif dynamic:
        options |= {"dynamic_axes": {"x": [0, 1]}, "input_names": ["x"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x,), path, **options)
    if dynamo and kind == "RNN":  # the newer exporter writes MatMul, Add and Tanh step by step
        with pytest.raises(ValueError, match="expected nodes LSTM, GRU or RNN"):
            exchange.load(path)
        return
    (layer,) = exchange.load(path).values()
    batch_first = layer.batch_first
    assert layer.num_layers == module.num_layers and not batch_first
    ours = layer(x.numpy().swapaxes(0, 1) if module.batch_first else x.numpy())[0]
    want = module(x)[0].detach().numpy()
    near(ours.swapaxes(0, 1) if module.batch_first else ours, want)


# ---- what cannot be ----


def malformed(tmp_path):
    layer = fastlstm.LSTM(3, 4, rng=0)
    held = {key[0]: a for key, a in weights_of(layer, "LSTM").items()}
    good = one_node().SerializeToString()
    short = onnx.ModelProto.FromString(good)
    short.graph.initializer[0].raw_data = short.graph.initializer[0].raw_data[:-8]
    cycle = [HELPER.make_node("Identity", ["V"], ["W"]), HELPER.make_node("Identity", ["W"], ["V"])]
    tmp_path.joinpath("cut.onnx").write_bytes(good[: len(good) // 2])
    tmp_path.joinpath("text.onnx").write_text("no model at all\n" * 50)
    tmp_path.joinpath("empty.onnx").write_bytes(b"")
    return {
        "cut": (tmp_path / "cut.onnx", "not an ONNX model"),
        "text": (tmp_path / "text.onnx", "not an ONNX model"),
        "empty": (tmp_path / "empty.onnx", "opset"),
        "operator": (onnx.ModelProto.FromString(good.replace(b"LSTM", b"\xff\xfeTM")), "expected nodes LSTM"),
        "old opset": (one_node(opset=6), "opset 6: expected 7"),
        "type": (one_node(hidden_size=4.0), r"'cell' .*hidden_size: expected an attribute of type INT, found FLOAT"),
        "types": (one_node(activations="Tanh"), "activations: expected an attribute of type STRINGS, found STRING"),
        "mixed": (one_node(held=held | {"R": held["R"].astype("f8")}), "R: expected float32 as W's"),
        "no node": (one_node(op="Identity", slots=("x",)), "expected nodes LSTM, GRU or RNN, found Identity"),
        "W missing": (one_node(held={k: v for k, v in held.items() if k != "W"}), "W: expected weights.*found W"),
        "R left out": (one_node(slots=("x", "W")), "R: expected weights.*found none"),
        "W of other rows": (one_node(held=held | {"W": held["W"][:, :8]}), r"W: expected shape \(1, 16, input size\)"),
        "R of other units": (one_node(held=held | {"R": held["R"][:, :, :3]}), r"R: expected shape \(1, 16, 4\)"),
        "B of one half": (one_node(held=held | {"B": held["B"][:, :16]}), r"B: expected shape \(1, 32\)"),
        "hidden_size": (one_node(hidden_size=5), "W: expected shape"),
        "hidden_size 0": (one_node(hidden_size=0), "hidden_size >= 1"),
        "weights of integers": (one_node(held=held | {"W": held["W"].astype("i4")}), "W: expected floating-point"),
        "bytes missing": (short, "tensor 'W'"),
        "a cycle": (one_node(held={k: v for k, v in held.items() if k != "W"}, extra=cycle), "tensor 'W'"),
        "direction": (one_node(direction="sideways"), "direction='sideways'"),
        "two directions, one given": (one_node(direction="bidirectional"), "W: expected shape"),
        "clip": (one_node(clip=-3.0), "clip: expected"),
        "input_forget": (one_node(held=held | {"P": np.ones((1, 12), "f4")},
                                  slots=("x", "W", "R", "B", "", "", "", "P"), input_forget=1), "input_forget=1"),
        "activation": (one_node(activations=["Sigmoid", "ThresholdedRelu", "Tanh"]), "activations: Thresh"),
        "gate": (one_node(activations=["Relu", "Tanh", "Tanh"]), "activations: Relu.*a gate is a factor"),
        "alpha": (one_node(activations=["Sigmoid", "Elu", "Tanh"], activation_alpha=[-1.0]), r"Elu\(-1.0,\)"),
        "two activations": (one_node(activations=["Sigmoid", "Tanh", "Tanh"] + ["Sigmoid", "Relu", "Tanh"],
                                     direction="bidirectional"), "one choice for activation"),
        "too few activations": (one_node(activations=["Sigmoid"]), "activations: expected 3"),
        "unknown attribute": (one_node(swing=1), "unknown attributes"),
        "peepholes": (one_node(held=held | {"P": np.ones((1, 11), "f4")},
                               slots=("x", "W", "R", "B", "", "", "", "P")), "P: expected shape"),
    }  # fmt: skip


def test_malformed_models_end_in_errors_that_say_why(tmp_path):
    cases = malformed(tmp_path)
    assert len(cases) >= 10
    for name, (model, text) in cases.items():
        with pytest.raises(ValueError, match=text):
            exchange.load(model)
            pytest.fail(name)


def test_what_cannot_be_written(tmp_path):
    path = tmp_path / "layer.onnx"
    for layer, text in (
        (fastlstm.LSTM(3, 4, proj_size=2), "proj_size"),
        (fastlstm.GRU(3, 4, zoneout=0.5), "zoneout"),
        (fastlstm.LSTM(3, 4, activation="hard_tanh"), "activation='hard_tanh'"),
        (fastlstm.LSTM(3, 4, cell_clip=1.0), "cell_clip"),
    ):
        with pytest.raises(ValueError, match=text):
            exchange.save(layer, path)
    with pytest.raises(TypeError, match="layer: expected"):
        exchange.save("layer", path)
    assert not list(tmp_path.iterdir())


def test_coupled_gates_of_another_line(tmp_path):
    """ONNX computes i = sigma(-a) for our 1 - sigma(a): that holds for a line through (0, 1/2) alone."""
    layer = fastlstm.LSTM(3, 4, coupled=True, recurrent_activation=("hard_sigmoid", 0.2, 0.3))
    with pytest.raises(ValueError, match="input_forget.*beta 0.5"):
        exchange.save(layer, tmp_path / "layer.onnx")
    node = one_node(activations=["HardSigmoid", "Tanh", "Tanh"], activation_alpha=[0.2], activation_beta=[0.3],
                    input_forget=1)  # fmt: skip
    with pytest.raises(ValueError, match="input_forget.*beta 0.5"):
        exchange.load(node)
    for name in ("ScaledTanh", "Affine"):
        with pytest.raises(ValueError, match=f"{name}: expected activation_alpha and activation_beta"):
            exchange.load(one_node(activations=["Sigmoid", name, "Tanh"]))


def test_float64_says_what_it_loses(tmp_path):
    layer = fastlstm.LSTM(3, 4, dtype=np.float64, rng=0)
    with pytest.warns(UserWarning, match=r"float32.*rounded.*e-08"):
        exchange.save(layer, tmp_path / "layer.onnx", state=False, lengths=False)
    (back,) = exchange.load(tmp_path / "layer.onnx").values()
    assert np.array_equal(back.flat_params, layer.flat_params.astype("f4"))
