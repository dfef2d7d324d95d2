"""``sdrt.json``: ``bundle.load`` of a directory, and ``bundle.parse``."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdrt import bundle, strict_json
from sdrt.bundle import (
    Artifact,
    ClipSkip,
    Component,
    Denoiser,
    DimRange,
    File,
    LatentSpace,
    Manifest,
    Parity,
    Provenance,
    TensorSpec,
    TextEncoder,
    Work,
)  # fmt: skip
from sdrt.errors import BundleError
from tests.fuzz import mutate as mutators

HASH = "0123456789abcdef" * 4


def _file(path: str) -> File:
    return File(path, 0, HASH)


def _artifact(folder: str, **more: Any) -> Artifact:
    return Artifact("onnx", "fp32", (_file(f"{folder}/model.onnx"), _file(f"{folder}/model.onnx.data")), **more)


def manifest() -> Manifest:
    """A small one of Stable Diffusion 1.x, with every kind of entry."""
    text = Component(
        inputs=(TensorSpec("input_ids", "i64", ("B", "T")),),
        outputs=(
            TensorSpec("last_hidden_state", "f32", ("B", "T", 32)), TensorSpec("pooler_output", "f32", ("B", 32)),
            *(TensorSpec(f"hidden_states.{i}", "f32", ("B", "T", 32)) for i in range(4)),
        ),
        artifact=_artifact("text_encoder", parity=(Parity("B1-T77", "last_hidden_state", 1e-6, 140.5),)),
        config=_file("text_encoder/config.json"),
        constants=_file("text_encoder/constants.npz"),
        work=Work(linear={"B*T": 24576}, attention={"B*T^2": 192}, elements={"B*T": 1728, "B*T^2": 3}),
    )  # fmt: skip
    unet = Component(
        inputs=(
            TensorSpec("sample", "f32", ("B", 4, "H/8", "W/8")), TensorSpec("timestep", "f32", (1,)),
            TensorSpec("encoder_hidden_states", "f32", ("B", "T", 32)),
        ),
        outputs=(TensorSpec("out_sample", "f32", ("B", 4, "H/8", "W/8")),),
        artifact=_artifact("unet", profiles=({"B": DimRange(1, 2, 8), "H": DimRange(64, 64, 64)},), built_from=HASH),
        reference=_file("unet/reference.npz"),
        work=Work({"B*A": 4086784}, {"B": 30720}, {"B*A*T": 10048, "B*A^2": 445504}, {"B": 1504}),
    )  # fmt: skip
    decoder = Component(
        inputs=(TensorSpec("latent_sample", "f32", ("B", 4, "H/8", "W/8")),),
        outputs=(TensorSpec("sample", "f32", ("B", 3, "H", "W")),),
        artifact=_artifact("vae_decoder", facts={"opset": 23}),
    )
    return Manifest(
        family="sd1",
        components={"text_encoder": text, "unet": unet, "vae_decoder": decoder},
        text_encoders=(
            TextEncoder(
                "text_encoder", "tokenizer", 77, "<|startoftext|>", "<|endoftext|>", "<|endoftext|>",
                pooled="pooler_output", clip_skip=ClipSkip(3, 1e-5),
            ),
        ),
        denoiser=Denoiser(
            "unet", "out_sample",
            {"sample": ("latents",), "timestep": ("timestep",), "encoder_hidden_states": ("text.hidden_states",)},
        ),
        latents=LatentSpace(4, 8, 0.18215, 64, 64),
        scheduler="scheduler/scheduler_config.json",
        files=(_file("scheduler/scheduler_config.json"), _file("tokenizer/vocab.json"), _file("tokenizer/merges.txt")),
        provenance=Provenance("tiny-sd", (_file("unet/diffusion_pytorch_model.safetensors"),), {"torch": "2.13.0"}),
        facts={"note": ["anything", {"at": "all"}]},
    )  # fmt: skip


def seeds() -> list[bytes]:
    return [bundle.dumps(manifest()).encode()]


def _with(**changes: Any) -> bytes:
    return json.dumps({**json.loads(seeds()[0]), **changes}).encode()


def monsters() -> list[tuple[str, bytes]]:
    good = json.loads(seeds()[0])
    size = strict_json.MAX_BYTES
    file = good["files"][0]
    many = [{**file, "path": f"f{i}"} for i in range(100_000)]
    text, component = good["text_encoders"][0], good["components"]["text_encoder"]
    layers = [
        *component["outputs"][:2],
        *({**component["outputs"][2], "name": f"hidden_states.{i}"} for i in range(1001)),
    ]
    layered = {**component, "outputs": layers}
    skips = {**text, "clip_skip": {**text["clip_skip"], "layers": 1000}}
    wide = {
        **component,
        "outputs": [*component["outputs"], *({"name": f"o{i}", "dtype": "f32", "shape": []} for i in range(150_000))],
    }
    return [
        ("many files, the last twice", _with(files=[*many, many[-1]])),
        ("many files", _with(files=many)),
        ("many text encoders", _with(components={**good["components"], "text_encoder": layered}, text_encoders=[skips] * 40_000)),
        ("many outputs", _with(components={**good["components"], "text_encoder": wide}, text_encoders=[{**skips, "clip_skip": {**skips["clip_skip"], "hidden_states": "x"}}] * 16)),
        ("a component's name of megabytes", _with(components={"x" * (size // 2): {**component, "inputs": component["inputs"] * 50_000}})),
        ("a key of megabytes", _with(**{"x" * (size - 20_000): 1})),
        ("a path of megabytes", _with(scheduler="a/" * (size // 2 - 10_000) + "a")),
        ("a name of megabytes", _with(components={"x": {**component, "inputs": [{"name": "x" * (size - 20_000), "dtype": "f32", "shape": ["B"]}]}})),
        ("a dimension of megabytes", _with(components={"x": {**component, "inputs": [{"name": "x", "dtype": "f32", "shape": ["B" * (size - 20_000) + "-"]}]}})),
        ("a version of megabytes", _with(version=[0.5] * (size // 6))),
        ("many dimensions", _with(components={"x": {**component, "inputs": [{"name": "x", "dtype": "f32", "shape": ["B"] * 10**6}]}})),
        ("many sources", _with(denoiser={**good["denoiser"], "inputs": {f"x{i}": ["latents"] for i in range(300_000)}})),
        ("a term of megabytes", _with(components={"x": {**component, "work": {"linear": {"B*" * (size // 2 - 20_000) + "B": 1}}}})),
        ("many terms", _with(components={"x": {**component, "work": {"linear": {f"B^{i}": 1 for i in range(10**6)}}}})),
        ("facts of megabytes", _with(facts={"x": [[0]] * 2_000_000})),
    ]  # fmt: skip


def mutate(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    return mutators.json_bytes(rng, seeds)


def feed(data: bytes, folder: Path) -> None:
    if not (folder / "sdrt.json").exists():
        for file in manifest().all_files():
            (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
            (folder / file.path).touch()
    (folder / "sdrt.json").write_bytes(data)
    got = bundle.parse(strict_json.parse(data, "sdrt.json"), "sdrt.json")
    try:
        assert bundle.load(folder).manifest == got
        held = True
    except BundleError:  # a file is not there, or of another size
        held = False
    if len(data) < 2**20:
        assert bundle.parse(strict_json.parse(bundle.dumps(got).encode(), "again"), "again") == got
    for component in got.components.values():
        sizes = bundle.solve(
            component.inputs, {spec.name: tuple(range(8, 8 + len(spec.shape))) for spec in component.inputs}
        )
        for spec in (*component.inputs, *component.outputs):
            assert len(str(spec)) > 0
            spec.at(sizes)
        for profile in component.artifact.profiles:
            bundle.fits(profile, sizes)
        if component.work is not None:
            component.work.at(sizes)
            component.work.elements_at(sizes)
    if held:
        opened = bundle.Bundle(folder, got)
        opened.path(got.scheduler)
        for text in got.text_encoders:
            opened.path(text.tokenizer)
            opened.component(text.component)
