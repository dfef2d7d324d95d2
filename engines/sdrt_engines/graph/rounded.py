"""A bfloat16 graph as a float32 one that rounds where that one does, for runtimes without bfloat16 kernels.

What a node makes in bfloat16 is made in float32 here, and rounded to bfloat16: as kernels do that sum in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdrt_engines.graph.external import Weights
from sdrt_engines.graph.half import BFLOAT, FLOAT


def rounded(model: Any, weights: Weights, folder: Path) -> None:
    """Write the float32 graph of a bfloat16 ModelProto into ``folder``; the model is that graph then."""
    from onnx import helper

    narrow = _in_bfloat(model, weights)
    for name in weights.names():
        if weights.dtype(name) == BFLOAT:
            weights.retype(name, FLOAT)
    nodes = []
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == BFLOAT:
                attribute.i = FLOAT
        nodes.append(node)
        for k, name in enumerate(node.output):
            if name in narrow:
                node.output[k] = f"{name}.whole"
                nodes.append(helper.make_node("Cast", [f"{name}.whole"], [f"{name}.rounded"], to=BFLOAT))
                nodes.append(helper.make_node("Cast", [f"{name}.rounded"], [name], to=FLOAT))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]
    weights.save(model, folder)


def _in_bfloat(model: Any, weights: Weights) -> set[str]:
    """The tensors that are bfloat16: cast to it, or of the type of an input that is. (Shape inference, which would tell
    types too, gives up in the middle of a network.)"""
    import onnx

    version = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    found = {name for name in weights.names() if weights.dtype(name) == BFLOAT}
    for node in model.graph.node:
        if node.op_type == "Cast":
            found |= set(node.output) if any(a.name == "to" and a.i == BFLOAT for a in node.attribute) else set()
            continue
        schema = onnx.defs.get_schema(node.op_type, version, "")
        last = len(schema.inputs) - 1
        kinds = {schema.inputs[min(i, last)].type_str for i, name in enumerate(node.input) if name in found}
        last = len(schema.outputs) - 1
        found |= {name for k, name in enumerate(node.output) if schema.outputs[min(k, last)].type_str in kinds}
    return found
