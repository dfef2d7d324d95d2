"""Passes over ONNX graphs that several engines share. They need the onnx package, which only ``build`` asks for."""

from __future__ import annotations

import os
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
    """The folder that really holds the graph's external weights, by whose names the graph is made to call them.

    In a snapshot of the Hugging Face Hub's cache the weights are links to files of other names elsewhere, and engines
    follow no link out of the folder that they are given.
    """
    entry = source.path(component.artifact.files[0].path)
    if len(component.artifact.files) == 1:
        return entry.parent
    folder = source.path(component.artifact.files[1].path).resolve().parent
    for tensor in model.graph.initializer:
        for item in tensor.external_data:
            if item.key == "location":
                weights = (entry.parent / item.value).resolve()
                item.value = Path(os.path.relpath(weights, folder)).as_posix()
    return folder


def name_dims(model: Any, component: Component) -> None:
    """Call the free dimensions of inputs and outputs as the manifest does: other exporters have other names for them.

    Shapes further in, which would go on using those, are left out; engines infer them again.
    """
    specs = {spec.name: spec.shape for spec in (*component.inputs, *component.outputs)}
    values = [v for v in (*model.graph.input, *model.graph.output) if v.name in specs]
    renamed = False
    for value in values:
        for dim, symbol in zip(value.type.tensor_type.shape.dim, specs[value.name], strict=True):
            if isinstance(symbol, str) and dim.dim_param != symbol:
                dim.dim_param = symbol
                renamed = True
    if renamed:
        del model.graph.value_info[:]
