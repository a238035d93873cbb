"""Putting our modules into a model that exists, and taking them out again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from . import modules
from ._carry import DTYPES
from ._recurrent import Recurrent

_KINDS = {
    getattr(nn, name): getattr(modules, name) for name in ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
}
_OPTIONS = ("num_layers", "nonlinearity", "bias", "batch_first", "dropout", "bidirectional", "proj_size")
# What a torch.nn.Module keeps beside its parameters and its users' attributes: hooks and the like. The dicts themselves
# are shared, so that a hook's handle still removes it.
_SHARED = tuple(name for name in nn.Module().__dict__ if name not in ("training", "_parameters", "_modules"))
_INSIDE = {"mode", "_flat_weight_refs", "_flat_weights_names", "_all_weights", "_flat_weights"}  # of torch.nn.RNNBase


@dataclass(frozen=True)
class Accelerated:
    """What `accelerate` did.

    Attributes
    ----------
    replaced : dict of str to torch.nn.Module
        Names of the modules that are ours now, and what stood there before.
    left : dict of str to str
        Names of recurrent modules that are as they were, and why.
    """

    replaced: dict[str, nn.Module] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def accelerate(model: nn.Module) -> Accelerated:
    """Replace every `torch.nn.LSTM`, `GRU`, `RNN` and their cells inside a model by ours, in place.

    Parameters
    ----------
    model : torch.nn.Module
        Names, training mode and hooks stay, and the parameters stay the same objects: their ``requires_grad``, what is
        tied to them and the optimisers that hold them. A module that stands in several places is replaced in all.

    Returns
    -------
    Accelerated
        What was replaced, and what was left with the reason.

    Raises
    ------
    TypeError
        The model is no module, is itself a recurrent layer (which cannot be replaced in place), or was made by
        TorchScript.

    Notes
    -----
    `restore` undoes it, also after training. State dicts are the same before and after.
    """
    _check(model, "accelerate")
    if type(model) in _KINDS or isinstance(model, nn.RNNBase | nn.RNNCellBase):
        name = type(model).__name__
        raise TypeError(f"model: it is itself a {name}, which nothing inside can stand for: make a "
                        f"fastlstm.torch.{name} and load its state dict")  # fmt: skip
    done, made = Accelerated(), {}
    for name, parent, key, old in _places(model):
        if isinstance(old, torch.jit.ScriptModule):
            if getattr(old, "original_name", "") in {kind.__name__ for kind in _KINDS}:
                done.left[name] = "made by TorchScript, which does not call Python modules"
            continue
        if not isinstance(old, nn.RNNBase | nn.RNNCellBase):
            continue
        reason = _reason(old)
        if reason is not None:
            done.left[name] = reason
            continue
        if id(old) not in made:
            made[id(old)] = _ours(old)
        parent._modules[key] = made[id(old)]
        done.replaced[name] = old
    return done


def restore(model: nn.Module) -> list[str]:
    """Undo `accelerate`: the modules that stood before, with the parameters, dropout and training mode of now.

    Parameters
    ----------
    model : torch.nn.Module
        Modules of ours that `accelerate` has not made are left alone.

    Returns
    -------
    list of str
        Names of the modules that were put back.

    Raises
    ------
    ValueError
        The parameters of a module are computed from others since (weight_norm, pruning), which the one that stood there
        does not do. Nothing has changed then.
    """
    _check(model, "restore")
    places = [
        (name, parent, key, ours)
        for name, parent, key, ours in _places(model)
        if isinstance(ours, Recurrent) and ours.__dict__.get("_before") is not None
    ]
    for name, _, _, ours in places:
        if ours._parameters.keys() != set(ours._names):
            raise ValueError(f"model: the parameters of {name!r} are computed from others since accelerate "
                             "(weight_norm, pruning): remove that first")  # fmt: skip
    for _, parent, key, ours in places:
        old = ours.__dict__["_before"][0]
        for part, parameter in ours._parameters.items():
            if old._parameters[part] is not parameter:  # replaced since: assign=True and the like
                setattr(old, part, parameter)
        old.training = ours.training
        if isinstance(old, nn.RNNBase):
            changing = ["batch_first"] + ["dropout"] * (old.num_layers > 1)  # for one layer ours was not told of it
            old.__dict__ |= {option: getattr(ours, option) for option in changing}
        parent._modules[key] = old
    return [place[0] for place in places]


def _check(model: Any, what: str) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model: {what} cannot change what TorchScript has compiled: take the Python model, and "
                        "torch.export, torch.compile or torch.jit.trace afterwards")  # fmt: skip
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Name, parent, key and module of every place; a module that stands in several has several."""
    for prefix, parent in list(model.named_modules()):
        for key, child in list(parent._modules.items()):
            if child is not None:
                yield f"{prefix}.{key}".lstrip("."), parent, key, child


def _reason(old: nn.Module) -> str | None:
    """Why a recurrent module stays."""
    if type(old) not in _KINDS:
        return f"a subclass of torch.nn's layers ({type(old).__name__}) may compute something else"
    if "forward" in old.__dict__:
        return "its forward was replaced"
    tensors = {name: p for name, p in old._parameters.items() if p is not None}
    for p in tensors.values():
        if p.device.type != "cpu":
            return f"its parameters are on {p.device}, fastlstm computes on the CPU"
        if p.dtype not in DTYPES:
            return f"its parameters are of {p.dtype}, fastlstm has float32 and float64"
    if len({p.dtype for p in tensors.values()}) > 1:
        return "its parameters are of several types"
    if old._modules or set(tensors) != set(_bare(old)._names):
        return "its parameters are computed from others (weight_norm, pruning)"
    return None


def _bare(old: nn.Module) -> Recurrent:
    """Our module of the same options, on no device."""
    names = [name for name in _OPTIONS if hasattr(old, name)]
    if not isinstance(old, nn.LSTM):
        names = [name for name in names if name != "proj_size"]
    options: dict[str, Any] = {name: getattr(old, name) for name in names}
    if options.get("num_layers") == 1:
        del options["dropout"]  # torch.nn warns and ignores it
    dtype = next(old.parameters(recurse=False)).dtype
    new: Recurrent = _KINDS[type(old)](old.input_size, old.hidden_size, **options, device="meta", dtype=dtype)
    return new


def _ours(old: nn.Module) -> Recurrent:
    """Our module with the parameters, hooks and attributes of theirs."""
    new = _bare(old)
    new.__dict__ |= {name: old.__dict__[name] for name in _SHARED}
    for name, value in old.__dict__.items():  # what its users have put on it
        if name not in new.__dict__ and name not in _INSIDE:
            new.__dict__[name] = value
    new._parameters.update({name: old._parameters[name] for name in new._names})
    new.training = old.training
    new.__dict__["_before"] = (old,)  # not as a module of ours: its parameters would have two names
    return new
