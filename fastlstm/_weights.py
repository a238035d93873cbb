"""A layer's parameters and gradients: names, shapes, packing, freezing."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from . import _activations, _checks, engine
from ._parameters import Holder, Parameters

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike

    from ._types import Array, Packed

# Rows of a window of steps in which stacked layers run in turn at inference, so that no whole sequence lies between
# them: enough that the calls per window (tens of microseconds) do not count.
_WINDOW = 4096


class Weights(Holder):
    """The part of a layer that holds its parameters; not for direct use."""

    _cell = ""
    _parameters: Parameters
    input_size: int
    hidden_size: int
    num_layers: int
    proj_size: int
    num_heads: int
    bias: bool
    batch_first: bool
    bidirectional: bool
    dropout: float
    recurrent_dropout: float
    zoneout: Any  # a number, the LSTM's a pair
    direction: str
    activation: _activations.Activation
    output_activation: _activations.Activation | None
    recurrent_activation: _activations.Activation
    clip: float | None
    cell_clip: float | None
    proj_clip: float | None
    layer_norm_eps: float
    init: str
    forget_gate: str
    forget_bias: float | None
    dtype: np.dtype[Any]
    rng: np.random.Generator
    _directions: tuple[bool, ...]
    _dirs: int
    _width: int
    _CHECKED: dict[str, Callable[[Any, Any], Any]] = {}  # attributes that may change, and what looks at the new value
    _OPEN = frozenset({"init", "batch_first"})

    def __setattr__(self, name: str, value: Any) -> None:
        """Sizes and choices that the memory or the kernels hang on stay; a typo or a lost weight is an error."""
        if name in self._CHECKED:
            value = self._CHECKED[name](self, value)
        elif (name in self.__dict__ or self._made(name)) and not name.startswith("_") and name not in self._OPEN:
            raise AttributeError(f"{name}: cannot change, make another {type(self).__name__} (and load_state_dict)")
        elif name.startswith(("weight_", "bias_")):
            raise AttributeError(f"{name}: write into the array, layer.params[{name!r}][...] = value")
        object.__setattr__(self, name, value)

    def _made(self, name: str) -> bool:
        """Whether a name is an option that this kind of layer lacks, and the layer is made."""
        return "_parameters" in self.__dict__ and name in Weights.__annotations__

    _frozen: Packed | None = None  # the packed weights of a frozen layer
    _frozen_weights: str | None = None  # and how they were packed
    _frozen_blas = False
    # How the weights are packed, by (layer, direction, head), and what that was found for; see `_pack`.
    _patterns: tuple[Packed, Any, Any, tuple[str, bool]] | None = None

    @property
    def _descriptor(self) -> Any:
        """What the cell's page in src_c/cells/ says of it: states, gates, columns of the tape, per-unit parameters."""
        return engine.CELLS[self._cell]

    def _suffixes(self) -> Iterator[tuple[int, int, str]]:
        """(layer, direction, suffix of the parameters' names) in the order of the states."""
        for layer in range(self.num_layers):
            for direction in range(self._dirs):
                yield layer, direction, f"_l{layer}" + "_reverse" * direction

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of each parameter, in the order of the buffer."""
        rows = len(self._descriptor.gates) * self.hidden_size
        for layer, _, suffix in self._suffixes():
            yield "weight_ih" + suffix, (rows, self.input_size if layer == 0 else self._width * self._dirs)
            yield "weight_hh" + suffix, (rows, self._width // self.num_heads)
            if self.bias:
                yield "bias_ih" + suffix, (rows,)
                yield "bias_hh" + suffix, (rows,)
            for name in self._descriptor.vectors:
                yield name + suffix, (self.hidden_size,)
            if self.proj_size:
                yield "weight_hr" + suffix, (self.proj_size, self.hidden_size)

    @property
    def options(self) -> dict[str, Any]:
        """The constructor's arguments, by name, but for ``rng``: they make a layer like this one."""
        import inspect

        names = list(inspect.signature(type(self).__init__).parameters)[1:]
        return {name: getattr(self, name) for name in names if name != "rng"}

    @property
    def config(self) -> dict[str, Any]:
        """Keyword arguments that make `fastlstm.reference.forward` compute what this layer does."""
        return {
            "cell": self._cell,
            "num_layers": self.num_layers,
            "bidirectional": self.bidirectional,
            "reverse": self.direction == "reverse",
            "batch_first": self.batch_first,
            "activation": self.activation,
            "output_activation": self.output_activation,
            "recurrent_activation": self.recurrent_activation,
            "clip": self.clip,
            "cell_clip": self.cell_clip,
            "proj_clip": self.proj_clip,
            "layer_norm_eps": self.layer_norm_eps,
            "num_heads": self.num_heads,
            "forget_gate": self.forget_gate,
            "zoneout": self._zoneout,
        }

    @functools.cached_property
    def _gradients(self) -> Parameters:
        """Made when they are first wanted: inference has no use for them."""
        return Parameters(dict(self._shapes()), self.dtype)

    def load_state_dict(self, d: Mapping[str, ArrayLike], prefix: str = "") -> None:
        """Copy parameters from a mapping, for example the state dict of a PyTorch layer of the same sizes.

        Parameters
        ----------
        d : mapping of str to array_like
            This layer's names and shapes; anything `numpy.asarray` accepts. A layer of one direction also takes the
            names of PyTorch's cells, without ``_l0``. Where there is no ``bias_hh`` at all (other libraries have one
            bias) it becomes zero.
        prefix : str
            What stands before the names, for example "encoder.lstm."; other keys are left alone.

        Raises
        ------
        ValueError, TypeError
            Missing or unexpected names, wrong shapes, no numbers, read-only parameters; then nothing has changed.
        FloatingPointError
            A value is too large for the layer's dtype, under ``numpy.errstate(over="raise")``; nothing has changed.
        RuntimeError
            The layer is frozen.
        """
        if self._frozen is not None:
            raise RuntimeError("load_state_dict: the layer is frozen, call unfreeze() first")
        one = self.num_layers == self._dirs == 1
        aliases = {name: name.removesuffix("_l0") for name in self._parameters.views} if one else None
        zeros = [name for name in self._parameters.views if name.startswith("bias_hh")]
        self._parameters.load(d, "load_state_dict", prefix, aliases, zeros)

    def astype(self, dtype: DTypeLike) -> Self:
        """A copy of another type: parameters converted, gradients zero, not frozen."""
        import copy

        make: Any = type(self)
        other: Self = make(**self.options | {"dtype": dtype, "init": "zeros"}, rng=copy.deepcopy(self.rng))
        other.flat_params[:] = self.flat_params
        other.init = self.init
        return other

    @functools.cached_property
    def _state_widths(self) -> tuple[int, int, int]:
        """Of the states: layers times directions, the width of h, and of those beside h together."""
        return self.num_layers * self._dirs, self._width, (len(self._descriptor.states) - 1) * self.hidden_size

    @property
    def _zoneout(self) -> tuple[float, float]:
        return self.zoneout if isinstance(self.zoneout, tuple) else (self.zoneout, 0.0)

    def __repr__(self) -> str:
        """The call that makes a layer like this one, without what is as ever."""
        import inspect

        usual = {name: p.default for name, p in inspect.signature(type(self).__init__).parameters.items()}
        parts = [f"{name}={v!r}" for name, v in self.options.items() if name != "dtype" and v != usual[name]]
        sizes = [str(self.input_size), str(self.hidden_size)]
        return f"{type(self).__name__}({', '.join(sizes + parts[2:])}, dtype={self.dtype})"

    def _repr_html_(self) -> str:
        """What a notebook shows: the layer and its parameters as a table."""
        from html import escape

        rows = "".join(f"<tr><td>{name}</td><td>{view.shape}</td><td>{view.size:,}</td></tr>"
                       for name, view in self._parameters.views.items())  # fmt: skip
        return (f"<table><caption><code>{escape(repr(self))}</code></caption>"
                "<thead><tr><th>parameter</th><th>shape</th><th>numbers</th></tr></thead>"
                f"<tbody>{rows}<tr><td>all</td><td></td><td>{self.num_params:,}</td></tr></tbody></table>")  # fmt: skip

    def _describe(self) -> dict[str, Any]:
        from ._saved import options_of

        return options_of(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the layer to a file that `fastlstm.load` reads, see `fastlstm.files.save`."""
        from ._saved import save

        save(self, path)

    def freeze(self, weights: str | None = None) -> Self:
        """Make the parameters read-only and keep them packed between inference calls.

        Without it the weights are packed anew at each call and can never be stale. A view that was made of the
        parameters before stays writeable; what is written through it does not reach the packed weights.

        Parameters
        ----------
        weights : {None, "bfloat16", "int8"}
            "bfloat16" rounds the packed weights to 8 significant bits; "int8" to multiples of the largest of their row
            (of weight_ih and weight_hh apart) divided by 127: an error of at most 1/254 of that largest weight.
            Arithmetic and states stay float32. It halves, or quarters, the memory of the weights. bfloat16 is faster
            where reading them is what limits a step, as with few sequences; int8 has to be widened, and with AVX2 a
            step took about as long as with float32. float32 layers only.

        Returns
        -------
        Layer
            This layer. `forward` and `backward` are refused until `unfreeze`.
        """
        return self._freeze(weights, engine.products() == "blas")

    def _freeze(self, weights: str | None, blas: bool) -> Self:
        packed = self._pack(_checks.weight_type(self.dtype, weights), blas)
        panels = {key: panel.pack() for key, panel in packed.items()}
        self._writeable(False)
        self._frozen, self._frozen_weights, self._frozen_blas = panels, weights, blas
        return self

    def unfreeze(self) -> Self:
        """Undo `freeze`."""
        self._writeable(True)
        self._frozen = None
        return self

    def __copy__(self) -> Self:
        import copy

        return copy.deepcopy(self)  # two layers on one set of parameters would undo each other's freeze

    def __getstate__(self) -> tuple[dict[str, Any], bool]:
        """What pickle and copy take: packed weights are memory of the kernels, a frozen copy packs its own."""
        return self.__dict__ | {"_frozen": None, "_patterns": None}, self._frozen is not None

    def __setstate__(self, state: tuple[dict[str, Any], bool]) -> None:
        attributes, frozen = state
        self.__dict__.update(attributes)
        if frozen:
            self._freeze(self._frozen_weights, self._frozen_blas)

    def _writeable(self, flag: bool) -> None:
        for array in (self._parameters.flat, *self._parameters.views.values()):
            array.flags.writeable = flag

    def _pack(self, weight_type: str | None = None, blas: bool | None = None) -> Packed:
        """Memory for the packed weights, which the call's threads then fill. How they are packed is found once for the
        place where the parameters are, an instruction set and a kind of products."""
        blas = engine.products() == "blas" if blas is None else blas
        if blas:  # also a layer that another process froze
            engine.find_blas()
        if blas and weight_type:
            raise ValueError(f"weights: {weight_type!r} needs products 'own', got 'blas' (set_products)")
        found, parameters, how = self._patterns, self._parameters, (engine.isa(), blas)
        if not found or found[1] is not parameters.flat or found[2] is not parameters.views or found[3] != how:
            choices = self._choices()
            patterns = {
                (layer, direction, head): engine.Panels(
                    self._cell, self._of_head(parameters.views, suffix, head), suffix, choices, blas
                )
                for layer, direction, suffix in self._suffixes()
                for head in range(self.num_heads)
            }
            found = self._patterns = patterns, parameters.flat, parameters.views, how
        return {place: pattern.fresh(weight_type) for place, pattern in found[0].items()}

    def _of_head(self, views: dict[str, Any], suffix: str, head: int) -> dict[str, Any]:
        """A head's rows of the parameters with this suffix, which stand together: it runs as a cell of its own."""
        if self.num_heads == 1:
            return views
        rows = len(self._descriptor.gates) * self.hidden_size // self.num_heads
        names = [base + suffix for base in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        return {name: views[name][head * rows : (head + 1) * rows] for name in names if name in views}

    @property
    def _head_width(self) -> int:
        """Columns of h that a head has."""
        return self._width // self.num_heads

    def _part(self, y: Array, direction: int, head: int = 0) -> Array:
        """The columns of one head of one direction."""
        first = direction * self._width + head * self._head_width
        return y if self._dirs == self.num_heads == 1 else y[:, first : first + self._head_width]

    def _of(self, head: int, states: Array | None, i: int) -> Any:
        """A head's columns of state i."""
        if states is None or self.num_heads == 1:
            return None if states is None else states[i]
        width = states.shape[2] // self.num_heads
        return states[i][:, head * width : (head + 1) * width]

    def _choices(self) -> engine.Choices | None:
        """What the kernels are told beside the defaults."""
        chosen = (self.activation, self.output_activation or self.activation, self._gate_activation)
        numbers = (self.clip, self.cell_clip, self.proj_clip, self.layer_norm_eps)
        if chosen == ("tanh", "tanh", "sigmoid") and numbers == (None, None, None, 1e-5):
            return None
        act, out, gate = map(_activations.resolve, chosen)
        return engine.Choices(self.dtype, act, out, gate, *numbers)

    @property
    def _gate_activation(self) -> _activations.Activation:
        return self.recurrent_activation

    def _windows(self, T: int, N: int) -> list[tuple[int, int]]:
        """(begin, end) of the windows of steps of an inference, in the order of the direction."""
        if self._dirs == 2 or self.num_layers == 1:
            return [(0, T)]
        steps = max(1, _WINDOW // N)
        if steps >= T:
            return [(0, T)]
        windows = [(begin, min(begin + steps, T)) for begin in range(0, T, steps)]
        return windows[::-1] if self._directions[0] else windows

    def _draw(self, shape: tuple[int, ...], p: float) -> Array:
        """Dropout factors: 0 with probability p, else 1/(1-p)."""
        kept = (self.rng.random(shape, np.float32) >= p).astype(self.dtype)
        return np.asarray(kept * self.dtype.type(1 / (1 - p) if p < 1 else 0))

    def _draw_kept(self, shape: tuple[int, ...], p: float) -> Array:
        """1 with probability p (the old value is kept), else 0."""
        return (self.rng.random(shape, np.float32) < p).astype(self.dtype)

    def _output(self, rows: engine.Rows, panel: engine.Panels) -> Array | None:
        """Where a step's output stands before its projection; a direction's own, as both run at once."""
        return engine.empty((rows.N, self.hidden_size), self.dtype) if panel.projects else None

    def _not_frozen(self, what: str) -> None:
        if self._frozen is not None:
            raise RuntimeError(f"{what}: the layer is frozen for inference, call unfreeze() first")
