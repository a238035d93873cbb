"""A layer's two passes as pure functions of tensors.

What a layer is comes as text, what dropout draws comes from a seed, and what the backward pass needs of the forward
pass (gates, cells, the outputs between layers) is one more tensor, the reserve. So the operators of `_ops` keep no
state. x is time-major, or the rows of a PackedSequence with its batch sizes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import engine, layers, threads
from .._batch import Batch
from ..tape import Tape

if TYPE_CHECKING:
    from .._types import Array

DTYPES = {torch.float32: np.dtype(np.float32), torch.float64: np.dtype(np.float64)}


class Steps(NamedTuple):
    """Which steps of a batch are valid, and how they stand in x; see `fastlstm.LSTM.forward`."""

    lengths: Tensor | None = None
    mask: Tensor | None = None
    resets: Tensor | None = None
    batch_sizes: Tensor | None = None  # of a PackedSequence; then the others are None

    @property
    def scattered(self) -> bool:
        return not (self.lengths is None and self.mask is None and self.resets is None)


WHOLE = Steps()  # all of them


class _Over:
    """A layer over arrays that a call brings. rng None: masks stand at their expectation, in training too."""

    def _draw_kept(self, shape: tuple[int, ...], p: float) -> Array | None:
        layer: Any = self
        if layer.rng is None and p:
            return np.broadcast_to(np.full(shape[1], p, layer.dtype), shape)
        kept: Array | None = super()._draw_kept(shape, p)  # type: ignore[misc]  # of the layer that comes behind
        return kept

    @staticmethod
    def _threads() -> int:
        """No more than torch uses: one in a DataLoader's workers, and what `torch.set_num_threads` says."""
        return min(threads.threads_of_call(), torch.get_num_threads())


_KINDS = {name: type(name, (_Over, getattr(layers, name)), {}) for name in ("LSTM", "GRU", "RNN")}


class _Arrays(NamedTuple):
    """What a layer reads of its parameters or gradients, where `Parameters` would own the memory."""

    views: dict[str, np.ndarray] | None
    flat: np.ndarray

    def fingerprint(self, rows: int) -> int:
        return 0  # autograd knows the parameters' versions


@lru_cache(maxsize=256)
def layer_of(config: str, dtype: torch.dtype) -> Any:
    """The layer that a text describes, without arrays of its own. config: JSON, the class's name and its arguments."""
    options = json.loads(config)
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    layer = _KINDS[options.pop("kind")](**options, init="zeros", dtype=DTYPES[dtype])
    places, begin = [], 0  # of the parameters, side by side
    for name, shape in layer._shapes():
        end = begin + math.prod(shape)
        places.append((name, begin, end, shape))
        begin = end
    layer._spots = places
    layer._state_sizes = layer.num_layers * layer._dirs, layer._width, None
    if len(layer._descriptor.states) > 1:  # cells beside h
        layer._state_sizes = *layer._state_sizes[:2], layer.hidden_size
    # What a tape asks for a row, see `reserve_size`; without and with a mask of recurrent dropout.
    P, H, runs = layer._width, layer.hidden_size, layer.num_layers * layer._dirs
    part = [len(layer._descriptor.columns) * H]
    part += [H] * bool(layer._state_sizes[2]) + [H] * bool(layer.proj_size)
    between = [layer._dirs * P] * (layer.num_layers - 1)
    layer._reserve = part * runs + between, (part + [P] * bool(layer.recurrent_dropout)) * runs + between
    # Nobody asks the flat array for more than its size.
    layer.__dict__["_parameters"] = _Arrays(None, np.broadcast_to(np.zeros((), layer.dtype), (begin,)))
    return layer


def arrays_of(layer: Any, params: Sequence[Tensor]) -> dict[str, np.ndarray]:
    """Parameters, in the layer's order, under its names."""
    for p in params:
        if p.dtype not in DTYPES or DTYPES[p.dtype] != layer.dtype:
            raise TypeError(f"parameters: expected {layer.dtype} as the input, got {p.dtype}")
    arrays = (np.require(p.detach().numpy(), layer.dtype, ("C", "A")) for p in params)
    return dict(zip((spot[0] for spot in layer._spots), arrays, strict=True))


def bind(layer: Any, arrays: dict[str, np.ndarray]) -> Any:
    """A layer like this one over the given parameters, which draws nothing."""
    bound = object.__new__(type(layer))
    state = bound.__dict__
    state.update(layer.__dict__)
    state["_parameters"] = _Arrays(arrays, layer._parameters.flat)
    state["rng"], state["dropout"], state["recurrent_dropout"] = None, 0.0, 0.0
    return bound


def _seeded(layer: Any, bound: Any, seed: Tensor) -> Any:
    """A layer that draws like the first over the parameters of the second."""
    drawing = object.__new__(type(layer))
    drawing.__dict__.update(layer.__dict__)
    drawing.__dict__["_parameters"] = bound._parameters
    drawing.__dict__["rng"] = np.random.default_rng(int(seed))
    return drawing


class _Packed(Batch):
    """Rows that stand as the engine wants them, `batch_sizes[t]` of them at step t: PyTorch's PackedSequence."""

    def __init__(self, layer: Any, x: Array, state: Any, batch_sizes: Any) -> None:
        self.layer, self.dtype = layer, layer.dtype
        self.listed = self.single = False
        self.places = self.last = None
        sizes = batch_sizes
        bad = sizes.ndim != 1 or not sizes.size or sizes[-1] < 1 or (np.diff(sizes) > 0).any()
        if bad or x.shape != (sizes.sum(), layer.input_size):
            raise ValueError(f"input: expected packed rows (R, {layer.input_size}) and batch sizes that never grow and "
                             f"add up to R, got {x.shape} and {sizes}")  # fmt: skip
        self.T, self.N = sizes.size, int(sizes[0])
        lengths = np.searchsorted(-sizes, -np.arange(self.N)).astype(np.intp)  # steps that have more than r rows
        self.rows = engine.Rows(self.T, self.N, lengths)
        self.x = self._as_rows(x)
        self.entered: dict[str, Any] = {}
        self.h_0, self.c_0 = self.enter_states(state, "state")

    def _as_rows(self, array: Array) -> Array:
        return np.require(array, self.dtype, ("C", "A"))

    def leave(self, rows: Any, out: Any = None) -> Any:
        return rows

    def enter_y(self, dy: Any) -> Array | None:
        return None if dy is None else self._as_rows(dy)


def array_of(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    return tensor.detach().numpy() if tensor.requires_grad else tensor.numpy()


def tensors_of(*arrays: np.ndarray | None) -> tuple[Tensor | None, ...]:
    return tuple([None if a is None else torch.from_numpy(a) for a in arrays])


def _states(layer: Any, h: Tensor | None, c: Tensor | None) -> Any:
    if h is None and c is None:
        return None
    return (array_of(h), array_of(c)) if layer._state_sizes[2] else array_of(h)


def _split(layer: Any, states: Any) -> Any:
    return states if layer._state_sizes[2] else (states, None)


def _batch(layer: Any, x: Tensor, h_0: Tensor | None, c_0: Tensor | None, steps: Steps) -> Batch:
    rows, state = array_of(x), _states(layer, h_0, c_0)
    if steps is WHOLE:
        return Batch(layer, rows, state, None)
    if steps.batch_sizes is not None:
        return _Packed(layer, rows, state, array_of(steps.batch_sizes))
    return Batch(layer, rows, state, *map(array_of, steps[:3]))


_LINE = 64  # bytes: parts of the reserve begin at a cache line


def _rounded(size: Any, itemsize: int) -> Any:
    line = _LINE // itemsize
    return (size + line - 1) // line * line


class _Reserve:
    """The memory of a tape, cut from one array in the order in which the tape asks. clear: zero between the parts."""

    def __init__(self, array: Any, clear: bool = False) -> None:
        self.array, self.used, self.clear = array, 0, clear

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        size = math.prod(shape)
        part: Array = self.array[self.used : self.used + size].reshape(shape)
        end, self.used = self.used + size, self.used + _rounded(size, dtype.itemsize)
        if self.clear:
            self.array[end : self.used] = 0
        return part


def reserve_size(layer: Any, R: Any, seeded: bool) -> Any:
    """Elements of a reserve for R rows: what `Layer._carry` asks for. R may be symbolic."""
    return sum([_rounded(R * width, layer.dtype.itemsize) for width in layer._reserve[seeded]])


def infer(bound: Any, x: Tensor, h_0: Tensor | None, c_0: Tensor | None, steps: Steps) -> tuple[Any, ...]:
    """y, h_n, c_n (None where there is none) of a bound layer at inference."""
    engine.begin_call()
    y, states = bound._predict(_batch(bound, x, h_0, c_0, steps))
    return tensors_of(y, *_split(bound, states))


def forward(
    layer: Any, bound: Any, x: Tensor, h_0: Tensor | None, c_0: Tensor | None, steps: Steps, seed: Tensor | None,
    keep: bool, traced: bool = False,
) -> tuple[tuple[Any, ...], Tape[Any] | None]:  # fmt: skip
    """y, h_n, c_n and the reserve (None without keep) as tensors that share no memory; and the tape in the reserve.

    bound: the layer over its parameters, see `bind`. traced: the reserve has the size that is known without a look at
    the lengths, and is zero past what is used.
    """
    if seed is not None:
        bound = _seeded(layer, bound, seed)
    elif not keep:
        return (*infer(bound, x, h_0, c_0, steps), None), None
    engine.begin_call()
    batch = _batch(bound, x, h_0, c_0, steps)
    reserve: Any = None
    empty: Any = engine.empty
    if keep:
        R = batch.T * batch.N if traced and steps.scattered else batch.rows.R
        reserve = engine.empty((reserve_size(layer, R, seed is not None),), layer.dtype)
        empty = _Reserve(reserve, clear=traced)
    tape = Tape(bound, batch, None, empty)
    rows, h_n, c_n = bound._carry(tape)
    if traced and keep:
        reserve[empty.used :] = 0
    states = _split(layer, batch.leave_states(h_n, c_n))
    return tensors_of(batch.leave_y(rows), *states, reserve), tape if keep else None


def again(
    layer: Any,
    x: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    steps: Steps,
    seed: Tensor | None,
    params: Sequence[Tensor],
    y: Tensor,
    reserve: Tensor | None,
) -> Tape[Any]:
    """The tape of a forward pass, laid out in its reserve; without one the pass runs again."""
    bound = bind(layer, arrays_of(layer, params))
    if seed is not None:
        bound = _seeded(layer, bound, seed)
    batch = _batch(bound, x, h_0, c_0, steps)
    if reserve is None:
        tape = Tape(bound, batch, None)
        bound._carry(tape)
    else:
        tape = Tape(bound, batch, None, _Reserve(array_of(reserve)), filled=True)
        bound._carry(tape, batch._as_rows(array_of(y)))
    return tape


def backward(tape: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, need_dx: bool) -> tuple[Any, ...]:
    """Arrays: dx (None without need_dx), dh_0, dc_0, the parameters' gradients side by side, and each. Uses the tape
    up."""
    bound = tape._layer
    flat = engine.empty(bound._parameters.flat.shape, bound.dtype)  # memory that is kept: no page faults at each step
    flat.fill(0)
    views = {name: flat[begin:end].reshape(shape) for name, begin, end, shape in bound._spots}
    dx, dstate = bound._back(tape, array_of(dy), _states(bound, dh_n, dc_n), need_dx, _Arrays(views, flat))
    return dx, *_split(bound, dstate), flat, views.values()


def describe(kind: str, options: Mapping[str, Any]) -> str:
    """The text that `layer_of` reads."""
    return json.dumps({"kind": kind, **options})
