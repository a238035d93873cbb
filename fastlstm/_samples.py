"""What scikit-learn's callers give, as sequences: tables, 3-D arrays, lists. Needs the extra [sklearn]."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.utils.validation import check_array, column_or_1d, validate_data

from . import _checks
from ._types import Array
from .nn import Module
from .sequences import pad

AT_ONCE = 2**16  # steps of all rows of an inference together


class Sequences:
    """n sequences of D features: ``data`` is an array (n, T, D), or a list of arrays (T_i, D)."""

    def __init__(self, data: Any) -> None:
        self.data = data
        self.ragged = isinstance(data, list)
        self.lengths = np.array([len(row) for row in data]) if self.ragged else np.full(len(data), data.shape[1])

    def __len__(self) -> int:
        return len(self.data)

    @property
    def features(self) -> int:
        return int(self.data[0].shape[1])

    @property
    def dtype(self) -> np.dtype[Any]:
        dtype: np.dtype[Any] = self.data[0].dtype
        return dtype

    @property
    def steps(self) -> Array:
        """All steps of all sequences, one after the other, (sum of T_i, D)."""
        return np.concatenate(self.data) if self.ragged else np.reshape(self.data, (-1, self.features))

    def __getitem__(self, rows: Array) -> Sequences:
        return Sequences(take(self.data, rows))

    def parts(self) -> Iterator[tuple[Array, Array, Array | None]]:
        """(numbers, x (T, N, D), lengths) of sequences of similar length, few enough for one inference."""
        order = np.argsort(self.lengths, kind="stable")[::-1] if self.ragged else np.arange(len(self))
        while len(order):
            n = max(64, AT_ONCE // self.lengths[order[0]])
            rows, order = order[:n], order[n:]
            if self.ragged:
                yield rows, *pad([self.data[i] for i in rows])
            else:
                yield rows, np.ascontiguousarray(self.data[rows].swapaxes(0, 1)), None

    def infer(self, model: Any, per_step: bool) -> Any:
        """The model's outputs: (n, K), with per_step (n, T, K) or a list of (T_i, K)."""
        out: list[Any] = [None] * len(self)
        for rows, x, lengths in self.parts():
            y = model(x.astype(model.dtype, copy=False), lengths)
            for column, i in enumerate(rows):
                out[i] = y[: self.lengths[i], column] if per_step else y[column]
        return out if per_step and self.ragged else np.stack(out)


class Scale(Module):
    """Brings each feature to mean 0 and standard deviation 1, by constants that it is given."""

    def __init__(self, mean: ArrayLike, deviation: ArrayLike, dtype: np.dtype[Any]) -> None:
        self._allocate({}, dtype)
        self.mean = np.asarray(mean, dtype)
        self.factor = np.asarray(1 / np.asarray(deviation), dtype)

    def __repr__(self) -> str:
        return f"Scale({len(self.mean)})"

    def forward(self, x: ArrayLike) -> tuple[Array, None]:
        y: Array = np.subtract(x, self.mean)
        y *= self.factor
        return y, None

    def backward(self, tape: None, dy: ArrayLike, *, need_dx: bool = True) -> Array | None:
        return np.multiply(dy, self.factor) if need_dx else None


def take(values: Any, rows: Array) -> Any:
    """These rows of an array or a list."""
    return [values[i] for i in rows] if isinstance(values, list) else values[rows]


def joined(values: Any) -> Array:
    """The values of all steps of all sequences, one after the other."""
    rows = values if isinstance(values, (list, tuple)) else np.asarray(values)
    return np.concatenate([np.asarray(row) for row in rows])


def of_steps(weight: Any, lengths: Any) -> Array:
    """Weights of all steps, one after the other; those of sequences count for each of their steps."""
    return joined(weight) if np.ndim(weight[0]) else np.repeat(weight, lengths)


def like(values: Array, sequences: Any) -> Any:
    """`joined` undone: one value for each step, as the sequences have them."""
    if not isinstance(sequences, list):
        return values.reshape(*np.shape(sequences)[:2], *values.shape[1:])
    return np.split(values, np.cumsum([len(s) for s in sequences])[:-1])


def _is_list(X: Any) -> bool:
    """Whether X is a list of arrays (T_i, D), or of arrays (T_i,) that are not equally long."""
    if not isinstance(X, (list, tuple)) or not len(X):
        return False
    ndims = {getattr(row, "ndim", None) for row in X}
    return ndims == {2} or (ndims == {1} and len({len(row) for row in X}) > 1)


def _float(X: Array) -> Array:
    """float32 where that holds every value of the type, else float64."""
    return X.astype(min(np.result_type(X.dtype, np.float32), np.dtype(np.float64)), copy=False)


def read_sequences(estimator: Any, X: Any, reset: bool) -> Sequences:
    """Check X as scikit-learn does and take it as sequences; sets ``n_features_in_`` with reset.

    A table (n, T) has one feature per step, and ``n_features_in_`` is T; otherwise it is D.
    """
    if getattr(getattr(X, "dtype", None), "kind", "") == "O" and X.ndim == 1 and len(X):  # a column of a frame too
        X = list(X)
    if _is_list(X):
        data: Any = _read_list(X)
    else:
        if not hasattr(X, "ndim"):
            try:
                X = np.asarray(X)
            except ValueError:
                got = f"{_checks.describe(X)} that is none of them: make each sequence an array"
                raise ValueError(f"X: expected an array (n, T, D), (n, T), or a list of (T_i, D), got {got}") from None
        table = X.ndim != 3 and (reset or getattr(estimator, "_table", True))
        if table:
            data = _float(validate_data(estimator, X, reset=reset))[:, :, np.newaxis]
            if reset:
                estimator._table = True
            return Sequences(data)
        data = _float(check_array(X, allow_nd=True, input_name="X"))
        data = data[:, :, np.newaxis] if data.ndim == 2 else data
        if data.ndim != 3 or 0 in data.shape:
            raise ValueError(f"X: expected an array (n, T, D) or (n, T), none of them 0, got shape {data.shape}")
    found = Sequences(data)
    if reset:
        estimator._table, estimator.n_features_in_ = False, found.features
        if hasattr(estimator, "feature_names_in_"):
            del estimator.feature_names_in_
    expected = 1 if estimator._table else estimator.n_features_in_
    if found.features != expected:
        name = type(estimator).__name__
        raise ValueError(f"X has {found.features} features a step, but {name} is expecting {expected} features a step")
    return found


def _read_list(X: Sequence[Any]) -> list[Array]:
    rows = [np.asarray(row) for row in X]
    rows = [row[:, np.newaxis] if row.ndim == 1 else row for row in rows]
    for i, row in enumerate(rows):
        if row.shape[1] != rows[0].shape[1] or len(row) == 0:
            expected = f"(T_i, {rows[0].shape[1]}) with T_i >= 1"
            raise ValueError(f"X[{i}]: expected an array of shape {expected}, as X[0], got {row.shape}")
    steps = _float(check_array(np.concatenate(rows), input_name="X"))
    return np.split(steps, np.cumsum([len(row) for row in rows])[:-1])


def read_targets(y: Any, X: Sequences, per_step: bool, check: Callable[[Array], Array]) -> Any:
    """The targets of X, checked: an array (n, ...), or a list of arrays (T_i, ...) where X is one and has a step axis.

    ``check`` is given all values together, (n, ...) or (steps of all sequences, ...).
    """
    if not per_step:
        y = check(y)
        if len(y) != len(X):
            raise ValueError(f"Found input variables with inconsistent numbers of samples: [{len(X)}, {len(y)}]")
        return y
    if len(y) != len(X):
        raise ValueError(f"y: expected the targets of {len(X)} sequences, as X, got {len(y)}")
    rows = [np.asarray(row) for row in (y if isinstance(y, (list, tuple)) else np.asarray(y))]
    for i, row in enumerate(rows):
        if row.ndim < 1 or len(row) != X.lengths[i] or row.shape[1:] != rows[0].shape[1:]:
            expected = (int(X.lengths[i]), *rows[0].shape[1:])
            raise ValueError(f"y[{i}]: expected a target for each step, shape {expected}, got {row.shape}")
    return like(check(np.concatenate(rows)), X.data)


def labels(y: Any) -> Array:
    """Class labels, one each."""
    found: Array = column_or_1d(y, warn=True)
    return found


def numbers(y: Any) -> Array:
    """Numbers, one or several each."""
    return np.asarray(check_array(y, ensure_2d=False, dtype="numeric", input_name="y"), np.float64)
