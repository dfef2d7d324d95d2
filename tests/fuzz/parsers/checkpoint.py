"""A checkpoint's configs, through the family that they tell: ``find``, ``parts``, ``facts``, and the weights' index.

An input is one object: the path of each file → its content.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdrt_export import families
from sdrt_export.checkpoint import Checkpoint
from tests.fuzz import mutate as mutators

TOKEN = {"content": "<|endoftext|>", "lstrip": False, "normalized": True}
GOOD: dict[str, Any] = {
    "model_index.json": {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]},
    "unet/config.json": {
        "_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, "cross_attention_dim": 32, "sample_size": 8,
        "block_out_channels": [32, 64, 64, 64], "use_linear_projection": False, "addition_embed_type": None,
    },
    "text_encoder/config.json": {
        "model_type": "clip_text_model", "hidden_act": "quick_gelu", "hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 49408,
        "max_position_embeddings": 77, "layer_norm_eps": 1e-5, "bos_token_id": 49406, "eos_token_id": 49407,
    },
    "vae/config.json": {
        "_class_name": "AutoencoderKL", "latent_channels": 4, "block_out_channels": [32, 32, 32, 32], "scaling_factor": 0.18215,
        "shift_factor": None, "sample_size": 64,
    },
    "tokenizer/special_tokens_map.json": {"bos_token": {**TOKEN, "content": "<|startoftext|>"}, "eos_token": TOKEN, "pad_token": "<|endoftext|>"},
    "tokenizer/tokenizer_config.json": {"bos_token": "<|startoftext|>", "eos_token": TOKEN, "pad_token": "<|endoftext|>", "model_max_length": 77},
    "unet/diffusion_pytorch_model.safetensors.index.json": {"metadata": {"total_size": 1}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}},
    "scheduler/scheduler_config.json": {"_class_name": "PNDMScheduler", "num_train_timesteps": 1000},
}  # fmt: skip


SECOND = {**GOOD["text_encoder/config.json"], "hidden_act": "gelu", "projection_dim": 24}
XL: dict[str, Any] = {
    **GOOD,
    "model_index.json": {
        "_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True,
        "text_encoder": ["transformers", "CLIPTextModel"], "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    },
    "text_encoder_2/config.json": SECOND,
    "unet/config.json": {
        **GOOD["unet/config.json"], "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 72, "use_linear_projection": True,
    },
    "tokenizer_2/tokenizer_config.json": {"pad_token": "!"},
}  # fmt: skip
TWO: dict[str, Any] = {
    **GOOD,
    "unet/config.json": {**GOOD["unet/config.json"], "use_linear_projection": True},
    "text_encoder/config.json": {**GOOD["text_encoder/config.json"], "hidden_act": "gelu"},
}


def seeds() -> list[bytes]:
    return [json.dumps(good).encode() for good in (GOOD, TWO, XL)]


def monsters() -> list[tuple[str, bytes]]:
    def one(path: str, **changes: Any) -> bytes:
        return json.dumps({**GOOD, path: {**GOOD[path], **changes}}).encode()

    return [
        ("many layers", one("text_encoder/config.json", num_hidden_layers=10**6)),
        ("too many layers", one("text_encoder/config.json", num_hidden_layers=10**18)),
        ("a class of megabytes", one("model_index.json", _class_name="x" * 10**7)),
        (
            "many shards",
            one(
                "unet/diffusion_pytorch_model.safetensors.index.json",
                weight_map={f"a{i}": f"s{i}" for i in range(300_000)},
            ),
        ),
        (
            "a shard's path of megabytes",
            one("unet/diffusion_pytorch_model.safetensors.index.json", weight_map={"a": "a/" * 10**6}),
        ),
    ]


def mutate(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    good = json.loads(rng.choice(seeds))
    path = rng.choice(list(good))
    good[path] = mutators.json_bytes(rng, [json.dumps(good[path]).encode()]).decode("latin-1")
    return json.dumps(good).encode()


def feed(data: bytes, folder: Path) -> None:
    root = folder / "checkpoint"
    if not root.exists():
        for path in XL:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
        for name in ("one", "two"):
            (root / f"unet/{name}.safetensors").touch()
        (root / "vae/diffusion_pytorch_model.safetensors").touch()
    for path, content in json.loads(data).items():
        raw = content.encode("latin-1") if isinstance(content, str) else json.dumps(content).encode()
        if not (root / path).is_file() or (root / path).read_bytes() != raw:
            (root / path).write_bytes(raw)
    checkpoint = Checkpoint(root, "model")
    checkpoint.weights("unet")
    checkpoint.weights("vae")
    family = families.find(checkpoint)
    parts = family.parts(checkpoint)
    assert parts
    family.facts(checkpoint)
