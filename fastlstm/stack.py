"""Layers of unequal sizes on top of each other, with Linear between and after them, as one thing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from . import _checks, sequences
from ._batch import check_masked_output, steps_beside
from ._habits import Hints, no_argument
from ._layer import Layer
from ._parameters import Views
from ._saved import save
from ._types import Array, Steps, TrainedSteps, Y
from .nn import Linear
from .stream import Stream

if TYPE_CHECKING:
    from typing import Unpack

__all__ = ["Stack", "StackStream", "StackTape"]


class Stack(Hints):
    """Layers that feed each other: called, trained, streamed, saved and loaded as one.

    Parameters
    ----------
    layers : sequence of LSTM, GRU, RNN and nn.Linear
        Each reads what the one before it gives; of one dtype, and of one ``batch_first``. They are held, not copied.

    Attributes
    ----------
    layers : tuple
        The same as indexing and iterating: ``nn.Adam(stack)`` and ``nn.clip_grad_norm(stack, 1.0)`` take a stack as
        they take a list of layers.
    params, grads : dict of str to ndarray
        The layers' arrays, under their place and a dot: "0.weight_ih_l0", "1.weight", as in a torch.nn.Sequential.

    Notes
    -----
    The state is a tuple with an entry a layer: what that layer takes and returns, None for a Linear.

    Steps that are not valid (past the lengths, left out by the mask) are valid for no layer. A Linear neither reads nor
    gives anything there: y is zero, also where the Linear has a bias. With ``masked_output="last"`` the last recurrent
    layer holds its output, and a Linear after it makes of that what it makes of any other; y is zero where nothing is
    held yet.

    Examples
    --------
    >>> import numpy as np, fastlstm
    >>> stack = fastlstm.Stack([fastlstm.LSTM(3, 8), fastlstm.GRU(8, 5), fastlstm.nn.Linear(5, 2)])
    >>> y, state = stack(np.ones((7, 4, 3), np.float32))
    >>> y.shape
    (7, 4, 2)
    """

    _FIXED = frozenset({"layers"})

    def __init__(self, layers: Sequence[Layer | Linear]) -> None:
        if not isinstance(layers, list | tuple) or not layers:
            raise TypeError(f"layers: expected a list of at least one layer, got {type(layers).__name__}")
        width = 0
        for i, layer in enumerate(layers):
            if not isinstance(layer, Layer | Linear):
                raise TypeError(f"layers[{i}]: expected an LSTM, GRU, RNN or nn.Linear, got {type(layer).__name__}")
            if any(layer is other for other in layers[:i]):
                raise ValueError(f"layers[{i}]: expected each layer once")
            if layer.dtype != layers[0].dtype:
                raise ValueError(f"layers[{i}]: expected {layers[0].dtype}, as the first, got {layer.dtype}")
            size = layer.in_features if isinstance(layer, Linear) else layer.input_size
            if i and size != width:
                raise ValueError(f"layers[{i}]: expected {width} inputs, what the layer before it gives, got {size}")
            width = layer.out_features if isinstance(layer, Linear) else layer._dirs * layer._width
        recurrent = [layer for layer in layers if isinstance(layer, Layer)]
        if not recurrent:
            raise ValueError("layers: expected at least one LSTM, GRU or RNN")
        if len({layer.batch_first for layer in recurrent}) > 1:
            raise ValueError("layers: expected the same batch_first in all of them")
        self.layers: tuple[Layer | Linear, ...] = tuple(layers)
        self._recurrent, self._width = recurrent, width
        self._last = max(i for i, layer in enumerate(layers) if isinstance(layer, Layer))  # the last recurrent one

    # ---- a sequence of layers ----

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Layer | Linear]:
        return iter(self.layers)

    def __getitem__(self, i: int) -> Layer | Linear:
        return self.layers[i]

    def __repr__(self) -> str:
        return "Stack([" + ", ".join(map(repr, self.layers)) + "])"

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.layers[0].dtype

    @property
    def batch_first(self) -> bool:
        return self._recurrent[0].batch_first

    # ---- parameters ----

    @property
    def params(self) -> dict[str, Array]:
        return Views({f"{i}.{name}": view for i, layer in enumerate(self) for name, view in layer.params.items()})

    @property
    def grads(self) -> dict[str, Array]:
        return Views({f"{i}.{name}": view for i, layer in enumerate(self) for name, view in layer.grads.items()})

    @property
    def num_params(self) -> int:
        """Number of parameters of all layers."""
        return sum(layer.flat_params.size for layer in self)

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        self._refuse_read_only()
        for layer in self:
            layer.zero_grad()

    def _refuse_read_only(self) -> None:
        """Before the gradients of any layer change."""
        for i, layer in enumerate(self):
            layer._gradients.refuse_read_only(f"layers[{i}]: flat_grads")

    def state_dict(self) -> dict[str, Array]:
        """Copies of the parameters."""
        return {name: view.copy() for name, view in self.params.items()}

    def load_state_dict(self, d: Mapping[str, ArrayLike], prefix: str = "") -> None:
        """Copy parameters from a mapping with the names of `params`; on an error nothing has changed."""
        before = self.state_dict()
        if isinstance(d, Mapping) and (strange := [key for key in d if not self._mine(key, prefix)]) and not prefix:
            raise ValueError(f"load_state_dict: unexpected keys {strange}")
        try:
            for i, layer in enumerate(self):
                layer.load_state_dict(d, f"{prefix}{i}.")
        except BaseException:
            for name, view in self.params.items():
                if view.flags.writeable:
                    view[...] = before[name]
            raise

    def _mine(self, key: Any, prefix: str) -> bool:
        return isinstance(key, str) and any(key.startswith(f"{prefix}{i}.") for i in range(len(self)))

    def freeze(self, weights: str | None = None) -> Stack:
        """`Layer.freeze` of the recurrent layers."""
        for layer in self._recurrent:
            layer.freeze(weights)
        return self

    def unfreeze(self) -> Stack:
        """Undo `freeze`."""
        for layer in self._recurrent:
            layer.unfreeze()
        return self

    def astype(self, dtype: DTypeLike) -> Stack:
        """A copy of another type."""
        return Stack([layer.astype(dtype) for layer in self])

    def _describe(self) -> dict[str, Any]:
        return {"class": "Stack", "layers": [layer._describe() for layer in self.layers]}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the stack to a file, see `fastlstm.files.save`."""
        save(self, path)

    # ---- calls ----

    @overload
    def __call__(
        self, x: list[Array], state: Sequence[Any] | None = None, lengths: None = None, **steps: Unpack[Steps]
    ) -> tuple[list[Array], tuple[Any, ...]]: ...
    @overload
    def __call__(
        self, x: ArrayLike, state: Sequence[Any] | None = None, lengths: ArrayLike | None = None,
        **steps: Unpack[Steps],
    ) -> tuple[Array, tuple[Any, ...]]: ...  # fmt: skip

    def __call__(
        self, x: Any, state: Sequence[Any] | None = None, lengths: ArrayLike | None = None, *,
        mask: ArrayLike | None = None, resets: ArrayLike | None = None, masked_output: str = "zero", **unknown: Any,
    ) -> tuple[Any, tuple[Any, ...]]:  # fmt: skip
        """Inference: keeps nothing. Arguments and results as in `Layer`, but for the state: see the class."""
        if unknown:
            raise no_argument(self, Stack.__call__, unknown)
        call = _Call(self, x, lengths, mask, resets, masked_output)
        y, ends = call.x, []
        for i, start in enumerate(self._states("state", state)):
            layer = self.layers[i]
            if isinstance(layer, Layer):
                y, end = layer(y, start, **call.steps[i])
                ends.append(end)
            else:
                y = _zero(layer(_zero(y, call.there[i])), call.there[i])
                ends.append(None)
        return call.leave(y), tuple(ends)

    @overload
    def forward(
        self, x: list[Array], state: Sequence[Any] | None = None, lengths: None = None, **steps: Unpack[TrainedSteps]
    ) -> tuple[list[Array], tuple[Any, ...], StackTape[list[Array]]]: ...
    @overload
    def forward(
        self, x: ArrayLike, state: Sequence[Any] | None = None, lengths: ArrayLike | None = None,
        **steps: Unpack[TrainedSteps],
    ) -> tuple[Array, tuple[Any, ...], StackTape]: ...  # fmt: skip

    def forward(
        self, x: Any, state: Sequence[Any] | None = None, lengths: ArrayLike | None = None, *,
        mask: ArrayLike | None = None, resets: ArrayLike | None = None, masked_output: str = "zero",
        checkpoint_every: int | None = None, **unknown: Any,
    ) -> tuple[Any, tuple[Any, ...], StackTape[Any]]:  # fmt: skip
        """Training: also returns the tape that `backward` uses up. See `Layer.forward`."""
        if unknown:
            raise no_argument(self, Stack.forward, unknown)
        call = _Call(self, x, lengths, mask, resets, masked_output)
        tapes: list[Any] = []
        y, ends, tape = call.x, [], None
        for i, start in enumerate(self._states("state", state)):
            layer = self.layers[i]
            if isinstance(layer, Layer):
                y, end, tape = layer.forward(y, start, **call.steps[i], checkpoint_every=checkpoint_every)
                ends.append(end)
            else:
                y, tape = layer.forward(_zero(y, call.there[i]))
                y = _zero(y, call.there[i])
                ends.append(None)
            tapes.append(tape)
        return call.leave(y), tuple(ends), StackTape(self, tapes, call)

    @overload
    def backward(
        self,
        tape: StackTape[Y],
        dy: ArrayLike | None,
        dstate: Sequence[Any] | None = None,
        *,
        need_dx: Literal[True] = True,
    ) -> tuple[Y, tuple[Any, ...]]: ...
    @overload
    def backward(
        self,
        tape: StackTape[Any],
        dy: ArrayLike | None,
        dstate: Sequence[Any] | None = None,
        *,
        need_dx: Literal[False],
    ) -> tuple[None, tuple[Any, ...]]: ...
    @overload
    def backward(
        self, tape: StackTape[Y], dy: ArrayLike | None, dstate: Sequence[Any] | None = None, *, need_dx: bool
    ) -> tuple[Y | None, tuple[Any, ...]]: ...

    def backward(
        self, tape: StackTape[Any], dy: Any, dstate: Sequence[Any] | None = None, *, need_dx: bool = True
    ) -> tuple[Any, tuple[Any, ...]]:
        """Carry gradients back through all layers; adds to `grads`. See `Layer.backward`.

        An error or Ctrl-C amid uses up the tape; the layers that were done keep what was added.

        Returns
        -------
        dx : ndarray of x's shape (a list of them, if x was one), or None without need_dx
        dstate_0 : tuple
            Gradients of the initial states, an entry a layer.
        """
        if not isinstance(tape, StackTape):
            raise TypeError(f"tape: expected the StackTape that forward returned, got {type(tape).__name__}")
        if tape.stack is not self:
            raise ValueError("tape: it comes from another stack's forward")
        dstates = self._states("dstate", dstate)
        call = tape._call
        d = call.enter_y(dy, self._width, self.dtype)
        self._refuse_read_only()
        tapes = tape.take()
        starts: list[Any] = []
        for i in reversed(range(len(self))):
            layer = self.layers[i]
            if isinstance(layer, Layer):
                d, start = layer.backward(tapes[i], d, dstates[i], need_dx=need_dx or i > 0)
                starts.append(start)
            else:
                if d is None:
                    d = np.zeros((*tapes[i].shape[:-1], layer.out_features), layer.dtype)
                d = layer.backward(tapes[i], _zero(d, call.there[i]))
                starts.append(None)
        return (call.leave(d) if need_dx else None), tuple(starts[::-1])

    def stream(self, batch_size: int = 1, *, weights: str | None = None) -> StackStream:
        """Step by step inference with a state that is kept, for layers of one direction. See `Layer.stream`."""
        return StackStream(self, batch_size, weights)

    def _states(self, name: str, state: Sequence[Any] | None) -> Sequence[Any]:
        if state is None:
            return [None] * len(self)
        if not isinstance(state, tuple | list) or len(state) != len(self):
            raise TypeError(f"{name}: expected a tuple of {len(self)}, an entry a layer, got {type(state).__name__}"
                            + (f" of {len(state)}" if isinstance(state, tuple | list) else ""))  # fmt: skip
        for i, (layer, part) in enumerate(zip(self, state, strict=True)):
            if isinstance(layer, Linear) and part is not None:
                raise TypeError(f"{name}[{i}]: expected None, a Linear has no state, got {type(part).__name__}")
        return state


class _Call:
    """What a call brings beside the states: x as one array, and which steps there are.

    steps: for each recurrent layer its arguments. there: for each Linear the steps at which it reads and writes, None
    for all.
    """

    def __init__(
        self, stack: Stack, x: Any, lengths: ArrayLike | None, mask: ArrayLike | None, resets: ArrayLike | None,
        masked_output: str,
    ) -> None:  # fmt: skip
        check_masked_output(masked_output)
        self.batch_first, self.lengths = stack.batch_first, None
        if sequences.is_list(x):
            x, lengths = sequences.enter(x, stack.dtype, lengths=lengths, mask=mask, resets=resets)
            x, self.lengths = x.swapaxes(0, 1) if stack.batch_first else x, lengths
        steps = {"lengths": lengths, "mask": mask, "resets": resets}
        last = stack._last
        self.steps: list[dict[str, Any]] = [steps] * last + [steps | {"masked_output": masked_output}]
        self.there: list[NDArray[np.bool_] | None] = [None] * len(stack)
        if len(stack._recurrent) < len(stack) and not (lengths is None and mask is None):
            x = _checks.numbers_of("x", x)
            valid: NDArray[np.bool_] | None = steps_beside(x.shape, stack.batch_first, lengths, mask)
            held = valid
            if masked_output == "last":
                directions = stack._recurrent[-1]._directions
                held = steps_beside(x.shape, stack.batch_first, lengths, mask, directions)
            self.there = [valid] * last + [held] * (len(stack) - last)
        self.x = x

    def leave(self, y: Any) -> Any:
        """y, or dx, as the caller gave x."""
        return y if self.lengths is None else sequences.unpad(y, self.lengths, batch_first=self.batch_first)

    def enter_y(self, dy: Any, width: int, dtype: np.dtype[Any]) -> Any:
        """dy as one array."""
        if self.lengths is None or dy is None:
            return dy
        dy = sequences.enter_y(dy, self.lengths, width, dtype)
        return dy.swapaxes(0, 1) if self.batch_first else dy


class StackTape(Generic[Y]):
    """What one `Stack.forward` leaves for one `Stack.backward`; ``tapes`` are those of the layers."""

    def __init__(self, stack: Stack, tapes: list[Any], call: _Call) -> None:
        self.stack, self._call = stack, call
        self.tapes: list[Any] | None = tapes

    def take(self) -> list[Any]:
        """The layers' tapes, once."""
        if self.tapes is None:
            raise RuntimeError("tape: already used by a backward pass, run forward again")
        tapes, self.tapes = self.tapes, None
        return tapes

    def __reduce__(self) -> Any:
        raise TypeError("tape: belongs to one backward pass of this process and cannot be copied or pickled")


class StackStream:
    """Step by step inference through a stack. Made by `Stack.stream`."""

    def __init__(self, stack: Stack, batch_size: int = 1, weights: str | None = None) -> None:
        self.stack = stack
        self._parts: list[Stream | Linear] = [
            layer.stream(batch_size, weights=weights) if isinstance(layer, Layer) else layer for layer in stack
        ]
        self.batch_size, self._dtype, self._width = batch_size, stack.dtype, (stack._width,)
        *self._before, self._final = (
            part.step if isinstance(part, Stream) else _step_of(part, checked=i > 0)
            for i, part in enumerate(self._parts)
        )

    def step(self, x: ArrayLike, out: Array | None = None, reset: ArrayLike | None = None) -> Array:
        """One step: x of shape (batch_size, D), or (D,) for one sequence; returns y of the same form.

        out takes the result. reset: True where a sequence starts anew, as in `Stream.step`.
        """
        if out is not None:  # before any layer has made its step
            shape = (getattr(x, "shape", None) or np.shape(x))[:-1] + self._width
            if out.shape != shape or out.dtype != self._dtype:
                raise ValueError(f"out: expected {self._dtype} of shape {shape}, got {out.dtype} of shape {out.shape}")
        y: Any = x
        for step in self._before:
            y = step(y, None, reset)
        result: Array = self._final(y, out, reset)
        return result

    @property
    def state(self) -> tuple[Any, ...]:
        """Copies of the states, an entry a layer. Can be set; None resets."""
        return tuple(part.state if isinstance(part, Stream) else None for part in self._parts)

    @state.setter
    def state(self, state: Sequence[Any] | None) -> None:
        before = self.state
        try:
            for part, value in zip(self._parts, self.stack._states("state", state), strict=True):
                if isinstance(part, Stream):
                    part.state = value
        except BaseException:
            for part, value in zip(self._parts, before, strict=True):
                if isinstance(part, Stream):
                    part.state = value
            raise

    def reset(self) -> None:
        """Set the states to zero."""
        self.state = None


def _step_of(layer: Linear, checked: bool) -> Callable[..., Array]:
    """A Linear as a stream's step. checked: x is what a layer of the stack gave."""
    weight, bias = layer.params["weight"].T, layer.params.get("bias")

    def step(x: Any, out: Array | None = None, reset: ArrayLike | None = None) -> Array:
        x = x if checked else layer._features(x, layer.in_features)
        y: Array = (x if x.ndim > 1 else x[None]) @ weight
        if bias is not None:
            y += bias
        y = y if x.ndim > 1 else y[0]
        if out is None:
            return y
        out[...] = y
        return out

    return step


def _zero(array: Any, valid: NDArray[np.bool_] | None) -> Any:
    return array if valid is None else np.where(valid, array, np.zeros((), np.asarray(array).dtype))
