"""A gradient check: backward's gradients against central differences of forward, along random directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _checks

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ._types import Array

__all__ = ["gradcheck", "GradCheck", "GradientError"]


class GradientError(AssertionError):
    """A gradient that differs from the central difference.

    Attributes
    ----------
    quantity : str
        What the gradient is of: a parameter's name, "x", "h_0" or another state.
    expected : float or tuple
        The directional derivative as a central difference (or the expected shape).
    found : float or tuple
        The directional derivative from backward's gradient (or the shape found).
    """

    def __init__(self, message: str, quantity: str, expected: Any, found: Any) -> None:
        super().__init__(message)
        self.quantity, self.expected, self.found = quantity, expected, found


class GradCheck:
    """The outcome of a passed check.

    Attributes
    ----------
    errors : dict
        Relative error by quantity: every parameter's name, "x", and of each state, "h_0", "c_0", ...
    expected, found : dict
        The directional derivatives behind it: by central difference, and from backward's gradient.
    """

    def __init__(self) -> None:
        self.errors: dict[str, float] = {}
        self.expected: dict[str, float] = {}
        self.found: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"GradCheck(max_error={self.max_error:.3g}, errors={self.errors})"

    @property
    def max_error(self) -> float:
        """The largest relative error of all quantities."""
        return max(self.errors.values(), default=0.0)


def gradcheck(
    layer: Any, x: ArrayLike, state: Any = None, lengths: ArrayLike | None = None, *, eps: float = 1e-6,
    tol: float = 1e-6, rng: int | np.random.Generator | None = 0,
) -> GradCheck:  # fmt: skip
    """Check a float64 layer's backward against central differences of its forward.

    With random dy and dstate, the loss is ``sum(dy * y) + sum(dstate * state)``. For each parameter, x and
    each initial state, its derivative along one random direction v is compared with
    ``(loss(p + eps*v) - loss(p - eps*v)) / (2*eps)``: two forward passes a quantity, whatever its size.

    Parameters
    ----------
    layer : object
        A layer of this package, or anything with its ``forward(x, state, lengths) -> y, state, tape``,
        ``backward(tape, dy, dstate) -> dx, dstate0``, ``params``, ``grads`` (dicts of arrays) and
        ``zero_grad()``.
        Dropout and zoneout draw the same masks in every pass, if they come from ``layer.rng``.
    x : array (T,N,D), (N,T,D) with batch_first, or (T,D)
    state : (h, c), or h alone, or None for zeros
        The gradient at the initial state is checked in either case.
    lengths : integers (N,), or None
    eps : float
        The step along the direction, whose elements are standard normal.
    tol : float
        The largest relative error allowed, after rounding error (about 1e-16 of the outputs, divided by eps).
    rng : int or numpy.random.Generator
        For dy, dstate and the directions.

    Returns
    -------
    GradCheck
        The relative error of every quantity; ``max_error`` is the largest.

    Raises
    ------
    GradientError
        (an AssertionError) naming the quantity with the largest error, what was expected and what was found.
    TypeError
        If the layer is not float64 or lacks the methods above.
    ValueError
        If eps or tol is not a positive number; and whatever the layer raises for x, state and lengths.

    Notes
    -----
    Parameters, gradients and the state of ``layer.rng`` are afterwards what they were, to the bit, also after
    an error. Meanwhile they change: no other thread may use the layer. Piecewise activations (relu,
    hard_tanh, hard_sigmoid) have kinks, across which a difference is no derivative: a failure there may go
    away with another `rng` or a smaller `eps`.
    """
    _check_arguments(layer, eps, tol)
    x = _checks.numbers_of("x", x, np.float64)
    rng = np.random.default_rng(rng)
    as_tuple = isinstance(state, (tuple, list))
    start = None if state is None else [_checks.numbers_of("state", s, np.float64) for s in _listed(state)]
    result = GradCheck()

    with _left_as_found(layer) as rewind:

        def run(x: Array, start: list[Array] | None) -> tuple[Array, Any, Any]:
            rewind()
            y, end, tape = layer.forward(x, None if start is None else _like(as_tuple, start), lengths)
            return y, end, tape

        y, end, tape = run(x, start)
        as_tuple = isinstance(end, (tuple, list))
        if start is None:  # a normaliser of 0 is a corner, where an sLSTM begins: differences would step over it
            start = [np.full(a.shape, float(i == 2)) for i, a in enumerate(_listed(end))]
            y, end, tape = run(x, start)
        outputs = [y, *_listed(end)]
        dy, *dend = weights = [rng.standard_normal(a.shape) for a in outputs]
        layer.zero_grad()
        dx, dstart = layer.backward(tape, dy, _like(as_tuple, dend))
        inputs = dict(layer.params) | {"x": x} | _named(start)
        gradients = {name: np.array(g) for name, g in layer.grads.items()}
        gradients |= {"x": dx} | _named(_listed(dstart))

        # rounding error of the differences below: some units in the last place of every output
        noise = 16 * np.finfo(float).eps / eps * _norm(w * a for w, a in zip(weights, outputs, strict=True))
        for name, p in inputs.items():
            g = gradients.get(name)
            if g is None or g.shape != p.shape:
                found = None if g is None else g.shape
                message = f"gradcheck: the gradient of {name}: expected shape {p.shape}, found {found}"
                raise GradientError(message, name, p.shape, found)
            v = rng.standard_normal(p.shape)
            ends = []
            for step in (eps, -eps):
                moved = p + step * v
                if name in layer.params:
                    kept, p[...] = p.copy(), moved
                    y, end, _ = run(x, start)
                    p[...] = kept
                else:
                    values = inputs | {name: moved}
                    y, end, _ = run(values["x"], [values[s] for s in _named(start)])
                ends.append([y, *_listed(end)])
            expected = sum(np.sum(w * (a - b)) for w, a, b in zip(weights, *ends, strict=True)) / (2 * eps)
            found = np.sum(g * v)
            # the norm is what |found| is on average over all directions: a chance zero of the sum is no scale
            scale = np.max([_norm([g * v]), abs(expected), abs(found), np.finfo(float).tiny])
            result.errors[name] = float(np.maximum(abs(found - expected) - noise, 0) / scale)
            result.expected[name], result.found[name] = float(expected), float(found)

    _raise_if_wrong(result, tol)
    return result


def _raise_if_wrong(result: GradCheck, tol: float) -> None:
    wrong = [name for name, error in result.errors.items() if not error <= tol]
    if not wrong:
        return
    worst = max(wrong, key=lambda name: np.nan_to_num(result.errors[name], nan=np.inf))
    expected, found = result.expected[worst], result.found[worst]
    others = ", ".join(name for name in wrong if name != worst)
    raise GradientError(
        f"gradcheck: the gradient of {worst}, along a random direction: expected {expected:.12g} "
        f"(central difference), found {found:.12g}, error {result.errors[worst]:.2g} > tol {tol:g}"
        + (f"; also wrong: {others}" if others else ""),
        worst,
        expected,
        found,
    )


def _check_arguments(layer: Any, eps: float, tol: float) -> None:
    for name in ("forward", "backward", "params", "grads", "zero_grad"):
        if not hasattr(layer, name):
            raise TypeError(f"gradcheck: layer: expected a layer with .{name}, got {type(layer).__name__}")
    for name, p in layer.params.items():
        if not p.flags.writeable:
            raise ValueError(f"gradcheck: layer: {name} is read-only; of a frozen layer call unfreeze() first")
        if p.dtype != np.float64:
            raise TypeError(
                f"gradcheck: layer: expected dtype float64 (differences need its precision), "
                f"but {name} is {p.dtype}; make the layer with dtype=np.float64"
            )
    for name, value in (("eps", eps), ("tol", tol)):
        _checks.number(name, value, open_low=True)


def _listed(state: Any) -> list[Any]:
    return list(state) if isinstance(state, (tuple, list)) else [state]


def _like(as_tuple: bool, arrays: list[Array]) -> Any:
    return tuple(arrays) if as_tuple else arrays[0]


def _named(state: Iterable[Array]) -> dict[str, Array]:
    return dict(zip(("h_0", "c_0", "n_0", "m_0"), state, strict=False))


def _norm(arrays: Iterable[Array]) -> Any:
    return np.sqrt(sum(np.sum(np.square(a)) for a in arrays))


@contextmanager
def _left_as_found(layer: Any) -> Iterator[Callable[[], None]]:
    """Give back params, grads and generator as they were; yields a function that rewinds the generator."""
    saved = [(a, a.copy()) for d in (layer.params, layer.grads) for a in d.values()]
    bits = getattr(getattr(layer, "rng", None), "bit_generator", None)
    before = None if bits is None else bits.state

    def repeat() -> None:
        if bits is not None:
            bits.state = before

    try:
        yield repeat
    finally:
        repeat()
        for a, values in saved:
            a[...] = values
