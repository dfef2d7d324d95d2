"""Graphs for ONNX Runtime's CUDA provider: a kernel for every node, and fused operators that compute the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from sdrt import BuildError, DeviceError, InputError
from sdrt import bundle as bundles
from sdrt.engine import BuildOptions, OpenOptions, open_session
from sdrt_engines.build import build
from sdrt_engines.graph import fused, load_graph
from sdrt_engines.graph.cuda_kernels import argmax_in_float, without_kernel
from sdrt_engines.graph.external import Weights
from sdrt_engines.graph.fused import fuse
from sdrt_engines.graph.work import shapes
from tests.conftest import Model
from tests.cuda_fake import Gpu
from tests.sdrt_engines.graph.conftest import Node, make, runtime, saved

MODELS = ["tiny-sd", "sd2", "sdxl"]


# -- the operators, from their documentation (ContribOperators.md) ----------------------------------------------------


class GroupNorm(OpRun):
    op_domain = "com.microsoft"

    def _run(self, x: Any, gamma: Any, beta: Any, activation: Any = 0, channels_last: int = 1, epsilon: float = 1e-5, groups: int = 32) -> Any:  # fmt: skip
        assert channels_last == 1
        assert gamma.dtype == beta.dtype == np.float32
        n, h, w, c = x.shape
        grouped = x.astype(np.float64).reshape(n, h * w, groups, c // groups)
        mean, spread = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
        y = ((grouped - mean) / np.sqrt(spread + epsilon)).reshape(x.shape) * gamma + beta
        return (np.asarray(y / (1 + np.exp(-y)) if activation else y, x.dtype),)


class BiasSplitGelu(OpRun):
    op_domain = "com.microsoft"

    def _run(self, x: Any, bias: Any) -> Any:
        from scipy.special import erf

        left, right = np.split((x + bias).astype(np.float64), 2, axis=-1)
        return (np.asarray(left * right * 0.5 * (1 + erf(right / 2**0.5)), x.dtype),)


class SkipLayerNormalization(OpRun):
    op_domain = "com.microsoft"

    def _run(self, x: Any, skip: Any, gamma: Any, beta: Any, epsilon: float = 1e-5) -> Any:
        assert x.shape == skip.shape
        total = x + skip
        wide = total.astype(np.float64)
        normed = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + epsilon)
        nothing = np.zeros(0, np.float32)
        return np.asarray(normed * gamma + beta, x.dtype), nothing, nothing, total


def reference(path: Path, inputs: dict[str, Any]) -> list[Any]:
    evaluator = ReferenceEvaluator(onnx.load(str(path)), new_ops=[GroupNorm, BiasSplitGelu, SkipLayerNormalization])
    return list(evaluator.run(None, inputs))


def operators(model: Any) -> list[str]:
    return [node.op_type for node in model.graph.node]


def values(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def fused_of(nodes: list[Any], x: dict[str, Any], outputs: dict[str, Any], tmp_path: Path, **weights: Any) -> tuple[Any, Any, Any]:  # fmt: skip
    """(the fused model, what it computes, what the plain one computes)."""
    plain = make(nodes, {name: array.shape for name, array in x.items()}, outputs, **weights)
    weight = Weights(plain, tmp_path)
    expected = runtime(saved(plain, weight, tmp_path / "plain"), x)
    model = onnx.load(str(tmp_path / "plain" / "model.onnx"), load_external_data=False)
    weight = Weights(model, tmp_path / "plain")
    fuse(model, weight, shapes(model, {name: array.shape for name, array in x.items()}))
    folder = tmp_path / "fused"
    folder.mkdir()
    weight.save(model, folder)
    return model, reference(folder / "model.onnx", x), expected


# -- fused ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("channels", [64, 320, 48])
def test_group_norm(tmp_path: Path, silu: bool, channels: int) -> None:
    nodes = [Node("GroupNormalization", ["x", "s", "b"], ["n"], num_groups=16, epsilon=1e-3)]
    nodes += [Node("Sigmoid", ["n"], ["g"]), Node("Mul", ["n", "g"], ["a"])] if silu else [Node("Neg", ["n"], ["a"])]
    x = {"x": 3 + values(2, channels, 5, 4)}
    model, got, expected = fused_of(
        nodes, x, {"a": x["x"].shape}, tmp_path, s=values(channels, seed=1), b=values(channels, seed=2)
    )
    kept = channels not in fused.CHANNELS
    assert ("GroupNorm" in operators(model)) != kept
    assert ("Sigmoid" in operators(model)) == (silu and kept)
    np.testing.assert_allclose(got[0], expected[0], atol=5e-5)


def test_group_norm_that_is_read_elsewhere_keeps_its_silu(tmp_path: Path) -> None:
    nodes = [
        Node("GroupNormalization", ["x", "s", "b"], ["n"], num_groups=16),
        Node("Sigmoid", ["n"], ["g"]),
        Node("Mul", ["n", "g"], ["a"]),
        Node("Add", ["n", "a"], ["y"]),
    ]
    x = {"x": values(2, 64, 5, 4)}
    model, got, expected = fused_of(nodes, x, {"y": x["x"].shape}, tmp_path, s=values(64), b=values(64, seed=2))
    assert operators(model) == ["Transpose", "GroupNorm", "Transpose", "Sigmoid", "Mul", "Add"]
    np.testing.assert_allclose(got[0], expected[0], atol=5e-5)


def test_skip_layer_norm(tmp_path: Path) -> None:
    """The sum is read by others, too."""
    nodes = [
        Node("Add", ["x", "z"], ["sum"]),
        Node("LayerNormalization", ["sum", "s", "b"], ["n"], epsilon=1e-3),
        Node("Mul", ["n", "sum"], ["y"]),
    ]
    x = {"x": values(2, 7, 16), "z": values(2, 7, 16, seed=3)}
    model, got, expected = fused_of(nodes, x, {"y": x["x"].shape}, tmp_path, s=values(16), b=values(16, seed=2))
    assert operators(model) == ["SkipLayerNormalization", "Mul"]
    np.testing.assert_allclose(got[0], expected[0], atol=1e-5)


@pytest.mark.parametrize("other", ["broadcast", "weight", "axis"])
def test_sums_that_are_no_skip_stay(tmp_path: Path, other: str) -> None:
    axis = 1 if other == "axis" else -1
    vector = values(7, 16, seed=4) if other == "axis" else values(16, seed=4)
    x = {"x": values(2, 7, 16)} | ({} if other == "weight" else {"z": values(1 if other == "broadcast" else 2, 7, 16)})
    nodes = [
        Node("Add", ["x", "z"], ["sum"]),
        Node("LayerNormalization", ["sum", "s", "b"], ["y"], axis=axis),
    ]
    weights = {"s": vector, "b": vector} | ({"z": values(1, 7, 16)} if other == "weight" else {})
    model, got, expected = fused_of(nodes, x, {"y": (2, 7, 16)}, tmp_path, **weights)
    assert operators(model) == ["Add", "LayerNormalization"]
    np.testing.assert_allclose(got[0], expected[0], atol=1e-5)


@pytest.mark.parametrize("columns", [2560, 64])
@pytest.mark.parametrize("gate", ["right", "left", "tanh"])
def test_bias_split_gelu(tmp_path: Path, columns: int, gate: str) -> None:
    """Only where the right half is the gate, and the Gelu is exact."""
    half, gated = ("p", "q") if gate != "left" else ("q", "p")
    nodes = [
        Node("Add", ["bias", "x"], ["a"]),
        Node("Split", ["a"], ["p", "q"], axis=2, num_outputs=2),
        Node("Gelu", [gated], ["g"], approximate="tanh" if gate == "tanh" else "none"),
        Node("Mul", [half, "g"], ["y"]),
    ]
    x = {"x": values(2, 3, columns)}
    model, got, expected = fused_of(nodes, x, {"y": (2, 3, columns // 2)}, tmp_path, bias=values(columns, seed=1))
    assert ("BiasSplitGelu" in operators(model)) == (gate == "right" and columns in fused.HIDDEN)
    np.testing.assert_allclose(got[0], expected[0], atol=1e-5)


def test_a_whole_unet(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a tiny U-Net's patterns, as if the kernels took its sizes: evaluated, against ONNX Runtime."""
    monkeypatch.setattr(fused, "CHANNELS", frozenset(range(8, 4096, 8)))
    monkeypatch.setattr(fused, "HIDDEN", frozenset(range(8, 4096, 8)))
    built = build(bundle, tmp_path / "out", "onnxruntime", BuildOptions(target="cuda", extra={"fusions": "all"}))
    component = built.component("unet")
    counts = component.artifact.facts["fusions"]
    original = operators(load_graph(bundle / "unet" / "model.onnx"))
    assert counts["GroupNorm"] == original.count("GroupNormalization")
    assert counts["BiasSplitGelu"] == original.count("Gelu")
    assert counts["SkipLayerNormalization"] >= 2 * original.count("Gelu")
    entry = built.path(component.artifact.files[0].path)
    assert operators(load_graph(entry)).count("Sigmoid") < original.count("Sigmoid") / 3, "SiLU goes into the norm"
    generator = np.random.default_rng(0)
    inputs = {
        spec.name: generator.standard_normal(spec.at({"B": 2, "T": 77, "H": 64, "W": 72})).astype(np.float32)
        for spec in component.inputs
    }
    plain = open_session(bundles.load(bundle), "unet")
    expected = plain.run(**inputs)["out_sample"]
    plain.close()
    np.testing.assert_allclose(reference(entry, inputs)[0], expected, atol=5e-4)
    on_cpu = open_session(built, "unet")
    np.testing.assert_allclose(on_cpu.run(**inputs)["out_sample"], expected, atol=1e-4)
    on_cpu.close()


def test_embeddings_are_no_skip(bundle: Path, tmp_path: Path) -> None:
    """Positions are the same for all of a batch: the kernel would read beyond them."""
    built = build(bundle, tmp_path / "out", "onnxruntime", BuildOptions(target="cuda", extra={"fusions": "all"}))
    text = built.component("text_encoder").artifact
    norms = operators(load_graph(bundle / "text_encoder" / "model.onnx")).count("LayerNormalization")
    assert text.facts["fusions"] == {"SkipLayerNormalization": norms - 1}


# -- kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", MODELS)
def test_every_node_has_a_kernel(models: Callable[[str], Model], tmp_path: Path, name: str, precision: Any) -> None:
    bundle = models(name).bundle
    built = build(bundle, tmp_path / "out", "onnxruntime", BuildOptions(precision=precision, target="cuda"))
    for component in built.manifest.components.values():
        assert without_kernel(load_graph(built.path(component.artifact.files[0].path))) == {}
        assert component.artifact.target == "cuda"
        assert component.artifact.parity
        assert len(component.artifact.files) <= 2


def test_what_other_builds_hold_has_none(bundle: Path, ort_bundle: Path) -> None:
    assert without_kernel(load_graph(bundle / "text_encoder" / "model.onnx")) == {"ArgMax(i32)": 1}
    lacking = without_kernel(load_graph(ort_bundle / "unet" / "model.onnx"))
    assert lacking["InstanceNormalization(f32)"] == 39


def test_kernels_of_types() -> None:
    """What a node reads, not what it gives, decides; and the version of bool has none in Where."""
    model = make(
        [
            Node("Equal", ["x", "x"], ["e"]),
            Node("Where", ["e", "e", "e"], ["w"]),
            Node("Cast", ["w"], ["i"], to=TensorProto.INT32),
            Node("Sigmoid", ["x"], ["s"]),
            Node("ArgMax", ["i"], ["y"]),
            Node("Sin", ["s"], ["z"]),
            Node("Hardmax", ["z"], ["h"]),
        ],
        {"x": [2, 3]},
        {"h": [2, 3], "y": np.zeros((1, 3), np.int64)},
    )
    assert without_kernel(model) == {"Where(bool)": 1, "ArgMax(i32)": 1, "Hardmax(f32)": 1}


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float32])
def test_argmax(tmp_path: Path, dtype: Any) -> None:
    x = np.random.default_rng(0).integers(0, 49408, (3, 77)).astype(dtype)
    x[1, 5] = x[1, 60] = 49407  # the first counts
    model = make([Node("ArgMax", ["x"], ["y"], axis=-1)], {"x": x}, {"y": np.zeros((3, 1), np.int64)})
    assert argmax_in_float(model) == (dtype != np.float32)
    assert without_kernel(model) == {}
    path = saved(model, Weights(model, tmp_path), tmp_path / "out")
    np.testing.assert_array_equal(runtime(path, {"x": x})[0], x.argmax(-1)[:, None])


# -- build and open ---------------------------------------------------------------------------------------------------


def test_build_refuses(bundle: Path, tmp_path: Path) -> None:
    for options, kind, message in (
        (BuildOptions(extra={"fusions": "all"}), BuildError, "fusions are for cuda, the target is any"),
        (BuildOptions(target="cuda", precision="int8"), BuildError, "text_encoder: for cuda onnxruntime builds fp32, fp16; asked for int8"),
        (BuildOptions(target="cuda", extra={"fusions": "some"}), InputError, "expected all, none"),
    ):  # fmt: skip
        with pytest.raises(kind, match=message):
            build(bundle, tmp_path / "out", "onnxruntime", options)
    assert list(tmp_path.iterdir()) == []


def test_build_finds_what_has_no_kernel(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdrt_engines import onnxruntime as engine

    monkeypatch.setattr(engine, "argmax_in_float", lambda model: 0)
    with pytest.raises(
        BuildError, match=r"text_encoder: onnxruntime's CUDA provider has no kernels for 1 ArgMax\(i32\)"
    ):
        build(bundle, tmp_path / "out", "onnxruntime", BuildOptions(target="cuda"))


def test_targets_when_opened(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdrt_engines import onnxruntime as engine
    from sdrt_engines import onnxruntime_cuda, onnxruntime_providers
    from tests.cuda_fake import CUDA, Runtime

    built = build(bundle, tmp_path / "out", "onnxruntime", BuildOptions(target="cuda", extra={"fusions": "all"}))
    fake = Runtime(Gpu(), held=(CUDA, "DmlExecutionProvider"))
    for module in (onnxruntime_cuda, onnxruntime_providers):
        monkeypatch.setattr(module, "cuda", fake.gpu)
    monkeypatch.setattr(engine, "_library", lambda: fake)
    with pytest.raises(DeviceError, match="unet: was built for cuda, asked for dml"):
        open_session(built, "unet", device="dml:0")
    opened = []
    monkeypatch.setattr(fake, "InferenceSession", lambda path, *_, **__: opened.append(Path(path).name) or 1 / 0)
    for device in ("cuda:0", None):
        with pytest.raises(bundles.BundleError):
            open_session(built, "unet", device=device, options=OpenOptions())
    assert opened == ["model.onnx", "plain.onnx"]
