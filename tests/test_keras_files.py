"""Keras itself: its layers as ours and back, its files without it, and layouts of TensorFlow 1."""

import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from conftest import make, same_bits

import fastlstm
import fastlstm.keras as exchange
from fastlstm import nn

h5py = pytest.importorskip("h5py", reason="h5py is not installed: no test of Keras's files")

TOLERANCE = 1e-6
CELLS = ("lstm", "gru", "gru_reset_before", "rnn")


@pytest.fixture(autouse=True)
def quiet():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def numbers(tensor):
    return tensor.detach().cpu().numpy() if hasattr(tensor, "detach") else np.asarray(tensor)


def near(got, want, tolerance=TOLERANCE):
    got, want = numbers(got), numbers(want)
    assert got.shape == want.shape
    assert abs(want).max() > 0.05
    assert abs(got - want).max() <= tolerance * max(1, abs(want).max())


def batch(size, seed=0, dtype="f4"):
    return np.random.default_rng(seed).standard_normal((4, 6, size)).astype(dtype)


def spread(layer, seed=0):
    """Weights of Keras, biases among them, that show every swap."""
    rng = np.random.default_rng(seed)
    layer.set_weights([rng.uniform(-0.5, 0.5, w.shape).astype(w.dtype) for w in layer.get_weights()])
    return layer


def ours_of(keras, cell, activation="tanh", recurrent_activation="sigmoid", bias=True, dtype="float32", **more):
    options = {"use_bias": bias, "activation": activation, "dtype": dtype, "return_sequences": True} | more
    if cell == "rnn":
        return keras.layers.SimpleRNN(5, **options)
    options["recurrent_activation"] = recurrent_activation
    if cell == "lstm":
        return keras.layers.LSTM(5, **options)
    return keras.layers.GRU(5, reset_after=cell == "gru", **options)


KINDS = [(cell, activation, gate, bias, both, dtype)
         for cell in CELLS
         for activation, gate in (("tanh", "sigmoid"), ("relu", "hard_sigmoid"), ("softsign", "sigmoid"),
                                  ("linear", "sigmoid"))
         for bias in (True, False) for both in (True, False) for dtype in ("float32", "float64")
         if not (cell == "rnn" and activation in ("softsign", "linear"))]  # fmt: skip


@pytest.mark.parametrize(("cell", "activation", "gate", "bias", "both", "dtype"), KINDS)
def test_both_ways(keras, cell, activation, gate, bias, both, dtype):
    theirs = ours_of(keras, cell, activation, gate, bias, dtype)
    if both:
        theirs = keras.layers.Bidirectional(theirs, dtype=dtype)
    theirs.build((None, None, 3))
    spread(theirs)
    ours = exchange.from_keras(theirs)
    x = batch(3, dtype=dtype)
    want = theirs(x)
    assert ours.batch_first and ours.dtype == dtype and ours.bias == bias
    near(ours(x)[0], want)
    back = exchange.to_keras(ours)
    near(back(x), want)
    assert [w.shape for w in back.get_weights()] == [w.shape for w in theirs.get_weights()]
    again = exchange.from_keras(back)
    assert again.options == ours.options and same_bits(again.flat_params, ours.flat_params)


def test_final_states_are_those_of_keras(keras):
    theirs = spread_built(keras.layers.LSTM(5, return_sequences=True, return_state=True), 3)
    x = batch(3)
    y, h, c = theirs(x)
    ours_y, (ours_h, ours_c) = exchange.from_keras(theirs)(x)
    for got, want in ((ours_y, y), (ours_h[0], h), (ours_c[0], c)):
        near(got, want)


def spread_built(layer, size):
    layer.build((None, None, size))
    return spread(layer)


def test_stacks(keras):
    model = keras.Sequential([
        keras.Input((None, 3)), keras.layers.LSTM(5, return_sequences=True), keras.layers.Dropout(0.5),
        keras.layers.LSTM(5, return_sequences=True), keras.layers.GRU(4, return_sequences=True),
        keras.layers.TimeDistributed(keras.layers.Dense(6)), keras.layers.SimpleRNN(2, return_sequences=True),
        keras.layers.Dense(3),
    ])  # fmt: skip
    spread(model)
    ours = exchange.from_keras(model)
    x = batch(3)
    assert isinstance(ours, fastlstm.Stack)
    assert [type(layer) for layer in ours] == [fastlstm.LSTM, fastlstm.GRU, nn.Linear, fastlstm.RNN, nn.Linear]
    assert ours[0].num_layers == 2
    near(ours(x)[0], model(x, training=False))
    near(exchange.to_keras(ours)(x, training=False), ours(x)[0])
    cells = keras.layers.RNN([keras.layers.LSTMCell(4), keras.layers.LSTMCell(4)], return_sequences=True)
    ours = exchange.from_keras(spread_built(cells, 3))
    assert isinstance(ours, fastlstm.LSTM) and ours.num_layers == 2
    near(ours(x)[0], cells(x))
    unequal = keras.layers.RNN([keras.layers.GRUCell(4), keras.layers.GRUCell(2)], return_sequences=True)
    near(exchange.from_keras(spread_built(unequal, 3))(x)[0], unequal(x))


def test_layers_of_several_go_to_keras(keras):
    layer = make("lstm", 3, 5, num_layers=3, bidirectional=True, batch_first=True, dropout=0.3)
    model = exchange.to_keras(layer)
    x = batch(3)
    near(model(x, training=False), layer(x)[0])
    assert sum(type(one).__name__ == "Dropout" for one in model.layers) == 2
    back = exchange.from_keras(model)
    near(back(x)[0], layer(x)[0])
    last = exchange.to_keras(make("gru", 3, 5, batch_first=True), return_sequences=False, name="mine")
    assert last.name == "mine" and tuple(last(x).shape) == (4, 5)


def test_what_cannot_be(keras):
    layers = keras.layers
    cases = [
        (layers.LSTM(5, go_backwards=True), "go_backwards=True"),
        (layers.Bidirectional(layers.LSTM(5), merge_mode="sum"), "merge_mode='sum'"),
        (layers.LSTM(5, activation="swish"), "activation"),
        (layers.GRU(5, recurrent_activation="tanh"), "recurrent_activation"),
        (layers.Bidirectional(layers.GRU(5), backward_layer=layers.GRU(5, activation="relu", go_backwards=True)),
         "backward_layer"),
        (layers.Dense(3, activation="relu"), "activation='relu'"),
        (layers.Conv1D(3, 1), "expected LSTM"),
    ]  # fmt: skip
    for layer, text in cases:
        layer.build((None, 7, 3))
        with pytest.raises(ValueError, match=text) as caught:
            exchange.from_keras(layer)
        assert repr(layer.name) in str(caught.value)
    ends = [layers.Input((7, 3)), layers.Bidirectional(layers.LSTM(5)), layers.Dropout(0.5)]
    exchange.from_keras(keras.Sequential(ends))
    with pytest.raises(ValueError, match="return_sequences=False.*no step of a Stack"):
        exchange.from_keras(keras.Sequential([*ends, layers.Dense(2)]))  # reads the last states of both directions
    with pytest.raises(ValueError, match="call or build it first"):
        exchange.from_keras(layers.LSTM(5))
    for wrong in ("lstm", fastlstm.LSTM(3, 4)):
        with pytest.raises(TypeError, match="layers of Keras"):
            exchange.from_keras(wrong)
    for options in ({"proj_size": 2}, {"zoneout": (0.1, 0)}, {"peepholes": True}, {"coupled": True}):
        layer = fastlstm.LSTM(3, 4, **options)
        with pytest.raises(ValueError, match="no proj_size, zoneout, peepholes, coupled or layer_norm"):
            exchange.to_keras(layer)
    with pytest.raises(ValueError, match="go_backwards gives the outputs in reverse"):
        exchange.to_keras(fastlstm.GRU(3, 4, direction="reverse"))


# ---- files ----


def model_of_many(keras):
    layers = keras.layers
    first = keras.Input((None, 3), name="in")
    x = layers.LSTM(5, return_sequences=True, name="first")(first)
    x = layers.Bidirectional(layers.GRU(4, return_sequences=True), name="both")(x)
    x = layers.LSTM(6, return_sequences=True, name="second", use_bias=False)(x)
    x = layers.RNN([layers.LSTMCell(3), layers.LSTMCell(3)], return_sequences=True, name="cells")(x)
    x = layers.Bidirectional(layers.SimpleRNN(2, return_sequences=True), name="simple")(x)
    gru = layers.GRU(3, reset_after=False, return_sequences=True, name="g")
    lstm = layers.LSTM(2, return_sequences=True, name="first")
    inside = keras.Sequential([keras.Input((None, 4)), gru, lstm], name="inner")
    model = keras.Model(first, inside(x))
    return spread(model)


def check_file(found, model, x, nested=True):
    names = ["first", "both", "second", "cells", "simple", "inner/g", "inner/first"]
    assert list(found) == names
    y = x
    for name in names:
        y = found[name](y)[0]
    near(y, model(x))


@pytest.mark.parametrize("ending", [".keras", ".h5"])
def test_files_of_models(keras, ending, tmp_path):
    model = model_of_many(keras)
    path = tmp_path / f"model{ending}"
    model.save(path)
    check_file(exchange.load(path), model, batch(3))


@pytest.mark.parametrize("given", ["text", "dict", "path"])
def test_weights_alone_with_their_configuration(keras, given, tmp_path):
    model = model_of_many(keras)
    path = tmp_path / "model.weights.h5"
    model.save_weights(path)
    text = model.to_json()
    (tmp_path / "config.json").write_text(text)
    config = {"text": text, "dict": json.loads(text), "path": tmp_path / "config.json"}[given]
    check_file(exchange.load(path, config), model, batch(3))


def test_weights_alone(keras, tmp_path):
    layers = keras.layers
    model = keras.Sequential([
        keras.Input((None, 3)), layers.LSTM(5, return_sequences=True, name="one"), layers.Dense(4, name="dense"),
        layers.Bidirectional(layers.GRU(4, return_sequences=True), name="two"),
        layers.GRU(3, return_sequences=True, reset_after=False, name="three"),
        layers.SimpleRNN(2, return_sequences=True, name="four"),
    ])  # fmt: skip
    spread(model)
    path = tmp_path / "model.weights.h5"
    model.save_weights(path)
    found = exchange.load(path)
    assert found.keys() == {"one", "two", "three", "four"}
    x = batch(3)
    y = found["one"](x)[0]
    y = numbers(model.get_layer("dense")(y))
    for name in ("two", "three", "four"):
        y = found[name](y)[0]
    near(y, model(x))
    two = layers.RNN([layers.LSTMCell(3), layers.LSTMCell(3)])
    other = keras.Sequential([keras.Input((None, 3)), two])
    other.save_weights(path)
    with pytest.raises(ValueError, match="expected config="):
        exchange.load(path)


def test_reading_imports_no_framework(keras, tmp_path):
    path = tmp_path / "model.keras"
    model_of_many(keras).save(path)
    program = (
        "import sys, fastlstm.keras; fastlstm.keras.load(sys.argv[1])\n"
        "bad = {'keras', 'tensorflow', 'torch', 'jax'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", program, path], check=True, timeout=60)


# ---- what older versions wrote ----


def old_file(path, layers, version="2.2.4", model_config=None, whole=True):
    """An .h5 file as Keras 2 lays it out; layers: name to (path of the weight in it, array) in order."""
    with h5py.File(path, "w") as h5:
        if model_config is not None:
            h5.attrs["model_config"] = json.dumps(model_config).encode()
        h5.attrs["keras_version"] = version.encode()
        top = h5.create_group("model_weights") if whole else h5
        top.attrs["layer_names"] = np.array([name.encode() for name in layers])
        for name, weights in layers.items():
            group = top.create_group(name)
            group.attrs["weight_names"] = np.array([weight.encode() for weight, _ in weights])
            for weight, array in weights:
                group[weight] = array


def cudnn(layer):
    """Weights of a CuDNN layer of Keras 2 with the numbers of one of ours.

    It hands each gate's array to cuDNN as it lies in memory, and cuDNN reads a matrix (H, D), row after row.
    """
    order = {"LSTM": ("ifgo", "ifco"), "GRU": ("rzn", "zrh")}[type(layer).__name__]
    params = {name: fastlstm.gate_order(array, *order) for name, array in layer.params.items()}
    gates, H, D = len(order[0]), layer.hidden_size, layer.input_size
    kernels, recurrent = [], []
    for gate in range(gates):
        rows = slice(gate * H, (gate + 1) * H)
        kernels.append(np.array([*params["weight_ih_l0"][rows].flat]).reshape(D, H))
        recurrent.append(params["weight_hh_l0"][rows])
    return [("kernel:0", np.hstack(kernels)), ("recurrent_kernel:0", np.hstack(recurrent)),
            ("bias:0", np.concatenate([params["bias_ih_l0"], params["bias_hh_l0"]]))]  # fmt: skip


@pytest.mark.parametrize("config", [True, False], ids=["with configuration", "weights alone"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_cudnn_layouts(cell, config, tmp_path):
    layer = make(cell, 3, 4, batch_first=True)
    name = f"cu_dnn{cell}"
    weights = [(f"{name}/{key}", array) for key, array in cudnn(layer)]
    described = {"class_name": "Sequential", "config": [
        {"class_name": "CuDNN" + cell.upper(), "config": {"name": name, "units": 4, "go_backwards": False}}
    ]}  # fmt: skip
    old_file(tmp_path / "a.h5", {name: weights}, model_config=described if config else None, whole=config)
    found = exchange.load(tmp_path / "a.h5")[name]
    assert found.options == layer.options | {"init": "zeros"}
    assert same_bits(found.flat_params, layer.flat_params)


def test_old_defaults_are_not_taken_for_new_ones(tmp_path):
    rng = np.random.default_rng(0)
    options = {"name": "l", "units": 2, "activation": "tanh", "recurrent_activation": "hard_sigmoid", "use_bias": True}
    described = {"class_name": "Sequential", "config": {"layers": [{"class_name": "LSTM", "config": options}]}}
    shapes = {"kernel": (3, 8), "recurrent_kernel": (2, 8), "bias": (8,)}
    weights = [(f"l/{name}:0", rng.standard_normal(shape).astype("f4")) for name, shape in shapes.items()]
    old_file(tmp_path / "a.h5", {"l": weights}, model_config=described)
    assert exchange.load(tmp_path / "a.h5")["l"].recurrent_activation == ("hard_sigmoid", 0.2, 0.5)
    old_file(tmp_path / "a.h5", {"l": weights}, "3.0.0", described)
    assert exchange.load(tmp_path / "a.h5")["l"].recurrent_activation == "hard_sigmoid"


def test_damaged_files(keras, tmp_path):
    model = keras.Sequential([keras.Input((None, 3)), keras.layers.LSTM(5, name="one")])
    good, path = tmp_path / "a.keras", tmp_path / "b.keras"
    model.save(good)
    content = good.read_bytes()
    for damaged in (b"", b"text", content[: len(content) // 2], content[:-50], content.replace(b"lstm", b"mtsl")):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a whole file of Keras"):
            exchange.load(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("config.json", b" " * 10**8)
    with pytest.raises(ValueError, match="claims 100000000"):
        exchange.load(path)
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["secret"] = np.zeros((5, 20), "f4")
    model.save_weights(tmp_path / "a.weights.h5")
    with h5py.File(tmp_path / "a.weights.h5", "a") as h5:
        values = h5["layers/lstm/cell/vars"]
        del values["1"]
        values["1"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "secret")
    with pytest.raises(ValueError, match="not a whole file of Keras"):
        exchange.load(tmp_path / "a.weights.h5")
    with h5py.File(tmp_path / "a.weights.h5", "a") as h5:
        values = h5["layers/lstm/cell/vars"]
        del values["1"]
        values.create_dataset("1", (10**6, 4 * 10**6), "f4", chunks=(1000, 1000))
    with pytest.raises(ValueError, match="claims 16000000000000 bytes"):
        exchange.load(tmp_path / "a.weights.h5")
    with pytest.raises(FileNotFoundError):
        exchange.load(tmp_path / "no.h5")
    with pytest.raises(ValueError, match="config: expected JSON"):
        exchange.load(good, "{")


# ---- TensorFlow 1 ----


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_tf1_lstm():
    """BasicLSTMCell's formula: one kernel for [x; h], gates i, j, f, o, forget_bias added when it runs."""
    rng = np.random.default_rng(0)
    D, H, N = 3, 4, 2
    for P, peepholes in ((0, False), (2, False), (0, True), (2, True)):
        width = P or H
        d = {"rnn/cell/kernel": rng.standard_normal((D + width, 4 * H)), "rnn/cell/bias": rng.standard_normal(4 * H)}
        if P:
            d["rnn/cell/projection/kernel"] = rng.standard_normal((H, P))
        looks = [rng.standard_normal(H) if peepholes else np.zeros(H) for _ in range(3)]
        if peepholes:
            d |= {f"rnn/cell/w_{gate}_diag": look for gate, look in zip("ifo", looks, strict=True)}
        layer = exchange.from_tf1(d | {"global_step:0": 3}, prefix="rnn/cell/", forget_bias=0.7)
        x, h, c = rng.standard_normal((5, N, D)), np.zeros((N, width)), np.zeros((N, H))
        want = []
        for x_t in x:
            i, j, f, o = np.split(np.hstack([x_t, h]) @ d["rnn/cell/kernel"] + d["rnn/cell/bias"], 4, axis=1)
            c = sigmoid(f + 0.7 + looks[1] * c) * c + sigmoid(i + looks[0] * c) * np.tanh(j)
            h = sigmoid(o + looks[2] * c) * np.tanh(c)
            h = h @ d["rnn/cell/projection/kernel"] if P else h
            want.append(h)
        near(layer(x)[0], np.stack(want), 1e-12)


def test_tf1_gru_and_rnn():
    rng = np.random.default_rng(0)
    D, H, N = 3, 4, 2
    d = {"gates/kernel:0": rng.standard_normal((D + H, 2 * H)), "gates/bias:0": rng.standard_normal(2 * H),
         "candidate/kernel:0": rng.standard_normal((D + H, H)), "candidate/bias:0": rng.standard_normal(H)}  # fmt: skip
    layer = exchange.from_tf1(d, "gru")
    x, h, want = rng.standard_normal((5, N, D)), np.zeros((N, H)), []
    for x_t in x:
        r, u = np.split(sigmoid(np.hstack([x_t, h]) @ d["gates/kernel:0"] + d["gates/bias:0"]), 2, axis=1)
        candidate = np.tanh(np.hstack([x_t, r * h]) @ d["candidate/kernel:0"] + d["candidate/bias:0"])
        h = u * h + (1 - u) * candidate
        want.append(h)
    near(layer(x)[0], np.stack(want), 1e-12)
    d = {"kernel": rng.standard_normal((D + H, H)), "bias": rng.standard_normal(H)}
    layer, h, want = exchange.from_tf1(d, "rnn"), np.zeros((N, H)), []
    for x_t in x:
        h = np.tanh(np.hstack([x_t, h]) @ d["kernel"] + d["bias"])
        want.append(h)
    near(layer(x)[0], np.stack(want), 1e-12)
    half = {"kernel": np.zeros((5, 8)), "bias": np.zeros(8), "w_i_diag": np.zeros(2)}
    with pytest.raises(ValueError, match="expected w_i_diag, w_f_diag, w_o_diag or none"):
        exchange.from_tf1(half)
    for wrong, text in ((d | {"w_f_diag": d["bias"]}, "w_f_diag"), ({"kernel": d["kernel"]}, "missing"),
                        (d | {"bias": np.zeros(3)}, "expected a kernel")):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            exchange.from_tf1(wrong, "rnn")
    with pytest.raises(ValueError, match="cell: expected"):
        exchange.from_tf1(d, "qrnn")


@pytest.mark.parametrize("bidirectional", (False, True))
@pytest.mark.parametrize("cell", CELLS)
def test_masks_are_keras_s(keras, cell, bidirectional):
    """Holes, padding on the left and on the right, no valid step at all; masked outputs repeat, or are zero; in a
    Bidirectional they are always zero."""
    mask = np.random.default_rng(3).random((4, 6)) > 0.4
    mask[0, :3], mask[1, 4:], mask[2] = False, False, [True, False, True, True, False, True]
    x = batch(3)
    for zeros in (False, True):
        theirs = ours_of(keras, cell, return_state=True, zero_output_for_mask=zeros)
        if bidirectional:
            theirs = keras.layers.Bidirectional(theirs)
        theirs.build((None, None, 3))
        spread(theirs)
        layer = exchange.from_keras(theirs)
        y, state = layer(x, mask=mask, masked_output="zero" if zeros or bidirectional else "last")
        want, *states = theirs(x, mask=mask)
        near(y, want)
        parts = state if isinstance(state, tuple) else (state,)
        found = [part[d] for d in range(1 + bidirectional) for part in parts]
        for got, expected in zip(found, states, strict=True):
            near(got, expected)


def test_files_of_bfloat16_and_of_classes_of_one_s_own(keras, tmp_path):
    class Mine(keras.Sequential):
        def get_config(self):
            return {"name": self.name}

    layer = keras.layers.LSTM(4, dtype="bfloat16", recurrent_initializer="glorot_uniform")
    keras.Sequential([keras.layers.Input((5, 3)), layer]).save(tmp_path / "a.keras")
    (found,) = exchange.load(tmp_path / "a.keras").values()
    assert same_bits(found.flat_params, exchange.from_keras(layer).flat_params)
    Mine([keras.layers.Input((5, 3)), layer]).save(tmp_path / "b.keras")
    with pytest.raises(ValueError, match="Mine: expected a Sequential or a functional model.*save_weights"):
        exchange.load(tmp_path / "b.keras")
