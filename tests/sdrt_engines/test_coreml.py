"""Core ML packages: built here, evaluated by the verifier, and held against what Apple's Swift package expects.

Nothing here needs a Mac; what runs on one is seen through a stand-in for coremltools' ``MLModel``.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from sdrt import BuildError, BundleError, DeviceError, EngineUnavailable, InputError, NumericsError, Pipeline, demo
from sdrt import bundle as bundles
from sdrt.engine import BuildOptions, open_session
from sdrt.metrics import psnr
from sdrt.verify import reference_cases
from sdrt_engines import coreml as engine
from sdrt_engines.build import build
from sdrt_engines.graph.external import Weights
from sdrt_engines.mil import package, split_einsum, translate
from sdrt_engines.mil.program import cuts
from tests.conftest import Cli, Model
from tests.pair import Pair, load_diffusers

coremltools = pytest.importorskip("coremltools")

PROMPTS, NEGATIVE = ["a red star over a lighthouse!", "two cats, it's raining"], ["blurry", "dark"]
VERIFIER = "verifier"


@pytest.fixture(scope="module")
def built(models: Callable[[str], Model], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``built("sd2", precision="fp16", …)``: that tiny model (or "demo"), built once for Core ML."""
    root = tmp_path_factory.mktemp("coreml")
    made: dict[str, Path] = {}

    def make(name: str = "tiny-sd", **options: Any) -> Path:
        key = f"{name}{sorted(options.items())}"
        if key not in made:
            out = root / str(len(made))
            build("demo" if name == "demo" else models(name).bundle, out, "coreml", BuildOptions(**options))
            made[key] = out
        return made[key]

    return make


def relative(expected: np.ndarray, got: np.ndarray) -> float:
    return float(np.linalg.norm(expected.astype(np.float64) - got) / np.linalg.norm(expected))


def packages(path: Path) -> dict[str, package.Package]:
    return {folder.name: package.read(folder) for folder in sorted(path.glob("*.mlpackage"))}


# -- components --------------------------------------------------------------------------------------------------------

SMALL = {"shapes": ((64, 64), (136, 72)), "target": "ios18"}
STYLES: list[dict[str, Any]] = [
    {}, {"extra": {"attention": "split_einsum"}}, {"extra": {"attention": "fused"}}, {"extra": {"chunk_unet": "true"}},
    {"extra": {"attention": "split_einsum", "chunk_unet": "true"}},
]  # fmt: skip


@pytest.mark.parametrize("style", STYLES, ids=str)
@pytest.mark.parametrize(("precision", "bar"), [("fp32", 1e-5), ("fp16", 5e-3)])
@pytest.mark.parametrize("name", ["tiny-sd", "sd2", "sdxl"])
def test_components_compute_what_torch_computes(
    name: str, precision: str, bar: float, style: dict[str, Any], built: Callable[..., Path]
) -> None:
    """Saved packages against torch's float32, two sizes of one package, batches 1 and 2. Norms are random too."""
    if name != "tiny-sd" and style not in (STYLES[0], STYLES[-1]):
        pytest.skip("what the options do is seen in tiny-sd")
    held = bundles.load(built(name, precision=precision, **SMALL, **style))
    seen = 0
    for component, told in held.manifest.components.items():
        session = open_session(held, component, device=VERIFIER)
        for case, (inputs, outputs) in reference_cases(held, component).items():
            if "T154" in case or "T16" in case:  # another length than a text's
                continue
            if component == "unet" and "H72" in case:
                continue
            got = session.run(**inputs)
            assert got.keys() == outputs.keys() == {spec.name for spec in told.outputs}
            for output, reference in outputs.items():
                assert relative(reference, got[output]) <= bar, f"{component} {case} {output}"
                seen += 1
        session.close()
    assert seen >= 20


def test_any_batch_is_rows_of_the_packages_own(built: Callable[..., Path], bundle: Path) -> None:
    """The denoiser's package has a batch of 2: 1 is filled up, 5 are three calls."""
    held = bundles.load(built(precision="fp32", shapes=((64, 64),)))
    assert held.component("unet").artifact.facts["batch"] == 2
    generator = np.random.default_rng(0)
    inputs = {
        "sample": generator.standard_normal((5, 4, 8, 8)).astype(np.float32), "timestep": np.array([801.25], np.float32),
        "encoder_hidden_states": generator.standard_normal((5, 77, 32)).astype(np.float32),
    }  # fmt: skip
    expected = open_session(bundles.load(bundle), "unet").run(**inputs)["out_sample"]
    session = open_session(held, "unet", device=VERIFIER)
    np.testing.assert_allclose(session.run(**inputs)["out_sample"], expected, rtol=0, atol=2e-5)
    for rows in (slice(0, 1), slice(2, 5)):
        some = {name: array if name == "timestep" else array[rows] for name, array in inputs.items()}
        np.testing.assert_allclose(session.run(**some)["out_sample"], expected[rows], rtol=0, atol=2e-5)
    four = bundles.load(built(precision="fp32", shapes=((64, 64),), batch=2))
    assert four.component("unet").artifact.facts["batch"] == 4
    session = open_session(four, "unet", device=VERIFIER)
    np.testing.assert_allclose(session.run(**inputs)["out_sample"], expected, rtol=0, atol=2e-5)


def test_split_einsum_holds_tokens_channels_first(built: Callable[..., Path]) -> None:
    """From where a picture becomes tokens to where they become one again: only keys are transposed."""
    plain, split = (
        Counter(
            op.kind
            for op in packages(built("sd2", precision="fp16", **options))["Unet.mlpackage"].functions["main"].operations
        )
        for options in ({}, {"extra": {"attention": "split_einsum"}})
    )
    assert split["transpose"] == plain["softmax"] < plain["transpose"] / 3
    assert split["einsum"] == 2 * split["softmax"] > 2 * plain["softmax"]
    assert split["conv"] - plain["conv"] == plain["linear"] - split["linear"] > 20
    assert not split["matmul"]


# -- whole pictures ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["tiny-sd", "sd2-v"])
def pair(request: pytest.FixtureRequest, models: Callable[[str], Model], built: Callable[..., Path]) -> Iterator[Pair]:
    with Pipeline.from_pretrained(built(request.param, precision="fp16"), device=VERIFIER) as ours:
        yield Pair(ours, load_diffusers(models(request.param).checkpoint))


@pytest.mark.parametrize("scheduler", ["DDIM", "DPM++ 2M Karras"])
def test_pictures_equal_diffusers(pair: Pair, scheduler: str) -> None:
    """float16, 10 steps, on checkpoints that guidance 7.0 for 7.5 leaves below 60 dB. Karras' timesteps are fractions."""
    size = pair.ours.bundle.manifest.latents.default_width
    expected, got = pair.both(
        scheduler, 5, prompt=PROMPTS, negative_prompt=NEGATIVE, width=size, height=size, num_inference_steps=10
    )
    figure = psnr(expected, got, 1.0)
    print(f"{scheduler}: {figure:.1f} dB")
    assert figure >= 55  # the bar is 45


@pytest.mark.parametrize(("precision", "least"), [("fp16", 45), ("w8", 40), ("w6", 30), ("w4", 14)])
def test_trained_weights(precision: str, least: float, built: Callable[..., Path]) -> None:
    """The demo model, 10 steps; what it costs in pictures that are read right is in benchmarks/LOG.md."""
    arguments: dict[str, Any] = {"seed": 3, "output_type": "np", "num_inference_steps": 10}
    path = built("demo", precision=precision)
    with Pipeline.from_pretrained("demo") as ort, Pipeline.from_pretrained(path, device=VERIFIER) as ours:
        figure = psnr(ort(demo.PROMPTS[2], **arguments).images, ours(demo.PROMPTS[2], **arguments).images, 1.0)
    print(f"{precision}: {figure:.1f} dB")
    assert figure >= least


# -- size --------------------------------------------------------------------------------------------------------------


def weights_of(path: Path) -> int:
    return sum((folder / package.WEIGHTS).stat().st_size for folder in path.glob("*.mlpackage"))


def test_weights_of_several_sizes_are_stored_once(built: Callable[..., Path]) -> None:
    one = built("demo", precision="fp16", target="ios18")
    shapes = ((128, 128), (128, 192), (96, 128))
    three = built("demo", precision="fp16", target="ios18", shapes=shapes)
    assert weights_of(three) <= 1.001 * weights_of(one)
    held = packages(three)["Unet.mlpackage"]
    assert set(held.functions) == {f"size_{width}x{height}" for width, height in shapes}
    assert held.default == "size_128x128"
    # An app has one configuration for all packages: the text encoder has the same functions.
    assert all([*told.functions] == [*held.functions] for told in packages(three).values())
    measured = {parity.case for parity in bundles.load(three).component("unet").artifact.parity}
    assert {f"H{height}-W{width}" for width, height in shapes} == {case[3:].split("-T")[0] for case in measured}


def test_each_size_is_checked(built: Callable[..., Path]) -> None:
    """Also the one that the bundle has no reference vectors of, beside one that it has."""
    held = bundles.load(built("demo", precision="fp32", target="ios18", shapes=((64, 64), (128, 64))))
    for name in ("unet", "vae_decoder", "vae_encoder"):
        cases = {parity.case for parity in held.component(name).artifact.parity}
        assert any("H64-W128" in case for case in cases), cases
        assert any("W64" in case for case in cases), cases
        assert all(any(case in known for known in reference_cases(held, name)) for case in cases)


def test_palettized_packages_are_small(built: Callable[..., Path]) -> None:
    whole, six, four = (weights_of(built("demo", precision=precision)) for precision in ("fp16", "w6", "w4"))
    assert six <= 0.42 * whole
    assert four <= 0.30 * whole
    facts = bundles.load(built("demo", precision="w6")).component("unet").artifact.facts
    assert facts["bits"] == 6
    assert facts["worst_weight"]["relative_error"] < 0.05


# -- what Apple's Swift package expects --------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("name", ["tiny-sd", "sd2"])
def test_the_contract(name: str, half: bool, built: Callable[..., Path]) -> None:
    """docs/apple.md's table, from the saved packages."""
    path = built(name, precision="fp16" if half else "fp32")
    space = bundles.load(path).manifest.latents
    picture, side = space.default_width, space.default_width // space.downscale
    float_ = "f16" if half else "f32"
    expected = {
        "TextEncoder": ({"input_ids": ("f32", (1, 77))}, {"last_hidden_state": ("f32", (1, 77, 32)), "pooled_outputs": ("f32", (1, 32))}),
        "Unet": (
            {"sample": (float_, (2, 4, side, side)), "timestep": ("f32", (2,)), "encoder_hidden_states": (float_, (2, 32, 1, 77))},
            {"noise_pred": ("f32", (2, 4, side, side))},
        ),
        "VAEDecoder": ({"z": (float_, (1, 4, side, side))}, {"image": ("f32", (1, 3, picture, picture))}),
        "VAEEncoder": ({"x": (float_, (1, 3, picture, picture))}, {"latent": ("f32", (1, 8, side, side))}),
    }  # fmt: skip
    found = packages(path)
    assert set(found) == {f"{name}.mlpackage" for name in expected}
    for folder, (inputs, outputs) in expected.items():
        held = found[f"{folder}.mlpackage"]
        assert {f.name: (f.dtype, f.shape) for f in held.inputs} == inputs
        shown = {f.name: (f.dtype, f.shape) for f in held.outputs if not f.name.startswith("hidden_states_")}
        assert shown == outputs
        assert "com.github.apple.ml-stable-diffusion.version" in held.metadata
        assert held.specification == 8  # iOS 17's
        assert list(held.functions) == ["main"]
        if folder != "TextEncoder":  # Swift takes the first name there is
            assert len(held.outputs) == 1
    for file in ("vocab.json", "merges.txt"):
        assert (path / "tokenizer" / file).stat().st_size


@pytest.mark.parametrize("attention", ["original", "split_einsum"])
def test_chunks(attention: str, built: Callable[..., Path]) -> None:
    """Swift feeds the second what the first gives, and what the first was fed; neither gives what it takes."""
    whole = built("sd2", precision="fp16", extra={"attention": attention})
    path = built("sd2", precision="fp16", extra={"attention": attention, "chunk_unet": "true"})
    found = packages(path)
    first, second = found["UnetChunk1.mlpackage"], found["UnetChunk2.mlpackage"]
    assert "Unet.mlpackage" not in found
    given = {f.name: f for f in (*first.inputs, *first.outputs)}
    assert {f.name: f for f in second.inputs}.items() <= given.items()
    assert [f.name for f in second.outputs] == ["noise_pred"]
    for held in (first, second):
        assert not {f.name for f in held.inputs} & {f.name for f in held.outputs}
    sizes = [
        (path / name / package.WEIGHTS).stat().st_size for name in ("UnetChunk1.mlpackage", "UnetChunk2.mlpackage")
    ]
    assert max(sizes) <= 0.6 * (whole / "Unet.mlpackage" / package.WEIGHTS).stat().st_size
    parity = [bundles.load(p).component("unet").artifact.parity for p in (whole, path)]
    assert parity[0] == parity[1]


def test_the_script(built: Callable[..., Path], tmp_path: Path) -> None:
    """With a stand-in for xcrun: every package is compiled, and the vocabulary lies beside them."""
    path = built(precision="fp16")
    assert stat.S_IMODE((path / "compile.sh").stat().st_mode) == 0o755
    xcrun = tmp_path / "bin" / "xcrun"
    xcrun.parent.mkdir()
    xcrun.write_text(
        '#!/bin/sh\nset -eu\ntest "$1 $2" = "coremlcompiler compile"\nmkdir "$4/$(basename "$3" .mlpackage).mlmodelc"\n'
    )
    xcrun.chmod(0o755)
    (tmp_path / "elsewhere" / "out").mkdir(parents=True)
    environment = {
        **os.environ, "PATH": f"{xcrun.parent}:{os.environ['PATH']}", "CDPATH": str(tmp_path / "elsewhere")
    }  # fmt: skip
    for chunk in (1, 2):  # of a build before: an app would take these
        (tmp_path / "out" / f"UnetChunk{chunk}.mlmodelc").mkdir(parents=True)
    done = subprocess.run(
        [path / "compile.sh", "out"], check=True, env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == ""
    assert not (path / "out").exists()
    assert not any((tmp_path / "elsewhere" / "out").iterdir())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "TextEncoder.mlmodelc", "Unet.mlmodelc", "VAEDecoder.mlmodelc", "VAEEncoder.mlmodelc", "merges.txt", "vocab.json",
    ]  # fmt: skip


# -- float16 -----------------------------------------------------------------------------------------------------------


def translated(
    nodes: list[Any], inputs: dict[str, tuple[int, ...]], output: str, attention: str = "original",
    **constants: np.ndarray,
) -> Any:  # fmt: skip
    """An ONNX graph of float16 as one MIL function."""
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(n, TensorProto.FLOAT16, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT16, None)],
        [helper.make_tensor(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape, a.tobytes(), raw=True) for n, a in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])

    def body(given: Mapping[str, Any]) -> dict[str, Any]:
        style = translate.Style(attention)
        t = translate.Translation(model.graph, Weights(model, Path()), 23, style, values=dict(given))
        t.run()
        return {"out": split_einsum.plain(t[output])}

    return translate.function({n: (s, "fp16") for n, s in inputs.items()}, body, coremltools.target.iOS17)


def test_norms_that_see_large_numbers_are_kept_in_float32(built: Callable[..., Path]) -> None:
    """The demo's VAE encoder sees 1,064 before a norm, whose square float16 does not hold."""
    facts = bundles.load(built("demo", precision="fp16")).component("vae_encoder").artifact.facts
    (island,) = facts["islands"]
    assert (island["op"], island["why"]) == ("GroupNormalization", "squares")
    assert island["largest"] > engine.SQUARED
    kinds = {
        (op.kind, op.outputs[0].dtype)
        for op in packages(built("demo", precision="fp16"))["VAEEncoder.mlpackage"].functions["main"].operations
    }
    assert {("instance_norm", np.float16), ("instance_norm", np.float32)} <= kinds


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "ios12"}, "coreml has no target 'ios12'"),
        ({"extra": {"attention": "fused"}}, "attention=fused cannot be built for ios17"),
        ({"shapes": ((64, 64), (72, 72))}, "2 sizes in one package cannot be built for ios17"),
        ({"precision": "int8"}, "coreml builds fp32, fp16, w8, w6, w4; asked for int8"),
    ],
    ids=str,
)
def test_builds_that_there_are_not(bundle: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BuildError, match=message):
        build(bundle, tmp_path / "out", "coreml", BuildOptions(**options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (helper.make_node("Softplus", ["x"], ["y"], name="here"), "Softplus here: .* without this operator; there are .*Conv"),
        (helper.make_node("NonZero", ["x"], ["y"]), "NonZero y: "),
        (helper.make_node("Attention", ["x", "x", "x"], ["y"], softcap=3.0), "Attention y: softcap=3.0 is not supported"),
        (helper.make_node("Reshape", ["x", "x"], ["y"]), "Reshape y: a shape, an axis or a size is computed"),
        (helper.make_node("Transpose", ["x"], ["y"], perm=[0, 5]), "Transpose y: cannot be said in Core ML's terms"),
    ],
    ids=lambda value: value.op_type if hasattr(value, "op_type") else "",
)  # fmt: skip
def test_operators_that_there_are_not(node: Any, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        translated([node], {"x": (1, 2, 4, 8)}, "y")


def node(kind: str, inputs: str, output: str, **attributes: Any) -> Any:
    return helper.make_node(kind, inputs.split(","), [output], **attributes)


PICTURE = (1, 8, 2, 2)
TOKENS = [node("Transpose", "x", "t", perm=[0, 2, 3, 1]), node("Reshape", "t,s", "r")]
HEADS = [*TOKENS, node("Reshape", "r,s2", "h"), node("Transpose", "h", "hh", perm=[0, 2, 1, 3])]


@pytest.mark.parametrize(
    ("nodes", "constants", "computed"),
    [
        ([node("Attention", "x,x,x", "y")], {}, None),  # not of tokens that are held channels first
        (
            [*HEADS, node("Attention", "hh,hh,hh,m", "y")],
            {"s": np.array([1, 4, 8]), "s2": np.array([1, 4, 2, 4]), "m": np.tri(4).astype(bool)}, None,
        ),
        ([*TOKENS[:1], node("Reshape", "t,s", "y")], {"s": np.array([0, -1, 8])}, (1, 4, 8)),
        ([*TOKENS, node("Reshape", "r,s2", "y")], {"s": np.array([1, 4, 8]), "s2": np.array([0, 0, 2, -1])}, (1, 4, 2, 4)),
        ([node("Pad", "x,p,,a", "y")], {"p": np.array([1, 1]), "a": np.array([2])}, (1, 8, 4, 2)),
        ([node("Pad", "x,p,,a", "y")], {"p": np.array([0, 1, 0, 2]), "a": np.array([3, -2])}, (1, 8, 5, 2)),
        ([node("Max", "x,c,d", "y")], {"c": np.full((1,), 3, np.float16), "d": np.full((1,), 5, np.float16)}, PICTURE),
    ],
    ids=["heads", "mask", "rest of a size", "kept sizes", "pad one axis", "pad in any order", "of three"],
)  # fmt: skip
def test_other_exporters_ways(
    nodes: list[Any], constants: dict[str, np.ndarray], computed: tuple[int, ...] | None
) -> None:
    """What ours does not write, and optimum's may; against ONNX's own reference evaluator."""
    from onnx.reference import ReferenceEvaluator

    from sdrt_engines.mil.evaluate import evaluate
    from sdrt_engines.mil.program import save

    made = translated(nodes, {"x": PICTURE}, "y", "split_einsum", **constants)
    if computed is not None:
        assert tuple(made.outputs[0].shape) == computed
    x = np.random.default_rng(0).standard_normal(PICTURE).astype(np.float16)
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT16, PICTURE)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)],
        [numpy_helper.from_array(a, n) for n, a in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    (expected,) = ReferenceEvaluator(model).run(None, {"x": x})
    with tempfile.TemporaryDirectory() as folder:
        program = coremltools.converters.mil.mil.Program()
        program.add_function("main", made)
        save(coremltools, program, Path(folder, "x.mlpackage"), "ios17")
        (got,) = evaluate(package.read(Path(folder, "x.mlpackage")).functions["main"], {"x": x}).values()
    np.testing.assert_allclose(got, expected, rtol=4e-3, atol=4e-3)


def test_where_one_weight_is_most_of_a_network() -> None:
    nodes = [node("MatMul", "x,a", "t"), node("MatMul", "t,b", "u"), node("Relu", "u", "y")]
    weights = {"a": np.zeros((10, 10), np.float32), "b": np.zeros((10, 1000), np.float32)}
    for order in (nodes, [*nodes[1:2], *nodes[:1], nodes[2]]):
        graph = helper.make_graph(order, "g", [], [], [numpy_helper.from_array(a, n) for n, a in weights.items()])
        model = helper.make_model(graph)
        (first, end) = cuts(model.graph, Weights(model, Path()), 2)
        assert 0 < first < end == 3


def test_attention_that_is_not_there(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a graph that another tool exported, in which attention is products and a softmax."""
    found = engine.load_graph

    def plain(path: Path) -> Any:
        model = found(path)
        for one in model.graph.node:
            one.op_type = one.op_type.replace("Attention", "MatMul")
        return model

    monkeypatch.setattr(engine, "load_graph", plain)
    for attention in ("split_einsum", "fused"):
        options = BuildOptions(target="ios18", extra={"attention": attention})
        with pytest.raises(BuildError, match=f"attention={attention} does not find"):
            engine.build(bundles.load(bundle), "unet", tmp_path, options)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"batch": "x"}, "batch is 'x'"), ({"batch": 0}, "batch is 0"), ({"batch": 10**9}, "expected 1 to"),
        ({"functions": []}, "1 sizes, 0 functions"), ({"functions": None}, "which functions"), ({"functions": [1]}, "which functions"),
        ({"inputs": [{"tensor": "z", "name": "z", "dtype": "f16"}]}, "inputs tell of z, which it has not"),
        ({"inputs": [{"tensor": ["x"], "name": "z", "dtype": "f16"}]}, r"inputs have the tensor \['x'\]"),
        ({"inputs": [{"tensor": "sample", "name": 5, "dtype": "f16"}]}, "inputs have the name 5"),
        ({"inputs": [{"tensor": "z" * 10**6, "name": "z", "dtype": "f16"}]}, "tell of z"),
        *(
            ({"inputs": [{"tensor": "sample", "name": "z", "dtype": "f16", "layout": layout}]}, f"the layout {layout} for sample")
            for layout in ("channels_first", "batched", "floats")
        ),
        ({"outputs": [{"tensor": "out_sample", "name": "z", "dtype": "f32", "layout": "batched"}]}, "the layout batched for out"),
        ({"batch": True}, "batch is True"),
        ({"inputs": [{"tensor": "sample", "name": "z", "dtype": "f8"}]}, "dtype"),
        ({"inputs": [{"tensor": "sample", "name": "z", "dtype": "f16", "layout": "no"}]}, "layout"),
        ({"packages": 3}, "which packages"), ({"packages": ["../x"]}, "which packages"),
    ],
    ids=lambda value: str(value)[:90],
)  # fmt: skip
def test_facts_that_are_none(facts: dict[str, Any], message: str, built: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "damaged"
    shutil.copytree(built(precision="fp16"), path)
    manifest = json.loads((path / "sdrt.json").read_text())
    manifest["components"]["unet"]["artifact"]["facts"] |= facts
    (path / "sdrt.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=message) as caught:
        open_session(bundles.load(path), "unet", device=VERIFIER)
    assert len(str(caught.value)) < 250


def test_the_functions_of_what_knows_no_size_are_held_against_each_other(
    built: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An app takes the text encoder's function of the picture's size; each of them once, in build and in verify."""
    seen: list[str] = []
    computed = engine._Verifier.run

    def run(self: Any, function: str, feeds: Mapping[str, Any]) -> Mapping[str, Any]:
        seen.append(function)
        made = computed(self, function, feeds)
        return {name: array + (function == different) for name, array in made.items()}

    held = bundles.load(built(precision="fp16", **SMALL))
    ids = np.zeros((2, 77), np.int64)
    monkeypatch.setattr(engine._Verifier, "run", run)
    for different in ("", "size_136x72"):
        seen.clear()
        session = open_session(held, "text_encoder", device=VERIFIER)
        if different:
            with pytest.raises(
                NumericsError, match=r"size_64x64 and size_136x72 are of the same network, and differ in"
            ):
                session.run(input_ids=ids)
        else:
            session.run(input_ids=ids)
            assert seen == ["size_64x64", "size_136x72", "size_64x64"]
        session.close()


def test_prompts_for_ranges_of_palettized_weights(bundle: Path, tmp_path: Path) -> None:
    held = build(bundle, tmp_path / "out", "coreml", BuildOptions(precision={"unet": "w6"}, prompts=("a fox",)))
    assert held.component("unet").artifact.facts["calibration"]["prompts"] == 1
    with pytest.raises(InputError, match="nothing is measured in fp32"):
        build(bundle, tmp_path / "other", "coreml", BuildOptions(prompts=("a fox",)))


def test_opening_without_a_mac(built: Callable[..., Path], cli: Cli) -> None:
    held = bundles.load(built(precision="fp16"))
    for device in (None, "all", "cpu+ne"):
        with pytest.raises(EngineUnavailable, match="on a Mac only") as caught:
            open_session(held, "unet", device=device)
        assert "--device verifier" in str(caught.value)
    with pytest.raises(DeviceError, match="no device 'cuda'"):
        open_session(held, "unet", device="cuda")
    done = cli("generate", "a fox", "-m", held.root, "-o", held.root / "fox.png")
    assert done.returncode == 1
    assert "Core ML predicts on a Mac only" in done.stderr


def test_verify_evaluates_the_packages(built: Callable[..., Path], cli: Cli) -> None:
    """Without being told on which device."""
    done = cli("verify", built(precision="fp16"), "--json", "-")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)["parity"]
    assert {figure["component"] for figure in figures} == {"text_encoder", "unet", "vae_encoder", "vae_decoder"}
    assert all(figure["passed"] for figure in figures)


def test_without_coremltools(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "coremltools", None)
    with pytest.raises(EngineUnavailable, match="coremltools cannot be imported"):
        build(bundle, tmp_path / "out", "coreml", BuildOptions())


def run(script: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, in which coremltools was not imported yet."""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)


def test_stderr_is_what_it_was_after_opening_from_threads() -> None:
    """One comes while the other imports the library; a third one writes meanwhile, and is heard."""
    done = run("""
import logging, sys, threading, time
from sdrt_engines import coreml

real, done = sys.stderr, threading.Event()
threads = [threading.Thread(target=coreml.devices) for _ in range(2)]
threads[0].start()
while sys.stderr is real and threads[0].is_alive():
    time.sleep(0.01)
print("meanwhile", file=sys.stderr)
taken = sys.stderr
threads[1].start()
for thread in threads:
    thread.join()
assert sys.stderr is real, sys.stderr
assert logging.getLogger("coremltools").level == logging.NOTSET
print("after", file=taken)
seen = set()
threading.settrace(lambda *_: seen.add(sys.stderr))
thread = threading.Thread(target=coreml.devices)
thread.start()
thread.join()
assert seen == {real}, "it is there, and nothing is changed for it"
""")
    assert done.returncode == 0, done.stderr
    assert done.stderr.split() == ["meanwhile", "after"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_while_coremltools_is_imported(name: str, tmp_path: Path) -> None:
    """It tries imports within bare excepts, which would drop what the handler raises, and the build go on."""
    if not hasattr(signal, name):
        pytest.skip(f"{name} is not this system's")
    done = run(f"""
import signal, sys
from sdrt import cli

class Once:
    def find_spec(self, name, *_):
        if name == "libsvm" and self in sys.meta_path:
            sys.meta_path.remove(self)
            signal.raise_signal(signal.{name})

sys.meta_path.insert(0, Once())
sys.argv = ["sdrt", "build", "demo", {str(tmp_path / "out")!r}, "--engine", "coreml"]
cli.main()
""")
    assert done.returncode == (130 if name == "SIGINT" else 128 + getattr(signal, name)), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_another_size_is_refused(built: Callable[..., Path]) -> None:
    with (
        Pipeline.from_pretrained(built(precision="fp16"), device=VERIFIER) as pipe,
        pytest.raises(InputError, match=r"was built for .*W=128; asked for .*W=72"),
    ):
        pipe("a fox", width=72, height=64, num_inference_steps=1)


# -- on a Mac ----------------------------------------------------------------------------------------------------------


class StandIn:
    """coremltools' ``MLModel`` as it is on a Mac: takes exactly a function's inputs, and gives its outputs."""

    made: ClassVar[list[tuple[str, Any, str | None]]] = []

    def __init__(self, path: str, compute_units: Any = None, function_name: str | None = None) -> None:
        from sdrt_engines.mil.evaluate import evaluate

        held = package.read(Path(path))
        if len(held.functions) > 1 and function_name not in held.functions:  # as Core ML refuses it
            raise RuntimeError(f"there is no function {function_name}")
        self._function = held.functions[function_name or held.default]
        self._evaluate = evaluate
        self.made.append((Path(path).name, compute_units, function_name))

    def predict(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert feeds.keys() == {told.name for told in self._function.inputs}
        assert {name: array.dtype for name, array in feeds.items()} == {t.name: t.dtype for t in self._function.inputs}
        assert all(array.flags.c_contiguous for array in feeds.values())
        return self._evaluate(self._function, feeds)


@pytest.mark.parametrize(
    ("device", "units"), [(None, "ALL"), ("cpu+gpu", "CPU_AND_GPU"), ("cpu+ne", "CPU_AND_NE"), ("cpu", "CPU_ONLY")]
)
def test_what_coremltools_is_asked_on_a_mac(
    device: str | None, units: str, built: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = built(precision="fp16", extra={"chunk_unet": "true"}, **SMALL)
    monkeypatch.setattr(engine, "MAC", True)
    monkeypatch.setattr(coremltools.models, "MLModel", StandIn)
    monkeypatch.setattr(StandIn, "made", [])
    arguments: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 2, "seed": 1, "output_type": "np"}
    with Pipeline.from_pretrained(path, device=VERIFIER) as checked:
        expected = checked("a fox", **arguments).images
    with Pipeline.from_pretrained(path, device=device) as pipe:
        np.testing.assert_array_equal(pipe("a fox", **arguments).images, expected)
    assert {name for name, _, _ in StandIn.made} == {
        "TextEncoder.mlpackage", "UnetChunk1.mlpackage", "UnetChunk2.mlpackage", "VAEDecoder.mlpackage"
    }  # fmt: skip
    assert {asked for _, asked, _ in StandIn.made} == {getattr(coremltools.ComputeUnit, units)}
    assert {name: function for name, _, function in StandIn.made}["UnetChunk1.mlpackage"] == "size_64x64"
    monkeypatch.setattr(StandIn, "made", [])
    with Pipeline.from_pretrained(path, device=device) as pipe:
        pipe("a fox", **arguments | {"width": 136, "height": 72, "num_inference_steps": 1})
    assert {f for name, _, f in StandIn.made if name != "TextEncoder.mlpackage"} == {"size_136x72"}
    assert [d.name for d in engine.devices()] == ["all", "cpu+gpu", "cpu+ne", "cpu", "verifier"]


def test_what_core_ml_refuses_is_told(built: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Error compiling model")

    held = bundles.load(built(precision="fp16"))
    monkeypatch.setattr(engine, "MAC", True)
    monkeypatch.setattr(coremltools.models, "MLModel", fails)
    session = open_session(held, "text_encoder")
    with pytest.raises(DeviceError, match=r"TextEncoder\.mlpackage: Core ML cannot load it: Error compiling model"):
        session.run(input_ids=np.zeros((1, 77), np.int64))
