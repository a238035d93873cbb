"""Gradients where activations are saturated: the bound of docs/promises.md with its condition number."""

import numpy as np
import pytest

import fastlstm

POINTS = (0.5, 1.7, 3.0, 5.1, 6.5, 8.0, 11.9, 15.0)


def relative(got, want):
    return abs(float(got) - want) / abs(want)


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=("f32", "f64"))
def test_tanh(isa, dtype):
    """dh/da = 1 - h^2: its relative error is at most eps times 2 h^2 / (1 - h^2), beside that of the rest."""
    eps = float(np.finfo(dtype).eps)
    largest = 0
    for a in POINTS:
        for sign in (1, -1):
            layer = fastlstm.RNN(1, 1, bias=False, dtype=dtype)
            w = dtype(sign * a)
            layer.flat_params[:] = w, 0
            y, _, tape = layer.forward(np.ones((1, 1, 1), dtype))
            dx, _ = layer.backward(tape, np.ones_like(y))
            e = np.exp(-2 * abs(float(w)))
            slope = 4 * e / (1 + e) ** 2
            error = relative(dx[0, 0, 0], float(w) * slope)
            assert error <= eps * (2 * (1 - slope) / slope + 8), (a, error)
            largest = max(largest, error)
    assert largest > 100 * eps, "nothing was saturated"


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=("f32", "f64"))
def test_sigmoid(isa, dtype):
    """di/da = i (1 - i): its relative error is at most eps times 1 / (1 - i); near 0 there is no loss."""
    eps = float(np.finfo(dtype).eps)
    for a in POINTS:
        for sign in (1, -1):
            layer = fastlstm.LSTM(1, 1, dtype=dtype)
            w = dtype(sign * a)
            layer.params["weight_ih_l0"] = np.array([[w], [0], [0], [0]])
            layer.params["weight_hh_l0"] = np.zeros((4, 1))
            layer.params["bias_hh_l0"] = np.zeros(4)
            layer.params["bias_ih_l0"] = np.array([0, 0, 0.5, 0.25])
            y, _, tape = layer.forward(np.ones((1, 1, 1), dtype))
            dx, _ = layer.backward(tape, np.ones_like(y))
            e = np.exp(-float(w))
            i, g, o = 1 / (1 + e), np.tanh(0.5), 1 / (1 + np.exp(-0.25))
            want = float(w) * o * (1 - np.tanh(i * g) ** 2) * g * e / (1 + e) ** 2
            assert relative(dx[0, 0, 0], want) <= eps * ((1 + e) / e + 16), a
