"""ONNX Runtime's own operators (com.microsoft) in place of several of ONNX's, for its CUDA provider.

GroupNorm: a group norm with the SiLU behind it, in one kernel for channels last, between two transpositions.
SkipLayerNormalization: a sum with the layer norm of it. BiasSplitGelu: a feed-forward's bias, halving and gated Gelu.
The kernels take certain sizes only, other nodes stay; the CPU has no kernel for the first and the last.

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdrt_engines.graph.external import Weights

DOMAIN = "com.microsoft"
FLOAT = 1
"""ONNX's number of float32."""

CHANNELS = frozenset({64, 128, 256, 320, 512, 640, 960, 1280, 1920, 2560})
"""Of those of Stable Diffusion's networks, what GroupNorm's kernel takes (onnxruntime-gpu 1.31.1; 32 it refuses)."""

HIDDEN = frozenset({2560, 5120, 6144, 10240, 12288})
"""Columns before halving, as BiasSplitGelu's kernel lists them when it refuses others."""

Shapes = Mapping[str, tuple[int, ...]]
PLAIN = "plain.onnx"
"""The graph before the rewriting, beside it: what the CPU runs."""


def fuse(model: Any, weights: Weights, shapes: Shapes) -> dict[str, int]:
    """Rewrite a ModelProto in place; returns how many nodes of each kind came.

    shapes: of its tensors, at some size; those that precision's casts made have their inputs'.
    """
    from onnx import helper

    shapes = dict(shapes)
    for node in model.graph.node:
        if node.op_type == "Cast" and node.input[0] in shapes:
            shapes.setdefault(node.output[0], shapes[node.input[0]])
    counts = {
        "GroupNorm": _group_norms(model.graph, weights, shapes),
        "SkipLayerNormalization": _skip_layer_norms(model.graph, weights, shapes),
        "BiasSplitGelu": _gated_gelus(model.graph, weights, shapes),
    }
    if any(counts.values()):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return counts


class _Nodes:
    """Who reads what. ``replace`` notes what comes in place of some nodes, ``write`` rewrites the graph."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph
        self._readers: dict[str, list[Any]] = defaultdict(list)
        self._outputs = {output.name for output in graph.output}
        self._new: dict[str, list[Any]] = {}  # by the first output of the node that goes
        for node in graph.node:
            for name in node.input:
                self._readers[name].append(node)

    def readers(self, name: str, *operators: str) -> list[Any]:
        """The readers of a tensor, in the operators' order; none unless they are just those."""
        found = self._readers[name]
        if name in self._outputs or sorted(n.op_type for n in found) != sorted(operators):
            return []
        return sorted(found, key=lambda node: operators.index(node.op_type))

    def replace(self, old: list[Any], new: list[Any]) -> None:
        """New nodes where the first of the old ones stood."""
        for node, nodes in zip(old, [new] + [[]] * (len(old) - 1), strict=True):
            self._new[node.output[0]] = nodes

    def write(self) -> None:
        nodes = [new for node in self._graph.node for new in self._new.get(node.output[0], [node])]
        del self._graph.node[:]
        self._graph.node.extend(nodes)


def _attributes(node: Any) -> dict[str, Any]:
    from onnx import helper

    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _group_norms(graph: Any, weights: Weights, shapes: Shapes) -> int:
    from onnx import helper

    nodes, count = _Nodes(graph), 0
    for node in graph.node:
        x, y = node.input[0] if node.input else "", node.output[0]
        shape = shapes.get(x, ())
        if node.op_type != "GroupNormalization" or len(shape) != 4 or shape[1] not in CHANNELS:
            continue
        old = [node]
        if pair := nodes.readers(y, "Sigmoid", "Mul"):
            sigmoid, product = pair
            if set(product.input) == {y, sigmoid.output[0]} and nodes.readers(sigmoid.output[0], "Mul"):
                old, y = [node, sigmoid, product], product.output[0]
        scale, bias = (_float(weights, name) for name in node.input[1:3])
        facts = _attributes(node)
        last, normed = f"{y}.last", f"{y}.normed"
        nodes.replace(
            old,
            [
                helper.make_node("Transpose", [x], [last], perm=[0, 2, 3, 1]),
                helper.make_node(
                    "GroupNorm", [last, scale, bias], [normed], domain=DOMAIN, activation=int(len(old) > 1),
                    channels_last=1, groups=facts["num_groups"], epsilon=facts.get("epsilon", 1e-5),
                ),
                helper.make_node("Transpose", [normed], [y], perm=[0, 3, 1, 2]),
            ],
        )  # fmt: skip
        count += 1
    nodes.write()
    return count


def _float(weights: Weights, name: str) -> str:
    """The vector in float32, as the kernel takes scale and bias whatever it computes in."""
    if weights.dtype(name) == FLOAT:
        return name

    def make() -> NDArray[Any]:
        return np.asarray(weights[name], np.float32)

    return weights.declare(f"{name}.float", FLOAT, weights.dims(name), make)


def _skip_layer_norms(graph: Any, weights: Weights, shapes: Shapes) -> int:
    from onnx import helper

    nodes, count = _Nodes(graph), 0
    norms = {node.input[0]: node for node in graph.node if node.op_type == "LayerNormalization"}
    for node in graph.node:
        norm = norms.get(node.output[0]) if node.op_type == "Add" else None
        if norm is None or len(norm.input) != 3 or len(norm.output) != 1 or set(node.input) & set(weights.names()):
            continue
        left, right = (shapes.get(name, ()) for name in node.input)
        facts = _attributes(norm)
        if len(left) != 3 or left != right or facts.get("axis", -1) not in (-1, 2):
            continue
        fused = helper.make_node(
            "SkipLayerNormalization", [*node.input, *norm.input[1:]], [norm.output[0], "", "", node.output[0]],
            domain=DOMAIN, epsilon=facts.get("epsilon", 1e-5),
        )  # fmt: skip
        nodes.replace([node, norm], [fused])
        count += 1
    nodes.write()
    return count


def _gated_gelus(graph: Any, weights: Weights, shapes: Shapes) -> int:
    from onnx import helper

    nodes, count = _Nodes(graph), 0
    for node in graph.node:
        biases = [name for name in node.input if name in weights] if node.op_type == "Add" else []
        split = nodes.readers(node.output[0], "Split")
        if len(biases) != 1 or not split or len(weights.dims(biases[0])) != 1 or len(split[0].output) != 2:
            continue
        shape, facts = shapes.get(node.output[0], ()), _attributes(split[0])
        half, gate = split[0].output
        gelu, product = nodes.readers(gate, "Gelu"), nodes.readers(half, "Mul")
        if len(shape) != 3 or shape[-1] not in HIDDEN or facts.get("axis") not in (-1, 2) or not gelu or not product:
            continue
        exact = _attributes(gelu[0]).get("approximate", b"none") == b"none"
        even = len(split[0].input) == 1 and weights.dims(biases[0]) == shape[-1:]
        if not exact or not even or set(product[0].input) != {half, gelu[0].output[0]}:
            continue
        if nodes.readers(gelu[0].output[0], "Mul"):
            x = next(name for name in node.input if name != biases[0])
            fused = helper.make_node("BiasSplitGelu", [x, biases[0]], [product[0].output[0]], domain=DOMAIN)
            nodes.replace([node, split[0], gelu[0], product[0]], [fused])
            count += 1
    nodes.write()
    return count


def left_over(plain: Any, model: Any, weights: Weights) -> list[Any]:
    """The weights, vectors, that a graph reads and the one that it was rewritten to, not yet saved, does not."""
    from onnx import numpy_helper

    reads, others = ({name for node in graph.graph.node for name in node.input} for graph in (plain, model))
    return [
        numpy_helper.from_array(np.array(weights[name]), name) for name in weights.names() if name in reads - others
    ]


def save_plain(plain: Any, saved: Any, vectors: list[Any], folder: Path) -> None:
    """Write a graph as ``PLAIN`` beside the one that it was rewritten to and saved as, whose weights it reads."""
    reads = {name for node in plain.graph.node for name in node.input}
    del plain.graph.initializer[:]
    plain.graph.initializer.extend(tensor for tensor in saved.graph.initializer if tensor.name in reads)
    plain.graph.initializer.extend(vectors)
    (folder / PLAIN).write_bytes(plain.SerializeToString())
