"""The flat parameters and gradients behind what optimisers and clipping are given."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from .._checks import FLOATS, describe
from .._parameters import Holder
from .._types import Array


def buffers(modules: Iterable[Any]) -> list[tuple[Array, Array]]:
    """The (flat_params, flat_grads) of each module, or of each pair of arrays."""
    if hasattr(modules, "flat_params") or not isinstance(modules, Iterable):
        raise TypeError(f"modules: expected a list of layers or of (flat_params, flat_grads), got {describe(modules)}")
    pairs: list[tuple[Array, Array]] = []
    for i, module in enumerate(modules):
        where = f"modules[{i}]"
        if hasattr(module, "flat_params") and hasattr(module, "flat_grads"):
            pair = (module.flat_params, module.flat_grads)
        elif isinstance(module, tuple | list) and len(module) == 2:
            pair = tuple(module)
        else:
            layers = getattr(module, "layers", None)
            stacked = isinstance(layers, tuple) and all(isinstance(layer, Holder) for layer in layers)
            hint = "; give the stack alone, or [*stack.layers] in its place" if stacked else ""
            raise TypeError(
                f"{where}: expected a layer or a pair (flat_params, flat_grads), got {describe(module)}{hint}"
            )
        for name, a in zip(("flat_params", "flat_grads"), pair, strict=True):
            if not isinstance(a, np.ndarray) or a.dtype not in FLOATS:
                raise TypeError(f"{where}: {name}: expected a float32 or float64 array, got {describe(a)}")
            if a.ndim != 1 or not a.flags.writeable:
                found = f"{describe(a)}{', read-only' * (not a.flags.writeable)}"
                raise ValueError(f"{where}: {name}: expected a writeable 1-D array, got {found}")
        if isinstance(module, Holder):
            module._parameters.refuse_read_only(f"{where}: flat_params")
            module._gradients.refuse_read_only(f"{where}: flat_grads")
        p, g = pair
        if p.shape != g.shape or p.dtype != g.dtype:
            raise ValueError(f"{where}: flat_grads: expected {describe(p)}, got {describe(g)}")
        if any(np.may_share_memory(g, other) for _, other in pairs):
            raise ValueError(f"{where}: expected each layer once, got the same gradients twice")
        pairs.append(pair)
    if not pairs:
        raise ValueError("modules: expected at least one layer, got none")
    return pairs
