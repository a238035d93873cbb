"""LSTM, GRU, RNN: parameters, validation, layers x directions, forward, backward and streams."""

from __future__ import annotations

import copy
import numbers
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from . import _engine
from ._parameters import Parameters
from .threads import get_num_threads

# Rows of a window of steps in which stacked layers run in turn at inference, so that no whole sequence lies between
# them: enough that the calls per window (tens of microseconds) do not count.
_WINDOW = 4096
# Above any batch that fits in memory, and far enough below 2**64 for products of a few sizes.
_MOST = 2**40


class Layer:
    """What LSTM, GRU and RNN share; not for direct use."""

    _cell = ""
    _frozen: dict[tuple[int, int], Any] | None  # the packed weights of a frozen layer, and how they were packed
    _frozen_weights: str | None

    def __init__(
        self, input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, *,
        activation, recurrent_activation, recurrent_dropout, zoneout, init, forget_bias, dtype, rng,
    ):  # fmt: skip
        self.input_size = _integer("input_size", input_size, 1)
        self.hidden_size = _integer("hidden_size", hidden_size, 1)
        self.num_layers = _integer("num_layers", num_layers, 1, 2**16)
        self.bias, self.batch_first = _flag("bias", bias), _flag("batch_first", batch_first)
        self.bidirectional = _flag("bidirectional", bidirectional)
        self.proj_size = _integer("proj_size", proj_size, 0)
        if self.proj_size >= self.hidden_size:
            raise ValueError(f"proj_size: expected less than hidden_size ({hidden_size}), got {proj_size}")
        self.dropout = _share("dropout", dropout)
        if self.dropout and self.num_layers == 1:
            raise ValueError(f"dropout: acts between layers, expected 0 with num_layers=1, got {dropout}")
        self.recurrent_dropout = _share("recurrent_dropout", recurrent_dropout)
        self.zoneout = zoneout
        self.activation = _choice("activation", activation, self._activations)
        self.recurrent_activation = _choice("recurrent_activation", recurrent_activation, ("sigmoid", "hard_sigmoid"))
        try:
            self.dtype = np.dtype(dtype)
        except (TypeError, ValueError):
            raise TypeError(f"dtype: expected float32 or float64, got {dtype!r}") from None
        if dtype is None:  # NumPy's float64 would be a surprise
            raise TypeError("dtype: expected float32 or float64, got None")
        if self.dtype not in (np.float32, np.float64) or not self.dtype.isnative:
            raise TypeError(f"dtype: expected float32 or float64, got {self.dtype}")
        _choice("init", init, ("pytorch", "orthogonal"))
        if forget_bias is not None:
            if isinstance(forget_bias, bool) or not isinstance(forget_bias, numbers.Real):
                raise TypeError(f"forget_bias: expected a finite number, got {_describe(forget_bias)}")
            if not np.isfinite(forget_bias):
                raise ValueError(f"forget_bias: expected a finite number, got {forget_bias!r}")
            if not self.bias:
                raise ValueError("forget_bias: expected None with bias=False")
        try:
            self.rng = np.random.default_rng(rng)
        except (TypeError, ValueError) as error:
            raise TypeError(f"rng: expected an int, a Generator or None, got {rng!r}") from error
        self._dirs = 2 if self.bidirectional else 1
        self._width = self.proj_size or self.hidden_size
        try:
            self._parameters = Parameters(self._shapes(), self.dtype)
            self._gradients = Parameters(self._shapes(), self.dtype)
            self._initialise(init, forget_bias)
        except (MemoryError, ValueError) as error:
            sizes = f"input_size {input_size}, hidden_size {hidden_size}, num_layers {num_layers}"
            raise MemoryError(f"no memory for a layer of {sizes}: {error}") from None
        self._frozen = None
        self._frozen_weights = None

    # ---- parameters ----

    _activations: tuple[str, ...] = ("tanh", "relu", "softsign", "hard_tanh", "identity")

    @property
    def _gates(self) -> int:
        return len(_engine.GATES[self._cell])

    def _suffixes(self):
        """(layer, direction, suffix of the parameters' names) in the order of the states."""
        for layer in range(self.num_layers):
            for direction in range(self._dirs):
                yield layer, direction, f"_l{layer}" + "_reverse" * direction

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        rows = self._gates * self.hidden_size
        for layer, _, suffix in self._suffixes():
            shapes["weight_ih" + suffix] = (rows, self.input_size if layer == 0 else self._width * self._dirs)
            shapes["weight_hh" + suffix] = (rows, self._width)
            if self.bias:
                shapes["bias_ih" + suffix] = shapes["bias_hh" + suffix] = (rows,)
            if self.proj_size:
                shapes["weight_hr" + suffix] = (self.proj_size, self.hidden_size)
        return shapes

    def _initialise(self, init, forget_bias):
        if init == "pytorch":  # uniform in +-1/sqrt(H)
            bound = self.hidden_size**-0.5
            self.flat_params[:] = self.rng.uniform(-bound, bound, self.flat_params.size)
        else:  # Glorot and Bengio 2010 for the input, Saxe 2014 for the recurrent part, as in Keras
            for name, view in self.params.items():
                if name.startswith("bias"):
                    continue
                if name.startswith("weight_hh"):
                    q, r = np.linalg.qr(self.rng.standard_normal(view.shape))
                    view[:] = q * np.sign(np.diag(r))
                else:
                    bound = (6 / sum(view.shape)) ** 0.5
                    view[:] = self.rng.uniform(-bound, bound, view.shape)
        if forget_bias is not None:
            for _, _, suffix in self._suffixes():
                self.params["bias_ih" + suffix][self.hidden_size : 2 * self.hidden_size] += forget_bias

    @property
    def params(self) -> dict[str, NDArray]:
        """Parameters by name: views into `flat_params`."""
        return dict(self._parameters.views)

    @property
    def grads(self) -> dict[str, NDArray]:
        """Gradients by name: views into `flat_grads`. `backward` adds to them."""
        return dict(self._gradients.views)

    @property
    def flat_params(self) -> NDArray:
        """All parameters as one contiguous array, shape (total,)."""
        return self._parameters.flat

    @property
    def flat_grads(self) -> NDArray:
        """All gradients as one contiguous array of the layout of `flat_params`."""
        return self._gradients.flat

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        self._gradients.flat[:] = 0

    def state_dict(self) -> dict[str, NDArray]:
        """Copies of the parameters under PyTorch's names."""
        return self._parameters.copy()

    def load_state_dict(self, d: Mapping[str, ArrayLike]) -> None:
        """Copy parameters from a mapping, for example the state dict of a PyTorch layer of the same sizes.

        Parameters
        ----------
        d : mapping of str to array_like
            Exactly this layer's names and shapes; anything `numpy.asarray` accepts.

        Raises
        ------
        ValueError, TypeError
            Missing or unexpected names, wrong shapes, no numbers; then nothing has changed.
        RuntimeError
            The layer is frozen.
        """
        if self._frozen is not None:
            raise RuntimeError("load_state_dict: the layer is frozen, call unfreeze() first")
        self._parameters.load(d)

    def freeze(self, weights: str | None = None) -> Layer:
        """Make the parameters read-only and keep them packed between inference calls.

        Without it the weights are packed anew at each call and can never be stale. A view that was made of the
        parameters before stays writeable; what is written through it does not reach the packed weights.

        Parameters
        ----------
        weights : {None, "bfloat16"}
            "bfloat16" rounds the packed weights to 8 significant bits; arithmetic and states stay float32. It halves
            the memory that a step reads, which is what limits small batches. float32 layers only.

        Returns
        -------
        Layer
            This layer. `forward` and `backward` are refused until `unfreeze`.
        """
        panels = {key: panel.pack() for key, panel in self._pack(_weight_type(self.dtype, weights)).items()}
        self._writeable(False)
        self._frozen, self._frozen_weights = panels, weights
        return self

    def unfreeze(self) -> Layer:
        """Undo `freeze`."""
        self._writeable(True)
        self._frozen = None
        return self

    def __copy__(self):
        return copy.deepcopy(self)  # two layers on one set of parameters would undo each other's freeze

    def __getstate__(self):
        """What pickle and copy take: packed weights are memory of the kernels, a frozen copy packs its own."""
        return self.__dict__ | {"_frozen": None}, self._frozen is not None

    def __setstate__(self, state):
        attributes, frozen = state
        self.__dict__.update(attributes)
        if frozen:
            self.freeze(self._frozen_weights)

    def _writeable(self, flag: bool) -> None:
        for array in (self._parameters.flat, *self._parameters.views.values()):
            array.flags.writeable = flag

    def _pack(self, weight_type: str | None = None) -> dict[tuple[int, int], Any]:
        return {
            (layer, direction): _engine.Panels(self._cell, self._parameters.views, suffix, self.activation,
                                               self.recurrent_activation, weight_type)
            for layer, direction, suffix in self._suffixes()
        }  # fmt: skip

    @property
    def config(self) -> dict[str, Any]:
        """Keyword arguments that make `fastlstm.reference.forward` compute what this layer does."""
        return {
            "cell": self._cell,
            "num_layers": self.num_layers,
            "bidirectional": self.bidirectional,
            "batch_first": self.batch_first,
            "activation": self.activation,
            "recurrent_activation": self.recurrent_activation,
            "zoneout": self._zoneout,
        }

    @property
    def _zoneout(self) -> tuple[float, float]:
        return self.zoneout if isinstance(self.zoneout, tuple) else (self.zoneout, 0.0)

    def __repr__(self) -> str:
        parts = [str(self.input_size), str(self.hidden_size)]
        defaults = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False,
                    "proj_size": 0, "reset_after": True, "nonlinearity": "tanh", "activation": "tanh",
                    "recurrent_activation": "sigmoid", "recurrent_dropout": 0.0}  # fmt: skip
        if hasattr(self, "nonlinearity"):
            del defaults["activation"]
        parts += [f"{k}={getattr(self, k)!r}" for k, v in defaults.items() if getattr(self, k, v) != v]
        parts += [f"zoneout={self.zoneout}"] * any(self._zoneout)
        return f"{type(self).__name__}({', '.join(parts)}, dtype={self.dtype})"

    # ---- calls ----

    def __call__(self, x: ArrayLike, state: Any = None, lengths: ArrayLike | None = None):
        """Inference: keeps nothing, draws nothing. See `forward` for the arguments.

        Returns
        -------
        y : ndarray, shape (T, N, dirs*P)
        state : the last valid states, as `forward` takes them
        """
        batch = _Batch(self, x, state, lengths)
        panels = self._frozen or self._pack()
        if batch.rows.R == 0:
            return batch.leave(batch.new(self._dirs * self._width), batch.h_0.copy(), batch.copy_c())
        h_n, c_n = batch.new_states()
        y = batch.new(self._dirs * self._width)
        steps = batch.T
        if self.num_layers > 1 and not self.bidirectional:
            steps = max(1, _WINDOW // batch.N)
        h, c = batch.h_0, batch.c_0
        for begin in range(0, batch.T, steps):
            end = min(begin + steps, batch.T)
            rows = batch.rows if (begin, end) == (0, batch.T) else batch.rows.window(begin, end)
            low, high = batch.rows.bounds(begin, end)
            source = batch.x[low:high]
            for layer in range(self.num_layers):
                last = layer == self.num_layers - 1
                out = y[low:high] if last else _engine.empty((rows.R, y.shape[1]), self.dtype)
                self._infer(layer, rows, panels, source, out, h, c, h_n, c_n)
                source = out
            h, c = h_n, c_n
        return batch.leave(y, h_n, c_n)

    def _infer(self, layer, rows, panels, x, y, h_0, c_0, h_n, c_n):
        """One layer without a tape; h_0 may be h_n."""
        runs = []
        for d in range(self._dirs):
            i = layer * self._dirs + d
            keep_h, keep_c = (
                np.broadcast_to(np.full(width, z, self.dtype), (rows.R, width)) if z else None
                for z, width in zip(self._zoneout, (self._width, self.hidden_size), strict=True)
            )
            start = h_0[i] if h_0 is not h_n else h_0[i].copy()
            runs.append(_engine.Run(
                rows, panels[layer, d], d == 1, x, self._part(y, d), start, h_n[i],
                None if c_0 is None else c_0[i], None if c_n is None else c_n[i],
                m=_engine.empty((rows.N, self.hidden_size), self.dtype) if self.proj_size else None,
                keep_h=keep_h, keep_c=keep_c,
            ))  # fmt: skip
        _engine.forward(runs, get_num_threads())

    def _part(self, y, direction):
        """One direction's columns."""
        return y if self._dirs == 1 else y[:, direction * self._width : (direction + 1) * self._width]

    def forward(
        self, x: ArrayLike, state: Any = None, lengths: ArrayLike | None = None, *, checkpoint_every: int | None = None
    ):
        """Training: also returns the tape that `backward` uses up; draws dropout and zoneout masks from `rng`.

        Parameters
        ----------
        x : array_like, shape (T, N, D), (N, T, D) with batch_first, or (T, D) for one sequence
            Copied only if it is not time-major, C-contiguous, aligned and of the layer's dtype; otherwise the tape
            refers to it, so it must keep its values until `backward`.
        state : None, or (h_0, c_0) for the LSTM, h_0 for GRU and RNN
            h_0 of shape (num_layers*dirs, N, P), c_0 (num_layers*dirs, N, H), layer by layer, forward before reverse;
            without N for one sequence. None: zeros. Held by the tape like x.
        lengths : None or array_like of int, shape (N,)
            Valid steps of each sequence, 0 to T in any order. Padding is never read; y is zero there.
        checkpoint_every : None or int
            Keep the cell states of every this many steps only, and compute the rest again in `backward`: the tape holds
            one value per unit and step, not six, and the gradients are the same to the bit.

        Returns
        -------
        y : ndarray, shape (T, N, dirs*P)
            Part of the tape, so it must not be written to before `backward`.
        state : (h_n, c_n) or h_n
            States after the last valid step of each sequence.
        tape : Tape
            Good for one `backward`.
        """
        self._not_frozen("forward")
        if checkpoint_every is not None:
            checkpoint_every = _integer("checkpoint_every", checkpoint_every, 1)
        batch = _Batch(self, x, state, lengths)
        panels = self._pack()
        tape = Tape(self, batch, checkpoint_every)
        h_n, c_n = batch.new_states()
        source, R, N = batch.x, batch.rows.R, batch.N
        for layer in range(self.num_layers):
            if layer and self.dropout:
                mask = self._draw((R, self._dirs * self._width), self.dropout)
                tape.dropout.append(mask)
                source = source * mask
            y = _engine.empty((R, self._dirs * self._width), self.dtype)
            parts = []
            for d in range(self._dirs):
                i = layer * self._dirs + d
                part = _Part(batch.rows, panels[layer, d], d == 1, source, self._part(y, d), batch.h_0[i], h_n[i],
                             None if c_n is None else batch.c_0[i], None if c_n is None else c_n[i])  # fmt: skip
                if self.recurrent_dropout:
                    part.mask = self._draw((N, self._width), self.recurrent_dropout)
                part.keep_h = self._draw_kept((R, self._width), self._zoneout[0])
                part.keep_c = self._draw_kept((R, self.hidden_size), self._zoneout[1])
                parts.append(part)
            tape.parts.append(parts)
            if R == 0:
                h_n[layer * self._dirs : (layer + 1) * self._dirs] = batch.h_0[layer * self._dirs :][: self._dirs]
                if c_n is not None:
                    c_n[layer * self._dirs : (layer + 1) * self._dirs] = batch.c_0[layer * self._dirs :][: self._dirs]
            elif checkpoint_every is None:
                _engine.forward([part.train(0, batch.T) for part in parts], get_num_threads())
            else:
                for part in parts:
                    part.skim(checkpoint_every, get_num_threads())
            source = y
        return *batch.leave(source, h_n, c_n), tape

    def backward(self, tape: Tape, dy: ArrayLike | None, dstate: Any = None, *, need_dx: bool = True):
        """Carry gradients back through the steps of a tape; adds the parameters' gradients to `grads`.

        Parameters
        ----------
        tape : Tape
            From this layer's `forward`; it is used up. The parameters must be those of the forward pass. As `grads`
            are added to, one thread at a time may call `backward` of a layer.
        dy : array_like of y's shape, or None for zeros
            Gradient of the loss with respect to y; what stands past a length is not read.
        dstate : None, or gradients of the states that `forward` returned, of their shapes
            For the LSTM a pair (dh_n, dc_n), each of which may be None for zeros.
        need_dx : bool
            False saves the work for dx.

        Returns
        -------
        dx : ndarray of x's shape, or None without need_dx
        dstate_0 : (dh_0, dc_0) or dh_0
            Gradients of the initial states.
        """
        self._not_frozen("backward")
        if not isinstance(tape, Tape):
            raise TypeError(f"tape: expected the Tape that forward returned, got {type(tape).__name__}")
        if tape._layer is not self:
            raise ValueError("tape: it comes from another layer's forward")
        tape._check()
        need_dx = _flag("need_dx", need_dx)
        batch = tape._batch
        dy = batch.enter_y(dy)
        dh, dc = batch.enter_states(dstate, ("dstate", "dh_n", "dc_n"))
        tape._check()  # again: another thread may have come first
        tape._used = True
        for layer in reversed(range(self.num_layers)):
            dx = None
            if layer or need_dx:
                dx = _engine.empty((batch.rows.R, tape.parts[layer][0].x.shape[1]), self.dtype)
            runs = []
            for d, part in enumerate(tape.parts[layer]):
                i = layer * self._dirs + d
                suffix = f"_l{layer}" + "_reverse" * d
                slope = None if dy is None else self._part(dy, d)
                args = (self._gradients.views, suffix, slope, dh[i], None if dc is None else dc[i], dx, d == 1)
                if batch.rows.R == 0:
                    continue
                if tape.checkpoint_every is None:
                    runs.append(part.train_back(*args))
                else:
                    part.again(tape.checkpoint_every, args, get_num_threads())
            if runs:
                _engine.backward(runs, get_num_threads())
            if layer and self.dropout:
                dx *= tape.dropout[layer - 1]
            dy = dx
        tape._release()
        return None if dx is None else batch.leave_x(dx), batch.leave_states(dh, dc)

    def stream(self, batch_size: int = 1, *, weights: str | None = None, share: Stream | None = None) -> Stream:
        """Step by step inference with a state that is kept. See `Stream`.

        Parameters
        ----------
        batch_size : int
            Sequences that step together.
        weights : {None, "bfloat16"}
            As in `freeze`.
        share : Stream or None
            Use the packed weights of another stream of this layer; otherwise the weights are packed here, as they are
            now: later changes of the parameters do not reach the stream.
        """
        return Stream(self, batch_size, weights, share)

    def _not_frozen(self, what: str) -> None:
        if self._frozen is not None:
            raise RuntimeError(f"{what}: the layer is frozen for inference, call unfreeze() first")

    def _draw(self, shape, p: float) -> NDArray:
        """Dropout factors: 0 with probability p, else 1/(1-p)."""
        return (self.rng.random(shape, np.float32) >= p).astype(self.dtype) * self.dtype.type(
            1 / (1 - p) if p < 1 else 0
        )

    def _draw_kept(self, shape, p: float) -> NDArray | None:
        """1 with probability p (the old value is kept), else 0."""
        return (self.rng.random(shape, np.float32) < p).astype(self.dtype) if p else None


class _Part:
    """One direction of one layer in training: its rows and what the backward pass needs of them."""

    def __init__(self, rows, panels, reverse, x, h, h_0, h_n, c_0, c_n):
        self.rows, self.panels, self.reverse, self.x, self.h = rows, panels, reverse, x, h
        self.h_0, self.h_n, self.c_0, self.c_n = h_0, h_n, c_0, c_n
        self.mask = self.keep_h = self.keep_c = self.gates = self.c = self.run = None

    def make(self, begin, end, h, h_0, h_n, c_0, c_n, tape):
        """A run over the steps begin..end that writes to h; with a tape it keeps gates and cells."""
        low, high = self.rows.bounds(begin, end)
        rows = self.rows if high - low == self.rows.R and end - begin == self.rows.T else self.rows.window(begin, end)
        panels, dtype = self.panels, h.dtype
        R, N, P, H = rows.R, h_0.shape[0], h_0.shape[1], panels.H
        c = gates = m = h_masked = h_0_masked = None
        if tape:
            gates = _engine.empty((R, panels.columns * H), dtype)
            c = _engine.empty((R, H), dtype) if c_0 is not None else None
        if panels.projects:
            m = _engine.empty((R if tape else N, H), dtype)
        if self.mask is not None:
            h_masked, h_0_masked = _engine.empty((R, P), dtype), h_0 * self.mask
        run = _engine.Run(
            rows, panels, self.reverse, self.x[low:high], h, h_0, h_n, c_0, c_n, c, gates, m, h_masked, h_0_masked,
            self.mask, None if self.keep_h is None else self.keep_h[low:high],
            None if self.keep_c is None else self.keep_c[low:high],
        )  # fmt: skip
        return run, gates, c

    def train(self, begin, end):
        self.run, self.gates, self.c = self.make(begin, end, self.h, self.h_0, self.h_n, self.c_0, self.c_n, True)
        return self.run

    def train_back(self, grads, suffix, dy, dh, dc, dx, add_dx):
        self.run.set_backward(grads, suffix, dy, dh, dc, dx, add_dx)
        return self.run

    def windows(self, every):
        """Windows of steps in the order in which the direction walks them."""
        windows = [(t, min(t + every, self.rows.T)) for t in range(0, self.rows.T, every)]
        return windows[::-1] if self.reverse else windows

    def skim(self, every, threads):
        """Forward that keeps the states before each window only."""
        self.states = []
        h, c = self.h_0, self.c_0
        for begin, end in self.windows(every):
            low, high = self.rows.bounds(begin, end)
            self.states.append((h, c))
            h_n, c_n = np.empty_like(self.h_n), None if c is None else np.empty_like(self.c_n)
            run, _, _ = self.make(begin, end, self.h[low:high], h, h_n, c, c_n, False)
            _engine.forward([run], threads)
            h, c = h_n, c_n
        self.h_n[...] = h
        if c is not None:
            self.c_n[...] = c

    def again(self, every, args, threads):
        """Backward, window by window, each computed again from the states before it."""
        grads, suffix, dy, dh, dc, dx, add_dx = args
        for begin, end in reversed(self.windows(every)):
            low, high = self.rows.bounds(begin, end)
            h, c = self.states.pop()
            h_n, c_n = np.empty_like(h), None if c is None else np.empty_like(c)
            run, _, _ = self.make(begin, end, _engine.empty((high - low, h.shape[1]), h.dtype), h, h_n, c, c_n, True)
            _engine.forward([run], threads)
            run.set_backward(grads, suffix, None if dy is None else dy[low:high], dh, dc,
                             None if dx is None else dx[low:high], add_dx)  # fmt: skip
            _engine.backward([run], threads)


class Tape:
    """What one `forward` leaves for one `backward`, and for a look inside.

    Arrays are time-major with a batch axis, zero past the lengths, and readable until `backward` uses the tape.
    """

    def __init__(self, layer: Layer, batch: _Batch, checkpoint_every: int | None) -> None:
        self._layer, self._batch = layer, batch
        self.checkpoint_every = checkpoint_every
        self.parts: list[list[_Part]] = []
        self.dropout: list[NDArray] = []
        self._used = False

    def __reduce__(self):
        raise TypeError("tape: belongs to one backward pass of this process and cannot be copied or pickled")

    def _check(self) -> None:
        if self._used:
            raise RuntimeError("tape: already used by a backward pass, run forward again")

    def _release(self) -> None:
        for parts in self.parts:
            for part in parts:
                part.__dict__.clear()
        self.dropout.clear()

    def _part(self, layer: int, reverse: bool) -> _Part:
        self._check()
        layer = _integer("layer", layer, 0)
        if layer >= self._layer.num_layers:
            raise ValueError(f"layer: expected less than {self._layer.num_layers}, got {layer}")
        if reverse and not self._layer.bidirectional:
            raise ValueError("reverse: expected False, the layer has one direction")
        return self.parts[layer][bool(reverse)]

    def _kept(self, layer: int, reverse: bool) -> _Part:
        part = self._part(layer, reverse)
        if self.checkpoint_every is not None:
            raise RuntimeError("tape: made with checkpoint_every, it keeps no gates and cells")
        return part

    def gates(self, layer: int = 0, reverse: bool = False) -> dict[str, NDArray]:
        """Gate name (LSTM i, f, g, o; GRU r, z, n; RNN h) to its activations, each of shape (T, N, H)."""
        part, H = self._kept(layer, reverse), self._layer.hidden_size
        names = _engine.GATES[self._layer._cell]
        shown = {"lstm": "ifgo", "rnn": "h"}.get(self._layer._cell, "rzn")
        return {
            name: self._batch.spread(None if part.gates is None else part.gates[:, i * H : (i + 1) * H], H)
            for name, i in ((name, names.index(name)) for name in shown)
        }

    def cells(self, layer: int = 0, reverse: bool = False) -> NDArray:
        """Cell states of an LSTM, shape (T, N, H)."""
        part = self._kept(layer, reverse)
        if self._layer._cell != "lstm":
            raise ValueError(f"tape: {type(self._layer).__name__} has no cell state")
        return self._batch.spread(part.c, self._layer.hidden_size)

    def hidden(self, layer: int = 0, reverse: bool = False) -> NDArray:
        """Hidden states, shape (T, N, P)."""
        return self._batch.spread(self._part(layer, reverse).h, self._layer._width)

    @property
    def masks(self) -> dict[str, Any]:
        """The masks that `forward` drew, as `fastlstm.reference.forward` takes them."""
        self._check()
        width = self._layer._width
        masks: dict[str, Any] = {"dropout": None, "recurrent": {}, "zoneout_h": {}, "zoneout_c": {}}
        if self.dropout:
            masks["dropout"] = [self._batch.spread(mask, self._layer._dirs * width) for mask in self.dropout]
        for layer, parts in enumerate(self.parts):
            for direction, part in enumerate(parts):
                if part.mask is not None:
                    masks["recurrent"][layer, direction] = self._batch.unsort(part.mask)
                if part.keep_h is not None:
                    masks["zoneout_h"][layer, direction] = self._batch.spread(part.keep_h, width)
                if part.keep_c is not None:
                    masks["zoneout_c"][layer, direction] = self._batch.spread(part.keep_c, self._layer.hidden_size)
        return masks


class _Batch:
    """A call's arguments, validated, as rows; and the way back."""

    def __init__(self, layer: Layer, x, state, lengths):
        self.layer = layer
        self.dtype = layer.dtype
        x = _real("x", x)
        self.single = x.ndim == 2
        names = "(N, T, D)" if layer.batch_first else "(T, N, D)"
        if x.ndim not in (2, 3) or x.shape[-1] != layer.input_size:
            raise ValueError(f"x: expected shape {names} or (T, D) with D = {layer.input_size}, got {x.shape}")
        if self.single:
            x = x[:, None]
        elif layer.batch_first:
            x = x.swapaxes(0, 1)
        self.T, self.N = x.shape[:2]
        if max(self.T, self.N) >= _MOST:  # an array of stride 0 can be as long; the sizes of all blocks stay exact
            raise ValueError(f"x: expected fewer than 2**40 steps and sequences, got {self.T} and {self.N}")
        self.order = self.index = None
        sizes = self._lengths(lengths)
        self.rows = _engine.Rows(self.T, self.N, sizes)
        if self.index is None:
            x = np.require(x, self.dtype, ("C", "A"))
            self.x = x.reshape(self.T * self.N, layer.input_size)
        else:
            self.x = _engine.empty((self.rows.R, x.shape[2]), self.dtype)
            self.x[...] = x[self.index]
        self.h_0, self.c_0 = self.enter_states(state, ("state", "h_0", "c_0"))

    def _lengths(self, lengths):
        """Sorted lengths; sets `order` (the batch position of row r) and `index` (steps, positions of all rows)."""
        if lengths is None:
            return None
        try:
            lengths = np.asarray(lengths)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"lengths: expected integers, got {_describe(lengths)} ({error})") from None
        if lengths.dtype.kind not in "iu" and lengths.size:
            raise TypeError(f"lengths: expected integers, got dtype {lengths.dtype}")
        if self.single and lengths.ndim == 0:
            lengths = lengths[None]
        if lengths.shape != (self.N,):
            raise ValueError(f"lengths: expected shape ({self.N},), got {lengths.shape}")
        if lengths.size and not (0 <= int(lengths.min()) and int(lengths.max()) <= self.T):
            bad = lengths[(lengths < 0) | (lengths > self.T)][0]
            raise ValueError(f"lengths: expected values from 0 to T = {self.T}, got {bad}")
        lengths = lengths.astype(np.intp)
        if (lengths == self.T).all():
            return None
        self.order = np.argsort(-lengths, kind="stable")
        lengths = lengths[self.order]
        steps, rows = np.nonzero(np.arange(self.T)[:, None] < lengths)
        self.index = steps, self.order[rows]
        return lengths

    def enter_states(self, state, names):
        """States (L, N, .) in the order of the rows, as fresh or read-only arrays; zeros for None."""
        layer = self.layer
        whole, *parts = names
        if layer._cell == "lstm":
            if state is None:
                state = None, None
            if not isinstance(state, (tuple, list)) or len(state) != 2:
                raise TypeError(f"{whole}: expected a pair ({', '.join(parts)}), got {_describe(state)}")
        else:
            if isinstance(state, (tuple, list)):
                raise TypeError(f"{whole}: expected the array {parts[0]}, got {_describe(state)}")
            state = (state,)
        out = []
        gradient = whole == "dstate"
        for value, name, width in zip(state, parts, (layer._width, layer.hidden_size), strict=False):
            shape = (layer.num_layers * layer._dirs, self.N, width)
            if value is None:
                out.append(np.zeros(shape, self.dtype))
                continue
            value = _real(name, value)
            expected = shape[::2] if self.single else shape
            if value.shape != expected:
                raise ValueError(f"{name}: expected shape {expected}, got {value.shape}")
            value = value.reshape(shape)
            if self.order is not None:
                value = value[:, self.order]
            out.append(
                np.array(value, self.dtype, order="C") if gradient else np.require(value, self.dtype, ("C", "A"))
            )
        return out[0], out[1] if len(out) == 2 else None

    def new_states(self):
        h_n = np.empty(self.h_0.shape, self.dtype)
        return h_n, None if self.c_0 is None else np.empty(self.c_0.shape, self.dtype)

    def copy_c(self):
        return None if self.c_0 is None else self.c_0.copy()

    def new(self, width):
        return _engine.empty((self.rows.R, width), self.dtype)

    def unsort(self, states):
        """(..., N, width) in the order of the batch."""
        if self.order is None:
            return states
        out = np.empty_like(states)
        out[..., self.order, :] = states
        return out

    def spread(self, rows, width):
        """Rows [R, width] as (T, N, width), zero past the lengths."""
        if rows is None:
            rows = np.empty((0, width), self.dtype)
        if self.index is None:
            return rows.reshape(self.T, self.N, width).copy()
        out = np.zeros((self.T, self.N, width), self.dtype)
        out[self.index] = rows
        return out

    def _outward(self, rows):
        """Rows as the caller's axes."""
        if self.index is None:
            y = rows.reshape(self.T, self.N, rows.shape[1])
        else:
            y = self.spread(rows, rows.shape[1])
        if self.single:
            return y[:, 0]
        return y.swapaxes(0, 1) if self.layer.batch_first else y

    def leave_states(self, h, c):
        states = [self.unsort(s)[:, 0] if self.single else self.unsort(s) for s in (h, c) if s is not None]
        return tuple(states) if len(states) == 2 else states[0]

    def leave(self, y, h_n, c_n):
        return self._outward(y), self.leave_states(h_n, c_n)

    def leave_x(self, dx):
        return self._outward(dx)

    def enter_y(self, dy):
        """Gradient of y as rows."""
        if dy is None:
            return None
        dy = _real("dy", dy)
        width = self.layer._dirs * self.layer._width
        shape = (self.T, self.N, width)
        if self.single:
            shape = (self.T, width)
        elif self.layer.batch_first:
            shape = (self.N, self.T, width)
        if dy.shape != shape:
            raise ValueError(f"dy: expected shape {shape}, got {dy.shape}")
        if self.single:
            dy = dy[:, None]
        elif self.layer.batch_first:
            dy = dy.swapaxes(0, 1)
        if self.index is None:
            return np.require(dy, self.dtype, ("C", "A")).reshape(self.T * self.N, width)
        return np.ascontiguousarray(dy[self.index], self.dtype)


class LSTM(Layer):
    r"""Long short-term memory.

    Parameters
    ----------
    input_size : int
        Features D of a step.
    hidden_size : int
        Units H.
    num_layers : int
        Layers on top of each other.
    bias : bool
        Whether the gates have biases; as in PyTorch there are two that add up.
    batch_first : bool
        x and y are (N, T, .) instead of (T, N, .); states are not affected.
    dropout : float
        Probability with which an output of a layer but the last is zeroed in `forward`.
    bidirectional : bool
        A second set of weights reads each sequence from its last valid step; y holds both side by side.
    proj_size : int
        If not 0, h is projected to this size (Sak 2014).
    activation : {"tanh", "relu", "softsign", "hard_tanh", "identity"}
        Of the candidate g and of the cell on its way out.
    recurrent_activation : {"sigmoid", "hard_sigmoid"}
        Of the gates: hard_sigmoid is relu6(x + 3) / 6, the choice of Keras 3 (ONNX's default is another line). A gate
        wants an activation that saturates at 0 and 1: it is a factor between "none" and "all", and only where it can
        rest on 1 does the cell keep its content over many steps; beyond 1 the cell would grow without bound.
    recurrent_dropout : float
        Variational dropout (Gal and Ghahramani 2016): one mask per sequence on h_{t-1} in the recurrent product.
    zoneout : (float, float)
        Probabilities with which an element of h and of c keeps its old value (Krueger 2017); at inference the
        expectation is used.
    init : {"pytorch", "orthogonal"}
        Uniform in +-1/sqrt(H), or Glorot for the input and orthogonal for the recurrent weights with zero biases.
    forget_bias : float or None
        Added to the forget gate's bias at initialisation (Jozefowicz 2015 found 1 to help).
    dtype : float32 or float64
    rng : int, numpy.random.Generator or None
        Source of the initial weights and of the masks.

    Notes
    -----
    Hochreiter and Schmidhuber 1997 with the forget gate of Gers 2000, in PyTorch's notation::

        i = sigmoid(W_ii x + b_ii + W_hi h + b_hi)        c = f * c + i * g
        f = sigmoid(W_if x + b_if + W_hf h + b_hf)        h = o * tanh(c)
        g = tanh(W_ig x + b_ig + W_hg h + b_hg)           h = W_hr h  (with proj_size)
        o = sigmoid(W_io x + b_io + W_ho h + b_ho)

    Names and shapes of the parameters are PyTorch's: weight_ih_l0 (4H, D), weight_hh_l0 (4H, P), bias_ih_l0 (4H),
    bias_hh_l0 (4H), weight_hr_l0 (P, H), gates in the order i, f, g, o, suffix _reverse for the second direction.

    Examples
    --------
    >>> import numpy as np, fastlstm
    >>> lstm = fastlstm.LSTM(3, 5, rng=0)
    >>> y, (h_n, c_n) = lstm(np.ones((7, 2, 3), np.float32))
    >>> y.shape, h_n.shape
    ((7, 2, 5), (1, 2, 5))
    """

    _cell = "lstm"

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, proj_size: int = 0, *, activation: str = "tanh",
        recurrent_activation: str = "sigmoid", recurrent_dropout: float = 0.0,
        zoneout: tuple[float, float] = (0.0, 0.0), init: str = "pytorch", forget_bias: float | None = None,
        dtype: DTypeLike = np.float32, rng: Any = None,
    ) -> None:  # fmt: skip
        if not isinstance(zoneout, (tuple, list)) or len(zoneout) != 2:
            raise TypeError(f"zoneout: expected a pair (h, c) of probabilities, got {zoneout!r}")
        zoneout = (_share("zoneout", zoneout[0]), _share("zoneout", zoneout[1]))
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size,
            activation=activation, recurrent_activation=recurrent_activation, recurrent_dropout=recurrent_dropout,
            zoneout=zoneout, init=init, forget_bias=forget_bias, dtype=dtype, rng=rng,
        )  # fmt: skip


class GRU(Layer):
    r"""Gated recurrent unit (Cho 2014).

    Parameters
    ----------
    reset_after : bool
        True: the reset gate acts after the recurrent product, as in PyTorch and cuDNN. False: before it, as first
        published (and ONNX's linear_before_reset=0); then bias_ih and bias_hh of every gate simply add up.
    zoneout : float
        Probability with which an element of h keeps its old value.

    The others are those of `LSTM`; the state is h alone.

    Notes
    -----
    In PyTorch's notation, gates in the order r, z, n::

        r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)
        z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
        n = tanh(W_in x + b_in + r * (W_hn h + b_hn))        reset_after=True
        n = tanh(W_in x + b_in + W_hn (r * h) + b_hn)        reset_after=False
        h = (1 - z) * n + z * h

    It differs from the LSTM in having no cell beside h and one gate less: what z keeps of h it takes from n, so keeping
    and writing add up to 1, and all of h is open to the outside at every step.
    """

    _cell = "gru"

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, *, reset_after: bool = True, activation: str = "tanh",
        recurrent_activation: str = "sigmoid", recurrent_dropout: float = 0.0, zoneout: float = 0.0,
        init: str = "pytorch", dtype: DTypeLike = np.float32, rng: Any = None,
    ) -> None:  # fmt: skip
        self.reset_after = _flag("reset_after", reset_after)
        self._cell = "gru" if reset_after else "gru_reset_before"
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0,
            activation=activation, recurrent_activation=recurrent_activation, recurrent_dropout=recurrent_dropout,
            zoneout=_share("zoneout", zoneout), init=init, forget_bias=None, dtype=dtype, rng=rng,
        )  # fmt: skip


class RNN(Layer):
    r"""Plain recurrent layer (Elman 1990): h = act(W_ih x + b_ih + W_hh h + b_hh).

    Parameters
    ----------
    nonlinearity : {"tanh", "relu"}

    The others are those of `GRU`; the state is h.
    """

    _cell = "rnn"
    _activations = ("tanh", "relu")

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, nonlinearity: str = "tanh", bias: bool = True,
        batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False, *,
        recurrent_dropout: float = 0.0, zoneout: float = 0.0, init: str = "pytorch", dtype: DTypeLike = np.float32,
        rng: Any = None,
    ) -> None:  # fmt: skip
        self.nonlinearity = _choice("nonlinearity", nonlinearity, self._activations)
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0,
            activation=nonlinearity, recurrent_activation="sigmoid", recurrent_dropout=recurrent_dropout,
            zoneout=_share("zoneout", zoneout), init=init, forget_bias=None, dtype=dtype, rng=rng,
        )  # fmt: skip


class Stream(_engine.Stepper):
    """Step by step inference: weights packed once, the state kept, nothing allocated per step but the result.

    Made by `Layer.stream`. The outputs are those of the whole sequence, to the bit. One thread at a time may use a
    stream; any number of streams may share one set of packed weights.
    """

    _layer: Layer
    _weights: str | None

    def __init__(self, layer: Layer, batch_size: int = 1, weights: str | None = None, share: Stream | None = None):
        if not isinstance(layer, Layer):
            raise TypeError(f"layer: expected an LSTM, GRU or RNN, got {type(layer).__name__}")
        if layer.bidirectional:
            raise ValueError("stream: the layer is bidirectional, its second direction starts at the end")
        self.batch_size = _integer("batch_size", batch_size, 1)
        _weight_type(layer.dtype, weights)
        if share is None:
            self._panels = layer._pack(weights)
        elif not isinstance(share, Stream) or share._layer is not layer:
            raise ValueError("share: expected a stream of this layer")
        elif weights != share._weights:
            raise ValueError(
                f"weights: expected those of the stream that is shared, {share._weights!r}, got {weights!r}"
            )
        else:
            self._panels = share._panels
        self._layer, self._weights = layer, weights
        keep = [
            np.full((self.batch_size, width), z, layer.dtype) if z else None
            for z, width in zip(layer._zoneout, (layer._width, layer.hidden_size), strict=True)
        ]
        super().__init__([self._panels[i, 0] for i in range(layer.num_layers)], self.batch_size, *keep)

    @property
    def state(self):
        """Copies of the states: (h, c) or h, as the layer takes and returns them. Can be set; None resets."""
        h, c = self.h.copy(), self.states[1].copy()
        return (h, c) if self._layer._cell == "lstm" else h

    @state.setter
    def state(self, state):
        shape = (0, self.batch_size, self._layer.input_size)
        x = np.empty(shape if not self._layer.batch_first else (shape[1], 0, shape[2]), self._layer.dtype)
        batch = _Batch(self._layer, x, state, None)
        self.h[...] = batch.h_0
        if batch.c_0 is not None:
            self.states[1][...] = batch.c_0

    def reset(self) -> None:
        """Set the states to zero."""
        self.state = None

    def _convert(self, x):
        """x as an array that the kernels can read, or an error that says what is wrong with it."""
        x = _real("x", x)
        shapes = [(self.batch_size, self.D)] + [(self.D,)] * (self.batch_size == 1)
        if x.shape not in shapes:
            raise ValueError(f"x: expected shape {' or '.join(map(str, shapes))}, got {x.shape}")
        return np.require(x, self._layer.dtype, ("C", "A"))


def _integer(name: str, value, least: int, most: int = 2**31 - 1) -> int:
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected an integer, got bool")
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {_describe(value)}") from None
    if not least <= value <= most:
        raise ValueError(f"{name}: expected an integer from {least} to {most}, got {value}")
    return value


def _flag(name: str, value) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {_describe(value)}")
    return bool(value)


def _share(name: str, value) -> float:
    """A probability."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {_describe(value)}")
    if not 0 <= float(value) <= 1:
        raise ValueError(f"{name}: expected a probability from 0 to 1, got {value}")
    return float(value)


def _choice(name: str, value, choices) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def _weight_type(dtype, weights):
    if weights is not None and not (isinstance(weights, str) and weights == "bfloat16"):
        raise ValueError(f"weights: expected None or 'bfloat16', got {weights!r}")
    if weights and dtype != np.float32:
        raise ValueError(f"weights: 'bfloat16' needs a float32 layer, got {dtype}")
    return weights


def _real(name: str, value) -> NDArray:
    """An array of real numbers."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected an array of numbers, got {_describe(value)} ({error})") from None
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name}: expected an array of real numbers, got dtype {array.dtype}")
    return array


def _describe(value) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__
