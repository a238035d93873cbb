"""Layers of unequal sizes on top of each other, with Linear between and after them, as one thing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from ._checks import one_array
from ._habits import Hints, hinted
from ._layer import Layer
from ._parameters import Views
from ._saved import save
from ._types import Array
from .nn import Linear
from .stream import Stream

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
        width = None
        for i, layer in enumerate(layers):
            if not isinstance(layer, Layer | Linear):
                raise TypeError(f"layers[{i}]: expected an LSTM, GRU, RNN or nn.Linear, got {type(layer).__name__}")
            if any(layer is other for other in layers[:i]):
                raise ValueError(f"layers[{i}]: expected each layer once")
            if layer.dtype != layers[0].dtype:
                raise ValueError(f"layers[{i}]: expected {layers[0].dtype}, as the first, got {layer.dtype}")
            size = layer.in_features if isinstance(layer, Linear) else layer.input_size
            if width is not None and size != width:
                raise ValueError(f"layers[{i}]: expected {width} inputs, what the layer before it gives, got {size}")
            width = layer.out_features if isinstance(layer, Linear) else layer._dirs * layer._width
        recurrent = [layer for layer in layers if isinstance(layer, Layer)]
        if not recurrent:
            raise ValueError("layers: expected at least one LSTM, GRU or RNN")
        if len({layer.batch_first for layer in recurrent}) > 1:
            raise ValueError("layers: expected the same batch_first in all of them")
        self.layers: tuple[Layer | Linear, ...] = tuple(layers)
        self._recurrent = recurrent

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
        for layer in self:
            layer.zero_grad()

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

    @hinted
    def __call__(
        self, x: ArrayLike, state: Sequence[Any] | None = None, lengths: ArrayLike | None = None
    ) -> tuple[Array, tuple[Any, ...]]:
        """Inference: keeps nothing. Arguments and results as in `Layer`, but for the state: see the class."""
        valid = self._valid(x, lengths)
        y, ends = x, []
        for layer, start in zip(self, self._states("state", state), strict=True):
            if isinstance(layer, Layer):
                y, end = layer(y, start, lengths)
                ends.append(end)
            else:
                y = _zero(layer(_zero(y, valid)), valid)
                ends.append(None)
        return np.asarray(y), tuple(ends)

    @hinted
    def forward(
        self, x: ArrayLike, state: Sequence[Any] | None = None, lengths: ArrayLike | None = None
    ) -> tuple[Array, tuple[Any, ...], StackTape]:
        """Training: also returns the tape that `backward` uses up. See `Layer.forward`."""
        valid = self._valid(x, lengths)
        tapes: list[Any] = []
        y: Any = x
        ends = []
        tape: Any
        for layer, start in zip(self, self._states("state", state), strict=True):
            if isinstance(layer, Layer):
                y, end, tape = layer.forward(y, start, lengths)
                ends.append(end)
            else:
                y, tape = layer.forward(_zero(y, valid))
                y = _zero(y, valid)
                ends.append(None)
            tapes.append(tape)
        return y, tuple(ends), StackTape(self, tapes, valid)

    @overload
    def backward(
        self, tape: StackTape, dy: ArrayLike | None, dstate: Sequence[Any] | None = None, *,
        need_dx: Literal[True] = True,
    ) -> tuple[Array, tuple[Any, ...]]: ...  # fmt: skip
    @overload
    def backward(
        self, tape: StackTape, dy: ArrayLike | None, dstate: Sequence[Any] | None = None, *, need_dx: Literal[False]
    ) -> tuple[None, tuple[Any, ...]]: ...
    @overload
    def backward(
        self, tape: StackTape, dy: ArrayLike | None, dstate: Sequence[Any] | None = None, *, need_dx: bool
    ) -> tuple[Array | None, tuple[Any, ...]]: ...

    def backward(
        self, tape: StackTape, dy: ArrayLike | None, dstate: Sequence[Any] | None = None, *, need_dx: bool = True
    ) -> tuple[Array | None, tuple[Any, ...]]:
        """Carry gradients back through all layers; adds to `grads`. See `Layer.backward`.

        An error or Ctrl-C amid uses up the tape; the layers that were done keep what was added.

        Returns
        -------
        dx : ndarray of x's shape, or None without need_dx
        dstate_0 : tuple
            Gradients of the initial states, an entry a layer.
        """
        if not isinstance(tape, StackTape):
            raise TypeError(f"tape: expected the StackTape that forward returned, got {type(tape).__name__}")
        if tape.stack is not self:
            raise ValueError("tape: it comes from another stack's forward")
        dstates = self._states("dstate", dstate)
        tapes, valid = tape.take(), tape.valid
        d: Any = dy
        starts: list[Any] = []
        for i in reversed(range(len(self))):
            layer = self.layers[i]
            if isinstance(layer, Layer):
                d, start = layer.backward(tapes[i], d, dstates[i], need_dx=need_dx or i > 0)
                starts.append(start)
            else:
                if d is None:
                    d = np.zeros((*tapes[i].shape[:-1], layer.out_features), layer.dtype)
                d = _zero(layer.backward(tapes[i], _zero(d, valid)), valid)
                starts.append(None)
        return (d if need_dx else None), tuple(starts[::-1])

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

    def _valid(self, x: ArrayLike, lengths: ArrayLike | None) -> NDArray[np.bool_] | None:
        """(T, N, 1) or (N, T, 1): before the lengths; a Linear must neither read nor write past them."""
        if all(isinstance(layer, Layer) for layer in self):
            return None
        one_array(x)
        if lengths is None:
            return None
        shape = np.shape(x)
        T = shape[1] if self.batch_first and len(shape) == 3 else shape[0]
        n = np.asarray(lengths)
        steps = np.arange(T)
        if len(shape) == 2:
            return (steps < n.reshape(-1)[:1])[:, None]
        valid = steps[:, None] < n.reshape(-1)
        return (valid.T if self.batch_first else valid)[:, :, None]


class StackTape:
    """What one `Stack.forward` leaves for one `Stack.backward`; ``tapes`` are those of the layers."""

    def __init__(self, stack: Stack, tapes: list[Any], valid: NDArray[np.bool_] | None) -> None:
        self.stack, self.valid = stack, valid
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
        self.batch_size = batch_size

    def step(self, x: ArrayLike, out: Array | None = None) -> Array:
        """One step: x of shape (batch_size, D), or (D,) for one sequence; returns y of the same form."""
        y: Any = x
        for part in self._parts:
            y = part.step(y) if isinstance(part, Stream) else part(y)
        if out is None:
            return np.asarray(y)
        if out.shape != y.shape or out.dtype != y.dtype:
            raise ValueError(f"out: expected {y.dtype} of shape {y.shape}, got {out.dtype} of shape {out.shape}")
        out[...] = y
        return out

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


def _zero(array: Any, valid: NDArray[np.bool_] | None) -> Any:
    return array if valid is None else np.where(valid, array, np.zeros((), np.asarray(array).dtype))
