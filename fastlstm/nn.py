"""What a training loop needs around a recurrent layer: Linear, two losses, two optimisers, gradient clipping.

Everything works on flat buffers, in place, in the type of the arrays it is given (float32 stays float32).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from ._parameters import Parameters

__all__ = ["SGD", "Adam", "Linear", "clip_grad_norm", "mse", "softmax_cross_entropy"]

_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
_BLOCK = 16384  # elements per pass of an optimiser: the block and its scratch stay in a core's own cache


class Linear:
    """A fully connected layer, ``y = x W^T + b``.

    Parameters
    ----------
    in_features, out_features : int
        Sizes of the last axis of input and output.
    bias : bool
        Whether to add ``b``.
    dtype : dtype
        float32 or float64.
    rng : int, numpy.random.Generator or None
        Source of the initial values, uniform within ``+-1/sqrt(in_features)`` as in PyTorch.

    Attributes
    ----------
    params, grads : dict of str to ndarray
        ``weight`` (out_features, in_features) and ``bias`` (out_features).
    flat_params, flat_grads : ndarray
        The same memory as one array each.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dtype: DTypeLike = np.float32,
        rng: int | np.random.Generator | None = None,
    ) -> None:
        self.in_features = _positive_int("in_features", in_features)
        self.out_features = _positive_int("out_features", out_features)
        self.dtype = np.dtype(dtype)
        if self.dtype not in _FLOATS:
            raise TypeError(f"dtype: expected float32 or float64, got {self.dtype}")
        shapes: dict[str, tuple[int, ...]] = {"weight": (self.out_features, self.in_features)}
        if bias:
            shapes["bias"] = (self.out_features,)
        self._params = Parameters(shapes, self.dtype)
        self._grads = Parameters(shapes, self.dtype)
        bound = 1 / math.sqrt(self.in_features)
        self.flat_params[:] = np.random.default_rng(rng).uniform(-bound, bound, self.flat_params.size)

    @property
    def params(self) -> dict[str, NDArray]:
        return dict(self._params.views)

    @property
    def grads(self) -> dict[str, NDArray]:
        return dict(self._grads.views)

    @property
    def flat_params(self) -> NDArray:
        return self._params.flat

    @property
    def flat_grads(self) -> NDArray:
        return self._grads.flat

    def __repr__(self) -> str:
        bias = "bias" in self.params
        return f"Linear({self.in_features}, {self.out_features}, bias={bias}, dtype={self.dtype})"

    def __call__(self, x: ArrayLike) -> NDArray:
        """Return y (..., out_features) for x (..., in_features)."""
        return self.forward(x)[0]

    def forward(self, x: ArrayLike) -> tuple[NDArray, NDArray]:
        """Compute the output and keep what the backward pass needs.

        Parameters
        ----------
        x : array_like, shape (..., in_features)

        Returns
        -------
        y : ndarray, shape (..., out_features)
        tape : ndarray
            For `backward`: x itself, not a copy, so leave it as it is until then.
        """
        x = _real("x", x, self.dtype)
        if x.ndim < 1 or x.shape[-1] != self.in_features:
            raise ValueError(f"x: expected shape (..., {self.in_features}), got {x.shape}")
        y = x @ self.params["weight"].T
        if "bias" in self.params:
            y += self.params["bias"]
        return y, x

    def backward(self, tape: NDArray, dy: ArrayLike) -> NDArray:
        """Add the parameters' gradients to ``grads`` and return the input's.

        Parameters
        ----------
        tape : ndarray
            From `forward`.
        dy : array_like, shape (..., out_features)
            Gradient of the loss with respect to y.

        Returns
        -------
        dx : ndarray, shape (..., in_features)
        """
        known = isinstance(tape, np.ndarray) and tape.dtype == self.dtype
        if not known or tape.shape[-1:] != (self.in_features,):
            raise TypeError(f"tape: expected the second result of forward, got {_describe(tape)}")
        dy = _real("dy", dy, self.dtype)
        shape = (*tape.shape[:-1], self.out_features)
        if dy.shape != shape:
            raise ValueError(f"dy: expected shape {shape}, got {dy.shape}")
        dy_rows = dy.reshape(-1, self.out_features)
        self.grads["weight"] += dy_rows.T @ tape.reshape(-1, self.in_features)
        if "bias" in self.grads:
            self.grads["bias"] += dy_rows.sum(axis=0)
        return dy @ self.params["weight"]

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        self.flat_grads.fill(0)

    def state_dict(self) -> dict[str, NDArray]:
        """Return copies of the parameters, by PyTorch's names."""
        return self._params.copy()

    def load_state_dict(self, d: Mapping[str, ArrayLike]) -> None:
        """Copy the parameters from ``d``; a wrong key or shape is a ValueError that changes nothing."""
        self._params.load(d, "load_state_dict")


def softmax_cross_entropy(logits: ArrayLike, labels: ArrayLike) -> tuple[float, NDArray]:
    """Mean cross-entropy of the softmax of ``logits``, and its gradient.

    ``loss = mean_n(log(sum_k exp(z_nk)) - z_n,label(n))``, ``dlogits = (softmax(z) - onehot(label)) / N``;
    the largest logit of each row is taken off first, so that no exponential overflows.

    Parameters
    ----------
    logits : array_like, shape (N, K)
        float32 or float64.
    labels : array_like of int, shape (N,)
        The right class of each row, 0 <= label < K.

    Returns
    -------
    loss : float
    dlogits : ndarray, shape (N, K)
    """
    z = _float("logits", logits)
    if z.ndim != 2 or 0 in z.shape:
        raise ValueError(f"logits: expected shape (N, K) with N, K >= 1, got {z.shape}")
    n, k = z.shape
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu":
        raise TypeError(f"labels: expected integers, got dtype {labels.dtype}")
    if labels.shape != (n,):
        raise ValueError(f"labels: expected shape ({n},), got {labels.shape}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= k:
        raise ValueError(f"labels: expected values 0..{k - 1}, got {low if low < 0 else high}")
    rows = np.arange(n)
    dlogits = z - z.max(axis=1, keepdims=True)
    picked = dlogits[rows, labels]
    np.exp(dlogits, out=dlogits)
    total = dlogits.sum(axis=1, keepdims=True)
    loss = float(np.mean(np.log(total[:, 0]) - picked, dtype=np.float64))
    dlogits /= total
    dlogits[rows, labels] -= 1
    dlogits /= n
    return loss, dlogits


def mse(pred: ArrayLike, target: ArrayLike) -> tuple[float, NDArray]:
    """Mean squared error over all elements, and its gradient ``2 (pred - target) / size``.

    Parameters
    ----------
    pred : array_like
        float32 or float64, any shape.
    target : array_like
        Real numbers of the same shape: nothing is broadcast.

    Returns
    -------
    loss : float
    dpred : ndarray, shape of pred
    """
    p = _float("pred", pred)
    t = _real("target", target, p.dtype)
    if t.shape != p.shape:
        raise ValueError(f"target: expected shape {p.shape}, as pred, got {t.shape}")
    if p.size == 0:
        raise ValueError(f"pred: expected at least one element, got shape {p.shape}")
    difference = np.subtract(p, t, out=np.empty_like(p))
    loss = float(np.mean(np.square(difference), dtype=np.float64))
    difference *= 2 / p.size
    return loss, difference


class SGD:
    """Stochastic gradient descent with momentum, by PyTorch's formula.

    ``v = momentum * v + g;  p = p - lr * v`` with v = 0 before the first step. (Sutskever et al. 2013 put the
    rate inside v instead; the two differ where the rate changes.)

    Parameters
    ----------
    modules : iterable
        Layers (anything with ``flat_params`` and ``flat_grads``), or pairs (flat_params, flat_grads).
    lr : float
        Learning rate, >= 0. It may be set again between steps.
    momentum : float
        0 <= momentum < 1.
    """

    def __init__(self, modules: Iterable[Any], lr: float = 1e-2, momentum: float = 0.0) -> None:
        self._buffers = _buffers(modules)
        self.lr = _number("lr", lr)
        self.momentum = _number("momentum", momentum, below_one=True)
        self._state = [(p, g, np.zeros_like(p)) for p, g in self._buffers]

    def step(self) -> None:
        """Update all parameters in place from the gradients as they are now."""
        lr = _number("lr", self.lr)
        for p, g, v, scratch in _blocks(self._state):
            v *= self.momentum
            v += g
            np.multiply(v, lr, out=scratch)
            p -= scratch

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        for _, g in self._buffers:
            g.fill(0)


class Adam:
    """Adam (Kingma and Ba 2015, algorithm 1, as PyTorch computes it).

    ``m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;
    p = p - lr / (1-b1^t) * m / (sqrt(v) / sqrt(1-b2^t) + eps)`` with t = 1 in the first step.

    Parameters
    ----------
    modules : iterable
        Layers (anything with ``flat_params`` and ``flat_grads``), or pairs (flat_params, flat_grads).
    lr : float
        Learning rate, >= 0. It may be set again between steps.
    betas : (float, float)
        Decay of the two averages, each in [0, 1).
    eps : float
        >= 0.
    """

    def __init__(
        self,
        modules: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self._buffers = _buffers(modules)
        self.lr = _number("lr", lr)
        try:
            b1, b2 = betas
        except (TypeError, ValueError):
            raise TypeError(f"betas: expected two numbers, got {betas!r}") from None
        self.betas = _number("betas[0]", b1, below_one=True), _number("betas[1]", b2, below_one=True)
        self.eps = _number("eps", eps)
        self.t = 0
        self._state = [(p, g, np.zeros_like(p), np.zeros_like(p)) for p, g in self._buffers]

    def step(self) -> None:
        """Update all parameters in place from the gradients as they are now."""
        lr = _number("lr", self.lr)
        self.t += 1
        b1, b2 = self.betas
        rate = lr / (1 - b1**self.t)
        root = math.sqrt(1 - b2**self.t)
        for p, g, m, v, scratch in _blocks(self._state):
            m *= b1
            np.multiply(g, 1 - b1, out=scratch)
            m += scratch
            v *= b2
            np.multiply(g, g, out=scratch)
            scratch *= 1 - b2
            v += scratch
            np.sqrt(v, out=scratch)
            scratch /= root
            scratch += self.eps
            np.divide(m, scratch, out=scratch)
            scratch *= rate
            p -= scratch

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        for _, g in self._buffers:
            g.fill(0)


def clip_grad_norm(modules: Iterable[Any], max_norm: float) -> float:
    """Scale all gradients together so that their common 2-norm is at most ``max_norm`` (Pascanu et al. 2013).

    As PyTorch: ``g *= min(1, max_norm / (norm + 1e-6))``. The norm is summed in float64.

    Parameters
    ----------
    modules : iterable
        Layers (anything with ``flat_params`` and ``flat_grads``), or pairs (flat_params, flat_grads).
    max_norm : float
        >= 0.

    Returns
    -------
    norm : float
        Before scaling.
    """
    grads = [g for _, g in _buffers(modules)]
    max_norm = _number("max_norm", max_norm, infinite=True)
    square = np.empty(_BLOCK)
    total = 0.0
    for g in grads:
        for start in range(0, g.size, _BLOCK):
            part = g[start : start + _BLOCK]
            total += float(np.multiply(part, part, out=square[: part.size], dtype=np.float64).sum())
    norm = math.sqrt(total)
    factor = max_norm / (norm + 1e-6)
    if not factor >= 1:  # a NaN must reach the gradients, as in PyTorch
        for g in grads:
            g *= factor
    return norm


def _blocks(state: Sequence[tuple[NDArray, ...]]) -> Iterator[list[NDArray]]:
    """Cut each tuple of equally long arrays into blocks, with a scratch block at the end."""
    for arrays in state:
        scratch = np.empty(min(_BLOCK, arrays[0].size), arrays[0].dtype)
        for start in range(0, arrays[0].size, _BLOCK):
            parts = [a[start : start + _BLOCK] for a in arrays]
            yield [*parts, scratch[: parts[0].size]]


def _buffers(modules: Iterable[Any]) -> list[tuple[NDArray, NDArray]]:
    if hasattr(modules, "flat_params") or not isinstance(modules, Iterable):
        raise TypeError(f"modules: expected a list of layers or of (flat_params, flat_grads), got {_describe(modules)}")
    pairs: list[tuple[NDArray, NDArray]] = []
    for i, module in enumerate(modules):
        where = f"modules[{i}]"
        if hasattr(module, "flat_params") and hasattr(module, "flat_grads"):
            pair = (module.flat_params, module.flat_grads)
        elif isinstance(module, tuple | list) and len(module) == 2:
            pair = tuple(module)
        else:
            raise TypeError(f"{where}: expected a layer or a pair (flat_params, flat_grads), got {_describe(module)}")
        for name, a in zip(("flat_params", "flat_grads"), pair, strict=True):
            if not isinstance(a, np.ndarray) or a.dtype not in _FLOATS:
                raise TypeError(f"{where}: {name}: expected a float32 or float64 array, got {_describe(a)}")
            if a.ndim != 1 or not a.flags.writeable:
                raise ValueError(f"{where}: {name}: expected a writeable 1-D array, got {_describe(a)}")
        p, g = pair
        if p.shape != g.shape or p.dtype != g.dtype:
            raise ValueError(f"{where}: flat_grads: expected {_describe(p)}, got {_describe(g)}")
        if any(np.may_share_memory(g, other) for _, other in pairs):
            raise ValueError(f"{where}: expected each layer once, got the same gradients twice")
        pairs.append(pair)
    if not pairs:
        raise ValueError("modules: expected at least one layer, got none")
    return pairs


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} array of shape {value.shape}"
    return f"{type(value).__name__} {value!r:.60}"


def _positive_int(name: str, value: Any) -> int:
    if isinstance(value, bool | np.bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: expected an integer, got {_describe(value)}")
    if value < 1:
        raise ValueError(f"{name}: expected an integer >= 1, got {value}")
    return int(value)


def _number(name: str, value: Any, *, below_one: bool = False, infinite: bool = False) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {_describe(value)}") from None
    if below_one and not 0 <= number < 1:
        raise ValueError(f"{name}: expected 0 <= {name} < 1, got {value}")
    if not number >= 0 or (number == math.inf and not infinite):
        raise ValueError(f"{name}: expected a {'' if infinite else 'finite '}number >= 0, got {value}")
    return number


def _float(name: str, value: ArrayLike) -> NDArray:
    array = np.asarray(value)
    if array.dtype not in _FLOATS:
        raise TypeError(f"{name}: expected float32 or float64, got dtype {array.dtype}")
    return array


def _real(name: str, value: ArrayLike, dtype: np.dtype) -> NDArray:
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name}: expected real numbers, got dtype {array.dtype}")
    return array.astype(dtype, copy=False)
