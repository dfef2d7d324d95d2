"""float16 with float32 islands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from sdrt import BuildError
from sdrt.metrics import psnr
from sdrt_engines.graph.external import Weights
from sdrt_engines.graph.group_norm import group_norm_as_instance_norm
from sdrt_engines.graph.half import LARGEST, MARGIN, to_half
from sdrt_engines.graph.ranges import Ranges, element_types, measure
from tests.sdrt_engines.graph.conftest import (
    Node,
    component,
    evaluator,
    make,
    makers,
    operators,
    runtime,
    saved,
)

HALF = TensorProto.FLOAT16


def converted(model: Any, inputs: dict[str, Any], folder: Path, **options: Any) -> tuple[Path, dict[str, Any], Any]:
    """The graph in float16, measured over ``inputs``: (file, facts, model)."""
    ranges = measure(model, folder, [inputs])
    copy = type(model)()
    copy.CopyFrom(model)
    weights = Weights(copy, folder)
    facts = to_half(copy, weights, ranges, **options)
    return saved(copy, weights, folder / f"half{len(list(folder.iterdir()))}"), facts, copy


def why(facts: dict[str, Any]) -> dict[tuple[str, str], int]:
    return {(island["op"], island["why"]): island["nodes"] for island in facts["islands"]}


def no_pair_of_casts(model: Any) -> bool:
    """No tensor goes to float16 and back with nothing, or only movers, between."""
    made = makers(model)
    for node in operators(model, "Cast"):
        name = node.input[0]
        while name in made and made[name].op_type in ("Reshape", "Transpose", "Cast"):
            if made[name].op_type == "Cast":
                return False
            name = made[name].input[0]
    return True


def test_border(tmp_path: Path) -> None:
    """Inputs and outputs float32 under their names, one cast each, weights half the size, everything between float16."""
    generator = np.random.default_rng(0)
    w = generator.standard_normal((64, 64)).astype(np.float32)
    nodes = [
        Node("MatMul", ["x", "w"], ["a"]), Node("Relu", ["a"], ["y"]), Node("Add", ["y", "x"], ["b"]),
        Node("Sigmoid", ["b"], ["z"]),
    ]  # fmt: skip
    model = make(nodes, {"x": [3, 64]}, {"y": [3, 64], "z": [3, 64]}, w=w)
    x = generator.standard_normal((3, 64)).astype(np.float32)
    path, facts, half = converted(model, {"x": x}, tmp_path)
    assert facts["islands"] == []
    assert facts["casts"] == len(operators(half, "Cast")) == 3  # x, y, z: y is computed once, and read in float16
    assert {i.name: i.type.tensor_type.elem_type for i in (*half.graph.input, *half.graph.output)} == dict.fromkeys(
        "xyz", 1
    )
    assert {t.name: t.data_type for t in half.graph.initializer} == {"w.half": HALF}
    a = np.maximum(x @ w, 0)
    expected = [a, 1 / (1 + np.exp(-(a + x)))]
    for run in (runtime, evaluator):
        for got, reference in zip(run(path, {"x": x}), expected, strict=True):
            assert got.dtype == np.float32
            assert psnr(reference, got) > 60


def test_measured_range_makes_an_island(tmp_path: Path) -> None:
    """60 × 60·64 overflows; the division brings it back. The island ends where the numbers are small again."""
    ones = np.ones((64, 64), np.float32)
    nodes = [
        Node("Mul", ["x", "small"], ["x2"]), Node("MatMul", ["x2", "w"], ["big"]), Node("Div", ["big", "down"], ["y1"]),
        Node("Mul", ["y1", "small"], ["y"]),
    ]  # fmt: skip
    model = make(nodes, {"x": [1, 64]}, {"y": [1, 64]}, w=60 * ones, down=np.float32(60000), small=np.float32(1.5))
    x = np.full((1, 64), 60, np.float32)
    expected = (x * 1.5 @ (60 * ones)) / 60000 * 1.5
    path, facts, half = converted(model, {"x": x}, tmp_path)
    assert why(facts) == {("MatMul", "range"): 1, ("Div", "range"): 1}
    assert facts["islands"][0]["largest"] == facts["largest_activation"] == pytest.approx(345600)
    assert no_pair_of_casts(half)
    assert all(psnr(expected, run(path, {"x": x})[0]) > 55 for run in (runtime, evaluator))
    naive, _, _ = converted(model, {"x": x}, tmp_path, islands=False)
    assert not np.isfinite(evaluator(naive, {"x": x})[0]).any()


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_margin(tmp_path: Path, factor: float) -> None:
    model = make([Node("Relu", ["x"], ["y"])], {"x": [1]}, {"y": [1]})
    _, facts, _ = converted(model, {"x": np.array([factor * LARGEST / MARGIN], np.float32)}, tmp_path)
    assert bool(facts["islands"]) == (factor > 1)


def test_attention_logits(tmp_path: Path) -> None:
    """Queries and keys of 100 are small; their product over 64 channels, 640,000, is not."""
    generator = np.random.default_rng(0)
    q, k, v = generator.standard_normal((3, 1, 2, 8, 64)).astype(np.float32)
    q[..., 0, :], k[..., 0, :] = 100, 100
    inputs = {"q": q, "k": k, "v": v}
    model = make([Node("Attention", ["q", "k", "v"], ["y"])], {n: a.shape for n, a in inputs.items()}, {"y": q.shape})
    path, facts, _ = converted(model, inputs, tmp_path)
    assert why(facts) == {("Attention", "logits"): 1}
    assert facts["islands"][0]["largest"] == pytest.approx(640_000, rel=1e-3)
    logits = q @ k.swapaxes(-1, -2) / 8
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ v
    assert all(psnr(expected, run(path, inputs)[0]) > 60 for run in (runtime, evaluator))


def test_attention_logits_decomposed(tmp_path: Path) -> None:
    """Where attention is a product, a scale and a softmax, the product's own range decides: naive is NaN, ours is not."""
    q = np.full((1, 4, 64), 100, np.float32)
    nodes = [
        Node("MatMul", ["q", "k"], ["logits"]), Node("Mul", ["logits", "scale"], ["scaled"]),
        Node("Softmax", ["scaled"], ["p"], axis=-1), Node("MatMul", ["p", "v"], ["y"]),
    ]  # fmt: skip
    inputs = {"q": q, "k": q.swapaxes(1, 2).copy(), "v": np.linspace(0, 1, 256, dtype=np.float32).reshape(1, 4, 64)}
    model = make(nodes, {n: a.shape for n, a in inputs.items()}, {"y": [1, 4, 64]}, scale=np.float32(0.125))
    path, facts, half = converted(model, inputs, tmp_path)
    assert why(facts) == {("MatMul", "range"): 1, ("Mul", "range"): 1, ("Softmax", "range"): 1}
    assert no_pair_of_casts(half)
    naive, _, _ = converted(model, inputs, tmp_path, islands=False)
    expected = np.broadcast_to(inputs["v"].mean(1, keepdims=True), (1, 4, 64))
    assert np.isnan(evaluator(naive, inputs)[0]).all()
    assert all(psnr(expected, run(path, inputs)[0]) > 60 for run in (runtime, evaluator))


def test_config_asks_for_float32_attention(tmp_path: Path) -> None:
    """SD 2.x's upcast_attention, whatever was measured."""
    q = np.full((1, 1, 2, 4), 0.1, np.float32)
    model = make([Node("Attention", ["q", "q", "q"], ["y"])], {"q": q.shape}, {"y": q.shape})
    _, facts, half = converted(model, {"q": q}, tmp_path, upcast_attention=True)
    assert why(facts) == {("Attention", "config"): 1}
    assert facts["casts"] == 0
    _, facts, half = converted(model, {"q": q}, tmp_path)
    assert not facts["islands"]
    # In float16 its softmax is summed in float32 all the same.
    assert {a.name: a.i for a in operators(half, "Attention")[0].attribute} == {"softmax_precision": TensorProto.FLOAT}


def test_config_asks_for_float32_attention_decomposed(tmp_path: Path) -> None:
    """As other exporters write it: both products, and what is between them; the linear layer before stays float16."""
    nodes = [
        Node("MatMul", ["x", "w"], ["q"]), Node("Transpose", ["q"], ["k"], perm=[0, 2, 1]),
        Node("MatMul", ["q", "k"], ["logits"]), Node("Mul", ["logits", "scale"], ["scaled"]),
        Node("Add", ["scaled", "mask"], ["masked"]), Node("Softmax", ["masked"], ["p"], axis=-1),
        Node("Cast", ["p"], ["p2"], to=TensorProto.FLOAT), Node("MatMul", ["p2", "q"], ["y"]),
    ]  # fmt: skip
    model = make(
        nodes, {"x": [1, 4, 8], "mask": [4, 4]}, {"y": [1, 4, 8]}, w=np.eye(8, dtype=np.float32), scale=np.float32(0.3)
    )  # fmt: skip
    x = np.random.default_rng(0).standard_normal((1, 4, 8)).astype(np.float32)
    inputs = {"x": x, "mask": np.zeros((4, 4), np.float32)}
    path, facts, half = converted(model, inputs, tmp_path, upcast_attention=True)
    assert why(facts) == {("MatMul", "config"): 2, ("Mul", "config"): 1, ("Add", "config"): 1, ("Softmax", "config"): 1}
    assert element_types(half)[operators(half, "MatMul")[0].input[0]] == HALF
    logits = 0.3 * x @ x.swapaxes(1, 2)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    assert all(psnr(p / p.sum(-1, keepdims=True) @ x, run(path, inputs)[0]) > 60 for run in (runtime, evaluator))


def test_config_asks_for_float32_attention_that_is_not_there(tmp_path: Path) -> None:
    model = make([Node("Softmax", ["x"], ["y"])], {"x": [1, 4]}, {"y": [1, 4]})
    with pytest.raises(BuildError, match="none is recognised"):
        converted(model, {"x": np.ones((1, 4), np.float32)}, tmp_path, upcast_attention=True)


def test_sums_over_a_picture(tmp_path: Path) -> None:
    """InstanceNormalization squares what is 300 off the mean, 90,000; its inputs and outputs are small."""
    x = np.tile(np.array([-300, 300], np.float32), (1, 2, 8))
    ones, zeros = np.ones(2, np.float32), np.zeros(2, np.float32)
    model = make(
        [Node("InstanceNormalization", ["x", "s", "b"], ["y"])], {"x": x.shape}, {"y": x.shape}, s=ones, b=zeros
    )
    path, facts, _ = converted(model, {"x": x}, tmp_path)
    assert why(facts) == {("InstanceNormalization", "sums"): 1}
    naive, _, _ = converted(model, {"x": x}, tmp_path, islands=False)
    assert psnr(np.sign(x), evaluator(naive, {"x": x})[0]) < 5
    assert all(psnr(np.sign(x), run(path, {"x": x})[0]) > 60 for run in (runtime, evaluator))


def test_sums_of_a_softmax(tmp_path: Path) -> None:
    """Seventy thousand equal entries (a picture of 2136x2136, attended to by one pixel) add up to more than 65,504."""
    x = np.zeros((1, 70_000), np.float32)
    nodes = [Node("Softmax", ["x"], ["p"], axis=-1), Node("Mul", ["p", "up"], ["y"])]
    model = make(nodes, {"x": x.shape}, {"y": x.shape}, up=np.float32(16384))
    path, facts, _ = converted(model, {"x": x}, tmp_path)
    assert why(facts) == {("Softmax", "sums"): 1}
    naive, _, _ = converted(model, {"x": x}, tmp_path, islands=False)
    expected = np.full_like(x, 16384 / 70_000)
    assert (evaluator(naive, {"x": x})[0] == 0).all()
    assert psnr(expected, evaluator(path, {"x": x})[0]) > 40
    assert psnr(expected, runtime(path, {"x": x})[0]) > 40


@pytest.mark.parametrize("operator", ["GroupNormalization", "LayerNormalization"])
def test_normalisations_with_a_stash_type_stay_half(tmp_path: Path, operator: str) -> None:
    """Their definition says float32 for the sums: in float16 too, 300 off the mean is no harm."""
    x = np.tile(np.array([-300, 300], np.float32), (1, 2, 8))
    options: dict[str, Any] = {"num_groups": 2} if operator[0] == "G" else {"axis": -1}
    size = 2 if operator[0] == "G" else 16
    weights = {"s": np.ones(size, np.float32), "b": np.zeros(size, np.float32)}
    model = make([Node(operator, ["x", "s", "b"], ["y"], **options)], {"x": x.shape}, {"y": x.shape}, **weights)
    path, facts, half = converted(model, {"x": x}, tmp_path)
    assert not facts["islands"]
    if operator[0] == "G":  # onnx's evaluator overlooks the stash_type of LayerNormalization
        assert psnr(np.sign(x), evaluator(path, {"x": x})[0]) > 60
        # For ONNX Runtime it becomes InstanceNormalization, which has none: float32 there.
        group_norm_as_instance_norm(half)
        path = saved(half, Weights(half, path.parent), tmp_path / "rewritten")
        assert element_types(half)[operators(half, "InstanceNormalization")[0].input[0]] == TensorProto.FLOAT
        assert psnr(np.sign(x), evaluator(path, {"x": x})[0]) > 60
    assert psnr(np.sign(x), runtime(path, {"x": x})[0]) > 60


def test_group_normalisation_before_opset_21(tmp_path: Path) -> None:
    """It has no stash_type: nothing says of what type its sums are."""
    x = np.ones((1, 4, 2), np.float32)
    nodes = [Node("GroupNormalization", ["x", "s", "b"], ["y"], num_groups=2)]
    model = make(nodes, {"x": x.shape}, {"y": x.shape}, s=np.ones(4, np.float32), b=np.zeros(4, np.float32))
    ranges = Ranges({"x": 1.0, "y": 1.0}, {})
    for opset, expected in ((21, {}), (20, {("GroupNormalization", "sums"): 1})):
        model.opset_import[0].version = opset
        copy = type(model).FromString(model.SerializeToString())
        assert why(to_half(copy, Weights(copy, tmp_path), ranges)) == expected


def test_angles(tmp_path: Path) -> None:
    """A timestep of 999.25 is 999.5 in float16, and 999.25 rad are known to 0.25: what makes an angle stays float32."""
    nodes = [
        Node("Unsqueeze", ["t", "one"], ["t2"]), Node("Mul", ["t2", "frequencies"], ["angle"]), Node("Sin", ["angle"], ["s"]),
        Node("Cos", ["angle"], ["c"]), Node("Concat", ["c", "s"], ["e"], axis=-1), Node("MatMul", ["e", "w"], ["y"]),
    ]  # fmt: skip
    frequencies = np.exp(-np.linspace(0, 9, 16)).astype(np.float32)
    weights = {"one": np.array([1]), "frequencies": frequencies, "w": np.eye(32, dtype=np.float32)}
    model = make(nodes, {"t": [1]}, {"y": [1, 32]}, **weights)
    t = np.array([999.25], np.float32)
    angles = np.float64(999.25) * frequencies
    expected = np.concatenate([np.cos(angles), np.sin(angles)])[None]
    path, facts, half = converted(model, {"t": t}, tmp_path)
    assert why(facts) == {(op, "angles"): 1 for op in ("Unsqueeze", "Mul", "Sin", "Cos")}
    assert operators(half, "Concat")[0].input[0].endswith(".half")
    naive, _, _ = converted(model, {"t": t}, tmp_path, islands=False)
    assert psnr(expected, evaluator(naive, {"t": t})[0]) < 30
    assert all(psnr(expected, run(path, {"t": t})[0]) > 60 for run in (runtime, evaluator))


@pytest.mark.parametrize(
    ("op", "value", "kept"),
    [("Mul", 1e6, True), ("Mul", 6e4, False), ("Add", 1e-8, True), ("Add", 1e-4, False), ("Mul", -np.inf, True)],
)
@pytest.mark.parametrize("held", ["initializer", "value", "value_float"])
def test_weights_that_float16_cannot_hold(tmp_path: Path, op: str, value: float, kept: bool, held: str) -> None:
    """Beyond 65,504, or denormal altogether: an epsilon of 1e-8 is 0. Held as our exporter does, and as others do."""
    attribute = {"value": helper.make_tensor("v", TensorProto.FLOAT, [], [value]), "value_float": value}.get(held)
    constant = [] if held == "initializer" else [Node("Constant", [], ["w"], **{held: attribute})]
    weight = {} if constant else {"w": np.float32(value)}
    model = make([*constant, Node(op, ["x", "w"], ["y"])], {"x": [1]}, {"y": [1]}, **weight)
    weights = Weights(model, tmp_path)
    ranges = measure(
        make([Node("Relu", ["x"], ["y"])], {"x": [1]}, {"y": [1]}), tmp_path, [{"x": np.zeros(1, np.float32)}]
    )
    facts = to_half(model, weights, ranges)
    assert why(facts) == ({(op, "weight"): 1} if kept else {})


def test_shared_weight_is_held_in_both_types(tmp_path: Path) -> None:
    w = np.arange(4, dtype=np.float32)
    nodes = [Node("Mul", ["x", "w"], ["a"]), Node("Add", ["big", "w"], ["b"]), Node("Mul", ["a", "w"], ["y"])]
    model = make(nodes, {"x": [4], "big": [4]}, {"y": [4], "b": [4]}, w=w)
    inputs = {"x": np.ones(4, np.float32), "big": np.full(4, 1e6, np.float32)}
    path, _, half = converted(model, inputs, tmp_path)
    assert {t.name: t.data_type for t in half.graph.initializer} == {"w": 1, "w.half": HALF}
    for run in (runtime, evaluator):
        np.testing.assert_array_equal(run(path, inputs), [w * w, w + 1e6])


def test_types_that_are_not_compute_stay(tmp_path: Path) -> None:
    """Integers, shapes, and what an operator wants in float32: Resize's scales, casts, ranges and constants."""
    nodes = [
        Node("Shape", ["x"], ["shape"], start=2), Node("Gather", ["shape", "zero"], ["height"]),
        Node("Cast", ["height"], ["h"], to=TensorProto.FLOAT), Node("Range", ["start", "h", "step"], ["r"]),
        Node("ConstantOfShape", ["shape"], ["c"], value=helper.make_tensor("v", TensorProto.FLOAT, [1], [0.5])),
        Node("Add", ["c", "r"], ["cr"]), Node("Add", ["x", "cr"], ["a"]),
        Node("Resize", ["a", "", "scales"], ["y"], mode="nearest"),
    ]  # fmt: skip
    model = make(
        nodes, {"x": [1, 1, 4, 4]}, {"y": [1, 1, 8, 8]}, zero=np.int64(0), start=np.float32(0), step=np.float32(1),
        scales=np.array([1, 1, 2, 2], np.float32),
    )  # fmt: skip
    x = np.random.default_rng(0).standard_normal((1, 1, 4, 4)).astype(np.float32)
    path, facts, half = converted(model, {"x": x}, tmp_path)
    assert not facts["islands"]
    types = element_types(half)
    assert [types[name] for name in ("shape", "h", "r", "c", "scales")] == [TensorProto.INT64, 1, 1, 1, 1]
    assert [types[name] for name in ("cr", "a", "y")] == [HALF, HALF, 1]
    expected = (x + 0.5 + np.arange(4, dtype=np.float32)).repeat(2, 2).repeat(2, 3)
    for run in (runtime, evaluator):
        assert psnr(expected, run(path, {"x": x})[0]) > 60


def test_movers_between_islands_join_them(tmp_path: Path) -> None:
    nodes = [
        Node("Mul", ["x", "up"], ["a"]), Node("Reshape", ["a", "flat"], ["b"]), Node("Unsqueeze", ["b", "one"], ["c"]),
        Node("Div", ["c", "up"], ["d"]), Node("Transpose", ["d"], ["e"]), Node("Sin", ["e"], ["y"]),
    ]  # fmt: skip
    model = make(
        nodes, {"x": [2, 2]}, {"y": [1, 4]}, up=np.float32(1e4), flat=np.array([4]), one=np.array([1])
    )  # fmt: skip
    x = np.array([[10, 20], [30, 40]], np.float32)
    path, facts, half = converted(model, {"x": x}, tmp_path)
    assert facts["casts"] == 0
    assert not operators(half, "Cast")
    for run in (runtime, evaluator):
        np.testing.assert_allclose(run(path, {"x": x})[0], np.sin(x.reshape(1, 4)), rtol=1e-5)


def test_operator_of_unknown_types(tmp_path: Path) -> None:
    """Nothing says which of its inputs may be float16."""
    nodes = [Node("FusedMatMul", ["x", "x"], ["a"], domain="com.microsoft"), Node("Relu", ["a"], ["y"])]
    model = make([Node("Identity", ["x"], ["a"]), nodes[1]], {"x": [2, 2]}, {"y": [2, 2]})
    model.graph.node[0].CopyFrom(nodes[0])
    model.opset_import.add(domain="com.microsoft", version=1)
    with pytest.raises(BuildError, match=r"FusedMatMul of com\.microsoft: element types of its outputs are not known"):
        converted(model, {"x": np.ones((2, 2), np.float32)}, tmp_path)


def test_infinite_activation(tmp_path: Path) -> None:
    """A causal mask: float32 where it is, and facts that are JSON."""
    nodes = [Node("Log", ["x"], ["mask"]), Node("Exp", ["mask"], ["y"])]
    model = make(nodes, {"x": [2]}, {"y": [2]})
    _, facts, _ = converted(model, {"x": np.array([0, 1], np.float32)}, tmp_path)
    assert facts["islands"] == [{"op": "Exp", "why": "range", "nodes": 1}, {"op": "Log", "why": "range", "nodes": 1}]
    assert facts["largest_activation"] == 1


@settings(max_examples=25)
@given(st.data())
def test_any_chain(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Random graphs: valid, the same results, and no cast pair, wherever the numbers get large."""
    nodes, names = [], ["x"]
    weights: dict[str, Any] = {"up": np.float32(300), "down": np.float32(1 / 300), "flip": np.array([4, 4])}
    for i in range(data.draw(st.integers(2, 10))):
        a = data.draw(st.sampled_from(names))
        op = data.draw(st.sampled_from(["up", "down", "Relu", "Transpose", "Reshape", "Add", "Neg"]))
        if op in ("up", "down"):
            nodes.append(Node("Mul", [a, op], [f"t{i}"]))
        elif op == "Reshape":
            nodes.append(Node(op, [a, "flip"], [f"t{i}"]))
        elif op == "Add":
            nodes.append(Node(op, [a, data.draw(st.sampled_from(names))], [f"t{i}"]))
        else:
            nodes.append(Node(op, [a], [f"t{i}"]))
        names.append(f"t{i}")
    used = {name for node in nodes for name in node.input}
    outputs = {name: [4, 4] for name in names[1:] if name not in used or data.draw(st.booleans())}
    model = make(nodes, {"x": [4, 4]}, outputs, **{n: w for n, w in weights.items() if n in used})
    folder = tmp_path_factory.mktemp("chain")
    saved(model, Weights(model, folder), folder / "float")
    x = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    path, _, half = converted(model, {"x": x}, folder)
    expected = evaluator(folder / "float" / "model.onnx", {"x": x})
    for run in (runtime, evaluator):
        for reference, got in zip(expected, run(path, {"x": x}), strict=True):
            # Small values below 300 Adds of 300 and back: rounding is relative to what was added up.
            assert psnr(reference, got) > 40
    pairs = {(node.input[0], node.attribute[0].i) for node in operators(half, "Cast")}
    assert len(pairs) == len(operators(half, "Cast")), "one cast a tensor and type"


def scaled_up(root: Path, factor: float) -> tuple[Any, Weights, Path]:
    """The VAE decoder with the convolution before every ResNet's second norm scaled up: the norm takes it back."""
    model, weights, folder = component(root, "vae_decoder")
    made = makers(model)
    for norm in operators(model, "GroupNormalization"):
        conv = made.get(norm.input[0])
        if conv is not None and conv.op_type == "Conv" and ".norm2." in norm.input[1]:
            for k in (1, 2):
                name = conv.input[k]
                conv.input[k] = f"{name}.up"
                dims = weights.dims(name)
                weights.declare(f"{name}.up", 1, dims, lambda name=name: (weights[name] * factor).astype(np.float32))
    return model, weights, folder


@pytest.mark.parametrize("engine", ["graph", "onnxruntime"])
def test_overflow_in_a_network(bundle: Path, tmp_path: Path, engine: str) -> None:
    """A decoder whose activations pass 65,504: in float16 alone NaN, with islands within 60 dB of float32."""
    model, weights, _ = scaled_up(bundle, 1e5)
    folder = saved(model, weights, tmp_path / "float").parent
    inputs = {"latent_sample": np.random.default_rng(0).standard_normal((1, 4, 4, 4)).astype(np.float32)}
    expected = runtime(folder / "model.onnx", inputs)[0]
    results = {}
    for islands in (False, True):
        import onnx

        half = onnx.load(folder / "model.onnx", load_external_data=False)
        held = Weights(half, folder)
        ranges = measure(half, folder, [inputs])
        facts = to_half(half, held, ranges, islands=islands)
        if engine == "onnxruntime":
            group_norm_as_instance_norm(half)
        results[islands] = saved(half, held, tmp_path / f"half{islands}")
    assert max(ranges.largest.values()) > 65504
    assert {island["why"] for island in facts["islands"]} == {"range"}
    assert {island["op"] for island in facts["islands"]} >= {"Conv", "GroupNormalization"}
    assert not np.isfinite(evaluator(results[False], inputs)[0]).any()
    runs = (runtime, evaluator) if engine == "onnxruntime" else (evaluator,)
    for run in runs:
        assert psnr(expected, run(results[True], inputs)[0]) > 60
