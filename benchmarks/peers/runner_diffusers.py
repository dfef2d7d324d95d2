"""Serve diffusers' own pipeline on torch, from the checkpoint.

Options: ``bf16`` (true: weights and activations in bfloat16, convolutions' memory in channels_last; else float32).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common import clock, expect, loaded, serve  # type: ignore[import-not-found]


class Runner:
    """diffusers' ``StableDiffusionPipeline``."""

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
        expect(device, streams, options, "bf16")
        started = clock()
        import torch
        from diffusers import StableDiffusionPipeline
        from pipelines import Watched  # type: ignore[import-not-found]

        imported = clock()
        if threads is not None:  # torch's own choice is one a core
            torch.set_num_threads(threads)
        bf16 = options.get("bf16", False)
        pipe = StableDiffusionPipeline.from_pretrained(
            model, torch_dtype=torch.bfloat16 if bf16 else torch.float32, safety_checker=None
        )
        if bf16:
            pipe.unet.to(memory_format=torch.channels_last)
            pipe.vae.to(memory_format=torch.channels_last)
        self._watched = Watched(pipe)
        answer: Mapping[str, Any] = loaded(started, imported, "diffusers", "transformers", "torch")
        return answer

    def run(self, **request: Any) -> Mapping[str, Any]:
        answer: Mapping[str, Any] = self._watched.run(**request)
        return answer


if __name__ == "__main__":
    serve(Runner)
