"""ONNX: recurrent nodes of a model as layers, and a layer as a model of standard operators.

The operators are LSTM, GRU and RNN as the ONNX operator documentation defines them: gates in the order i, o, f, c and
z, r, h, weights (directions, gates*H, .), both biases side by side. Needs the package onnx.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

try:
    import onnx
except ImportError as error:
    raise ImportError("fastlstm.onnx needs onnx: python -m pip install onnx") from error

from . import _checks, _onnx_graph
from ._layer import Layer
from ._onnx_activations import check_coupled, chosen_of, ours
from ._onnx_write import PEEPHOLES, save
from ._types import Array
from .files import ORDERS, reorder
from .layers import GRU, LSTM, RNN

__all__ = ["Node", "load", "nodes", "save"]

_INPUTS = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")
_ATTRIBUTES = {"activations": "STRINGS", "activation_alpha": "FLOATS", "activation_beta": "FLOATS", "clip": "FLOAT",
               "direction": "STRING", "hidden_size": "INT", "layout": "INT", "input_forget": "INT",
               "linear_before_reset": "INT"}  # fmt: skip


@dataclass(frozen=True)
class Node:
    """One recurrent node of a model, or several on top of each other, as a layer.

    Attributes
    ----------
    name : str
        Of the node (the first of several), or of its output Y where it has no name.
    layer : LSTM, GRU or RNN
    x : str
        Name of the tensor that it reads.
    y : str
        Name of the output Y (of the last node), which has the directions as an axis of its own.
    state : None, array or pair of arrays
        Initial state that the model holds as a constant, (num_layers*dirs, N, H); None where it is zero, absent or
        computed by the model: then it is for the caller to give.
    lengths : None or array
        Lengths (sequence_lens) that the model holds as a constant, (N,); None where they are all of T, absent or
        computed by the model: then they are for the caller to give.
    """

    name: str
    layer: Layer
    x: str
    y: str
    state: Any
    lengths: Any = None


def load(model: Any) -> dict[str, Layer]:
    """Read the recurrent nodes of a model as layers.

    Parameters
    ----------
    model : path-like or onnx.ModelProto
        LSTM, GRU and RNN of opset 7 or later, also inside the branches of If, Loop and Scan. Nodes on top of each
        other become one layer of several if nothing else reads what lies between them.

    Returns
    -------
    dict of str to LSTM, GRU or RNN
        By the name of the (first) node, or of its output Y where it has none; ``batch_first`` with ``layout=1``. What
        the model feeds as sequence_lens and initial states are the arguments ``lengths`` and ``state`` of the call. A
        float16 or bfloat16 weight becomes float32.

    Raises
    ------
    ValueError
        The file is damaged, has no such node, or a node does what the layers do not: the attribute or input is named.
    """
    found = nodes(model)
    for node in found:
        for inputs, constant in (("initial_h, initial_c", node.state), ("sequence_lens", node.lengths)):
            if constant is not None:
                raise ValueError(f"node {node.name!r}: {inputs}: constants that are not the default, which would be "
                                 "lost; fastlstm.onnx.nodes gives them beside the layer")  # fmt: skip
    return {node.name: node.layer for node in found}


def nodes(model: Any) -> list[Node]:
    """Like `load`, with what the model says about each layer's inputs and initial states."""
    source = "model" if isinstance(model, onnx.ModelProto) else os.fspath(model)
    try:
        graph = _onnx_graph.open_model(model)
    except OSError:
        raise
    except Exception as error:  # protobuf's, onnx's
        raise ValueError(f"{source}: not an ONNX model that can be read: {error}") from None
    try:
        found = [_read(node, scope) for node, scope in graph.recurrent()]
        groups = _group(found)
    except (TypeError, KeyError, AttributeError, IndexError, MemoryError, RecursionError) as error:
        raise ValueError(f"{source}: {type(error).__name__}: {error}") from None
    if not groups:
        raise ValueError(f"{source}: expected nodes LSTM, GRU or RNN, found {graph.operators()}")
    names = [group[0].name for group in groups]
    if len(set(names)) != len(names):
        raise ValueError(f"{source}: expected names of nodes that differ, found {names}")
    return [_node(group) for group in groups]


@dataclass
class _Read:
    """A node as found: options of the layer, and weights in our order by our names without the layer's number."""

    name: str
    where: str
    scope: _onnx_graph.Scope
    node: Any
    kind: str
    options: dict[str, Any]
    size: int
    params: dict[str, Array]
    states: list[Array | None]
    lengths: Array | None


def _read(node: Any, scope: _onnx_graph.Scope) -> _Read:
    name = node.name or next((output for output in node.output if output), "")
    where = f"node {name!r} ({node.op_type})"
    given = dict(zip(_INPUTS, node.input, strict=False))
    attributes = _attributes_of(node, where)
    options = _options(node.op_type, attributes, where)
    dirs = 2 if options["bidirectional"] else 1

    def constant(key: str) -> Array | None:
        if not given.get(key):
            return None
        if sparse := scope.sparse_source(given[key]):
            raise ValueError(f"{where}: {key}: expected a dense initializer, found {sparse!r} in sparse_initializer; "
                             "store it as a whole tensor")  # fmt: skip
        return scope.constant(given[key])

    weights = {}
    for key in "WRBP":
        weights[key] = array = constant(key)
        if array is None and (key in "WR" or given.get(key)):
            raise ValueError(f"{where}: {key}: expected weights that the model holds, found {given.get(key) or 'none'}")
    W, R, B, P = (weights[key] for key in "WRBP")
    assert W is not None and R is not None
    if W.dtype.kind != "f" and W.dtype.name != "bfloat16":
        raise ValueError(f"{where}: W: expected floating-point numbers, found {W.dtype}")
    hidden: Any = attributes.get("hidden_size", R.shape[-1] if R.ndim else 0)
    rows = len(ORDERS["onnx"][node.op_type]) * hidden
    if W.ndim != 3 or W.shape[:2] != (dirs, rows) or 0 in W.shape:
        raise ValueError(f"{where}: W: expected shape ({dirs}, {rows}, input size), found {W.shape}")
    for key, array, shape in (("R", R, (dirs, rows, hidden)), ("B", B, (dirs, 2 * rows)), ("P", P, (dirs, 3 * hidden))):
        if array is not None and array.shape != shape:
            raise ValueError(f"{where}: {key}: expected shape {shape}, found {array.shape}")
        if array is not None and array.dtype != W.dtype:
            raise ValueError(f"{where}: {key}: expected {W.dtype} as W's, found {array.dtype}")
    options["dtype"] = "float64" if W.dtype == np.float64 else "float32"
    params: dict[str, Array] = {}
    for d in range(dirs):
        parts = {"weight_ih": W[d], "weight_hh": R[d]}
        if B is not None:
            parts |= {"bias_ih": B[d, :rows], "bias_hh": B[d, rows:]}
        for key, array in parts.items():
            array = reorder(array, node.op_type, "onnx")
            params[key + "{}" + "_reverse" * d] = _couple(array) if options.get("coupled") else array
        if P is not None:
            for letter, array in zip(PEEPHOLES, np.split(P[d], 3), strict=True):
                params[f"weight_c{letter}{{}}" + "_reverse" * d] = array
    if P is not None:
        if options.get("coupled") and np.any(P):
            raise ValueError(f"{where}: P: peepholes with input_forget=1 are not supported")
        options["peepholes"] = not options.get("coupled")
    options["bias"] = B is not None
    states = [constant(key) for key in ("initial_h", "initial_c")]
    if options["batch_first"]:
        states = [None if s is None else s.swapaxes(0, 1) for s in states]
    lengths = constant("sequence_lens")
    if lengths is not None and np.all(lengths == scope.steps(given["X"], 1 if options["batch_first"] else 0)):
        lengths = None
    return _Read(name, where, scope, node, node.op_type, options | {"hidden_size": hidden}, W.shape[2], params, states,
                 lengths)  # fmt: skip


def _attributes_of(node: Any, where: str) -> dict[str, Any]:
    """A node's attributes, those that are known of the type that they should have."""
    types = onnx.AttributeProto.AttributeType
    for attribute in node.attribute:
        expected, found = _ATTRIBUTES.get(attribute.name), types.Name(attribute.type)
        if expected not in (None, found):
            raise ValueError(f"{where}: {attribute.name}: expected an attribute of type {expected}, found {found}")
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _options(kind: str, attributes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Arguments of our constructor for a node's attributes."""
    known = {"activations", "activation_alpha", "activation_beta", "clip", "direction", "hidden_size", "layout"}
    known |= {"LSTM": {"input_forget"}, "GRU": {"linear_before_reset"}}.get(kind, set())
    if unknown := sorted(attributes.keys() - known):
        raise ValueError(f"{where}: unknown attributes {unknown}")
    direction = attributes.get("direction", b"forward").decode()
    if direction not in ("forward", "reverse", "bidirectional"):
        raise ValueError(f"{where}: direction={direction!r}: expected 'forward', 'reverse' or 'bidirectional'")
    hidden, layout = attributes.get("hidden_size", 1), attributes.get("layout", 0)
    if hidden < 1 or layout not in (0, 1):
        raise ValueError(f"{where}: expected hidden_size >= 1 and layout 0 or 1, found {hidden} and {layout}")
    options: dict[str, Any] = {"bidirectional": direction == "bidirectional", "batch_first": layout == 1}
    options["direction"] = "reverse" if direction == "reverse" else "forward"
    if attributes.get("input_forget"):
        options["coupled"] = True
    if clip := attributes.get("clip"):  # 0: none
        options["clip"] = _checks.number(f"{where}: clip", clip, open_low=True)
    if kind == "GRU":
        options["reset_after"] = bool(attributes.get("linear_before_reset", 0))
    defaults = ["Tanh"] if kind == "RNN" else ["Sigmoid", "Tanh"] if kind == "GRU" else ["Sigmoid", "Tanh", "Tanh"]
    count = len(defaults) * (2 if options["bidirectional"] else 1)
    names = [name.decode() for name in attributes.get("activations", [])] or defaults * (count // len(defaults))
    if len(names) != count:
        raise ValueError(f"{where}: activations: expected {count}, found {names}")
    slots = ("nonlinearity",) if kind == "RNN" else ("recurrent_activation", "activation", "output_activation")
    for i, (theirs, numbers) in enumerate(chosen_of(names, attributes, where)):
        option = slots[i % len(defaults)]
        choice = ours(theirs, numbers, option, where)
        if options.setdefault(option, choice) != choice:
            raise ValueError(f"{where}: activations: expected one choice for {option}, found {names}")
    if options.get("coupled"):
        check_coupled(options["recurrent_activation"], where)
    if options.get("output_activation") == options.get("activation"):
        options.pop("output_activation", None)
    return options


def _couple(array: Array) -> Array:
    """Rows i, f, g, o of a node with input_forget, which has f = 1 - i, as ours f, g, o: 1 - sigma(a) = sigma(-a)."""
    i, _, g, o = np.split(array, 4)
    return np.concatenate([-i, g, o])


def _group(found: list[_Read]) -> list[list[_Read]]:
    """Nodes on top of each other, together."""
    groups: list[list[_Read]] = []
    for read in found:
        for group in groups:
            last = group[-1]
            same = last.kind == read.kind and last.scope is read.scope
            same = same and {**last.options, "bias": 0} == {**read.options, "bias": 0}
            width = last.options["hidden_size"] * (2 if last.options["bidirectional"] else 1)
            lengths = ([*r.node.input, *[""] * 8][4] for r in (last, read))
            if same and read.size == width and len(set(lengths)) == 1 and read.scope.stacked(
                last.node, read.node, width, read.options["batch_first"]
            ):  # fmt: skip
                group.append(read)
                break
        else:
            groups.append([read])
    return groups


def _node(group: list[_Read]) -> Node:
    first = group[0]
    options = first.options | {"num_layers": len(group), "bias": any(read.options["bias"] for read in group)}
    kind: Any = {"LSTM": LSTM, "GRU": GRU, "RNN": RNN}[first.kind]
    layer = kind(first.size, init="zeros", **options)
    params = {name.format(f"_l{i}"): a for i, read in enumerate(group) for name, a in read.params.items()}
    layer.load_state_dict({name: params.get(name, np.zeros_like(view)) for name, view in layer.params.items()})
    state = None
    if any(s is not None and np.any(s) for read in group for s in read.states):
        state = _constant_state(group, layer)
    return Node(first.name, layer, first.node.input[0], group[-1].node.output[0], state, first.lengths)


def _constant_state(group: list[_Read], layer: Layer) -> Any:
    """The constant initial states of all layers; zero where a node has none."""
    given = [s for read in group for s in read.states if s is not None]
    dirs = 2 if layer.bidirectional else 1
    shape = (dirs, given[0].shape[1] if given[0].ndim == 3 else 0, layer.hidden_size)
    if any(s.shape != shape for s in given):
        raise ValueError(f"{group[0].where}: initial_h, initial_c: expected shape {shape}, "
                         f"found {[s.shape for s in given]}")  # fmt: skip
    h, c = (
        np.concatenate([np.zeros(shape, layer.dtype) if r.states[i] is None else r.states[i] for r in group])
        for i in (0, 1)
    )
    return (h, c) if group[0].kind == "LSTM" else h
