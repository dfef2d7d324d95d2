"""What families have in common: CLIP text encoders, a U-Net, a KL autoencoder, read from the checkpoint's configs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdrt import foreign
from sdrt.bundle import ClipSkip, LatentSpace, TensorSpec, TextEncoder
from sdrt.errors import BundleError, ExportError
from sdrt.foreign import Config
from sdrt.tokenizer import special_tokens
from sdrt_export.checkpoint import Checkpoint
from sdrt_export.families import Part

MAX_LAYERS = 1000
LATENTS: tuple[int | str, ...] = ("H/8", "W/8")

# Two sizes by two batches; the second size is no multiple of 64, so every level of the U-Net rounds.
PICTURES = tuple({"B": b, "H": h, "W": w} for h, w in ((64, 64), (72, 136)) for b in (1, 2))


CONFIGS: dict[tuple[str, str], Any] = {
    ("unet", "_class_name"): "UNet2DConditionModel",
    ("unet", "in_channels"): 4,
    ("unet", "addition_embed_type"): None,
    ("unet", "class_embed_type"): None,
    ("unet", "num_class_embeds"): None,
    ("unet", "encoder_hid_dim"): None,
    ("unet", "time_cond_proj_dim"): None,  # set in LCM's U-Nets, which take the guidance scale as an input
    ("text_encoder", "model_type"): "clip_text_model",
    ("vae", "_class_name"): "AutoencoderKL",
    ("vae", "latent_channels"): 4,
}
"""What text-to-image families have in common, by (folder, key)."""

DEFAULTS = {"in_channels": 4, "latent_channels": 4, "use_linear_projection": False, "hidden_act": "quick_gelu"}
"""What the classes take for a key that a config lacks."""


def differs(checkpoint: Checkpoint, expected: Mapping[tuple[str, str], Any]) -> str | None:
    """The first config value, by (folder, key), that is not what a family has; None when all are."""
    configs: dict[str, dict[str, Any]] = {}
    for (folder, key), value in expected.items():
        if folder not in configs:
            configs[folder] = checkpoint.config(folder)
        got = configs[folder].get(key, DEFAULTS.get(key))
        if got != value:
            return f"{key} is {got!r}, expected {value!r}"
    return None


def text_encoder(checkpoint: Checkpoint, folder: str, *, projected: bool = False) -> Part:
    """A CLIP text encoder; ``projected``: with its pooled output projected (``text_embeds``)."""
    width, layers = checkpoint.need(folder, "hidden_size", int), _layers(checkpoint, folder)
    hidden = TensorSpec("last_hidden_state", "f32", ("B", "T", width))
    if projected:
        embeds = TensorSpec("text_embeds", "f32", ("B", checkpoint.need(folder, "projection_dim", int, 512)))
        first = (embeds, hidden)
    else:
        first = (hidden, TensorSpec("pooler_output", "f32", ("B", width)))
    return Part(
        folder,
        folder,
        inputs=(TensorSpec("input_ids", "i64", ("B", "T")),),
        outputs=(
            *first,
            *(TensorSpec(f"hidden_states.{i}", "f32", ("B", "T", width)) for i in range(layers + 1)),
        ),
        trace_sizes={"B": 3, "T": 20},
        cases=({"B": 1, "T": 77}, {"B": 2, "T": 77}, {"B": 1, "T": 16}, {"B": 2, "T": 16}),
        vocabulary=checkpoint.need(folder, "vocab_size", int, 49408),
    )


def _layers(checkpoint: Checkpoint, folder: str) -> int:
    """A text encoder's layers, each of which becomes an output."""
    layers = checkpoint.need(folder, "num_hidden_layers", int)
    if not 1 <= layers <= MAX_LAYERS:
        raise ExportError(f"{checkpoint.name}: {folder} has {layers} layers, expected 1 to {MAX_LAYERS}")
    return layers


def unet(checkpoint: Checkpoint, added: tuple[TensorSpec, ...] = ()) -> Part:
    """The U-Net; ``added``: inputs beside sample, timestep and encoder_hidden_states."""
    latent = checkpoint.need("vae", "latent_channels", int, 4)
    features = checkpoint.need("unet", "cross_attention_dim", int)
    return Part(
        "unet",
        "unet",
        inputs=(
            TensorSpec("sample", "f32", ("B", latent, *LATENTS)),
            TensorSpec("timestep", "f32", (1,)),
            TensorSpec("encoder_hidden_states", "f32", ("B", "T", features)),
            *added,
        ),
        outputs=(TensorSpec("out_sample", "f32", ("B", checkpoint.need("unet", "out_channels", int, 4), *LATENTS)),),
        trace_sizes={"B": 3, "H": 96, "W": 160, "T": 77},
        cases=tuple(case | {"T": 77 if case["H"] == 64 else 154} for case in PICTURES),
        share=4.0,
    )


def vae(checkpoint: Checkpoint) -> list[Part]:
    """The autoencoder's two halves. ExportError when a latent does not stand for 8 × 8 pixels."""
    latent = checkpoint.need("vae", "latent_channels", int, 4)
    levels = len(checkpoint.need("vae", "block_out_channels", list))
    if levels != 4:
        raise ExportError(f"{checkpoint.name}: the VAE has {levels} levels, expected 4 (8 pixels a latent)")
    trace_sizes = {"B": 3, "H": 96, "W": 160}
    picture = TensorSpec("sample", "f32", ("B", 3, "H", "W"))
    moments = TensorSpec("latent_parameters", "f32", ("B", 2 * latent, *LATENTS))
    latents = TensorSpec("latent_sample", "f32", ("B", latent, *LATENTS))
    return [
        Part("vae_encoder", "vae", (picture,), (moments,), trace_sizes, PICTURES),
        Part("vae_decoder", "vae", (latents,), (picture,), trace_sizes, PICTURES),
    ]


def text_facts(checkpoint: Checkpoint, folder: str, tokenizer: str) -> TextEncoder:
    """A text encoder whose last hidden state, through the final layer norm, conditions the denoiser."""
    return TextEncoder(
        component=folder,
        tokenizer=tokenizer,
        max_length=checkpoint.need(folder, "max_position_embeddings", int, 77),
        clip_skip=ClipSkip(_layers(checkpoint, folder), checkpoint.need(folder, "layer_norm_eps", float, 1e-5)),
        **_special_tokens(checkpoint, tokenizer),
    )


def penultimate_facts(checkpoint: Checkpoint, folder: str, tokenizer: str, pooled: str | None) -> TextEncoder:
    """A text encoder whose last hidden state but one, as it is, conditions the denoiser."""
    last = _layers(checkpoint, folder) - 1
    if last < 1:
        raise ExportError(f"{checkpoint.name}: {folder} has {last + 1} layers, expected at least 2")
    return TextEncoder(
        component=folder,
        tokenizer=tokenizer,
        max_length=checkpoint.need(folder, "max_position_embeddings", int, 77),
        hidden_states=f"hidden_states.{last}",
        pooled=pooled,
        clip_skip=ClipSkip(last),
        **_special_tokens(checkpoint, tokenizer),
    )


def final_layer_norm(state: Mapping[str, Any]) -> dict[str, Any]:
    """The constants that clip-skip needs, from a text encoder's state dict."""
    names = ("final_layer_norm.weight", "final_layer_norm.bias")
    return {name: next(value for key, value in state.items() if key.endswith(name)).numpy() for name in names}


def latent_space(checkpoint: Checkpoint) -> LatentSpace:
    """Scaling and default size, by the rules that hold for other exporters' directories too."""
    vae, unet = (Config(checkpoint.root, f"{name}/config.json", checkpoint.config(name)) for name in ("vae", "unet"))
    try:
        return foreign.latent_space(vae, unet)
    except BundleError as error:
        raise ExportError(error.message, error.fix) from None


def _special_tokens(checkpoint: Checkpoint, folder: str) -> dict[str, str]:
    try:
        tokens = special_tokens(checkpoint.root / folder)
    except BundleError as error:
        raise ExportError(error.message, "the checkpoint is damaged: download it again") from None
    return dict(zip(("bos_token", "eos_token", "pad_token"), tokens, strict=True))
