"""Types that several modules speak of. They say what a call gives; nothing here runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeAlias

    from numpy.typing import ArrayLike, NDArray
    from typing_extensions import TypeVar

    from .engine import Panels

    Array: TypeAlias = NDArray[Any]
    # What a layer's states are, as it gives them and as it takes them: the LSTM's a pair, the sLSTM's four, else h.
    State = TypeVar("State", default=Any)
    StateLike = TypeVar("StateLike", default=Any)
    Pair: TypeAlias = tuple[Array, Array]
    Four: TypeAlias = tuple[Array, Array, Array, Array]
    Several: TypeAlias = Sequence[ArrayLike | None]
    One: TypeAlias = ArrayLike
    Packed: TypeAlias = dict[tuple[int, int, int], Panels]  # [layer, direction, head]
    # y, dy and dx of a call: an array, or a list of arrays if x is a list of sequences.
    Y = TypeVar("Y", default=Array)
else:  # numpy.typing costs a millisecond
    from typing import TypeVar

    Array = np.ndarray
    Pair = Four = Several = One = Any
    State, StateLike, Y = TypeVar("State"), TypeVar("StateLike"), TypeVar("Y")


class Steps(TypedDict, total=False):
    """Keyword arguments of a layer's call."""

    mask: ArrayLike | None
    resets: ArrayLike | None
    masked_output: str


class TrainedSteps(Steps, total=False):
    """And of its `forward`."""

    checkpoint_every: int | None
