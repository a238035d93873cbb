"""The training loop, and what feeds and stops it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import _checks
from .._progress import progress_bar
from .._types import Array
from ..sequences import pad
from . import schedules
from .losses import softmax_cross_entropy
from .optimisers import EMA, Optimiser, clip_grad_norm
from .schedules import Schedule, constant


class Batch(NamedTuple):
    """Sequences of one step of the optimiser, time-major."""

    x: Array
    target: Array
    lengths: Array | None = None
    weight: Array | None = None


class Batches:
    """Sequences in batches, in a new order at each pass.

    Parameters
    ----------
    x : array_like (n, T, D), or sequence of n arrays (T_i, D)
    target : array_like (n, ...), or sequence of n arrays (T_i, ...) for a target at each step
        Those of different lengths are padded with zeros.
    batch_size : int
    weight : array_like (n,), optional
        Of each sequence, handed to the loss. With targets at each step the steps of a sequence share it, or there is
        one for each step as in target, and what stands past its length has weight 0.
    per_step : bool
        Whether the target has a step axis: it then comes time-major, and padding is masked by the weights.
    shuffle : bool
        False: as they come.
    rng : int, numpy.random.Generator or None
        Source of the order.

    Notes
    -----
    Sequences of different lengths are sorted by length within 50 batches, so that a batch holds similar ones; no order
    is drawn where one batch holds all. Iteration yields `Batch`: x (T, N, D), target, lengths or None, weight or None.
    """

    def __init__(
        self,
        x: Any,
        target: Any,
        batch_size: int = 32,
        *,
        weight: Any = None,
        per_step: bool = False,
        shuffle: bool = True,
        rng: int | np.random.Generator | None = None,
    ) -> None:
        self.batch_size = _checks.integer("batch_size", batch_size, 1)
        self.x, self.target = x, target
        self.lengths = None if isinstance(x, np.ndarray) else np.array([len(row) for row in x])
        self.weight = weight if weight is None or np.ndim(weight[0]) else np.asarray(weight)
        self.per_step, self.shuffle = bool(per_step), bool(shuffle)
        self.rng = np.random.default_rng(rng)
        for name, rows in (("target", target), ("weight", self.weight)):
            if rows is not None and len(rows) != len(x):
                raise ValueError(f"{name}: expected {len(x)}, one for each sequence of x, got {len(rows)}")
        if len(x) == 0:
            raise ValueError("x: expected at least one sequence, got none")

    @property
    def size(self) -> int:
        """Number of sequences."""
        return len(self.x)

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        order = self._order()
        for start in range(0, self.size, self.batch_size):
            yield self._batch(order[start : start + self.batch_size])

    def _order(self) -> Array:
        if not self.shuffle or len(self) == 1:
            return np.arange(self.size)
        order = self.rng.permutation(self.size)
        if self.lengths is None:
            return order
        chunk, batches = 50 * self.batch_size, []
        for start in range(0, self.size, chunk):
            part = order[start : start + chunk]
            part = part[np.argsort(self.lengths[part], kind="stable")]
            batches += [part[i : i + self.batch_size] for i in range(0, len(part), self.batch_size)]
        last = batches.pop()  # the only one that may be smaller
        return np.concatenate([*(batches[i] for i in self.rng.permutation(len(batches))), last])

    def _batch(self, rows: Array) -> Batch:
        weight = None if self.weight is None else self._rows(self.weight, rows)
        if self.lengths is None:
            x, lengths = np.ascontiguousarray(self.x[rows].swapaxes(0, 1)), None
        else:
            x, lengths = pad([self.x[i] for i in rows])
        if not self.per_step:
            return Batch(x, np.asarray(self.target)[rows], lengths, weight)
        target = self._rows(self.target, rows)
        if weight is not None and weight.ndim > 1:  # pad has put zeros past the ends
            return Batch(x, target, lengths, weight)
        if lengths is not None or weight is not None:
            valid = np.ones(target.shape[:2]) if lengths is None else np.arange(len(x))[:, None] < lengths
            weight = valid.astype(float) if weight is None else valid * weight
        return Batch(x, target, lengths, weight)

    def _rows(self, values: Any, rows: Array) -> Array:
        """Values of these sequences, those at each step time-major."""
        if not self.per_step or np.ndim(values[0]) == 0:
            return np.asarray(values)[rows]
        return np.asarray(values)[rows].swapaxes(0, 1) if self.lengths is None else pad([values[i] for i in rows])[0]


class EarlyStopping:
    """A callback of `fit` that keeps the best parameters and stops when the score has not risen for a while.

    Parameters
    ----------
    score : callable
        Of the model; the higher the better.
    patience : int
        Epochs without a better score after which it stops.
    tol : float
        A score must exceed the best by more than this.
    name : str
        Under which the score goes into the history.
    """

    def __init__(
        self, score: Callable[[Any], float], patience: int = 10, tol: float = 0.0, name: str = "validation_score"
    ) -> None:
        self.score, self.patience, self.tol, self.name = score, _checks.integer("patience", patience, 1), tol, name
        self.best_score, self.best_epoch, self.best_params = -math.inf, 0, None

    def __call__(self, model: Any, record: dict[str, Any]) -> bool:
        """Score the model after an epoch; return whether to stop."""
        score = record[self.name] = float(self.score(model))
        better = score > self.best_score + self.tol
        if better or self.best_params is None:
            self.best_epoch, self.best_params = record["epoch"], model.flat_params.copy()
        if better:  # a NaN never is: any score beats it
            self.best_score = score
        return bool(record["epoch"] - self.best_epoch >= self.patience)

    def restore(self, model: Any) -> None:
        """Give the model the best parameters."""
        if self.best_params is not None:
            model.flat_params[:] = self.best_params


def fit(
    model: Any,
    batches: Any,
    optimiser: Optimiser,
    loss: Callable[..., tuple[float, Array]] = softmax_cross_entropy,
    *,
    epochs: int = 1,
    start: int = 0,
    schedule: str | Schedule = constant,
    grad_clip: float | None = None,
    ema: EMA | None = None,
    callbacks: Sequence[Callable[[Any, dict[str, Any]], Any]] = (),
    verbose: int = 0,
) -> list[dict[str, Any]]:
    """Train a module.

    Parameters
    ----------
    model : Module
        Anything with ``forward(x, lengths)`` that returns (output, tape) and ``backward(tape, dy)``; a `Sequential`.
    batches : iterable with a length
        Gone through once an epoch: `Batches`, or a list of tuples (x, target), (x, target, lengths) or
        (x, target, lengths, weight).
    optimiser : Optimiser
        Of this model. Its ``lr`` is the highest rate of the schedule; afterwards it is what it was.
    loss : callable
        Of (output, target), with ``weight=`` where the batch has weights; returns the value and the gradient.
    epochs : int
        The epoch to stop after, counted from the first.
    start : int
        Epochs that are done already: with the state of model, optimiser and generators as after them the run goes on
        to the bit.
    schedule : {"constant", "linear", "cosine", "one_cycle"} or callable
        Factor of the learning rate as a function of the progress from 0 to 1 over all epochs.
    grad_clip : float, optional
        Largest norm of all gradients.
    ema : EMA, optional
        Updated after each step.
    callbacks : sequence of callables
        Called after each epoch with the model and the epoch's record, to which they may add; a true result ends the
        training.
    verbose : int
        1: a line per epoch, and a progress bar where the output is a terminal.

    Returns
    -------
    history : list of dict
        Of each epoch: epoch (from 1), loss, lr (of its last step), seconds, sequences_per_second, and what callbacks
        added.

    Raises
    ------
    FloatingPointError
        The loss is no longer finite.
    """
    factor, top, history = schedules.schedule(schedule), optimiser.lr, []
    if len(batches) == 0:
        raise ValueError("batches: expected at least one batch, got none")
    try:
        for epoch in range(start, epochs):
            begin, total, count = time.perf_counter(), 0.0, 0
            with progress_bar(len(batches), f"epoch {epoch + 1}/{epochs}", shown=verbose > 0) as bar:
                for step, (x, target, *rest) in enumerate(batches):
                    lengths, weight = (*rest, None, None)[:2]
                    output, tape = model.forward(x) if lengths is None else model.forward(x, lengths)
                    value, gradient = loss(output, target) if weight is None else loss(output, target, weight=weight)
                    if not math.isfinite(value):
                        raise FloatingPointError(f"the loss is {value} in epoch {epoch + 1}: try a smaller "
                                                 "learning rate, or grad_clip")  # fmt: skip
                    model.zero_grad()
                    model.backward(tape, gradient, need_dx=False)
                    if grad_clip is not None:
                        clip_grad_norm([model], grad_clip)
                    optimiser.lr = top * factor((epoch + step / len(batches)) / epochs)
                    optimiser.step()
                    if ema is not None:
                        ema.update()
                    n = np.shape(x)[1]
                    total, count = total + value * n, count + n
                    bar.update(1, f"loss {total / count:.4f}, {count / (time.perf_counter() - begin):,.0f} sequences/s")
            seconds = time.perf_counter() - begin
            record = {"epoch": epoch + 1, "loss": total / count, "lr": optimiser.lr, "seconds": seconds,
                      "sequences_per_second": count / seconds}  # fmt: skip
            history.append(record)
            stop = any([callback(model, record) for callback in callbacks])
            if verbose:
                print(_line(record, epochs), flush=True)
            if stop:
                break
    finally:
        optimiser.lr = top
    return history


def _line(record: dict[str, Any], epochs: int) -> str:
    """What one epoch did."""
    extra = "".join(f", {name.replace('_', ' ')} {record[name]:.4f}" for name in record if name.endswith("score"))
    return (
        f"epoch {record['epoch']}/{epochs}: loss {record['loss']:.4f}{extra}, {record['seconds']:.1f} s, "
        f"{record['sequences_per_second']:,.0f} sequences/s"
    )
