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

SIZES: dict[str, dict[str, Any]] = {
    # Four levels, as in SD 1.x, so that odd sizes go through the same down- and upsampling as in the real model.
    "tiny": {
        "unet": {"block_out_channels": (16, 32, 32, 32), "layers_per_block": 1, "cross_attention_dim": 32,
                 "attention_head_dim": 4, "norm_num_groups": 8, "sample_size": 16},
        "vae": {"block_out_channels": (8, 16, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 128},
        "text": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
    },
    "full": {
        "unet": {"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "cross_attention_dim": 768,
                 "attention_head_dim": 8, "norm_num_groups": 32, "sample_size": 64},
        "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32,
                "sample_size": 512},
        "text": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    },
}  # fmt: skip

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
"""scheduler_config.json of Stable Diffusion 1.5."""


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
    out: Path, vocabulary: Path, *, size: str = "tiny", seed: int = 0, scheduler: dict[str, Any] | None = None,
    cross_attention_gain: float = 4.0,
) -> Path:  # fmt: skip
    """Write a Stable Diffusion 1.x checkpoint in diffusers' layout with random weights in float32.

    ``size`` is ``tiny`` (about 1 MB) or ``full`` (the SD 1.5 architecture, 4.2 GB). ``cross_attention_gain``
    multiplies the value projections of cross-attention.
    """
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    sizes = SIZES[size]
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        **sizes["unet"],
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4,
        **sizes["vae"],
    )  # fmt: skip
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408, max_position_embeddings=77, hidden_act="quick_gelu", projection_dim=768,
            bos_token_id=49406, eos_token_id=49407, pad_token_id=49407, **sizes["text"],
        )
    )  # fmt: skip
    for model in (unet, vae, text):
        _randomize_norms_and_biases(model, torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".attn2.to_v." in name:
                parameter.mul_(cross_attention_gain)
        text.get_input_embeddings().weight.mul_(30.0)  # transformers initialises it at 0.02: the words would not count
    unet.save_pretrained(out / "unet", max_shard_size="20GB")
    vae.save_pretrained(out / "vae")
    text.save_pretrained(out / "text_encoder")
    _prefix_names(out / "text_encoder" / "model.safetensors")
    write_clip_vocabulary(vocabulary, out / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer", model_max_length=77)
    tokenizer.save_pretrained(out / "tokenizer")
    write_clip_vocabulary(vocabulary, out / "tokenizer")  # transformers 5 keeps tokenizer.json alone
    (out / "scheduler").mkdir(exist_ok=True)
    (out / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler or SD15_SCHEDULER, indent=2))
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
        "scheduler": ["diffusers", (scheduler or SD15_SCHEDULER)["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (out / "model_index.json").write_text(json.dumps(index, indent=2))
    return out


def _prefix_names(path: Path) -> None:
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
    parser = argparse.ArgumentParser(description="Make a Stable Diffusion 1.x checkpoint with random weights.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--vocabulary", type=Path, required=True, help="bpe_simple_vocab_16e6.txt.gz")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_checkpoint(args.out, args.vocabulary, size=args.size, seed=args.seed)


if __name__ == "__main__":
    main()
