"""An ONNX graph as `fastlstm.onnx` reads it: constants, what produces and what reads a tensor, subgraphs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnx
import onnx.reference

from ._types import Array

_KINDS = ("LSTM", "GRU", "RNN")
# Operators that compute a weight from other weights, and the axes between two layers: no arithmetic but that of
# shapes, dequantisation and casts.
_MOVERS = {"Add", "Cast", "Concat", "Constant", "ConstantOfShape", "DequantizeLinear", "Div", "Dropout", "Expand",
           "Flatten", "Gather", "Identity", "Mul", "Reshape", "Shape", "Slice", "Split", "Squeeze", "Sub", "Transpose",
           "Unsqueeze"}  # fmt: skip


def open_model(model: Any) -> Scope:
    """The outermost graph of a model, by path or as it is."""
    if not isinstance(model, onnx.ModelProto):
        model = onnx.load(os.fspath(model))
    versions = {o.domain: o.version for o in model.opset_import}
    version = versions.get("", versions.get("ai.onnx", 0))
    if version < 7:
        raise ValueError(f"opset {version or 'not given'}: expected 7 or later")
    if model.functions:
        from onnx.inliner import inline_local_functions

        model = inline_local_functions(model)
    return Scope(model.graph, None, model)


class Scope:
    """One graph, and the ones around it.

    Parameters
    ----------
    graph : onnx.GraphProto
    outer : Scope or None
    model : onnx.ModelProto
        For the versions of the operators.
    """

    def __init__(self, graph: Any, outer: Scope | None, model: Any) -> None:
        self.graph, self.outer, self.model = graph, outer, model
        self.held = {tensor.name: tensor for tensor in graph.initializer}
        self.sparse = {tensor.values.name for tensor in graph.sparse_initializer}
        self.producers = {name: node for node in graph.node for name in node.output if name}
        self.readers: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in {*node.input, *_captured(node)}:
                self.readers.setdefault(name, []).append(node)
        self.results = {value.name for value in graph.output}
        self.inner = [Scope(g, self, model) for node in graph.node for g in _subgraphs(node)]

    def recurrent(self) -> Iterator[tuple[Any, Scope]]:
        """The recurrent nodes in their order, each with its graph."""
        inner = iter(self.inner)
        for node in self.graph.node:
            if node.op_type in _KINDS and node.domain in ("", "ai.onnx"):
                yield node, self
            for _ in _subgraphs(node):
                yield from next(inner).recurrent()

    def operators(self) -> str:
        """What operators there are, for an error."""
        names = sorted({str(node.op_type) for node in self.graph.node} | {i.operators() for i in self.inner} - {"none"})
        return ", ".join(names)[:200] or "none"

    def constant(self, name: str) -> Array | None:
        """The value of a tensor that does not depend on the model's inputs, or None."""
        if name in self.held:
            try:
                return np.asarray(onnx.numpy_helper.to_array(self.held[name]))
            except Exception as error:  # more or less bytes than its shape has, unknown types
                raise ValueError(f"tensor {name!r}: {error}") from None
        if name not in self.producers:
            outside = any(name == value.name for value in self.graph.input)
            return self.outer.constant(name) if self.outer is not None and not outside else None
        nodes, leaves = self._slice(name, ())
        values = {leaf: None if leaf in self.producers else self.constant(leaf) for leaf in leaves}
        if any(value is None for value in values.values()):
            return None
        return self._run(nodes, values, name)

    def sparse_source(self, name: str) -> str | None:
        """A tensor of sparse_initializer that a tensor depends on, if any: it is none of the constants."""
        _, leaves = self._slice(name, ())
        for leaf in sorted(leaves):
            if leaf in self.sparse:
                return leaf
            if self.outer is not None and leaf not in self.producers and (found := self.outer.sparse_source(leaf)):
                return found
        return None

    def _slice(self, name: str, stops: Iterable[str]) -> tuple[list[Any], set[str]]:
        """The nodes that compute a tensor, in order, and the tensors that they start from."""
        nodes: list[Any] = []
        leaves: set[str] = set()
        seen: set[str] = set()
        stack = [name]
        while stack:
            tensor = stack.pop()
            if tensor in seen or not tensor:
                continue
            seen.add(tensor)
            node = self.producers.get(tensor)
            if node is None or tensor in stops or node.op_type not in _MOVERS or node.domain not in ("", "ai.onnx"):
                leaves.add(tensor)
                continue
            if not any(node is other for other in nodes):
                nodes.append(node)
                stack.extend(node.input)
        place = {id(node): i for i, node in enumerate(self.graph.node)}
        return sorted(nodes, key=lambda node: place[id(node)]), leaves

    def _run(self, nodes: list[Any], feeds: dict[str, Any], name: str) -> Array:
        info = [onnx.helper.make_tensor_value_info(key, onnx.helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
                for key, v in feeds.items()]  # fmt: skip
        graph = onnx.helper.make_graph(nodes, "part", info, [onnx.ValueInfoProto(name=name)])
        version = next(o.version for o in self.model.opset_import if o.domain in ("", "ai.onnx"))
        # Since opset 13 these operators mean the same, and the evaluator knows more of them as of 21.
        opset = onnx.helper.make_opsetid("", max(version, 21) if version >= 13 else version)
        part = onnx.helper.make_model(graph, opset_imports=[opset])
        try:
            (value,) = onnx.reference.ReferenceEvaluator(part).run(None, feeds)
        except Exception as error:  # whatever the operators make of a damaged model
            raise ValueError(f"tensor {name!r} cannot be computed: {error}") from None
        return np.asarray(value)

    def steps(self, x: str, axis: int) -> int:
        """The number of steps of a tensor if the model states it, else 0."""
        try:
            graph = onnx.shape_inference.infer_shapes(self.model).graph if self.outer is None else self.graph
        except Exception:  # whatever it makes of a damaged model
            return 0
        for value in (*graph.input, *graph.value_info):
            sizes = value.type.tensor_type.shape.dim
            if value.name == x and len(sizes) == 3:
                return int(sizes[axis].dim_value)
        return 0

    def stacked(self, below: Any, above: Any, width: int, batch_first: bool) -> bool:
        """Whether ``above`` reads Y of ``below`` with its directions side by side, and nothing else reads it."""
        y, x = below.output[0], above.input[0]
        nodes, leaves = self._slice(x, (y,))
        between = {id(node) for node in nodes} | {id(above)}
        values = {leaf: self.constant(leaf) for leaf in leaves - {y}}
        if y not in leaves or any(value is None for value in values.values()):
            return False
        made = {name for node in nodes for name in node.output} | {y}
        readers = [node for name in made for node in self.readers.get(name, []) if node.op_type != "Shape"]
        if made & self.results or any(id(node) not in between for node in readers) or _cuts(nodes, y):
            return False
        dirs = 2 if _text(below, "direction") == "bidirectional" else 1
        for T, N in self._sizes(y, batch_first, nodes):
            shape = (N, T, dirs, width // dirs) if batch_first else (T, dirs, N, width // dirs)
            sample = np.sqrt(np.arange(T * N * width, dtype=np.float32)).reshape(shape)  # lost in types of fewer digits
            flat = sample.reshape(N, T, width) if batch_first else sample.swapaxes(1, 2).reshape(T, N, width)
            try:
                if np.array_equal(self._run(nodes, {y: sample} | values, x), flat):
                    return True
            except ValueError:
                continue  # a Reshape with the sizes of the sample that was exported
        return False

    def _sizes(self, y: str, batch_first: bool, nodes: list[Any]) -> Iterator[tuple[int, int]]:
        """Pairs (T, N) to try: any, then those that a Reshape or the model's own shapes state."""
        yield 5, 3
        for node in nodes:
            if node.op_type == "Reshape":
                shape = self.constant(node.input[1])
                if shape is not None and shape.shape == (3,) and ((shape[:2] > 0) & (shape[:2] <= 4096)).all():
                    first, second = int(shape[0]), int(shape[1])
                    yield (second, first) if batch_first else (first, second)


def _cuts(nodes: list[Any], y: str) -> bool:
    """Whether a Slice is among what moves the numbers of y: where it cuts, no sample of a few steps can tell."""
    data = {y}
    for node in nodes:
        if data & {*node.input[:1]} and node.op_type != "Shape":
            if node.op_type == "Slice":
                return True
            data |= {*node.output}
    return False


def _subgraphs(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _captured(node: Any) -> set[str]:
    """Names that the subgraphs of a node read, whether from within or from outside."""
    names: set[str] = set()
    for graph in _subgraphs(node):
        for inner in graph.node:
            names |= {*inner.input, *_captured(inner)}
        names |= {value.name for value in graph.output}
    return names


def _text(node: Any, name: str) -> str:
    return next((a.s.decode() for a in node.attribute if a.name == name), "")
