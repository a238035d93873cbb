"""Pictures of the inside of a recurrent layer: its gates and its gradients over time."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ._style import Look, Path, add_legend, axes_for, colours, done, dress, log_scale, new_figure, outside, vector

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

    from .._types import Array

_LSTM = {"i": "input gate i", "f": "forget gate f", "g": "candidate g", "z": "candidate z", "o": "output gate o"}
_GRU = {"r": "reset gate r", "z": "update gate z", "n": "candidate n"}


def gates(
    tape: Any, layer: int = 0, reverse: bool = False, sequence: int = 0, path: Path | None = None, *,
    name: str | None = None, ax: Axes | None = None, style: str | None = None,
) -> Figure:  # fmt: skip
    """Draw gates, cell and hidden state of one sequence over time, as heat maps.

    Time runs to the right, one row per unit. Gates are drawn from 0 to 1 and candidate and hidden state from
    -1 to 1 whatever their values, so that pictures can be compared; the cell state from -a to a with
    a = max(1, |c|).

    Parameters
    ----------
    tape : Tape
        From a layer's ``forward``, not yet used by ``backward``.
    layer : int
        Which layer.
    reverse : bool
        Whether to show the reverse direction.
    sequence : int
        Which sequence of the batch.
    path : path, optional
        Save the figure there; the ending says in which format.
    name : str, optional
        Draw this one alone: a gate's letter, "c" or "h". Needed with ``ax``.
    ax : matplotlib Axes, optional
        To draw one of them on; None makes a figure.
    style : {"light", "dark"}, optional
        None: light, or as the given Axes' face is.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ImportError
        matplotlib is not installed.
    TypeError, ValueError
        No tape, or no such sequence or gate, or no steps.
    """
    figure = None
    if ax is None:  # first of all: says where matplotlib is missing
        figure, look = new_figure(style, (5.5, 2.8))
    if not hasattr(tape, "gates"):
        raise TypeError(f"tape: expected the Tape that forward returned, got {type(tape).__name__}")
    try:
        sequence = operator.index(sequence)
    except TypeError:
        raise TypeError(f"sequence: expected an integer, got {type(sequence).__name__}") from None
    panels = _panels(tape, layer, reverse, sequence)
    if name is None and ax is not None:
        raise ValueError(f"name: expected one of {', '.join(panels)} with ax, got None")
    if name is not None:
        if name not in panels:
            raise ValueError(f"name: expected one of {', '.join(panels)}, got {name!r}")
        panels = {name: panels[name]}
    if figure is None:
        ax, look = axes_for(ax, style)
        _draw_panel(ax, look, next(iter(panels.values())), labels=True)
        return done(ax, path)
    columns = 2 if len(panels) > 1 else 1
    rows = -(-len(panels) // columns)
    figure.set_size_inches(5.5 * columns, 0.6 + 2.2 * rows)
    axes = figure.subplots(rows, columns, sharex=True, squeeze=False)
    for i, ax in enumerate(axes.flat):
        if i < len(panels):  # the lowest panel of each column carries the time axis
            dress(ax, look.fore, look.back)
            _draw_panel(ax, look, list(panels.values())[i], labels=i + columns >= len(panels))
        else:
            ax.set_visible(False)
    figure.suptitle(f"layer {layer}{', reverse' if reverse else ''}, sequence {sequence}", color=look.fore)
    return done(axes[0, 0], path)


def _draw_panel(ax: Axes, look: Look, panel: tuple[str, Any, float, float], labels: bool) -> None:
    title, values, low, high = panel
    scale = colours(*look.signed) if low < 0 else "viridis"
    image = ax.imshow(values.T, aspect="auto", interpolation="nearest", vmin=low, vmax=high, cmap=scale,
                      origin="lower")  # fmt: skip
    ax.set(title=title, ylabel="unit")
    locator: Any = ax.yaxis.get_major_locator()
    locator.set_params(integer=True)
    dress(ax.figure.colorbar(image, ax=ax).ax, outside(ax))
    if labels:
        ax.set_xlabel("time step")
        ax.tick_params(labelbottom=True)


def _panels(tape: Any, layer: int, reverse: bool, sequence: int) -> dict[str, tuple[str, Any, float, float]]:
    """By name: title, values (T, H) and limits of each picture."""
    by_name = tape.gates(layer, reverse=reverse)
    hidden = tape.hidden(layer, reverse=reverse)
    n = hidden.shape[1]
    if not 0 <= sequence < n:
        raise ValueError(f"sequence: expected 0..{n - 1}, got {sequence}")
    if len(hidden) == 0:
        raise ValueError("tape: it has no steps to draw")
    titles = _LSTM if "f" in by_name else _GRU
    panels: dict[str, tuple[str, Any, float, float]] = {
        name: (titles.get(name, name), values[:, sequence], 0 if "gate" in titles.get(name, name) else -1, 1)
        for name, values in by_name.items()
        if name != "h"  # the RNN's only column is its hidden state, drawn below
    }
    if "f" in by_name:  # of the cells only LSTM and SLSTM have a state of their own
        cell = tape.cells(layer, reverse=reverse)[:, sequence]
        limit = max(1.0, float(abs(cell).max(initial=0)))
        panels["c"] = ("cell state c", cell, -limit, limit)
    panels["h"] = ("hidden state h", hidden[:, sequence], -1, 1)
    return panels


def gradient_sizes(layer: Any, x: ArrayLike, dy: ArrayLike | None = None) -> Array:
    """How far back a loss of the last step is felt: the size of its gradient at each step's input.

    Parameters
    ----------
    layer : LSTM, GRU or RNN
        Of one direction, forward. Its ``grads`` are as before afterwards.
    x : array_like, shape (T, N, D), or (N, T, D) with batch_first
    dy : array_like, shape (N, P), optional
        Gradient of the loss with respect to the last step's output; None: a random one of length 1 for each sequence.

    Returns
    -------
    ndarray, shape (T,)
        The 2-norm over the features, root mean square over the batch; the last element is that of the step of the loss.
    """
    if getattr(layer, "bidirectional", True) or getattr(layer, "direction", "") != "forward":
        raise ValueError(f"layer: expected a recurrent layer with one direction, forward, got {layer!r}")
    if np.ndim(x) != 3 or 0 in np.shape(x):
        raise ValueError(f"x: expected three axes, none empty, got shape {np.shape(x)}")
    y, _, tape = layer.forward(x)
    turn: Callable[[Array], Array] = (lambda a: a.swapaxes(0, 1)) if layer.batch_first else (lambda a: a)
    all_dy = np.zeros_like(y)
    last = turn(all_dy)[-1]
    if dy is None:
        dy = np.random.default_rng(0).standard_normal(last.shape)
        dy /= np.linalg.norm(dy, axis=-1, keepdims=True)
    if np.shape(dy) != last.shape:
        raise ValueError(f"dy: expected shape {last.shape}, got {np.shape(dy)}")
    last[:] = dy
    kept = layer.flat_grads.copy()
    try:
        dx, _ = layer.backward(tape, all_dy)
    finally:
        layer.flat_grads[:] = kept
    norms = np.linalg.norm(turn(dx).astype(np.float64), axis=2)
    return np.asarray(np.sqrt((norms**2).mean(axis=1)))


def gradients(
    sizes: Mapping[str, ArrayLike], *, ax: Axes | None = None, style: str | None = None, path: Path | None = None
) -> Figure:
    """Draw how far back the loss of the last step is felt, of several layers on one axis.

    Parameters
    ----------
    sizes : dict of name to array_like, shape (T,)
        What `gradient_sizes` returns. Drawn relative to the last element, that of the step of the loss, and over the
        number of steps before it; zeros (the gradient is below the smallest number) are left out.
    ax, style, path
        As in `learning_curves`.

    Returns
    -------
    matplotlib.figure.Figure
    """
    if not isinstance(sizes, Mapping) or not sizes:
        raise TypeError(f"sizes: expected a dict of name to sizes, not empty, got {type(sizes).__name__}")
    curves = {name: vector(f"sizes[{name!r}]", values)[::-1] for name, values in sizes.items()}
    for name, curve in curves.items():
        if not (np.isfinite(curve).all() and (curve >= 0).all() and curve[0] > 0):
            raise ValueError(f"sizes[{name!r}]: expected finite numbers >= 0, the last above 0")
    ax, look = axes_for(ax, style)
    handles, colours = [], iter(look.series * len(curves))
    for name, curve in curves.items():
        shown = np.where(curve > 0, curve / curve[0], np.nan)
        handles += ax.plot(np.arange(len(curve)), shown, color=next(colours), linewidth=1.8, label=name)
    ax.set(xlabel="steps before the loss", ylabel="gradient, relative to the last step")
    log_scale(ax)
    ax.grid(color=look.grid, linewidth=0.6)
    add_legend(ax, handles)
    return done(ax, path)
