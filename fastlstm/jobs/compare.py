"""LSTM, GRU and RNN side by side on MNIST: accuracy, weights, time, and how far back the loss is felt."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import engine, nn, plot, threads
from .._types import Array
from ..datasets import Data
from ..plot._style import LOOKS
from . import JobError, mnist

CELLS = ("lstm", "gru", "rnn")
PROBE = 256  # images on which the gradient is looked at
TIMES = 100  # that it is looked at over the training


class Watch:
    """Looks at the gradient of the loss at each row of some images, now and then during a training."""

    def __init__(self, data: Data) -> None:
        self.x, self.labels = mnist.time_major(data.train_images[:PROBE]), data.train_labels[:PROBE]
        self.steps: list[int] = []
        self.sizes: list[Array] = []  # of each look: a number for each row

    def __call__(self, layer: Any, linear: nn.Linear, step: int, steps: int) -> None:
        """Look before this step, if it is one of those."""
        if step % max(1, steps // TIMES) and step != steps:
            return
        h = mnist.last_hidden(layer(self.x)[1])
        logits, tape = linear.forward(h)
        _, dlogits = nn.softmax_cross_entropy(logits, self.labels)
        dh = linear.backward(tape, dlogits * np.float32(len(h)))  # the loss of each image, not of their mean
        self.steps.append(step)
        self.sizes.append(plot.gradient_sizes(layer, self.x, dh))

    @property
    def first(self) -> Array:
        """The gradient at the first row, at each look."""
        return np.array([sizes[0] for sizes in self.sizes])

    @property
    def share(self) -> Array:
        """The gradient at the first row as a share of that at the last."""
        return np.array([sizes[0] / sizes[-1] if sizes[-1] > 0 else 0.0 for sizes in self.sizes])


def run(data: Data, args: argparse.Namespace) -> Callable[[], Any]:
    """Train the three, print the table; return what draws the picture."""
    found: dict[str, tuple[mnist.Result, Watch]] = {}
    for cell in CELLS:
        watch, name = Watch(data), cell.upper()
        try:
            result = mnist.train(data, cell=cell, watch=watch, label=f"{name:<4} ", **mnist.settings(args))
        except JobError as error:
            raise JobError(f"{name}: {error}") from None
        found[name] = result, watch
    print(table(found, len(data.train_labels), len(data.test_labels)))
    print(f"threads {threads.get_num_threads()}, ISA {engine.isa()}")
    return lambda: picture(found, len(data.test_labels), args.epochs)


def table(found: dict[str, tuple[mnist.Result, Watch]], images: int, tests: int) -> str:
    """The three in lines."""
    lines = [
        "      test        weights   time per             gradient at the first    share of the last row's:",
        "      accuracy               epoch   images/s    row: start, end          start, end",
    ]
    for name, (result, watch) in found.items():
        seconds = sum(result.seconds) / len(result.seconds)
        weights = result.layer.num_params + result.linear.flat_params.size
        lines.append(
            f"{name:<4}  {100 * result.test_correct[-1] / tests:6.2f} %  {weights:>9,}  {seconds:>7.2f} s  "
            f"{images / seconds:>9,.0f}    {watch.first[0]:<7.1e}  {watch.first[-1]:<7.1e}         "
            f"{watch.share[0]:<7.1e}  {watch.share[-1]:<7.1e}"
        )
    return "\n".join(lines)


def picture(found: dict[str, tuple[mnist.Result, Watch]], tests: int, epochs: int) -> Any:
    """Accuracy over the epochs, the gradient at the first row over the training, and over the rows at its end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.2), layout="constrained")
    accuracy, over_training, over_rows = figure.subplots(1, 3)
    series = zip(found.items(), "os^", LOOKS["light"].series, strict=False)
    for (name, (result, watch)), marker, colour in series:
        values = 100 * np.array(result.test_correct) / tests
        epoch = np.arange(1, len(values) + 1)
        accuracy.plot(epoch, values, marker + "-", color=colour, label=f"{name}, {values[-1]:.2f} %")
        share = np.where(watch.share > 0, watch.share, np.nan)
        over_training.plot(np.array(watch.steps) * epochs / watch.steps[-1], share, color=colour, label=name)
    accuracy.set(xlabel="epoch", ylabel="test accuracy in %", title="accuracy")
    accuracy.xaxis.get_major_locator().set_params(integer=True)
    over_training.set(xlabel="epoch", ylabel="share of the last row's", title="gradient at the first row", yscale="log")
    for ax in (accuracy, over_training):
        ax.legend()
        ax.grid(alpha=0.3)
    last = {name: watch.sizes[-1] for name, (_, watch) in found.items() if watch.sizes[-1][-1] > 0}
    if last:
        plot.gradients(last, ax=over_rows)
        over_rows.get_legend().remove()  # the colours are those of the others
    over_rows.set(xlabel="rows before the last", ylabel="share of the last row's", title="gradient after training")
    return figure
