"""The picture of peers.py: a row per shape, a dot per library, a panel per job and number of threads."""

from __future__ import annotations

import sys
from pathlib import Path

from cases import NAMES

LIBRARIES = {
    "torch": "PyTorch",
    "torch-packed": "PyTorch, packed",
    "ort": "ONNX Runtime",
    "jax": "JAX",
    "keras": "Keras on TensorFlow",
    "fastlstm-blas": "fastlstm by BLAS",
    "before": "fastlstm before",
}
MARKERS = "osD^vPX"
MODES = {"forward": "inference", "training": "forward and backward"}
ROW, MARGIN, WIDTH, LABELS = 0.33, 0.75, 4.6, 2.6  # inches: a shape, a panel's title and axis, its width, the names


def name_of(peer):
    return LIBRARIES.get(peer, peer)


def job(rec):
    """What a column of panels shows."""
    words = [MODES[rec["mode"]], rec["cell"].upper(), rec["dtype"]] + ["ragged"] * rec["ragged"]
    return ", ".join(words)


def draw(records, subject, path):
    """Draw what was timed, one step at a time left out, to ``path``, and in dark to the same name with -dark."""
    timed = [r for r in records if "ms" in r and r["mode"] in MODES]
    if not timed:
        return print("--plot: nothing was timed")
    sys.path.append(str(Path(__file__).parents[1]))  # fastlstm in the tree, where none is installed
    for style, target in ("light", path), ("dark", path.with_name(f"{path.stem}-dark{path.suffix}")):
        picture(timed, subject, style).savefig(target, dpi=110)


def picture(timed, subject, style):
    """A matplotlib Figure of these records."""
    from fastlstm.plot._style import new_figure

    jobs, teams = list(dict.fromkeys(map(job, timed))), sorted({r["threads"] for r in timed})
    shapes = list(dict.fromkeys(r["shape"] for r in timed))
    others = [p for p in dict.fromkeys(r["peer"] for r in timed) if p != subject]
    ratios = [r["ratio"] for r in timed if "ratio" in r] + [1.0]
    limits = [r["limit_share"] for r in timed if r["peer"] == subject and "limit_share" in r] + [1.0]
    span = min(*ratios, *limits) / 1.15, max(*ratios, *limits) * 1.15
    figure, look = new_figure(style, (LABELS + WIDTH * len(jobs), 0.5 + (MARGIN + ROW * len(shapes)) * len(teams)))
    axes = figure.subplots(len(teams), len(jobs), sharex=True, sharey=True, squeeze=False)
    for line, threads in zip(axes, teams, strict=True):
        for ax, column in zip(line, jobs, strict=True):
            here = {(r["shape"], r["peer"]): r for r in timed if (job(r), r["threads"]) == (column, threads)}
            frame(ax, look, shapes, span)
            panel(ax, look, here, shapes, subject, others)
            ax.set_title(f"{column}, {threads} thread{'s' * (threads > 1)}", fontsize=10, color=look.fore)
    for ax in axes[-1]:
        ax.set_xlabel(f"time over {name_of(subject)}'s (right of the line: slower)", fontsize=9, color=look.fore)
    handles = {h.get_label(): h for ax in axes.flat for h in ax.get_legend_handles_labels()[0]}
    order = [text for text in map(name_of, [subject, *others]) if text in handles] + ["the machine's limit"]
    legend = figure.legend([handles[t] for t in order if t in handles], [t for t in order if t in handles],
                           loc="outside upper center", ncols=len(order), frameon=False, fontsize=9)  # fmt: skip
    for text in legend.get_texts():
        text.set_color(look.fore)
    return figure


def frame(ax, look, shapes, span):
    """Rows, their names, and the axis of ratios."""
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    from fastlstm.plot._style import dress

    dress(ax, look.fore, look.back)
    ax.set_xscale("log")
    ax.set_xlim(span)
    ax.set_ylim(len(shapes) - 0.5, -0.5)
    ax.set_yticks(range(len(shapes)), [f"{NAMES.get(s, '')}   {s}".strip() for s in shapes], fontsize=8)
    ax.tick_params(axis="y", length=0)
    ax.xaxis.set_major_locator(FixedLocator([2.0**k for k in range(-6, 10)]))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.tick_params(axis="x", labelsize=8, labelbottom=True)
    ax.grid(axis="x", color=look.grid, lw=0.6)
    ax.set_axisbelow(True)
    for i in range(1, len(shapes), 2):
        ax.axhspan(i - 0.5, i + 0.5, color=look.grid, alpha=0.35, lw=0, zorder=0)


def panel(ax, look, here, shapes, subject, others):
    """The subject as the line at 1, the limit as a line through the rows, a dot per library and row."""
    ax.axvline(1, color=look.fore, lw=1.4, label=name_of(subject), zorder=2)
    edge, low = [], ax.get_xlim()[0]
    for i, shape in enumerate(shapes):
        own = here.get((shape, subject), {})
        edge += [(own.get("limit_share", float("nan")), i - 0.5), (own.get("limit_share", float("nan")), i + 0.5)]
        if own:
            ax.annotate(f"{own['ms']:.3g} ms", (1, i), (3, 0), ("axes fraction", "data"), "offset points",
                        fontsize=7, color=look.fore, va="center")  # fmt: skip
    x, y = zip(*edge, strict=True)
    if any(value == value for value in x):
        ax.plot(x, y, ls=(0, (4, 1)), color=look.series[-1], lw=1.6, label="the machine's limit", zorder=2)
        ax.fill_betweenx(y, low, x, color=look.series[-1], alpha=0.18, lw=0, zorder=1)
    for k, peer in enumerate(others):
        lane = 0.66 * (k / (len(others) - 1) - 0.5) if len(others) > 1 else 0  # so that no dot hides another
        dots = [(here[s, peer]["ratio"], i + lane) for i, s in enumerate(shapes) if "ratio" in here.get((s, peer), {})]
        if dots:
            ax.plot(*zip(*dots, strict=True), MARKERS[k % len(MARKERS)], ms=5, mec=look.back, mew=0.5, zorder=3,
                    color=look.series[k % (len(look.series) - 1)], label=name_of(peer))  # fmt: skip
