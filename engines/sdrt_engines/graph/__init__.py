"""Passes over ONNX graphs that several engines share. They need the onnx package, which only ``build`` asks for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdrt.bundle import Bundle, Component
from sdrt.errors import EngineUnavailable


def load_graph(path: Path) -> Any:
    """The ModelProto of a graph without its external weights. EngineUnavailable when onnx is not installed."""
    try:
        import onnx
    except ImportError as error:
        raise EngineUnavailable(f"building needs onnx, which cannot be imported: {error}", "pip install onnx") from None
    return onnx.load(str(path), load_external_data=False)


def fix_dims(model: Any, dims: Mapping[str, int]) -> None:
    """Give symbolic dimensions of the graph's inputs and outputs (``H/8``) a size; see ``shapes.fixed_dims``."""
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in dims:
                dim.dim_value = dims[dim.dim_param]  # the two exclude each other


def weights_folder(model: Any, source: Bundle, component: Component) -> Path:
    """The folder that really holds the graph's external weights, by whose name the graph is made to call them.

    In a snapshot of the Hugging Face Hub's cache the weights are a link to a file of another name elsewhere, and
    engines follow no link out of the folder that they are given.
    """
    entry = source.path(component.artifact.files[0].path)
    if len(component.artifact.files) == 1:
        return entry.parent
    weights = source.path(component.artifact.files[1].path).resolve()
    for tensor in model.graph.initializer:
        for item in tensor.external_data:
            if item.key == "location":
                item.value = weights.name
    return weights.parent
