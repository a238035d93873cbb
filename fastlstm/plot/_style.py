"""The two styles, and what all pictures share: the Axes they are drawn on, legends, colours, saving."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

    from .._types import Array

Path = str | os.PathLike[str]


class Look(NamedTuple):
    """The colours of a style."""

    back: str
    fore: str
    grid: str
    series: tuple[str, ...]  # told apart by the colour-blind too (Okabe and Ito 2008)
    signed: tuple[str, str, str]  # of -1, 0, 1
    share: tuple[str, str]  # of 0, 1
    on_full: str  # text on the colour of 1


LOOKS = {
    "light": Look("#ffffff", "#1c1c1c", "#d9d9d9", ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#666666"),
                   ("#0072b2", "#ffffff", "#b5350f"), ("#ffffff", "#0b559f"), "#ffffff"),
    "dark": Look("#14171c", "#e8e8e8", "#3a3f47", ("#56b4e9", "#f0a13c", "#3fcf9f", "#e6a5cf", "#bbbbbb"),
                  ("#56b4e9", "#14171c", "#f0a13c"), ("#1d2229", "#7cc4f2"), "#000000"),
}  # fmt: skip


def new_figure(style: str | None, size: tuple[float, float]) -> tuple[Figure, Look]:
    """An empty figure in this style, light if none is named."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("fastlstm.plot needs matplotlib: python -m pip install matplotlib") from error
    look = look_of(style or "light")
    return Figure(figsize=size, layout="constrained", facecolor=look.back), look


def look_of(style: str) -> Look:
    if not isinstance(style, str) or style not in LOOKS:
        raise ValueError(f"style: expected 'light' or 'dark', got {style!r}")
    return LOOKS[style]


def axes_for(ax: Axes | None, style: str | None, size: tuple[float, float] = (7, 4)) -> tuple[Axes, Look]:
    """The Axes to draw on. Of those that come from elsewhere the face tells the style, unless it is named."""
    if ax is None:
        figure, look = new_figure(style, size)
        ax = figure.subplots()
        dress(ax, look.fore, look.back)
        return ax, look
    if not hasattr(ax, "get_facecolor") or not hasattr(ax, "plot"):
        raise TypeError(f"ax: expected a matplotlib Axes, got {type(ax).__name__}")
    if style is None:
        from matplotlib.colors import to_rgb

        style = "dark" if np.dot(to_rgb(ax.get_facecolor()), (0.2126, 0.7152, 0.0722)) < 0.5 else "light"
    return ax, look_of(style)


def dress(ax: Axes, colour: Any, back: str | None = None) -> None:
    """Frame, ticks and labels of an Axes that was made here, and its face."""
    if back is not None:
        ax.set_facecolor(back)
    ax.tick_params(which="both", colors=colour)
    for text in (ax.title, ax.xaxis.label, ax.yaxis.label, ax.xaxis.get_offset_text(), ax.yaxis.get_offset_text()):
        text.set_color(colour)
    for spine in ax.spines.values():
        spine.set_color(colour)


def outside(ax: Axes) -> Any:
    """The colour of what stands beside an Axes, on the figure's face."""
    return ax.xaxis.label.get_color()


def add_legend(ax: Axes, handles: Sequence[Any]) -> None:
    """Above the Axes, where no curve runs, in as many columns as there is room for."""
    room = ax.get_position().width * ax.figure.figure.get_figwidth() / 1.3
    legend = ax.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=max(1, int(room)),
                       frameon=False)  # fmt: skip
    for text in legend.get_texts():
        text.set_color(outside(ax))


def log_scale(ax: Axes) -> None:
    """A logarithmic axis for what spans a decade or more; below two with 0.5 in place of 5 x 10^-1."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = ax.dataLim.y0, ax.dataLim.y1
    if low > 0 and high / low >= 10:
        ax.set_yscale("log")
        if high / low < 100:
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            ax.yaxis.set_minor_formatter(NullFormatter())


def colours(*stops: str) -> Any:
    """A colour map through these colours."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("-".join(stops), stops)


def done(ax: Axes, path: Path | None) -> Figure:
    figure = ax.figure.figure  # a subfigure's is the whole
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def vector(name: str, values: ArrayLike, length: int | None = None) -> Array:
    """A 1-D array of numbers, of this length if one is given."""
    try:
        a = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected numbers, got {type(values).__name__}") from None
    if a.ndim != 1 or len(a) == 0 or length not in (None, len(a)):
        expected = "one axis, not empty" if length is None else f"shape ({length},)"
        raise ValueError(f"{name}: expected {expected}, got shape {a.shape}")
    return a
