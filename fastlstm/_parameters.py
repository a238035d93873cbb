"""Named arrays that are views into one contiguous buffer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

_ALIGNMENT = 64  # bytes: one cache line, one AVX-512 vector


class Parameters:
    """Arrays of given names and shapes, side by side in one flat buffer of zeros.

    Parameters
    ----------
    shapes : dict of str to tuple of int
        Name and shape of each array, in the order in which they lie in the buffer.
    dtype : dtype
        Type of all of them.

    Attributes
    ----------
    flat : ndarray, shape (total,)
        The buffer: contiguous, starting at a multiple of 64 bytes, without gaps.
    views : dict of str to ndarray
        The named arrays; they share the memory of ``flat``.
    """

    __slots__ = ("flat", "views")

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: DTypeLike) -> None:
        dtype = np.dtype(dtype)
        sizes = {}
        for name, shape in shapes.items():
            size = 1
            for n in shape:  # Python integers: no overflow
                size *= int(n)
            sizes[name] = size
        total = sum(sizes.values())
        raw = np.zeros(total * dtype.itemsize + _ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % _ALIGNMENT
        self.flat: NDArray = raw[start : start + total * dtype.itemsize].view(dtype)
        self.views: dict[str, NDArray] = {}
        offset = 0
        for name, shape in shapes.items():
            self.views[name] = self.flat[offset : offset + sizes[name]].reshape(shape)
            offset += sizes[name]

    def __reduce__(
        self,
    ) -> tuple:  # pickle and deepcopy: the views must share the copy's buffer, not own theirs
        return _restore, ({name: view.shape for name, view in self.views.items()}, self.flat)

    def copy(self) -> dict[str, NDArray]:
        """Return copies of the named arrays, as a state dict."""
        return {name: view.copy() for name, view in self.views.items()}

    def load(self, d: Mapping[str, ArrayLike], what: str = "load_state_dict") -> None:
        """Copy the arrays of ``d`` into the views; on any error nothing changes.

        Parameters
        ----------
        d : mapping of str to array_like
            One entry per name, of the same shape: whatever `numpy.asarray` accepts. Values are cast to the
            buffer's type; NaN and infinities are taken as they are.
        what : str
            Who asks, for the error text.

        Raises
        ------
        TypeError
            ``d`` is no mapping, or a value is not an array of real numbers.
        ValueError
            Missing or unexpected keys, or a value of another shape.
        """
        if not isinstance(d, Mapping):
            raise TypeError(f"{what}: expected a mapping of names to arrays, got {type(d).__name__}")
        missing = [name for name in self.views if name not in d]
        unexpected = [name for name in d if name not in self.views]
        if missing or unexpected:
            parts = [f"missing keys {missing}"] * bool(missing)
            parts += [f"unexpected keys {unexpected}"] * bool(unexpected)
            raise ValueError(f"{what}: {', '.join(parts)}")
        arrays = {}
        for name, view in self.views.items():
            try:
                value = _as_array(d[name])
            except Exception as error:  # of the mapping or of the conversion
                raise TypeError(f"{what}: {name}: expected an array ({type(error).__name__}: {error})") from error
            if value.dtype.kind not in "fiub" and not _casts(value, view.dtype):
                raise TypeError(f"{what}: {name}: expected real numbers, got dtype {value.dtype}")
            if value.shape != view.shape:
                raise ValueError(f"{what}: {name}: expected shape {view.shape}, got {value.shape}")
            if np.shares_memory(value, self.flat):  # d may hold our own views, in another order
                value = value.copy()
            arrays[name] = value
        with np.errstate(over="ignore", invalid="ignore"):
            for name, view in self.views.items():
                np.copyto(view, arrays[name], casting="unsafe")


def _as_array(value: ArrayLike) -> NDArray:
    if hasattr(value, "detach"):  # a torch Parameter refuses np.asarray while it requires a gradient
        value = value.detach()
        if hasattr(value, "cpu"):
            value = value.cpu()
    return np.asarray(value)


def _casts(value: NDArray, dtype: np.dtype) -> bool:
    """Whether values of a type from outside NumPy (bfloat16 of ml_dtypes, say) convert to ``dtype``."""
    known = value.dtype.kind == "V" and value.dtype.names is None
    return known and np.can_cast(value.dtype, dtype, "same_kind")


def _restore(shapes: dict[str, tuple[int, ...]], flat: NDArray) -> Parameters:
    parameters = Parameters(shapes, flat.dtype)
    parameters.flat[:] = flat
    return parameters
