"""A recurrent layer as a module, and modules one after the other on one flat buffer."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from .. import _checks
from .._habits import hinted
from .._layer import Layer
from .._parameters import Joined, Parameters
from .._types import Array
from .modules import Module


class Recurrent(Module):
    """A recurrent layer as a module: its outputs at all steps, or those of each sequence's last step.

    Parameters
    ----------
    layer : LSTM, GRU or RNN
    last : bool
        False: y as the layer gives it, (T, N, dirs*P). True: (N, dirs*P), the last layer's final hidden state, both
        directions side by side, which is what a classifier of whole sequences reads.
    """

    takes_lengths = True
    _FIXED = frozenset({"dtype", "layer"})

    def __init__(self, layer: Layer, last: bool = False) -> None:
        if not isinstance(layer, Layer):
            raise TypeError(f"layer: expected an LSTM, GRU or RNN, got {_checks.describe(layer)}")
        self.layer, self.last, self.dtype = layer, bool(last), layer.dtype
        self._parameters = layer._parameters

    @property
    def _gradients(self) -> Parameters:
        return self.layer._gradients

    def __repr__(self) -> str:
        return f"Recurrent({self.layer!r}, last={self.last})"

    @hinted
    def __call__(self, x: ArrayLike, lengths: ArrayLike | None = None) -> Array:
        """Inference: see `forward`."""
        y, state = self.layer(x, lengths=lengths)
        return self._final(state) if self.last else y

    @hinted
    def forward(self, x: ArrayLike, lengths: ArrayLike | None = None) -> tuple[Array, Any]:
        """Run the layer from zero states; x, lengths and the tape are those of the layer."""
        y, state, tape = self.layer.forward(x, lengths=lengths)
        return (self._final(state) if self.last else y), (tape, state)

    def backward(self, tape: Any, dy: ArrayLike, *, need_dx: bool = True) -> Array | None:
        """Add the layer's gradients; return dx of x's shape, or None without need_dx."""
        try:
            tape, state = tape
        except (TypeError, ValueError):
            raise TypeError(f"tape: expected the second result of forward, got {_checks.describe(tape)}") from None
        if not self.last:
            return self.layer.backward(tape, dy, need_dx=need_dx)[0]
        h = state[0] if isinstance(state, tuple) else state
        dirs = 2 if self.layer.bidirectional else 1
        dy = self._gradient(dy, (*h.shape[1:-1], dirs * h.shape[-1]))
        dh = np.zeros_like(h)
        dh[-dirs:] = np.moveaxis(dy.reshape(*dy.shape[:-1], dirs, h.shape[-1]), -2, 0)
        dstate = (dh, *[None] * (len(state) - 1)) if isinstance(state, tuple) else dh
        return self.layer.backward(tape, None, dstate, need_dx=need_dx)[0]

    def _describe(self) -> dict[str, Any]:
        return {"class": "Recurrent", "last": self.last, "layer": self.layer._describe()}

    def astype(self, dtype: DTypeLike) -> Recurrent:
        """A copy of another type, of the layer too."""
        return Recurrent(self.layer.astype(dtype), self.last)

    def _final(self, state: Any) -> Array:
        h = (state[0] if isinstance(state, tuple) else state)[-2 if self.layer.bidirectional else -1 :]
        return np.concatenate(list(h), axis=-1)

    def load_state_dict(self, d: Mapping[str, ArrayLike], prefix: str = "") -> None:
        """As the layer's."""
        self.layer.load_state_dict(d, prefix)


class Sequential(Module):
    """Modules one after the other, all their parameters in one flat buffer and all gradients in another.

    Parameters
    ----------
    modules : Module or recurrent layer
        A recurrent layer stands for ``Recurrent(layer)``. A module may occur twice: it then has one set of parameters.
        The parameters move into the common buffer, so arrays taken from ``params`` before are no longer theirs.

    Examples
    --------
    >>> import numpy as np, fastlstm
    >>> from fastlstm import nn
    >>> model = nn.Sequential(nn.Recurrent(fastlstm.LSTM(3, 8, rng=0), last=True), nn.Linear(8, 2, rng=0))
    >>> y, tape = model.forward(np.ones((5, 4, 3), np.float32), lengths=[5, 2, 3, 4])
    >>> y.shape, list(model.params)[-1]
    ((4, 2), '1.bias')
    """

    takes_lengths = True
    _FIXED = frozenset({"dtype", "modules"})

    def __init__(self, *modules: Module | Layer) -> None:
        if not modules:
            raise ValueError("modules: expected at least one, got none")
        self.modules: list[Module] = [Recurrent(m) if isinstance(m, Layer) else m for m in modules]
        for i, m in enumerate(self.modules):
            if not isinstance(m, Module):
                raise TypeError(f"modules[{i}]: expected a Module or a recurrent layer, got {_checks.describe(m)}")
            if m.dtype != self.modules[0].dtype:
                raise TypeError(f"modules[{i}]: expected dtype {self.modules[0].dtype}, as modules[0], got {m.dtype}")
        self.dtype = self.modules[0].dtype
        self._parameters = Joined(self._once("_parameters"))

    @functools.cached_property
    def _gradients(self) -> Joined:
        """Made when they are first wanted: inference has no use for them."""
        return Joined(self._once("_gradients"))

    def _once(self, which: str) -> dict[str, Parameters]:
        found: dict[int, tuple[str, Parameters]] = {}
        for i, m in enumerate(self.modules):
            parameters = getattr(m, which)
            found.setdefault(id(parameters), (str(i), parameters))
        return dict(found.values())

    def _describe(self) -> dict[str, Any]:
        parts = []
        for i, m in enumerate(self.modules):
            first = next(j for j, other in enumerate(self.modules) if other._parameters is m._parameters)
            if first < i and m is not self.modules[first]:
                raise ValueError(f"modules[{i}]: shares the parameters of modules[{first}] and is not the same module")
            parts.append({"same": first} if first < i else m._describe())
        return {"class": "Sequential", "modules": parts}

    def astype(self, dtype: DTypeLike) -> Sequential:
        """A copy of another type, of all modules."""
        copies = {id(m): m.astype(dtype) for m in self.modules}
        return Sequential(*(copies[id(m)] for m in self.modules))

    @property
    def flat_params(self) -> Array:
        """All parameters as one contiguous array."""
        flat: Array = self._whole(self._parameters).flat
        return flat

    @property
    def flat_grads(self) -> Array:
        """All gradients as one contiguous array of the layout of `flat_params`."""
        flat: Array = self._whole(self._gradients).flat
        return flat

    @staticmethod
    def _whole(joined: Any) -> Any:
        if not joined.whole:
            raise RuntimeError("Sequential: another Sequential has taken over a module of this one; use that one")
        return joined

    def __repr__(self) -> str:
        return f"Sequential({', '.join(map(repr, self.modules))})"

    def __len__(self) -> int:
        return len(self.modules)

    def __getitem__(self, index: int) -> Module:
        return self.modules[index]

    def __iter__(self) -> Iterator[Module]:
        return iter(self.modules)

    @hinted
    def __call__(self, x: ArrayLike, lengths: ArrayLike | None = None) -> Array:
        """Inference: each module in turn; lengths go to the recurrent layers."""
        self._refuse_list(x)
        y: Any = x
        m: Any  # whether it takes lengths is its own to say
        for m in self.modules:
            y = m(y, lengths) if m.takes_lengths else m(y)
        return y  # type: ignore[no-any-return]

    @hinted
    def forward(self, x: ArrayLike, lengths: ArrayLike | None = None) -> tuple[Array, list[Any]]:
        """Run the modules in turn; return the output and the list of their tapes."""
        self._whole(self._parameters)
        self._refuse_list(x)
        tapes = []
        y: Any = x
        m: Any
        for m in self.modules:
            y, tape = m.forward(y, lengths) if m.takes_lengths else m.forward(y)
            tapes.append(tape)
        return y, tapes

    def backward(self, tape: list[Any], dy: ArrayLike, *, need_dx: bool = True) -> Array | None:
        """Carry the gradient back through the modules; return dx, or None without need_dx."""
        if not isinstance(tape, list) or len(tape) != len(self.modules):
            raise TypeError(f"tape: expected the second result of forward, got {_checks.describe(tape)}")
        self._whole(self._parameters)
        self._gradients.refuse_read_only("flat_grads")  # before the last of the modules adds to its own
        # what stands before the first parameters needs no gradient of its own
        first = 0 if need_dx else next((i for i, m in enumerate(self.modules) if m.flat_params.size), len(tape))
        d: Any = dy
        for i in reversed(range(first, len(tape))):
            d = self.modules[i].backward(tape[i], d, need_dx=need_dx or i > first)
        return d if need_dx else None

    def _refuse_list(self, x: Any) -> None:
        """A list of sequences goes as far as the recurrent layers; one that gives last states ends it."""
        for m in self.modules:
            if isinstance(m, Recurrent) and m.last:
                return
            if not isinstance(m, Recurrent | Sequential):
                _checks.one_array(x)

    def load_state_dict(self, d: Mapping[str, ArrayLike], prefix: str = "") -> None:
        """Copy the parameters from ``d``, whose names begin with ``prefix``; on an error nothing has changed."""
        for m in self.modules:
            if isinstance(m, Recurrent) and m.layer._frozen is not None:
                raise RuntimeError("load_state_dict: a layer is frozen, call unfreeze() first")
        super().load_state_dict(d, prefix)

    def freeze(self, weights: str | None = None) -> Self:
        """Freeze the recurrent layers for inference, see `Layer.freeze`."""
        for m in self.modules:
            if isinstance(m, Sequential):
                m.freeze(weights)
            elif isinstance(m, Recurrent):
                m.layer.freeze(weights)
        return self

    def unfreeze(self) -> Self:
        """Undo `freeze`."""
        for m in self.modules:
            if isinstance(m, Sequential):
                m.unfreeze()
            elif isinstance(m, Recurrent):
                m.layer.unfreeze()
        return self
