"""What is particular to the ONNX Runtime engine, and to building."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import sdrt
from sdrt import BuildError, BundleError, InputError, Pipeline
from sdrt import bundle as bundles
from sdrt.engine import BuildOptions, OpenOptions, open_session
from sdrt.metrics import psnr
from sdrt.verify import measure
from sdrt_engines import onnxruntime as engine
from sdrt_engines.build import build
from sdrt_engines.graph.group_norm import group_norm_as_instance_norm


def test_built_graph_runs_on_other_cpus(ort_bundle: Path) -> None:
    """Standard and com.microsoft operators only: the NCHWc layout of one CPU's vector width is chosen when opening."""
    for name in bundles.load(ort_bundle).manifest.components:
        model = onnx.load(ort_bundle / name / "model.onnx", load_external_data=False)
        assert {node.domain for node in model.graph.node} <= {"", "com.microsoft"}
        assert not [node for node in model.graph.node if node.op_type == "GroupNormalization"]


def test_engine_bundle_is_self_contained(ort_bundle: Path, bundle: Path, tmp_path: Path) -> None:
    held, origin = bundles.load(ort_bundle), bundles.load(bundle)
    assert bundles.damaged(held) == []
    for name, component in held.manifest.components.items():
        source = origin.component(name)
        assert component.artifact.built_from == source.artifact.files[0].sha256
        assert component.artifact.engine == "onnxruntime"
        assert len(component.artifact.parity) == len(source.artifact.parity)
        assert all(p.psnr is None or p.psnr >= 110 for p in component.artifact.parity)
        assert (component.inputs, component.outputs) == (source.inputs, source.outputs)
    assert held.manifest.provenance == origin.manifest.provenance


@pytest.fixture(scope="module")
def fixed(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fixed") / "bundle"
    build(bundle, out, "onnxruntime", BuildOptions(shapes=((72, 64),), batch=1))
    return out


def test_fixed_shape(fixed: Path, bundle: Path) -> None:
    arguments: dict[str, Any] = {"width": 72, "height": 64, "num_inference_steps": 3, "seed": 1, "output_type": "np"}
    with Pipeline.from_pretrained(fixed) as ours, Pipeline.from_pretrained(bundle) as free:
        assert psnr(free("a fox", **arguments).images, ours("a fox", **arguments).images, 1.0) >= 100
        with pytest.raises(InputError, match=r"built for B=1\.\.2, H=64, W=72; asked for B=2, H=64, W=80") as caught:
            ours("a fox", **(arguments | {"width": 80}))
        assert "--engine onnxruntime --shape 80x64" in caught.value.fix
        with pytest.raises(InputError, match=r"text_encoder: .* B=1\.\.2; asked for B=3|unet: .*asked for B=4"):
            ours("a fox", **arguments, num_images_per_prompt=2)
    model = onnx.load(fixed / "unet" / "model.onnx", load_external_data=False)
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in shape][1:] == [4, 8, 9]


def test_several_shapes_are_profiles(bundle: Path, tmp_path: Path) -> None:
    build(bundle, tmp_path / "out", "onnxruntime", BuildOptions(shapes=((64, 64), (128, 64))))
    with Pipeline.from_pretrained(tmp_path / "out") as pipe:
        for width in (64, 128):
            pipe("a fox", width=width, height=64, num_inference_steps=1)
        with pytest.raises(InputError, match="built for H=64, W=64 or H=64, W=128"):
            pipe("a fox", width=128, height=128, num_inference_steps=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BuildOptions(target="sm86"), "asked for target sm86"),
        (BuildOptions(shapes=((65, 64),)), "multiples of 8"),
        (BuildOptions(batch=0), "--batch 0"),
        (BuildOptions(extra={"colour": "red"}), "no option 'colour'"),
    ],
    ids=str,
)
def test_build_refuses(bundle: Path, tmp_path: Path, options: BuildOptions, message: str) -> None:
    with pytest.raises((BuildError, InputError), match=message):
        build(bundle, tmp_path / "out", "onnxruntime", options)
    assert list(tmp_path.iterdir()) == []


def wrong_epsilon(model: Any) -> int:
    """The pass, on a graph with another epsilon in every group norm."""
    for node in model.graph.node:
        if node.op_type == "GroupNormalization":
            next(a for a in node.attribute if a.name == "epsilon").f = 0.5
    return group_norm_as_instance_norm(model)


def test_build_that_computes_something_else_leaves_nothing(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "group_norm_as_instance_norm", wrong_epsilon)
    with pytest.raises(BuildError, match="unet: onnxruntime does not compute what torch computes"):
        build(bundle, tmp_path / "out", "onnxruntime")
    assert list(tmp_path.iterdir()) == []


def test_build_starts_from_onnx(ort_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="is built for onnxruntime already"):
        build(ort_bundle, tmp_path / "out", "onnxruntime")


def test_open_options(bundle: Path) -> None:
    held = bundles.load(bundle)
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    pictures = []
    for extra in (
        {},
        {"prepack": "false", "arena": "false", "plan": "true", "spin": "false"},
        {"optimization": "none"},
    ):
        session = open_session(held, "vae_decoder", options=OpenOptions(threads=1, extra=extra))
        pictures.append(session.run(latent_sample=latents)["sample"])
        session.close()
    assert all(psnr(pictures[0], other) >= 110 for other in pictures[1:])
    for name, text in (("arena", "maybe"), ("optimization", "most")):
        with pytest.raises(InputError, match=f"onnxruntime option {name}: expected"):
            open_session(held, "vae_decoder", options=OpenOptions(extra={name: text}))


def test_damaged_graph(copied: Path) -> None:
    path = copied / "unet" / "model.onnx"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(BundleError, match=r"unet: onnxruntime .* cannot load model\.onnx") as caught:
        Pipeline.from_pretrained(copied)
    assert "sdrt verify" in caught.value.fix


@pytest.mark.parametrize("rank", [3, 4, 5])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_norm_pass(rank: int, groups: int) -> None:
    """Against the definition, for every rank that networks have, with the graph's other nodes left alone."""
    import onnxruntime

    generator = np.random.default_rng(rank)
    x = (3 + 2 * generator.standard_normal((2, 6, 5, 4, 3)[:rank])).astype(np.float32)
    scale, bias = generator.standard_normal((2, 6)).astype(np.float32)
    nodes = [
        helper.make_node("GroupNormalization", ["x", "scale", "bias"], ["y"], epsilon=1e-3, num_groups=groups),
        helper.make_node("Neg", ["y"], ["z"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 6, "N1", "N2", "N3"][:rank])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["B", 6, "N1", "N2", "N3"][:rank])],
        [numpy_helper.from_array(scale, "scale"), numpy_helper.from_array(bias, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    assert group_norm_as_instance_norm(model) == 1
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    grouped = x.astype(np.float64).reshape(2, groups, -1)
    normed = (grouped - grouped.mean(-1, keepdims=True)) / np.sqrt(grouped.var(-1, keepdims=True) + 1e-3)
    column = (1, 6, *[1] * (rank - 2))
    expected = -(normed.reshape(x.shape) * scale.reshape(column) + bias.reshape(column))
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, atol=2e-6)


def test_missing_library_names_the_extra(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(sdrt.EngineUnavailable, match="onnxruntime cannot be imported") as caught:
        Pipeline.from_pretrained(bundle)
    assert caught.value.fix == "pip install 'sdrt[ort]'"


def test_sizes_without_a_reference_case_are_measured_all_the_same(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--shape of its own: cases of that size are made from the ONNX bundle, and a wrong graph is found there too."""
    build(bundle, tmp_path / "out", "onnxruntime", BuildOptions(shapes=((96, 80),), batch=1))
    held = bundles.load(tmp_path / "out")
    for name, cases in (("unet", {"B2-T77-H80-W96-onnx"}), ("vae_decoder", {"B1-H80-W96-onnx"})):
        figures = held.component(name).artifact.parity
        assert {frozenset(p.case.split("-")) for p in figures} == {frozenset(case.split("-")) for case in cases}
        assert all(p.psnr is not None and p.psnr >= 110 for p in figures)
        session = open_session(held, name)
        assert len(list(measure(held, name, session))) == len(figures)
        session.close()
    monkeypatch.setattr(engine, "group_norm_as_instance_norm", wrong_epsilon)
    with pytest.raises(BuildError, match="unet: onnxruntime does not compute what torch computes"):
        build(bundle, tmp_path / "wrong", "onnxruntime", BuildOptions(shapes=((96, 80),), batch=1))


def test_build_from_a_hub_snapshot(bundle: Path, tmp_path: Path) -> None:
    """In the Hub's cache every file is a link to a blob of another name."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    for number, path in enumerate(sorted(p for p in bundle.rglob("*") if p.is_file())):
        shutil.copyfile(path, blobs / f"blob{number}")
        link = snapshot / path.relative_to(bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blobs / f"blob{number}")
    build(snapshot, tmp_path / "out", "onnxruntime")
    assert bundles.damaged(bundles.load(tmp_path / "out")) == []


def test_build_never_replaces_what_it_reads(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(copied.rglob("*"))
    for out in (copied, copied.parent / "copied" / ".." / "copied"):
        with pytest.raises(BundleError, match="is, or holds, what is read"):
            build(copied, out, "null", force=True)
    assert sorted(copied.rglob("*")) == before
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert build(copied, ".", "null").root == tmp_path / "here"
