"""What the modules share: parameters on a layer's memory, and the call."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _checks, engine, layers
from .._habits import refuse_sparse
from . import _carry
from ._carry import DTYPES, layer_of
from ._ops import Call, Recurrence, is_eager, recurrence, refuse_tangents, zero_states

if TYPE_CHECKING:
    from ._carry import Steps

_SCRIPT = (
    "fastlstm.torch: TorchScript cannot compile this module; use torch.export, torch.compile or torch.jit.trace, or "
    "take torch.nn's layer for this model (fastlstm.torch.restore(model) puts back what accelerate took)"
)
# Above this many words a sample of them stands for all, see `Recurrent._ready`.
_WORDS, _SAMPLE = 8192, 1024


class Recurrent(torch.nn.Module):
    """What the modules share; not for direct use."""

    _kind: ClassVar[str]  # of fastlstm's layers
    _suffix: ClassVar[str] = ""  # what our names have and the module's have not
    # of the layer's options
    input_size: int
    hidden_size: int
    num_layers: int
    batch_first: bool
    bidirectional: bool
    nonlinearity: str
    # what is kept between calls, see where it is made
    _flat: Any
    _kept: Any
    _found: Any
    _made: Any

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int, device: Any, dtype: Any, **options: Any
    ) -> None:
        super().__init__()
        device = torch.get_default_device() if device is None else torch.device(device)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if device.type != "meta":
            _check_kind("device and dtype", device, dtype)
        self.init = _checks.choice("init", options.pop("init", "pytorch"), ("pytorch", "orthogonal", "zeros"))
        options |= {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers}
        layer = getattr(layers, self._kind)(**options, init="zeros")
        self.forget_bias = options.pop("forget_bias", None)
        self._fixed = {k: v for k, v in layer.options.items() if k not in ("dtype", "init", "forget_bias")}
        for name, value in self._fixed.items():
            setattr(self, name, value)
        self._text = _carry.describe(self._kind, self._options())  # the layer as the operator takes it
        of = layer_of(self._text, torch.float32)
        (self._depth, self._width, _), self._draws = of.state_widths, of.draws
        self._names = [name.removesuffix(self._suffix) for name in layer.params]
        for name, view in zip(self._names, layer.params.values(), strict=True):
            shape = torch.empty(view.shape, dtype=dtype, device=device)
            self.register_parameter(name, torch.nn.Parameter(shape))
        self._forget()
        self.flatten_parameters()
        self.reset_parameters()

    # ---- parameters ----

    def reset_parameters(self) -> None:
        """Draw new parameters, from PyTorch's generator: the same as torch.nn's layer draws after the same seed."""
        params = [p for p in self._tensors() if p.device.type != "meta"]
        if not params:
            return
        if self.init != "pytorch":
            init = {"init": self.init, "dtype": np.float64, "rng": int(_seed())}
            if self.forget_bias is not None:
                init["forget_bias"] = self.forget_bias
            drawn = getattr(layers, self._kind)(**self._options() | init)
            with torch.no_grad():
                for p, view in zip(params, drawn.params.values(), strict=True):
                    p.copy_(torch.from_numpy(view))
            return
        bound = 1 / math.sqrt(self.hidden_size)  # in these words: H**-0.5 may differ in the last bit
        for p in params:
            torch.nn.init.uniform_(p, -bound, bound)
        layer = self._layer_of(torch.float64)
        with torch.no_grad():
            for (name, *_), p in zip(layer.spots, params, strict=True):
                if (gain := layer.gains.get(name.rpartition("_l")[0])) is not None:
                    p.fill_(gain)
                if self.forget_bias is not None and name.startswith("bias_ih"):
                    p[layer.rows_of("f")] += self.forget_bias

    def flatten_parameters(self) -> None:
        """Lay the parameters side by side in the memory of a `fastlstm` layer, see `layer`.

        Done when the module is made, copied, loaded or converted. It has no influence on speed or results.
        """
        self._flat = None
        params: list[Any] = [self._parameters.get(name) for name in self._names]
        if any(p is None or p.device.type != "cpu" or p.dtype not in DTYPES or p.is_inference() for p in params):
            return
        if len({p.dtype for p in params}) > 1 or len({id(p) for p in params}) < len(params):
            return
        if any(p.is_shared() for p in params):  # with other processes (share_memory): it must stay there
            return
        layer = self._new_layer(params[0].dtype)
        for p, view in zip(params, layer.params.values(), strict=True):
            source = torch.from_numpy(view)
            source.copy_(p.detach())
            p.data = source
        self._flat = layer

    @property
    def layer(self) -> layers.LSTM | layers.GRU | layers.RNN:
        """The same layer without PyTorch: a `fastlstm` layer on the memory of this module's parameters.

        Call it with arrays, or take its stream; a `torch` optimiser's step is seen there at once, and what is written
        into ``layer.params`` is seen here.

        Raises
        ------
        RuntimeError
            The parameters cannot stand in the memory of one layer: they are on another device, of a type other than
            float32 and float64, computed (parametrised), one tensor under two names, or in memory shared by processes.
        """
        if self._flat is None or not self._is_flat():
            self.flatten_parameters()
        if self._flat is None:
            raise RuntimeError("layer: the parameters do not stand in one layer's memory: expected distinct, unshared "
                               "parameters of torch.float32 or torch.float64 on the CPU")  # fmt: skip
        flat: layers.LSTM | layers.GRU | layers.RNN = self._flat
        return flat

    def _is_flat(self) -> bool:
        params = (self._parameters.get(name) for name in self._names)
        views = self._flat.params.values()
        return all(p is not None and p.data_ptr() == v.ctypes.data for p, v in zip(params, views, strict=True))

    def _new_layer(self, dtype: torch.dtype) -> Any:
        options = {"batch_first": self.batch_first, "dtype": DTYPES[dtype], "init": "zeros"}
        return getattr(layers, self._kind)(**self._options() | options)

    def _tensors(self) -> list[Any]:
        """The parameters in the layer's order: computed ones (parametrised, functional_call) where they are."""
        found: list[Any] = [self._parameters.get(name) for name in self._names]
        for i, p in enumerate(found):
            if p is None:
                found[i] = getattr(self, self._names[i])
        return found

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._forget()
        self.flatten_parameters()
        return self

    def train(self, mode: bool = True) -> Self:
        self._kept = None  # what was written to .data since is seen from here on
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._kept = None

    def _forget(self) -> None:
        self._kept = self._found = self._made = self._flat = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None, "_found": None, "_made": None, "_flat": None}

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.flatten_parameters()

    def __prepare_scriptable__(self) -> None:
        raise TypeError(_SCRIPT)

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The parameters, a list for each layer and direction, as in torch.nn's layers."""
        size = len(self._names) // (self.num_layers * (2 if self.bidirectional else 1))
        found = self._tensors()
        return [found[i : i + size] for i in range(0, len(found), size)]

    def extra_repr(self) -> str:
        defaults = inspect.signature(getattr(layers, self._kind)).parameters
        shown = [f"{self.input_size}, {self.hidden_size}"]
        for name, value in (self._options() | {"batch_first": self.batch_first}).items():
            if name not in ("input_size", "hidden_size") and value != defaults[name].default:
                shown.append(f"{name}={value!r}")
        return ", ".join(shown)

    # ---- calls ----

    def _enter(self, x: Tensor, hx: Any) -> tuple[Any, Any, Any]:
        """Input and states, checked; converted under autocast."""
        if not isinstance(x, Tensor):
            raise TypeError(f"input: expected a Tensor, got {type(x).__name__}")
        weight: Any = self._parameters.get(self._names[0])
        weight = getattr(self, self._names[0]) if weight is None else weight
        h, c = self._pair(hx) if self._kind == "LSTM" else (hx, None)
        dtype, device = weight.dtype, weight.device
        if dtype not in DTYPES or device.type not in ("cpu", "meta"):
            _check_kind("parameters", device, dtype)
        x = _converted("input", x, dtype, device)
        if h is None and c is None:
            return x, h, c
        return x, h if h is None else _converted("h_0", h, dtype, device), (
            c if c is None else _converted("c_0", c, dtype, device))  # fmt: skip

    def _check_shapes(
        self, x: Tensor, h: Tensor | None, c: Tensor | None, dims: tuple[int, ...], leading: tuple[int, ...]
    ) -> None:
        """dims: how many x may have. leading: a state's sizes before the width."""
        if x.dim() not in dims or x.shape[-1] != self.input_size:
            axes = " or ".join(str(n) for n in dims)
            raise ValueError(
                f"input: expected {axes} dimensions, the last of them {self.input_size}, got {tuple(x.shape)}"
            )
        if h is None and c is None:
            return
        for name, value, width in (("h_0", h, self._width), ("c_0", c, self.hidden_size)):
            if value is not None and value.shape != (*leading, width):
                raise ValueError(f"{name}: expected shape {(*leading, width)}, got {tuple(value.shape)}")

    def _pair(self, hx: Any) -> Any:
        if hx is None:
            return None, None
        if not isinstance(hx, (tuple, list)) or len(hx) != 2:
            raise TypeError(f"hx: expected a pair (h_0, c_0), got {_checks.describe(hx)}")
        return hx

    _CHANGING = ("dropout", "recurrent_dropout", "zoneout")  # what a user may assign, as to a module of torch.nn

    def _options(self) -> dict[str, Any]:
        changing = {name: getattr(self, name) for name in self._CHANGING}
        return {k: v for k, v in (self._fixed | changing).items() if k != "batch_first"}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._CHANGING and "_text" in self.__dict__:
            text = _carry.describe(self._kind, self._options() | {name: value})
            draws = layer_of(text, torch.float32).draws  # looks at the value
            self._text, self._made, self._draws = text, None, draws
        elif name in self.__dict__.get("_fixed", ()) and name != "batch_first" and value != self._fixed[name]:
            raise AttributeError(f"{name}: is {self._fixed[name]!r} since the module was made; make another one")
        super().__setattr__(name, value)

    def _layer_of(self, dtype: torch.dtype) -> Any:
        """The layer without arrays that `_text` describes."""
        if self._made is None or self._made[0] is not dtype:
            self._made = dtype, layer_of(self._text, dtype)
        return self._made[1]

    def _carry(self, x: Tensor, h_0: Tensor | None, c_0: Tensor | None, steps: Steps) -> tuple[Any, Any, Any]:
        """y, h_n, c_n (or None) of time-major x, or of packed rows."""
        params = self._tensors()
        if forward_ad._current_level >= 0:  # here, as without gradients neither way would notice
            refuse_tangents((x, h_0, c_0, *params))
        seed = _seed() if self._draws and self.training else None
        if not is_eager(x):
            return self._trace(x, h_0, c_0, steps, seed, params)
        layer = self._layer_of(x.dtype)
        if torch.is_grad_enabled() and _any_grad((*params, x, h_0, c_0)):
            call = Call(layer, self._bound(layer, params), self._text, self.training, steps, seed)
            apply: Any = Recurrence.apply
            y, h_n, c_n = apply(call, x, h_0, c_0, *params)
            return y, h_n, c_n
        if seed is not None:
            return _carry.forward(layer, self._bound(layer, params), x, h_0, c_0, steps, seed, False)[0][:3]
        return _carry.infer(self._ready(layer, params), x, h_0, c_0, steps)

    def _trace(
        self, x: Tensor, h_0: Tensor | None, c_0: Tensor | None, steps: Steps, seed: Tensor | None,
        params: Sequence[Tensor],
    ) -> tuple[Any, Any, Any]:  # fmt: skip
        """The same through the operator."""
        cells = self.hidden_size if self._kind == "LSTM" else 0
        h_0, c_0 = zero_states(x, h_0, c_0, steps.batch_sizes, self._depth, self._width, cells)
        keep = self.training and torch.is_grad_enabled()
        y, h_n, c_n, _ = recurrence(
            x.contiguous(), h_0.contiguous(), None if c_0 is None else c_0.contiguous(), *steps, seed, params,
            self._text, keep,
        )  # fmt: skip
        return y, h_n, None if c_0 is None else c_n

    def _bound(self, layer: Any, params: Sequence[Tensor]) -> Any:
        """The layer over the parameters, kept while they stay where they are."""
        key = [p.data_ptr() if p.is_contiguous() else None for p in params]
        found = self._found
        if found is None or found[0] != key or found[1] is not layer or None in key:
            found = self._found = key, layer, layer.bind(_carry.arrays_of(layer, params))
        return found[2]

    def _ready(self, layer: Any, params: Sequence[Tensor]) -> Any:
        """A layer with packed weights. They are kept until a parameter is another one or of another version, or a
        sample of the values differs (`.data` and NumPy write past the versions)."""
        try:
            key: list[Any] = [(p.data_ptr(), p._version) for p in params]
        except RuntimeError:  # a tensor made in inference mode has no version
            return self._bound(layer, params)
        key.append((id(layer), engine.products()))
        kept = self._kept
        if kept is None or kept[0] != key or [_sum(*sample) for sample in kept[2]] != kept[3]:
            bound = self._bound(layer, params)
            if None in self._found[0]:  # made contiguous for this call: nothing to look at in the next one
                return bound
            bound = bound.packed()
            arrays = bound.arrays.values()
            if self._flat is not None and self._is_flat():
                arrays = [self._flat.flat_params]
            samples = [(a, 1 if a.nbytes <= 4 * _WORDS else a.nbytes // (4 * _SAMPLE) | 1) for a in arrays]
            kept = self._kept = key, bound, samples, [_sum(*sample) for sample in samples]
        return kept[1]


_sum = engine.sum_of_words


def _seed() -> Tensor:
    """What a call's masks are drawn from; itself drawn from PyTorch's generator."""
    return torch.randint(2**62, ())


def _any_grad(tensors: Iterable[Tensor | None]) -> bool:
    for t in tensors:
        if t is not None and t.requires_grad:
            return True
    return False


def _converted(name: str, value: Tensor, dtype: torch.dtype, device: Any) -> Tensor:
    """An input of the parameters' type and device: as it is, converted under autocast, or an error."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {_checks.describe(value)}")
    if value.layout is not torch.strided:
        refuse_sparse(name, value, "a dense tensor")
    if value.dtype is dtype and value.device == device:
        return value
    if value.is_floating_point() and value.device == device and torch.is_autocast_enabled("cpu"):
        return value.to(dtype)
    _check_kind(name, value.device, value.dtype)
    raise ValueError(f"{name}: expected {dtype} on {device} as the parameters, got {value.dtype} on {value.device}")


def _check_kind(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """An error that says what to do about another device or another type."""
    if device.type != "cpu":
        raise ValueError(
            f"{name}: fastlstm computes on the CPU, got device {str(device)!r}: move module and input by .to('cpu'), "
            f"or take torch.nn's layer there (fastlstm.torch.restore(model) puts back what accelerate took)"
        )
    if dtype not in DTYPES:
        raise TypeError(
            f"{name}: expected torch.float32 or torch.float64, got {dtype}: keep module and input in float32 "
            f"(.float()); under torch.autocast('cpu') the input is converted"
        )
