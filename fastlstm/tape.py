"""What one forward pass leaves for one backward pass, and for a look inside."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any, Generic

import numpy as np

from . import _checks, engine
from ._batch import Batch
from ._types import Y

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeAlias

    from ._layer import Layer
    from ._types import Array

    # grads, dy, dh, dc, dx, add_dx of a run's set_backward; how many threads, asked when a call starts
    Wanted: TypeAlias = tuple[dict[str, Array], Array | None, Array, Array | None, Array | None, bool]
    Threads: TypeAlias = Callable[[], int]

# The layers that are in a backward pass, by the identity of their gradients, and the thread of each.
_BUSY: dict[int, int] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_BUSY.clear)  # the other threads' passes end with the parent


class Part:
    """One direction of one layer in training: its rows and what the backward pass needs of them."""

    mask: Array | None = None
    keep_h: Array | None = None
    keep_c: Array | None = None
    gates: Array | None = None  # until the forward pass, and with checkpoints
    c: Array | None = None
    run: engine.Run

    def __init__(
        self, empty: Callable[..., Array], rows: engine.Rows, panels: engine.Panels, reverse: bool, x: Array, h: Array,
        h_0: Array, h_n: Array, c_0: Array | None, c_n: Array | None,
    ) -> None:  # fmt: skip
        self.empty = empty
        self.rows, self.panels, self.reverse, self.x, self.h = rows, panels, reverse, x, h
        self.h_0, self.h_n, self.c_0, self.c_n = h_0, h_n, c_0, c_n

    def make(
        self, begin: int, end: int, h: Array, h_0: Array, h_n: Array, c_0: Array | None, c_n: Array | None, tape: bool
    ) -> tuple[engine.Run, Array | None, Array | None]:
        """A run over the steps begin..end that writes to h; with a tape it keeps gates and cells."""
        rows, x, keep_h, keep_c = self.rows, self.x, self.keep_h, self.keep_c
        if end - begin < rows.T:
            low, high = rows.bounds(begin, end)
            rows, x = rows.window(begin, end), x[low:high]
            keep_h, keep_c = (None if keep is None else keep[low:high] for keep in (keep_h, keep_c))
        panels, dtype = self.panels, h.dtype
        R, H = rows.R, panels.H
        (N, P), c_width = h_0.shape, 0 if c_0 is None else c_0.shape[1]
        c = gates = m = h_masked = h_0_masked = None
        if tape:
            gates = self.empty((R, panels.columns * H), dtype)
            c = self.empty((R, c_width), dtype) if c_width else None
        if panels.projects:
            m = self.empty((R if tape else N, H), dtype)
        if self.mask is not None:
            h_masked, h_0_masked = self.empty((R, P), dtype), h_0 * self.mask
        run = engine.Run(
            rows, panels, self.reverse, x, h, h_0, h_n, c_0, c_n, c, gates, m, h_masked, h_0_masked, self.mask,
            keep_h, keep_c,
        )  # fmt: skip
        return run, gates, c

    def train(self, begin: int, end: int) -> engine.Run:
        self.run, self.gates, self.c = self.make(begin, end, self.h, self.h_0, self.h_n, self.c_0, self.c_n, True)
        return self.run

    def train_back(self, args: Wanted) -> engine.Run:
        self.run.set_backward(*args)
        return self.run

    def windows(self, every: int) -> list[tuple[int, int]]:
        """Windows of steps in the order in which the direction walks them."""
        windows = [(t, min(t + every, self.rows.T)) for t in range(0, self.rows.T, every)]
        return windows[::-1] if self.reverse else windows

    def skim(self, every: int, threads: Threads) -> None:
        """Forward that keeps the states before each window only."""
        self.states: list[tuple[Array, Array | None]] = []
        h, c = self.h_0, self.c_0
        for begin, end in self.windows(every):
            low, high = self.rows.bounds(begin, end)
            self.states.append((h, c))
            h_n, c_n = np.empty_like(h), None if c is None else np.empty_like(c)
            run, _, _ = self.make(begin, end, self.h[low:high], h, h_n, c, c_n, False)
            engine.forward([run], threads)
            h, c = h_n, c_n
        self.h_n[...] = h
        if self.c_n is not None:
            self.c_n[...] = c

    def later_back(self, every: int, args: Wanted) -> Callable[[Threads], None]:
        """Backward with checkpoints, as a function of the threads: window by window, each computed again."""
        return lambda threads: self.again(every, args, threads)

    def again(self, every: int, args: Wanted, threads: Threads) -> None:
        """Backward, window by window, each computed again from the states before it."""
        grads, dy, dh, dc, dx, add_dx = args
        for (begin, end), (h, c) in zip(reversed(self.windows(every)), reversed(self.states), strict=True):
            low, high = self.rows.bounds(begin, end)
            h_n, c_n = np.empty_like(h), None if c is None else np.empty_like(c)
            run, _, _ = self.make(begin, end, engine.empty((high - low, h.shape[1]), h.dtype), h, h_n, c, c_n, True)
            engine.forward([run], threads)
            run.set_backward(grads, None if dy is None else dy[low:high], dh, dc,
                             None if dx is None else dx[low:high], add_dx)  # fmt: skip
            engine.backward([run], threads, None, True)


class Tape(Generic[Y]):
    """What one `forward` leaves for one `backward`, and for a look inside.

    Arrays are time-major with a batch axis, zero past the lengths, and readable until `backward` uses the tape.
    """

    def __init__(
        self, layer: Layer, batch: Batch, checkpoint_every: int | None, empty: Callable[..., Array] = engine.empty,
        filled: bool = False,
    ) -> None:  # fmt: skip
        self._layer, self._batch = layer, batch
        self._checkpoint_every = checkpoint_every
        self.empty, self.filled = empty, filled  # where its memory comes from; whether an earlier forward filled it
        self.parts: list[list[list[Part]]] = []  # [layer][direction][head]
        self.dropout: list[Array] = []
        self._parameters = layer._parameters.fingerprint(batch.rows.R)
        self._used = False

    @property
    def checkpoint_every(self) -> int | None:
        """Steps of a window that backward computes again, as `forward` was told; None: all is kept."""
        return self._checkpoint_every

    def __reduce__(self) -> Any:
        raise TypeError("tape: belongs to one backward pass of this process and cannot be copied or pickled")

    def _check(self) -> None:
        if self._used:
            raise RuntimeError("tape: already used by a backward pass, run forward again")

    def _begin(self, grads: Array, keep: bool) -> Array | None:
        """One backward pass begins, the only one of the layer. keep: it may end amid. Returns what `_restore` wants."""
        mine = threading.get_ident()
        if _BUSY.setdefault(id(grads), mine) != mine:
            raise RuntimeError("backward: another thread is in backward of this layer, and both add to its gradients")
        saved = None
        try:
            self._check()  # again: another thread may have come first
            if keep:
                saved = engine.empty(grads.shape, grads.dtype)
                np.copyto(saved, grads)
        except BaseException:
            self._end(grads)
            raise
        self._used = True
        return saved

    def _restore(self, grads: Array, saved: Array | None, begun: bool) -> None:
        """After an error the gradients are as before, and the tape can be used again: not if a pass had begun that has
        no windows to compute again, as its gates became their gradients."""
        if saved is not None:
            grads[:] = saved
        self._used = begun and self.checkpoint_every is None

    def _end(self, grads: Array) -> None:
        _BUSY.pop(id(grads), None)

    def _release(self) -> None:
        self.parts.clear()
        self.dropout.clear()

    def _heads(self, layer: int, reverse: bool) -> list[Part]:
        self._check()
        layer = _checks.integer("layer", layer, 0)
        if layer >= self._layer.num_layers:
            raise ValueError(f"layer: expected less than {self._layer.num_layers}, got {layer}")
        if reverse and not self._layer.bidirectional:
            raise ValueError("reverse: expected False, the layer has one direction")
        return self.parts[layer][bool(reverse)]

    def _kept(self, layer: int, reverse: bool) -> list[Part]:
        heads = self._heads(layer, reverse)
        if self.checkpoint_every is not None:
            raise RuntimeError("tape: made with checkpoint_every, it keeps no gates and cells")
        return heads

    def _spread(self, arrays: Sequence[Array | None], width: int) -> Array:
        """What the heads have side by side; `width` columns of each."""
        rows = [np.empty((0, width), self._layer.dtype) if a is None else a for a in arrays]
        return self._batch.spread(rows[0] if len(rows) == 1 else np.concatenate(rows, axis=1), width * len(rows))

    def gates(self, layer: int = 0, reverse: bool = False) -> dict[str, Array]:
        """Gate name (LSTM i, f, g, o; SLSTM i, f, z, o; GRU r, z, n; RNN h) to activations of shape (T, N, H) each."""
        heads, H = self._kept(layer, reverse), self._layer.hidden_size // self._layer.num_heads
        descriptor = self._layer._descriptor
        return {
            name: self._spread([None if p.gates is None else p.gates[:, i * H : (i + 1) * H] for p in heads], H)
            for name, i in ((name, descriptor.columns.index(name)) for name in descriptor.gates)
        }

    def cells(self, layer: int = 0, reverse: bool = False) -> Array:
        """Cell states c of an LSTM, or of an SLSTM (beside its n and m), shape (T, N, H)."""
        heads = self._kept(layer, reverse)
        if len(self._layer._descriptor.states) < 2:
            raise ValueError(f"tape: {type(self._layer).__name__} has no cell state")
        H = self._layer.hidden_size // self._layer.num_heads
        return self._spread([None if part.c is None else part.c[:, :H] for part in heads], H)

    def hidden(self, layer: int = 0, reverse: bool = False) -> Array:
        """Hidden states, shape (T, N, P)."""
        return self._spread([part.h for part in self._heads(layer, reverse)], self._layer._head_width)

    @property
    def masks(self) -> dict[str, Any]:
        """The masks that `forward` drew, as `fastlstm.reference.forward` takes them."""
        self._check()
        width = self._layer._width
        masks: dict[str, Any] = {"dropout": None, "recurrent": {}, "zoneout_h": {}, "zoneout_c": {}}
        if self.dropout:
            masks["dropout"] = [self._batch.spread(mask, self._layer._dirs * width) for mask in self.dropout]
        for layer, parts in enumerate(self.parts):
            for direction, heads in enumerate(parts):
                key = layer, direction
                if heads[0].mask is not None:
                    whole = np.concatenate([part.mask for part in heads], axis=1)
                    masks["recurrent"][key] = self._batch.of_sequences(whole)
                if heads[0].keep_h is not None:
                    masks["zoneout_h"][key] = self._spread([part.keep_h for part in heads], self._layer._head_width)
                if heads[0].keep_c is not None:
                    masks["zoneout_c"][key] = self._batch.spread(heads[0].keep_c, self._layer.hidden_size)
        return masks
