"""Where the valid steps of a batch stand as rows: sequences of different lengths, masks with holes, resets.

The engine knows sequences that start at step 0, longest first, and takes all steps t of them side by side. What a
caller gives is brought into that form and back by one of two classes with the same methods:

gather   (T, N, width) -> rows [R, width]
scatter  rows -> zeros of (T, N, width)
enter    states (layers*dirs, N, width) -> (layers*dirs, S, width), S the sequences that the engine sees
leave    the way back

directions: of the layer, whether each walks in reverse.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import engine

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._types import Array

    Test = Callable[[Array, Array], Array]


class Ragged:
    """Sequences of different lengths: `order` is the batch position of row r of a step."""

    def __init__(self, T: int, lengths: Array) -> None:
        self.order = np.argsort(-lengths, kind="stable")
        self.rows = engine.Rows(T, len(lengths), lengths[self.order])

    def gather(self, array: Array, out: Array) -> Array:
        self.rows.gather(array, self.order, out)
        return out

    def scatter(self, rows: Array, out: Array) -> Array:
        self.rows.scatter(rows, self.order, out)
        return out

    def enter(self, states: Array, directions: tuple[bool, ...], gradient: bool = False) -> Array:
        return states[:, self.order]

    def leave(
        self, states: Array, directions: tuple[bool, ...], out: Array, entered: Array, gradient: bool = False
    ) -> Array:
        out[..., self.order, :] = states
        return out

    def of_sequences(self, values: Array) -> Array:
        """(S, width) -> (N, width)."""
        return self.leave(values, (), np.empty_like(values), values)


class Segments:
    """A mask with holes, resets: each run of valid steps without a reset is a sequence of its own for the engine.

    A reset at step t cuts what is carried between the steps t - 1 and t, in both directions; at step 0 it cuts off the
    initial state of the forward direction. A step that the mask leaves out is skipped, and the states go past it.

    valid, resets: bool (T, N).
    """

    def __init__(self, valid: Array, resets: Array) -> None:
        T, N = valid.shape
        self.N = N
        cuts = np.cumsum(resets, axis=0, dtype=np.intp)  # how many cuts lie before step t
        n, t = np.nonzero(valid.T)  # sequence by sequence, in time
        number = cuts[t, n]
        first = np.ones(len(n), bool)
        first[1:] = (n[1:] != n[:-1]) | (number[1:] != number[:-1])
        begin = np.flatnonzero(first)
        lengths = np.diff(np.append(begin, len(n)))
        order = np.argsort(-lengths, kind="stable")
        begin, lengths = begin[order], lengths[order]
        steps = int(lengths[0]) if len(lengths) else 0
        self.rows = engine.Rows(steps, len(lengths), lengths)
        self.owner = n[begin]  # [S] whose segment it is
        place = np.empty(self.rows.R, np.intp)
        for k in range(steps):
            active = int(np.searchsorted(-lengths, -k))
            low, high = self.rows.bounds(k, k + 1)
            place[low:high] = begin[:active] + k
        self.t, self.n = t[place], n[place]  # [R] where each row stands
        self._connect(cuts, resets, number[begin], order)

    def _connect(self, cuts: Array, resets: Array, number: Array, order: Array) -> None:
        """Per direction: which segment takes a sequence's initial state, which one gives its final state."""
        S, N = len(self.owner), self.N
        early, late = np.full(N, -1), np.full(N, -1)  # each sequence's first and last segment
        in_time = np.argsort(order)  # segments as they follow each other, sequence by sequence
        late[self.owner[in_time]] = in_time
        early[self.owner[in_time[::-1]]] = in_time[::-1]
        total = cuts[-1] if len(cuts) else np.zeros(N, np.intp)
        start = resets[0] if len(resets) else np.zeros(N, bool)
        self.takes: list[tuple[Array, Array]] = []
        self.gives: list[tuple[Array, Array]] = []
        self.passes: list[Array] = []
        ways: tuple[tuple[Array, Array, Test, Test], ...] = (
            (early, late, lambda s, n: number[s] == 0, lambda s, n: number[s] == total[n]),
            (late, early, lambda s, n: number[s] == total[n], lambda s, n: number[s] == start[n]),
        )
        for first, last, before, after in ways:
            some = np.flatnonzero(first >= 0)
            takes = some[before(first[some], some)]
            gives = some[after(last[some], some)]
            self.takes.append((takes, first[takes]))
            self.gives.append((gives, last[gives]))
            uncut = total == 0 if first is early else total == start
            self.passes.append(np.flatnonzero((first < 0) & uncut))
        assert S == 0 or (early[self.owner] >= 0).all()

    def gather(self, array: Array, out: Array) -> Array:
        out[...] = array[self.t, self.n]
        return out

    def scatter(self, rows: Array, out: Array) -> Array:
        out[self.t, self.n] = rows
        return out

    def enter(self, states: Array, directions: tuple[bool, ...], gradient: bool = False) -> Array:
        """Initial states into the segments that begin with them; or gradients of final states into those that end."""
        out = np.zeros((len(states), len(self.owner), states.shape[2]), states.dtype)
        dirs = len(directions)
        for d, reverse in enumerate(directions):
            n, s = (self.gives if gradient else self.takes)[reverse]
            out[d::dirs, s] = states[d::dirs, n]
        return out

    def leave(
        self, states: Array, directions: tuple[bool, ...], out: Array, entered: Array, gradient: bool = False
    ) -> Array:
        """Final states, or gradients of initial ones. entered: what came in; it passes where no step is valid."""
        out[...] = 0
        dirs = len(directions)
        for d, reverse in enumerate(directions):
            n, s = (self.takes if gradient else self.gives)[reverse]
            out[d::dirs, n] = states[d::dirs, s]
            out[d::dirs, self.passes[reverse]] = entered[d::dirs, self.passes[reverse]]
        return out

    def of_sequences(self, values: Array) -> Array:
        """(S, width), equal within a sequence -> (N, width); ones where a sequence has no valid step."""
        out = np.ones((self.N, values.shape[1]), values.dtype)
        out[self.owner] = values
        return out


def last_valid(valid: Array, reverse: bool) -> Array:
    """(T, N): the valid step whose output stands at step t, the one before (after, in reverse); -1: none."""
    T = len(valid)
    steps = np.where(valid, np.arange(T)[:, None], -1 if not reverse else T)
    if reverse:
        found = np.minimum.accumulate(steps[::-1], axis=0)[::-1]
        return np.where(found == T, -1, found)
    return np.maximum.accumulate(steps, axis=0)


def valid_steps(T: int, N: int, lengths: Array | None, mask: Array | None) -> Array:
    """(T, N): which steps there are, by checked lengths (N,) and a mask (T, N)."""
    valid = np.ones((T, N), bool) if mask is None else mask
    return valid if lengths is None else valid & (np.arange(T)[:, None] < lengths)


def places_of(T: int, lengths: Array | None, mask: Array | None, resets: Array | None) -> Ragged | Segments | None:
    """None where every step of every sequence is valid and none is a reset."""
    given = [array for array in (lengths, mask, resets) if array is not None]
    if not given:
        return None
    N = given[0].shape[-1]
    if mask is not None and not mask.all():
        valid = valid_steps(T, N, lengths, mask)
        if (valid[1:] <= valid[:-1]).all():  # no holes and nothing missing before: lengths
            lengths, mask = valid.sum(axis=0), None
    else:
        mask = None
    if mask is None and (resets is None or not resets.any()):
        return None if lengths is None or (lengths == T).all() else Ragged(T, lengths)
    return Segments(valid_steps(T, N, lengths, mask), np.zeros((T, N), bool) if resets is None else resets)
