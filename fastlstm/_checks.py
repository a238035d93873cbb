"""Checks of arguments: what each expects, and the error that says so. The only place."""

from __future__ import annotations

import math
import numbers
import operator
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _habits

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike

    from ._types import Array

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


def describe(value: Any) -> str:
    """What came, in few words."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} array of shape {value.shape}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__


def integer(name: str, value: Any, least: int, most: int = 2**31 - 1) -> int:
    """An integer of any kind but bool."""
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected an integer, got bool")
    try:
        number: int = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {describe(value)}") from None
    if not least <= number <= most:
        raise ValueError(f"{name}: expected an integer from {least} to {most}, got {number}")
    return number


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {describe(value)}")
    return bool(value)


def real(name: str, value: Any) -> float:
    """A real number, NaN and infinities included."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {describe(value)}")
    return float(value)


def number(name: str, value: Any, low: float = 0.0, high: float = math.inf, *, open_low: bool = False) -> float:
    """A finite number from low to high, or above low with open_low."""
    found = real(name, value)
    if not math.isfinite(found) or not low <= found <= high or (open_low and found == low):
        lower = "" if low == -math.inf else f" {'>' if open_low else '>='} {low:g}"
        upper = "" if high == math.inf else f" and <= {high:g}"
        raise ValueError(f"{name}: expected a finite number{lower}{upper}, got {value}")
    return found


def limit(name: str, value: Any) -> float:
    """A number >= 0, infinity included."""
    found = real(name, value)
    if not found >= 0:
        raise ValueError(f"{name}: expected a number >= 0, got {value}")
    return found


def bound(name: str, value: Any) -> float | None:
    """None, or a finite number above 0."""
    return None if value is None else number(name, value, open_low=True)


def fraction(name: str, value: Any) -> float:
    """A number in [0, 1)."""
    found = real(name, value)
    if not 0 <= found < 1:
        raise ValueError(f"{name}: expected 0 <= {name} < 1, got {value}")
    return found


def probability(name: str, value: Any) -> float:
    found = real(name, value)
    if not 0 <= found <= 1:
        raise ValueError(f"{name}: expected a probability from 0 to 1, got {value}")
    return found


def choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def float_type(name: str, value: DTypeLike) -> np.dtype[Any]:
    """float32 or float64."""
    if value is None:  # NumPy's float64 would be a surprise
        raise TypeError(f"{name}: expected float32 or float64, got None")
    try:
        dtype = np.dtype(value)
    except (TypeError, ValueError):
        hint = ", write np.float32 or np.float64" if str(value).startswith("torch.") else ""
        raise TypeError(f"{name}: expected float32 or float64, got {value!r}{hint}") from None
    if dtype not in FLOATS or not dtype.isnative:
        raise TypeError(f"{name}: expected float32 or float64, got {dtype}")
    return dtype


def generator(name: str, value: Any) -> np.random.Generator:
    try:
        return np.random.default_rng(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected an int, a Generator or None, got {value!r}") from error


def weight_type(dtype: np.dtype[Any], weights: Any) -> str | None:
    """How packed weights are to be stored."""
    if weights is not None and not (isinstance(weights, str) and weights in ("bfloat16", "int8")):
        raise ValueError(f"weights: expected None, 'bfloat16' or 'int8', got {weights!r}")
    if weights and dtype != np.float32:
        raise ValueError(f"weights: {weights!r} needs a float32 layer, got {dtype}")
    return weights


def refuse_mask(name: str, value: Any) -> None:
    """NumPy's masked arrays would lose their mask in silence."""
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise TypeError(f"{name}: expected an array without a mask, got a masked array; steps to be skipped are the "
                        "argument mask of a call")  # fmt: skip


def casts(value: Array, dtype: np.dtype[Any]) -> bool:
    """Whether values of a type from outside NumPy (bfloat16 of ml_dtypes, say) convert to ``dtype``."""
    known = value.dtype.kind == "V" and value.dtype.names is None
    return known and np.can_cast(value.dtype, dtype, "same_kind")


def array_of(name: str, value: ArrayLike, expected: str) -> Array:
    """An array of any type, or the error that says what is wrong with the value."""
    refuse_mask(name, value)
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        _habits.refuse_sparse(name, value, expected)
        found = _habits.of_torch(name, value)
        if found is None:
            raise TypeError(f"{name}: expected {expected}, got {describe(value)} ({error})") from None
        return found
    if array.dtype == object:
        _habits.refuse_sparse(name, value, expected)
    return array


def numbers_of(name: str, value: ArrayLike, dtype: DTypeLike | None = None) -> Array:
    """An array of real numbers, of the given type if one is asked for."""
    array = array_of(name, value, "an array of numbers")
    if array.dtype.kind not in "fiub":
        if casts(array, np.dtype(np.float32)):  # bfloat16 of JAX
            return array.astype(np.float32 if dtype is None else dtype)
        raise TypeError(f"{name}: expected an array of real numbers, got dtype {array.dtype}")
    return array if dtype is None else array.astype(dtype, copy=False)


def floats_of(name: str, value: ArrayLike) -> Array:
    """An array of float32 or float64."""
    array = array_of(name, value, "float32 or float64")
    if array.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32 or float64, got dtype {array.dtype}")
    return array


def _of_kinds(name: str, value: ArrayLike, kinds: str, expected: str) -> Array:
    array = array_of(name, value, expected)
    if array.dtype.kind not in kinds and array.size:
        raise TypeError(f"{name}: expected {expected}, got dtype {array.dtype}")
    return array


def integers_of(name: str, value: ArrayLike) -> Array:
    """An array of integers; an empty one may be of any type."""
    return _of_kinds(name, value, "iu", "integers")


def flags_of(name: str, value: ArrayLike) -> Array:
    """An array of bool, or of integers 0 and 1."""
    array = _of_kinds(name, value, "biu", "True and False")
    if array.dtype.kind in "iu" and array.size and not 0 <= array.min() <= array.max() <= 1:
        raise ValueError(f"{name}: expected 0 and 1, got {array.min()} to {array.max()}")
    return array.astype(bool)


def indices(name: str, value: ArrayLike, size: int) -> Array:
    """Integers from 0 to size - 1."""
    array = integers_of(name, value)
    if not array.size:
        return array.astype(np.intp)
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= size:
        raise ValueError(f"{name}: expected values 0..{size - 1}, got {low if low < 0 else high}")
    return array


def shaped(name: str, array: Array, shape: tuple[int, ...]) -> Array:
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {array.shape}")
    return array


def one_array(value: Any) -> None:
    """Refuse a list of sequences where one array is wanted: stacked, its sequences would be taken for steps."""
    if isinstance(value, (list, tuple)) and value and all(getattr(part, "ndim", None) == 2 for part in value):
        raise TypeError(f"x: expected one array, got {describe(value)} arrays; only recurrent layers take a list of "
                        "sequences, fastlstm.pad makes it one array, and its lengths")  # fmt: skip
