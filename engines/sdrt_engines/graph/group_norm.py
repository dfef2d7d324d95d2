"""GroupNormalization as InstanceNormalization over groups, for engines that have a kernel for the latter only.

ONNX Runtime's CPU provider has none for GroupNormalization: it inlines the operator's definition, some twenty nodes
each, in which most of the time of loading a U-Net goes. With G groups, normalising x: [B,C,…] by groups is normalising
[B,G,C/G·…] by instances, then scale and bias by channels. A float16 one is computed in float32 between two casts, since
InstanceNormalization has no stash_type that would say so for its sums.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def group_norm_as_instance_norm(model: Any) -> int:
    """Rewrite every GroupNormalization (opset 21 or later) of a ModelProto in place; returns how many there were."""
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    vectors = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 1}
    constants: dict[str, Any] = {}

    def constant(name: str, values: Any) -> str:
        constants.setdefault(name, numpy_helper.from_array(np.asarray(values), name))
        return name

    nodes: list[Any] = []
    rewritten = 0
    for node in graph.node:
        if node.op_type != "GroupNormalization" or node.domain not in ("", "ai.onnx"):
            nodes.append(node)
            continue
        rewritten += 1
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        groups, epsilon = attributes["num_groups"], attributes.get("epsilon", 1e-5)
        x, scale, bias = node.input
        y = node.output[0]
        channels, half = vectors[scale].dims[0], vectors[scale].data_type == TensorProto.FLOAT16
        if half:
            x, scale, bias = (f"{y}.float.{name}" for name in ("x", "scale", "bias"))
            pairs = zip(node.input, (x, scale, bias), strict=True)
            nodes += [helper.make_node("Cast", [name], [cast], to=TensorProto.FLOAT) for name, cast in pairs]
        column = constant("group_norm.column", np.array([-1, 1], np.int64))
        ones, zeros = (
            constant(f"group_norm.{what}.{groups}", np.full(groups, value, np.float32))
            for what, value in (("one", 1), ("zero", 0))
        )
        grouped = constant(f"group_norm.groups.{groups}", np.array([0, groups, -1], np.int64))
        flat = constant(f"group_norm.channels.{channels}", np.array([0, channels, -1], np.int64))
        normed = f"{y}.float" if half else y
        nodes += [
            helper.make_node("Shape", [x], [f"{y}.shape"]),
            helper.make_node("Reshape", [x, grouped], [f"{y}.grouped"]),
            helper.make_node("InstanceNormalization", [f"{y}.grouped", ones, zeros], [f"{y}.normed"], epsilon=epsilon),
            helper.make_node("Reshape", [f"{y}.normed", flat], [f"{y}.flat"]),
            helper.make_node("Reshape", [scale, column], [f"{y}.scale"]),
            helper.make_node("Reshape", [bias, column], [f"{y}.bias"]),
            helper.make_node("Mul", [f"{y}.flat", f"{y}.scale"], [f"{y}.scaled"]),
            helper.make_node("Add", [f"{y}.scaled", f"{y}.bias"], [f"{y}.shifted"]),
            helper.make_node("Reshape", [f"{y}.shifted", f"{y}.shape"], [normed]),
        ]
        if half:
            nodes.append(helper.make_node("Cast", [normed], [y], to=TensorProto.FLOAT16))
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(constants.values())
    return rewritten
