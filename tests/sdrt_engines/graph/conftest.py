"""Small graphs by hand, and two ways to run them: ONNX Runtime, and onnx's reference evaluator, whose float16 is real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from sdrt import bundle as bundles
from sdrt_engines.graph import load_graph, weights_folder
from sdrt_engines.graph.external import Weights

Node = helper.make_node


def make(nodes: list[Any], inputs: dict[str, Any], outputs: dict[str, Any], **weights: Any) -> onnx.ModelProto:
    """inputs, outputs: name → shape (float32), or an integer array to take dtype and shape from."""

    def value(name: str, shape: Any) -> Any:
        dtype = TensorProto.FLOAT
        if isinstance(shape, np.ndarray):
            dtype, shape = helper.np_dtype_to_tensor_dtype(shape.dtype), shape.shape
        return helper.make_tensor_value_info(name, dtype, shape)

    graph = helper.make_graph(
        nodes,
        "g",
        [value(name, shape) for name, shape in inputs.items()],
        [value(name, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def saved(model: Any, weights: Weights, folder: Path) -> Path:
    """Write the graph; it must be a valid one."""
    folder.mkdir(parents=True, exist_ok=True)
    weights.save(model, folder)
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    return folder / "model.onnx"


def runtime(path: Path, inputs: dict[str, Any]) -> list[Any]:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


def evaluator(path: Path, inputs: dict[str, Any]) -> list[Any]:
    with np.errstate(all="ignore"):  # overflow is what is looked for
        return list(ReferenceEvaluator(onnx.load(str(path))).run(None, inputs))


def component(root: Path, name: str) -> tuple[onnx.ModelProto, Weights, Path]:
    """A component of an ONNX bundle: its graph, its weights, and the folder in which they lie."""
    held = bundles.load(root)
    spec = held.component(name)
    model = load_graph(held.path(spec.artifact.files[0].path))
    folder = weights_folder(model, held, spec)
    return model, Weights(model, folder), folder


def operators(model: Any, *kinds: str) -> list[Any]:
    return [node for node in model.graph.node if node.op_type in kinds]


def makers(model: Any) -> dict[str, Any]:
    return {name: node for node in model.graph.node for name in node.output}
