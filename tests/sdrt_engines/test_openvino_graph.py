"""Rewrites of OpenVINO networks: the same numbers, and nothing rewritten that is something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sdrt.metrics import psnr
from sdrt_engines import openvino_graph
from sdrt_engines.openvino_graph import for_tiles, without_splits
from tests.conftest import Model

openvino = pytest.importorskip("openvino")
opset = pytest.importorskip("openvino.opset13")

CORE = openvino.Core()
OTHERS = ("bf16", "i8", "f8e4m3")
"""Types that others store weights in, and that are passed over."""
RANDOM = np.random.default_rng(0)


def weights(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def stored(values: np.ndarray, half: bool, kind: str = "") -> Any:
    """kind: a type of others, by OpenVINO's name for it."""
    if kind:
        return opset.convert(opset.constant(values.round(), getattr(openvino.Type, kind)), "f32")
    return opset.convert(opset.constant(values.astype(np.float16)), "f32") if half else opset.constant(values)


def run(model: Any, *inputs: np.ndarray) -> np.ndarray:
    compiled = CORE.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.array(compiled.create_infer_request().infer(list(inputs))[0])


def kinds(model: Any) -> list[str]:
    return [node.get_type_name() for node in model.get_ops()]


def agree(make: Callable[[], Any], rewrite: Callable[[Any], Any], *inputs: np.ndarray, least: float = 110) -> Any:
    """The rewritten model, once its numbers have been held against the plain one's."""
    plain, rewritten = make(), make()
    rewrite(rewritten)
    assert psnr(run(plain, *inputs), run(rewritten, *inputs)) >= least
    return rewritten


# -- upsampling --------------------------------------------------------------------------------------------------------


def upsampling(size: tuple[int, int], target: tuple[int, int], half: bool = False, **changes: Any) -> Any:
    x = opset.parameter([2, 3, *size], np.float32, name="x")
    told = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"} | changes.get("told", {})
    larger = opset.interpolate(
        x, np.array(target), changes.get("mode", "nearest"), "sizes", axes=np.array([2, 3]), **told
    )
    taps = changes.get("taps", 3)
    values = np.random.default_rng(1).standard_normal((5, 3, taps, taps)).astype(np.float32)
    kernel = stored(values, half, changes.get("kind", ""))
    stride, pad = changes.get("stride", 1), changes.get("pad", 1)
    y = opset.convolution(larger, kernel, [stride] * 2, [pad] * 2, [pad] * 2, [1, 1])
    return openvino.Model([y], [x], "upsampling")


@pytest.mark.parametrize("half", [False, True], ids=["f32", "f16"])
@pytest.mark.parametrize("size", [(4, 4), (3, 7), (1, 1)])
def test_upsampling(size: tuple[int, int], half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of taps that are stored in float16 are rounded to it again. Small pictures stay as they are."""
    assert for_tiles(upsampling(size, (2 * size[0], 2 * size[1]))) == (0, 0)
    monkeypatch.setattr(openvino_graph, "LARGE", 1)
    twice, least = (2 * size[0], 2 * size[1]), 65 if half else 110
    made = agree(lambda: upsampling(size, twice, half), for_tiles, weights(2, 3, *size), least=least)
    assert "ConvolutionBackpropData" in kinds(made)
    assert "Interpolate" not in kinds(made)


@pytest.mark.parametrize(
    ("target", "changes"),
    [
        ((7, 8), {}), ((12, 12), {}), ((8, 8), {"mode": "linear"}), ((8, 8), {"taps": 1, "pad": 0}), ((8, 8), {"stride": 2}),
        ((8, 8), {"pad": 0}), ((8, 8), {"told": {"nearest_mode": "ceil"}}), *(((8, 8), {"kind": kind}) for kind in OTHERS),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_repetition_of_pixels_stays(
    target: tuple[int, int], changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Odd sizes above all: a U-Net's are cut to what its other half has."""
    monkeypatch.setattr(openvino_graph, "LARGE", 1)
    made = upsampling((4, 4), target, **changes)
    assert for_tiles(made) == (0, 0)
    assert "Interpolate" in kinds(made)


# -- attention ---------------------------------------------------------------------------------------------------------


def attention(features: int, tokens: int = 24, keys: int = 24, causal: bool = False, mask: Any = None) -> Any:
    heads = 3
    x = opset.parameter([2, tokens, heads * features], np.float32, name="x")
    other = x if keys == tokens else opset.parameter([2, keys, heads * features], np.float32, name="other")
    generator = np.random.default_rng(2)

    def project(of: Any) -> Any:
        kernel = (generator.standard_normal((heads * features, heads * features)) / 8).astype(np.float32)
        made = opset.reshape(opset.matmul(of, kernel, False, True), np.array([0, 0, heads, features]), True)
        return opset.transpose(made, np.array([0, 2, 1, 3]))

    q, k, v = project(x), project(other), project(other)
    y = opset.scaled_dot_product_attention(q, k, v, mask, causal=causal)
    return openvino.Model([y], [x] if other is x else [x, other], "attention")


@pytest.mark.parametrize("features", [5, 40, 80])
def test_heads_are_padded(features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_graph, "LONG", 24)
    made = agree(lambda: attention(features, mask=np.float32(0)), for_tiles, weights(2, 24, 3 * features))
    assert kinds(made).count("Pad") == 2


def test_attention_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole tiles already; short; other keys than queries; causal; with a mask."""
    assert for_tiles(attention(40)) == (0, 0)
    monkeypatch.setattr(openvino_graph, "LONG", 16)
    assert for_tiles(attention(40)) == (0, 1)
    for made in (
        attention(32), attention(64), attention(40, keys=17), attention(40, causal=True),
        attention(40, mask=np.full((1, 1, 24, 24), -1, np.float32)),
    ):  # fmt: skip
        assert for_tiles(made) == (0, 0)


# -- gated linear units ------------------------------------------------------------------------------------------------


def gated(axis: int, transposed: bool, half: bool, kind: str = "", shape: Any = (2, 6, 8)) -> Any:
    x = opset.parameter(openvino.PartialShape(shape), np.float32, name="x")
    generator = np.random.default_rng(3)
    kernel = generator.standard_normal((20, 8) if transposed else (8, 20)).astype(np.float32)
    bias = generator.standard_normal(20).astype(np.float32)
    wide = opset.add(opset.matmul(x, stored(kernel, half, kind), False, transposed), stored(bias, half))
    value, gate = opset.split(wide, axis, 2).outputs()
    return openvino.Model([opset.multiply(value, opset.gelu(gate, "erf"))], [x], "gated")


@pytest.mark.parametrize("half", [False, True], ids=["f32", "f16"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("axis", [-1, 2])
def test_splits(axis: int, transposed: bool, half: bool) -> None:
    made = agree(lambda: gated(axis, transposed, half), without_splits, weights(2, 6, 8))
    assert "Split" not in kinds(made)
    assert kinds(made).count("MatMul") == 2


def test_a_split_of_tokens_stays() -> None:
    made = gated(1, True, False)
    assert without_splits(made) == 0


@pytest.mark.parametrize("kind", OTHERS)
def test_a_split_of_others_weights_stays(kind: str) -> None:
    assert without_splits(gated(-1, True, False, kind)) == 0


def test_a_split_of_unknown_sizes() -> None:
    """Of an unknown number of dimensions it stays; where only the sizes are unknown, it goes."""
    assert without_splits(gated(-1, True, False, shape="...")) == 0
    assert without_splits(gated(-1, True, False, shape="?,?,8")) == 1


def test_networks_of_float16_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and what they are multiplied with: others' IR may be all in float16."""
    monkeypatch.setattr(openvino_graph, "LARGE", 1)
    x = opset.parameter([2, 3, 4, 4], np.float16, name="x")
    told = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    larger = opset.interpolate(x, np.array([8, 8]), "nearest", "sizes", axes=np.array([2, 3]), **told)
    y = opset.convolution(larger, weights(5, 3, 3, 3).astype(np.float16), [1, 1], [1, 1], [1, 1], [1, 1])
    assert for_tiles(openvino.Model([y], [x], "upsampling")) == (0, 0)
    wide = opset.add(opset.matmul(x, weights(20, 4).astype(np.float16), False, True), weights(20).astype(np.float16))
    assert without_splits(openvino.Model(opset.split(wide, -1, 2).outputs(), [x], "gated")) == 0


# -- whole networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (9, 17)])
def test_a_unet(size: tuple[int, int], models: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every self-attention padded and every split gone; upsampling rewritten where it doubles."""
    monkeypatch.setattr(openvino_graph, "LONG", 1)
    monkeypatch.setattr(openvino_graph, "LARGE", 1)
    entry = models("tiny-sd").bundle / "unet" / "model.onnx"

    def make() -> Any:
        model = CORE.read_model(entry)
        shapes = {"sample": [2, 4, *size], "timestep": [1], "encoder_hidden_states": [2, 77, 32]}
        model.reshape({port.any_name: shapes[port.any_name] for port in model.inputs})
        return model

    counts: list[Any] = []

    def rewrite(model: Any) -> None:
        counts.append((without_splits(model), for_tiles(model)))

    inputs = [weights(2, 4, *size), np.array([500], np.float32), weights(2, 77, 32)]
    made = agree(make, rewrite, *inputs)
    splits, (larger, padded) = counts[0]
    assert splits == padded > 0
    assert "Split" not in kinds(made)
    assert larger == (3 if size == (8, 8) else 0)
