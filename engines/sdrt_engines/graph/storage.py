"""Weights stored in float16 and computed in float32: half the bytes, and not one value lost.

A checkpoint that was published in float16 holds nothing that float32 could hold more of. ``narrow`` stores such weights
as float16, a Cast to float32 behind each; ``widen`` undoes it, for whoever rewrites the graph. What float16 cannot hold
exactly stays float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdrt.bundle import Bundle, Component
from sdrt_engines.graph import load_graph, name_dims, weights_folder
from sdrt_engines.graph.external import INLINE, Weights

FLOAT, HALF = 1, 10
"""ONNX's numbers of float32 and float16."""

SMALL = INLINE // 2
"""Elements. A smaller tensor stays float32: as float16 it would move into the graph's own file, and save little."""


def is_exact(values: NDArray[Any]) -> bool:
    """Whether float16 holds each of these values as it is. It holds no NaN so."""
    with np.errstate(over="ignore"):
        return np.array_equal(values.astype(np.float16), values)


def narrow(model: Any, weights: Weights) -> None:
    """Store every float32 initializer that is not small, and loses nothing, as float16. In place.

    Initializers keep their names; what read ``w`` reads ``w.float``, the Cast's output.
    """
    from onnx import helper

    outputs = {output.name for output in model.graph.output}
    casts: dict[str, str] = {}
    for name in weights.names():
        stored = weights.dtype(name) == FLOAT and math.prod(weights.dims(name)) >= SMALL and name not in outputs
        if stored and is_exact(weights[name]):
            weights.retype(name, HALF)
            casts[name] = f"{name}.float"
    _read_others(model.graph, casts)
    nodes = [helper.make_node("Cast", [name], [cast], to=FLOAT) for name, cast in casts.items()]
    _replace_nodes(model.graph, nodes + list(model.graph.node))


def widen(model: Any, weights: Weights) -> None:
    """Store initializers that only a Cast to float32 reads as float32, and drop the Cast. In place."""
    casts = _casts(model.graph)
    for name in set(casts.values()):
        weights.retype(name, FLOAT)
    _replace_nodes(model.graph, [node for node in model.graph.node if node.output[0] not in casts])
    _read_others(model.graph, casts)


def float32_graph(source: Bundle, component: Component, scratch: Path) -> tuple[Any, Path]:
    """A component's ModelProto without its external weights, and the folder in which these lie, in float32.

    Free dimensions are named as the manifest names them. Weights that are stored in float16 are written to ``scratch``,
    one at a time. EngineUnavailable when onnx is not installed.
    """
    model = load_graph(source.path(component.artifact.files[0].path))
    name_dims(model, component)
    folder = weights_folder(model, source, component)
    if not _casts(model.graph):
        return model, folder
    weights = Weights(model, folder)
    widen(model, weights)
    weights.save(model, scratch)
    return model, scratch


def _casts(graph: Any) -> dict[str, str]:
    """Casts of float16 initializers to float32, output → input, where nothing else reads the initializer."""
    halves = {tensor.name for tensor in graph.initializer if tensor.data_type == HALF}
    casts: dict[str, str] = {}
    outputs = {output.name for output in graph.output}
    others = set(outputs)
    for node in graph.node:
        if node.op_type == "Cast" and node.input[0] in halves and node.attribute[0].i == FLOAT:
            casts[node.output[0]] = node.input[0]
        else:
            others.update(node.input)
    return {cast: name for cast, name in casts.items() if name not in others and cast not in outputs}


def _read_others(graph: Any, names: Mapping[str, str]) -> None:
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = names.get(name, name)


def _replace_nodes(graph: Any, nodes: list[Any]) -> None:
    del graph.node[:]
    graph.node.extend(nodes)
