"""Packages that coremltools made of torch's modules: the verifier reads and evaluates what is not ours, too."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdrt_engines.graph.external import Weights
from sdrt_engines.mil.evaluate import evaluate
from sdrt_engines.mil.package import Function, read
from sdrt_engines.mil.translate import Translation, function
from tests.mil import saved, untouched

coremltools = pytest.importorskip("coremltools")
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

Array = Any
FLOORS = {"FLOAT32": 1e-5, "FLOAT16": 5e-3}
"""Relative L2 against torch's float32."""


def distance(ours: Array, theirs: Array) -> float:
    return float(np.linalg.norm(ours.astype(np.float64) - theirs) / np.linalg.norm(theirs))


class Called(torch.nn.Module):  # type: ignore[misc]
    """A module with the arguments and results that a trace wants: tensors by position."""

    def __init__(self, module: Any, call: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, *inputs: Any) -> Any:
        return self.call(self.module, *inputs)


VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4,
    "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
}  # fmt: skip
UNET = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (16, 32), "layers_per_block": 1, "cross_attention_dim": 32, "attention_head_dim": 4, "norm_num_groups": 8,
}  # fmt: skip
TEXT = {
    "vocab_size": 1000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip


def component(name: str) -> tuple[Any, dict[str, Any]]:
    """(module, example inputs by name). Small, as coremltools' converter takes its time for each operation."""
    torch.manual_seed(0)
    if name == "unet":
        made = Called(diffusers.UNet2DConditionModel(**UNET), lambda m, *x: m(*x, return_dict=False)[0])
        inputs = {
            "sample": torch.randn(2, 4, 8, 8),
            "timestep": torch.full((2,), 500.0),
            "encoder_hidden_states": torch.randn(2, 9, 32),
        }
    elif name == "text_encoder":
        made = Called(
            transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)),
            lambda m, x: tuple(m(input_ids=x, return_dict=False)[:2]),
        )
        inputs = {"input_ids": torch.randint(3, 999, (1, 77), dtype=torch.int32)}
    elif name == "vae_decoder":
        made = Called(diffusers.AutoencoderKL(**VAE), lambda m, z: m.decode(z, return_dict=False)[0])
        inputs = {"z": torch.randn(1, 4, 8, 8)}
    else:
        made = Called(diffusers.AutoencoderKL(**VAE), lambda m, x: m.quant_conv(m.encoder(x)))
        inputs = {"x": torch.randn(1, 3, 16, 16)}
    with torch.no_grad():  # freshly made norms are 1 and 0, which hides a lost weight
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape) if parameter.ndim == 1 else 0)
    return made.eval(), inputs


def jitted(module: Any, inputs: dict[str, Any]) -> tuple[Any, list[Array]]:
    """(the traced module, torch's outputs)."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: what depends on sizes becomes a constant, which is meant
        made = module(*inputs.values())
        trace = torch.jit.trace(module, tuple(inputs.values()), check_trace=False)
    return trace, [one.numpy() for one in (made if isinstance(made, tuple) else (made,))]


@functools.cache
def traced(name: str) -> tuple[Any, dict[str, Any], list[Array]]:
    """(traced module, inputs, torch's outputs)."""
    module, inputs = component(name)
    trace, made = jitted(module, inputs)
    return trace, inputs, made


def converted(trace: Any, inputs: dict[str, Any], folder: Path, precision: str, target: str) -> Function:
    kinds = {torch.int32: np.int32, torch.float32: np.float32}
    told = [coremltools.TensorType(n, x.shape, dtype=kinds[x.dtype]) for n, x in inputs.items()]
    held = read(saved(trace, folder, target=target, precision=precision, inputs=told))
    return held.functions[held.default]


def evaluated(function: Function, inputs: dict[str, Any]) -> list[Array]:
    """(coremltools keeps the order of inputs, and not always their names.)"""
    feeds = {told.name: x.numpy() for told, x in zip(function.inputs, inputs.values(), strict=True)}
    return list(evaluate(function, feeds).values())


def count(function: Function, kind: str) -> int:
    return sum(op.kind == kind for op in function.operations)


@pytest.mark.parametrize(("name", "target", "precision"), [
    (name, target, precision)
    for name in ("unet", "vae_decoder", "vae_encoder", "text_encoder")
    for target in ("iOS17", "iOS18")
    for precision in FLOORS
    if (name, target, precision) != ("unet", "iOS17", "FLOAT16")  # the slowest: what is in it is in the others
])  # fmt: skip
def test_against_torch(name: str, target: str, precision: str, tmp_path: Path) -> None:
    trace, inputs, expected = traced(name)
    function = converted(trace, inputs, tmp_path / "x.mlpackage", precision, target)
    # The text encoder names its scale, which Core ML's operator does not have.
    assert (count(function, "scaled_dot_product_attention") > 0) == (target == "iOS18" and name != "text_encoder")
    for ours, theirs in zip(evaluated(function, inputs), expected, strict=True):
        assert distance(ours, theirs) <= FLOORS[precision]


def test_what_float32_is_off(tmp_path: Path) -> None:
    """Most of it is coremltools': scale and shift become a batch_norm of variance 1 and epsilon 1e-5, so that each
    group norm is 5e-6 smaller than torch's. Without these epsilons what is left is rounding."""
    trace, inputs, (expected,) = traced("vae_decoder")
    function = converted(trace, inputs, tmp_path / "x.mlpackage", "FLOAT32", "iOS17")
    epsilons = {name for op in function.operations if op.kind == "batch_norm" for name in op.inputs["epsilon"]}
    without = tuple(
        replace(op, attributes={"val": np.float32(0)}) if op.outputs[0].name in epsilons else op
        for op in function.operations
    )
    off = [distance(evaluated(one, inputs)[0], expected) for one in (function, replace(function, operations=without))]
    assert off[1] < 2e-6 < off[0]


# -- float16 and squares -----------------------------------------------------------------------------------------------

DEVIATION = 400.0
"""Its square is no float16."""


def loud(dtype: Any = np.float32) -> Array:
    x = np.random.default_rng(1).standard_normal((2, 8, 6, 5)) * DEVIATION
    return x.astype(np.float16).astype(dtype)


def norm() -> Any:
    torch.manual_seed(0)
    made = torch.nn.GroupNorm(4, 8)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn(8))
    return made.eval()


def test_squares_overflow(tmp_path: Path) -> None:
    """As torch's group norm is converted, in float16: it divides by infinity, and only the shift is left."""
    x = torch.tensor(loud())
    trace, (expected,) = jitted(norm(), {"x": x})
    made: dict[str, Function] = {}
    for precision in FLOORS:
        made[precision] = converted(trace, {"x": x}, tmp_path / f"{precision}.mlpackage", precision, "iOS17")
    assert distance(evaluated(made["FLOAT32"], {"x": x})[0], expected) <= FLOORS["FLOAT32"]
    seen: dict[str, Array] = {}
    feeds = {told.name: x.numpy() for told in made["FLOAT16"].inputs}
    (ours,) = evaluate(made["FLOAT16"], feeds, lambda op, given, arrays: seen.setdefault(op.kind, arrays[0])).values()
    assert np.isinf(seen["square"]).any()
    assert np.isfinite(ours).all(), "so that looking for infinities at the end finds nothing"
    assert distance(ours, expected) > 0.5


@pytest.mark.parametrize("island", [False, True], ids=["float16", "float32 island"])
def test_ours_do_not_overflow(island: bool, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    told, kind = norm(), onnx.TensorProto.FLOAT if island else onnx.TensorProto.FLOAT16
    dtype = np.float32 if island else np.float16
    weights = [
        onnx.numpy_helper.from_array(value.detach().numpy().astype(dtype), name)
        for name, value in told.named_parameters()
    ]
    nodes = [
        onnx.helper.make_node(
            "GroupNormalization", ["wide", "weight", "bias"], ["normal"], num_groups=4, epsilon=told.eps
        )
    ]
    nodes.insert(0, onnx.helper.make_node("Cast", ["x"], ["wide"], to=kind))
    nodes.append(onnx.helper.make_node("Cast", ["normal"], ["y"], to=onnx.TensorProto.FLOAT16))
    ports = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, (2, 8, 6, 5)) for name in "xy"]
    graph = onnx.helper.make_model(onnx.helper.make_graph(nodes, "norm", ports[:1], ports[1:], weights))

    def body(given: Any) -> dict[str, Any]:
        translation = Translation(graph.graph, Weights(graph, tmp_path), 21, values=dict(given))
        translation.run()
        return {"y": translation["y"]}

    program = coremltools.converters.mil.mil.Program()
    program.add_function("main", function({"x": ((2, 8, 6, 5), "fp16")}, body, coremltools.target.iOS17))
    held = read(untouched(program, tmp_path / "x.mlpackage")).functions["main"]
    (ours,) = evaluate(held, {"x": loud(np.float16)}).values()
    with torch.no_grad():
        assert distance(ours, told(torch.tensor(loud())).numpy()) <= 1e-3
