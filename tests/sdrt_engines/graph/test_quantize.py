"""int8: weights alone, and Q/DQ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

from sdrt import BuildError
from sdrt import bundle as bundles
from sdrt.metrics import psnr
from sdrt.verify import reference_cases
from sdrt_engines.graph.external import Weights
from sdrt_engines.graph.quantize import SMALL, targets, to_float8, to_int8, weights_to_int8
from sdrt_engines.graph.ranges import measure
from tests.sdrt_engines.graph.conftest import Node, component, evaluator, make, makers, operators, runtime, saved

GENERATOR = np.random.default_rng(0)
W = GENERATOR.standard_normal((32, 32)).astype(np.float32)


def initializers(path: Path) -> dict[str, Any]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weight_that_is_not_finite(tmp_path: Path, bad: float) -> None:
    w = W.copy()
    w[3, 5] = bad
    model = make([Node("MatMul", ["x", "w"], ["y"])], {"x": [1, 32]}, {"y": [1, 32]}, w=w)
    with pytest.raises(BuildError, match="w: the weight holds NaN or infinity"):
        weights_to_int8(model, Weights(model, tmp_path))


@pytest.mark.filterwarnings("error")
def test_channel_of_denormals(tmp_path: Path) -> None:
    """It is zero for all that is computed from it."""
    w = W.copy()
    w[:, 3] = 1e-44
    model = make([Node("MatMul", ["x", "w"], ["y"])], {"x": [1, 32]}, {"y": [1, 32]}, w=w)
    weights = Weights(model, tmp_path)
    weights_to_int8(model, weights)
    held = initializers(saved(model, weights, tmp_path / "out"))
    assert held["w.int8.1.scale"][3] == 1
    assert not held["w.int8.1"][:, 3].any()


def test_activations_without_a_scale_stay_float(tmp_path: Path) -> None:
    nodes = [Node("MatMul", [name, "w"], [f"{name}.y"]) for name in "abc"]
    model = make(nodes, {name: [1, 32] for name in "abc"}, {f"{name}.y": [1, 32] for name in "abc"}, w=W)
    weights = Weights(model, tmp_path)
    facts = to_int8(model, weights, {"a": 1.0}, infinite={"b"})
    assert facts["quantized"] == {"MatMul": 1}
    assert facts["kept_float"] == {"MatMul: infinite": 1, "MatMul: unknown type": 1}
    assert [node.input[1] for node in operators(model, "MatMul")][1:] == ["w", "w"]


def test_float8(tmp_path: Path) -> None:
    """The largest magnitude is the type's own; small values keep three bits of mantissa, which int8 would lose."""
    x = np.array([[448.0, -3.3, 0.011, 1e-4] * 8], np.float32)
    nodes = [Node("MatMul", ["x", "w"], ["y"]), Node("MatMul", ["m", "w"], ["z"])]
    model = make(nodes, {"x": x, "m": [1, 32]}, {"y": [1, 32], "z": [1, 32]}, w=W)
    weights = Weights(model, tmp_path)
    facts = to_float8(model, weights, {"x": 448.0}, infinite={"m"})
    assert facts["quantized"] == {"MatMul": 1}
    assert facts["kept_float"] == {"MatMul: infinite": 1}
    held = {t.name: t for t in onnx.load(saved(model, weights, tmp_path / "out")).graph.initializer}
    assert held["w.float8.1"].data_type == TensorProto.FLOAT8E4M3FN
    scales = numpy_helper.to_array(held["w.float8.1.scale"])
    stored = numpy_helper.to_array(held["w.float8.1"]).astype(np.float32)
    np.testing.assert_array_equal(np.abs(stored).max(0), 448)
    assert np.abs(stored * scales / W - 1).max() < 2**-4 + 1e-3  # of normal numbers; W holds none so small
    assert numpy_helper.to_array(held["x.float8.scale"]) == 1
    zero = held["float8.zero"]
    assert (zero.data_type, tuple(zero.dims)) == (TensorProto.FLOAT8E4M3FN, ())
    quantized = np.array([448, -3.25, 0.01171875, 0] * 8, np.float32)[None]  # by hand, from the type's definition
    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry("session.disable_quant_qdq", "1")  # it would fuse what it has no kernel for
    path = str(tmp_path / "out" / "model.onnx")
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    got = session.run(["y"], {"x": x, "m": np.zeros((1, 32), np.float32)})[0]
    np.testing.assert_allclose(got, quantized @ (stored * scales), rtol=1e-4, atol=1e-3)


def test_embeddings_in_int8(tmp_path: Path) -> None:
    """As with weights alone: nothing is computed in them."""
    table = GENERATOR.standard_normal((50, 32)).astype(np.float32)
    ids = np.array([3, 49, 0])
    model = make([Node("Gather", ["table", "ids"], ["y"])], {"ids": ids}, {"y": [3, 32]}, table=table)
    weights = Weights(model, tmp_path)
    assert to_int8(model, weights, {})["quantized"] == {"Gather": 1}
    path = saved(model, weights, tmp_path / "out")
    assert all(psnr(table[ids], run(path, {"ids": ids})[0]) > 35 for run in (runtime, evaluator))


@settings(max_examples=50)
@given(st.sampled_from([0, 1]), st.integers(0, 2**32 - 1), st.floats(-6, 6))
def test_weight_round_trip(tmp_path_factory: pytest.TempPathFactory, axis: int, seed: int, decades: float) -> None:
    """Off by half a step of its own channel at most; the channel's largest is ±127; a channel of zeros stays zero."""
    folder = tmp_path_factory.mktemp("w")
    generator = np.random.default_rng(seed)
    w = (generator.standard_normal((16, 24)) * 10 ** generator.uniform(-3, 3, (16, 24))).astype(np.float32)
    w = (w * np.float32(10.0**decades)).swapaxes(0, axis)
    (w.T if axis else w)[3] = 0
    model = make(
        [Node("Gemm", ["x", "w"], ["y"], transB=1 - axis)],
        {"x": [1, w.shape[1 - axis]]},
        {"y": [1, w.shape[axis]]},
        w=w,
    )
    weights = Weights(model, folder)
    assert weights_to_int8(model, weights)["quantized"] == {"Gemm": 1}
    held = initializers(saved(model, weights, folder / "out"))
    q, scale = held[f"w.int8.{axis}"], held[f"w.int8.{axis}.scale"]
    column = scale[:, None] if axis == 0 else scale
    assert (q.dtype, scale.dtype) == (np.int8, np.float32)
    assert np.all(np.abs(q * column - w) <= 0.5001 * column)
    largest = np.abs(q.astype(int)).max(1 - axis)
    assert largest[3] == 0
    assert set(np.delete(largest, 3)) == {127}


def test_weights_only(tmp_path: Path) -> None:
    """Each operator by its own axis of output channels; a weight that two nodes read is held once; small ones stay."""
    kernel = GENERATOR.standard_normal((8, 4, 3, 3)).astype(np.float32)
    table = GENERATOR.standard_normal((50, 32)).astype(np.float32)
    nodes = [
        Node("Gather", ["table", "ids"], ["e"]), Node("MatMul", ["e", "w"], ["a"]), Node("MatMul", ["a", "w"], ["b"]),
        Node("Gemm", ["b", "w", "bias"], ["c"], transB=1), Node("MatMul", ["c", "tiny"], ["d"]),
        Node("Conv", ["picture", "kernel"], ["p"], pads=[1, 1, 1, 1]),
    ]  # fmt: skip
    ids = np.array([3, 49, 0])
    model = make(
        nodes, {"ids": ids, "picture": [1, 4, 6, 6]}, {"d": [3, 2], "p": [1, 8, 6, 6]}, table=table, w=W / 8, bias=W[0],
        kernel=kernel, tiny=W[:, :2],
    )  # fmt: skip
    weights = Weights(model, tmp_path)
    inputs = {"ids": ids, "picture": GENERATOR.standard_normal((1, 4, 6, 6)).astype(np.float32)}
    saved(
        original := type(model).FromString(model.SerializeToString()), Weights(original, tmp_path), tmp_path / "float"
    )
    expected = evaluator(tmp_path / "float" / "model.onnx", inputs)
    assert weights_to_int8(model, weights)["quantized"] == {"Conv": 1, "Gather": 1, "Gemm": 1, "MatMul": 2}
    path = saved(model, weights, tmp_path / "out")
    held = initializers(path)
    assert {name for name, array in held.items() if array.dtype == np.int8} == {
        "table.int8.1", "w.int8.1", "w.int8.0", "kernel.int8.0"
    }  # fmt: skip
    assert {name for name, array in held.items() if array.dtype == np.float32 and array.size >= SMALL} == set()
    assert held["kernel.int8.0.scale"].shape == (8,)
    assert not operators(model, "QuantizeLinear")
    for run in (runtime, evaluator):
        assert all(psnr(a, b) > 35 for a, b in zip(expected, run(path, inputs), strict=True))


def test_weight_of_a_constant_node(tmp_path: Path) -> None:
    """As other exporters hold some."""
    nodes = [Node("Constant", [], ["w"], value=numpy_helper.from_array(W, "v")), Node("MatMul", ["x", "w"], ["y"])]
    model = make(nodes, {"x": [3, 32]}, {"y": [3, 32]})
    weights = Weights(model, tmp_path)
    assert weights_to_int8(model, weights)["quantized"] == {"MatMul": 1}
    assert not operators(model, "Constant")
    x = GENERATOR.standard_normal((3, 32)).astype(np.float32)
    assert all(
        psnr(x @ W, run(saved(model, weights, tmp_path / "out"), {"x": x})[0]) > 35 for run in (runtime, evaluator)
    )


def test_weight_that_something_else_reads_too(tmp_path: Path) -> None:
    """It stays float for that, and is int8 for the product."""
    nodes = [Node("MatMul", ["x", "w"], ["a"]), Node("Add", ["a", "w"], ["y"])]
    model = make(nodes, {"x": [32, 32]}, {"y": [32, 32]}, w=W)
    weights = Weights(model, tmp_path)
    weights_to_int8(model, weights)
    path = saved(model, weights, tmp_path / "out")
    assert {"w", "w.int8.1"} <= set(initializers(path))
    zero = np.zeros((32, 32), np.float32)
    assert all((run(path, {"x": zero})[0] == W).all() for run in (runtime, evaluator))


def test_qdq_structure(tmp_path: Path) -> None:
    """One Q and one DQ for a tensor that three nodes read, symmetric, one scale; the residual sum is not touched."""
    nodes = [
        Node("MatMul", ["x", "w"], ["q"]), Node("MatMul", ["x", "w"], ["k"]), Node("MatMul", ["x", "w2"], ["v"]),
        Node("Add", ["q", "k"], ["qk"]), Node("Add", ["qk", "v"], ["sum"]), Node("Add", ["sum", "x"], ["y"]),
    ]  # fmt: skip
    model = make(nodes, {"x": [5, 32]}, {"y": [5, 32]}, w=W, w2=2 * W)
    weights = Weights(model, tmp_path)
    facts = to_int8(model, weights, {"x": 2.54})
    assert (facts["quantized"], facts["kept_float"]) == ({"MatMul": 3}, {})
    path = saved(model, weights, tmp_path / "out")
    held, made = initializers(path), makers(model)
    assert len(operators(model, "QuantizeLinear")) == 1
    assert len(operators(model, "DequantizeLinear")) == 3  # of x, w and w2
    scale, zero = held["x.int8.scale"], held["int8.zero"]
    assert (scale.shape, scale.dtype, zero.shape, zero.dtype, int(zero)) == ((), np.float32, (), np.int8, 0)
    assert scale == np.float32(0.02)
    for node in operators(model, "MatMul"):
        activation, weight = (made[name] for name in node.input)
        assert activation.op_type == weight.op_type == "DequantizeLinear"
        assert made[activation.input[0]].op_type == "QuantizeLinear"
        assert weight.input[0] in held
    assert operators(model, "Add")[2].input[1] == "x"
    assert {node.domain for node in model.graph.node} == {""}
    x = np.clip(GENERATOR.standard_normal((5, 32)), -2.5, 2.5).astype(np.float32)
    assert all(psnr(x @ W + x @ W + x @ (2 * W) + x, run(path, {"x": x})[0]) > 35 for run in (runtime, evaluator))


def test_what_stays_float(bundle: Path) -> None:
    """In the networks themselves: their first and last convolutions, the time embedding, what reads the residual stream.

    (The tiny VAE's shortcuts, its decoder's last and its encoder's first convolution are small, and float for that.)
    """
    kept = {}
    for name in bundles.load(bundle).manifest.components:
        model, weights, _ = component(bundle, name)
        for target in targets(model, weights):
            if target.keep:
                kept.setdefault((name, target.keep), []).append(target.weight)
    assert kept["unet", "first"] == ["model.conv_in.weight"]
    assert kept["unet", "last"] == ["model.conv_out.weight"]
    assert len(kept["unet", "rows"]) == 16
    assert sum("conv_shortcut" in name for name in kept["unet", "stream"]) == 9
    assert sum("proj_out" in name for name in kept["unet", "stream"]) == 10
    assert set(kept) - {("unet", keep) for keep in ("first", "last", "rows", "stream")} == {
        ("vae_decoder", "first"), ("vae_encoder", "last")
    }  # fmt: skip


def test_network_in_int8(bundle: Path, tmp_path: Path) -> None:
    """Every quantised node reads one Q/DQ pair and one int8 weight; what is computed is near float32's."""
    model, weights, folder = component(bundle, "unet")
    cases = list(reference_cases(bundles.load(bundle), "unet").values())
    largest = measure(model, folder, [inputs for inputs, _ in cases]).largest
    found = targets(model, weights)
    facts = to_int8(model, weights, largest)
    path = saved(model, weights, tmp_path / "out")
    made = makers(model)
    quantized = [target.node for target in found if not target.keep]
    assert sum(facts["quantized"].values()) == len(quantized)
    for node in quantized:
        activation, weight = (made[name] for name in node.input[:2])
        assert made[activation.input[0]].op_type == "QuantizeLinear"
        assert weight.op_type == "DequantizeLinear"
    assert len(operators(model, "QuantizeLinear")) == len({target.activation for target in found if not target.keep})
    for target in found:
        if target.keep:
            assert target.node.input[1] == target.weight
    assert {node.domain for node in model.graph.node} == {""}
    types = {t.name: t.data_type for t in model.graph.initializer}
    assert {types[n.input[0]] for n in operators(model, "DequantizeLinear") if n.input[0] in types} == {
        TensorProto.INT8
    }
    for inputs, outputs in cases:
        assert psnr(outputs["out_sample"], runtime(path, inputs)[0]) > 28
