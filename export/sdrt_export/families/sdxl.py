"""Stable Diffusion XL (base): two text encoders, a pooled embedding, and the picture's sizes as time_ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdrt.bundle import Denoiser, TensorSpec
from sdrt.errors import ExportError
from sdrt_export import networks
from sdrt_export import parts as common
from sdrt_export.checkpoint import Checkpoint
from sdrt_export.families import Facts, Part

NAME = "sdxl"

_PIPELINES = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")

_CONFIGS = common.CONFIGS | {
    ("unet", "addition_embed_type"): "text_time",
    ("text_encoder_2", "model_type"): "clip_text_model",
    ("vae", "latents_mean"): None,  # in derivatives with a latent space of their own
}

_TIME_IDS = 6
"""original_size, crops_coords_top_left and target_size, height before width. (The refiner has five numbers.)"""

_NETWORKS = {
    "text_encoder": networks.text_encoder,
    "text_encoder_2": networks.text_encoder_projected,
    "unet": networks.unet_text_time,
    "vae_encoder": networks.vae_encoder,
    "vae_decoder": networks.vae_decoder,
}


def mismatch(checkpoint: Checkpoint) -> str | None:
    if (pipeline := checkpoint.index.get("_class_name")) not in _PIPELINES:
        return f"the pipeline is {pipeline}"
    if absent := [name for name in ("text_encoder", "text_encoder_2") if _is_absent(checkpoint, name)]:
        return f"{absent[0]} is left out, as in the refiner"
    return common.differs(checkpoint, _CONFIGS)


def _is_absent(checkpoint: Checkpoint, name: str) -> bool:
    entry = checkpoint.index.get(name)
    return not isinstance(entry, list) or not entry or entry[0] is None


def parts(checkpoint: Checkpoint) -> list[Part]:
    pooled = checkpoint.need("text_encoder_2", "projection_dim", int, 512)
    wide = checkpoint.need("unet", "projection_class_embeddings_input_dim", int)
    each = checkpoint.need("unet", "addition_time_embed_dim", int)
    if wide != pooled + _TIME_IDS * each:
        raise ExportError(
            f"{checkpoint.name}: the U-Net's added embedding takes {wide} values, expected {pooled} pooled and"
            f" {_TIME_IDS} sizes of {each}"
        )
    added = (TensorSpec("text_embeds", "f32", ("B", pooled)), TensorSpec("time_ids", "f32", ("B", _TIME_IDS)))
    return [
        common.text_encoder(checkpoint, "text_encoder"),
        common.text_encoder(checkpoint, "text_encoder_2", projected=True),
        common.unet(checkpoint, added),
        *common.vae(checkpoint),
    ]


def facts(checkpoint: Checkpoint) -> Facts:
    zeros = checkpoint.index.get("force_zeros_for_empty_prompt", True)
    if type(zeros) is not bool:
        raise ExportError(f"{checkpoint.name}: force_zeros_for_empty_prompt is {zeros!r}, expected true or false")
    return Facts(
        text_encoders=(
            common.penultimate_facts(checkpoint, "text_encoder", "tokenizer", None),
            common.penultimate_facts(checkpoint, "text_encoder_2", "tokenizer_2", "text_embeds"),
        ),
        denoiser=Denoiser(
            component="unet",
            output="out_sample",
            inputs={
                "sample": ("latents",),
                "timestep": ("timestep",),
                "encoder_hidden_states": ("text.hidden_states",),
                "text_embeds": ("text.pooled",),
                "time_ids": ("time_ids",),
            },
        ),
        latents=common.latent_space(checkpoint),
        no_negative_prompt="zeros" if zeros else "empty",
        guidance_scale=5.0,
    )


def network(part: str, config: dict[str, Any]) -> Any:
    return _NETWORKS[part](config)


def constants(part: str, config: dict[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    return {}
