"""The first stage: the AutoencoderKL, from pictures to latents of an eighth the size and back."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from benchmarks.demo.draw import SIZE, draw
from benchmarks.demo.scenes import random_scene
from benchmarks.demo.training import Draws, Plan, pixels, train

CROPS = Plan(updates=5000, rate=2e-3, decay=0.3)
"""On crops of a quarter of a picture: what there is to learn is at the edges, and four cost what a picture does."""
WHOLE = Plan(updates=800, rate=4e-4, warmup=20, decay=0.8, ema=0.995)
"""Then on whole pictures: group norm and the attention in the middle see those in use."""

_CROP = 64
_KL = 2e-4


def train_vae(folder: Path, vae: Any, device: torch.device, *, crops: Plan = CROPS, whole: Plan = WHOLE) -> Any:
    """Train ``vae`` in place and return it, its ``scaling_factor`` set so that latents have standard deviation 1."""

    def loss_of(batch: torch.Tensor, chance: Draws) -> tuple[torch.Tensor, dict[str, float]]:
        posterior = vae.encode(batch).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=chance.torch).to(device)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        difference = decoded - batch
        squared = difference.square().mean()
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss = difference.abs().mean() + 2 * squared + _KL * kl
        return loss, {"psnr": float(10 * torch.log10(4 / squared.detach())), "kl": float(kl.detach())}

    def on_crops(_: int, chance: Draws) -> tuple[torch.Tensor, dict[str, float]]:
        pictures = []
        for _ in range(16):
            x, y = (chance.python.randrange(SIZE - _CROP + 1) for _ in range(2))
            pictures.append(draw(random_scene(chance.python), chance.python)[y : y + _CROP, x : x + _CROP])
        return loss_of(pixels(pictures, device), chance)

    def on_whole(_: int, chance: Draws) -> tuple[torch.Tensor, dict[str, float]]:
        return loss_of(pixels([draw(random_scene(chance.python), chance.python) for _ in range(8)], device), chance)

    vae.to(device, memory_format=torch.channels_last)
    train("vae-crops", folder, vae, crops, on_crops)
    train("vae-whole", folder, vae, whole, on_whole)
    rng = random.Random("scaling factor")
    with torch.no_grad():
        means = vae.encode(pixels([draw(random_scene(rng), rng) for _ in range(256)], device)).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / float(means.std()), 5))
    return vae


def reconstruction(vae: Any, device: torch.device, *, pictures: int = 256) -> float:
    """PSNR in dB of held-out pictures through the encoder (its mean) and the decoder; peak 1, over all their pixels."""
    rng = random.Random("reconstruction")
    squared = 0.0
    with torch.no_grad():
        for _ in range(pictures // 16):
            batch = pixels([draw(random_scene(rng, held_out=True), rng) for _ in range(16)], device)
            decoded = vae.decode(vae.encode(batch).latent_dist.mean).sample.clamp(-1, 1)
            squared += float((decoded - batch).square().mean()) / 4
    return float(-10 * torch.log10(torch.tensor(squared / (pictures // 16))))
