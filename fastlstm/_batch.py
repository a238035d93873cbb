"""A call's arguments as rows, and the way back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import _checks, engine, sequences
from ._places import Ragged, Segments, last_valid, places_of, valid_steps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import ArrayLike

    from ._layer import Layer
    from ._types import Array

# Above any batch that fits in memory, and far enough below 2**64 for products of a few sizes.
_MOST = 2**40
_MASKED_OUTPUTS = ("zero", "last")


def check_masked_output(value: str) -> str:
    return _checks.choice("masked_output", value, _MASKED_OUTPUTS)


def lengths_of(lengths: ArrayLike | None, T: int, N: int, single: bool) -> Array | None:
    """Lengths as integers (N,)."""
    if lengths is None:
        return None
    lengths = _checks.integers_of("lengths", lengths)
    if single and lengths.ndim == 0:
        lengths = lengths[None]
    if lengths.ndim == 2 and lengths.shape[1] == 1:
        lengths = lengths[:, 0]
    _checks.shaped("lengths", lengths, (N,))
    if lengths.size and not (0 <= int(lengths.min()) and int(lengths.max()) <= T):
        bad = lengths[(lengths < 0) | (lengths > T)][0]
        raise ValueError(f"lengths: expected values from 0 to T = {T}, got {bad}")
    return lengths.astype(np.intp)


def steps_of(name: str, value: ArrayLike | None, T: int, N: int, single: bool, batch_first: bool) -> Array | None:
    """A mask or resets as bool (T, N)."""
    if value is None:
        return None
    value = _checks.flags_of(name, value)
    shape: tuple[int, ...] = (T,) if single else (N, T) if batch_first else (T, N)
    if value.ndim == len(shape) + 1 and value.shape[-1] == 1:
        value = value[..., 0]
    value = _checks.shaped(name, value, shape)
    return value[:, None] if single else value.swapaxes(0, 1) if batch_first else value


def steps_beside(
    shape: tuple[int, ...], batch_first: bool, lengths: ArrayLike | None, mask: ArrayLike | None,
    directions: Iterable[bool] | None = None,
) -> Array:  # fmt: skip
    """Which steps of x of this shape there are, with its axes and one for features, for what stands beside a recurrent
    layer. directions: of a layer with masked_output="last", then which of its outputs hold something."""
    if len(shape) not in (2, 3):
        raise ValueError(f"x: expected shape {'(N, T, D)' if batch_first else '(T, N, D)'} or (T, D), got {shape}")
    single = len(shape) == 2
    T, N = (shape[0], 1) if single else shape[1::-1] if batch_first else shape[:2]
    n, steps = lengths_of(lengths, T, N, single), steps_of("mask", mask, T, N, single, batch_first)
    valid = valid_steps(T, N, n, steps)
    if directions is not None:
        valid = np.logical_or.reduce([last_valid(valid, reverse) >= 0 for reverse in directions])
    return valid if single else (valid.T if batch_first else valid)[:, :, None]


class Batch:
    """A call's arguments, validated, as rows; and the way back.

    x [R, D]; h_0 (layers*dirs, S, P) and c_0 (layers*dirs, S, C), the states beside h side by side (None if there are
    none), S the sequences that the engine sees. `places` brings arrays there and back, None where nothing moves.
    """

    def __init__(
        self, layer: Layer, x: Any, state: Any, lengths: ArrayLike | None, mask: ArrayLike | None = None,
        resets: ArrayLike | None = None, masked_output: str = "zero",
    ) -> None:  # fmt: skip
        self.layer, self.dtype, self.listed = layer, layer.dtype, False
        if not engine.plain(x, layer.dtype):
            x, lengths = self._converted(x, lengths, mask, resets)
        shape = x.shape
        self.single = len(shape) == 2
        if len(shape) not in (2, 3) or shape[-1] != layer.input_size:
            names = "(N, T, D)" if layer.batch_first else "(T, N, D)"
            raise ValueError(f"x: expected shape {names} or (T, D) with D = {layer.input_size}, got {shape}")
        if self.single or layer.batch_first:
            x = self._inward(x)
        self.T, self.N, _ = x.shape
        if self.T >= _MOST or self.N >= _MOST:  # an array of stride 0 can be as long; all blocks' sizes stay exact
            raise ValueError(f"x: expected fewer than 2**40 steps and sequences, got {self.T} and {self.N}")
        self.places: Ragged | Segments | None = None
        self.last: list[Array] | None = None  # last: (T, N) per direction, whose output stands where none was computed
        if lengths is None and mask is None and resets is None:
            self.rows = engine.Rows(self.T, self.N)
            if masked_output is not _MASKED_OUTPUTS[0]:
                check_masked_output(masked_output)
        else:
            self._place(lengths, mask, resets, masked_output)
        self.x = self._as_rows(x)
        self.entered: dict[str, Any] = {}
        self.h_0, self.c_0 = self.enter_states(state, "state")

    def _converted(
        self, x: Any, lengths: ArrayLike | None, mask: ArrayLike | None, resets: ArrayLike | None
    ) -> tuple[Array, ArrayLike | None]:
        """x as an array of numbers, and the lengths of a list of sequences."""
        self.listed = sequences.is_list(x)
        if self.listed:
            x, lengths = sequences.enter(x, self.dtype, lengths=lengths, mask=mask, resets=resets)
            self.lengths = lengths
        return _checks.numbers_of("x", x), lengths

    def _place(
        self, lengths: ArrayLike | None, mask: ArrayLike | None, resets: ArrayLike | None, masked_output: str
    ) -> None:
        """Where the valid steps stand."""
        n = lengths_of(lengths, self.T, self.N, self.single)
        mask, resets = (
            steps_of(name, value, self.T, self.N, self.single, self.layer.batch_first)
            for name, value in (("mask", mask), ("resets", resets))
        )
        self.places = places_of(self.T, n, mask, resets)
        self.rows = engine.Rows(self.T, self.N) if self.places is None else self.places.rows
        if check_masked_output(masked_output) == "last" and self.places is not None:
            valid = valid_steps(self.T, self.N, n, mask)
            self.last = [last_valid(valid, reverse) for reverse in self.layer._directions]

    def _inward(self, array: Array) -> Array:
        """The caller's axes as (T, N, .)."""
        if self.single:
            return array[:, None]
        return array.swapaxes(0, 1) if self.layer.batch_first and not self.listed else array

    def _as_rows(self, array: Array) -> Array:
        """(T, N, width) as rows [R, width]."""
        width = array.shape[2]
        if self.places is None:
            if not engine.plain(array, self.dtype):
                array = np.require(array, self.dtype, ("C", "A"))
            return array.reshape(self.T * self.N, width)
        return self.places.gather(array, engine.empty((self.rows.R, width), self.dtype))

    def enter_states(self, state: Any, what: str) -> tuple[Array, Array | None]:
        """h and c in the order of the rows, as fresh or read-only arrays; zeros for None. what: "state" or "dstate"."""
        layer = self.layer
        if state is None and self.places is None:
            depth, P, C = layer._state_widths
            c = np.zeros((depth, self.N, C), self.dtype) if C else None
            return np.zeros((depth, self.N, P), self.dtype), c
        self.entered[what] = []
        names = [f"d{name}_n" if what == "dstate" else f"{name}_0" for name in layer._descriptor.states]
        if len(names) > 1:
            if state is None:
                state = (None,) * len(names)
            if not isinstance(state, (tuple, list)) or len(state) != len(names):
                kind = "a pair" if len(names) == 2 else f"{len(names)} arrays"
                raise TypeError(f"{what}: expected {kind} ({', '.join(names)}), got {_checks.describe(state)}")
        else:
            if isinstance(state, (tuple, list)):
                raise TypeError(f"{what}: expected the array {names[0]}, got {_checks.describe(state)}")
            state = (state,)
        h, *others = (
            self._enter_state(name, value, layer.hidden_size if i else layer._width, what)
            for i, (name, value) in enumerate(zip(names, state, strict=True))
        )
        if len(others) < 2:
            return h, others[0] if others else None
        heads, H = layer.num_heads, layer.hidden_size
        parts = [other.reshape(*other.shape[:2], heads, H // heads) for other in others]  # head by head
        return h, np.stack(parts, axis=3).reshape(*others[0].shape[:2], len(others) * H)

    def _enter_state(self, name: str, value: ArrayLike | None, width: int, what: str) -> Array:
        shape = (self.layer.num_layers * self.layer._dirs, self.N, width)
        if value is None:
            value = np.zeros(shape, self.dtype)
        else:
            value = _checks.numbers_of(name, value)
            value = _checks.shaped(name, value, shape[::2] if self.single else shape).reshape(shape)
        gradient = what == "dstate"
        if self.places is not None:
            self.entered[what].append(value)
            value = self.places.enter(value, self.layer._directions, gradient)
        return np.array(value, self.dtype, order="C") if gradient else np.require(value, self.dtype, ("C", "A"))

    def new_states(self) -> tuple[Array, Array | None]:
        return np.empty(self.h_0.shape, self.dtype), None if self.c_0 is None else np.empty(self.c_0.shape, self.dtype)

    def new(self, width: int) -> Array:
        return engine.empty((self.rows.R, width), self.dtype)

    def rooms(self, width: int, h: Array, c: Array | None) -> Sequence[Array | None]:
        """Where `leave` puts rows of a width (0: none) that must be spread, and `leave_states` states; None where they
        need no copy."""
        if self.places is None:
            return None, None, None
        states = [None if s is None else np.empty((len(s), self.N, s.shape[2]), self.dtype) for s in (h, c)]
        return np.zeros((self.T, self.N, width), self.dtype) if width else None, *states

    def spread(self, rows: Array | None, width: int, out: Array | None = None) -> Array:
        """Rows [R, width] as a new array (T, N, width), zero where no step is valid."""
        if rows is None:
            rows = np.empty((0, width), self.dtype)
        if self.places is None:
            return rows.reshape(self.T, self.N, width).copy()
        return self.places.scatter(rows, np.zeros((self.T, self.N, width), self.dtype) if out is None else out)

    def of_sequences(self, values: Array) -> Array:
        """Values a sequence, as the engine sees them, in the order of the batch."""
        return values if self.places is None else self.places.of_sequences(values)

    def for_sequences(self, draw: Callable[[tuple[int, int]], Array], width: int) -> Array:
        """Values drawn for each sequence, as the engine sees them."""
        if isinstance(self.places, Segments):  # equal in all segments of a sequence
            return np.ascontiguousarray(draw((self.N, width))[self.places.owner])
        return draw((self.N, width))

    def leave(self, rows: Array, out: Array | None = None) -> Any:
        """Rows as the caller's axes."""
        width = rows.shape[1]
        y = rows.reshape(self.T, self.N, width) if self.places is None else self.spread(rows, width, out)
        return self._outward(y)

    def _outward(self, y: Array) -> Any:
        if self.listed:
            return sequences.unpad(y, self.lengths)
        if self.single:
            return y[:, 0]
        return y.swapaxes(0, 1) if self.layer.batch_first else y

    def leave_y(self, rows: Array) -> Any:
        """Outputs; with masked_output="last" those of valid steps stand in for what was not computed."""
        if self.last is None:
            return self.leave(rows)
        y = self.spread(rows, rows.shape[1])
        for part, last in self._parts(y):
            there = np.take_along_axis(part, np.maximum(last, 0)[:, :, None], axis=0)
            part[...] = np.where((last >= 0)[:, :, None], there, 0)
        return self._outward(y)

    def _parts(self, y: Array) -> Iterator[tuple[Array, Array]]:
        """Each direction's columns, and which outputs stand in them."""
        for d, last in enumerate(self.last or ()):
            yield y[..., d * self.layer._width : (d + 1) * self.layer._width], last

    def leave_states(
        self, h: Array, c: Array | None, out: Sequence[Array | None] = (None, None), what: str = "state"
    ) -> Any:
        """h, or (h, c, ...), in the order of the batch."""
        states, H = [h] if c is None else [h, c], self.layer.hidden_size
        if c is not None and c.shape[2] != H:  # more states beside h than one
            parts = c.reshape(*c.shape[:2], self.layer.num_heads, c.shape[2] // H, H // self.layer.num_heads)
            states[1:] = [p.reshape(*c.shape[:2], H) for p in np.moveaxis(parts, 3, 0)]
        if self.places is not None:
            rooms = [out[0], *([out[1]] if len(states) == 2 else [None] * (len(states) - 1))]
            for i, (s, room, entered) in enumerate(zip(states, rooms, self.entered[what], strict=True)):
                room = np.empty((len(s), self.N, s.shape[2]), self.dtype) if room is None else room
                states[i] = self.places.leave(s, self.layer._directions, room, entered, what == "dstate")
        states = [s[:, 0] for s in states] if self.single else states
        return states[0] if len(states) == 1 else tuple(states)

    def enter_y(self, dy: Any) -> Array | None:
        """Gradient of y as rows."""
        if dy is None:
            return None
        width = self.layer._dirs * self.layer._width
        if self.listed:
            dy = sequences.enter_y(dy, self.lengths, width, self.dtype)
        if not engine.plain(dy, self.dtype):
            dy = _checks.numbers_of("dy", dy)
        shape: tuple[int, ...] = (self.T, self.N, width)
        if self.single:
            shape = shape[::2]
        elif self.layer.batch_first and not self.listed:
            shape = (self.N, self.T, width)
        dy = self._inward(_checks.shaped("dy", dy, shape))
        if self.last is not None:  # a gradient goes to the step whose output it was
            dy, given = np.zeros(dy.shape, self.dtype), dy
            for (part, last), (source, _) in zip(self._parts(dy), self._parts(given), strict=True):
                for t in range(self.T):
                    n = np.flatnonzero(last[t] >= 0)
                    part[last[t, n], n] += source[t, n]
        return self._as_rows(dy)
