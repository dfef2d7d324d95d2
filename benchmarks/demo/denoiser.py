"""The third stage: the U-Net, and the text encoder with it, learn to predict v from noisy latents and a caption."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.demo.draw import draw
from benchmarks.demo.networks import SCHEDULER
from benchmarks.demo.scenes import Scene, random_scene, training_caption
from benchmarks.demo.training import Draws, Plan, pixels, train
from benchmarks.demo.words import tokens

DENOISING = Plan(updates=8000, rate=1e-3, decay=0.3, warmup=200, ema=0.9995)
SCENES = 40_000
"""Pictures whose latents are computed once. Every one has a new caption each time it comes."""
BATCH = 48
DROPPED = 0.1
"""The share of captions that are empty: what guidance subtracts."""


class Denoiser(torch.nn.Module):
    """What is trained: one module, so that one state holds both."""

    def __init__(self, unet: Any, text_encoder: Any) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder


def scene_of(n: int) -> tuple[Scene, random.Random]:
    """The n-th scene for training, and what the n-th picture is drawn with."""
    rng = random.Random(f"scene/{n}")
    return random_scene(rng), rng


def latents(folder: Path, vae: Any, device: torch.device, *, scenes: int = SCENES) -> torch.Tensor:
    """Latents of all the pictures, ``float16[N, 4, 16, 16]``, standard deviation 1; kept in ``folder/latents.npy``."""
    file = folder / "latents.npy"
    if not file.exists():
        parts = []
        with torch.no_grad():
            for start in tqdm(range(0, scenes, 50), desc="latents", unit="batch", mininterval=5):
                batch = pixels([draw(*scene_of(n)) for n in range(start, start + 50)], device)
                parts.append((vae.encode(batch).latent_dist.mean * vae.config.scaling_factor).half().cpu())
        part = file.with_suffix(".part")
        with part.open("wb") as out:
            np.save(out, torch.cat(parts).contiguous().numpy())
        part.replace(file)
    found = torch.from_numpy(np.load(file))
    if len(found) != scenes:
        raise ValueError(f"{file}: holds latents of {len(found)} scenes, expected {scenes}: remove it")
    return found


def train_denoiser(
    folder: Path,
    unet: Any,
    text_encoder: Any,
    tokenizer: Any,
    pictures: torch.Tensor,
    device: torch.device,
    *,
    plan: Plan = DENOISING,
) -> None:
    """Train ``unet`` and ``text_encoder`` in place; both end with averaged weights."""  # fmt: skip
    betas = torch.linspace(SCHEDULER["beta_start"] ** 0.5, SCHEDULER["beta_end"] ** 0.5, 1000, dtype=torch.float64) ** 2
    alphas_cumprod = torch.cumprod(1 - betas, dim=0).float().to(device)
    model = Denoiser(unet, text_encoder).to(device)
    unet.to(memory_format=torch.channels_last)

    def loss_of(_: int, chance: Draws) -> tuple[torch.Tensor, dict[str, float]]:
        chosen = [chance.python.randrange(len(pictures)) for _ in range(BATCH)]
        captions = [
            "" if chance.python.random() < DROPPED else training_caption(scene_of(n)[0], chance.python)[0]
            for n in chosen
        ]
        clean = pictures[chosen].float().to(device).contiguous(memory_format=torch.channels_last)
        noise = torch.randn(clean.shape, generator=chance.torch).to(device)
        # One timestep from each 48th of the schedule: the same distribution with less scatter.
        spread = (torch.arange(BATCH) + torch.rand(BATCH, generator=chance.torch)) / BATCH
        timesteps = (spread * len(alphas_cumprod)).long().to(device)
        signal = alphas_cumprod[timesteps].sqrt().view(-1, 1, 1, 1)
        sigma = (1 - alphas_cumprod[timesteps]).sqrt().view(-1, 1, 1, 1)
        states = text_encoder(tokens(tokenizer, captions, device)).last_hidden_state
        predicted = unet(signal * clean + sigma * noise, timesteps, encoder_hidden_states=states).sample
        loss = (predicted - (signal * noise - sigma * clean)).square().mean()
        return loss, {}

    train("denoiser", folder, model, plan, loss_of, rates={"text_encoder": 0.3})
