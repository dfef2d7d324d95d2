"""Directories without sdrt.json: what is inferred, what is refused, and that nothing is written into them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from sdrt import Pipeline, onnx_header
from sdrt import bundle as bundles
from sdrt.bundle import ClipSkip, DimRange, Precision, Work
from sdrt.engine import BuildOptions
from sdrt.errors import BuildError, BundleError, InputError
from sdrt.header import Header, Value
from sdrt.tokenizer import special_tokens
from sdrt_engines.build import build
from tests.conftest import Cli
from tests.fuzz.parsers import foreign as written

WIDTH = 8
BATCH, SEQUENCE = "batch_size", "sequence_length"

# -- a directory as optimum writes it, with networks of a few nodes ----------------------------------------------------


def graph(
    inputs: dict[str, tuple[Any, list[Any]]], outputs: dict[str, tuple[Any, list[Any]]], nodes: list[Any],
    weights: dict[str, np.ndarray[Any, Any]],
) -> onnx.ModelProto:  # fmt: skip
    values = [
        [helper.make_tensor_value_info(name, kind, dims) for name, (kind, dims) in side.items()]
        for side in (inputs, outputs)
    ]
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    made = helper.make_graph(nodes, "main_graph", *values, constants)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def weights(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def text_encoder(
    kind: Any, layers: int, *, deep: bool = False, projection: int = 0, ids: Any = TensorProto.INT64
) -> onnx.ModelProto:
    hidden = {"last_hidden_state": (kind, [BATCH, SEQUENCE, WIDTH])}
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["last_hidden_state"])]
    arrays = {"table": weights(49408, WIDTH).astype(dtype(kind)), "axis": np.array([1], np.int64)}
    nodes.append(helper.make_node("ReduceMean", ["last_hidden_state", "axis"], ["mean"], keepdims=0))
    if projection:
        arrays["projection"] = weights(WIDTH, projection, seed=1).astype(dtype(kind))
        nodes.append(helper.make_node("MatMul", ["mean", "projection"], ["text_embeds"]))
        pooled = {"text_embeds": (kind, [BATCH, SEQUENCE])}  # optimum gives it this name of a dimension
    else:
        nodes.append(helper.make_node("Identity", ["mean"], ["pooler_output"]))
        pooled = {"pooler_output": (kind, [BATCH, WIDTH])}
    for i in range(layers + 1) if deep else ():
        hidden[f"hidden_states.{i}"] = (kind, [BATCH, SEQUENCE, WIDTH])
        nodes.append(helper.make_node("Identity", ["last_hidden_state"], [f"hidden_states.{i}"]))
    return graph({"input_ids": (ids, [BATCH, SEQUENCE])}, pooled | hidden, nodes, arrays)


def unet(
    kind: Any, *, timestep: tuple[Any, list[Any]] = (TensorProto.FLOAT, []), channels: int = 4, texts: int = 1,
    pooled: int = 0, size: tuple[Any, Any, Any] = (BATCH, "height", "width"),
) -> onnx.ModelProto:  # fmt: skip
    """The first four channels / 10 + timestep / 1000 + mean of the projected hidden states."""
    batch, height, width = size
    inputs = {
        "sample": (kind, [batch, channels, height, width]),
        "timestep": timestep,
        "encoder_hidden_states": (kind, [batch, SEQUENCE, WIDTH * texts]),
    }
    if pooled:
        inputs |= {"text_embeds": (kind, [batch, pooled]), "time_ids": (kind, [batch, 6])}
    arrays = {
        "tenth": np.array(0.1, dtype(kind)), "thousandth": np.array(0.001, dtype(kind)),
        "axes": np.array([1, 2], np.int64), "last": np.array([3], np.int64), "scalar": np.array([-1, 1, 1, 1], np.int64),
        "zero": np.array([0], np.int64),
        "four": np.array([4], np.int64),
        "one": np.array([1], np.int64),
        "projection": weights(WIDTH * texts, 16, seed=4).astype(dtype(kind)),
    }  # fmt: skip
    nodes = [
        helper.make_node("Slice", ["sample", "zero", "four", "one"], ["latents"]),
        helper.make_node("Mul", ["latents", "tenth"], ["a"]),
        helper.make_node("Cast", ["timestep"], ["t"], to=kind),
        helper.make_node("Mul", ["t", "thousandth"], ["u"]),
        helper.make_node("Reshape", ["u", "scalar"], ["b"]),
        helper.make_node("MatMul", ["encoder_hidden_states", "projection"], ["projected"]),
        helper.make_node("ReduceMean", ["projected", "axes"], ["c"], keepdims=1),
        helper.make_node("Unsqueeze", ["c", "last"], ["d"]),
        helper.make_node("Add", ["a", "b"], ["e"]),
        helper.make_node("Add", ["e", "d"], ["out_sample"]),
    ]
    return graph(inputs, {"out_sample": (kind, [batch, 4, height, width])}, nodes, arrays)


def vae_decoder(kind: Any) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Conv", ["latent_sample", "kernel"], ["a"]),
        helper.make_node("DepthToSpace", ["a"], ["sample"], blocksize=8),
    ]
    return graph(
        {"latent_sample": (kind, [BATCH, 4, "latent_height", "latent_width"])},
        {"sample": (kind, [BATCH, 3, "latent_height * 8", "latent_width * 8"])},
        nodes,
        {"kernel": 0.05 * weights(192, 4, 1, 1, seed=2).astype(dtype(kind))},
    )


def vae_encoder(kind: Any) -> onnx.ModelProto:
    nodes = [
        helper.make_node("SpaceToDepth", ["sample"], ["a"], blocksize=8),
        helper.make_node("Conv", ["a", "kernel"], ["latent_parameters"]),
    ]
    return graph(
        {"sample": (kind, [BATCH, 3, "sample_height", "sample_width"])},
        {"latent_parameters": (kind, [BATCH, 8, "sample_height / 8", "sample_width / 8"])},
        nodes,
        {"kernel": 0.05 * weights(8, 192, 1, 1, seed=3).astype(dtype(kind))},
    )


def dtype(kind: Any) -> Any:
    return helper.tensor_dtype_to_np_dtype(kind)


TEXT_CONFIG = {
    "hidden_size": WIDTH, "num_hidden_layers": 3, "max_position_embeddings": 77, "projection_dim": 6,
    "model_type": "clip_text_model",
}  # fmt: skip
VAE_CONFIG = {
    "_class_name": "AutoencoderKL", "block_out_channels": [1, 1, 1, 1], "latent_channels": 4, "scaling_factor": 0.2,
    "shift_factor": None, "latents_mean": None, "_name_or_path": "/models/vae",
}  # fmt: skip
UNET_CONFIG = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": WIDTH, "sample_size": 8}


@pytest.fixture
def make(tmp_path: Path, bundle: Path) -> Callable[..., Path]:
    """``make(name)``: a directory as optimum writes it; its tokenizer and scheduler are those of the tiny bundle."""

    def write(root: Path, name: str, model: onnx.ModelProto, config: dict[str, Any], external: str) -> None:
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text(json.dumps(config))
        onnx.save(
            model, root / name / "model.onnx", save_as_external_data=bool(external), size_threshold=128,
            all_tensors_to_one_file=external != "several", location="model.onnx_data" if external == "one" else None,
        )  # fmt: skip

    def made(
        name: str = "theirs", *, kind: Any = TensorProto.FLOAT, ids: Any = TensorProto.INT64, sdxl: bool = False,
        deep: bool | None = None, external: str = "", **more: Any,
    ) -> Path:  # fmt: skip
        root = tmp_path / name
        deep = sdxl if deep is None else deep
        write(root, "text_encoder", text_encoder(kind, 3, deep=deep, ids=ids), TEXT_CONFIG, external)
        config = UNET_CONFIG
        if sdxl:
            model = text_encoder(kind, 3, deep=deep, projection=6)
            write(root, "text_encoder_2", model, TEXT_CONFIG, external)
            config = UNET_CONFIG | {"cross_attention_dim": 2 * WIDTH, "addition_embed_type": "text_time"}
            more = {"texts": 2, "pooled": 6} | more
        config = config | {"in_channels": more.get("channels", 4)}
        write(root, "unet", unet(kind, **more), config, external)
        write(root, "vae_decoder", vae_decoder(kind), VAE_CONFIG, external)
        write(root, "vae_encoder", vae_encoder(kind), VAE_CONFIG, external)
        index = {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": "0.39.0",
            "_name_or_path": "/models/tiny",
        }
        (root / "model_index.json").write_text(json.dumps(index))
        shutil.copytree(bundle / "scheduler", root / "scheduler")
        for folder in ("tokenizer", "tokenizer_2") if sdxl else ("tokenizer",):
            (root / folder).mkdir()
            for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
                (root / folder / file).hardlink_to(bundle / "tokenizer" / file)
        return root

    return made


def state(root: Path) -> dict[str, tuple[int, int, str]]:
    """Everything below a directory, and the directory itself: size, time of change, content."""
    found = {}
    for path in [root, *sorted(root.rglob("*"))]:
        status = path.stat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path)] = (status.st_size, status.st_mtime_ns, content)
    return found


SETTINGS: dict[str, Any] = {
    "negative_prompt": "blurry", "num_inference_steps": 4, "guidance_scale": 3.0, "seed": 1, "width": 64, "height": 64,
    "output_type": "np",
}  # fmt: skip


def picture(root: Path, **changes: Any) -> np.ndarray[Any, Any]:
    with Pipeline.from_pretrained(root) as pipe:
        made: np.ndarray[Any, Any] = pipe("a lighthouse", **(SETTINGS | changes)).images
    return made


# -- what is inferred -------------------------------------------------------------------------------------------------


def test_inferred(make: Callable[..., Path]) -> None:
    facts = bundles.load(make()).manifest
    shown = {name: [str(spec) for spec in (*c.inputs, *c.outputs)] for name, c in facts.components.items()}
    assert shown == {
        "text_encoder": ["input_ids: i64[B,T]", "pooler_output: f32[B,8]", "last_hidden_state: f32[B,T,8]"],
        "unet": [
            "sample: f32[B,4,H/8,W/8]",
            "timestep: f32[]",
            "encoder_hidden_states: f32[B,T,8]",
            "out_sample: f32[B,4,H/8,W/8]",
        ],
        "vae_encoder": ["sample: f32[B,3,H,W]", "latent_parameters: f32[B,8,H/8,W/8]"],
        "vae_decoder": ["latent_sample: f32[B,4,H/8,W/8]", "sample: f32[B,3,H,W]"],
    }
    assert {(c.artifact.engine, c.artifact.precision) for c in facts.components.values()} == {("onnx", "fp32")}
    (text,) = facts.text_encoders
    assert (text.hidden_states, text.pooled, text.clip_skip, text.max_length) == ("last_hidden_state", None, None, 77)
    assert text.pad_token == "<|endoftext|>"
    assert facts.denoiser.inputs == {
        "sample": ("latents",), "timestep": ("timestep",), "encoder_hidden_states": ("text.hidden_states",)
    }  # fmt: skip
    space = facts.latents
    assert (space.channels, space.downscale, space.scaling_factor, space.shift_factor) == (4, 8, 0.2, 0.0)
    assert (space.default_height, space.default_width) == (64, 64)
    assert facts.provenance.source == "theirs"
    assert facts.facts == {"inferred_from": "model_index.json, config.json files, ONNX graphs"}
    assert all(file.sha256 is None for file in facts.all_files())
    assert "tokenizer/tokenizer_config.json" in [file.path for file in facts.files]


def test_inferred_sdxl(make: Callable[..., Path]) -> None:
    facts = bundles.load(make(sdxl=True)).manifest
    one, two = facts.text_encoders
    assert (one.component, one.hidden_states, one.pooled) == ("text_encoder", "hidden_states.2", None)
    assert (two.component, two.hidden_states, two.pooled) == ("text_encoder_2", "hidden_states.2", "text_embeds")
    assert (two.tokenizer, two.clip_skip) == ("tokenizer_2", ClipSkip(2))
    assert (facts.no_negative_prompt, facts.guidance_scale) == ("zeros", 5.0)
    assert facts.denoiser.inputs["text_embeds"] == ("text.pooled",)
    assert facts.denoiser.inputs["time_ids"] == ("time_ids",)
    outputs = {spec.name: str(spec) for spec in facts.components["text_encoder_2"].outputs}
    assert outputs["text_embeds"] == "text_embeds: f32[B,6]"  # by its config: the graph names the size wrongly


def test_sdxl_makes_pictures(make: Callable[..., Path]) -> None:
    root = make(sdxl=True)
    made = [picture(root, **changes) for changes in ({}, {"negative_prompt": None}, {"clip_skip": 1})]
    assert not np.array_equal(made[0], made[1]), "zeros stand for no negative prompt"
    assert np.array_equal(made[0], made[2]), "all hidden states of this network are the same"


def test_a_bundle_without_its_manifest_makes_the_same_picture(copied: Path) -> None:
    """Our own graphs under optimum's names for the weights, as from an export of more than 2 GB."""
    expected = picture(copied, guidance_scale=7.5)
    (copied / "sdrt.json").unlink()
    for entry in copied.glob("*/model.onnx"):
        model = onnx.load(entry, load_external_data=False)
        for tensor in model.graph.initializer:
            for item in tensor.external_data:
                item.value = item.value.replace("model.onnx.data", "model.onnx_data")
        onnx.save(model, entry)
        entry.with_name("model.onnx.data").rename(entry.with_name("model.onnx_data"))
    held = bundles.load(copied).manifest
    assert [file.path for file in held.components["unet"].artifact.files] == ["unet/model.onnx", "unet/model.onnx_data"]
    assert np.array_equal(picture(copied, guidance_scale=7.5), expected)
    with pytest.raises(InputError, match="exported without it"):
        picture(copied, clip_skip=1)


@pytest.mark.parametrize("timestep", [
    (TensorProto.FLOAT, [1]), (TensorProto.FLOAT, [BATCH]), (TensorProto.INT64, []), (TensorProto.INT64, ["steps"]),
    (TensorProto.INT32, [1]),
])  # fmt: skip
def test_timesteps_of_any_kind(make: Callable[..., Path], timestep: tuple[Any, list[Any]]) -> None:
    assert np.array_equal(picture(make("other", timestep=timestep)), picture(make()))


def test_other_layouts(make: Callable[..., Path]) -> None:
    """32-bit token ids, weights in a file of their own, a graph of one size."""
    expected = picture(make())
    assert np.array_equal(picture(make("ids", ids=TensorProto.INT32)), expected)
    assert np.array_equal(picture(make("external", external="one")), expected)
    fixed = make("fixed", size=(2, 8, 8))
    assert np.array_equal(picture(fixed), expected)
    with pytest.raises(InputError, match=r"engine expects f32\[2,4,8,8\]"):
        picture(fixed, width=128)


def test_half_precision_is_adapted_at_the_door(make: Callable[..., Path], tmp_path: Path) -> None:
    half = make("half", kind=TensorProto.FLOAT16, timestep=(TensorProto.FLOAT16, [1]))
    held = bundles.load(half).manifest.components
    assert {c.artifact.precision for c in held.values()} == {"fp16"}
    assert str(held["unet"].inputs[0]) == "sample: f16[B,4,H/8,W/8]"
    got, expected = picture(half), picture(make())
    assert got.dtype == np.float32
    assert 0 < np.abs(got - expected).max() < 5e-3  # 11 bits, over a few steps
    with pytest.raises(BuildError, match="text_encoder is in fp16; build starts from float32"):
        build(half, tmp_path / "out", "onnxruntime")


def test_hub_snapshot(make: Callable[..., Path], tmp_path: Path) -> None:
    """models--owner--name/snapshots/<revision>/x → ../../blobs/<hash>, weights in several files."""
    source = make(external="several", sdxl=False)
    cache = tmp_path / "models--owner--name"
    snapshot = cache / "snapshots" / "0123abcd"
    (cache / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in source.rglob("*") if p.is_file())):
        shutil.copyfile(path, cache / "blobs" / f"blob{number}")
        link = snapshot / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(cache / "blobs" / f"blob{number}", link.parent))
    assert bundles.load(snapshot).manifest.provenance.source == "owner/name"
    build(snapshot, tmp_path / "out", "onnxruntime")
    assert np.allclose(picture(tmp_path / "out"), picture(source), atol=1e-5)


# -- nothing is written; what is built is whole -----------------------------------------------------------------------


def test_commands(make: Callable[..., Path], tmp_path: Path, cli: Cli) -> None:
    root = make()
    before = state(root)
    done = cli("inspect", root, "--json", "-")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["components"]["unet"]["artifact"]["files"][0]["sha256"] is None
    done = cli("generate", "x", "-m", root, "--steps", "1", "-o", tmp_path / "x.png")
    assert done.returncode == 0, done.stderr
    done = cli("verify", root)
    assert done.returncode == 1
    assert "has no sdrt.json, so there are no hashes and no reference vectors" in done.stderr
    assert f"fix: sdrt build {root} OUT --engine onnxruntime" in done.stderr
    done = cli("build", root, tmp_path / "built", "--engine", "onnxruntime")
    assert done.returncode == 0, done.stderr
    done = cli("build", root, root, "--engine", "onnxruntime", "--force")
    assert "is, or holds, what is read" in done.stderr
    assert state(root) == before


@pytest.mark.parametrize("options", [BuildOptions(), BuildOptions(shapes=((128, 64),), batch=1)], ids=["any", "fixed"])
@pytest.mark.parametrize("external", ["", "one"])
def test_build(make: Callable[..., Path], tmp_path: Path, cli: Cli, options: BuildOptions, external: str) -> None:
    root = make(external=external, timestep=(TensorProto.INT64, []))
    out = build(root, tmp_path / "built", "onnxruntime", options)
    facts = out.manifest
    assert facts.unhashed() == []
    assert bundles.damaged(out) == []
    for name, component in facts.components.items():
        assert component.artifact.parity, name
        assert all(p.case.endswith("-onnx") for p in component.artifact.parity)
        assert all(p.psnr is None or p.psnr > 110 for p in component.artifact.parity)
        assert component.artifact.built_from == bundles.sha256(root / name / "model.onnx")
    sources = {file.path: file.sha256 for file in facts.provenance.source_files}
    assert sources["unet/model.onnx"] == facts.components["unet"].artifact.built_from
    assert ("unet/model.onnx_data" in sources) == bool(external)
    for path in (*out.root.glob("*/config.json"), out.root / "model_index.json"):
        assert "_name_or_path" not in path.read_text(), "no names of a machine's folders"
    done = cli("verify", out.root)
    assert done.returncode == 0, done.stderr
    shutil.move(root, tmp_path / "gone")
    size = {"width": 128, "height": 64}
    assert np.allclose(picture(out.root, **size), picture(tmp_path / "gone", **size), atol=1e-5)
    if options.shapes:  # the graph's dimensions went by other names than ours, and were fixed all the same
        model = onnx.load(out.root / "unet/model.onnx", load_external_data=False)
        assert [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim][2:] == [8, 16]


def test_null_engine_builds_it_too(make: Callable[..., Path], tmp_path: Path) -> None:
    assert build(make(), tmp_path / "built", "null").manifest.unhashed() == []


def test_work_is_counted_when_it_is_built(make: Callable[..., Path], tmp_path: Path) -> None:
    """Not when it is opened. The graphs' dimensions go by other names than ours."""
    root = make()
    assert all(c.work is None for c in bundles.load(root).manifest.components.values())
    built = build(root, tmp_path / "built", "null").manifest.components
    assert built["text_encoder"].work == Work(), "nothing but a table and a mean"
    assert built["unet"].work == Work(linear={"B*T": WIDTH * 16}, elements={"B*T": WIDTH + 16})
    assert built["vae_decoder"].work == Work(convolution={"B*A": 64 * 4 * 192}, elements={"B*A": 64 * (4 + 192)})


def test_a_written_manifest_has_all_hashes(make: Callable[..., Path], copied: Path) -> None:
    root = make()
    with pytest.raises(BundleError, match=r"hash of text_encoder/model\.onnx is not known"):
        bundles.save(root, bundles.load(root).manifest)
    assert not (root / "sdrt.json").exists()
    value = json.loads((copied / "sdrt.json").read_text())
    value["files"][0]["sha256"] = None
    (copied / "sdrt.json").write_text(json.dumps(value))
    with pytest.raises(
        BundleError, match=r"sdrt\.json: file model_index\.json: sha256 must be 64 hex digits, got null"
    ):
        bundles.load(copied)


# -- what is refused --------------------------------------------------------------------------------------------------


def put(file: str, **values: Any) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        config = json.loads((root / file).read_text()) | values
        (root / file).write_text(json.dumps(config))

    return change


def remove(file: str) -> Callable[[Path], object]:
    return lambda root: (root / file).unlink()


def write(file: str, raw: bytes) -> Callable[[Path], object]:
    return lambda root: (root / file).write_bytes(raw)


def change_graph(name: str, change: Callable[[Any], object]) -> Callable[[Path], object]:
    def changed(root: Path) -> None:
        model = onnx.load(root / name / "model.onnx", load_external_data=False)
        change(model.graph)
        onnx.save(model, root / name / "model.onnx")

    return changed


def weights_at(location: str) -> Callable[[Path], object]:
    def change(graph: Any) -> None:
        tensor = graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", location

    return change_graph("unet", change)


def torch_checkpoint(root: Path) -> None:
    for entry in root.glob("*/model.onnx"):
        entry.unlink()
    (root / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"")


def add_input(name: str) -> Callable[[Path], object]:
    value = helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])
    return change_graph("unet", lambda graph: graph.input.append(value))


REFUSED: list[tuple[str, Callable[[Path], object], str, str]] = [
    ("checkpoint", torch_checkpoint, "is a checkpoint, not a bundle", "sdrt export "),
    ("transformer", lambda r: (r / "unet").rename(r / "transformer"), "its denoiser is a transformer", "another model"),
    ("nothing", remove("unet/model.onnx"), "unet/model.onnx and unet/openvino_model.xml are missing", "sdrt export"),
    ("no decoder", remove("vae_decoder/model.onnx"), "vae_decoder/model.onnx is missing", "export it again"),
    ("no config", remove("unet/config.json"), "unet/config.json: cannot be read", ""),
    ("no scheduler", remove("scheduler/scheduler_config.json"), "scheduler_config.json is missing", "again"),
    ("no vocabulary", remove("tokenizer/vocab.json"), "tokenizer/vocab.json is missing", "again"),
    ("index is a list", write("model_index.json", b"[]"), "model_index.json: expected an object", ""),
    ("index is damaged", write("model_index.json", b"{"), "model_index.json: not valid JSON", ""),
    ("index names no class", put("model_index.json", _class_name=None), "_class_name is None, expected a text", ""),
    ("config of a wrong type", put("unet/config.json", in_channels="4"), "in_channels is '4', expected an integer", ""),
    ("no size", put("unet/config.json", sample_size=[1]), "sample_size is [1], expected an integer", ""),
    ("no levels", put("vae_decoder/config.json", block_out_channels=None), "block_out_channels is None", ""),
    ("another latent space", put("vae_decoder/config.json", latents_mean=[1]), "latents_mean is set", ""),
    ("scaling 0", put("vae_decoder/config.json", scaling_factor=0), "scaling_factor and default sizes must be", ""),
    ("default size huge", put("unet/config.json", sample_size=10**9), "are at most 65536", ""),
    ("another config", put("unet/config.json", cross_attention_dim=9), "encoder_hidden_states is [B,T,8], expected [B,T,9]", "different models"),
    ("an image-editing model", put("vae_decoder/config.json", latent_channels=2), "latent_parameters is [B,8,", "different"),
    ("unknown input", add_input("timestep_cond"), "has a tensor 'timestep_cond', which this sdrt cannot feed", "known"),
    ("control residuals", add_input("mid_block_additional_residual"), "'mid_block_additional_residual'", "known"),
    ("an input twice", add_input("timestep"), "an input name stands twice", ""),
    ("odd rank", change_graph("unet", lambda g: g.input[0].type.tensor_type.shape.dim.pop()), "sample has 3 dimensions", ""),
    ("no shape", change_graph("unet", lambda g: g.input[0].type.tensor_type.ClearField("shape")), "what shape 'sample' has", ""),
    ("double", change_graph("unet", lambda g: setattr(g.input[0].type.tensor_type, "elem_type", 11)), "element type 11", ""),
    ("no type", change_graph("unet", lambda g: g.input[0].ClearField("type")), "element type 0", ""),
    ("size 0", change_graph("unet", lambda g: setattr(g.input[0].type.tensor_type.shape.dim[1], "dim_value", 0)), "is [B,0,", ""),
    ("odd name", change_graph("unet", lambda g: setattr(g.input[0], "name", "a b")), "has a tensor 'a b'", ""),
    ("not ONNX", write("unet/model.onnx", b"PK\x03\x04" + bytes(100)), "is not an ONNX model, or is damaged", "again"),
    ("empty", write("unet/model.onnx", b""), "has no graph", "again"),
    ("LFS pointer", write("unet/model.onnx", b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer", "git lfs pull"),
    ("weights missing", weights_at("model.onnx_data"), "unet/model.onnx_data is missing", "again"),
    ("weights above", weights_at("../../secret"), "leaves the bundle", ""),
    ("weights elsewhere", weights_at("/etc/hostname"), "leaves the bundle", ""),
    ("weights nowhere", weights_at(""), "its weights: ", ""),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "said", "fix"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_refused(make: Callable[..., Path], damage: Callable[[Path], object], said: str, fix: str) -> None:
    root = make()
    damage(root)
    with pytest.raises(BundleError) as caught:
        bundles.load(root)
    assert said in caught.value.message
    assert fix in caught.value.fix
    assert str(root) in str(caught.value), "the error names the directory"
    assert not (root / "sdrt.json").exists()


def test_refused_without_hidden_states(make: Callable[..., Path]) -> None:
    with pytest.raises(BundleError, match=r"text_encoder gives .*, but not hidden_states\.2"):
        bundles.load(make(sdxl=True, deep=False))


@pytest.mark.parametrize(("channels", "said"), [(9, "is fed by 'mask'"), (8, "unet takes 8 channels, expected 4")])
def test_models_for_other_tasks(make: Callable[..., Path], channels: int, said: str) -> None:
    with pytest.raises(BundleError, match=said):
        picture(make(channels=channels))


def test_an_encoder_that_draws_is_left_out(make: Callable[..., Path]) -> None:
    root = make()
    model = onnx.load(root / "vae_encoder/model.onnx")
    model.graph.node[1].output[0] = model.graph.output[0].name = "latent_sample"
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 4
    onnx.save(model, root / "vae_encoder/model.onnx")
    assert "vae_encoder" not in bundles.load(root).manifest.components
    assert picture(root).shape == (1, 64, 64, 3)


def test_a_link_that_leaves_the_directory(make: Callable[..., Path], tmp_path: Path) -> None:
    root = make()
    (root / "unet/model.onnx").rename(tmp_path / "elsewhere.onnx")
    (root / "unet/model.onnx").symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(BundleError, match="outside the bundle"):
        bundles.load(root)


def test_special_tokens(tmp_path: Path) -> None:
    clip = ("<|startoftext|>", "<|endoftext|>", "<|endoftext|>")
    assert special_tokens(tmp_path) == clip
    config, named = tmp_path / "tokenizer_config.json", tmp_path / "special_tokens_map.json"
    config.write_text('{"pad_token": "<|endoftext|>", "bos_token": {"content": "<s>"}, "eos_token": null}')
    assert special_tokens(tmp_path) == ("<s>", *clip[1:])
    named.write_text('{"pad_token": {"content": "!"}}')
    assert special_tokens(tmp_path) == ("<s>", "<|endoftext|>", "!")
    config.write_text('{"pad_token": "<|endoftext|>", "added_tokens_decoder": {}}')
    assert special_tokens(tmp_path) == clip, "the map is read where the config has no added_tokens_decoder"
    config.write_text("[]")
    with pytest.raises(BundleError, match=r"tokenizer_config\.json: expected an object"):
        special_tokens(tmp_path)


# -- the wire format --------------------------------------------------------------------------------------------------

SMALL = graph(
    {"x": (TensorProto.FLOAT, ["b", 4, None]), "i": (TensorProto.INT64, [])},
    {"y": (TensorProto.FLOAT16, [2, 3])},
    [helper.make_node("Identity", ["x"], ["y"])],
    {"w": np.arange(6, dtype=np.float32), "k": np.array([1], np.int64)},
)


def test_header_against_onnx(bundle: Path) -> None:
    for path in bundle.glob("*/model.onnx"):
        header, model = onnx_header.read(path), onnx.load(path, load_external_data=False)
        for got, expected in ((header.inputs, model.graph.input), (header.outputs, model.graph.output)):
            assert [(v.name, v.dims) for v in got] == [
                (v.name, tuple(d.dim_value if d.HasField("dim_value") else None for d in v.type.tensor_type.shape.dim))
                for v in expected
            ]
        assert header.weights == ("model.onnx.data",)


def read(path: Path, raw: bytes) -> Header:
    path.write_bytes(raw)
    return onnx_header.read(path)


def test_header(tmp_path: Path) -> None:
    header = read(tmp_path / "m", SMALL.SerializeToString())
    assert header == Header(
        (Value("x", "f32", (None, 4, None)), Value("i", "i64", ())), (Value("y", "f16", (2, 3)),), (), "fp32",
    )  # fmt: skip
    listed = onnx.ModelProto.FromString(SMALL.SerializeToString())
    listed.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [6]))
    assert read(tmp_path / "m", listed.SerializeToString()) == header, "initializers among the inputs, as before IR 4"


def test_header_truncated_at_every_byte(tmp_path: Path) -> None:
    """A file that breaks off is refused, unless it does where a field of the model, not the graph's, begins."""
    raw = SMALL.SerializeToString()
    whole = read(tmp_path / "m", raw)
    refused = 0
    for length in range(len(raw)):
        with contextlib.suppress(BundleError):
            assert read(tmp_path / "m", raw[:length]) == whole
            continue
        refused += 1
    assert refused >= len(raw) - 1  # opset_import, the last field, may be lacking


@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8))
def test_header_damaged(tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]) -> None:
    raw = bytearray(SMALL.SerializeToString())
    for position, value in changes:
        raw[position % len(raw)] = value
    with contextlib.suppress(BundleError):
        assert isinstance(read(tmp_path_factory.getbasetemp() / "damaged", bytes(raw)), Header)


@given(st.binary(max_size=200))
def test_header_of_anything(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    for wrapped in (raw, bytes([7 << 3 | 2, len(raw) & 0x7F]) + raw):
        with contextlib.suppress(BundleError):
            assert isinstance(read(tmp_path_factory.getbasetemp() / "anything", wrapped), Header)


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def field(number: int, payload: bytes, length: int | None = None) -> bytes:
    return varint(number << 3 | 2) + varint(len(payload) if length is None else length) + payload


def test_header_of_gigabytes(tmp_path: Path) -> None:
    """Weights inside the file are passed over: a sparse file of 3 GB, with a graph's output behind them."""
    size = 3 * 2**30
    output = SMALL.graph.output[0].SerializeToString()
    head = varint(9 << 3 | 2) + varint(size)  # TensorProto.raw_data
    tensor = len(head) + size
    graph_head = varint(5 << 3 | 2) + varint(tensor)
    end = field(12, output)
    prefix = varint(7 << 3 | 2) + varint(len(graph_head) + tensor + len(end)) + graph_head + head
    with (tmp_path / "m").open("wb") as file:
        file.write(prefix)
        file.seek(len(prefix) + size)
        file.write(end)
    assert onnx_header.read(tmp_path / "m").outputs == (Value("y", "f16", (2, 3)),)


@pytest.mark.parametrize(("raw", "said"), [
    (b"\x3b", "wire type 3"),
    (b"\x02\x00", "is no protobuf"),
    (b"\x08" + b"\xff" * 9 + b"\x7f", "is no protobuf"),
    (b"\x08" + b"\xff" * 20, "is no protobuf"),
    (b"\x0d\x00\x00", "breaks off"),
    (field(7, b"", 2**62), "breaks off"),
    (field(7, b"") * 2, "two graphs"),
    (b"\x38\x01", "a number where a message belongs"),
    (field(7, field(11, field(1, b"\xff"))), "not UTF-8"),
    (field(7, field(11, field(1, b"x" * 5000))), "a name of 5000 bytes"),
    (field(7, field(11, field(2, field(1, field(2, field(1, b"") * 17))))), "more than 16 dimensions"),
    (field(7, field(11, field(1, b"x") + field(2, field(4, b"")))), "element type 0"),
])  # fmt: skip
def test_header_refused(tmp_path: Path, raw: bytes, said: str) -> None:
    with pytest.raises(BundleError, match=said):
        read(tmp_path / "m", raw)


def test_header_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_header, "MAX_FIELDS", 1000)
    with pytest.raises(BundleError, match="has more than 1000 fields"):
        read(tmp_path / "m", b"\x08\x00" * 2000)


def test_header_of_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BundleError, match="cannot be read"):
            onnx_header.read(path)


@pytest.mark.parametrize("kind", [onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.INT4])
def test_weights_that_no_precision_stands_for(tmp_path: Path, kind: int) -> None:
    """Not passed over as float32."""
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    weight = onnx.TensorProto(name="w", data_type=kind, dims=[2], raw_data=b"\0\0")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [x], [x], [weight])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "m")
    with pytest.raises(BundleError, match=f"weights of element type {kind} of ONNX"):
        onnx_header.read(tmp_path / "m")


@pytest.mark.parametrize("other", ["tokenizer.json", "openvino_tokenizer.xml"])
def test_a_tokenizer_without_its_vocabulary(make: Callable[..., Path], other: str) -> None:
    root = make()
    (root / "tokenizer" / "vocab.json").unlink()
    (root / "tokenizer" / other).write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer/vocab\.json is missing") as caught:
        bundles.load(root)
    assert f"beside {other}" in caught.value.fix


# -- OpenVINO IR ------------------------------------------------------------------------------------------------------


@pytest.fixture
def make_ir(make: Callable[..., Path]) -> Callable[..., Path]:
    """``make``, its graphs converted to IR. ``shapes``: those that the U-Net's inputs then get; ``half``: weights."""
    library = pytest.importorskip("openvino")

    def made(name: str = "ir", *, shapes: dict[str, Any] | None = None, half: bool = False, **more: Any) -> Path:
        root = make(name, **more)
        for path in root.glob("*/model.onnx"):
            model = library.convert_model(path)
            if shapes is not None and path.parent.name == "unet":
                model.reshape({key: library.PartialShape(shape) for key, shape in shapes.items()})
            library.save_model(model, path.with_name("openvino_model.xml"), compress_to_fp16=half)
            del model
            for file in path.parent.glob("model.onnx*"):
                file.unlink()
        return root

    return made


@pytest.mark.parametrize("sdxl", [False, True])
def test_ir_inferred(make: Callable[..., Path], make_ir: Callable[..., Path], sdxl: bool) -> None:
    """As from the ONNX graphs, but for engine, files, and the timestep, which the engine takes as float32."""
    theirs = bundles.load(make(sdxl=sdxl)).manifest
    root = make_ir(sdxl=sdxl, timestep=(TensorProto.INT64, ["steps"]))
    facts = bundles.load(root).manifest
    assert list(facts.components) == list(theirs.components)
    for name, component in facts.components.items():
        expected = [str(s).replace("timestep: f32[]", "timestep: f32[B]") for s in theirs.components[name].inputs]
        assert [str(spec) for spec in component.inputs] == expected
        assert component.outputs == theirs.components[name].outputs
        artifact = component.artifact
        assert (artifact.engine, artifact.precision, artifact.profiles) == ("openvino", "fp32", ())
        assert [(file.path, file.bytes, file.sha256) for file in artifact.files] == [
            (f"{name}/{file}", (root / name / file).stat().st_size, None)
            for file in ("openvino_model.xml", "openvino_model.bin")
        ]
    assert facts.facts == {"inferred_from": "model_index.json, config.json files, OpenVINO IR"}
    assert (facts.text_encoders, facts.denoiser, facts.latents) == (
        theirs.text_encoders,
        theirs.denoiser,
        theirs.latents,
    )


@pytest.mark.parametrize("timestep", [(TensorProto.INT64, ["steps"]), (TensorProto.FLOAT, [])])
def test_ir_makes_the_same_pictures(
    make: Callable[..., Path], make_ir: Callable[..., Path], timestep: tuple[Any, list[Any]]
) -> None:
    """Timesteps between integers too, which a graph of int64 would round."""
    cases: list[dict[str, Any]] = [
        {}, {"width": 128}, {"scheduler": "DPM++ 2M Karras"}, {"scheduler": "Euler", "num_inference_steps": 7}
    ]  # fmt: skip
    with Pipeline.from_pretrained(make()) as ours, Pipeline.from_pretrained(make_ir(timestep=timestep)) as theirs:
        for changes in cases:
            first, second = (pipe("a lighthouse", **(SETTINGS | changes)).images for pipe in (ours, theirs))
            assert np.allclose(first, second, atol=1e-5), changes


def test_ir_of_sdxl_makes_pictures(make: Callable[..., Path], make_ir: Callable[..., Path]) -> None:
    assert np.allclose(picture(make_ir(sdxl=True)), picture(make(sdxl=True)), atol=1e-5)


def test_ir_in_half_precision(make: Callable[..., Path], make_ir: Callable[..., Path]) -> None:
    root = make_ir(half=True)
    assert {c.artifact.precision for c in bundles.load(root).manifest.components.values()} == {"fp16"}
    assert 0 < np.abs(picture(root) - picture(make())).max() < 5e-3


def test_ir_of_fixed_sizes(make: Callable[..., Path], make_ir: Callable[..., Path]) -> None:
    """One size is a size of the tensor's; least and largest sizes are the artifact's."""
    fixed = make_ir(shapes={"sample": [2, 4, 8, 8], "encoder_hidden_states": [2, 77, WIDTH]})
    assert str(bundles.load(fixed).manifest.components["unet"].inputs[0]) == "sample: f32[2,4,8,8]"
    assert np.allclose(picture(fixed), picture(make()), atol=1e-5)
    with pytest.raises(InputError, match=r"engine expects f32\[2,4,8,8\]"):
        picture(fixed, width=128)
    ranges = make_ir(
        "ranges", shapes={"sample": [-1, 4, (8, 16), (4, 12)], "encoder_hidden_states": [(1, 2), (1, 77), WIDTH]}
    )
    unet = bundles.load(ranges).manifest.components["unet"]
    assert {s: str(r) for p in unet.artifact.profiles for s, r in p.items()} == {
        "H": "64..128", "W": "32..96", "B": "1..2", "T": "1..77"
    }  # fmt: skip
    assert str(unet.inputs[0]) == "sample: f32[B,4,H/8,W/8]"
    assert np.allclose(picture(ranges, height=128), picture(make("free"), height=128), atol=1e-5)
    with pytest.raises(InputError, match=r"unet: this artifact was built for H=64\.\.128, W=32\.\.96"):
        picture(ranges, width=128)


def test_onnx_wins_where_both_are(make: Callable[..., Path], make_ir: Callable[..., Path]) -> None:
    both = make_ir()
    for path in make().glob("*/model.onnx"):
        path.rename(both / path.parent.name / path.name)
    assert {c.artifact.engine for c in bundles.load(both).manifest.components.values()} == {"onnx"}
    (both / "unet/model.onnx").unlink()
    assert {c.artifact.engine for c in bundles.load(both).manifest.components.values()} == {"openvino"}


def test_our_ir_without_its_manifest_makes_the_same_picture(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    precisions: dict[str, Precision] = {"unet": "w8", "vae_decoder": "fp16"}
    out = build(bundle, tmp_path / "out", "openvino", BuildOptions(precision=precisions))
    expected = picture(out.root, guidance_scale=7.5)
    (out.root / "sdrt.json").unlink()
    found = bundles.load(out.root).manifest.components
    assert {name: c.artifact.precision for name, c in found.items()} == {
        name: precisions.get(name, "fp32") for name in out.manifest.components
    }
    assert np.array_equal(picture(out.root, guidance_scale=7.5), expected)


@pytest.fixture
def written_ir(tmp_path: Path) -> Path:
    """IR without anything in it but inputs and outputs; needs no openvino."""
    for path, content in written.IR.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(content if isinstance(content, str) else json.dumps(content), encoding="latin-1")
    return tmp_path


def change_ir(old: str, new: str) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        path = root / "unet/openvino_model.xml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return change


IR_REFUSED: list[tuple[str, Callable[[Path], object], str, str]] = [
    ("no weights", remove("unet/openvino_model.bin"), "unet/openvino_model.bin is missing", "again"),
    ("no decoder", remove("vae_decoder/openvino_model.xml"), "vae_decoder/openvino_model.xml is missing", "again"),
    ("no graph", remove("unet/openvino_model.xml"), "unet/model.onnx and unet/openvino_model.xml are missing", "sdrt export"),
    ("damaged", change_ir("</net>", ""), "is not OpenVINO IR, or is damaged", "again"),
    ("entities", change_ir("<net ", "<!DOCTYPE net [<!ENTITY a '1'>]><net "), "document type", "again"),
    ("unknown input", change_ir('names="timestep"', 'names="timestep_cond"'), "has a tensor 'timestep_cond'", "known"),
    ("another config", put("unet/config.json", cross_attention_dim=9), "is [B,77,32], expected [B,T,9]", "different models"),
    ("an input twice", change_ir('names="timestep"', 'names="sample"'), "sample has 1 dimensions, expected [B,", ""),
    ("ranges apart", change_ir('"?,77,32"', '"3..4,77,32"'), "range 3..2..2", ""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "said", "fix"), [case[1:] for case in IR_REFUSED], ids=[case[0] for case in IR_REFUSED]
)
def test_ir_refused(written_ir: Path, damage: Callable[[Path], object], said: str, fix: str) -> None:
    change_ir('"?,4,?,?"', '"1..2,4,?,?"')(written_ir)
    assert bundles.load(written_ir).manifest.components["unet"].artifact.profiles == ({"B": DimRange(1, 2, 2)},)
    damage(written_ir)
    with pytest.raises(BundleError) as caught:
        bundles.load(written_ir)
    assert said in caught.value.message
    assert fix in caught.value.fix
    assert str(written_ir) in str(caught.value)


def test_commands_on_ir(make_ir: Callable[..., Path], tmp_path: Path, cli: Cli) -> None:
    root = make_ir()
    before = state(root)
    for arguments in (("inspect", root), ("generate", "x", "-m", root, "--steps", "1", "-o", tmp_path / "x.png")):
        done = cli(*arguments)
        assert done.returncode == 0, done.stderr
    done = cli("verify", root)
    assert "has no sdrt.json, so there are no hashes" in done.stderr
    assert "fix: sdrt export MODEL OUT makes a bundle that has them" in done.stderr
    done = cli("build", root, tmp_path / "out", "--engine", "openvino")
    assert "is built for openvino already; build starts from ONNX" in done.stderr
    assert state(root) == before
