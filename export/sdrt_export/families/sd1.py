"""Stable Diffusion 1.x and its fine-tunes: CLIP-L text encoder, U-Net, KL autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdrt.bundle import ClipSkip, Denoiser, LatentSpace, TensorSpec, TextEncoder
from sdrt.errors import ExportError
from sdrt_export.checkpoint import Checkpoint
from sdrt_export.families import Facts, Part

NAME = "sd1"

_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")


def mismatch(checkpoint: Checkpoint) -> str | None:
    pipeline = checkpoint.index.get("_class_name")
    if pipeline not in _PIPELINES:
        return f"the pipeline is {pipeline}"
    unet, text = checkpoint.config("unet"), checkpoint.config("text_encoder")
    for config, key, expected in (
        (unet, "_class_name", "UNet2DConditionModel"),
        (unet, "in_channels", 4),
        (unet, "addition_embed_type", None),
        (unet, "class_embed_type", None),
        (unet, "num_class_embeds", None),
        (unet, "encoder_hid_dim", None),
        (unet, "time_cond_proj_dim", None),  # set in LCM's U-Nets, which take the guidance scale as an input
        (unet, "use_linear_projection", False),  # True in SD 2.x
        (text, "model_type", "clip_text_model"),
        (text, "hidden_act", "quick_gelu"),  # gelu in SD 2.x
        (checkpoint.config("vae"), "_class_name", "AutoencoderKL"),
        (checkpoint.config("vae"), "latent_channels", 4),
    ):
        defaults = {"in_channels": 4, "latent_channels": 4, "use_linear_projection": False,
                    "hidden_act": "quick_gelu"}  # fmt: skip
        if (got := config.get(key, defaults.get(key))) != expected:
            return f"{key} is {got!r}, expected {expected!r}"
    return None


def parts(checkpoint: Checkpoint) -> list[Part]:
    latent = checkpoint.need("vae", "latent_channels", int, 4)
    width, layers = (checkpoint.need("text_encoder", key, int) for key in ("hidden_size", "num_hidden_layers"))
    per_picture: tuple[int | str, ...] = ("H/8", "W/8")
    _check_downscale(checkpoint)
    # Two sizes by two batches; the second size is no multiple of 64, so every level of the U-Net rounds.
    pictures = tuple({"B": b, "H": h, "W": w} for h, w in ((64, 64), (72, 136)) for b in (1, 2))
    return [
        Part(
            "text_encoder",
            "text_encoder",
            inputs=(TensorSpec("input_ids", "i64", ("B", "T")),),
            outputs=(
                TensorSpec("last_hidden_state", "f32", ("B", "T", width)),
                TensorSpec("pooler_output", "f32", ("B", width)),
                *(TensorSpec(f"hidden_states.{i}", "f32", ("B", "T", width)) for i in range(layers + 1)),
            ),
            trace_sizes={"B": 3, "T": 20},
            cases=({"B": 1, "T": 77}, {"B": 2, "T": 77}, {"B": 1, "T": 16}, {"B": 2, "T": 16}),
            vocabulary=checkpoint.need("text_encoder", "vocab_size", int, 49408),
        ),
        Part(
            "unet",
            "unet",
            inputs=(
                TensorSpec("sample", "f32", ("B", latent, *per_picture)),
                TensorSpec("timestep", "f32", (1,)),
                TensorSpec(
                    "encoder_hidden_states", "f32", ("B", "T", checkpoint.need("unet", "cross_attention_dim", int))
                ),
            ),
            outputs=(
                TensorSpec("out_sample", "f32", ("B", checkpoint.need("unet", "out_channels", int, 4), *per_picture)),
            ),
            trace_sizes={"B": 3, "H": 96, "W": 160, "T": 77},
            cases=tuple(case | {"T": 77 if case["H"] == 64 else 154} for case in pictures),
            share=4.0,
        ),
        Part(
            "vae_encoder",
            "vae",
            inputs=(TensorSpec("sample", "f32", ("B", 3, "H", "W")),),
            outputs=(TensorSpec("latent_parameters", "f32", ("B", 2 * latent, *per_picture)),),
            trace_sizes={"B": 3, "H": 96, "W": 160},
            cases=pictures,
        ),
        Part(
            "vae_decoder",
            "vae",
            inputs=(TensorSpec("latent_sample", "f32", ("B", latent, *per_picture)),),
            outputs=(TensorSpec("sample", "f32", ("B", 3, "H", "W")),),
            trace_sizes={"B": 3, "H": 96, "W": 160},
            cases=pictures,
        ),
    ]


def _check_downscale(checkpoint: Checkpoint) -> None:
    levels = len(checkpoint.need("vae", "block_out_channels", list))
    if levels != 4:
        raise ExportError(f"{checkpoint.name}: the VAE has {levels} levels, expected 4 (8 pixels a latent)")


def facts(checkpoint: Checkpoint) -> Facts:
    sample_size = checkpoint.config("unet").get("sample_size") or 64
    height, width = sample_size if isinstance(sample_size, list) and len(sample_size) == 2 else [sample_size] * 2
    if not (type(height) is int and type(width) is int):
        raise ExportError(f"{checkpoint.name}: unet/config.json: sample_size is {sample_size!r}, expected an integer")
    layers = checkpoint.need("text_encoder", "num_hidden_layers", int)
    special = special_tokens(checkpoint, "tokenizer")
    return Facts(
        text_encoders=(
            TextEncoder(
                component="text_encoder",
                tokenizer="tokenizer",
                max_length=checkpoint.need("text_encoder", "max_position_embeddings", int, 77),
                clip_skip=ClipSkip(layers, checkpoint.need("text_encoder", "layer_norm_eps", float, 1e-5)),
                **special,
            ),
        ),
        denoiser=Denoiser(
            component="unet",
            output="out_sample",
            inputs={
                "sample": ("latents",),
                "timestep": ("timestep",),
                "encoder_hidden_states": ("text.hidden_states",),
            },
        ),
        latents=LatentSpace(
            channels=checkpoint.need("vae", "latent_channels", int, 4),
            downscale=8,
            scaling_factor=checkpoint.need("vae", "scaling_factor", float, 0.18215),
            shift_factor=float(checkpoint.config("vae").get("shift_factor") or 0.0),
            default_height=8 * height,
            default_width=8 * width,
        ),
    )


def special_tokens(checkpoint: Checkpoint, folder: str) -> dict[str, str]:
    """bos_token, eos_token and pad_token as the tokenizer's own files name them; CLIP's where they are silent."""
    tokens = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if (checkpoint.root / folder / file).is_file():
            named = checkpoint.json(f"{folder}/{file}")
            for name, default in tokens.items():
                value = named.get(name)
                value = value.get("content") if isinstance(value, dict) else value
                tokens[name] = value if isinstance(value, str) else default
    return tokens


def network(part: str, config: dict[str, Any]) -> Any:
    return {"text_encoder": _text_encoder, "unet": _unet, "vae_encoder": _vae_encoder, "vae_decoder": _vae_decoder}[
        part
    ](config)


def constants(part: str, config: dict[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    if part != "text_encoder":
        return {}
    names = ("final_layer_norm.weight", "final_layer_norm.bias")
    return {name: next(value for key, value in state.items() if key.endswith(name)).numpy() for name in names}


def _unet(config: dict[str, Any]) -> Any:
    import torch
    from diffusers import UNet2DConditionModel

    class UNet(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = UNet2DConditionModel.from_config(config)
            # forward() asks whether 2 ** num_upsamplers divides the size, to see if upsamplers need exact sizes. With a
            # power that divides no size they always do, and the graph holds for every size.
            self.model.num_upsamplers = 20

        def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
            return self.model(sample, timestep, encoder_hidden_states, return_dict=False)[0]

    return UNet()


def _vae_encoder(config: dict[str, Any]) -> Any:
    import torch
    from diffusers import AutoencoderKL

    class VaeEncoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoencoderKL.from_config(config)

        def forward(self, sample: Any) -> Any:
            moments = self.model.encoder(sample)
            return moments if self.model.quant_conv is None else self.model.quant_conv(moments)

    return VaeEncoder()


def _vae_decoder(config: dict[str, Any]) -> Any:
    import torch
    from diffusers import AutoencoderKL

    class VaeDecoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoencoderKL.from_config(config)

        def forward(self, latent_sample: Any) -> Any:
            return self.model.decode(latent_sample, return_dict=False)[0]

    return VaeDecoder()


def _text_encoder(config: dict[str, Any]) -> Any:
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    class TextEncoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = CLIPTextModel(CLIPTextConfig(**config))

        def forward(self, input_ids: Any) -> Any:
            out = self.model(input_ids=input_ids, output_hidden_states=True)
            return (out.last_hidden_state, out.pooler_output, *out.hidden_states)

    return TextEncoder()
