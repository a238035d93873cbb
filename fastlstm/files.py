"""Files: layers in the safetensors format, state dicts of others without their frameworks, orders of gates."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from . import _checks
from ._parameters import Shapes
from ._saved import FORMAT, digest, library, regular, save, widen_bfloat16
from ._types import Array

__all__ = ["gate_order", "load", "read_state_dict", "save"]

_DTYPES = {"float32": "F32", "float64": "F64"}
# Letters that name the same gate: the candidate is g, c (cell), j (TensorFlow 1), n (new), h; the update gate z, u.
_ALIASES = str.maketrans({"c": "g", "j": "g", "n": "g", "h": "g", "u": "z"})
# How a weight's gates follow each other here and elsewhere.
ORDERS = {
    "fastlstm": {"LSTM": "ifgo", "GRU": "rzn", "RNN": "h"},  # and PyTorch
    "onnx": {"LSTM": "iofc", "GRU": "zrh", "RNN": "h"},
    "keras": {"LSTM": "ifco", "GRU": "zrh", "RNN": "h"},
    "tf1": {"LSTM": "ijfo", "GRU": "ruc", "RNN": "h"},
}


def load(path: str | os.PathLike[str]) -> Any:
    """Read what `save` wrote.

    Parameters
    ----------
    path : path-like

    Returns
    -------
    LSTM, SLSTM, GRU, RNN, Stack, nn.Sequential or another module of nn
        As it was saved, not frozen, with zero gradients and a new ``rng``. A module that occurred twice in a Sequential
        does again.

    Raises
    ------
    ValueError
        The file is damaged, or of another kind. Nothing in it is executed, and what it claims about sizes is compared
        with what it holds before memory is taken.
    OSError
        It cannot be read.
    """
    safetensors = library("safetensors", "safetensors")
    regular(path)
    try:
        with safetensors.safe_open(os.fspath(path), "numpy") as file:
            return _read(file)
    except (safetensors.SafetensorError, TypeError, LookupError, ValueError, MemoryError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)}: not a whole file of fastlstm: {error}") from None


def _read(file: Any) -> Any:
    metadata = file.metadata() or {}
    if "fastlstm" not in metadata or "sha256" not in metadata:
        raise ValueError("expected a description of the layer in the metadata, found none; read_state_dict reads the "
                         "weights alone")  # fmt: skip
    described = json.loads(metadata["fastlstm"])
    if not isinstance(described, dict) or described.pop("format", None) != FORMAT:
        raise ValueError(f"expected format {FORMAT} of the description")
    held = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in held.items()}
    module = _build(described, found)
    views = module.params
    if views.keys() != found.keys():
        raise ValueError(f"expected the arrays {sorted(views)}, found {sorted(found)}")
    for name, view in views.items():
        view[...] = file.get_tensor(name)
    if digest(metadata["fastlstm"], views) != metadata["sha256"]:
        raise ValueError("its content does not match its SHA-256")
    return module


def _build(described: Any, found: Mapping[str, tuple[tuple[int, ...], str]], prefix: str = "") -> Any:
    """A module without values, after a look at whether the file holds what its options ask for."""
    from . import layers, nn
    from .stack import Stack

    name = described["class"]
    if name == "Stack":
        parts = described["layers"]
        if not isinstance(parts, list) or prefix:
            raise ValueError("expected a list of layers in a Stack, and no Stack in a Stack")
        return Stack([_build(part, found, f"{i}.") for i, part in enumerate(parts)])
    if name == "Sequential":
        modules: list[Any] = []
        for i, part in enumerate(described["modules"]):
            modules.append(modules[part["same"]] if "same" in part else _build(part, found, f"{prefix}{i}."))
        return nn.Sequential(*modules)
    if name == "Recurrent":
        return nn.Recurrent(_build(described["layer"], found, prefix), _checks.flag("last", described["last"]))
    kinds = (layers.LSTM, layers.SLSTM, layers.GRU, layers.RNN, nn.Linear, nn.Embedding, nn.LayerNorm, nn.Dropout)
    classes: dict[str, Any] = {kind.__name__: kind for kind in kinds}
    names = [*classes, "Recurrent", "Sequential", "Stack"]
    if not isinstance(name, str) or name not in classes:
        raise ValueError(f"class: expected one of {', '.join(names)}, got {name!r}")
    options = dict(described["options"])
    if options.get("dtype") not in _DTYPES:
        raise ValueError(f"dtype: expected float32 or float64, got {options.get('dtype')!r}")
    dtype = _DTYPES[options["dtype"]]

    def check(shapes: Shapes) -> None:
        for key, shape in shapes:
            if found.get(prefix + key) != (shape, dtype):
                raise ValueError(f"{prefix + key}: expected {dtype} of shape {shape}, "
                                 f"found {found.get(prefix + key, 'none')}")  # fmt: skip

    return classes[name]._empty(options, check)


def read_state_dict(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """Read the weights in a file of PyTorch or safetensors, without the framework that wrote it.

    Parameters
    ----------
    path : path-like
        What ``torch.save`` writes since PyTorch 1.6 (a zip file, usually ``.pt`` or ``.pth``) of a state dict or of a
        checkpoint made of dicts, lists, sets, numbers, strings, tensors and NumPy's arrays of numbers; or a safetensors
        file.

    Returns
    -------
    dict
        As it was saved, with NumPy arrays for the tensors; bfloat16 comes as float32. For `Layer.load_state_dict`.

    Raises
    ------
    ValueError
        The file is damaged, of another kind, or holds objects of other classes. Nothing in it is executed.
    OSError
        It cannot be read.
    """
    from .checkpoint import read_torch

    regular(path)
    with open(path, "rb") as file:
        start = file.read(4)
    if start == b"PK\x03\x04":
        return read_torch(path)
    safetensors = library("safetensors", "safetensors")
    try:
        entries = safetensors.deserialize(Path(path).read_bytes())
        return {name: _array(entry) for name, entry in entries}
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(
            f"{os.fspath(path)}: expected a zip file of torch.save (PyTorch 1.6 or later) or a file of safetensors: "
            f"{error}"
        ) from None


def _array(entry: Mapping[str, Any]) -> Array:
    kinds = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "U64": "u8",
             "U32": "u4", "U16": "u2", "U8": "u1", "BOOL": "?", "BF16": "u2"}  # fmt: skip
    if entry["dtype"] not in kinds:
        raise ValueError(f"dtype {entry['dtype']}: expected one of {', '.join(kinds)}")
    array = np.frombuffer(entry["data"], "<" + kinds[entry["dtype"]]).reshape(entry["shape"])
    return widen_bfloat16(array) if entry["dtype"] == "BF16" else array


def gate_order(array: ArrayLike, source: str, target: str, axis: int = 0) -> Array:
    """Reorder the blocks of gates in a weight or a bias.

    Parameters
    ----------
    array : array_like
        Its length along ``axis`` is a multiple of the number of gates.
    source, target : str
        The order that it has and the order wanted, a letter a gate: "ifgo" and "rzn" are this package's and PyTorch's,
        "iofc" and "zrh" ONNX's, "ifco" and "zrh" Keras's, "ijfo" TensorFlow 1's. The letters g, c, j, n and h all
        stand for the candidate, z and u for the update gate.
    axis : int
        0 for weights of shape (gates*H, .), -1 for kernels of shape (., gates*H).

    Returns
    -------
    ndarray
        A new array.

    Examples
    --------
    >>> fastlstm.gate_order(np.arange(8), "iofc", "ifgo")
    array([0, 1, 4, 5, 6, 7, 2, 3])
    """
    _checks.refuse_mask("array", array)
    array = np.asarray(array)
    for name, letters in (("source", source), ("target", target)):
        if not isinstance(letters, str) or not letters:
            raise TypeError(f"{name}: expected letters such as 'ifgo', got {letters!r}")
    plain = [letters.translate(_ALIASES) for letters in (source, target)]
    if any(len(set(letters)) != len(letters) for letters in plain) or set(plain[0]) != set(plain[1]):
        raise ValueError(f"source, target: expected the same gates, each once, got {source!r} and {target!r}")
    if not -array.ndim <= axis < array.ndim:
        raise ValueError(f"axis: expected an axis of an array of shape {array.shape}, got {axis}")
    if array.shape[axis] % len(source):
        raise ValueError(f"array: expected a multiple of {len(source)} along axis {axis}, got shape {array.shape}")
    blocks = np.split(array, len(source), axis)
    return np.concatenate([blocks[plain[0].index(letter)] for letter in plain[1]], axis)


def reorder(array: ArrayLike, kind: str, source: str = "fastlstm", to: str = "fastlstm") -> Array:
    """`gate_order` between libraries by their names in `ORDERS`."""
    return gate_order(array, ORDERS[source][kind], ORDERS[to][kind])
