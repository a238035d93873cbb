"""Lists of sequences as one padded array, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _checks

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike, NDArray

    from ._types import Array

__all__ = ["pad", "unpad"]


def is_list(x: Any) -> bool:
    """Whether x is a list of arrays of shape (T_i, D)."""
    return isinstance(x, (list, tuple)) and len(x) > 0 and all(getattr(part, "ndim", None) == 2 for part in x)


def pad(
    sequences: Sequence[ArrayLike], *, batch_first: bool = False, dtype: DTypeLike | None = None
) -> tuple[Array, NDArray[np.intp]]:
    """Put sequences of different lengths into one array, zeros after their ends.

    Parameters
    ----------
    sequences : list of array_like, shapes (T_i, ...)
        At least one; equal but for their first axis.
    batch_first : bool
        (N, T, ...) instead of (T, N, ...).
    dtype : dtype, optional
        Of the result; that of the arrays together if not given.

    Returns
    -------
    x : ndarray, shape (T, N, ...), T the greatest length
    lengths : ndarray of int, shape (N,)
    """
    x, lengths = _padded("sequences", sequences, dtype)
    return (x.swapaxes(0, 1) if batch_first else x), lengths


def _padded(name: str, sequences: Sequence[ArrayLike], dtype: DTypeLike | None) -> tuple[Array, NDArray[np.intp]]:
    """`pad`, time-major, of an argument of this name."""
    if not isinstance(sequences, (list, tuple)) or not sequences:
        raise TypeError(f"{name}: expected a list of at least one array, got {_checks.describe(sequences)}")
    arrays = [_checks.numbers_of(f"{name}[{i}]", part) for i, part in enumerate(sequences)]
    for i, part in enumerate(arrays):
        if part.ndim == 0 or part.shape[1:] != arrays[0].shape[1:]:
            raise ValueError(f"{name}[{i}]: expected shape (T, *{arrays[0].shape[1:]}), got {part.shape}")
    lengths = np.array([len(part) for part in arrays], np.intp)
    shape = (int(lengths.max()), len(arrays), *arrays[0].shape[1:])
    x = np.zeros(shape, np.result_type(*arrays) if dtype is None else dtype)
    for i, part in enumerate(arrays):
        x[: len(part), i] = part
    return x, lengths


def enter(x: Sequence[ArrayLike], dtype: DTypeLike, **steps: ArrayLike | None) -> tuple[Array, NDArray[np.intp]]:
    """A call's list of sequences as `pad` gives it. steps: arguments that would say again which steps there are."""
    for name, value in steps.items():
        if value is not None:
            raise ValueError(f"{name}: expected None with a list of sequences, got {_checks.describe(value)}")
    return _padded("x", x, dtype)


def enter_y(dy: Any, lengths: NDArray[np.intp], width: int, dtype: DTypeLike) -> Array:
    """The gradients of a list of outputs of a width as `pad` gives them."""
    shapes = [(int(length), width) for length in lengths]
    if not isinstance(dy, (list, tuple)) or [np.shape(part) for part in dy] != shapes:
        shown = f"{shapes[:3]}" + ", ..." * (len(shapes) > 3)
        raise ValueError(f"dy: expected a list of arrays of the shapes of y, {shown}, got {_checks.describe(dy)}")
    return _padded("dy", dy, dtype)[0]


def unpad(x: ArrayLike, lengths: ArrayLike, *, batch_first: bool = False) -> list[Array]:
    """Undo `pad`: a list of new arrays of shape (T_i, ...)."""
    x = _checks.array_of("x", x, "an array")
    if x.ndim < 2:
        raise ValueError(f"x: expected shape (T, N, ...), got {x.shape}")
    x = x.swapaxes(0, 1) if batch_first else x
    lengths = _checks.shaped("lengths", _checks.integers_of("lengths", lengths), (x.shape[1],))
    if lengths.size and not (0 <= lengths.min() and lengths.max() <= len(x)):
        raise ValueError(f"lengths: expected values from 0 to T = {len(x)}, got {lengths.min()} to {lengths.max()}")
    return [x[:length, i].copy() for i, length in enumerate(lengths)]
