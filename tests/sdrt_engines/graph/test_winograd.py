"""The rewritten convolutions: the same numbers, at every height, and only where they gain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdrt import bundle as bundles
from sdrt.engine import BuildOptions
from sdrt.metrics import psnr
from sdrt_engines.graph import load_graph
from sdrt_engines.graph.external import Weights
from sdrt_engines.graph.shapes import usual_shapes
from sdrt_engines.graph.winograd import AT, BT, LEAST, G, winograd
from tests.conftest import Model
from tests.sdrt_engines.graph.conftest import Node, evaluator, make, runtime, saved

C = LEAST


def convolution(bias: bool = True, channels: int = C, outputs: int = C, **changed: Any) -> Any:
    generator = np.random.default_rng(0)
    weights = {
        "w": generator.standard_normal((outputs, channels, 3, 3)).astype(np.float32) / np.float32(3 * channels**0.5)
    }
    if bias:
        weights["b"] = generator.standard_normal(outputs).astype(np.float32)
    attributes: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], **changed}
    node = Node("Conv", ["x", *weights], ["y"], **attributes)
    return make([node], {"x": ["B", channels, "H", "W"]}, {"y": ["B", outputs, "h", "w"]}, **weights)


def test_the_matrices_are_a_convolution() -> None:
    """y = Aᵀ[(Gg) ⊙ (Bᵀd)] for every filter and tile: exact, but for the sixths."""
    generator = np.random.default_rng(1)
    for _ in range(10):
        g, d = generator.standard_normal(3), generator.standard_normal(6)
        np.testing.assert_allclose(AT @ ((G @ g) * (BT @ d)), np.correlate(d, g, "valid"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 4), (5, 9), (7, 2), (8, 8), (16, 12), (9, 17)])
def test_same_numbers_at_every_size(tmp_path: Path, size: tuple[int, int], bias: bool) -> None:
    x = np.random.default_rng(2).standard_normal((2, C, *size)).astype(np.float32)
    model = convolution(bias)
    plain = runtime(saved(model, Weights(model, tmp_path), tmp_path / "plain"), {"x": x})[0]
    model = convolution(bias)
    weights = Weights(model, tmp_path)
    assert winograd(model, weights) == {"winograd": 1}
    got = runtime(saved(model, weights, tmp_path / "tiled"), {"x": x})[0]
    assert got.shape == plain.shape
    # Seen: 115 to 121 dB. Float32 itself, in another order of sums, is at 130.
    assert psnr(plain, got) >= 110


def test_nothing_but_standard_operators(tmp_path: Path) -> None:
    """onnx's own evaluator computes the same, so that no engine's reading of an attribute is relied on."""
    x = np.random.default_rng(3).standard_normal((1, C, 6, 5)).astype(np.float32)
    model = convolution()
    weights = Weights(model, tmp_path)
    winograd(model, weights)
    path = saved(model, weights, tmp_path / "tiled")
    assert psnr(evaluator(path, {"x": x})[0], runtime(path, {"x": x})[0]) >= 110


@pytest.mark.parametrize(
    "changed",
    [
        {"strides": [2, 2]},
        {"dilations": [2, 2], "pads": [2, 2, 2, 2]},
        {"pads": [0, 0, 0, 0]},
        {"pads": [0, 0, 1, 1]},
        {"channels": C - 1},
        {"outputs": C - 1},
        {"group": 2},
        {"auto_pad": "SAME_UPPER"},
    ],
    ids=str,
)
def test_others_are_left_alone(tmp_path: Path, changed: dict[str, Any]) -> None:
    model = convolution(**changed)
    before = model.SerializeToString()
    assert winograd(model, Weights(model, tmp_path)) == {}
    assert model.SerializeToString() == before


@pytest.mark.parametrize(
    ("which", "size", "count"),
    [("none", (32, 32), 0), ("large", (32, 32), 1), ("large", (33, 31), 0), ("all", (1, 1), 1)],
)
def test_which(tmp_path: Path, which: str, size: tuple[int, int], count: int) -> None:
    model = convolution()
    assert winograd(model, Weights(model, tmp_path), which, {"x": (1, C, *size)}).get("winograd", 0) == count


def test_large_is_what_the_model_is_for(models: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny VAE decoder, built for its own size and for others."""
    monkeypatch.setattr("sdrt_engines.graph.winograd.LEAST", 16)
    source = bundles.load(models("tiny-sd").bundle)
    component = source.component("vae_decoder")
    counts = {}
    for shapes in ((), ((64, 64),), ((64, 64), (512, 512))):
        graph = load_graph(source.path(component.artifact.files[0].path))
        weights = Weights(graph, source.path(component.artifact.files[0].path).parent)
        inputs = usual_shapes(source, component, BuildOptions(shapes=shapes))
        counts[shapes] = winograd(graph, weights, "large", inputs).get("winograd", 0)
    graph = load_graph(source.path(component.artifact.files[0].path))
    every = winograd(graph, Weights(graph, source.path(component.artifact.files[0].path).parent), "all")["winograd"]
    assert 0 < counts[((64, 64),)] < counts[()] <= counts[((64, 64), (512, 512))] == every


def test_a_graph_whose_shapes_are_not_told_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = convolution()
    model.graph.node.add(op_type="Einsum", input=["y"], output=["z"])
    assert winograd(model, Weights(model, tmp_path), "large", {"x": (1, C, 64, 64)}) == {}
    assert "convolutions are left as they are" in caplog.text


def test_graphs_of_old_operator_sets_are_left_alone(tmp_path: Path) -> None:
    for version, count in ((14, 0), (15, 1)):
        model = convolution()
        model.opset_import[0].version = version
        assert winograd(model, Weights(model, tmp_path)).get("winograd", 0) == count


def test_computed_filters_are_left_alone(tmp_path: Path) -> None:
    """Such as those behind a DequantizeLinear."""
    w = np.zeros((C, C, 3, 3), np.float32)
    nodes = [Node("Relu", ["w"], ["v"]), Node("Conv", ["x", "v"], ["y"], pads=[1, 1, 1, 1])]
    model = make(nodes, {"x": [1, C, 4, 4]}, {"y": [1, C, 4, 4]}, w=w)
    assert winograd(model, Weights(model, tmp_path)) == {}
