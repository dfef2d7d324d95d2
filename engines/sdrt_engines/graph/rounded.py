"""A bfloat16 graph as a float32 one that rounds where that one does, for runtimes without bfloat16 kernels.

What a node makes in bfloat16 is made in float32 here, and rounded to bfloat16: as kernels do that sum in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdrt_engines.graph.external import Weights
from sdrt_engines.graph.half import BFLOAT, FLOAT
from sdrt_engines.graph.ranges import element_types


def rounded(model: Any, weights: Weights, folder: Path) -> None:
    """Write the float32 graph of a bfloat16 ModelProto into ``folder``; the model is that graph then."""
    from onnx import helper

    types = element_types(model)
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
            if types.get(name) == BFLOAT:
                node.output[k] = f"{name}.whole"
                nodes.append(helper.make_node("Cast", [f"{name}.whole"], [f"{name}.rounded"], to=BFLOAT))
                nodes.append(helper.make_node("Cast", [f"{name}.rounded"], [name], to=FLOAT))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]
    weights.save(model, folder)
