"""Pictures of a training and of what came out of it."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ._style import Path, add_legend, axes_for, colours, done, dress, log_scale, outside, vector

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

    from .._types import Array


def _epochs(history: Any) -> dict[str, Array]:
    """Curves by name, from a dict per epoch or from a list per name."""
    if not isinstance(history, Mapping):
        records = list(history)
        if not records or not all(isinstance(record, Mapping) for record in records):
            raise TypeError("history: expected a list of dicts, one for each epoch, or a dict of lists")
        history = {name: [record.get(name, np.nan) for record in records] for name in dict.fromkeys(
            name for record in records for name in record)}  # fmt: skip
    return {name: np.asarray(values) for name, values in history.items() if np.ndim(values) == 1}


def learning_curves(
    history: Any, *, ax: Axes | None = None, style: str | None = None, path: Path | None = None
) -> Figure:
    """Draw losses and scores over the epochs.

    Parameters
    ----------
    history : list of dict, or dict of lists
        What `fastlstm.nn.fit` returns. Every entry whose name ends in "loss" is drawn against the left axis, which is
        logarithmic if they span a decade, and every one that ends in "score" or "accuracy" against the right one. An
        entry "epoch" places them, else they are counted from 1.
    ax : matplotlib Axes, optional
        To draw on; None makes a figure.
    style : {"light", "dark"}, optional
        None: light, or as the given Axes' face is.
    path : path, optional
        Save the figure there; the ending says in which format.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ImportError
        matplotlib is not installed.
    TypeError, ValueError
        The history holds no such entry.
    """
    curves = _epochs(history)
    losses = [name for name in curves if name.endswith("loss")]
    scores = [name for name in curves if name.endswith(("score", "accuracy"))]
    if not losses + scores:
        raise ValueError(
            f"history: expected an entry that ends in 'loss' or 'score', got {', '.join(curves) or 'none'}"
        )
    ax, look = axes_for(ax, style)
    right, handles, colours = ax, [], iter(look.series * len(curves))
    if losses and scores:
        right = ax.twinx()
        dress(right, outside(ax))
    for axis, names, marker, label in ((ax, losses, "o-", "loss"), (right, scores, "s--", "score")):
        for name in names:
            x = curves.get("epoch", np.arange(1, len(curves[name]) + 1))
            handles += axis.plot(x, curves[name], marker, color=next(colours), label=name.replace("_", " "),
                                 markersize=4 if len(x) <= 30 else 0)  # fmt: skip
        if names:
            axis.set_ylabel(label)
    if losses:
        log_scale(ax)
    ax.set_xlabel("epoch")
    locator: Any = ax.xaxis.get_major_locator()
    locator.set_params(integer=True)
    ax.grid(color=look.grid, linewidth=0.6)
    add_legend(ax, handles)
    return done(ax, path)


def confusion_matrix(
    true: ArrayLike, predicted: ArrayLike, *, labels: Sequence[Any] | None = None, ax: Axes | None = None,
    style: str | None = None, path: Path | None = None,
) -> Figure:  # fmt: skip
    """Draw how often each class was taken for each.

    One row per true class, one column per predicted one: in each field the count, its colour the share of the row.

    Parameters
    ----------
    true, predicted : array_like, shape (n,)
        Class labels.
    labels : sequence, optional
        Classes in the order of rows and columns; None: all that occur, sorted. Samples of other classes are an error.
    ax, style, path
        As in `learning_curves`.

    Returns
    -------
    matplotlib.figure.Figure
    """
    true, predicted = np.asarray(true), np.asarray(predicted)
    if true.ndim != 1 or true.shape != predicted.shape or len(true) == 0:
        raise ValueError(
            f"predicted: expected as many labels as true, at least one, got {predicted.shape} for {true.shape}"
        )
    found = np.unique(np.concatenate([true, predicted]))
    classes = list(found) if labels is None else list(labels)
    place = {label: i for i, label in enumerate(classes)}
    missing = [label for label in found.tolist() if label not in place]
    if missing or len(place) < len(classes):
        raise ValueError(f"labels: expected each class once, {missing[:5]} is missing" if missing
                         else "labels: expected each class once")  # fmt: skip
    k = len(classes)
    rows, columns = ([place[label] for label in a.tolist()] for a in (true, predicted))
    counts = np.zeros((k, k), int)
    np.add.at(counts, (rows, columns), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)

    side = min(12.0, 2.5 + 0.5 * k)
    ax, look = axes_for(ax, style, (side + 0.8, side))
    image = ax.imshow(shares, vmin=0, vmax=1, cmap=colours(*look.share))
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.8)
    bar.set_label("share of the row")
    dress(bar.ax, outside(ax))
    _name_classes(ax, [str(label) for label in classes])
    for i, j in np.argwhere(counts) if k <= 25 else ():
        ax.text(j, i, counts[i, j], ha="center", va="center", fontsize=10 if k <= 10 else 7,
                color=look.on_full if shares[i, j] > 0.5 else look.fore)  # fmt: skip
    right, total = np.trace(counts), len(true)
    ax.set(xlabel="predicted", ylabel="true", title=f"{right:,} of {total:,} right ({100 * right / total:.2f} %)")
    return done(ax, path)


def _name_classes(ax: Axes, names: list[str]) -> None:
    """Ticks with the names of the classes: each while there is room, long ones upright."""
    every = -(-len(names) // 40)
    ax.set_xticks(range(0, len(names), every), names[::every])
    ax.set_yticks(range(0, len(names), every), names[::every])
    if max(map(len, names)) > 3 or len(names) > 15:
        ax.tick_params(axis="x", labelrotation=90)


def forecast(
    series: ArrayLike, predicted: ArrayLike, *, intervals: Any = None, actual: ArrayLike | None = None,
    times: ArrayLike | None = None, shown: int | None = None, ax: Axes | None = None, style: str | None = None,
    path: Path | None = None,
) -> Figure:  # fmt: skip
    """Draw a series, what was predicted after its end, and how sure that is.

    Parameters
    ----------
    series : array_like, shape (T,)
        What was known.
    predicted : array_like, shape (horizon,)
    intervals : (lower, upper), or dict of name to (lower, upper), optional
        Each of shape (horizon,); drawn as bands, the first of them the faintest, so give the widest first.
    actual : array_like, shape (horizon,), optional
        What came.
    times : array_like, shape (T + horizon,), optional
        Numbers or dates of the steps; None: the steps counted from 0.
    shown : int, optional
        Draw the last so many steps of the series only.
    ax, style, path
        As in `learning_curves`.

    Returns
    -------
    matplotlib.figure.Figure
    """
    series, predicted = vector("series", series), vector("predicted", predicted)
    n, h = len(series), len(predicted)
    actual = None if actual is None else vector("actual", actual, h)
    x = np.arange(n + h) if times is None else np.asarray(times)
    if x.shape != (n + h,):
        raise ValueError(f"times: expected shape ({n + h},), got {x.shape}")
    if shown is not None and not 1 <= operator.index(shown):
        raise ValueError(f"shown: expected at least 1, got {shown}")
    if not isinstance(intervals, Mapping):
        intervals = {} if intervals is None else {"interval": intervals}
    bands = {}
    for name, pair in intervals.items():
        if len(pair) != 2:
            raise ValueError(f"intervals: expected a pair (lower, upper), got {len(pair)} arrays")
        bands[name] = [vector("intervals", side, h) for side in pair]
        if (bands[name][0] > bands[name][1]).any():
            raise ValueError("intervals: expected lower <= upper")

    ax, look = axes_for(ax, style, (8, 4))
    past, ahead = slice(0 if shown is None else max(0, n - shown), n), slice(n, n + h)
    handles: list[Any] = ax.plot(x[past], series[past], color=look.fore, linewidth=1.2, label="series")
    for i, (name, (lower, upper)) in enumerate(bands.items()):
        handles.append(ax.fill_between(x[ahead], lower, upper, color=look.series[0], linewidth=0,
                                       alpha=0.2 + 0.25 * i / len(bands), label=name))  # fmt: skip
    mark = "o" if h == 1 else ""
    if actual is not None:  # joined to the series, as it is its continuation
        handles += ax.plot(x[n - 1 :], np.r_[series[-1], actual], color=look.fore, linewidth=1.2, linestyle=":",
                           marker=mark, label="what came")  # fmt: skip
    handles += ax.plot(x[ahead], predicted, color=look.series[0], linewidth=1.8, marker=mark, label="forecast")
    ax.axvline(x[n - 1], color=look.grid, linewidth=1, zorder=0)
    ax.grid(color=look.grid, linewidth=0.6)
    if times is None:
        ax.set_xlabel("time step")
    else:
        ax.tick_params(axis="x", labelrotation=30)
    add_legend(ax, handles)
    return done(ax, path)
