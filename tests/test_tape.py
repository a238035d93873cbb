"""What can be seen of a forward pass, and how much memory it takes."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import CELLS, STATES, WITH_C, make, problem

from fastlstm import LSTM, reference

OPTIONS = {
    "lstm": [
        {},
        {"proj_size": 4},
        {"zoneout": (0.3, 0.2), "recurrent_dropout": 0.3},
        {"activation": "softsign"},
    ],
    "gru": [{}, {"zoneout": 0.3, "recurrent_dropout": 0.3}],
    "gru_reset_before": [{}, {"zoneout": 0.3, "recurrent_dropout": 0.3}],
    "rnn": [{}, {"zoneout": 0.3, "recurrent_dropout": 0.3}],
}
OPTIONS["lstm_peephole"] = OPTIONS["lstm_coupled"] = OPTIONS["lstm_norm"] = OPTIONS["lstm"]
OPTIONS["slstm"] = [*OPTIONS["rnn"], {"num_heads": 2}, {"num_heads": 4, "zoneout": 0.3, "recurrent_dropout": 0.3}]
NAMES = {"lstm": "ifgo", "lstm_peephole": "ifgo", "lstm_coupled": "fgo", "gru": "rzn", "gru_reset_before": "rzn"}
NAMES |= {"lstm_norm": "ifgo", "slstm": "ifzo", "rnn": "h"}


@pytest.mark.parametrize("lengths", (None, (3, 7, 0, 1, 5)), ids=("whole", "ragged"))
@pytest.mark.parametrize("cell, options", [(cell, options) for cell in CELLS for options in OPTIONS[cell]])
def test_gates_cells_hidden(isa, cell, options, lengths):
    layer = make(
        cell,
        3,
        12 if "num_heads" in options else 11,
        num_layers=2,
        dropout=0.3,
        bidirectional=True,
        batch_first=True,
        dtype=np.float64,
        **options,
    )
    p = problem(layer, 7, 5, lengths)
    y, _, tape = layer.forward(p.x, p.state, lengths)
    _, _, want = reference.forward(layer.params, p.x, p.state, lengths, **layer.config, masks=tape.masks)
    past = np.arange(7)[:, None] >= np.array(lengths or (7,) * 5)
    for number in range(2):
        for reverse in (False, True):
            got = tape.gates(number, reverse=reverse)
            assert "".join(got) == NAMES[cell]
            pairs = [(got[name], value) for name, value in want.gates(number, reverse).items()]
            pairs.append((tape.hidden(number, reverse=reverse), want.hidden(number, reverse)))
            if len(STATES[cell]) > 1:
                pairs.append((tape.cells(number, reverse=reverse), want.cells(number, reverse)))
            for a, b in pairs:
                assert a.shape == b.shape == (7, 5, b.shape[2])
                assert abs(a - b).max() <= 1e-13 and abs(b).max() > 0.01
                assert not a[past].any()
                a[:] = np.nan  # a copy: the tape does not change
            if len(STATES[cell]) == 1:
                with pytest.raises(ValueError, match="no cell state"):
                    tape.cells(number, reverse=reverse)
    width = tape.hidden(1).shape[2]
    np.testing.assert_array_equal(y[..., :width], tape.hidden(1).swapaxes(0, 1))
    np.testing.assert_array_equal(y[..., width:], tape.hidden(1, True).swapaxes(0, 1))
    dx, _ = layer.backward(tape, p.dy, p.dstate)
    np.testing.assert_allclose(dx, reference.backward(want, p.dy, p.dstate)[0], rtol=0, atol=1e-12)


def test_one_sequence():
    layer = make("lstm", 3, 11, dtype=np.float64)
    p = problem(layer, 7, 1, single=True)
    y, _, tape = layer.forward(p.x, p.state)
    assert tape.gates()["f"].shape == tape.cells().shape == (7, 1, 11)
    np.testing.assert_array_equal(tape.hidden()[:, 0], y)


@pytest.mark.parametrize("cell", CELLS)
def test_used_tape(cell):
    layer = make(cell, 3, 11, num_layers=2, dropout=0.5, recurrent_dropout=0.3)
    p = problem(layer, 7, 5)
    _, _, tape = layer.forward(p.x)
    layer.backward(tape, p.dy)
    grads = layer.flat_grads.copy()
    for use in (lambda: layer.backward(tape, p.dy), tape.gates, tape.cells, tape.hidden,
                lambda: tape.masks, lambda: tape.gates(99)):  # fmt: skip
        with pytest.raises(RuntimeError, match="tape: already used"):
            use()
    np.testing.assert_array_equal(layer.flat_grads, grads)


def test_wrong_tape():
    layer, twin = make("lstm", 3, 11), make("lstm", 3, 11)
    p = problem(layer, 7, 5)
    _, _, tape = layer.forward(p.x)
    with pytest.raises(ValueError, match="tape.*another layer"):
        twin.backward(tape, p.dy)
    for wrong in (None, p.dy, "tape", layer):
        with pytest.raises(TypeError, match="tape: expected the Tape"):
            layer.backward(wrong, p.dy)
    for dy in (p.dy[:-1], p.dy[..., :-1], p.dy[:, :2], p.dy[None]):
        with pytest.raises(ValueError, match="dy: expected shape"):
            layer.backward(tape, dy)
    for dstate, error in (
        (p.dstate[0], TypeError),
        ((p.dstate[0], p.dstate[1][:, :2]), ValueError),
        ((1, 2, 3), TypeError),
    ):
        with pytest.raises(error, match="dstate|dh_n|dc_n"):
            layer.backward(tape, p.dy, dstate)
    assert not layer.flat_grads.any()
    layer.backward(tape, p.dy, p.dstate)  # what was refused has not used it up


def test_layer_index():
    layer = make("lstm", 3, 11, num_layers=2)
    _, _, tape = layer.forward(problem(layer, 7, 5).x)
    for look in (tape.gates, tape.cells, tape.hidden):
        for number in (2, -1, 99):
            with pytest.raises(ValueError, match="layer: expected"):
                look(number)
        for number in (0.0, "0", None, True):
            with pytest.raises(TypeError, match="layer: expected"):
                look(number)
        with pytest.raises(ValueError, match="reverse: expected False"):
            look(0, reverse=True)
        look(np.int64(1))


@pytest.mark.parametrize("cell", CELLS)
def test_checkpointed_tape(cell):
    layer = make(cell, 3, 11, num_layers=2, dropout=0.3, zoneout=(0.2, 0.2) if cell in WITH_C else 0.2)
    p = problem(layer, 7, 5, (3, 7, 0, 1, 5))
    y, _, tape = layer.forward(p.x, p.state, p.lengths, checkpoint_every=3)
    for look in (tape.gates, tape.cells):
        with pytest.raises(RuntimeError, match="checkpoint_every"):
            look()
    np.testing.assert_array_equal(tape.hidden(1), y)
    assert set(tape.masks["zoneout_h"]) == {(0, 0), (1, 0)}
    for every, error in (
        (0, ValueError),
        (-1, ValueError),
        (1.5, TypeError),
        ("3", TypeError),
        (True, TypeError),
    ):
        with pytest.raises(error, match="checkpoint_every"):
            layer.forward(p.x, checkpoint_every=every)


# ---- memory, in MB of resident memory of a fresh process

MEASURE = """
import sys
import numpy as np, fastlstm
fastlstm.set_num_threads(1)

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))

what, T = sys.argv[1], int(sys.argv[2])
N, H, layers = 16, 64, 1 if what.startswith("train") else 3
layer = fastlstm.LSTM(1, H, layers, rng=0) if what.startswith("train") else fastlstm.RNN(1, H, layers, rng=0)
x = np.ones((T, N, 1), np.float32)
layer(x[:200])
layer.backward(layer.forward(x[:200])[2], np.zeros((200, N, H), np.float32))
before = peak()
if what == "infer":
    y, _ = layer(x)
else:
    y, _, tape = layer.forward(x, checkpoint_every=64 if what == "train checkpoint" else None)
print((peak() - before) * 2**20 / y.nbytes)
"""


def growth(what, T):
    """Growth of the peak through one call, as a multiple of y."""
    run = subprocess.run([sys.executable, "-c", MEASURE, what, str(T)], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return float(run.stdout)


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")


@linux
def test_inference_keeps_nothing():
    """Stacked layers: y is all that grows with T (41 MB here); one whole layer between would make it 2."""
    assert 0.9 < growth("infer", 10_000) < 1.25


@linux
def test_tape_size():
    """LSTM, per unit and step: four gates, c and h; with checkpoints h alone and a few states."""
    assert 5.7 < growth("train", 5000) < 6.3
    assert 0.9 < growth("train checkpoint", 5000) < 1.25


@pytest.mark.parametrize("every", (None, 3))
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
@pytest.mark.parametrize("cell", CELLS)
def test_parameters_that_changed_are_noticed(cell, dtype, every):
    layer = make(cell, 3, 5, dtype=dtype)  # an odd number of words for the RNN
    p = problem(layer, 7, 2)
    tape = layer.forward(p.x, checkpoint_every=every)[2]
    for i in (0, -1, layer.flat_params.size // 2):
        before = layer.flat_params[i]
        layer.flat_params[i] = np.nextafter(before, 2)
        with pytest.raises(RuntimeError, match="the parameters have changed since forward"):
            layer.backward(tape, p.dy)
        layer.flat_params[i] = before
    assert not layer.flat_grads.any()
    layer.backward(tape, p.dy)


@pytest.mark.parametrize("steps", (1, 15, 1024))
def test_a_change_of_a_whole_parameter_of_a_large_layer_is_noticed(steps):
    """For few rows a sample of the values stands for all, of every parameter."""
    layer = LSTM(100, 60, num_layers=2, rng=0)
    x = np.zeros((steps, 1, 100), np.float32)
    changes = [*layer.params.values(), layer.flat_params] + [layer.flat_params[77:78]] * (steps == 1024)
    for parameter in changes:
        y, _, tape = layer.forward(x)
        before = parameter.copy()
        parameter -= 1e-3 * np.abs(parameter)
        with pytest.raises(RuntimeError, match="the parameters have changed since forward"):
            layer.backward(tape, y)
        parameter[...] = before
        layer.backward(tape, y)
