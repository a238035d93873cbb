"""The command line beside the first job itself: comparison, activations, help, Ctrl-C."""

import itertools
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from test_mnist import QUICK, run, write_tiny

import fastlstm
from fastlstm import __main__ as cli
from fastlstm import datasets, plot
from fastlstm.jobs import JobError, bench, compare, mnist


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("mnist"))


# ------------------------------------------------------------------- activation


@pytest.mark.parametrize(("cell", "activation"), [("lstm", "softsign"), ("gru", "hard_tanh"), ("rnn", "elu")])
def test_activation_is_that_of_the_layer(tiny, cell, activation):
    data = datasets.load_mnist(tiny)
    result = mnist.train(data, cell=cell, activation=activation, epochs=1, hidden=8, batch=64)
    assert result.layer.activation == activation
    assert result.losses != mnist.train(data, cell=cell, epochs=1, hidden=8, batch=64).losses


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--activation", "gelu"], "argument --activation: invalid choice: 'gelu'"),
        (["--activation", "scaled_tanh"], "argument --activation: invalid choice: 'scaled_tanh'"),
        (["--compare", "--cell", "gru"], "argument --cell: not allowed with argument --compare"),
        (["--compare", "--save", "w.safetensors"], "argument --save: not allowed with argument --compare"),
    ],
)
def test_options_that_do_not_go_together(options, text, monkeypatch, capsys):
    monkeypatch.setattr(mnist, "load_mnist", lambda _: pytest.fail("the options are checked before anything else"))
    with pytest.raises(SystemExit) as caught:
        cli.main(["mnist", *options])
    assert caught.value.code == 2
    assert text in capsys.readouterr().err


# --------------------------------------------------------------------- compare


def test_compare_prints_a_table_and_draws(tiny, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.setattr(compare, "PROBE", 32)
    target = tmp_path / "compare.png"
    assert cli.main(["mnist", "--data", str(tiny), *QUICK, "--threads", "1", "--compare", "--plot", str(target)]) == 0
    captured = capsys.readouterr()
    rows = [line.split() for line in captured.out.splitlines() if re.match("(LSTM|GRU|RNN) ", line)]
    assert [row[0] for row in rows] == ["LSTM", "GRU", "RNN"]
    for (_, accuracy, _, weights, _, _, images, *gradients), gates in zip(rows, (4, 3, 1), strict=True):
        assert float(accuracy) > 60  # chance is 10
        assert int(weights.replace(",", "")) == gates * 16 * (28 + 16 + 2) + 10 * 17
        assert float(images.replace(",", "")) > 0
        assert len(gradients) == 4 and all(float(value) > 0 for value in gradients)
    assert [line[:4] for line in captured.err.splitlines() if "epoch 6/6" in line] == ["LSTM", "GRU ", "RNN "]
    assert len((captured.out + captured.err).splitlines()) == 18 + 2 + 3 + 1 + 1
    assert target.read_bytes()[:4] == b"\x89PNG"


def test_watching_changes_nothing_and_sees_the_gradient_of_the_loss(tiny):
    data = datasets.load_mnist(tiny)
    options = {"cell": "gru", "epochs": 2, "hidden": 8, "batch": 64}
    watch = compare.Watch(data)
    assert mnist.train(data, watch=watch, **options).losses == mnist.train(data, **options).losses
    assert watch.steps == list(range(17)) and len(watch.sizes) == 17  # 2 epochs of 8 steps, and the end

    layer, linear = fastlstm.GRU(28, 8, dtype=np.float64, rng=0), mnist.nn.Linear(8, 10, dtype=np.float64, rng=1)
    watch = compare.Watch(data)
    watch.x, watch.labels = watch.x[-6:, :3].astype(np.float64), watch.labels[:3]
    watch(layer, linear, 0, 1)

    def loss_of(image, x):
        logits = linear(layer(x)[1][-1])
        return mnist.nn.softmax_cross_entropy(logits, watch.labels[image : image + 1])[0]

    squares = 0.0
    for image in range(3):
        x = watch.x[:, image : image + 1].copy()
        for feature in range(28):
            values = []
            for step in (1e-5, -1e-5):
                moved = x.copy()
                moved[0, 0, feature] += step
                values.append(loss_of(image, moved))
            squares += ((values[0] - values[1]) / 2e-5) ** 2
    np.testing.assert_allclose(watch.first[0], np.sqrt(squares / 3), rtol=1e-5)
    np.testing.assert_allclose(watch.share[0], watch.sizes[0][0] / watch.sizes[0][-1])


def test_time_of_watching_is_not_counted(tiny, monkeypatch):
    clock = itertools.count()
    passed = [0]

    def watch(*_):
        passed[0] += 10_000

    monkeypatch.setattr(mnist.time, "perf_counter", lambda: passed[0] + next(clock))
    result = mnist.train(datasets.load_mnist(tiny), watch=watch, epochs=2, hidden=4, batch=64)
    assert passed[0] == 10_000 * 17 and 0 < max(result.seconds) < 10_000


def test_picture_of_the_comparison(tiny):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    data, found = datasets.load_mnist(tiny), {}
    for name in ("LSTM", "RNN"):
        watch = compare.Watch(data)
        found[name] = mnist.train(data, cell=name.lower(), watch=watch, epochs=2, hidden=8, batch=64), watch
    accuracy, training, rows = compare.picture(found, 40, 2).axes
    np.testing.assert_allclose(accuracy.lines[0].get_ydata(), np.array(found["LSTM"][0].test_correct) / 0.4)
    np.testing.assert_allclose(training.lines[1].get_ydata(), found["RNN"][1].share)
    np.testing.assert_allclose(training.lines[1].get_xdata()[[0, -1]], [0, 2])
    sizes = found["RNN"][1].sizes[-1]
    np.testing.assert_allclose(rows.lines[1].get_ydata(), sizes[::-1] / sizes[-1])
    colours = [[line.get_color() for line in ax.lines] for ax in (accuracy, training, rows)]
    assert colours[0] == colours[1] == colours[2]


def test_a_diverging_cell_is_named(tiny, monkeypatch, capsys):
    real = mnist.train

    def diverges(data, *, cell, **options):
        if cell == "rnn":
            raise JobError("the loss is nan in step 1 of 90; try a smaller --lr")
        return real(data, cell=cell, **options)

    monkeypatch.setattr(mnist, "train", diverges)
    assert cli.main(["mnist", "--data", str(tiny), "--epochs", "1", "--hidden", "4", "--compare"]) == 1
    assert capsys.readouterr().err.endswith(
        "fastlstm mnist: RNN: the loss is nan in step 1 of 90; try a smaller --lr\n"
    )


# ------------------------------------------------------------ help, Ctrl-C, lines


@pytest.mark.parametrize("command", [[], ["mnist"], ["train"], ["predict"], ["bench"]], ids=str)
def test_help_has_examples_that_parse(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    examples = re.findall(r"^  python -m fastlstm (.+)$", shown.split("examples:")[1], re.MULTILINE)
    assert len(examples) >= 2
    parser, _ = cli._parser()
    for line in examples:
        if "COMMAND" not in line:
            assert parser.parse_args(line.split()).command
    assert max(map(len, shown.splitlines())) <= 100


@pytest.mark.parametrize("script", [False, True], ids=["python -m fastlstm", "fastlstm"])
@pytest.mark.parametrize("delay", [0.03, 0.06, 0.1, 0.2])
def test_interrupt_during_the_imports(delay, script, tmp_path):
    """The package says when its first line runs; the signal comes that long after it."""
    folder = str(plot.__path__[0]).removesuffix("/fastlstm/plot")
    if script:
        program = tmp_path / "fastlstm"
        program.write_text("import sys\nfrom fastlstm.__main__ import main\nsys.exit(main())\n", encoding="utf-8")
        command = [sys.executable, "-v", str(program), "mnist", "--data", "/nowhere"]
    else:
        command = [sys.executable, "-v", "-m", "fastlstm", "mnist", "--data", "/nowhere"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               env={"PYTHONPATH": folder})  # fmt: skip
    for line in process.stderr:
        if "import 'fastlstm._interrupt'" in line:
            break
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    said = [text for text in err.splitlines() if not text.startswith(("#", "import "))]
    assert "Traceback" not in err and "KeyboardInterrupt" not in err
    assert process.returncode in (-signal.SIGINT, 130, 1)  # in the imports, after them, or too late: no such folder
    assert len(said) <= 2


def test_interrupt_is_handed_back():
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "  # jobs behind ignore it
        "sys.argv = ['fastlstm']; import fastlstm; "
        "print(signal.getsignal(signal.SIGINT) is signal.SIG_DFL); "
        "fastlstm._interrupt.hand_back(); print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    )
    for name, expected in (("fastlstm", ["True", "True"]), ("other", ["False", "True"])):
        done = subprocess.run([sys.executable, "-c", code.replace("['fastlstm']", f"['{name}']")],
                              capture_output=True, text=True, timeout=60, check=True)  # fmt: skip
        assert done.stdout.split() == expected


def test_first_command_into_a_file_is_short(tiny):
    """Four epochs, the default: a line each and the four of the result, no warning."""
    done = run("mnist", "--data", tiny, "--hidden", "8")
    lines = (done.stdout + done.stderr).splitlines()
    assert done.returncode == 0 and len(lines) == 8
    assert not [line for line in lines if "warn" in line.lower() or "install" in line.lower()]


# ----------------------------------------------------------------------- bench


@pytest.fixture
def quick(monkeypatch):
    """Two small shapes and hardly any time."""
    monkeypatch.setattr(bench, "SHAPES", {"small": (5, 3, 4, 8), "other": (2, 1, 3, 5)})
    monkeypatch.setattr(bench, "SECONDS", 1e-3)
    monkeypatch.setenv("PYTHONPATH", str(plot.__path__[0]).removesuffix("/fastlstm/plot"))


def test_bench_measures_us_and_whoever_is_there(quick, capsys):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    assert cli.main(["bench", "--rounds", "15", "--threads", "1", "--peers", "torch"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"fastlstm \S+, \w+, threads: 1\ntorch: \d", out)
    peak = float(re.search(r"FMA peak (\d+) GFLOP/s", out)[1])
    assert peak > 1 and len(re.findall(r"[KM]B \d+ GB/s", out)) == 4
    rows = [line.split() for line in out.splitlines() if line.startswith(("small ", "other "))]
    assert [row[1] for row in rows] == ["5,3,4,8", "2,1,3,5"]
    for row in rows:
        assert len(row) == 8
        ms, _, torch_inference, training_ms, _, torch_training = map(float, row[2:])
        assert 0 < ms < training_ms and torch_inference > 0 and torch_training > 0


def test_bench_without_others(quick, capsys):
    assert cli.main(["bench", "--rounds", "1", "--peers"]) == 0
    out = capsys.readouterr().out
    assert "torch" not in out and all(len(line.split()) == 6 for line in out.splitlines() if line[:5] == "small")


class FakeWorker:
    """Answers with what the test gives it."""

    def __init__(self, name, values, seconds=()):
        self.name, self.values, self.seconds = name, values, iter(seconds)

    def __call__(self, do, **request):
        return self.values if do == "prepare" else next(self.seconds)


def test_bench_takes_medians_and_refuses_other_outputs():
    ours = FakeWorker("fastlstm", {"inference": [1.0, 2.0], "training": [1.0, 2.0]}, [3, 1, 2, 60, 50, 40])
    ort = FakeWorker("onnxruntime", {"inference": [1.0, 2.00001]}, [8, 9, 7])
    times = bench.measure([ours, ort], (1, 1, 1, 1), 3)
    assert times == {"inference": {"fastlstm": 2, "onnxruntime": 8}, "training": {"fastlstm": 50}}
    shape = (10, 10, 50, 50)
    assert bench.flops(shape, "inference") == 10 * 10 * 2 * 4 * 50 * 100
    row = bench.line("x", shape, times, 1e-3, ["onnxruntime"]).split()
    assert row == ["x", "10,10,50,50", "2000", f"{100 * 4e6 / 2 / 1e6:.0f}", "4.00", "50000", "24"]
    other = FakeWorker("torch", {"inference": [1.0, 2.1]}, [1])
    with pytest.raises(JobError, match=r"torch computes another output at \(1, 1, 1, 1\)"):
        bench.measure([ours, other], (1, 1, 1, 1), 1)


def test_bench_says_what_is_missing_and_what_died(quick):
    about = {"fastlstm": {"version": "1", "isa": "avx2", "threads": 2}, "torch": {"missing": "No module"}}
    head = bench.head(about, {"peak": 100.0, "read": {"16 KB": 50.0}})
    assert head[1] == "torch: not installed" and "FMA peak 100 GFLOP/s" in head[2]
    with bench.Worker("nothing", 1) as worker, pytest.raises(JobError, match="process of nothing ended with status 1"):
        worker.answer()
    with bench.Worker("fastlstm", 1) as worker:
        assert worker.answer()["threads"] == 1
        process = worker._process
    assert process.returncode == -signal.SIGKILL
    with bench.Worker("fastlstm", 1) as worker:
        worker.answer()
        worker._process.kill()
        worker._process.wait()
        with pytest.raises(JobError, match="process of fastlstm ended with status -9"):
            worker("limits")
