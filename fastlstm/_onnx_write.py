"""A layer as an ONNX model: the other half of `fastlstm.onnx`."""

from __future__ import annotations

import os
import warnings
from typing import Any

import numpy as np
import onnx

from ._layer import Layer
from ._onnx_activations import check_coupled, onnxs
from ._saved import replace_file
from ._types import Array
from .files import reorder
from .layers import GRU, LSTM, RNN

PEEPHOLES = "iof"  # the order of P
_OPSET = 22  # the newest of these operators


def save(
    layer: Layer, path: str | os.PathLike[str], *, state: bool = True, lengths: bool = True, name: str = "fastlstm"
) -> None:
    """Write a layer as an ONNX model for inference: standard operators of opset 22, batch and time dynamic.

    Inputs are ``x`` (float32, the layer's axes), and as asked for ``lengths`` (batch, int32) and ``h_0`` (and ``c_0``
    for the LSTM) of shape (num_layers*dirs, batch, H); outputs ``y``, ``h_n`` (and ``c_n``). The nodes have layout 0,
    as ONNX Runtime wants; ``batch_first`` becomes a Transpose. What acts in training only (dropout, recurrent dropout)
    is left out. Written whole or not at all.

    A float64 layer is written in float32, as ONNX Runtime's recurrent operators compute: its weights are rounded
    to 24 significant bits, and a warning says by how much.

    Parameters
    ----------
    layer : LSTM, GRU or RNN
    path : path-like
    state, lengths : bool
        Whether the model takes initial states and lengths; without them they are zeros and all of T. Where it takes
        them, a caller must give them. For a length of 0 ONNX Runtime's last state is zero, ours the initial one.
    name : str
        Of the graph.

    Raises
    ------
    ValueError
        The layer has ``proj_size``, ``cell_clip``, zoneout or an activation that the operators lack.
    """
    if not isinstance(layer, (LSTM, GRU, RNN)):
        raise TypeError(f"layer: expected an LSTM, GRU or RNN, got {type(layer).__name__}")
    if getattr(layer, "layer_norm", False):
        raise ValueError("layer: layer_norm=True: ONNX's LSTM has none")
    if layer.proj_size:
        raise ValueError(f"layer: proj_size={layer.proj_size}: ONNX's LSTM has no projection")
    if any(layer._zoneout):
        raise ValueError(f"layer: zoneout={layer.zoneout}: ONNX's operators have none")
    if getattr(layer, "coupled", False):
        check_coupled(layer.recurrent_activation, "layer")
    if layer.cell_clip:
        raise ValueError(f"layer: cell_clip={layer.cell_clip}: ONNX's LSTM has none")
    model = _model(layer, state, lengths, name)
    onnx.checker.check_model(model, full_check=True)
    replace_file(path, model.SerializeToString())


def _model(layer: Layer, state: bool, lengths: bool, name: str) -> Any:
    helper, FLOAT = onnx.helper, onnx.TensorProto.FLOAT
    kind, dirs, H = type(layer).__name__, 2 if layer.bidirectional else 1, layer.hidden_size
    states = ("h", "c") if isinstance(layer, LSTM) else ("h",)
    made: list[Any] = []
    weights: dict[str, Array] = {}
    axes = ["batch", "time"] if layer.batch_first else ["time", "batch"]
    inputs = [helper.make_tensor_value_info("x", FLOAT, [*axes, layer.input_size])]
    outputs = [helper.make_tensor_value_info("y", FLOAT, [*axes, dirs * H])]
    if lengths:
        inputs.append(helper.make_tensor_value_info("lengths", onnx.TensorProto.INT32, ["batch"]))
    for letter in states:
        shape: list[str | int | None] = [layer.num_layers * dirs, "batch", H]
        outputs.append(helper.make_tensor_value_info(f"{letter}_n", FLOAT, shape))
        if state:
            inputs.append(helper.make_tensor_value_info(f"{letter}_0", FLOAT, shape))
            parts = [f"{letter}_0_l{i}" for i in range(layer.num_layers)]
            made.append(helper.make_node("Split", [f"{letter}_0"], parts, axis=0, num_outputs=layer.num_layers))
    source = "x"
    if layer.batch_first:
        source = "x_time_first"
        made.append(helper.make_node("Transpose", ["x"], [source], perm=[1, 0, 2]))
    weights["side_by_side"] = np.array([0, 0, -1], np.int64)
    for i in range(layer.num_layers):
        weights |= _weights(layer, kind, i)
        slots = [source, *(f"{key}_l{i}" for key in ("W", "R")), f"B_l{i}" * layer.bias, "lengths" * lengths]
        slots += [f"{letter}_0_l{i}" * state for letter in states]
        slots += [f"P_l{i}"] * (f"P_l{i}" in weights)
        results = [f"{what}_l{i}" for what in ("Y", *(f"{letter}_n" for letter in states))]
        made.append(helper.make_node(kind, slots, results, name=f"{kind.lower()}_l{i}", **_attributes(layer, kind)))
        made.append(helper.make_node("Transpose", [f"Y_l{i}"], [f"Y_l{i}_t"], perm=[0, 2, 1, 3]))
        last = i == layer.num_layers - 1
        source = "y" if last and not layer.batch_first else f"y_l{i}"
        made.append(helper.make_node("Reshape", [f"Y_l{i}_t", "side_by_side"], [source]))
    if layer.batch_first:
        made.append(helper.make_node("Transpose", [source], ["y"], perm=[1, 0, 2]))
    for letter in states:
        parts = [f"{letter}_n_l{i}" for i in range(layer.num_layers)]
        made.append(helper.make_node("Concat", parts, [f"{letter}_n"], axis=0))
    held = [onnx.numpy_helper.from_array(np.ascontiguousarray(a), key) for key, a in weights.items()]
    graph = helper.make_graph(made, name, inputs, outputs, held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=10,
                             producer_name="fastlstm")  # fmt: skip


def _uncouple(array: Array) -> Array:
    f, g, o = np.split(array, 3)
    return np.concatenate([-f, np.zeros_like(f), g, o])


def _weights(layer: Layer, kind: str, i: int) -> dict[str, Array]:
    """W, R, B and P of one layer, in ONNX's order and float32."""
    suffixes = [f"_l{i}" + "_reverse" * d for d in range(2 if layer.bidirectional else 1)]

    def stack(key: str) -> Array:
        arrays = [layer.params[key + suffix] for suffix in suffixes]
        if getattr(layer, "coupled", False):
            arrays = [_uncouple(array) for array in arrays]
        return np.stack([reorder(array, kind, to="onnx") for array in arrays])

    arrays = {f"W_l{i}": stack("weight_ih"), f"R_l{i}": stack("weight_hh")}
    if layer.bias:
        arrays[f"B_l{i}"] = np.concatenate([stack("bias_ih"), stack("bias_hh")], axis=1)
    if getattr(layer, "peepholes", False):
        looks = [[layer.params[f"weight_c{letter}{suffix}"] for letter in PEEPHOLES] for suffix in suffixes]
        arrays[f"P_l{i}"] = np.reshape(looks, (len(suffixes), -1))
    single = {key: array.astype(np.float32) for key, array in arrays.items()}
    if layer.dtype == np.float64 and i == 0:
        error = max(float(abs(single[key] - arrays[key]).max()) for key in arrays)
        warnings.warn(f"onnx.save: a float64 layer is written in float32, its weights rounded (here by up to "
                      f"{error:.1e} in the first layer)", stacklevel=4)  # fmt: skip
    return single


def _attributes(layer: Layer, kind: str) -> dict[str, Any]:
    gate, candidate = onnxs(layer.recurrent_activation), onnxs(layer.activation)
    out = onnxs(layer.output_activation or layer.activation)
    chosen = {"RNN": [candidate], "GRU": [gate, candidate], "LSTM": [gate, candidate, out]}[kind]
    chosen = chosen * (2 if layer.bidirectional else 1)
    attributes: dict[str, Any] = {
        "hidden_size": layer.hidden_size,
        "direction": "bidirectional" if layer.bidirectional else layer.direction,
        "activations": [name for name, _ in chosen],
    }
    for i, name in enumerate(("activation_alpha", "activation_beta")):
        if numbers := [values[i] for _, values in chosen if len(values) > i]:
            attributes[name] = numbers
    if layer.clip:
        attributes["clip"] = layer.clip
    if getattr(layer, "coupled", False):
        attributes["input_forget"] = 1
    if isinstance(layer, GRU):
        attributes["linear_before_reset"] = int(layer.reset_after)
    return attributes
