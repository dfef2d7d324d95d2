"""What onnxruntime-gpu has CUDA kernels for, held against ``sdrt_engines/graph/cuda_kernels.py``. Needs an NVIDIA GPU.

    python -m benchmarks.cuda_kernels

Each operator of the table, and some that it leaves out, is given to ONNX Runtime by itself in each type; it says which
provider it would run on. Prints what the table claims too much or too little; exits 1 where it claims too much.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from sdrt_engines.graph.cuda_kernels import ANY, KERNELS
from sdrt_engines.onnxruntime_providers import CUDA, RECORD, preload

OPSET = 23
TYPES = {"f32": TensorProto.FLOAT, "f16": TensorProto.FLOAT16, "i64": TensorProto.INT64, "i32": TensorProto.INT32}
TYPES["bool"] = TensorProto.BOOL
OTHERS = ("InstanceNormalization",)
DEFINED = ("GroupNormalization",)
"""Without a kernel, and computed in other operators."""

PICTURE = [2, 4, 8, 8]
ARGUMENTS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Pow", "Equal", "LessOrEqual"), ([PICTURE, PICTURE], {})),
    "Attention": ([PICTURE] * 3, {}),
    "Cast": ([PICTURE], {"to": TensorProto.FLOAT}),
    "Concat": ([PICTURE, PICTURE], {"axis": 0}),
    "Conv": ([PICTURE, [4, 4, 3, 3]], {}),
    "Expand": ([PICTURE, np.array(PICTURE)], {}),
    "Gather": ([PICTURE, np.array([0])], {}),
    "GatherND": ([PICTURE, np.array([[0]])], {}),
    "Gemm": ([[2, 8], [8, 8], [8]], {}),
    "GroupNormalization": ([PICTURE, [4], [4]], {"num_groups": 2}),
    "InstanceNormalization": ([PICTURE, [4], [4]], {}),
    "LayerNormalization": ([PICTURE, [8], [8]], {}),
    "MatMul": ([[2, 8], [8, 8]], {}),
    "Pad": ([PICTURE, np.zeros(8, np.int64)], {}),
    "Range": ([[], [], []], {}),
    "Reshape": ([PICTURE, np.array([-1])], {}),
    "Resize": ([PICTURE, None, np.array([1, 1, 2, 2], np.float32)], {"mode": "nearest"}),
    "Slice": ([PICTURE, np.array([0]), np.array([1])], {}),
    "Split": ([PICTURE], {"axis": 1, "num_outputs": 2}),
    "Squeeze": ([[1, 4], np.array([0])], {}),
    "Unsqueeze": ([[1, 4], np.array([0])], {}),
    "Where": ([TensorProto.BOOL, PICTURE, PICTURE], {}),
}
"""Inputs, then attributes: a shape is a tensor of the type asked for, an array a constant. Others take one picture."""

GIVES = dict.fromkeys(("ArgMax", "Shape"), TensorProto.INT64) | dict.fromkeys(
    ("Equal", "LessOrEqual"), TensorProto.BOOL
)


def has_kernel(operator: str, kind: int) -> bool:
    """Whether the provider takes a node of it."""
    arguments, attributes = ARGUMENTS.get(operator, ([PICTURE], {}))
    if operator == "Cast" and kind == TensorProto.FLOAT:
        attributes = {"to": TensorProto.FLOAT16}
    names, values, constants = [], [], []
    for i, argument in enumerate(arguments):
        names.append("" if argument is None else f"x{i}")
        if isinstance(argument, np.ndarray):
            constants.append(numpy_helper.from_array(argument, f"x{i}"))
        elif isinstance(argument, list):
            values.append(helper.make_tensor_value_info(f"x{i}", kind, argument))
        elif argument is not None:
            values.append(helper.make_tensor_value_info(f"x{i}", argument, [1]))
    outputs = ["y", "z"] if operator == "Split" else ["y"]
    gives = attributes["to"] if operator == "Cast" else GIVES.get(operator, kind)
    node = helper.make_node(operator, names, outputs, **attributes)
    graph = helper.make_graph([node], "g", values, [helper.make_tensor_value_info("y", gives, None)], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.add_session_config_entry(RECORD, "1")
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), settings, [CUDA], enable_fallback=0)
    except Exception:  # no kernel on the CPU either, or a type that ONNX does not allow
        return False
    if CUDA not in session.get_providers():
        sys.exit(f"onnxruntime {onnxruntime.__version__} cannot use {CUDA} here")
    parts = session.get_provider_graph_assignment_info()
    return any(part.ep_name == CUDA and node.op_type == operator for part in parts for node in part.get_nodes())


def main() -> int:
    """Compare the whole table."""
    preload(onnxruntime)
    wrong = False
    for operator in (*sorted(set(KERNELS) - set(DEFINED)), *OTHERS):
        found = {name for name, kind in TYPES.items() if has_kernel(operator, kind)}
        told = KERNELS.get(operator, frozenset())
        wrong |= bool(told - found)
        for what, names in (("claims", told - found), ("lacks", found - told)):
            if names:
                print(f"{operator}: the table {what} {', '.join(sorted(names & ANY))}")
    print(
        f"onnxruntime {onnxruntime.__version__}, opset {OPSET}: {'the table is wrong' if wrong else 'as in the table'}"
    )
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
