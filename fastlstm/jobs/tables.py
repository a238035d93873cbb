"""Sequences from files: tables in CSV or Parquet (pyarrow), columns or arrays in .npz."""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .._types import Array
from . import JobError

NEEDS = "needs scikit-learn and pyarrow: python -m pip install 'fastlstm[table]'"
KINDS = (".csv", ".parquet", ".npz")


@dataclass
class Layout:
    """Which columns are what; of an .npz without ``group`` the names of two arrays."""

    group: str | None
    time: str | None
    features: list[str] | None  # None: all that are numbers
    target: str
    per_step: bool


@dataclass
class Samples:
    """Sequences, each with its name, and what is to be predicted."""

    X: Any  # array (n, T) or (n, T, D), or list of arrays (T_i, D)
    y: Any  # array (n,), or for each step (n, T) or a list of arrays (T_i,)
    names: Array
    times: list[Array] | None
    features: list[str]


def read_columns(path: Path) -> dict[str, Array]:
    """All columns, or arrays, by name."""
    if path.suffix not in KINDS:
        raise JobError(f"{path}: expected a file that ends in {', '.join(KINDS)}")
    if not path.is_file():
        raise JobError(f"{path}: no such file")
    try:
        if path.suffix == ".npz":
            if not zipfile.is_zipfile(path):
                raise ValueError("it is not what numpy.savez writes")
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        return _read_table(path)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise JobError(f"{path}: cannot be read: {_line(error)}") from error


def _read_table(path: Path) -> dict[str, Array]:
    try:
        from pyarrow import csv, parquet, types
    except ImportError as error:
        raise JobError(f"{path.suffix[1:]} {NEEDS}") from error
    table = csv.read_csv(path) if path.suffix == ".csv" else parquet.read_table(path)
    if len(set(table.column_names)) < len(table.column_names):
        raise JobError(f"{path}: two columns have the same name")
    if len(table) == 0:
        raise JobError(f"{path}: no rows")
    columns = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if column.null_count:
            raise JobError(f"{path}: column {name!r}: {column.null_count} of {len(table)} values are missing")
        if types.is_binary(column.type):
            raise JobError(f"{path}: column {name!r}: expected text in UTF-8, got other bytes")
        values = column.to_numpy()
        columns[name] = values if not types.is_string(column.type) else values.astype(str)
    return columns


def read_samples(path: Path, layout: Layout, with_target: bool) -> Samples:
    """The sequences of a file. Raises JobError that says what is missing."""
    columns = read_columns(path)
    if path.suffix == ".npz" and layout.group is None:
        return _from_arrays(path, columns, layout, with_target)
    needed = [layout.group, layout.time, *(layout.features or []), layout.target if with_target else None]
    _find(path, columns, needed)
    if layout.features is None:
        others = (layout.group, layout.time, layout.target)
        layout.features = [name for name, a in columns.items() if name not in others and _is_number(a)]
        if not layout.features:
            raise JobError(f"{path}: no column of numbers beside {', '.join(filter(None, others))}")
    for name in layout.features:
        if not _is_number(columns[name]):
            raise JobError(f"{path}: column {name!r}: expected numbers, got {columns[name].dtype}")
    if len({len(a) for a in columns.values()}) > 1 or any(a.ndim != 1 for a in columns.values()):
        raise JobError(f"{path}: expected columns, arrays of one axis and the same length, with --group")
    for column in filter(None, [*needed, *layout.features]):
        _check_whole(path, column, columns[column])
    x = np.stack([columns[name].astype(np.float32) for name in layout.features], axis=1)
    y = columns[layout.target] if with_target else None
    if layout.group is None:
        return Samples(x, y, np.arange(len(x)), None, layout.features)
    return _grouped(path, columns, x, y, layout)


def _from_arrays(path: Path, columns: dict[str, Array], layout: Layout, with_target: bool) -> Samples:
    """X (n, T) or (n, T, D) and y, by these names unless others are given."""
    (name,) = layout.features if layout.features and len(layout.features) == 1 else ["X"]
    _find(path, columns, [name, layout.target if with_target else None])
    X, y = columns[name], columns[layout.target] if with_target else None
    if X.ndim not in (2, 3) or not _is_number(X):
        raise JobError(f"{path}: {name}: expected numbers of shape (n, T) or (n, T, D), got {X.dtype} {X.shape}")
    if y is not None and (
        y.shape[: 1 + layout.per_step] != X.shape[: 1 + layout.per_step] or y.ndim != 1 + layout.per_step
    ):
        raise JobError(f"{path}: {layout.target}: expected shape {X.shape[: 1 + layout.per_step]}, got {y.shape}")
    for key, values in ((name, X), (layout.target, y)):
        _check_whole(path, key, values)
    layout.features = [name]
    return Samples(X.astype(np.float32), y, np.arange(len(X)), None, [name])


def _grouped(path: Path, columns: dict[str, Array], x: Array, y: Array | None, layout: Layout) -> Samples:
    """The rows of a group are a sequence, in the order of time, else as they stand; groups as they first occur."""
    assert layout.group is not None
    groups = columns[layout.group]
    _, first, which = np.unique(groups, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))[which]
    time = columns[layout.time] if layout.time else np.arange(len(x))
    order = np.lexsort((time, rank))
    same = (rank[order][1:] == rank[order][:-1]) & (time[order][1:] == time[order][:-1])
    if same.any():
        row = order[1:][same][0]
        raise JobError(f"{path}: group {groups[row]} has two rows at {layout.time} {time[row]}")
    cuts = np.flatnonzero(np.diff(rank[order])) + 1
    names = groups[np.sort(first)]
    X = np.split(x[order], cuts)
    times = np.split(time[order], cuts) if layout.time else None
    target: Any = None
    if y is not None:
        target = np.split(y[order], cuts)
        if not layout.per_step:
            for name, values in zip(names, target, strict=True):
                if (values != values[0]).any():
                    varies = f"{path}: {layout.target} varies within group {name}"
                    raise JobError(f"{varies}: give --per-step to predict it for each row")
            target = np.array([values[0] for values in target])
    return Samples(X, target, names, times, list(layout.features or []))


def _find(path: Path, columns: dict[str, Array], names: Sequence[str | None]) -> None:
    for name in names:
        if name is not None and name not in columns:
            raise JobError(f"{path}: no {name!r}, only {', '.join(map(repr, columns))}")


def _check_whole(path: Path, name: str, values: Array | None) -> None:
    if values is not None and values.dtype.kind == "f" and (missing := int(np.isnan(values).sum())):
        raise JobError(f"{path}: {name!r}: {missing} of {values.size} values are missing (NaN)")


def _is_number(a: Array) -> bool:
    return a.dtype.kind in "iufb"


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def as_job_error(error: Exception) -> JobError:
    """What an estimator says about its data, in one line."""
    return JobError(_line(error))


def columns_of(text: str) -> list[str]:
    """The value of --features."""
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"expected names with commas between them, each once, got {text!r}")
    return names
