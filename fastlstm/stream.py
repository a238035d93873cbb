"""Step by step inference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic

import numpy as np

from . import _checks, engine
from ._batch import Batch
from ._types import State, StateLike

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ._layer import Layer
    from ._types import Array


class Stream(engine.Stepper, Generic[State, StateLike]):
    """Step by step inference: weights packed once, the state kept, nothing allocated per step but the result.

    Made by `Layer.stream`. The outputs are those of the whole sequence, to the bit. One thread at a time may use a
    stream; any number of streams may share one set of packed weights. A step of more than about a millisecond is shared
    by the threads of a call.
    """

    _layer: Layer[State, StateLike]
    _weights: str | None

    def __init__(
        self, layer: Layer[State, StateLike], batch_size: int = 1, weights: str | None = None,
        share: Stream[State, StateLike] | None = None,
    ) -> None:  # fmt: skip
        if not hasattr(layer, "_pack"):
            raise TypeError(f"layer: expected an LSTM, GRU or RNN, got {type(layer).__name__}")
        if layer.direction == "reverse":
            raise ValueError("stream: the layer's direction is 'reverse', it starts at the end")
        if layer.bidirectional:
            raise ValueError("stream: the layer is bidirectional, its second direction starts at the end")
        batch_size = _checks.integer("batch_size", batch_size, 1)
        _checks.weight_type(layer.dtype, weights)
        frozen = layer._frozen  # once: another thread may unfreeze the layer
        if weights not in (None, layer._frozen_weights):
            frozen = None
        if frozen is not None and share is None:
            weights, self._panels = layer._frozen_weights, frozen
        elif share is None:
            self._panels = {place: panel.pack() for place, panel in layer._pack(weights).items()}
        elif not isinstance(share, Stream) or share._layer is not layer:
            raise ValueError("share: expected a stream of this layer")
        elif weights != share._weights and not (frozen is not None and share._weights == layer._frozen_weights):
            raise ValueError(
                f"weights: expected those of the stream that is shared, {share._weights!r}, got {weights!r}"
            )
        else:
            self._panels = share._panels
        self._layer, self._weights = layer, weights if share is None else share._weights
        keep_h, keep_c = [
            np.full((batch_size, width), z, layer.dtype) if z else None
            for z, width in zip(layer._zoneout, (layer._head_width, layer.hidden_size), strict=True)
        ]
        heads = [[self._panels[i, 0, head] for head in range(layer.num_heads)] for i in range(layer.num_layers)]
        super().__init__(heads, batch_size, keep_h, keep_c, layer._threads)

    def __reduce__(self) -> Any:
        raise TypeError("stream: its packed weights belong to this process, it cannot be copied or pickled; make "
                        "another by layer.stream(batch_size) and set its state")  # fmt: skip

    @property
    def batch_size(self) -> int:
        """Sequences that step together."""
        return self.N

    @property
    def state(self) -> State:
        """Copies of the states: (h, c) or h, as the layer takes and returns them. Can be set; None resets."""
        h, c = self.copy_states()
        state: State = self._batch().leave_states(h, c if c.size else None)
        return state

    @state.setter
    def state(self, state: StateLike | None) -> None:
        taken: Any = state
        if self.N == 1:  # also what a call with one sequence gave, without the axis of the batch
            given = [_checks.array_of("state", part, "an array")[:, None] if np.ndim(part) == 2 else part
                     for part in (taken if isinstance(taken, (tuple, list)) else (taken,))]  # fmt: skip
            taken = tuple(given) if isinstance(taken, (tuple, list)) else given[0]
        batch = self._batch(taken)
        self.put_states(batch.h_0, self.states[1] if batch.c_0 is None else batch.c_0)

    def _batch(self, state: Any = None) -> Batch:
        """Sequences of no steps, which have states."""
        shape = (0, self.batch_size, self._layer.input_size)
        if self._layer.batch_first:
            shape = (self.batch_size, 0, self._layer.input_size)
        return Batch(self._layer, np.empty(shape, self._layer.dtype), state, None)

    def reset(self) -> None:
        """Set the states to zero."""
        self.state = None

    def _who(self, reset: ArrayLike) -> Array:
        """The sequences that start anew."""
        reset = _checks.flags_of("reset", reset)
        if reset.shape == (self.batch_size, 1):
            reset = reset[:, 0]
        return _checks.shaped("reset", reset, (self.batch_size,))

    def _convert(self, x: ArrayLike) -> Array:
        """x as an array that the kernels can read, or an error that says what is wrong with it."""
        x = _checks.numbers_of("x", x)
        shapes = [(self.batch_size, self.D)] + [(self.D,)] * (self.batch_size == 1)
        if x.shape not in shapes:
            raise ValueError(f"x: expected shape {' or '.join(map(str, shapes))}, got {x.shape}")
        return np.require(x, self.h.dtype, ("C", "A"))
