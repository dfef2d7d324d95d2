"""Checkpoints with random weights, made from the real diffusers and transformers classes.

No trained weights are needed to prove that a graph computes what torch computes. What random weights hide, this
module takes care of: norms and biases are random too (freshly initialised ones are 1 and 0, which hides a lost
weight), and cross-attention is scaled up until the prompt and the guidance scale really move the picture (freshly
initialised text conditioning is so weak that a wrong guidance scale goes unnoticed).

    python -m sdrt_export.testing OUT --size tiny --vocabulary tests/data/clip_bpe_simple_vocab_16e6.txt.gz
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

_TINY_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
_TINY_VAE = {"block_out_channels": (8, 16, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 128}
_FULL_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32,
             "sample_size": 512}  # fmt: skip

# Four levels (SDXL: three), as in the real models, so that odd sizes go through the same down- and upsampling.
SIZES: dict[tuple[str, str], dict[str, Any]] = {
    ("sd1", "tiny"): {
        "unet": {"block_out_channels": (16, 32, 32, 32), "layers_per_block": 1, "cross_attention_dim": 32,
                 "attention_head_dim": 4, "norm_num_groups": 8, "sample_size": 16},
        "vae": _TINY_VAE,
        "text": [_TINY_TEXT],
    },
    ("sd1", "full"): {
        "unet": {"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "cross_attention_dim": 768,
                 "attention_head_dim": 8, "norm_num_groups": 32, "sample_size": 64},
        "vae": _FULL_VAE,
        "text": [{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}],
    },
    ("sd2", "tiny"): {
        "unet": {"block_out_channels": (16, 32, 32, 32), "layers_per_block": 1, "cross_attention_dim": 32,
                 "attention_head_dim": (2, 4, 4, 8), "norm_num_groups": 8, "sample_size": 16},
        "vae": _TINY_VAE,
        "text": [_TINY_TEXT],
    },
    ("sd2", "full"): {
        "unet": {"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "cross_attention_dim": 1024,
                 "attention_head_dim": (5, 10, 20, 20), "norm_num_groups": 32, "sample_size": 64},
        "vae": _FULL_VAE,
        "text": [{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}],
    },
    ("sdxl", "tiny"): {
        "unet": {"block_out_channels": (16, 32, 32), "layers_per_block": 1, "cross_attention_dim": 32 + 40,
                 "attention_head_dim": (2, 4, 4), "transformer_layers_per_block": (1, 1, 2), "norm_num_groups": 8,
                 "sample_size": 16, "addition_time_embed_dim": 8,
                 "projection_class_embeddings_input_dim": 24 + 6 * 8},
        "vae": _TINY_VAE | {"scaling_factor": 0.13025, "force_upcast": True},
        "text": [_TINY_TEXT, {"hidden_size": 40, "intermediate_size": 80, "num_hidden_layers": 4,
                              "num_attention_heads": 4, "projection_dim": 24}],
    },
}  # fmt: skip

_LEVELS: dict[str, dict[str, Any]] = {
    "sd1": {
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    },
    "sdxl": {
        "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
        "use_linear_projection": True, "addition_embed_type": "text_time",
    },
}  # fmt: skip
_LEVELS["sd2"] = _LEVELS["sd1"] | {"use_linear_projection": True, "upcast_attention": True}

SD15_SCHEDULER: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
    "trained_betas": None,
}
"""scheduler_config.json of Stable Diffusion 1.5, and, but for the prediction type, of 2-base."""

SD2V_SCHEDULER = SD15_SCHEDULER | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
"""scheduler_config.json of Stable Diffusion 2 (768 pixels), which predicts v."""
SD2V_SCHEDULER.pop("skip_prk_steps")

SDXL_SCHEDULER: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "interpolation_type": "linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "use_karras_sigmas": False,
    "trained_betas": None,
    "clip_sample": False,
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
"""scheduler_config.json of Stable Diffusion XL base 1.0."""


def write_clip_vocabulary(gz: Path, folder: Path) -> None:
    """Write ``vocab.json`` and ``merges.txt`` from OpenAI's ``bpe_simple_vocab_16e6.txt.gz``.

    The construction is that of CLIP's ``simple_tokenizer.py``: 256 byte symbols, the same with ``</w>``, one entry
    a merge, two special tokens; 49,408 in all.
    """
    lines = gzip.decompress(gz.read_bytes()).decode("utf-8").split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    vocabulary = [*symbols, *(s + "</w>" for s in symbols), *("".join(m.split()) for m in merges)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocabulary)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")


def make_checkpoint(
    out: Path, vocabulary: Path, *, architecture: str = "sd1", size: str = "tiny", seed: int = 0,
    scheduler: dict[str, Any] | None = None, cross_attention_gain: float = 4.0,
) -> Path:  # fmt: skip
    """Write a checkpoint in diffusers' layout with random weights in float32.

    ``architecture`` is ``sd1``, ``sd2`` or ``sdxl``; ``size`` is ``tiny`` (about 1 MB) or ``full`` (SD 1.5: 4.2 GB;
    SD 2: 5.1 GB). ``scheduler``: None for the one that the real model ships with (SD 2: the 2-base's).
    ``cross_attention_gain`` multiplies the value projections of cross-attention.
    """
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    sizes = SIZES[architecture, size]
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**_LEVELS[architecture], **sizes["unet"])
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4,
        **sizes["vae"],
    )  # fmt: skip
    common = {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 49406, "eos_token_id": 49407}
    kinds = (
        (CLIPTextModel, "text_encoder", {"hidden_act": "gelu" if architecture == "sd2" else "quick_gelu"}),
        (CLIPTextModelWithProjection, "text_encoder_2", {"hidden_act": "gelu"}),
    )
    texts = {
        folder: kind(CLIPTextConfig(**{"projection_dim": 768, "pad_token_id": 49407} | common | activation | own))
        for (kind, folder, activation), own in zip(kinds, sizes["text"], strict=False)
    }
    for model in (unet, vae, *texts.values()):
        _randomize_norms_and_biases(model, torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".attn2.to_v." in name:
                parameter.mul_(cross_attention_gain)
        for text in texts.values():  # transformers initialises it at 0.02: the words would not count
            text.get_input_embeddings().weight.mul_(30.0)
    unet.save_pretrained(out / "unet", max_shard_size="20GB")
    vae.save_pretrained(out / "vae")
    for folder, text in texts.items():
        text.save_pretrained(out / folder)
        prefix_names(out / folder / "model.safetensors")
    # OpenCLIP's encoders (SD 2, SDXL's second) are padded with "!", whose id is 0; OpenAI's with the end token.
    tokenizers = {"tokenizer": "!" if architecture == "sd2" else "<|endoftext|>", "tokenizer_2": "!"}
    for folder, pad in list(tokenizers.items())[: len(texts)]:
        _write_tokenizer(vocabulary, out / folder, pad)
    chosen = scheduler or (SDXL_SCHEDULER if architecture == "sdxl" else SD15_SCHEDULER)
    (out / "scheduler").mkdir(exist_ok=True)
    (out / "scheduler" / "scheduler_config.json").write_text(json.dumps(chosen, indent=2))
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "scheduler": ["diffusers", chosen["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if architecture == "sdxl":
        index |= {
            "_class_name": "StableDiffusionXLPipeline",
            "image_encoder": [None, None],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "force_zeros_for_empty_prompt": True,
        }
    else:
        index |= {"safety_checker": [None, None], "requires_safety_checker": False}
    (out / "model_index.json").write_text(json.dumps(index, indent=2))
    return out


def _write_tokenizer(vocabulary: Path, folder: Path, pad_token: str) -> None:
    from transformers import CLIPTokenizer

    write_clip_vocabulary(vocabulary, folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token=pad_token)
    tokenizer.save_pretrained(folder)
    write_clip_vocabulary(vocabulary, folder)  # transformers 5 keeps tokenizer.json alone


def prefix_names(path: Path) -> None:
    """Call CLIP's weights ``text_model.…``, as published checkpoints do: transformers 5 writes them without.

    It reads both; transformers 4 takes names without the prefix for unknown ones, and initialises the network anew.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    own = ("text_model.", "text_projection.")
    named = {name if name.startswith(own) else f"text_model.{name}": tensor for name, tensor in state.items()}
    save_file(named, path, metadata={"format": "pt"})


def _randomize_norms_and_biases(model: Any, generator: Any) -> None:
    import torch

    norms = (torch.nn.GroupNorm, torch.nn.LayerNorm)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, norms):
                module.weight.add_(0.2 * torch.randn(module.weight.shape, generator=generator))
            if isinstance(module, (*norms, torch.nn.Linear, torch.nn.Conv2d)) and module.bias is not None:
                scale = 0.2 if isinstance(module, norms) else 0.1
                module.bias.add_(scale * torch.randn(module.bias.shape, generator=generator))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make a Stable Diffusion checkpoint with random weights.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--architecture", choices=sorted({architecture for architecture, _ in SIZES}), default="sd1")
    parser.add_argument("--size", choices=sorted({size for _, size in SIZES}), default="tiny")
    parser.add_argument("--vocabulary", type=Path, required=True, help="bpe_simple_vocab_16e6.txt.gz")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if (args.architecture, args.size) not in SIZES:
        parser.error(f"there is no {args.size} {args.architecture}")
    make_checkpoint(args.out, args.vocabulary, architecture=args.architecture, size=args.size, seed=args.seed)


if __name__ == "__main__":
    main()
