"""SGD, RMSprop, Adam and AdamW on flat buffers, gradient clipping, and a moving average of the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .. import _checks
from .._habits import hinted
from .._types import Array
from ._buffers import buffers

BLOCK = 16384  # elements per pass of an optimiser: the block and its scratch stay in a core's own cache


class _Holder:
    """Holds modules and, for each, arrays of the size of its parameters that `state_dict` keeps.

    It holds the modules, not their buffers: a copy of (layers, optimiser) finds the buffers of the copied layers.
    Copied or unpickled alone it brings copies of its layers along, and moves those, not yours.
    """

    _slots: tuple[str, ...] = ()  # names of the arrays
    _settings: tuple[str, ...] = ()  # names of the numbers that belong to the state

    def __init__(self, modules: Iterable[Any]) -> None:
        if isinstance(modules, Iterable) and not hasattr(modules, "flat_params"):
            modules = list(modules)
        pairs = buffers(modules)
        self.modules: list[Any] = list(modules)
        self._state = {name: [np.zeros_like(p) for p, _ in pairs] for name in self._slots}

    def _arrays(self) -> Iterator[tuple[Array, ...]]:
        """(flat_params, flat_grads, arrays of the state...) of each module, as they are now."""
        pairs = buffers(self.modules)
        for i, pair in enumerate(pairs):
            state = tuple(self._state[name][i] for name in self._slots)
            if any(a.shape != pair[0].shape or a.dtype != pair[0].dtype for a in state):
                before, now = _checks.describe(state[0]), _checks.describe(pair[0])
                raise ValueError(f"modules[{i}]: expected {before} as before, got {now}")
            yield (*pair, *state)

    @hinted
    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        for _, g in buffers(self.modules):
            g.fill(0)

    def state_dict(self) -> dict[str, Array]:
        """Copies of all that a later run needs to go on to the bit; `numpy.savez` takes it as it is."""
        state = {name: np.array(getattr(self, name)) for name in self._settings}
        for name, arrays in self._state.items():
            state |= {f"{name}.{i}": a.copy() for i, a in enumerate(arrays)}
        return state

    def load_state_dict(self, d: Mapping[str, ArrayLike]) -> None:
        """Take a state that `state_dict` made; a wrong key, type or shape is an error that changes nothing."""
        what = "load_state_dict"
        if not isinstance(d, Mapping):
            raise TypeError(f"{what}: expected a mapping of names to arrays, got {_checks.describe(d)}")
        own = self.state_dict()
        if own.keys() != set(d):
            raise ValueError(f"{what}: missing keys {sorted(own.keys() - set(d))}, "
                             f"unexpected keys {sorted(set(d) - own.keys())}")  # fmt: skip
        values = {name: _checks.numbers_of(f"{what}: {name}", d[name], a.dtype) for name, a in own.items()}
        for name, a in own.items():
            if values[name].shape != a.shape:
                raise ValueError(f"{what}: {name}: expected shape {a.shape}, got {values[name].shape}")
        for name in self._settings:
            setattr(self, name, values[name].tolist() if own[name].ndim == 0 else tuple(values[name].tolist()))
        for name, arrays in self._state.items():
            for i, a in enumerate(arrays):
                a[:] = values[f"{name}.{i}"]


class Optimiser(_Holder):
    """What the optimisers share: the layers, a learning rate, a step over blocks."""

    def __init__(self, modules: Iterable[Any], lr: float) -> None:
        super().__init__(modules)
        self.lr = _checks.number("lr", lr)

    def step(self) -> None:
        """Update all parameters in place from the gradients as they are now."""
        raise NotImplementedError

    def _step(self, update: Callable[..., None], *constants: float) -> None:
        """Call update block by block, with p, g, the arrays of the state, a scratch block, then the constants."""
        for arrays in list(self._arrays()):
            scratch = np.empty(min(BLOCK, arrays[0].size), arrays[0].dtype)
            for start in range(0, arrays[0].size, BLOCK):
                parts = [a[start : start + BLOCK] for a in arrays]
                update(*parts, scratch[: parts[0].size], *constants)


class SGD(Optimiser):
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
    nesterov : bool
        Step along ``g + momentum * v`` instead of v.
    weight_decay : float
        Adds ``weight_decay * p`` to g.
    """

    _slots = ("v",)
    _settings: tuple[str, ...] = ("lr", "momentum", "nesterov", "weight_decay")

    def __init__(
        self,
        modules: Iterable[Any],
        lr: float = 1e-2,
        momentum: float = 0.0,
        *,
        nesterov: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(modules, lr)
        self.momentum = _checks.fraction("momentum", momentum)
        self.nesterov = bool(nesterov)
        self.weight_decay = _checks.number("weight_decay", weight_decay)

    def step(self) -> None:
        """Update all parameters in place from the gradients as they are now."""
        self._step(_sgd, _checks.number("lr", self.lr), self.momentum, self.weight_decay, self.nesterov)


def _sgd(
    p: Array, g: Array, v: Array, scratch: Array, lr: float, momentum: float, weight_decay: float, nesterov: bool
) -> None:
    v *= momentum
    v += g
    if weight_decay:
        v += np.multiply(p, weight_decay, out=scratch)
    if nesterov:
        np.multiply(v, momentum, out=scratch)
        scratch += g
        if weight_decay:
            scratch += weight_decay * p
        scratch *= lr
    else:
        np.multiply(v, lr, out=scratch)
    p -= scratch


class RMSprop(Optimiser):
    """RMSprop (Hinton 2012), as PyTorch computes it.

    ``s = alpha s + (1-alpha) g^2;  v = momentum v + g / (sqrt(s) + eps);  p = p - lr v``.

    Parameters
    ----------
    modules : iterable
        As for `SGD`.
    lr : float
        Learning rate, >= 0. It may be set again between steps.
    alpha : float
        Decay of the mean square, in [0, 1).
    eps : float
        >= 0.
    momentum : float
        0 <= momentum < 1.
    """

    _slots = ("s", "v")
    _settings: tuple[str, ...] = ("lr", "alpha", "eps", "momentum")

    def __init__(
        self,
        modules: Iterable[Any],
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        momentum: float = 0.0,
    ) -> None:
        super().__init__(modules, lr)
        self.alpha = _checks.fraction("alpha", alpha)
        self.eps = _checks.number("eps", eps)
        self.momentum = _checks.fraction("momentum", momentum)

    def step(self) -> None:
        """Update all parameters in place from the gradients as they are now."""
        self._step(_rmsprop, _checks.number("lr", self.lr), self.alpha, self.eps, self.momentum)


def _rmsprop(
    p: Array, g: Array, s: Array, v: Array, scratch: Array, lr: float, alpha: float, eps: float, momentum: float
) -> None:
    s *= alpha
    np.multiply(g, g, out=scratch)
    scratch *= 1 - alpha
    s += scratch
    np.sqrt(s, out=scratch)
    scratch += eps
    np.divide(g, scratch, out=scratch)
    v *= momentum
    v += scratch
    np.multiply(v, lr, out=scratch)
    p -= scratch


class Adam(Optimiser):
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

    _slots = ("m", "v")
    _settings: tuple[str, ...] = ("lr", "betas", "eps", "t")
    weight_decay = 0.0  # AdamW has one

    def __init__(
        self,
        modules: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(modules, lr)
        try:
            b1, b2 = betas
        except (TypeError, ValueError):
            raise TypeError(f"betas: expected two numbers, got {betas!r}") from None
        self.betas = _checks.fraction("betas[0]", b1), _checks.fraction("betas[1]", b2)
        self.eps = _checks.number("eps", eps)
        self.t = 0

    def step(self) -> None:
        """Update all parameters in place from the gradients as they are now."""
        lr, (b1, b2), t = _checks.number("lr", self.lr), self.betas, self.t + 1
        rate, root = lr / (1 - b1**t), math.sqrt(1 - b2**t)
        self._step(_adam, b1, b2, rate, root, self.eps, 1 - lr * self.weight_decay)
        self.t = t


def _adam(
    p: Array, g: Array, m: Array, v: Array, scratch: Array, b1: float, b2: float, rate: float, root: float, eps: float,
    shrink: float,
) -> None:  # fmt: skip
    if shrink != 1:
        p *= shrink
    m *= b1
    np.multiply(g, 1 - b1, out=scratch)
    m += scratch
    v *= b2
    np.multiply(g, g, out=scratch)
    scratch *= 1 - b2
    v += scratch
    np.sqrt(v, out=scratch)
    scratch /= root
    scratch += eps
    np.divide(m, scratch, out=scratch)
    scratch *= rate
    p -= scratch


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019): before each step ``p = p - lr weight_decay p``.

    Parameters
    ----------
    modules, lr, betas, eps
        As for `Adam`.
    weight_decay : float
        >= 0. It acts on all parameters, biases too, as PyTorch's default does.
    """

    _settings: tuple[str, ...] = (*Adam._settings, "weight_decay")

    def __init__(
        self,
        modules: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(modules, lr, betas, eps)
        self.weight_decay = _checks.number("weight_decay", weight_decay)


class EMA(_Holder):
    """Exponential moving average of parameters (Polyak and Juditsky 1992): ``a = d a + (1 - d) p``.

    d is ``decay``, but at most ``(1 + t) / (10 + t)`` after t updates, so that the first values do not weigh for long.

    Parameters
    ----------
    modules : iterable
        Layers (anything with ``flat_params`` and ``flat_grads``), or pairs (flat_params, flat_grads).
    decay : float
        0 <= decay < 1.
    """

    _slots = ("average",)
    _settings: tuple[str, ...] = ("decay", "t")

    def __init__(self, modules: Iterable[Any], decay: float = 0.999) -> None:
        super().__init__(modules)
        self.decay = _checks.fraction("decay", decay)
        self.t = 0
        for p, _, average in self._arrays():
            average[:] = p

    def update(self) -> None:
        """Take the parameters as they are now into the average; call it after each step of the optimiser."""
        self.t += 1
        d = min(self.decay, (1 + self.t) / (10 + self.t))
        for p, _, average in self._arrays():
            average += (1 - d) * (p - average)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """With the averages as the parameters of the layers; afterwards they are what they were."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for p, _, average in self._arrays():
            kept = p.copy()
            p[:] = average
            average[:] = kept

    def copy_to_modules(self) -> None:
        """Make the averages the parameters of the layers, for good."""
        for p, _, average in self._arrays():
            p[:] = average


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
    grads = [g for _, g in buffers(modules)]
    max_norm = _checks.limit("max_norm", max_norm)
    norm = _norm(grads)
    factor = max_norm / (norm + 1e-6)
    if not factor >= 1:  # a NaN must reach the gradients, as in PyTorch
        for g in grads:
            g *= factor
    return norm


def _norm(grads: Sequence[Array]) -> float:
    square = np.empty(BLOCK)
    total = 0.0
    for g in grads:
        for start in range(0, g.size, BLOCK):
            part = g[start : start + BLOCK]
            total += float(np.multiply(part, part, out=square[: part.size], dtype=np.float64).sum())
    return math.sqrt(total)


def clip_grad_value(modules: Iterable[Any], max_value: float) -> None:
    """Clip each element of the gradients to ``+-max_value``, >= 0. Modules are as for `clip_grad_norm`."""
    grads = [g for _, g in buffers(modules)]
    max_value = _checks.limit("max_value", max_value)
    for g in grads:
        np.clip(g, -max_value, max_value, out=g)
