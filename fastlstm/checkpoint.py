"""PyTorch's checkpoint files without PyTorch: a zip of raw storages, and a pickle that says how they lie in tensors.

The pickle is not run: its instructions are parsed by `pickletools` and followed here, as far as tensors, dicts, lists,
numbers and strings need them. Everything else, above all any other class or function, is an error.
"""

from __future__ import annotations

import os
import pickletools
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from ._saved import widen_bfloat16
from ._types import Array

_STORAGES = {"DoubleStorage": "f8", "FloatStorage": "f4", "HalfStorage": "f2", "BFloat16Storage": "u2",
             "LongStorage": "i8", "IntStorage": "i4", "ShortStorage": "i2", "CharStorage": "i1", "ByteStorage": "u1",
             "BoolStorage": "?"}  # fmt: skip


def read_torch(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """The object in a file of ``torch.save``, with arrays for the tensors. See `fastlstm.files.read_state_dict`."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            with zipfile.ZipFile(file) as archive:
                found = _Reader(archive, size).read()
        except Exception as error:  # whatever the parsers make of a damaged file
            what = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
            raise ValueError(f"{os.fspath(path)}: not a whole checkpoint of PyTorch: {what}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{os.fspath(path)}: expected a dict in the checkpoint, found a {type(found).__name__}")
    return found


class _Class:
    """A name in the pickle that stands for one of the few things that are known."""

    def __init__(self, name: str, make: Callable[..., Any] | None) -> None:
        self.name, self.make = name, make


class _Reader:
    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        self.archive = archive
        names, records = archive.namelist(), archive.infolist()
        plain = all(r.compress_type == zipfile.ZIP_STORED and r.compress_size == r.file_size for r in records)
        if not plain or sum(r.file_size for r in records) > size:
            raise ValueError("expected records as they are, not compressed and not one within another")
        pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("expected one record data.pkl")
        self.root = pickles[0].split("/")[0]
        if f"{self.root}/byteorder" in names and self._record("byteorder") != b"little":
            raise ValueError("expected little-endian numbers")
        self.storages: dict[tuple[str, str], Array] = {}

    def _record(self, name: str) -> bytes:
        return self.archive.read(f"{self.root}/{name}")

    def read(self) -> Any:
        stack: list[Any] = []
        marks: list[int] = []  # where the items of open brackets begin
        memo: dict[int, Any] = {}
        argument: Any
        for operation, argument, _ in pickletools.genops(self._record("data.pkl")):
            name = operation.name
            if name == "STOP":
                break
            if name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name == "GLOBAL":
                stack.append(_known(*argument.split(" ")))
            elif name == "BINPERSID":
                stack.append(self._storage(stack.pop()))
            else:
                _follow(name, argument, stack, marks)
        (found,) = stack
        return found

    def _storage(self, described: Any) -> Array:
        kind, storage, key, _, count = described
        if kind != "storage" or not isinstance(storage, _Class) or not isinstance(key, str):
            raise ValueError(f"expected the description of a storage, found {described!r:.80}")
        short = storage.name.removeprefix("torch ")
        if (key, short) not in self.storages:
            if short not in _STORAGES:
                raise ValueError(f"{storage.name}: expected a storage of {', '.join(_STORAGES)}")
            array = np.frombuffer(self._record(f"data/{key}"), "<" + _STORAGES[short])
            if array.size != count:
                raise ValueError(f"record data/{key}: expected {count} elements, found {array.size}")
            self.storages[key, short] = widen_bfloat16(array) if short == "BFloat16Storage" else array
        return self.storages[key, short]


def _follow(name: str, argument: Any, stack: list[Any], marks: list[int]) -> None:
    """One instruction that touches nothing but the stack."""
    if name in ("PROTO", "FRAME"):
        return
    if name == "MARK":
        marks.append(len(stack))
    elif name in _CONSTANTS:
        stack.append(_CONSTANTS[name]())
    elif name in _VALUES:
        stack.append(argument)
    elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
        count = int(name[-1])
        if len(stack) < count:
            raise ValueError("an instruction finds too little")
        stack[-count:] = [tuple(stack[-count:])]
    elif name in ("TUPLE", "SETITEMS", "APPENDS"):
        first = marks.pop()
        items = stack[first:]
        del stack[first:]
        if name == "TUPLE":
            stack.append(tuple(items))
        elif name == "SETITEMS":
            _a(dict, stack[-1]).update(zip(items[::2], items[1::2], strict=True))
        else:
            _a(list, stack[-1]).extend(items)
    elif name == "SETITEM":
        value, key = stack.pop(), stack.pop()
        _a(dict, stack[-1])[key] = value
    elif name == "APPEND":
        value = stack.pop()
        _a(list, stack[-1]).append(value)
    elif name == "REDUCE":
        arguments, function = stack.pop(), stack.pop()
        if not isinstance(function, _Class) or function.make is None:
            raise ValueError(f"expected a tensor or a dict, found {getattr(function, 'name', function)!r:.80}")
        stack.append(function.make(*_a(tuple, arguments)))
    elif name == "BUILD":  # the attribute _metadata of a state dict: versions of modules
        stack.pop()
        _a(dict, stack[-1])
    elif name == "STACK_GLOBAL":
        attribute, module = stack.pop(), stack.pop()
        stack.append(_known(module, attribute))
    else:
        raise ValueError(f"instruction {name}: expected those of tensors, dicts, lists, numbers and strings")


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "NONE": lambda: None, "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}  # fmt: skip
_VALUES = {"BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINBYTES",
           "SHORT_BINBYTES"}  # fmt: skip


def _a(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"expected a {kind.__name__}, found {value!r:.80}")
    return value


def _known(module: str, attribute: str) -> _Class:
    name = f"{module} {attribute}"
    if module == "torch" and attribute.endswith("Storage"):
        return _Class(name, None)
    if name not in _FUNCTIONS:
        raise ValueError(f"holds {module}.{attribute}: only tensors, dicts, lists, numbers and strings are read; "
                         "save the state_dict() of the model alone")  # fmt: skip
    return _Class(name, _FUNCTIONS[name])


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Array:
    """A view of a storage, checked to lie within it."""
    storage, size, stride = _a(np.ndarray, storage), _a(tuple, size), _a(tuple, stride)
    if storage.ndim != 1 or not storage.flags.c_contiguous:  # a tensor, say, whose size counts elements more than once
        raise ValueError(f"expected a storage of a tensor, found an array of shape {storage.shape}")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or len(size) > 32 or any(type(n) is not int or not 0 <= n < 2**62 for n in numbers):
        raise ValueError(f"expected sizes and strides of a tensor, found {size!r:.60} and {stride!r:.60}")
    if 0 in size:
        return np.zeros(size, storage.dtype) if max(size) < 2**31 else np.zeros(0, storage.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if last >= storage.size:
        raise ValueError(f"a tensor of sizes {size} reaches past its storage of {storage.size} elements")
    item = storage.itemsize
    return np.lib.stride_tricks.as_strided(storage[offset:], size, [step * item for step in stride], writeable=False)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": lambda tensor, *_: _a(np.ndarray, tensor),
    "collections OrderedDict": lambda *items: dict(*items),
    "__builtin__ set": lambda items=(): set(_a(list, items)),
    "torch Size": lambda size=(): _a(tuple, size),
}
