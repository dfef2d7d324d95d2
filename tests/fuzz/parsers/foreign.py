"""Directories that optimum wrote, ONNX and OpenVINO IR, through ``bundle.load``. An input is one object: the path of each file → content.

Graphs are written in Latin-1, a letter a byte.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdrt import bundle
from tests.fuzz import mutate as mutators
from tests.fuzz.parsers import checkpoint, ir_header, onnx_header

NETWORKS = ("unet", "text_encoder", "vae_decoder", "vae_encoder")
VAE = checkpoint.GOOD["vae/config.json"]
COMMON: dict[str, Any] = {
    **{path: checkpoint.GOOD[path] for path in ("model_index.json", "unet/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json")},
    "vae_decoder/config.json": VAE, "vae_encoder/config.json": VAE, "tokenizer/vocab.json": {}, "tokenizer/merges.txt": "",
    "tokenizer/tokenizer_config.json": checkpoint.GOOD["tokenizer/tokenizer_config.json"],
    "tokenizer/special_tokens_map.json": checkpoint.GOOD["tokenizer/special_tokens_map.json"],
}  # fmt: skip
GOOD: dict[str, Any] = {
    **COMMON,
    **{f"{name}/model.onnx": onnx_header.graph(name).decode("latin-1") for name in NETWORKS},
    **{f"{name}/model.onnx_data": "" for name in NETWORKS},
}
IR: dict[str, Any] = {
    **COMMON,
    **{f"{name}/openvino_model.xml": ir_header.graph(name).decode("latin-1") for name in NETWORKS},
    **{f"{name}/openvino_model.bin": "" for name in NETWORKS},
}


def seeds() -> list[bytes]:
    return [json.dumps(good).encode() for good in (GOOD, IR)]


def monsters() -> list[tuple[str, bytes]]:
    def one(path: str, **changes: Any) -> bytes:
        return json.dumps({**GOOD, path: {**GOOD[path], **changes}}).encode()

    return [
        ("many layers", one("text_encoder/config.json", num_hidden_layers=10**18)),
        ("many levels", one("vae_decoder/config.json", block_out_channels=[1] * 10**6)),
        ("a class of megabytes", one("model_index.json", _class_name="x" * 10**7)),
        ("a size of megabytes", one("unet/config.json", sample_size=[1] * 10**6)),
    ]


def mutate(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    good = dict(rng.choice((GOOD, IR)))
    path = rng.choice(list(good))
    content = good[path]
    if isinstance(content, str):
        change = ir_header.mutate if path.endswith(".xml") else mutators.raw_bytes
        good[path] = change(rng, [content.encode("latin-1")]).decode("latin-1")
    else:
        good[path] = mutators.json_bytes(rng, [json.dumps(content).encode()]).decode("latin-1")
    return json.dumps(good).encode()


def feed(data: bytes, folder: Path) -> None:
    files = json.loads(data)
    for path in (GOOD.keys() | IR.keys()) - files.keys():
        (folder / path).unlink(missing_ok=True)
    for path, content in files.items():
        raw = content.encode("latin-1") if isinstance(content, str) else json.dumps(content).encode()
        file = folder / path
        file.parent.mkdir(exist_ok=True)
        if not file.is_file() or file.read_bytes() != raw:
            file.write_bytes(raw)
    got = bundle.load(folder)
    for component in got.manifest.components.values():
        for spec in (*component.inputs, *component.outputs):
            assert str(spec)
    assert bundle.damaged(got) is not None
