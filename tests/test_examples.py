"""The examples run, and what they claim holds."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import fastlstm
from fastlstm import nn

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_truncated_bptt_runs(capsys):
    losses = load("truncated_bptt").main()
    assert losses[-1] < 0.5 * losses[0]
    assert capsys.readouterr().out.count("full gradient in windows") == 3


def test_truncation_stops_gradients_and_carries_states():
    """A window's gradient is that of one pass from the carried state, and differs from the full one."""
    example = load("truncated_bptt")
    x, target = example.series(40, 3, np.random.default_rng(1))
    lstm = fastlstm.LSTM(1, 8, dtype=np.float64, rng=0)
    head = nn.Linear(8, 1, dtype=np.float64, rng=0)
    _, full, _ = example.gradients_in_one_pass(lstm, head, x, target)
    y, _, _ = lstm.forward(x)
    lstm.zero_grad()
    state, outputs = None, []
    for begin in range(0, 40, 8):
        y_part, state, tape = lstm.forward(x[begin : begin + 8], state)
        outputs.append(y_part.copy())
        prediction, kept = head.forward(y_part)
        dprediction = nn.mse(prediction, target[begin : begin + 8])[1] / 5
        lstm.backward(tape, head.backward(kept, dprediction))
    assert np.array_equal(np.concatenate(outputs), y)
    error = np.linalg.norm(lstm.flat_grads - full) / np.linalg.norm(full)
    assert 1e-6 < error < 1


@pytest.mark.parametrize("kind", [fastlstm.LSTM, fastlstm.GRU, fastlstm.RNN])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("window", [1, 3, 8])
def test_windows_with_state_gradients_are_one_pass_to_the_bit(kind, dtype, window):
    T, N, D, H = 20, 5, 3, 9
    layer = kind(D, H, num_layers=1, dtype=dtype, rng=0)
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((T, N, D)).astype(dtype), rng.standard_normal((T, N, H)).astype(dtype)
    _, _, tape = layer.forward(x)
    dx, dstart = layer.backward(tape, dy)
    expected = layer.flat_grads.tobytes()

    layer.zero_grad()
    tapes, state = [], None
    for begin in range(0, T, window):
        _, state, tape = layer.forward(x[begin : begin + window], state)
        tapes.append((begin, tape))
    dstate, dx_w = None, np.empty_like(dx)
    for begin, tape in reversed(tapes):
        part = slice(begin, begin + window)
        dx_w[part], dstate = layer.backward(tape, dy[part], dstate)
    assert layer.flat_grads.tobytes() == expected
    assert dx_w.tobytes() == dx.tobytes()
    pairs = zip(dstate, dstart, strict=True) if isinstance(dstart, tuple) else [(dstate, dstart)]
    assert all(a.tobytes() == b.tobytes() for a, b in pairs)
