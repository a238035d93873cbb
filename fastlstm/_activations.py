"""Activations by name, with their numbers: what a layer may choose, and what the kernels are told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from . import _checks

# A name, or a name and its numbers, as in ("elu", 0.5).
Activation: TypeAlias = "str | tuple[str | float, ...]"

# What may stand in for tanh, at the candidate and at the cell's output; and for the sigmoid of a gate.
CANDIDATES = ("tanh", "relu", "softsign", "hard_tanh", "identity", "sigmoid", "hard_sigmoid", "elu", "leaky_relu",
              "softplus", "scaled_tanh")  # fmt: skip
GATES = ("sigmoid", "hard_sigmoid")

# The numbers that an activation takes, with what they are if none are given (None: they must be given).
_NUMBERS: dict[str, tuple[tuple[str, ...], tuple[float, ...] | None]] = {
    "elu": (("alpha",), (1.0,)),
    "leaky_relu": (("alpha",), (0.01,)),
    "scaled_tanh": (("alpha", "beta"), None),
    "hard_sigmoid": (("alpha", "beta"), ()),  # none: relu6(x + 3) / 6
}


def check(name: str, value: Any, choices: Sequence[str]) -> Activation:
    """A name, or a tuple of a name and its numbers, which must be such that the activation rises."""
    kind, *numbers = value if isinstance(value, (tuple, list)) and value else [value]
    if choices is GATES and kind in CANDIDATES and kind not in GATES:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {kind!r}: a gate is a factor "
                         "from 0 to 1, and this leaves that range")  # fmt: skip
    _checks.choice(name, kind, tuple(choices))
    names, given = _NUMBERS.get(kind, ((), ()))
    if len(numbers) not in (len(names), 0 if given is not None else len(names)):
        form = f"({kind!r}, {', '.join(names)})" if names else repr(kind)
        raise ValueError(f"{name}: expected {form}, got {value!r}")
    for label, number in zip(names, numbers, strict=False):
        low = -float("inf") if label == "beta" and kind == "hard_sigmoid" else 0.0
        _checks.number(f"{name}: {label}", number, low, open_low=kind in ("scaled_tanh", "hard_sigmoid"))
    return (kind, *map(float, numbers)) if numbers else kind


def resolve(value: Activation) -> tuple[str, float, float]:
    """The kernels' name, alpha and beta."""
    name, *rest = (value,) if isinstance(value, str) else value
    kind, numbers = str(name), [float(number) for number in rest]
    if kind == "hard_sigmoid" and numbers:
        kind = "linear_sigmoid"
    else:
        numbers = numbers or list(_NUMBERS.get(kind, ((), ()))[1] or ())
    alpha, beta = (*numbers, 0.0, 0.0)[:2]
    return kind, alpha, beta
