"""Serve stable-diffusion.cpp, by its Python binding, from the checkpoint.

Options: ``weights`` (its type of weights, as ``f16`` or ``q8_0``; else the checkpoint's). Convolutions' weights are f16
whatever is asked for.

Its DDIM ("trailing") takes other timesteps, and ends at another noise level, than DDIM with the checkpoint's spacing.
So it is given that DDIM's noise levels, and Euler's method: in the variables of this library, x / √ᾱ and
σ = √((1 - ᾱ) / ᾱ), a step of DDIM with η = 0 is a step of Euler (Song et al., arXiv 2010.02502, equation 13). Its first
latents are noise · σ where DDIM has noise · √(1 + σ²): 0.3 % less at 50 steps, 2 % at 5, and 15 % at 2. Its generator
``cpu`` gives torch's noise. Pictures of a batch are made one after another, each step as two network calls of batch 1.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import clock, expect, expect_ddim, loaded, serve  # type: ignore[import-not-found]

TEXT = re.compile(r"get_learned_condition completed, taking ([\d.]+)s")


class Runner:
    """stable-diffusion.cpp. Stages are what it logs, at the time it logs them."""

    def load(
        self,
        *,
        model: str,
        threads: int | None = None,
        options: Mapping[str, Any],
        device: str | None = None,
        engine: str | None = None,
        streams: int = 1,
    ) -> Mapping[str, Any]:
        expect(device, streams, options, "weights")
        started = clock()
        sd: Any = import_module("stable_diffusion_cpp")
        imported = clock()
        self._lines: list[tuple[float, str]] = []

        def log(level: int, text: bytes, data: Any) -> None:
            self._lines.append((clock(), text.decode("utf-8", errors="replace")))

        self._log = sd.sd_log_callback(log)  # kept, as C holds a pointer to it
        sd.sd_set_log_callback(self._log, None)
        self._schedule = json.loads(Path(model, "scheduler", "scheduler_config.json").read_text(encoding="utf-8"))
        self._model = sd.StableDiffusion(
            model_path=model,
            wtype=options.get("weights", "default"),
            n_threads=threads or len(os.sched_getaffinity(0)),  # its own choice is half of them
            rng_type="cpu",
            sampler_rng_type="cpu",
            vae_decode_only=True,
            verbose=False,
        )
        answer = loaded(started, imported, "stable-diffusion-cpp-python")
        return {**answer, "system": sd.sd_get_system_info().decode().strip()}

    def run(
        self,
        *,
        prompt: str,
        negative_prompt: str | None,
        width: int,
        height: int,
        num_inference_steps: int,
        guidance_scale: float,
        seed: int,
        batch: int,
        scheduler: str,
        save: str | None = None,
    ) -> Mapping[str, Any]:
        expect_ddim(scheduler)
        sigmas = ddim_sigmas(self._schedule, num_inference_steps)
        self._lines, marks = [], []
        started = clock()
        made = self._model.generate_image(
            prompt,
            negative_prompt=negative_prompt or "",
            width=width,
            height=height,
            sample_method="euler",
            sample_steps=num_inference_steps,
            sigmas=",".join(repr(sigma) for sigma in sigmas),
            cfg_scale=guidance_scale,
            seed=seed,
            batch_count=batch,
            progress_callback=lambda step, count, seconds: marks.append((step, clock())),
        )
        total = clock() - started
        if save is not None:
            import numpy as np

            np.save(save, np.stack([np.asarray(picture.convert("RGB"), np.float32) / 255 for picture in made]))
        found = [match for _, line in self._lines if (match := TEXT.search(line))]
        decoding, decoded = (
            next((at for at, line in self._lines if phrase in line), None)
            for phrase in ("decoding", "decode_first_stage completed")
        )
        sample = {
            "total": total,
            "text_encoder": float(found[0][1]) if found else None,
            # Step 0 says that a picture's loop begins; the seconds that it is called with are a running mean.
            "steps": [after - before for (_, before), (step, after) in pairwise(marks) if step > 0],
            "vae_decoder": decoded - decoding if decoding is not None and decoded is not None else None,
        }
        return {"samples": [sample], "wall": total}


def ddim_sigmas(config: Mapping[str, Any], steps: int) -> list[float]:
    """σ of DDIM's timesteps, spaced as the config says ("leading"), and last that of its final ᾱ: steps + 1 values."""
    count, first, last = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
    if config["beta_schedule"] != "scaled_linear" or config.get("timestep_spacing", "leading") != "leading":
        raise ValueError("expected beta_schedule scaled_linear and timestep_spacing leading, as SD 1.5 has them")
    roots = [math.sqrt(first) + (math.sqrt(last) - math.sqrt(first)) * i / (count - 1) for i in range(count)]
    kept, alphas = 1.0, []
    for root in roots:
        kept *= 1 - root * root
        alphas.append(kept)
    stride = count // steps
    timesteps = [i * stride + config.get("steps_offset", 0) for i in reversed(range(steps))]
    final = 1.0 if config.get("set_alpha_to_one", True) else alphas[0]
    return [math.sqrt((1 - alpha) / alpha) for alpha in [*(alphas[t] for t in timesteps), final]]


if __name__ == "__main__":
    serve(Runner)
