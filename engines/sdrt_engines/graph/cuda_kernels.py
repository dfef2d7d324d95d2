"""What ONNX Runtime's CUDA provider has kernels for, of the operators that graphs of ours hold; and what to do without.

ONNX Runtime computes a node without kernel on the CPU, with a copy to and fro. Which operators have one is told by no
function of its Python package, and its documentation lags behind, so the table below was asked for: onnxruntime-gpu
1.31.1 was given one node of each operator and type at opset 23, and said (``session.record_ep_graph_assignment_info``)
which provider it gave the node to. An operator's version counts, too: a kernel of Conv's version 11 is none for 22.
``python -m benchmarks.cuda_kernels`` asks again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NAMES = {1: "f32", 10: "f16", 7: "i64", 6: "i32", 9: "bool"}
"""ONNX's numbers of element types."""

FLOATS = frozenset({"f32", "f16"})
NUMBERS = FLOATS | {"i64", "i32"}
ANY = NUMBERS | {"bool"}

KERNELS: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(("Add", "Div", "LessOrEqual", "Mul", "Pow", "Sub", "Where"), NUMBERS),
    **dict.fromkeys(
        (
            "Cast", "Concat", "Equal", "Expand", "Gather", "Identity", "Reshape", "Shape", "Slice", "Split", "Squeeze",
            "Transpose", "Unsqueeze",
        ),
        ANY,
    ),
    **dict.fromkeys(
        (
            "ArgMax", "Attention", "Conv", "Cos", "Erf", "Exp", "Gelu", "Gemm", "LayerNormalization", "MatMul",
            "Reciprocal", "Sigmoid", "Sin", "Softmax", "Sqrt", "Tanh",
        ),
        FLOATS,
    ),
    "GatherND": ANY - {"i32"},
    "Pad": FLOATS | {"bool"},
    "Range": NUMBERS - {"f16"},
    "ReduceMean": FLOATS | {"i32"},
    "Resize": FLOATS | {"i32"},
    # No kernel, but a definition in other operators, in which ONNX Runtime computes it: some thirteen nodes.
    "GroupNormalization": FLOATS,
}  # fmt: skip
"""By operator, the types of its data. Of those asked for, InstanceNormalization has no kernel at all, ArgMax none of
integers, Where none of bool."""

_DATA = {"Where": 1}
"""The input that is data, where that is not the first."""

_GIVES = {"ArgMax": 7, "Shape": 7, "Equal": 9, "LessOrEqual": 9}
"""The type of what comes out, where that is not the type of the data."""


def types_of(model: Any) -> dict[str, int]:
    """Of every tensor. onnx's own inference wants the weights' values, which are not there while passes run."""
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        to = next((a.i for a in node.attribute if a.name == "to"), 0) if node.op_type == "Cast" else 0
        kind = to or _GIVES.get(node.op_type, types.get(_data(node), 0))
        types.update(dict.fromkeys(node.output, kind))
    return types


def _data(node: Any) -> str:
    return node.input[_DATA.get(node.op_type, 0)] if node.input else ""


def without_kernel(model: Any) -> dict[str, int]:
    """Operators with their types (``ArgMax(i32)``) that the provider has no kernel for, and how many nodes of each."""
    types = types_of(model)
    counts: dict[str, int] = {}
    for node in model.graph.node:
        kind = types.get(_data(node), 0)
        name = _NAMES.get(kind, f"type {kind}")
        if node.domain not in ("", "ai.onnx") or name not in KERNELS.get(node.op_type, ()):
            key = f"{node.op_type}({name})"
            counts[key] = counts.get(key, 0) + 1
    return counts


def argmax_in_float(model: Any) -> int:
    """Search for the largest of integers among their float32 values; returns how often. In place.

    A text encoder finds the end of its text so: in numbers of tokens, or in noughts and ones. float32 tells integers
    apart up to 2²⁴, and no vocabulary is so large.
    """
    from onnx import TensorProto, helper

    types = types_of(model)
    nodes: list[Any] = []
    rewritten = 0
    for node in model.graph.node:
        if node.op_type == "ArgMax" and types.get(node.input[0]) in (TensorProto.INT32, TensorProto.INT64):
            floats = f"{node.output[0]}.float"
            nodes.append(helper.make_node("Cast", [node.input[0]], [floats], to=TensorProto.FLOAT))
            node.input[0] = floats
            rewritten += 1
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return rewritten
