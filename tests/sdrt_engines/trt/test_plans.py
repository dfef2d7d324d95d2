"""Plans, built for real by TensorRT-RTX, which needs no GPU for that."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdrt import BuildError, EngineUnavailable, InputError
from sdrt.bundle import SHIPPED, DimRange
from sdrt.engine import BuildOptions, find_engine
from sdrt_engines import cuda
from sdrt_engines.build import build
from sdrt_engines.signals import ENDING, Held
from sdrt_engines.trt import plan, targets
from sdrt_engines.trt.library import TENSORRT, TENSORRT_RTX
from tests.nvidia import Cuda

trt = pytest.importorskip("tensorrt_rtx")

DEMO = SHIPPED / "demo"
TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is one: what is tested is what is built without."""
    monkeypatch.setattr(cuda, "_runtime", lambda: Cuda([]))


def graph(folder: Path, change: Callable[[Any], None] = lambda model: None, dtype: str = "FLOAT16") -> Path:
    """A convolution in ``dtype`` between casts, and a sum."""
    from onnx import TensorProto, helper

    kind = getattr(TensorProto, dtype)
    weight = helper.make_tensor("w", kind, (8, 4, 3, 3), np.ones(288).tolist())
    nodes = [
        helper.make_node("Cast", ["x"], ["xh"], "in", to=kind),
        helper.make_node("Conv", ["xh", "w"], ["c"], "the_conv", pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("Add", ["r", "c"], ["s"], "the_sum"),
        helper.make_node("Cast", ["s"], ["y"], "out", to=TensorProto.FLOAT),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ("B", c, "H", "W")) for n, c in (("x", 4), ("y", 8)))
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], [weight]), opset_imports=[helper.make_opsetid("", 23)], ir_version=11
    )
    change(model)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


SIZES = {"x": ((1, 4, 16, 16), (2, 4, 16, 16), (2, 4, 32, 32))}


def built(path: Path, target: str = "sm86", sizes: Any = (SIZES,), **recipe: Any) -> memoryview:
    return plan.build(TENSORRT_RTX, path, plan.Recipe(target, **recipe), sizes, "net")[0]


@pytest.mark.parametrize(
    ("target", "precision"),
    [
        *((target, "fp16") for target in TARGETS),
        ("sm75", "fp32"),
        ("sm80", "fp32"),
        ("sm120", "bf16"),
        ("sm120", "fp8"),
    ],
)
def test_the_demo_model_for_every_target(target: str, precision: Any, tmp_path: Path) -> None:
    """All components, one plan each. TensorRT has no float32 products for Turing, and says so."""
    shapes = ((64, 64), (128, 64)) if target == "sm89" else ((64, 64),)
    options = BuildOptions(precision=precision, shapes=shapes, batch=2, target=target)
    if (target, precision) == ("sm75", "fp32"):
        with pytest.raises(BuildError, match="FP32 GEMM is not supported") as caught:
            build(DEMO, tmp_path / "out", "tensorrt-rtx", options)
        assert "--precision fp16" in caught.value.fix
        assert not (tmp_path / "out").exists()
        return
    made = build(DEMO, tmp_path / "out", "tensorrt-rtx", options)
    assert set(made.manifest.components) == {"text_encoder", "unet", "vae_encoder", "vae_decoder"}
    for name, component in made.manifest.components.items():
        artifact = component.artifact
        assert artifact.engine == "tensorrt-rtx"
        assert artifact.target == target
        assert [file.path for file in artifact.files] == [f"{name}/model.plan"]
        assert artifact.facts["version"] == trt.__version__
        assert artifact.facts["built_on"] is None
        assert artifact.parity == ()  # nothing here could run it
        assert artifact.facts["graph_parity"]
        for figure in artifact.facts["graph_parity"]:
            assert (
                figure["psnr"] is None or figure["psnr"] > {"fp32": 95, "fp16": 50, "bf16": 38, "fp8": 25}[precision]
            ), figure
    unet = made.component("unet").artifact.profiles
    assert [(p["W"].opt, p["B"].min, p["B"].max) for p in unet] == [(width, 1, 4) for width, _ in shapes]


@pytest.mark.parametrize("kind", ["tiny-sd", "sd2", "sdxl"])
def test_tiny_models(kind: str, models: Any, tmp_path: Path) -> None:
    precision = {"text_encoder": "fp16", "unet": "fp16", "vae_encoder": "fp16", "vae_decoder": "fp16"}
    options = BuildOptions(precision=precision, shapes=((64, 64),), target="sm80,sm120")  # type: ignore[arg-type]
    made = build(models(kind).bundle, tmp_path / "out", "tensorrt-rtx", options)
    for name, component in made.manifest.components.items():
        assert component.artifact.target == "sm80,sm120"
        figures = [f["psnr"] for f in component.artifact.facts["graph_parity"] if f["psnr"] is not None]
        assert all(figure > 45 for figure in figures), (name, figures)


def test_float16_attention_of_odd_heads(models: Any, tmp_path: Path) -> None:
    """Heads of 10 numbers: an error inside of TensorRT-RTX 1.7, and a way around it."""
    source = models("sdxl").bundle
    with pytest.raises(BuildError, match=r"text_encoder_2: .*Myelin") as caught:
        build(source, tmp_path / "out", "tensorrt-rtx", BuildOptions(precision="fp16", shapes=((64, 64),)))
    assert "text_encoder_2=fp32" in caught.value.fix


def test_too_little_workspace(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="within workspace limit") as caught:
        build(
            DEMO,
            tmp_path / "out",
            "tensorrt-rtx",
            BuildOptions(precision="fp16", shapes=((64, 64),), target="sm86", extra={"workspace": "1"}),
        )
    assert "larger -O workspace" in caught.value.fix


def test_a_plan_for_any_gpu_and_what_it_says_of_itself(tmp_path: Path) -> None:
    made = build(DEMO, tmp_path / "out", "tensorrt-rtx", BuildOptions(extra={"keep_graph": "true", "level": "1"}))
    unet = made.component("unet").artifact
    assert unet.target == "any"
    assert unet.facts["recipe"] == {
        "target": "any", "tf32": False, "strip": False, "refit": "no", "portable": False, "streaming": False,
        "level": 1, "workspace": 0,
    }  # fmt: skip
    assert [file.path for file in unet.files] == ["unet/model.plan", "unet/model.onnx", "unet/model.onnx.data"]
    space = made.manifest.latents
    assert {p["H"].opt for p in unet.profiles} == {space.default_height}


def test_nothing_runs_where_no_driver_is(cli: Any, tmp_path: Path) -> None:
    done = cli("build", DEMO, tmp_path / "out", "--engine", "tensorrt-rtx", "--target", "sm86", "--shape", "128x128")
    assert done.returncode == 0, done.stderr
    if "not checked" not in done.stderr:
        pytest.skip("there is a GPU here")
    for command in ("generate", "verify"):
        arguments = ["a red star", "-m", tmp_path / "out"] if command == "generate" else [tmp_path / "out"]
        ran = cli(command, *arguments)
        assert ran.returncode == 1  # no crash
        assert "there is no NVIDIA driver here" in ran.stderr
    shown = cli("doctor", "--json", "-")
    found = {engine["name"]: engine for engine in json.loads(shown.stdout)["engines"]}
    assert not found["tensorrt-rtx"]["devices"]
    assert "--target" in found["tensorrt-rtx"]["problem"]


def test_types_that_do_not_fit_each_other_name_the_node(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    def mix(model: Any) -> None:
        model.graph.node.insert(3, helper.make_node("Cast", ["r"], ["r32"], "widen", to=TensorProto.FLOAT))
        model.graph.node[4].input[0] = "r32"

    with pytest.raises(BuildError, match=r"net: .*Add 'the_sum'.*Float and Half") as caught:
        built(graph(tmp_path, mix))
    assert "checkMacros" not in caught.value.message  # no word of the missing driver


def test_an_operator_that_it_does_not_have(tmp_path: Path) -> None:
    def rename(model: Any) -> None:
        model.graph.node[2].op_type = "NoSuchOp"

    with pytest.raises(BuildError, match=r"NoSuchOp 'relu': .*Plugin not found"):
        built(graph(tmp_path, rename))


def test_a_damaged_graph(tmp_path: Path) -> None:
    path = graph(tmp_path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(BuildError, match="Failed to parse the ONNX model"):
        built(path)


def test_sizes_in_no_order(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="MIN<=OPT<=MAX"):
        built(graph(tmp_path), sizes=[{"x": ((2, 4, 16, 16), (1, 4, 16, 16), (2, 4, 32, 32))}])
    with pytest.raises(BuildError, match="no optimization profile"):
        built(graph(tmp_path), sizes=[])


def test_bfloat16_is_not_for_turing(tmp_path: Path) -> None:
    assert built(graph(tmp_path, dtype="BFLOAT16"))
    with pytest.raises(BuildError, match="sm75") as caught:
        built(graph(tmp_path, dtype="BFLOAT16"), "sm75")
    assert "sm80" in caught.value.fix


def test_float8_is_for_ada_and_later(tmp_path: Path) -> None:
    options = BuildOptions(precision={"text_encoder": "fp8"}, target="sm86,sm89", shapes=((64, 64),))
    with pytest.raises(BuildError, match=r"text_encoder: .*fp8") as caught:
        build(DEMO, tmp_path / "out", "tensorrt-rtx", options)
    assert "--target sm89" in caught.value.fix


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_what_eight_bits_leave_is_float16(precision: Any, tmp_path: Path) -> None:
    """Between quantised operators nothing goes through float32 that need not, or TensorRT would not fuse it."""
    from sdrt.bundle import load
    from sdrt_engines.build import _recorder
    from sdrt_engines.graph import load_graph
    from sdrt_engines.trt.building import _write_graph
    from sdrt_engines.trt.graph_check import check_graph

    source = load(DEMO)
    options = BuildOptions(precision=precision, shapes=((64, 64),))
    recorder = _recorder(source, options, {precision}, TENSORRT.measures)
    options = replace(options, samples=lambda: recorder.samples("unet", lambda *_: None))
    (tmp_path / "stored").mkdir()
    facts = _write_graph(source, source.component("unet"), options, tmp_path / "stored", tmp_path)
    assert facts["quantized"]["Conv"] > 20
    assert facts["quantized"]["MatMul"] > 30
    model = load_graph(tmp_path / "model.onnx")
    makers = {name: node for node in model.graph.node for name in node.output}
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    eight = {"fp8": 17, "int8": 3}[precision]
    for node in model.graph.node:
        if node.op_type in ("Conv", "MatMul") and node.input[1] in makers:
            weight = makers[node.input[1]]
            if weight.op_type == "DequantizeLinear":
                assert kinds[weight.input[0]] == eight
                assert kinds[weight.input[1]] == 10  # its scale, and so what it makes, is float16
                assert makers[node.input[0]].op_type == "DequantizeLinear"
    figures = [figure["psnr"] for figure in check_graph(source, "unet", precision, tmp_path, "model.onnx")]
    assert min(figures) > {"fp8": 28, "int8": 24}[precision], figures


@pytest.mark.parametrize("recipe", [{"refit": "any"}, {"refit": "same"}, {"strip": True}, {"portable": True}])
def test_what_takes_a_gpu_or_another_library_is_an_error(recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="TensorRT-RTX"):
        built(graph(tmp_path), **recipe)


@pytest.mark.parametrize("recipe", [{"streaming": True}, {"tf32": True}, {"workspace": 64}, {"level": 5}], ids=str)
def test_what_takes_no_gpu(recipe: dict[str, Any], tmp_path: Path) -> None:
    assert built(graph(tmp_path), **recipe)


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_waits_for_the_library(number: signal.Signals, tmp_path: Path) -> None:
    """What a handler raises in a call back from the library would be lost there, and the build would go on."""
    told: list[float] = []

    def report(fraction: float) -> None:
        told.append(fraction)
        signal.raise_signal(number)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    def caught_twice() -> None:
        with Held():
            signal.raise_signal(number)
            signal.raise_signal(number)
            told.append(1.0)

    before = signal.signal(number, stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            caught_twice()
        assert told == [1.0]
        assert signal.getsignal(number) is stop
        told.clear()
        with pytest.raises(KeyboardInterrupt):
            plan.build(TENSORRT_RTX, graph(tmp_path), plan.Recipe("sm86"), [SIZES], "net", report=report)
        assert len(told) == 1, "the build went on"
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, before)


def test_the_signals_that_end_the_command_line_wait() -> None:
    """All that it has handlers for, asked of a process of its own."""
    asked = (
        "import signal, sdrt.cli as c\n"
        "c.cli.main = lambda **_: print(*[int(n) for n in signal.valid_signals() if callable(signal.getsignal(n))])\n"
        "c.main()"
    )
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert {int(number) for number in done.stdout.split()} == set(ENDING)


def test_progress_rises_and_an_interruption_stops_the_build(tmp_path: Path) -> None:
    told: list[float] = []
    plan.build(TENSORRT_RTX, graph(tmp_path), plan.Recipe("sm86"), [SIZES], "net", report=told.append)
    assert told == sorted(told)
    assert told
    assert 0 < told[0] <= told[-1] <= 1

    def stop(_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan.build(TENSORRT_RTX, graph(tmp_path), plan.Recipe("sm86"), [SIZES], "net", report=stop)


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"target": "sm90"}, BuildError, "no target 'sm90'; it has any, current, sm75"),
    ({"target": "ampere+"}, BuildError, "no target"),
    ({"target": "sm86,gpu"}, BuildError, "no target"),
    ({"target": "current"}, BuildError, "needs a GPU for --target current"),
    ({"extra": {"strip": "true"}}, BuildError, "needs a GPU for -O strip=true"),
    ({"extra": {"refit": "any"}}, BuildError, "needs a GPU for -O refit"),
    ({"extra": {"refit": "maybe"}}, InputError, "expected no, same, any"),
    ({"extra": {"portable": "true"}}, BuildError, "no use for -O portable"),
    ({"extra": {"timings": "x"}}, BuildError, "no use for -O timings"),
    ({"extra": {"workspace": "-1"}}, InputError, "expected 0 to 8388608 MiB, got -1"),
    ({"extra": {"level": "9"}}, InputError, "expected 0, 1"),
    ({"extra": {"speed": "9"}}, InputError, "no option 'speed'; known options: tf32"),
    ({"precision": "int8"}, BuildError, "builds fp32, fp16"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_what_is_refused(options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        build(DEMO, tmp_path / "out", "tensorrt-rtx", BuildOptions(**{"target": "sm86", **options}))
    assert not (tmp_path / "out").exists()


def test_tensorrt_itself_wants_its_library_and_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdrt_engines.trt import library

    monkeypatch.setattr(library, "_loaded", lambda of: trt)
    with pytest.raises(EngineUnavailable, match=r"times kernels on the GPU .*no NVIDIA driver") as caught:
        build(DEMO, tmp_path / "out", "tensorrt", BuildOptions())
    assert "tensorrt-rtx" in caught.value.fix
    with pytest.raises(EngineUnavailable):
        find_engine("tensorrt").devices()


@pytest.mark.parametrize(
    ("text", "target"),
    [(None, "any"), ("ANY", "any"), ("sm120, sm86,sm86", "sm86,sm120"), ("current", "current"), ("SM75", "sm75")],
)
def test_targets(text: str | None, target: str) -> None:
    assert targets.parsed(TENSORRT_RTX, text) == target


def test_targets_of_tensorrt() -> None:
    assert targets.parsed(TENSORRT, None) == "current"
    assert targets.parsed(TENSORRT, "sm90") == "sm90"
    assert targets.parsed(TENSORRT, "ampere+") == "ampere+"
    for wrong in ("any", "sm80,sm90", "hopper", "sm"):
        with pytest.raises(BuildError, match="no target"):
            targets.parsed(TENSORRT, wrong)


@pytest.mark.parametrize(
    ("target", "gpu", "expected"),
    [
        ("any", "sm86", True), ("any", "sm75", False), ("any", "sm90", True), ("sm86", "sm89", False),
        ("sm80,sm89", "sm89", True), ("sm8", "sm89", False), ("ampere+", "sm90", True), ("ampere+", "sm75", False),
    ],
)  # fmt: skip
def test_what_a_target_covers(target: str, gpu: str, expected: bool) -> None:
    named = cuda.Gpu(0, "a GPU", gpu, 0)
    assert targets.covers(target, named, "fp16") is expected
    assert targets.covers(target, named, "fp8") is (expected and int(gpu[2:]) >= 89)
    assert targets.surely_covers(target, named, "fp16") is (expected and (target, gpu) != ("any", "sm90"))


PROFILES: list[Mapping[str, DimRange]] = [
    {"B": DimRange(1, 2, 2), "H": DimRange(512, 512, 512)},
    {"B": DimRange(3, 8, 8), "H": DimRange(512, 512, 512)},
    {"B": DimRange(1, 2, 8), "H": DimRange(512, 768, 1024)},
    {"B": DimRange(1, 1, 1), "H": DimRange(512, 512, 512)},
]


@pytest.mark.parametrize(
    ("sizes", "index"),
    [
        ({"B": 2, "H": 512}, 0), ({"B": 1, "H": 512}, 3), ({"B": 8, "H": 512}, 1), ({"B": 4, "H": 512}, 1),
        ({"B": 2, "H": 768}, 2), ({"B": 3, "H": 700}, 2), ({"B": 6, "H": 512}, 1), ({"B": 9, "H": 512}, -1), ({"B": 1, "H": 256}, -1),
    ],
)  # fmt: skip
def test_the_nearest_profile(sizes: dict[str, int], index: int) -> None:
    """4 rows of 512: what was tuned for twice as many there, not what was for half as many at 768. Ratios decide."""
    assert plan.nearest(PROFILES, sizes) == index


def test_a_profile_for_a_single_picture_where_kernels_are_chosen_while_building(bundle: Path) -> None:
    from sdrt.bundle import load
    from sdrt_engines.trt.building import sized

    source, options = load(bundle), BuildOptions(shapes=((64, 64), (128, 64), (64, 64)), batch=4)

    def batches(library: Any, name: str) -> list[str]:
        return [f"{p.get('W', '')} {p['B']}" for p in sized(library, source, source.component(name), options)]

    assert batches(TENSORRT, "unet") == ["64 1..2", "64 3..8", "128 1..2", "128 3..8"]
    assert batches(TENSORRT, "vae_decoder") == ["64 1", "64 2..4", "128 1", "128 2..4"]
    assert batches(TENSORRT, "text_encoder") == [" 1..2", " 3..8"]
    assert batches(TENSORRT_RTX, "unet") == ["64 1..8", "128 1..8"]
    assert batches(TENSORRT_RTX, "text_encoder") == [" 1..8"]


def test_shapes_of_a_profile(bundle: Path) -> None:
    from sdrt.bundle import load

    component = load(bundle).component("unet")
    profile = {"B": DimRange(1, 2, 4), "T": DimRange(77, 77, 154), "H": DimRange(64, 72, 72), "W": DimRange(64, 64, 64)}
    assert plan.ranges(component, profile)["sample"] == ((1, 4, 8, 8), (2, 4, 9, 8), (4, 4, 9, 8))
    assert plan.ranges(component, profile)["encoder_hidden_states"][2][:2] == (4, 154)
    assert "timestep" not in plan.ranges(component, profile)
