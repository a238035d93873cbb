"""What all layers share: call, forward, backward."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, Generic, overload

import numpy as np

from . import _activations, _checks, _parameters, engine
from ._batch import Batch
from ._habits import mark_absent, no_argument
from ._parameters import Parameters
from ._types import State, StateLike, Y
from ._weights import Weights
from .stream import Stream
from .tape import Part, Tape
from .threads import threads_of_call

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Literal, Unpack

    from numpy.typing import ArrayLike, DTypeLike

    from ._types import Array, Packed, Steps, TrainedSteps

# Operations of a backward pass a thread and a byte of a vector, some 0.1 s: a longer one ends where a signal's handler
# raises, and keeps the gradients as they were.
_PATIENCE = 2e8


class Layer(Weights, Generic[State, StateLike]):
    """What all layers share; not for direct use."""

    # What the LSTM alone may choose.
    output_activation: _activations.Activation | None = None
    cell_clip: float | None = None
    proj_clip: float | None = None
    layer_norm_eps: float = 1e-5
    # The sLSTM's alone: heads that do not see each other.
    num_heads: int = 1
    forget_gate: str = "sigmoid"

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int, bias: bool, batch_first: bool, dropout: float,
        bidirectional: bool, proj_size: int, *, direction: str, activation: _activations.Activation,
        recurrent_activation: _activations.Activation, clip: float | None, recurrent_dropout: float, zoneout: Any,
        init: str, forget_bias: float | None, dtype: DTypeLike, rng: Any,
    ) -> None:  # fmt: skip
        self.input_size = _checks.integer("input_size", input_size, 1)
        self.hidden_size = _checks.integer("hidden_size", hidden_size, 1)
        self.num_layers = _checks.integer("num_layers", num_layers, 1, 2**16)
        self.bias, self.batch_first = _checks.flag("bias", bias), _checks.flag("batch_first", batch_first)
        self.bidirectional = _checks.flag("bidirectional", bidirectional)
        self.proj_size = _checks.integer("proj_size", proj_size, 0)
        if self.proj_size >= self.hidden_size:
            raise ValueError(f"proj_size: expected less than hidden_size ({hidden_size}), got {proj_size}")
        self.dropout, self.recurrent_dropout, self.zoneout = dropout, recurrent_dropout, zoneout
        self.activation = _activations.check("activation", activation, _activations.CANDIDATES)
        gates = _activations.GATES
        self.recurrent_activation = _activations.check("recurrent_activation", recurrent_activation, gates)
        self.clip = _checks.bound("clip", clip)
        self.dtype = _checks.float_type("dtype", dtype)
        self.init = _checks.choice("init", init, ("pytorch", "orthogonal", "zeros"))
        if forget_bias is not None:
            forget_bias = _checks.number("forget_bias", forget_bias, -math.inf)
            if not self.bias:
                raise ValueError("forget_bias: expected None with bias=False")
        self.forget_bias = forget_bias
        self.rng = rng
        self.direction = _checks.choice("direction", direction, ("forward", "reverse"))
        if self.bidirectional and direction == "reverse":
            raise ValueError("direction: expected 'forward' with bidirectional=True, which has both, got 'reverse'")
        self._directions = (False, True) if self.bidirectional else (direction == "reverse",)  # whether in reverse
        self._dirs = len(self._directions)
        self._width = self.proj_size or self.hidden_size
        check = self.__dict__.pop("_check", None)
        if check is not None:
            check(self._shapes())
        try:
            shapes = dict(self._shapes())
            self._parameters = Parameters(shapes, self.dtype)
            if check is None:
                gains = {name: float(gain) for name, gain in self._descriptor.vectors.items() if "_ln_" in name}
                _parameters.initialise(self._parameters, init, self.hidden_size, self.rng, gains, self.num_heads)
        except (MemoryError, ValueError) as error:
            sizes = f"input_size {input_size}, hidden_size {hidden_size}, num_layers {num_layers}"
            raise MemoryError(f"no memory for a layer of {sizes}: {error}") from None
        mark_absent(Weights, {name: f"layer.params[{name!r}] has it" for name in shapes if "_l0" in name})
        if forget_bias is not None and check is None:
            gates = self._descriptor.gates
            for _, _, suffix in self._suffixes():
                heads = self.params["bias_ih" + suffix].reshape(self.num_heads, len(gates), -1)
                heads[:, gates.index("f")] += forget_bias

    def _check_dropout(self, value: Any) -> float:
        if _checks.probability("dropout", value) and self.num_layers == 1:
            raise ValueError(f"dropout: acts between layers, expected 0 with num_layers=1, got {value}")
        return float(value)

    def _check_zoneout(self, value: Any) -> Any:
        return _checks.probability("zoneout", value)

    _CHECKED = {
        "dropout": _check_dropout,
        "recurrent_dropout": lambda self, value: _checks.probability("recurrent_dropout", value),
        "zoneout": lambda self, value: self._check_zoneout(value),
        "rng": lambda self, value: _checks.generator("rng", value),
    }

    # ---- calls ----

    _threads = staticmethod(threads_of_call)  # how many a call may use, asked when it starts

    @overload
    def __call__(
        self, x: list[Array], state: StateLike | None = None, lengths: None = None, **steps: Unpack[Steps]
    ) -> tuple[list[Array], State]: ...
    @overload
    def __call__(
        self, x: ArrayLike, state: StateLike | None = None, lengths: ArrayLike | None = None, **steps: Unpack[Steps]
    ) -> tuple[Array, State]: ...

    def __call__(
        self, x: Any, state: Any = None, lengths: ArrayLike | None = None, *, mask: ArrayLike | None = None,
        resets: ArrayLike | None = None, masked_output: str = "zero", **unknown: Any,
    ) -> tuple[Any, Any]:  # fmt: skip
        """Inference: keeps nothing, draws nothing. See `forward` for the arguments.

        Returns
        -------
        y : ndarray, shape (T, N, dirs*P)
        state : the last valid states, as `forward` takes them
        """
        if unknown:
            raise no_argument(self, Layer.__call__, unknown)
        engine.begin_call()
        return self._predict(Batch(self, x, state, lengths, mask, resets, masked_output))

    def _predict(self, batch: Batch) -> tuple[Any, Any]:
        """Inference over a batch. This, `_carry` and `_back` are the passes that fastlstm.torch runs too."""
        panels = self._frozen or self._pack()
        if batch.rows.R == 0:
            h, c = batch.h_0.copy(), None if batch.c_0 is None else batch.c_0.copy()
            return batch.leave_y(batch.new(self._dirs * self._width)), batch.leave_states(h, c)
        h_n, c_n = batch.new_states()
        y = batch.new(self._dirs * self._width)
        h, c, T = batch.h_0, batch.c_0, batch.rows.T
        for begin, end in self._windows(T, batch.rows.N):
            rows, source, target = batch.rows, batch.x, y
            if end - begin < T:
                rows, (low, high) = batch.rows.window(begin, end), batch.rows.bounds(begin, end)
                source, target = batch.x[low:high], y[low:high]
            for layer in range(self.num_layers):
                last = layer == self.num_layers - 1
                out = target if last else engine.empty((rows.R, y.shape[1]), self.dtype)
                self._infer(layer, rows, panels, source, out, h, c, h_n, c_n)
                source = out
            h, c = h_n, c_n
        return batch.leave_y(y), batch.leave_states(h_n, c_n)

    def _infer(
        self, layer: int, rows: engine.Rows, panels: Packed, x: Array, y: Array,
        h_0: Array, c_0: Array | None, h_n: Array, c_n: Array | None,
    ) -> None:  # fmt: skip
        """One layer without a tape; h_0 may be h_n."""
        of = self._of
        keep: Sequence[Array | None] = (None, None)
        if any(self._zoneout):
            keep = [
                np.broadcast_to(np.full(width, z, self.dtype), (rows.R, width)) if z else None
                for z, width in zip(self._zoneout, (self._head_width, self.hidden_size), strict=True)
            ]
        for head in range(self.num_heads):
            runs = []
            for d, reverse in enumerate(self._directions):
                i = layer * self._dirs + d
                start, panel = of(head, h_0, i), panels[layer, d, head]
                m = engine.empty((rows.N, self.hidden_size), self.dtype) if panel.projects else None
                runs.append(engine.Run(
                    rows, panel, reverse, x, self._part(y, d, head),
                    start if h_0 is not h_n else start.copy(), of(head, h_n, i), of(head, c_0, i), of(head, c_n, i),
                    None, None, m, None, None, None, *keep,
                ))  # fmt: skip
            engine.forward(runs, self._threads)

    @overload
    def forward(
        self, x: list[Array], state: StateLike | None = None, lengths: None = None, **steps: Unpack[TrainedSteps]
    ) -> tuple[list[Array], State, Tape[list[Array]]]: ...
    @overload
    def forward(
        self, x: ArrayLike, state: StateLike | None = None, lengths: ArrayLike | None = None,
        **steps: Unpack[TrainedSteps],
    ) -> tuple[Array, State, Tape]: ...  # fmt: skip

    def forward(
        self, x: Any, state: Any = None, lengths: ArrayLike | None = None, *, mask: ArrayLike | None = None,
        resets: ArrayLike | None = None, masked_output: str = "zero", checkpoint_every: int | None = None,
        **unknown: Any,
    ) -> tuple[Any, Any, Tape[Any]]:  # fmt: skip
        """Training: also returns the tape that `backward` uses up; draws dropout and zoneout masks from `rng`.

        Parameters
        ----------
        x : array_like, shape (T, N, D), (N, T, D) with batch_first, or (T, D) for one sequence
            Copied only if it is not time-major, C-contiguous, aligned and of the layer's dtype; otherwise the tape
            refers to it, so it must keep its values until `backward`. Or a list of sequences (T_i, D): y, and dy and dx
            of `backward`, are lists then. Values too large for the layer's dtype become infinite with what
            `numpy.errstate` says of an overflow, as in NumPy's own casts; so it is wherever numbers are given.
        state : None, or (h_0, c_0) for the LSTM, h_0 for GRU and RNN
            h_0 of shape (num_layers*dirs, N, P), c_0 (num_layers*dirs, N, H), layer by layer, forward before reverse;
            without N for one sequence. None: zeros. Held by the tape like x.
        lengths : None or array_like of int, shape (N,)
            Valid steps of each sequence, 0 to T in any order. Padding is never read; y is zero there.
        mask : None or array_like of bool or 0 and 1, shape (T, N), (N, T) with batch_first
            False: the step is skipped, as if it were not there, and not read; the states go past it.
        resets : None or array_like of bool or 0 and 1, of the same shape
            True: no state comes into this step from the one before, it starts from zero (a new episode, document).
            The second direction is cut between the same two steps.
        masked_output : {"zero", "last"}
            What y holds at steps that are not valid: zero, or the output of the last valid step before (for the second
            direction: after) it, as in Keras.
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
        if unknown:
            raise no_argument(self, Layer.forward, unknown)
        self._not_frozen("forward")
        if checkpoint_every is not None:
            checkpoint_every = _checks.integer("checkpoint_every", checkpoint_every, 1)
        engine.begin_call()
        batch = Batch(self, x, state, lengths, mask, resets, masked_output)
        tape: Tape[Any] = Tape(self, batch, checkpoint_every)
        y, h_n, c_n = self._carry(tape)
        return batch.leave_y(y), batch.leave_states(h_n, c_n), tape

    def _carry(self, tape: Tape[Any], out: Array | None = None) -> tuple[Array, Array, Array | None]:
        """Run a new tape forward: y as rows (in `out`, if given) and the last states.

        A filled tape has its memory from an earlier run: the arrays are laid out in it again, and nothing runs.
        """
        batch, panels, checkpoint_every = tape._batch, self._pack(), tape.checkpoint_every
        h_n, c_n = batch.new_states()
        source, R = batch.x, batch.rows.R
        for layer in range(self.num_layers):
            if layer and self.dropout:
                mask = self._draw((R, self._dirs * self._width), self.dropout)
                tape.dropout.append(mask)
                source = source * mask
            last = layer == self.num_layers - 1
            y = out if last else tape.empty((R, self._dirs * self._width), self.dtype)
            if y is None:  # the caller's result, not the tape's memory
                y = engine.empty((R, self._dirs * self._width), self.dtype)
            parts = self._parts(tape, panels, layer, source, y, h_n, c_n)
            tape.parts.append(parts)
            if R == 0:
                these = slice(layer * self._dirs, (layer + 1) * self._dirs)
                h_n[these] = batch.h_0[these]
                if c_n is not None and batch.c_0 is not None:
                    c_n[these] = batch.c_0[these]
            elif checkpoint_every is None:
                for head in zip(*parts, strict=True):
                    runs = [part.train(0, batch.rows.T) for part in head]
                    if not tape.filled:
                        engine.forward(runs, self._threads)
            else:
                for part in (part for direction in parts for part in direction):
                    part.skim(checkpoint_every, self._threads)
            source = y
        return source, h_n, c_n

    def _parts(
        self, tape: Tape[Any], panels: Packed, layer: int, x: Array, y: Array, h_n: Array, c_n: Array | None
    ) -> list[list[Part]]:
        """[direction][head] of one layer in training."""
        batch, of = tape._batch, self._of
        parts: list[list[Part]] = []
        kept_h, kept_c = self._zoneout
        for d, reverse in enumerate(self._directions):
            i = layer * self._dirs + d
            mask: Array | None = None
            if self.recurrent_dropout:
                draw = functools.partial(self._draw, p=self.recurrent_dropout)
                mask = batch.for_sequences(draw, self._width)[None]
            keep_h = self._draw_kept((batch.rows.R, self._width), kept_h)[None] if kept_h else None
            keep_c = self._draw_kept((batch.rows.R, self.hidden_size), kept_c) if kept_c else None
            heads = []
            for head in range(self.num_heads):
                part = Part(
                    tape.empty, batch.rows, panels[layer, d, head], reverse, x, self._part(y, d, head),
                    of(head, batch.h_0, i), of(head, h_n, i), of(head, batch.c_0, i), of(head, c_n, i),
                )  # fmt: skip
                if mask is not None or kept_h or kept_c:
                    part.mask, part.keep_h, part.keep_c = of(head, mask, 0), of(head, keep_h, 0), keep_c
                heads.append(part)
            parts.append(heads)
        return parts

    @overload
    def backward(
        self, tape: Tape[Y], dy: ArrayLike | None, dstate: StateLike | None = None, *, need_dx: Literal[True] = True
    ) -> tuple[Y, State]: ...
    @overload
    def backward(
        self, tape: Tape[Any], dy: ArrayLike | None, dstate: StateLike | None = None, *, need_dx: Literal[False]
    ) -> tuple[None, State]: ...
    @overload
    def backward(
        self, tape: Tape[Y], dy: ArrayLike | None, dstate: StateLike | None = None, *, need_dx: bool
    ) -> tuple[Y | None, State]: ...

    def backward(self, tape: Tape[Any], dy: Any, dstate: Any = None, *, need_dx: bool = True) -> tuple[Any, Any]:
        """Carry gradients back through the steps of a tape; adds the parameters' gradients to `grads`.

        Parameters
        ----------
        tape : Tape
            From this layer's `forward`; it is used up, unless there is an error: then the gradients are as they
            were, and the tape is good for another call. Ctrl-C (or a signal's handler that raises) ends a long call
            amid: the gradients are as they were, the tape is good for another call with `checkpoint_every` alone.
            It must come before the parameters change: a RuntimeError says that they did. (After few steps of few
            sequences of a large layer a sample of the values is compared, of every parameter: an optimiser's step and
            other weights are noticed, single values may not be.) As `grads` are added to, one thread at a time may be
            in `backward` of a layer: another gets a RuntimeError.
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
        if tape._parameters != self._parameters.fingerprint(tape._batch.rows.R):
            raise RuntimeError("tape: the parameters have changed since forward, the gradients would be wrong")
        self._gradients.refuse_read_only("flat_grads")
        return self._back(tape, dy, dstate, _checks.flag("need_dx", need_dx), self._gradients)

    def _back(self, tape: Tape[Any], dy: Any, dstate: Any, need_dx: bool, gradients: Parameters) -> tuple[Any, Any]:
        """The backward pass; adds to the given gradients."""
        engine.begin_call()
        batch, grads = tape._batch, gradients.flat
        threads: int | Callable[[], int] = self._threads
        dy = batch.enter_y(dy)
        dh, dc = batch.enter_states(dstate, "dstate")
        # A pass that computes windows again takes memory on its way; otherwise all is taken before the first product.
        watched = tape.checkpoint_every is not None or 4 * batch.rows.R * grads.size > _PATIENCE * engine.vector_bytes()
        saved = tape._begin(grads, watched)
        done: list[bool] = []
        try:
            todo = self._back_parts(tape, dy, dh, dc, need_dx, gradients.views)
            memory = None if tape.checkpoint_every else engine.workspace([run for _, _, runs in todo for run in runs])
            out = batch.rooms(self.input_size if need_dx else 0, dh, dc)
            if len(todo) > 2:  # no Python between two passes, where a signal's handler could come
                threads = self._threads()
            calls: list[Any] = []
            for layer, dx, runs in todo:
                if tape.checkpoint_every is not None:
                    calls += [(again, (threads,)) for again in runs]
                elif runs:
                    calls.append((engine.backward, (runs, threads, memory, watched)))
                if layer and self.dropout and not runs:  # the end of the layer
                    calls.append((np.multiply, (dx, tape.dropout[layer - 1], dx)))
            engine.in_turn(calls, watched, done)
        except BaseException:
            if done != [True]:  # else all is added
                tape._restore(grads, saved, bool(done))
            raise
        finally:
            tape._end(grads)
        tape._release()
        return None if dx is None else batch.leave(dx, out[0]), batch.leave_states(dh, dc, out[1:], "dstate")

    def _back_parts(
        self, tape: Tape[Any], dy: Array | None, dh: Array, dc: Array | None, need_dx: bool, grads: dict[str, Array]
    ) -> list[tuple[int, Array | None, list[Any]]]:
        """Per head of each layer, the last one first: the layer, its dx, and what computes it; at a layer's end
        nothing. The memory of the pass is taken here, so that no gradient has been touched if there is not enough."""
        R, of = tape._batch.rows.R, self._of
        between: list[Array] = []
        todo: list[tuple[int, Array | None, list[Any]]] = []
        for layer in reversed(range(self.num_layers)):
            dx = None
            if layer:  # two take turns
                if len(between) < 2:
                    between.append(engine.empty((R, self._dirs * self._width), self.dtype))
                dx = between[(self.num_layers - 1 - layer) % 2]
            elif need_dx:
                dx = engine.empty((R, self.input_size), self.dtype)
            for head in range(self.num_heads if R else 0):
                runs = []
                for d, heads in enumerate(tape.parts[layer]):
                    i, suffix = layer * self._dirs + d, f"_l{layer}" + "_reverse" * d
                    args = (
                        self._of_head(grads, suffix, head),
                        None if dy is None else self._part(dy, d, head), of(head, dh, i), of(head, dc, i), dx,
                        d == 1 or head > 0,
                    )  # fmt: skip
                    part, every = heads[head], tape.checkpoint_every
                    runs.append(part.train_back(args) if every is None else part.later_back(every, args))
                todo.append((layer, dx, runs))
            todo.append((layer, dx, []))
            dy = dx
        return todo

    def stream(
        self, batch_size: int = 1, *, weights: str | None = None, share: Stream[State, StateLike] | None = None
    ) -> Stream[State, StateLike]:
        """Step by step inference with a state that is kept. See `Stream`.

        Parameters
        ----------
        batch_size : int
            Sequences that step together.
        weights : {None, "bfloat16", "int8"}
            As in `freeze`. A stream of a frozen layer uses the weights that it was frozen with, and gives its numbers.
        share : Stream or None
            Use the packed weights of another stream of this layer; otherwise the weights are packed here, as they are
            now: later changes of the parameters do not reach the stream.
        """
        return Stream(self, batch_size, weights, share)
