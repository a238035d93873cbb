"""Losses: each returns its value and its gradient with respect to the first argument."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from .. import _checks
from .._types import Array


def _weights(weight: ArrayLike | None, shape: tuple[int, ...], name: str = "weight") -> Array | None:
    """Weights of the leading axes of ``shape`` (or of all of them) as float64, broadcast against it; they sum to 1."""
    if weight is None:
        return None
    w = _checks.numbers_of(name, weight, np.float64)
    if w.shape != shape[: w.ndim]:
        raise ValueError(f"{name}: expected a shape that {shape} begins with, got {w.shape}")
    total = w.sum() * math.prod(shape[w.ndim :])
    if not (w >= 0).all() or not 0 < total < math.inf:
        raise ValueError(f"{name}: expected finite numbers >= 0, not all of them 0")
    return np.asarray(w / total).reshape(w.shape + (1,) * (len(shape) - w.ndim))


def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    class_weight: ArrayLike | None = None,
) -> tuple[float, Array]:
    """Mean cross-entropy of the softmax of ``logits``, and its gradient.

    ``loss = mean_n(log(sum_k exp(z_nk)) - z_n,label(n))``, ``dlogits = (softmax(z) - onehot(label)) / N``;
    the largest logit of each row is taken off first, so that no exponential overflows.

    Parameters
    ----------
    logits : array_like, shape (..., K)
        float32 or float64.
    labels : array_like of int, shape (...)
        The right class of each row, 0 <= label < K.
    weight : array_like, optional
        Of each row (shape (...), or that of the first axes): the mean is weighted. A mask is a weight of 0 and 1.
    ignore_index : int, optional
        Rows with this label have weight 0; the label may lie outside 0..K-1.
    label_smoothing : float
        0 <= e < 1: the target is 1 - e at the label and e/K everywhere (Szegedy et al. 2016).
    class_weight : array_like, shape (K,), optional
        Of each class, its share of target included, as in PyTorch; the mean is over the weights of the labels.

    Returns
    -------
    loss : float
    dlogits : ndarray, shape of logits
    """
    z = _checks.floats_of("logits", logits)
    if z.ndim < 1 or 0 in z.shape:
        raise ValueError(f"logits: expected shape (..., K) without an empty axis, got {z.shape}")
    k, lead = z.shape[-1], z.shape[:-1]
    labels = _checks.integers_of("labels", labels)
    if labels.shape != lead:
        raise ValueError(f"labels: expected shape {lead}, got {labels.shape}")
    smooth = _checks.fraction("label_smoothing", label_smoothing)
    weights = _weights(weight, lead)
    rows = np.ones(lead) if weights is None else np.broadcast_to(weights, lead)
    if ignore_index is not None:
        rows = rows * (labels != ignore_index)
        labels = np.where(labels == ignore_index, 0, labels)
    labels = _checks.indices("labels", labels, k)
    labels, rows = labels.reshape(-1), rows.reshape(-1)
    share = None
    if class_weight is not None:
        share = _checks.numbers_of("class_weight", class_weight, np.float64)
        if share.shape != (k,) or not (share >= 0).all() or not np.isfinite(share).all():
            raise ValueError(f"class_weight: expected {k} finite numbers >= 0, got shape {share.shape}")
    loss, dz = _cross_entropy(z.reshape(-1, k), labels, rows, smooth, share)
    return loss, dz.reshape(z.shape)


def _cross_entropy(z: Array, labels: Array, rows: Array, smooth: float, share: Array | None) -> tuple[float, Array]:
    n, k = z.shape
    index = np.arange(n)
    norm = rows if share is None else rows * share[labels]
    if not norm.sum() > 0:
        raise ValueError("labels: expected at least one row whose weight is not 0")
    rows, norm = rows / norm.sum(), norm / norm.sum()
    log_p = z - z.max(axis=1, keepdims=True)
    dz = np.exp(log_p)
    total = dz.sum(axis=1, keepdims=True)
    log_p -= np.log(total)
    dz /= total
    if not smooth:
        loss = -np.dot(norm, np.where(norm > 0, log_p[index, labels], 0))
        dz[index, labels] -= 1
        dz *= norm[:, None].astype(z.dtype)
        dz[norm == 0] = 0  # what a mask hides may be NaN
        return float(loss), dz
    # target q = onehot (1 - smooth) + smooth / K, each class times its share: -sum_k q_k log_p_k
    q = np.full((n, k), smooth / k)
    q[index, labels] += 1 - smooth
    q *= rows[:, None] if share is None else rows[:, None] * share
    loss = -np.sum(q * np.where(q > 0, log_p, 0))
    dz = (dz * q.sum(axis=1, keepdims=True) - q).astype(z.dtype)
    dz[rows == 0] = 0
    return float(loss), dz


def binary_cross_entropy(
    logits: ArrayLike, target: ArrayLike, *, weight: ArrayLike | None = None
) -> tuple[float, Array]:
    """Mean binary cross-entropy of the sigmoid of ``logits``, and its gradient ``(sigmoid(z) - target) / size``.

    ``loss = mean(max(z, 0) - z t + log(1 + exp(-|z|)))``, which overflows nowhere.

    Parameters
    ----------
    logits : array_like
        float32 or float64, any shape.
    target : array_like
        Of the same shape: 0, 1 or a probability between them.
    weight : array_like, optional
        Of each element, or of the first axes; the mean is weighted.

    Returns
    -------
    loss : float
    dlogits : ndarray, shape of logits
    """
    z, t = _pair("logits", logits, target)
    weights = _weights(weight, z.shape)
    seen = True if weights is None else weights > 0
    if (seen & ~((t >= 0) & (t <= 1))).any():
        raise ValueError("target: expected values from 0 to 1")
    small = np.exp(-abs(z))
    value = np.maximum(z, 0) - z * t + np.log1p(small)
    sigmoid = np.where(z >= 0, 1, small) / (1 + small)
    return _mean(value, sigmoid - t, weight)


def mse(pred: ArrayLike, target: ArrayLike, *, weight: ArrayLike | None = None) -> tuple[float, Array]:
    """Mean squared error over all elements, and its gradient ``2 (pred - target) / size``.

    Parameters
    ----------
    pred : array_like
        float32 or float64, any shape.
    target : array_like
        Real numbers of the same shape: nothing is broadcast.
    weight : array_like, optional
        Of each element, or of the first axes (a weight per sequence, say); the mean is weighted.

    Returns
    -------
    loss : float
    dpred : ndarray, shape of pred
    """
    p, t = _pair("pred", pred, target)
    d = p - t
    return _mean(np.square(d), 2 * d, weight)


def mae(pred: ArrayLike, target: ArrayLike, *, weight: ArrayLike | None = None) -> tuple[float, Array]:
    """Mean absolute error, and its gradient ``sign(pred - target) / size``, 0 where they are equal.

    Parameters and results are those of `mse`.
    """
    p, t = _pair("pred", pred, target)
    d = p - t
    return _mean(abs(d), np.sign(d), weight)


def huber(
    pred: ArrayLike, target: ArrayLike, delta: float = 1.0, *, weight: ArrayLike | None = None
) -> tuple[float, Array]:
    """Mean Huber loss (1964): ``d^2 / 2`` where ``|d| <= delta``, else ``delta (|d| - delta / 2)``.

    Parameters and results are those of `mse`; ``delta`` > 0.
    """
    p, t = _pair("pred", pred, target)
    delta = _checks.number("delta", delta, open_low=True)  # no NumPy scalar: that would make float64 of float32
    d = p - t
    slope = np.clip(d, -delta, delta)
    return _mean(slope * (d - slope / 2), slope, weight)


def quantile(
    pred: ArrayLike, target: ArrayLike, quantiles: ArrayLike, *, weight: ArrayLike | None = None
) -> tuple[float, Array]:
    """Mean pinball loss (Koenker and Bassett 1978), which is least where ``pred`` are the quantiles of the target.

    ``q (t - p)`` where the target lies above, ``(1 - q) (p - t)`` where it lies below.

    Parameters
    ----------
    pred : array_like, shape (..., Q)
        float32 or float64; one prediction for each quantile.
    target : array_like, shape (...)
    quantiles : sequence of Q floats
        Each between 0 and 1.
    weight : array_like, optional
        Of each target, or of the first axes; the mean is weighted.

    Returns
    -------
    loss : float
        The mean over targets and quantiles.
    dpred : ndarray, shape (..., Q)
    """
    p = _checks.floats_of("pred", pred)
    q = _checks.numbers_of("quantiles", quantiles, p.dtype)
    if q.ndim != 1 or not ((q > 0) & (q < 1)).all():
        raise ValueError(f"quantiles: expected numbers between 0 and 1, got {quantiles!r:.60}")
    if p.ndim < 1 or p.shape[-1] != q.size or p.size == 0:
        raise ValueError(f"pred: expected shape (..., {q.size}), one for each quantile, got {p.shape}")
    t = _checks.numbers_of("target", target, p.dtype)
    if t.shape != p.shape[:-1]:
        raise ValueError(f"target: expected shape {p.shape[:-1]}, got {t.shape}")
    d = t[..., None] - p
    slope = np.where(d > 0, -q, np.where(d < 0, 1 - q, 0))
    return _mean(-slope * d, slope, weight)


def _pair(name: str, pred: ArrayLike, target: ArrayLike) -> tuple[Array, Array]:
    p = _checks.floats_of(name, pred)
    t = _checks.numbers_of("target", target, p.dtype)
    if t.shape != p.shape:
        raise ValueError(f"target: expected shape {p.shape}, as {name}, got {t.shape}")
    if p.size == 0:
        raise ValueError(f"{name}: expected at least one element, got shape {p.shape}")
    return p, t


def _mean(value: Array, slope: Array, weight: ArrayLike | None) -> tuple[float, Array]:
    """The (weighted) mean of elementwise losses and slopes, summed in float64."""
    w = _weights(weight, value.shape)
    if w is None:
        return float(np.mean(value, dtype=np.float64)), np.asarray(slope / value.dtype.type(value.size))
    value = np.where(w > 0, value, 0)  # what a mask hides may be anything
    slope = np.where(w > 0, slope, 0)
    return float((value * w).sum()), (slope * w).astype(value.dtype)
