"""torch → ONNX for one component, in little memory: traced without weights, which are put in from mapped files after.

Opset 23 keeps attention, GroupNormalization and GELU as single operators. Every size stays symbolic.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdrt.bundle import TensorSpec
from sdrt.errors import ExportError
from sdrt_export.families import Part

OPSET = 23


def export_graph(
    part: Part, network: Any, state: dict[str, Any], fake: Any, path: Path, stage: Callable[[str], None]
) -> None:
    """Write ``path`` and ``path``.data.

    ``network`` was built under ``fake``, a FakeTensorMode (its parameters are shapes only), or is real and ``fake``
    does nothing; ``state`` holds the real weights by parameter name. ``stage`` is told what is being done. ExportError
    when the graph is not what the part says.
    """
    import torch

    dynamic = tuple(_dynamic_axes(spec) for spec in part.inputs)
    gc.disable()  # tracing makes millions of small objects that live to its end: collecting them in between is in vain
    try:
        with torch.no_grad(), fake, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own deprecations, while it traces
            stage("capture")
            inputs = tuple(_fake_input(spec, part) for spec in part.inputs)
            # Non-strict, said here: torch.onnx.export alone may try both ways, one after the other.
            captured = torch.export.export(network.eval(), inputs, dynamic_shapes=dynamic, strict=False)
            stage("lower")
            program = torch.onnx.export(
                captured,
                (),
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
                input_names=[spec.name for spec in part.inputs],
                output_names=[spec.name for spec in part.outputs],
            )
        if program is None:
            raise ExportError(f"{part.name}: torch made no ONNX program")
        del captured
        program.apply_weights({f"model.{name}": tensor for name, tensor in state.items()})
        stage("optimize")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program.optimize()
        _tidy(program.model, part)
        stage("save")
        program.save(str(path), external_data=True)
    finally:
        gc.enable()
        gc.collect()


def _dynamic_axes(spec: TensorSpec) -> dict[int, Any]:
    import torch

    return {axis: torch.export.Dim.DYNAMIC for axis, dim in enumerate(spec.shape) if isinstance(dim, str)}


def _fake_input(spec: TensorSpec, part: Part) -> Any:
    import torch

    shape = spec.at(part.trace_sizes)
    return torch.ones(shape, dtype=torch.int64) if spec.dtype == "i64" else torch.randn(shape)


def _tidy(model: Any, part: Part) -> None:
    """Name the symbols of inputs and outputs as the manifest does; drop torch's stack traces and inner shapes.

    Inner shapes speak in torch's own symbols, and every engine infers them anew.
    """
    import onnx_ir as ir

    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in model.graph.outputs:
                value.shape = None
    for values, specs in ((model.graph.inputs, part.inputs), (model.graph.outputs, part.outputs)):
        if [value.name for value in values] != [spec.name for spec in specs]:
            raise ExportError(
                f"{part.name}: the graph has {[v.name for v in values]}, expected {[s.name for s in specs]}"
            )
        for value, spec in zip(values, specs, strict=True):
            value.metadata_props.clear()
            value.shape = ir.Shape(spec.shape)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.name = part.name
    model.producer_name, model.producer_version = "sdrt", None
