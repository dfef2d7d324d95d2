"""Graphs of opset 20: the numbers are those of opset 23."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from sdrt.bundle import load
from sdrt.engine import BuildOptions
from sdrt.errors import BuildError
from sdrt_engines.build import build
from sdrt_engines.graph.opset20 import as_opset20, name_scales
from tests.conftest import Model


@pytest.mark.parametrize(("precision", "bar"), [("fp32", 110), ("fp16", 60)])
@pytest.mark.parametrize("name", ["tiny-sd", "sd2-v", "sdxl"])
def test_whole_models(models: Callable[[str], Model], tmp_path: Path, name: str, precision: Any, bar: float) -> None:
    """Of all components; held against the reference vectors by ONNX Runtime, of free sizes and of fixed ones."""
    shapes = ((64, 64), (72, 56)) if precision == "fp16" else ()
    built = build(
        models(name).bundle, tmp_path / "out", "onnxruntime", BuildOptions(precision, shapes[:1], target="dml")
    )
    for component, spec in load(tmp_path / "out").manifest.components.items():
        assert spec.artifact.target == "dml"
        found = [parity.psnr for parity in spec.artifact.parity if parity.psnr is not None]  # None: the same bits
        assert min(found) >= bar, component
        model = onnx.load(str(tmp_path / "out" / component / "model.onnx"), load_external_data=False)
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 20)]
        assert not {"Attention", "GroupNormalization"} & {node.op_type for node in model.graph.node}
        for node in model.graph.node:  # of opset 20 indeed
            assert onnx.defs.has(node.op_type, 20, ""), node.op_type
    assert built.manifest.components["unet"].artifact.facts["rewritten"]["Attention"] > 0


def attention(mask: int | None, kind: int = TensorProto.FLOAT, **attributes: Any) -> Any:
    """One Attention of 2 x 3 heads of 8, 5 and 7 tokens."""
    names = ["q", "k", "v"] + ([] if mask is None else ["mask"])
    shapes = {"q": [2, 3, 5, 8], "k": [2, 3, 7, 8], "v": [2, 3, 7, 8], "mask": [2, 1, 5, 7]}
    node = helper.make_node("Attention", names, ["y"], **attributes)
    kinds = {"mask": mask or 0}
    inputs = [helper.make_tensor_value_info(name, kinds.get(name, kind), shapes[name]) for name in names]
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", kind, [2, 3, 5, 8])])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16])
@pytest.mark.parametrize("mask", [None, TensorProto.BOOL, TensorProto.FLOAT])
@pytest.mark.parametrize("scale", [None, 0.2])
def test_attention(kind: int, mask: int | None, scale: float | None) -> None:
    if kind == TensorProto.FLOAT16 and mask == TensorProto.FLOAT:
        mask = TensorProto.FLOAT16  # of the same type, says the operator
    rng = np.random.default_rng(0)
    model = attention(mask, kind, **({} if scale is None else {"scale": scale}))
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    feed = {
        n: rng.standard_normal(s).astype(dtype)
        for n, s in (("q", (2, 3, 5, 8)), ("k", (2, 3, 7, 8)), ("v", (2, 3, 7, 8)))
    }
    if mask == TensorProto.BOOL:
        feed["mask"] = rng.random((2, 1, 5, 7)) > 0.4
        feed["mask"][..., 0] = True
    elif mask is not None:
        feed["mask"] = rng.standard_normal((2, 1, 5, 7)).astype(dtype)
    q, k, v = (feed[name].astype(np.float64) for name in "qkv")
    scores = q @ k.swapaxes(-1, -2) * (8**-0.5 if scale is None else scale)
    if mask == TensorProto.BOOL:
        scores = np.where(feed["mask"], scores, -np.inf)
    elif mask is not None:
        scores = scores + feed["mask"]
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    expected = weights / weights.sum(axis=-1, keepdims=True) @ v
    name_scales(model, {"q": (2, 3, 5, 8)})
    assert as_opset20(model) == {"Attention": 1}
    onnx.checker.check_model(model)
    got = ReferenceEvaluator(model).run(None, feed)[0]
    assert got.dtype == dtype
    np.testing.assert_allclose(got, expected, atol=1e-5 if kind == TensorProto.FLOAT else 5e-3)


def test_attention_that_is_more_is_refused() -> None:
    for attributes in ({"is_causal": 1}, {"softcap": 3.0}):
        with pytest.raises(BuildError, match=f"Attention node 'y': {next(iter(attributes))} cannot be rewritten"):
            as_opset20(attention(None, scale=1.0, **attributes))
    with pytest.raises(BuildError, match="Attention node 'y': its heads' size cannot be told"):
        name_scales(attention(None), {})


def test_newer_operators_are_refused() -> None:
    node = helper.make_node("Swish", ["x"], ["y"])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in "xy"]
    model = helper.make_model(helper.make_graph([node], "g", values[:1], values[1:]))
    with pytest.raises(BuildError, match="node 'y': Swish has no form in opset 20"):
        as_opset20(model)


def test_targets(models: Callable[[str], Model], tmp_path: Path) -> None:
    bundle = models("tiny-sd").bundle
    with pytest.raises(BuildError, match="for qnn onnxruntime builds fp32, fp16; asked for int8"):
        build(bundle, tmp_path / "out", "onnxruntime", BuildOptions("int8", target="qnn"))
    with pytest.raises(BuildError, match="winograd is for the cpu, the target is coreml"):
        build(bundle, tmp_path / "out", "onnxruntime", BuildOptions(target="coreml", extra={"winograd": "all"}))
    with pytest.raises(BuildError, match="builds for any and cuda and dml"):
        build(bundle, tmp_path / "out", "onnxruntime", BuildOptions(target="rocm"))
