"""Stable Diffusion 1.x and its fine-tunes: CLIP-L text encoder, U-Net, KL autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdrt.bundle import Denoiser
from sdrt_export import networks
from sdrt_export import parts as common
from sdrt_export.checkpoint import Checkpoint
from sdrt_export.families import Facts, Part

NAME = "sd1"

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")

CONFIGS = common.CONFIGS | {
    ("unet", "use_linear_projection"): False,  # True in SD 2.x
    ("text_encoder", "hidden_act"): "quick_gelu",  # gelu in SD 2.x
}

_NETWORKS = {
    "text_encoder": networks.text_encoder,
    "unet": networks.unet,
    "vae_encoder": networks.vae_encoder,
    "vae_decoder": networks.vae_decoder,
}


def mismatch(checkpoint: Checkpoint) -> str | None:
    if (pipeline := checkpoint.index.get("_class_name")) not in PIPELINES:
        return f"the pipeline is {pipeline}"
    return common.differs(checkpoint, CONFIGS)


def parts(checkpoint: Checkpoint) -> list[Part]:
    return [common.text_encoder(checkpoint, "text_encoder"), common.unet(checkpoint), *common.vae(checkpoint)]


def facts(checkpoint: Checkpoint) -> Facts:
    return Facts(
        text_encoders=(common.text_facts(checkpoint, "text_encoder", "tokenizer"),),
        denoiser=Denoiser(
            component="unet",
            output="out_sample",
            inputs={
                "sample": ("latents",),
                "timestep": ("timestep",),
                "encoder_hidden_states": ("text.hidden_states",),
            },
        ),
        latents=common.latent_space(checkpoint),
    )


def network(part: str, config: dict[str, Any]) -> Any:
    return _NETWORKS[part](config)


def constants(part: str, config: dict[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    return common.final_layer_norm(state) if part == "text_encoder" else {}
