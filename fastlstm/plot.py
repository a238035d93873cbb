"""Pictures of what a recurrent layer does (needs matplotlib)."""

from __future__ import annotations

import operator
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["gates"]

_LSTM = {"i": "input gate i", "f": "forget gate f", "g": "candidate g", "o": "output gate o"}
_GRU = {"r": "reset gate r", "z": "update gate z", "n": "candidate n"}
_UNSIGNED = ("i", "f", "o", "r", "z")  # the gates proper, in [0, 1]; the rest is in [-1, 1]


def gates(
    tape: Any,
    layer: int = 0,
    reverse: bool = False,
    sequence: int = 0,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
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

    Returns
    -------
    matplotlib.figure.Figure
        Not known to pyplot, so it need not be closed.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    TypeError, ValueError
        No tape, or no such sequence, or no steps.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("fastlstm.plot needs matplotlib: python -m pip install matplotlib") from error

    if not hasattr(tape, "gates"):
        raise TypeError(f"tape: expected the Tape that forward returned, got {type(tape).__name__}")
    try:
        sequence = operator.index(sequence)
    except TypeError:
        raise TypeError(f"sequence: expected an integer, got {type(sequence).__name__}") from None
    by_name = tape.gates(layer, reverse=reverse)
    hidden = tape.hidden(layer, reverse=reverse)
    n = hidden.shape[1]
    if not 0 <= sequence < n:
        raise ValueError(f"sequence: expected 0..{n - 1}, got {sequence}")
    if len(hidden) == 0:
        raise ValueError("tape: it has no steps to draw")
    titles = _GRU if "z" in by_name else _LSTM
    panels: list[tuple[str, Any, float, float, str]] = []
    for name, values in by_name.items():
        if name == "h":  # the RNN's only column is its hidden state, drawn below
            continue
        scale = (0, 1, "viridis") if name in _UNSIGNED else (-1, 1, "RdBu_r")
        panels.append((titles.get(name, name), values[:, sequence], *scale))
    if "f" in by_name:  # of the cells only the LSTM's has a state of its own
        cell = tape.cells(layer, reverse=reverse)[:, sequence]
        limit = max(1.0, float(abs(cell).max(initial=0)))
        panels.append(("cell state c", cell, -limit, limit, "RdBu_r"))
    panels.append(("hidden state h", hidden[:, sequence], -1, 1, "RdBu_r"))

    columns = 2 if len(panels) > 1 else 1
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.5 * columns, 0.6 + 2.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, squeeze=False)
    for ax, (title, values, low, high, colours) in zip(axes.flat, panels, strict=False):
        image = ax.imshow(
            values.T,
            aspect="auto",
            interpolation="nearest",
            vmin=low,
            vmax=high,
            cmap=colours,
            origin="lower",
        )
        ax.set(title=title, ylabel="unit")
        ax.yaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=ax)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for column in range(columns):  # the lowest panel of each column carries the time axis
        lowest = [ax for ax in axes[:, column] if ax.get_visible()][-1]
        lowest.set_xlabel("time step")
        lowest.tick_params(labelbottom=True)
    figure.suptitle(f"layer {layer}{', reverse' if reverse else ''}, sequence {sequence}")
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure
