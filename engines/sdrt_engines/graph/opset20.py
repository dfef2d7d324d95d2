"""Graphs of opset 20, for execution providers that know no newer operators: DirectML, CoreML, OpenVINO, MIGraphX, QNN.

What opset 23 has beyond it in graphs of ours: Attention, as two products and a softmax between them;
GroupNormalization with scales by channels (``group_norm``); and new versions of old operators (Conv 22, Cast 23, …),
which only take more types.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from sdrt.errors import BuildError
from sdrt_engines.graph.cuda_kernels import types_of
from sdrt_engines.graph.group_norm import group_norm_as_instance_norm

OPSET, IR = 20, 9

NEWER = frozenset({"Attention", "RMSNormalization", "RotaryEmbedding", "Swish", "TensorScatter"})
"""Operators that opset 21 to 24 brought."""


def name_scales(model: Any, known: Mapping[str, tuple[int, ...]]) -> None:
    """Say each Attention's scale, whose default goes by the size of its heads: ``known`` has the tensors' shapes."""
    from onnx import helper

    for node in model.graph.node:
        if node.op_type == "Attention" and "scale" not in {a.name for a in node.attribute}:
            shape = known.get(node.input[0], ())
            if len(shape) != 4:
                raise BuildError(f"Attention node {node.name or node.output[0]!r}: its heads' size cannot be told")
            node.attribute.append(helper.make_attribute("scale", 1 / math.sqrt(shape[-1])))


def as_opset20(model: Any) -> dict[str, int]:
    """Rewrite a ModelProto of opset 21 to 23 in place; how many nodes of which operator. BuildError for what cannot be.

    Attention's scales are to be said (``name_scales``). In float16 its softmax is computed in float32, between casts.
    """
    counts = {"Attention": _attention_as_products(model), "GroupNormalization": group_norm_as_instance_norm(model)}
    for node in model.graph.node:
        if node.op_type in NEWER and node.domain in ("", "ai.onnx"):
            raise BuildError(f"node {node.name or node.output[0]!r}: {node.op_type} has no form in opset {OPSET}")
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx"):
            opset.version = min(opset.version, OPSET)
    model.ir_version = min(model.ir_version, IR)
    return {operator: count for operator, count in counts.items() if count}


def _attention_as_products(model: Any) -> int:
    from onnx import TensorProto, helper, numpy_helper

    types = types_of(model)
    constants: dict[str, Any] = {}
    nodes: list[Any] = []
    rewritten = 0

    def constant(name: str, value: Any) -> str:
        constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    for node in model.graph.node:
        if node.op_type != "Attention" or node.domain not in ("", "ai.onnx"):
            nodes.append(node)
            continue
        rewritten += 1
        said = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        _check(node, said)
        (q, k, v), mask, y = node.input[:3], (*node.input, "")[3], node.output[0]
        half = types[q] == TensorProto.FLOAT16
        kind = np.float16 if half else np.float32
        scale = constant(f"attention.scale.{said['scale']:.9g}{'.half' if half else ''}", kind(said["scale"]))
        scores = f"{y}.scores"
        nodes += [
            helper.make_node("Mul", [q, scale], [f"{y}.scaled"]),
            helper.make_node("Transpose", [k], [f"{y}.keys"], perm=[0, 1, 3, 2]),
            helper.make_node("MatMul", [f"{y}.scaled", f"{y}.keys"], [scores]),
        ]
        if half:
            nodes.append(helper.make_node("Cast", [scores], [f"{scores}.float"], to=TensorProto.FLOAT))
            scores = f"{scores}.float"
        if mask and types[mask] == TensorProto.BOOL:
            lowest = constant("attention.masked", np.finfo(np.float32).min)
            nodes.append(helper.make_node("Where", [mask, scores, lowest], [f"{y}.masked"]))
            scores = f"{y}.masked"
        elif mask:
            added = mask
            if types[mask] != TensorProto.FLOAT:
                added = f"{y}.mask"
                nodes.append(helper.make_node("Cast", [mask], [added], to=TensorProto.FLOAT))
            nodes.append(helper.make_node("Add", [scores, added], [f"{y}.masked"]))
            scores = f"{y}.masked"
        nodes.append(helper.make_node("Softmax", [scores], [f"{y}.weights"], axis=-1))
        weights = f"{y}.weights"
        if half:
            nodes.append(helper.make_node("Cast", [weights], [f"{y}.half"], to=TensorProto.FLOAT16))
            weights = f"{y}.half"
        nodes.append(helper.make_node("MatMul", [weights, v], [y]))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(constants.values())
    return rewritten


def _check(node: Any, said: Mapping[str, Any]) -> None:
    """BuildError for an Attention that is more than what networks of ours hold."""
    more = [name for name in ("is_causal", "softcap", "q_num_heads", "kv_num_heads") if said.get(name)]
    more += [f"input {i}" for i, name in enumerate(node.input[4:], 4) if name]
    more += [f"output {i}" for i, name in enumerate(node.output[1:], 1) if name]
    if more:
        raise BuildError(f"Attention node {node.name or node.output[0]!r}: {', '.join(more)} cannot be rewritten")
