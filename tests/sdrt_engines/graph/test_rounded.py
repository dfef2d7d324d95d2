"""bfloat16 graphs, and what computes them where there are no bfloat16 kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdrt.bundle import load
from sdrt.metrics import psnr
from sdrt.verify import reference_cases
from sdrt_engines.graph.external import Weights
from sdrt_engines.graph.half import BFLOAT, to_half
from sdrt_engines.graph.ranges import Ranges
from sdrt_engines.graph.rounded import rounded
from sdrt_engines.graph.storage import float32_graph


def as_bfloat(value: Any) -> Any:
    from onnx.helper import tensor_dtype_to_np_dtype

    return np.asarray(value, np.float32).astype(tensor_dtype_to_np_dtype(BFLOAT)).astype(np.float32)


@pytest.mark.parametrize("name", ["text_encoder", "unet", "vae_decoder"])
def test_a_bfloat16_network(name: str, bundle: Path, tmp_path: Path) -> None:
    import onnxruntime

    source = load(bundle)
    component = source.component(name)
    (tmp_path / "stored").mkdir()
    model, folder = float32_graph(source, component, tmp_path / "stored")
    weights = Weights(model, folder)
    facts = to_half(model, weights, Ranges({}, {}), kind=BFLOAT)
    assert not {island["why"] for island in facts["islands"]} & {"range", "logits", "squares", "weight"}
    weighted = [node for node in model.graph.node if node.op_type in ("Conv", "MatMul", "Gemm")]
    held = [name for node in weighted for name in node.input if name in weights]
    assert held
    assert {weights.dtype(name) for name in held} == {BFLOAT}
    assert all(value.type.tensor_type.elem_type != BFLOAT for value in (*model.graph.input, *model.graph.output))
    computed = sum(node.op_type in ("Conv", "MatMul", "Gemm", "Attention") for node in model.graph.node)
    rounded(model, weights, tmp_path)
    casts = [a.i for node in model.graph.node if node.op_type == "Cast" for a in node.attribute]
    assert casts.count(BFLOAT) > computed
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for inputs, outputs in reference_cases(source, name).values():
        for output, array in zip(session.get_outputs(), session.run(None, inputs), strict=True):
            assert 38 < psnr(outputs[output.name], array) < 80  # bfloat16's 8 bits are there, and no more is lost


def test_rounding_is_where_the_graph_rounds(tmp_path: Path) -> None:
    """Of two sums the first is bfloat16, the second an island: rounded once, not twice."""
    import onnxruntime
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.BFLOAT16),
        helper.make_node("Mul", ["h", "w"], ["p"]),
        helper.make_node("Cast", ["p"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "v"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [5]) for n in "xy")
    w = helper.make_tensor("w", TensorProto.BFLOAT16, [], [1.1])
    v = helper.make_tensor("v", TensorProto.FLOAT, [], [1.3])
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], [w, v]), opset_imports=[helper.make_opsetid("", 23)], ir_version=11
    )
    rounded(model, Weights(model, tmp_path), tmp_path)
    given = np.array([1.001, 2.7, -3.3, 1e30, 1e-30], np.float32)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    expected = as_bfloat(as_bfloat(given) * as_bfloat(1.1)) * np.float32(1.3)
    np.testing.assert_array_equal(session.run(None, {"x": given})[0], expected)
