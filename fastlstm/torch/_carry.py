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
from .._layer import Layer
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


class Over(Layer[Any, Any]):
    """A layer over arrays that a call brings: what fastlstm.torch needs of a layer's inside, it asks for here.

    rng None: masks stand at their expectation, in training too.
    """

    spots: list[tuple[str, int, int, tuple[int, ...]]]  # name, begin, end and shape of the parameters, side by side
    reserve: tuple[list[int], list[int]]  # see `reserve_size`
    state_widths: tuple[int, int, int]  # layers times directions, the width of h, and that of c or 0
    y_width: int

    def lay_out(self) -> None:
        """Find what does not hang on the arrays, and give up those that the constructor has made."""
        self.spots, begin = [], 0
        for name, shape in self._shapes():
            end = begin + math.prod(shape)
            self.spots.append((name, begin, end, shape))
            begin = end
        # What a tape asks for a row, without and with a mask of recurrent dropout.
        depth, P, C = self.state_widths = self._state_widths
        self.y_width = self._dirs * P
        part = [len(self._descriptor.columns) * self.hidden_size] + [C] * bool(C)
        part += [self.hidden_size] * bool(self.proj_size)
        between = [self.y_width] * (self.num_layers - 1)
        self.reserve = part * depth + between, (part + [P] * bool(self.recurrent_dropout)) * depth + between
        # Nobody asks the flat array for more than its size.
        self.__dict__["_parameters"] = _Arrays(None, np.broadcast_to(np.zeros((), self.dtype), (begin,)))

    @property
    def draws(self) -> bool:
        """Whether calls in training draw masks."""
        return bool(self.dropout or self.recurrent_dropout or any(self._zoneout))

    @property
    def gains(self) -> dict[str, float]:
        """What the gains of a layer norm start with."""
        return {name: gain for name, gain in self._descriptor.vectors.items() if "_ln_" in name}

    def rows_of(self, gate: str) -> slice:
        """A gate's part of a bias."""
        first = self._descriptor.gates.index(gate) * self.hidden_size
        return slice(first, first + self.hidden_size)

    @property
    def arrays(self) -> Any:
        """The parameters that it is bound to, by name."""
        return self._parameters.views

    def bind(self, arrays: dict[str, np.ndarray]) -> Any:
        """A layer like this one over the given parameters, which draws nothing."""
        bound = object.__new__(type(self))
        parameters = _Arrays(arrays, self._parameters.flat)
        bound.__dict__.update(self.__dict__, _parameters=parameters, rng=None, dropout=0.0, recurrent_dropout=0.0)
        return bound

    def packed(self) -> Any:
        """One bound to the same parameters, which keeps them packed as they are now."""
        bound = self.bind(self.arrays)
        bound.__dict__["_frozen"] = {place: panels.pack() for place, panels in bound._pack().items()}
        return bound

    def seeded(self, bound: Any, seed: Tensor) -> Any:
        """A layer that draws like this one over the parameters of another."""
        drawing = object.__new__(type(self))
        rng = np.random.default_rng(int(seed))
        drawing.__dict__.update(self.__dict__, _parameters=bound._parameters, rng=rng)
        return drawing

    def _draw_kept(self, shape: tuple[int, ...], p: float) -> Array:
        if self.rng is None and p:
            return np.broadcast_to(np.full(shape[1], p, self.dtype), shape)
        return super()._draw_kept(shape, p)

    @staticmethod
    def _threads() -> int:
        """No more than torch uses: one in a DataLoader's workers, and what `torch.set_num_threads` says."""
        return min(threads.threads_of_call(), torch.get_num_threads())


_KINDS: dict[str, Any] = {name: type(name, (Over, getattr(layers, name)), {}) for name in ("LSTM", "GRU", "RNN")}


class _Arrays(NamedTuple):
    """What a layer reads of its parameters or gradients, where `Parameters` would own the memory."""

    views: dict[str, np.ndarray] | None
    flat: np.ndarray

    def fingerprint(self, rows: int) -> int:
        return 0  # autograd knows the parameters' versions


@lru_cache(maxsize=256)
def layer_of(config: str, dtype: torch.dtype) -> Over:
    """The layer that a text describes, without arrays of its own. config: JSON, the class's name and its arguments."""
    options = json.loads(config)
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    layer: Over = _KINDS[options.pop("kind")](**options, init="zeros", dtype=DTYPES[dtype])
    layer.lay_out()
    return layer


def arrays_of(layer: Any, params: Sequence[Tensor]) -> dict[str, np.ndarray]:
    """Parameters, in the layer's order, under its names."""
    for p in params:
        if p.dtype not in DTYPES or DTYPES[p.dtype] != layer.dtype:
            raise TypeError(f"parameters: expected {layer.dtype} as the input, got {p.dtype}")
    arrays = (np.require(p.detach().numpy(), layer.dtype, ("C", "A")) for p in params)
    return dict(zip((spot[0] for spot in layer.spots), arrays, strict=True))


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
    return (array_of(h), array_of(c)) if layer.state_widths[2] else array_of(h)


def _split(layer: Any, states: Any) -> Any:
    return states if layer.state_widths[2] else (states, None)


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
    return sum([_rounded(R * width, layer.dtype.itemsize) for width in layer.reserve[seeded]])


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

    bound: the layer over its parameters, see `Over.bind`. traced: the reserve has the size that is known without a look
    at the lengths, and is zero past what is used.
    """
    if seed is not None:
        bound = layer.seeded(bound, seed)
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
    layer: Over, x: Tensor, h_0: Tensor | None, c_0: Tensor | None, steps: Steps, seed: Tensor | None,
    params: Sequence[Tensor], y: Tensor, reserve: Tensor | None,
) -> Tape[Any]:  # fmt: skip
    """The tape of a forward pass, laid out in its reserve; without one the pass runs again."""
    bound = layer.bind(arrays_of(layer, params))
    if seed is not None:
        bound = layer.seeded(bound, seed)
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
    views = {name: flat[begin:end].reshape(shape) for name, begin, end, shape in bound.spots}
    dx, dstate = bound._back(tape, array_of(dy), _states(bound, dh_n, dc_n), need_dx, _Arrays(views, flat))
    return dx, *_split(bound, dstate), flat, views.values()


def describe(kind: str, options: Mapping[str, Any]) -> str:
    """The text that `layer_of` reads."""
    return json.dumps({"kind": kind, **options})
