"""The recurrence as PyTorch sees it: an operator with its gradient, and a Function that goes past the dispatcher.

`fastlstm::recurrence` is what torch.compile, torch.export, torch.jit.trace and torch.func see. An eager call takes
`Recurrence`, which costs less, and calls the operator of the gradient where that is to be differentiated itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _carry
from ._carry import WHOLE, Steps, layer_of, tensors_of

_DOUBLE = (
    "fastlstm.torch has no second derivatives (create_graph=True): take torch.nn's layer for this model "
    "(fastlstm.torch.restore(model) puts back what accelerate took)"
)
_FORWARD = (
    "fastlstm.torch has no forward-mode derivatives (torch.autograd.forward_ad): take gradients by torch.autograd, or "
    "take torch.nn's layer for this model (fastlstm.torch.restore(model) puts back what accelerate took)"
)
_VMAP = (
    "fastlstm.torch has no rule for vmap and the other transforms of torch.func: give the examples as the batch of one "
    "call (dimension N) and take gradients by torch.autograd, or take torch.nn's layer for this model"
)


@torch.library.custom_op("fastlstm::recurrence", mutates_args=(), device_types="cpu")
def recurrence(
    x: Tensor, h_0: Tensor, c_0: Tensor | None, lengths: Tensor | None, mask: Tensor | None, resets: Tensor | None,
    batch_sizes: Tensor | None, seed: Tensor | None, params: list[Tensor], config: str, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, h_n, c_n (empty where there is none) and the reserve (empty without `keep`)."""
    steps = Steps(lengths, mask, resets, batch_sizes)
    layer = layer_of(config, x.dtype)
    bound = layer.bind(_carry.arrays_of(layer, params))
    found, _ = _carry.forward(layer, bound, x, h_0, c_0, steps, seed, keep, traced=True)
    y, h_n, c_n, reserve = (x.new_empty(0) if a is None else a for a in found)
    return y, h_n, c_n, reserve


@recurrence.register_fake
def _(
    x: Tensor, h_0: Tensor, c_0: Tensor | None, lengths: Tensor | None, mask: Tensor | None, resets: Tensor | None,
    batch_sizes: Any, seed: Tensor | None, params: Sequence[Tensor], config: str, keep: bool,
) -> Any:  # fmt: skip
    layer = layer_of(config, x.dtype)
    rows = x.shape[0] if batch_sizes is not None else x.shape[0] * x.shape[1]
    size = _carry.reserve_size(layer, rows, seed is not None) if keep else 0
    return (
        x.new_empty((*x.shape[:-1], layer.y_width)), x.new_empty(h_0.shape),
        x.new_empty((0,) if c_0 is None else c_0.shape), x.new_empty((size,)),
    )  # fmt: skip


@torch.library.custom_op("fastlstm::recurrence_backward", mutates_args=(), device_types="cpu")
def recurrence_backward(
    dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, x: Tensor, h_0: Tensor, c_0: Tensor | None,
    lengths: Tensor | None, mask: Tensor | None, resets: Tensor | None, batch_sizes: Tensor | None, seed: Tensor | None,
    params: list[Tensor], y: Tensor, reserve: Tensor, config: str, keep: bool, need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx (empty without `need_dx`), dh_0, dc_0 (empty where there is none), the parameters' gradients side by side."""
    steps = Steps(lengths, mask, resets, batch_sizes)
    kept = reserve.clone() if keep else None  # the pass writes into it
    tape = _carry.again(layer_of(config, x.dtype), x, h_0, c_0, steps, seed, params, y, kept)
    *found, _ = _carry.backward(tape, dy, dh_n, dc_n, need_dx)
    dx, dh_0, dc_0, dparams = (x.new_empty(0) if a is None else a for a in tensors_of(*found))
    return dx, dh_0, dc_0, dparams


@recurrence_backward.register_fake
def _(
    dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, x: Tensor, h_0: Tensor, c_0: Tensor | None,
    lengths: Tensor | None, mask: Tensor | None, resets: Tensor | None, batch_sizes: Any, seed: Tensor | None,
    params: Sequence[Tensor], y: Tensor, reserve: Tensor | None, config: str, keep: bool, need_dx: bool,
) -> Any:  # fmt: skip
    return (
        x.new_empty(x.shape if need_dx else (0,)), x.new_empty(h_0.shape),
        x.new_empty((0,) if c_0 is None else c_0.shape), x.new_empty((sum(p.numel() for p in params),)),
    )  # fmt: skip


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, h_0, c_0, lengths, mask, resets, batch_sizes, seed, params, ctx.config, ctx.keep = inputs
    y, _, c_n, reserve = output
    ctx.save_for_backward(x, h_0, c_0, lengths, mask, resets, batch_sizes, seed, y, reserve, *params)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(reserve, *[c_n] * (c_0 is None))


def _saved(ctx: Any) -> Any:
    saved = ctx.saved_tensors  # asked for once: torch.utils.checkpoint computes them when they are asked for
    return *saved[:10], list(saved[10:])


def _gradient(ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, _: Any) -> Any:
    x, h_0, c_0, *steps, seed, y, reserve, params = _saved(ctx)
    need_dx = ctx.needs_input_grad[0]
    dx, dh_0, dc_0, dparams = torch.ops.fastlstm.recurrence_backward(
        dy, dh_n, dc_n, x, h_0, c_0, *steps, seed, params, y, reserve, ctx.config, ctx.keep, need_dx
    )
    dc_0 = None if c_0 is None else dc_0
    return dx if need_dx else None, dh_0, dc_0, *[None] * 5, _each(dparams, params), None, None


def _refuse(ctx: Any, *_: Any) -> None:
    raise RuntimeError(_DOUBLE)


def _no_vmap(info: Any, in_dims: Any, *_: Any) -> None:
    raise RuntimeError(_VMAP)


recurrence.register_autograd(_gradient, setup_context=_setup)
recurrence_backward.register_autograd(_refuse)
recurrence.register_vmap(_no_vmap)
recurrence_backward.register_vmap(_no_vmap)


def _each(dparams: Tensor, params: list[Tensor]) -> list[Tensor]:
    """Each parameter's part of gradients that stand side by side."""
    whole: Any = dparams
    parts = whole.split([p.numel() for p in params])
    return [part.view(p.shape) for part, p in zip(parts, params, strict=True)]


class Call(NamedTuple):
    """What an eager call has beside the tensors that may have gradients.

    layer: bound to no parameters; bound: the same over them; text: what describes it. keep False: nothing is kept, and
    a backward pass runs forward again.
    """

    layer: Any
    bound: Any
    text: str
    keep: bool
    steps: Steps
    seed: Tensor | None


class Recurrence(torch.autograd.Function):
    """The operator without the dispatcher, for eager calls; states may be None. Each argument costs a microsecond."""

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, h_0: Tensor | None, c_0: Tensor | None, *params: Tensor) -> Any:
        (y, h_n, c_n, reserve), tape = _carry.forward(
            call.layer, call.bound, x, h_0, c_0, call.steps, call.seed, call.keep
        )
        ctx.call = call
        # Where saved tensors go elsewhere (torch.utils.checkpoint, save_on_cpu), the tape must not hold their memory.
        ctx.tape = tape if torch._C._autograd._top_saved_tensors_default_hooks(True) is None else None
        # What says which steps there are is saved to be noticed if it changes.
        ctx.save_for_backward(x, h_0, c_0, y, reserve, *params, *(() if call.steps is WHOLE else call.steps))
        ctx.set_materialize_grads(False)
        return y, h_n, c_n

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None) -> Any:
        saved, call = ctx.saved_tensors, ctx.call  # asked for once, as in _saved
        x, h_0, c_0, y, reserve = saved[:5]
        need_dx, tape, ctx.tape = ctx.needs_input_grad[1], ctx.tape, None
        params = list(saved[5 : 5 + len(call.layer.spots)])
        if torch.is_grad_enabled():  # create_graph: the operator says that this is the end of it
            start = zero_states(x, h_0, c_0, call.steps.batch_sizes, *call.layer.state_widths)
            kept = x.new_empty(0) if reserve is None else reserve
            dx, dh_0, dc_0, dparams = torch.ops.fastlstm.recurrence_backward(
                dy, dh_n, dc_n, x, *start, *call.steps, call.seed, params, y, kept, call.text, reserve is not None,
                need_dx,
            )  # fmt: skip
            dparams = _each(dparams, params)
        else:
            if reserve is not None and torch._C._autograd._get_current_graph_task_keep_graph():
                reserve, tape = reserve.clone(), None  # retain_graph: another pass will want it
            if tape is None:
                tape = _carry.again(call.layer, x, h_0, c_0, call.steps, call.seed, params, y, reserve)
            dx, dh_0, dc_0, _, dparams = _carry.backward(tape, dy, dh_n, dc_n, need_dx)
            dh_0, dc_0 = None if h_0 is None else dh_0, None if c_0 is None else dc_0
            dx, dh_0, dc_0, *dparams = tensors_of(dx, dh_0, dc_0, *dparams)
        states = None if h_0 is None else dh_0, None if c_0 is None else dc_0
        return None, dx if need_dx else None, *states, *dparams


def zero_states(
    x: Tensor, h_0: Tensor | None, c_0: Tensor | None, batch_sizes: Tensor | None, depth: int, P: int, C: int
) -> tuple[Any, Any]:
    """States as the operator takes them: zeros where there are none. C: 0 for a layer without cells."""
    if h_0 is None or (c_0 is None and C):
        N = x.shape[1] if batch_sizes is None else int(batch_sizes[0])
        h_0 = x.new_zeros((depth, N, P)) if h_0 is None else h_0
        if c_0 is None and C:
            c_0 = x.new_zeros((depth, N, C))
    return h_0, c_0


def refuse_tangents(tensors: Iterable[Tensor | None]) -> None:
    """Refuse tensors that carry a derivative forward, which would be lost in silence."""
    unpack: Any = torch.autograd.forward_ad.unpack_dual
    if any(t is not None and unpack(t).tangent is not None for t in tensors):
        raise NotImplementedError(_FORWARD)


def is_eager(x: Tensor) -> bool:
    """Whether a call computes here and now on plain tensors, so that NumPy may see them."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return False
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(_VMAP)
    return type(x) in _PLAIN and x.is_cpu and not torch._C._len_torch_dispatch_stack()


_PLAIN = (Tensor, torch.nn.Parameter)
