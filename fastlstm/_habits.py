"""What people write out of habit from other libraries, and what to write instead. The only place."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from ._types import Array

F = TypeVar("F", bound=Callable[..., Any])

_TRAINING = "forward(x) is training, a call is inference, and there is no mode between them"
_CPU = "there is no device but the CPU"
_ATTRIBUTES = {
    "train": _TRAINING,
    "eval": _TRAINING,
    "training": _TRAINING,
    "parameters": "params are the arrays by name, flat_params all of them as one; optimisers take a list of layers",
    "named_parameters": "params are the arrays by name",
    "get_weights": "params are the arrays by name, state_dict() their copies",
    "set_weights": "load_state_dict takes arrays by name",
    "to": f"astype(dtype) is a copy of another type, and {_CPU}",
    "cpu": _CPU,
    "cuda": _CPU,
    "device": _CPU,
    "double": "astype(numpy.float64) is a copy of that type",
    "float": "astype(numpy.float32) is a copy of that type",
    "half": "freeze('bfloat16') of a layer halves its packed weights",
    "bfloat16": "freeze('bfloat16') of a layer halves its packed weights",
    "requires_grad_": "backward computes the gradients of all parameters",
    "flatten_parameters": "the parameters are one array already",
    "fit": "fastlstm.nn.fit trains a nn.Sequential; fastlstm.sklearn has estimators",
    "predict": "a call is inference",
}
# An argument that is called otherwise here, and why there is none where that one is missing too.
_ARGUMENTS = {name: other for names, other in (
    (("hx", "h_0", "h0", "initial_state", "initial_h"), ("state", "it starts from zero states")),
    (("seed", "random_state", "generator"), ("rng", "nothing is drawn here")),
    (("device",), ("", _CPU)),
    (("training",), ("", _TRAINING)),
    (("sequence_lens", "sequence_length", "seq_lens", "seq_lengths"), ("lengths", "all steps are valid")),
    (("units",), ("hidden_size", "the sizes are positional")),
    (("input_dim",), ("input_size", "the sizes are positional")),
    (("return_sequences", "return_state"), ("", "y holds all steps, and the states come with it")),
    (("go_backwards",), ("direction='reverse', not go_backwards", "a layer has a direction")),
    (("set_to_none",), ("", "the gradients are one array, which stays and becomes zero")),
    (("strict",), ("", "all names must be there; prefix says what stands before them, other keys are left alone")),
    (("time_major",), ("batch_first", "a layer has batch_first")),
) for name in names}  # fmt: skip


class Absent:
    """An attribute that is not there, with a word on what is; `__getattr__` would slow every attribute down."""

    def __init__(self, hint: str) -> None:
        self.hint = hint

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        raise AttributeError(f"{owner.__name__} has no attribute {self.name!r}; {self.hint}")


def mark_absent(owner: type, hints: Mapping[str, str]) -> None:
    """Let a class answer names that it has not."""
    for name, hint in hints.items():
        if name not in vars(owner):
            absent = Absent(hint)
            absent.__set_name__(owner, name)
            setattr(owner, name, absent)


def no_argument(thing: Any, function: Callable[..., Any], given: Iterable[str]) -> TypeError:
    """The error for keyword arguments that a function has not."""
    names = _names(function)
    name = next(name for name in given if name not in names)
    hint = ""
    if name in _ARGUMENTS:
        other, why = _ARGUMENTS[name]
        hint = f"; write {other}{'=' * (other in names)}" if other.split("=")[0] in names else f"; leave it out: {why}"
    where = type(thing).__name__ + f".{function.__name__}" * (function.__name__ not in ("__init__", "__call__"))
    return TypeError(f"{name}: {where} has no such argument{hint}")


def _names(function: Any) -> tuple[str, ...]:
    code = getattr(function, "__wrapped__", function).__code__
    names: tuple[str, ...] = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return names[1:]


def hinted(method: F) -> F:
    """A method whose error for an unknown keyword argument says what to write instead."""
    names = frozenset(_names(method))
    if method.__code__.co_flags & 0x08:  # it takes any
        return method

    @functools.wraps(method)
    def checked(self: Any, *args: Any, **given: Any) -> Any:
        if not given.keys() <= names:
            raise no_argument(self, method, given)
        return method(self, *args, **given)

    return checked  # type: ignore[return-value]


class Hints:
    """Errors that say what to write instead, for names and arguments that habit brings."""

    _FIXED: frozenset[str] = frozenset()  # attributes that sizes hang on

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("__init__", "zero_grad", "load_state_dict"):
            if hasattr(cls.__dict__.get(name), "__code__"):
                setattr(cls, name, hinted(cls.__dict__[name]))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._FIXED and name in self.__dict__:
            raise AttributeError(f"{name}: cannot change, make another {type(self).__name__}")
        if name in ("weight", "bias") and name in getattr(self.__dict__.get("_parameters"), "views", ()):
            raise AttributeError(f"{name}: write into the array, params[{name!r}][...] = value")
        object.__setattr__(self, name, value)

    def __dir__(self) -> list[str]:
        present = [name for kind in reversed(type(self).__mro__) for name in vars(kind).items()]
        absent = {name for name, value in dict(present).items() if isinstance(value, Absent)}
        return [name for name in super().__dir__() if name not in absent or name in self.__dict__]


mark_absent(Hints, _ATTRIBUTES)


def refuse_sparse(name: str, value: Any, expected: str) -> None:
    """SciPy's sparse matrices, which NumPy takes for one object, and PyTorch's sparse tensors, which it refuses."""
    torch = str(getattr(value, "layout", "")).startswith(("torch.sparse", "torch._mkldnn"))
    if torch or (hasattr(value, "toarray") and hasattr(value, "nnz")):
        kind = f"a tensor of layout {value.layout}" if torch else f"a sparse {type(value).__name__}"
        raise TypeError(f"{name}: expected {expected}, got {kind}; {'to_dense' if torch else 'toarray'}() makes a "
                        "dense one of it")  # fmt: skip


def of_torch(name: str, value: Any) -> Array | None:
    """What NumPy does not take by itself, as an array: tensors that require a gradient, and bfloat16. Else None."""
    if type(value).__name__ == "PackedSequence":
        raise TypeError(f"{name}: got a PackedSequence; the layers of fastlstm.torch take it as it is, here x and "
                        "lengths are what torch.nn.utils.rnn.pad_packed_sequence gives")  # fmt: skip
    if not hasattr(value, "detach") or str(getattr(value, "device", "cpu")) != "cpu":
        return None
    torch = sys.modules.get("torch")
    if getattr(value, "requires_grad", False) and torch is not None and torch.is_grad_enabled():
        import warnings

        level = 1
        while sys._getframe(level).f_globals.get("__name__", "").startswith("fastlstm."):
            level += 1
        warnings.warn(f"{name}: the gradient of this tensor stops here; the layers of fastlstm.torch carry it on, "
                      f"{name}.detach() says that it is not wanted", UserWarning, stacklevel=level + 1)  # fmt: skip
    return array_of(value)


def array_of(value: Any) -> Array:
    """An array of anything, torch's parameters and bfloat16 tensors included."""
    if hasattr(value, "detach"):  # a torch Parameter refuses np.asarray while it requires a gradient
        value = value.detach()
        if hasattr(value, "cpu"):
            value = value.cpu()
        if str(getattr(value, "dtype", "")) == "torch.bfloat16":  # a type that NumPy has not; float32 holds it exactly
            value = value.float()
    return np.asarray(value)
