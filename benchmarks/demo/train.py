"""Train the demo checkpoint from nothing: three stages, each resumed where it was.

    python -m benchmarks.demo.train out/demo                   # on the CPU, or the GPU where there is one
    python -m benchmarks.demo.train out/demo --updates 3000    # a shorter third stage

Writes OUT/checkpoint, diffusers' layout with weights in float16. Stop it whenever you like: the same command goes on.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.demo import denoiser, networks, vae, words
from benchmarks.demo.training import Plan, device_of
from sdrt_export.testing import prefix_names


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder for the stages' states and the checkpoint")
    parser.add_argument("--device", help="cpu, cuda:0, ... (default: cuda where there is one)")
    parser.add_argument("--updates", type=int, default=denoiser.DENOISING.updates, help="of the third stage")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = device_of(args.device)
    run(args.out, device, Recipe(denoising=replace(denoiser.DENOISING, updates=args.updates)))


@dataclass(frozen=True)
class Recipe:
    """How long each stage is, and how many pictures the third one sees."""

    crops: Plan = vae.CROPS
    whole: Plan = vae.WHOLE
    reading: Plan = words.READING
    denoising: Plan = denoiser.DENOISING
    scenes: int = denoiser.SCENES


def run(out: Path, device: torch.device, recipe: Recipe) -> Path:
    """All three stages and the checkpoint; returns its folder."""
    out.mkdir(parents=True, exist_ok=True)
    autoencoder = vae.train_vae(out, networks.new_vae(), device, crops=recipe.crops, whole=recipe.whole)
    print(f"VAE: {vae.reconstruction(autoencoder, device):.1f} dB on held-out pictures")
    tokenizer = networks.write_tokenizer(out / "tokenizer")
    text_encoder = words.train_words(
        out, networks.new_text_encoder(len(tokenizer)), tokenizer, device, plan=recipe.reading
    )
    pictures = denoiser.latents(out, autoencoder, device, scenes=recipe.scenes)
    unet = networks.new_unet()
    denoiser.train_denoiser(out, unet, text_encoder, tokenizer, pictures, device, plan=recipe.denoising)
    return write_checkpoint(out / "checkpoint", autoencoder, unet, text_encoder)


def write_checkpoint(folder: Path, autoencoder: Any, unet: Any, text_encoder: Any) -> Path:
    """Write diffusers' layout, weights rounded to float16."""
    for name, model in (("vae", autoencoder), ("unet", unet), ("text_encoder", text_encoder)):
        model.to("cpu", torch.float16, memory_format=torch.contiguous_format).save_pretrained(folder / name)
    prefix_names(folder / "text_encoder" / "model.safetensors")
    networks.write_tokenizer(folder / "tokenizer")
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", networks.SCHEDULER)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", networks.SCHEDULER["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(folder / "model_index.json", index)
    return folder


def write_json(path: Path, value: Any) -> None:
    """The same bytes on every system: hashes are recorded of them."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
