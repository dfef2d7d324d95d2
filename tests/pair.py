"""The same model in sdrt and in diffusers, float32: the same arguments to both."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from sdrt.pipeline import Pipeline

SCHEDULERS = {
    "DDIM": ("DDIMScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {"use_karras_sigmas": False}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
}  # fmt: skip


def load_diffusers(checkpoint: Path) -> Any:
    """The checkpoint's pipeline, quiet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = diffusers.DiffusionPipeline.from_pretrained(checkpoint)
    theirs.set_progress_bar_config(disable=True)
    return theirs


@dataclass(frozen=True)
class Pair:
    """The same model in sdrt and in diffusers."""

    ours: Pipeline
    theirs: Any

    def both(self, scheduler: str | None, seed: int, **arguments: Any) -> tuple[np.ndarray, np.ndarray]:
        """(diffusers', our) pictures f32[B,H,W,3] for the same arguments; each picture has a generator of its own.

        What is not given is each one's own default: guidance is 7.5, and 5 for SDXL.
        """
        config = dict(self.ours.scheduler_config)
        if scheduler is not None:
            class_name, options = SCHEDULERS[scheduler]
            config = {**config, **options, "_class_name": class_name}
        self.theirs.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        count = len(arguments["prompt"]) if isinstance(arguments["prompt"], list) else 1
        generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = np.asarray(self.theirs(generator=generators, output_type="np", **arguments).images)
        return expected, self.ours(**arguments, seed=seed, scheduler=scheduler, output_type="np").images
