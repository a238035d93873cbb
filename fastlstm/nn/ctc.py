"""Connectionist temporal classification: the loss of a label sequence whose alignment with the steps is unknown."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from .. import _checks
from .._types import Array


def ctc(
    logits: ArrayLike, labels: Sequence[ArrayLike], lengths: ArrayLike | None = None, *, blank: int = 0
) -> tuple[float, Array]:
    """CTC loss (Graves et al. 2006) of the softmax of ``logits``, and its gradient.

    Minus the log-probability of all paths that become the labels when repetitions are merged and blanks dropped, each
    sequence's divided by its number of labels (at least 1), averaged over the batch, as in PyTorch. Sums of
    probabilities are kept as logarithms, in float64.

    Parameters
    ----------
    logits : array_like, shape (T, N, K)
        float32 or float64.
    labels : sequence of N array_like of int
        The labels of each sequence, 0..K-1 without ``blank``; may be empty.
    lengths : array_like of int, shape (N,), optional
        Valid steps of each sequence; what stands past them is not read and has gradient 0.
    blank : int
        The class that stands for no label.

    Returns
    -------
    loss : float
    dlogits : ndarray, shape (T, N, K)

    Raises
    ------
    ValueError
        Wrong shapes or values, or a sequence too short for its labels: it needs a step for each, and one more between
        two that are equal.
    """
    z = _checks.floats_of("logits", logits)
    if z.ndim != 3 or 0 in z.shape:
        raise ValueError(f"logits: expected shape (T, N, K) without an empty axis, got {z.shape}")
    T, N, K = z.shape
    lengths = np.full(N, T) if lengths is None else _checks.integers_of("lengths", lengths)
    if lengths.shape != (N,) or lengths.min() < 1 or lengths.max() > T:
        raise ValueError(f"lengths: expected {N} integers from 1 to {T}, got shape {lengths.shape}")
    blank = _checks.integer("blank", blank, 0, K - 1)
    path, states, counts = _paths(labels, lengths, K, blank)
    valid = np.arange(T)[:, None] < lengths
    z64 = np.where(valid[:, :, None], z, 0).astype(np.float64)
    log_p = z64 - z64.max(axis=2, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=2, keepdims=True))
    emit = np.take_along_axis(log_p, np.broadcast_to(path, (T, *path.shape)), axis=2)  # (T, N, S)
    emit[:, np.arange(path.shape[1]) >= states[:, None]] = -np.inf

    # a state may be reached from the one before the last, if it is no blank and another label
    skip = np.zeros(path.shape, bool)
    skip[:, 2:] = (path[:, 2:] != blank) & (path[:, 2:] != path[:, :-2])
    alpha = _forward(emit, skip)
    rows, last = np.arange(N), lengths - 1
    end = np.logaddexp(alpha[last, rows, states - 1], np.where(states > 1, alpha[last, rows, states - 2], -np.inf))
    beta = _backward(emit, skip, states, last)
    posterior = np.exp(alpha + beta - np.where(emit > -np.inf, emit, 0) - end[:, None])  # both hold this step's output

    scale = 1 / (np.maximum(counts, 1) * N)
    dz = np.exp(log_p)
    for s in range(path.shape[1]):
        dz[:, rows, path[:, s]] -= posterior[:, :, s]
    dz *= np.where(valid, scale, 0)[:, :, None]
    return float(-np.sum(end * scale)), dz.astype(z.dtype)


def _paths(labels: Sequence[ArrayLike], lengths: Array, K: int, blank: int) -> tuple[Array, Array, Array]:
    """Labels with blanks around them (N, S), the number of states and of labels of each sequence."""
    if len(labels) != len(lengths):
        raise ValueError(f"labels: expected {len(lengths)} sequences, got {len(labels)}")
    rows = [_checks.indices(f"labels[{n}]", row, K) for n, row in enumerate(labels)]
    for n, row in enumerate(rows):
        if row.ndim != 1:
            raise ValueError(f"labels[{n}]: expected one axis, got shape {row.shape}")
        if (row == blank).any():
            raise ValueError(f"labels[{n}]: expected labels other than blank = {blank}")
        least = len(row) + int((row[1:] == row[:-1]).sum())
        if least > lengths[n]:
            raise ValueError(f"labels[{n}]: needs at least {least} steps, the sequence has {lengths[n]}")
    counts = np.array([len(row) for row in rows])
    path = np.full((len(rows), 2 * counts.max() + 1), blank)
    for n, row in enumerate(rows):
        path[n, 1 : 2 * len(row) : 2] = row
    return path, 2 * counts + 1, counts


def _forward(emit: Array, skip: Array) -> Array:
    """alpha[t, n, s]: log-probability of all beginnings that are in state s at step t, this step's output included."""
    alpha = np.full_like(emit, -np.inf)
    alpha[0, :, :2] = emit[0, :, :2]
    for t in range(1, len(emit)):
        before = alpha[t - 1].copy()
        before[:, 1:] = np.logaddexp(before[:, 1:], alpha[t - 1, :, :-1])
        before[:, 2:] = np.logaddexp(before[:, 2:], np.where(skip[:, 2:], alpha[t - 1, :, :-2], -np.inf))
        alpha[t] = before + emit[t]
    return alpha


def _backward(emit: Array, skip: Array, states: Array, last: Array) -> Array:
    """beta[t, n, s]: log-probability of all ends from state s at step t, this step's output included."""
    T, N, S = emit.shape
    beta = np.full_like(emit, -np.inf)
    final = (np.arange(S) == states[:, None] - 1) | (np.arange(S) == states[:, None] - 2)
    for t in reversed(range(T)):
        if t + 1 < T:
            after = beta[t + 1].copy()
            after[:, :-1] = np.logaddexp(after[:, :-1], beta[t + 1, :, 1:])
            after[:, :-2] = np.logaddexp(after[:, :-2], np.where(skip[:, 2:], beta[t + 1, :, 2:], -np.inf))
            beta[t] = after + emit[t]
        beta[t] = np.where((last == t)[:, None] & final, emit[t], beta[t])
    return beta
