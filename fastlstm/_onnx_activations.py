"""Activations as ONNX names them, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ._activations import CANDIDATES, GATES, Activation, check

# Our names of activations, with ONNX's.
_ACTIVATIONS = {
    "tanh": "Tanh", "relu": "Relu", "softsign": "Softsign", "sigmoid": "Sigmoid", "hard_sigmoid": "HardSigmoid",
    "elu": "Elu", "leaky_relu": "LeakyRelu", "softplus": "Softplus", "scaled_tanh": "ScaledTanh", "identity": "Affine",
}  # fmt: skip
# ONNX's numbers of ours that are named without.
_PLAIN = {"hard_sigmoid": (1 / 6, 0.5), "elu": (1.0,), "leaky_relu": (0.01,), "identity": (1.0, 0.0)}
# Numbers of the activations that have some, where a node does not give them; None: the standard names none.
_NUMBERS: dict[str, tuple[float | None, ...]] = {
    "affine": (None, None), "hardsigmoid": (0.2, 0.5), "scaledtanh": (None, None), "leakyrelu": (0.01,),
    "thresholdedrelu": (1.0,), "elu": (1.0,),
}  # fmt: skip


def ours(theirs: str, numbers: tuple[float, ...], option: str, where: str) -> Activation:
    """Our choice for an activation of ONNX."""
    name = next((key for key, value in _ACTIVATIONS.items() if value.lower() == theirs.lower()), None)
    chosen: Any = name
    if name and numbers and not (name in _PLAIN and np.allclose(numbers, _PLAIN[name], rtol=1e-6)):
        chosen = (name, *(float(str(np.float32(number))) for number in numbers))  # 0.2, not 0.20000000298
    try:
        gate = option == "recurrent_activation"
        return check(option, chosen, GATES if gate else CANDIDATES)
    except ValueError as error:
        shown = theirs + str(numbers) * bool(numbers)
        raise ValueError(f"{where}: activations: {shown} is not supported as {option} (activation_alpha, "
                         f"activation_beta: in brackets): {error}") from None  # fmt: skip


def check_coupled(gate: Activation, where: str) -> None:
    """ONNX computes i where we compute f = 1 - i: sigma(-a) = 1 - sigma(a) must hold."""
    if isinstance(gate, tuple) and gate[2] != 0.5:
        raise ValueError(f"{where}: input_forget=1 with {gate}: i = 1 - f is then another line, expected beta 0.5")


def onnxs(choice: Activation) -> tuple[str, tuple[float, ...]]:
    """ONNX's name and numbers of our choice."""
    name, *numbers = (choice,) if isinstance(choice, str) else choice
    if name not in _ACTIVATIONS:
        raise ValueError(f"layer: activation={choice!r}: ONNX has {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[str(name)], tuple(map(float, numbers)) or _PLAIN.get(str(name), ())


def chosen_of(names: list[str], attributes: Mapping[str, Any], where: str) -> list[tuple[str, tuple[float, ...]]]:
    """Each activation with its numbers; the lists alpha and beta are used up by those that have any, in order."""
    alpha, beta = (list(attributes.get(f"activation_{name}", [])) for name in ("alpha", "beta"))
    chosen = []
    for name in names:
        numbers = _NUMBERS.get(name.lower(), ())
        given: list[Any] = [values.pop(0) if values else default
                 for values, default in zip((alpha, beta), numbers, strict=False)]  # fmt: skip
        if None in given:
            raise ValueError(f"{where}: activations: {name}: expected activation_alpha and activation_beta")
        chosen.append((name, tuple(given)))
    if alpha or beta:
        raise ValueError(f"{where}: activation_alpha, activation_beta: more numbers than activations {names} take")
    return chosen
