"""Keras's published formulas, written out in NumPy: GRU with both values of reset_after, LSTM, activations.

From the documentation of Keras 3 (layers.GRU, layers.LSTM, activations): kernels of shape (D, gates*H),
inputs of shape (N, T, D), the GRU's gates in the order z, r, h and the LSTM's in the order i, f, c, o.
"""

import numpy as np
import pytest

import fastlstm

CONFIGURATIONS = 36  # a seed each: 12 of each kind
KINDS = ("GRU before", "GRU after", "LSTM")
ACTIVATIONS = {
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0),
    "softsign": lambda x: x / (np.abs(x) + 1),
    "hard_tanh": lambda x: np.clip(x, -1, 1),
    "identity": lambda x: x,  # Keras: linear
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "hard_sigmoid": lambda x: np.where(x <= -3, 0, np.where(x >= 3, 1, x / 6 + 0.5)),
}


def keras_gru(x, h, kernel, recurrent_kernel, bias, activation, recurrent_activation, reset_after):
    """Outputs (N, T, H) and the last state; bias (3H,), or (2, 3H) with reset_after."""
    act, gate = ACTIVATIONS[activation], ACTIVATIONS[recurrent_activation]
    H = h.shape[1]
    outputs = []
    for t in range(x.shape[1]):
        if reset_after:
            xz, xr, xh = np.split(x[:, t] @ kernel + bias[0], 3, axis=1)
            hz, hr, hh = np.split(h @ recurrent_kernel + bias[1], 3, axis=1)
            z, r = gate(xz + hz), gate(xr + hr)
            candidate = act(xh + r * hh)
        else:
            xz, xr, xh = np.split(x[:, t] @ kernel + bias, 3, axis=1)
            z = gate(xz + h @ recurrent_kernel[:, :H])
            r = gate(xr + h @ recurrent_kernel[:, H : 2 * H])
            candidate = act(xh + (r * h) @ recurrent_kernel[:, 2 * H :])
        h = z * h + (1 - z) * candidate
        outputs.append(h)
    return np.stack(outputs, 1), h


def keras_lstm(x, h, c, kernel, recurrent_kernel, bias, activation, recurrent_activation):
    """Outputs (N, T, H) and the last states."""
    act, gate = ACTIVATIONS[activation], ACTIVATIONS[recurrent_activation]
    outputs = []
    for t in range(x.shape[1]):
        zi, zf, zc, zo = np.split(x[:, t] @ kernel + h @ recurrent_kernel + bias, 4, axis=1)
        c = gate(zf) * c + gate(zi) * act(zc)
        h = gate(zo) * act(c)
        outputs.append(h)
    return np.stack(outputs, 1), h, c


def configuration(seed):
    rng = np.random.default_rng(seed)
    kind, turn = KINDS[seed % 3], seed // 3
    return {
        "kind": kind,
        "activation": ("tanh", "relu", "softsign", "hard_tanh", "identity", "tanh")[turn % 6],
        "recurrent_activation": ("hard_sigmoid", "sigmoid")[turn // 6 % 2],
        "dtype": np.dtype(("f8", "f4")[turn % 4 == 3]),
        "T": int(rng.integers(2, 10)),
        "N": int(rng.integers(1, 10)),
        "D": int(rng.integers(1, 24)),
        "H": int(rng.integers(2, 40)),
    }


def swap(weights, H):
    """Keras's z, r, h as our r, z, n, along the last axis."""
    return np.concatenate([weights[..., H : 2 * H], weights[..., :H], weights[..., 2 * H :]], axis=-1)


@pytest.mark.parametrize("seed", range(CONFIGURATIONS))
def test_outputs(seed):
    c = configuration(seed)
    rng = np.random.default_rng((seed, 1))
    N, T, D, H, dtype = c["N"], c["T"], c["D"], c["H"], c["dtype"]
    options = {name: c[name] for name in ("activation", "recurrent_activation", "dtype")}
    gates = 4 if c["kind"] == "LSTM" else 3
    scale = 0.5 if c["activation"] == "identity" else 1.0  # nothing else bounds it
    kernel = scale * rng.standard_normal((D, gates * H)) / np.sqrt(D)
    recurrent_kernel = scale * rng.standard_normal((H, gates * H)) / np.sqrt(H)
    x, h_0, c_0 = (rng.standard_normal(shape).astype(dtype) for shape in ((N, T, D), (N, H), (N, H)))
    if c["kind"] == "LSTM":
        bias = rng.standard_normal(4 * H)
        expected = keras_lstm(
            *(a.astype("f8") for a in (x, h_0, c_0)), kernel, recurrent_kernel, bias, c["activation"],
            c["recurrent_activation"],
        )  # fmt: skip
        layer = fastlstm.LSTM(D, H, batch_first=True, **options)
        ours = kernel.T, recurrent_kernel.T, bias, 0 * bias
        state = h_0[None], c_0[None]
    else:
        after = c["kind"] == "GRU after"
        bias = rng.standard_normal((2, 3 * H)) if after else rng.standard_normal(3 * H)
        expected = keras_gru(
            x.astype("f8"), h_0.astype("f8"), kernel, recurrent_kernel, bias, c["activation"],
            c["recurrent_activation"], after,
        )  # fmt: skip
        layer = fastlstm.GRU(D, H, batch_first=True, reset_after=after, **options)
        if not after:  # our two biases add up: any split of Keras's one does
            part = rng.standard_normal(3 * H)
            bias = np.stack([part, bias - part])
        ours = swap(kernel, H).T, swap(recurrent_kernel, H).T, *swap(bias, H)
        state = h_0[None]
    names = "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"
    layer.load_state_dict(dict(zip(names, ours, strict=True)))
    y, end = layer(x, state)
    end = [s[0] for s in end] if c["kind"] == "LSTM" else [end[0]]
    assert np.mean(expected[0] != 0) > 0.2 and np.mean(np.abs(expected[0]) == 1) < 0.3
    tolerance = 1e-13 if dtype == np.float64 else 2e-6
    for ours, theirs in zip([y, *end], expected, strict=True):
        assert ours.shape == theirs.shape
        assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)


def test_hard_sigmoid_meets_its_three_pieces():
    """Gates at 0, on the line and at 1, one unit each, against numbers worked out by hand."""
    layer = fastlstm.GRU(
        1, 3, reset_after=False, recurrent_activation="hard_sigmoid", activation="identity", dtype=np.float64
    )
    layer.flat_params[:] = 0
    layer.params["bias_ih_l0"][3:6] = -4, 1.5, 4  # z = 0, 0.75, 1
    layer.params["bias_ih_l0"][6:] = 10  # n = 10
    y, _ = layer(np.zeros((1, 1, 1)), np.full((1, 1, 3), 2.0))
    np.testing.assert_allclose(y[0, 0], [10, 0.25 * 10 + 0.75 * 2, 2], rtol=1e-15)


def test_the_configurations_cover_the_options():
    assert CONFIGURATIONS >= 20
    tried = [configuration(seed) for seed in range(CONFIGURATIONS)]
    for kind in KINDS:
        mine = [c for c in tried if c["kind"] == kind]
        assert {c["activation"] for c in mine} == {"tanh", "relu", "softsign", "hard_tanh", "identity"}
        assert {c["recurrent_activation"] for c in mine} == {"sigmoid", "hard_sigmoid"}
        assert {c["dtype"].name for c in mine} == {"float32", "float64"}
    before = [c for c in tried if c["kind"] == "GRU before"]
    assert sum(c["recurrent_activation"] == "hard_sigmoid" for c in before) >= 5
