"""What files of all kinds stand on: our format, atomic writing, other packages looked for when they are needed."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import importlib
import json
import os
import secrets
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ._types import Array

FORMAT = 1  # of the description in the metadata


def save(module: Any, path: str | os.PathLike[str]) -> None:
    """Write a layer, a module of `nn` or a `Stack` to a file: its parameters and everything that its constructor took.

    The format is safetensors: parameters under PyTorch's names, so that other programs read them too, and the
    description as JSON in the metadata, with a SHA-256 of all of it. The state of ``rng`` is not kept.

    The file is written beside ``path`` first, brought to the disk and then renamed, so that at any moment, also after
    a crash or a power cut, ``path`` is the old file or the new one, whole. A process that is killed meanwhile leaves a
    file ``.NAME.xxxxxxxx.part`` behind; the next save takes it away.

    Parameters
    ----------
    module : LSTM, SLSTM, GRU, RNN, Stack, nn.Sequential or another module of nn
    path : path-like

    Raises
    ------
    OSError
        The file cannot be written; what was there is untouched.
    """
    safetensors = library("safetensors.numpy", "safetensors")
    if not hasattr(module, "_describe"):
        raise TypeError(f"module: expected a layer, a module of nn or a Stack, got {type(module).__name__}")
    described = json.dumps({"format": FORMAT} | module._describe())
    tensors = module.params
    metadata = {"fastlstm": described, "sha256": digest(described, tensors)}
    replace_file(path, safetensors.save(tensors, metadata))


def options_of(module: Any) -> dict[str, Any]:
    """Class and constructor arguments of a module, for JSON."""
    options = {name: str(v) if name == "dtype" else v for name, v in module.options.items()}
    return {"class": type(module).__name__, "options": options}


def digest(described: str, tensors: Mapping[str, Array]) -> str:
    """SHA-256 of a file's content."""
    found = hashlib.sha256(described.encode())
    for name in sorted(tensors):
        found.update(f"{name}{tensors[name].shape}{tensors[name].dtype}".encode())
        found.update(tensors[name].data)
    return found.hexdigest()


def replace_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Give ``path`` this content, whole or not at all, with the permissions that it had or the usual ones."""
    target = Path(os.path.realpath(path))  # a link stays a link
    for old in target.parent.glob(f".{glob.escape(target.name[:100])}.????????.part"):
        if abandoned(old, old):
            old.unlink(missing_ok=True)
    part = target.with_name(f".{target.name[:100]}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb") as file:
            hold(file)
            with suppress(FileNotFoundError):
                os.fchmod(file.fileno(), stat.S_IMODE(os.stat(target).st_mode))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, survives a power cut
    finally:
        os.close(folder)


def hold(file: IO[bytes]) -> None:
    """Mark a file as in use, until it is closed or the process ends, however it ends."""
    with suppress(OSError):  # a file system without locks
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def abandoned(path: Path, lock: Path) -> bool:
    """Whether ``path`` is left from a killed run: older than a minute, and nobody holds the file ``lock``."""
    try:
        if time.time() - path.stat().st_mtime < 60:  # its lock may be about to come
            return False
        with open(lock, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:  # held, gone, or not ours
        return False


def regular(path: str | os.PathLike[str]) -> None:
    """Refuse folders, pipes and devices before a library maps them into memory."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{os.fspath(path)}: is a directory")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{os.fspath(path)}: expected a regular file")


def library(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this needs {package}: python -m pip install {package}") from error


def widen_bfloat16(bits: Array) -> NDArray[np.float32]:
    """float32 of the bits of bfloat16, which are its upper half."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
