"""PyTorch's checkpoint files without PyTorch: a zip of raw storages, and a pickle that says how they lie in tensors.

The pickle is not run: its instructions are parsed by `pickletools` and followed here, as far as tensors, arrays of
numbers, dicts, lists, sets, numbers and strings need them. Everything else, above all any other class or function, is
an error.
"""

from __future__ import annotations

import math
import os
import pickletools
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from ._saved import widen_bfloat16
from ._types import Array

_READ = "only tensors, arrays of numbers, dicts, lists, sets, numbers and strings are read"
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
    elif name in ("TUPLE", "SETITEMS", "APPENDS", "ADDITEMS", "FROZENSET"):
        first = marks.pop()
        items = stack[first:]
        del stack[first:]
        if name == "TUPLE":
            stack.append(tuple(items))
        elif name == "SETITEMS":
            _a(dict, stack[-1]).update(zip(items[::2], items[1::2], strict=True))
        elif name == "ADDITEMS":
            _a(set, stack[-1]).update(items)
        elif name == "FROZENSET":
            stack.append(frozenset(items))
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
            raise ValueError(
                f"expected a tensor, an array or a dict, found {getattr(function, 'name', function)!r:.80}"
            )
        stack.append(function.make(*_a(tuple, arguments)))
    elif name == "BUILD":
        state = stack.pop()
        _build(stack[-1], state)
    elif name == "STACK_GLOBAL":
        attribute, module = stack.pop(), stack.pop()
        stack.append(_known(module, attribute))
    else:
        raise ValueError(f"instruction {name}: {_READ}")


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "NONE": lambda: None, "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False, "EMPTY_SET": set,
}  # fmt: skip
_VALUES = {"BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINBYTES",
           "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}  # fmt: skip


def _a(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"expected a {kind.__name__}, found {value!r:.80}")
    return value


def _known(module: str, attribute: str) -> _Class:
    name = f"{module} {attribute}"
    if module == "torch" and attribute.endswith("Storage"):
        return _Class(name, None)
    if name not in _FUNCTIONS:
        hint = "save vars(args)" if name == "argparse Namespace" else "save the state_dict() of the model alone"
        raise ValueError(f"holds {module}.{attribute}: {_READ}; {hint}")
    return _Class(name, _FUNCTIONS[name])


def _tensor(
    storage: Any, offset: int, size: Any, stride: Any, requires_grad: bool = False, hooks: Any = None, bits: Any = None
) -> Array:
    """A view of a storage, checked to lie within it. bits: of torch.conj and the like, to be applied on reading."""
    if bits:
        raise ValueError(f"a tensor with the bits {bits!r:.60}: write it after .resolve_neg() or .resolve_conj()")
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


# ---- NumPy's arrays and numbers ----

_NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")


def _dtype(text: Any, *_: Any) -> np.dtype[Any]:
    if text not in _NUMBERS:
        raise ValueError(f"expected plain numbers in an array ({', '.join(_NUMBERS)}), found the type {text!r:.80}")
    return np.dtype(f"<{text}")


def _checked(dtype: Any, shape: Any, content: Any) -> None:
    """That bytes are the content of an array."""
    if not isinstance(dtype, np.dtype) or not isinstance(content, bytes | bytearray):
        raise ValueError(f"expected a type and the bytes of an array, found {dtype!r:.60} and {content!r:.60}")
    if len(_a(tuple, shape)) > 32 or any(type(n) is not int or not 0 <= n < 2**31 for n in shape):
        raise ValueError(f"expected the shape of an array, found {shape!r:.80}")
    size = math.prod(shape) * dtype.itemsize
    if len(content) != size or math.prod(n for n in shape if n) >= 2**48:
        raise ValueError(f"expected {size} bytes of an array of shape {shape}, found {len(content)}")


def _build(thing: Any, state: Any) -> None:
    """What a pickle does to an object that it has made."""
    if isinstance(thing, np.dtype):
        if state not in [(3, order, None, None, None, -1, -1, 0) for order in "<|"]:
            raise ValueError(f"expected little-endian numbers in an array, found the type {state!r:.80}")
    elif isinstance(thing, np.ndarray):
        version, shape, dtype, fortran, content = _a(tuple, state)
        if thing.shape != (0,) or thing.dtype != np.int8 or thing.base is not None:  # else it is a tensor's, say
            raise ValueError("expected an array that is filled once")
        _checked(dtype, shape, content)
        checked: Any = (1, shape, dtype, bool(fortran), _a(bytes, content))
        thing.__setstate__(checked)
    else:
        _a(dict, thing)  # the attribute _metadata of a state dict: versions of modules


def _empty(kind: Any, *_: Any) -> Array:
    """What `_build` fills."""
    if not isinstance(kind, _Class) or kind.name != "numpy ndarray":
        raise ValueError(f"expected a plain array, found {kind!r:.80}")
    return np.zeros(0, np.int8)


def _scalar(dtype: Any, content: Any) -> Any:
    _checked(dtype, (1,), content)
    return np.frombuffer(content, dtype)[0]


def _of_bytes(content: Any, dtype: Any, shape: Any, order: Any) -> Array:
    _checked(dtype, shape, content)
    if order not in ("C", "F"):
        raise ValueError(f"expected the order C or F of an array, found {order!r:.80}")
    return np.frombuffer(content, dtype).reshape(shape, order=order)


def _encoded(text: Any, codec: Any) -> bytes:
    """Bytes, as old protocols write them."""
    if codec != "latin1":
        raise ValueError(f"expected bytes as latin1, found {codec!r:.80}")
    return bytes(_a(str, text).encode("latin1"))


_FUNCTIONS: dict[str, Callable[..., Any] | None] = {
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": lambda tensor, *_: _a(np.ndarray, tensor),
    "collections OrderedDict": lambda *items: dict(*items),
    "torch Size": lambda size=(): _a(tuple, size),
    "_codecs encode": _encoded,
    "numpy dtype": _dtype,
    "numpy ndarray": None,
}
for _builtins in ("__builtin__", "builtins"):  # of protocol 2, and 3
    _FUNCTIONS[f"{_builtins} set"] = lambda items: set(_a(list, items))
    _FUNCTIONS[f"{_builtins} frozenset"] = lambda items: frozenset(_a(list, items))
    _FUNCTIONS[f"{_builtins} bytes"] = lambda: b""
for _core in ("numpy.core", "numpy._core"):  # until NumPy 2, and since
    _FUNCTIONS[f"{_core}.multiarray _reconstruct"] = _empty
    _FUNCTIONS[f"{_core}.multiarray scalar"] = _scalar
    _FUNCTIONS[f"{_core}.numeric _frombuffer"] = _of_bytes
