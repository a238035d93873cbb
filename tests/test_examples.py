"""The examples run, and what they claim holds."""

import importlib.util
import os
import shutil
import struct
import subprocess
import sys
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
    np.testing.assert_allclose(np.concatenate(outputs), y, rtol=1e-12)  # to the bit by our products, see test_exact
    error = np.linalg.norm(lstm.flat_grads - full) / np.linalg.norm(full)
    assert 1e-6 < error < 1


@pytest.mark.own
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


def test_forecast_runs(capsys, tmp_path):
    """Sunspots, by one network and two origins: better than two of the three others already."""
    for name in ("statsmodels", "sklearn", "matplotlib"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    path = tmp_path / "forecast.png"
    errors = load("forecast").main(["sunspots"], path, origins=2, step=10, refit_every=2, n_estimators=1, epochs=30)
    (found,) = errors.values()
    assert found["fastlstm"] < min(found["last value"], found["smoothing"])
    assert path.read_bytes()[:4] == b"\x89PNG" and capsys.readouterr().out.count("mean absolute error") == 4


def test_adding_problem_runs(capsys):
    """Over 15 steps; the full one needs minutes."""
    errors = load("adding_problem").main(steps=15, updates=600)
    assert max(errors["lstm"], errors["gru"]) < 0.02 and capsys.readouterr().out.count("mean squared error") == 3


def test_anomaly_detection_runs():
    found, false = load("anomaly_detection").main(steps=4000, hidden=24, epochs=30, anomalies=10)
    assert found >= 0.8 and false < 0.002


def test_recurrent_policy_learns_to_remember():
    before, after = load("recurrent_policy").main(updates=50, size=32, steps=40, shortest=3, longest=8)
    assert before < 0.75 and after > 0.9


def test_character_model_runs(capsys):
    alone, found = load("character_model").main(epochs=3, hidden=64, window=32, size=16, lr=1e-2, limit=40_000)
    assert found[-1] < found[0] < alone
    assert len(capsys.readouterr().out.splitlines()) >= 5


@pytest.fixture
def stripes(tmp_path):
    """A folder with MNIST's files, in which ten kinds of stripes are the digits."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 600), ("t10k", 100)):
        labels = rng.integers(0, 10, n).astype(np.uint8)
        images = rng.integers(0, 60, (n, 28, 28)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 + 2 * label : 6 + 2 * label] += 150
        for kind, data in (("images-idx3", images), ("labels-idx1", labels)):
            head = struct.pack(f">{1 + data.ndim}I", 0x800 + data.ndim, *data.shape)
            (tmp_path / f"{part}-{kind}-ubyte").write_bytes(head + data.tobytes())
    return tmp_path


def test_mnist_classifier_runs(stripes):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    assert load("mnist_classifier").main(epochs=15, hidden_size=32, batch_size=16, folder=stripes) > 0.9


def test_mnist_programs_run(stripes):
    """The timing of whole programs, ours and PyTorch's."""
    for name in ("sklearn", "torch"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    command = [sys.executable, EXAMPLES.parent / "benchmarks" / "mnist_programs.py", "--data", stripes, "--epochs", "2"]
    command += ["--rounds", "1", "--threads", "1", "--programs", "fastlstm", "torch"]
    environment = os.environ | {"PYTHONPATH": str(Path(fastlstm.__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr, done.stderr
    table = [line.split() for line in done.stdout.splitlines()[-2:]]
    assert [row[0] for row in table] == ["fastlstm", "torch"] and table[0][-3] == "1.00"
    assert all(float(value) > 0 for row in table for value in row[-4:])


def test_japanese_vowels_runs():
    """On sequences of the same shapes; the real ones where aeon works."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(9, 12))
    parts = []
    for n in (90, 90):
        y = np.arange(n) % 9
        rows = [centres[k] + rng.normal(size=(rng.integers(7, 30), 12)) for k in y]
        parts += [[row.astype(np.float32) for row in rows], y.astype(str)]
    example = load("japanese_vowels")
    assert example.main(epochs=15, hidden_size=16, data=parts) > 0.9
    try:
        import aeon.datasets  # noqa: F401
    except ImportError:
        return
    assert example.main(epochs=15, hidden_size=32) > 0.9


def test_every_example_is_tested_and_says_what_it_reaches():
    tests = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f'load("{path.stem}")' in tests or f'"{path.name}"' in tests, path.name
        assert "Run it:" in path.read_text(encoding="utf-8").split('"""')[1], path.name


# ---- out of one machine


def test_data_parallel_mpi():
    """Two processes have the weights of each other to the bit, and the loss curve of one with the whole batch."""
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    mpiexec = Path(sys.executable).with_name("mpiexec")
    mpiexec = str(mpiexec) if mpiexec.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        pytest.skip("no mpiexec here")
    path, curves = {"PYTHONPATH": str(Path(fastlstm.__file__).parents[1])}, {}
    for count in (1, 2):
        command = [mpiexec, "-n", str(count), sys.executable, str(EXAMPLES / "data_parallel_mpi.py")]
        run = subprocess.run(command, capture_output=True, text=True, timeout=100, env=os.environ | path)
        assert run.returncode == 0, run.stderr
        first, _, last = run.stdout.strip().splitlines()
        assert first.startswith(f"{count} processes") and "on all of them" in first
        curves[count] = np.array(last.split(), float)
    assert len(curves[1]) == 60 and curves[1][-1] < 0.6 * curves[1][0]
    np.testing.assert_allclose(curves[2], curves[1], rtol=0, atol=1e-10)


@pytest.mark.own
def test_batch_dask(capsys):
    pytest.importorskip("dask", reason="Dask is not installed")
    found, want = load("batch_dask").main(40, 4, "threads")
    assert np.array_equal(found, want) and found.shape == (40, 32)
