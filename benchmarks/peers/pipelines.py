"""What the runners of diffusers' own and of optimum's pipelines share: all are diffusers' loop over other networks.

Stages are seen by wrapping what the loop calls, on the loaded pipeline's own objects; nothing else of it is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from itertools import pairwise
from typing import Any, Protocol

from common import clock, scheduler_of  # type: ignore[import-not-found]


class Timeline(Protocol):
    """Marks at moments, and the seconds between two of them, which are asked for when all is done."""

    def mark(self) -> Any:
        """Now."""

    def settle(self) -> None:
        """Wait until everything that was asked for is done."""

    def between(self, start: Any, end: Any) -> float:
        """Seconds."""


class Host:
    """Work is done when a call returns: the processor's clock."""

    def mark(self) -> Any:
        return clock()

    def settle(self) -> None:
        pass

    def between(self, start: Any, end: Any) -> float:
        return float(end - start)


class Cuda:
    """Work is queued when a call returns. Marks are CUDA events in the same queue: they tell when the GPU got there.

    Waiting for the GPU at every mark instead would leave it idle after each, and be charged to the peer.
    """

    def __init__(self, device: str) -> None:
        import torch

        self._torch, self._device = torch, torch.device(device)

    def mark(self) -> Any:
        event = self._torch.cuda.Event(enable_timing=True)
        event.record(self._torch.cuda.current_stream(self._device))
        return event

    def settle(self) -> None:
        self._torch.cuda.synchronize(self._device)

    def between(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) / 1e3  # it tells milliseconds


class Watched:
    """A loaded pipeline, whose parts are timed, under a scheduler with the checkpoint's betas and spacing.

    ``post`` is diffusers' conversion to numpy. A step goes from one ``callback_on_step_end`` to the next, the first
    from the making of the progress bar, which is the last thing before the loop.
    """

    def __init__(self, pipe: Any, timeline: Timeline | None = None) -> None:
        self._pipe = pipe
        self._timeline: Timeline = timeline or Host()
        self._spans: dict[str, list[tuple[Any, Any]]] = {}
        self._marks: list[Any] = []
        self._config = pipe.scheduler.config
        pipe.set_progress_bar_config(disable=True)
        # A tokenizer is called by its class's __call__, which an attribute of the object would not hide.
        tokenizer = type(pipe.tokenizer)
        timed = self._timed("tokenize", tokenizer.__call__)
        pipe.tokenizer.__class__ = type(tokenizer.__name__, (tokenizer,), {"__call__": timed})
        pipe.text_encoder.forward = self._timed("text_encoder", pipe.text_encoder.forward)
        pipe.unet.forward = self._timed("network", pipe.unet.forward)
        pipe.vae.decode = self._timed("vae_decoder", pipe.vae.decode)
        pipe.image_processor.postprocess = self._timed("post", pipe.image_processor.postprocess)
        pipe.progress_bar = self._marked(pipe.progress_bar)

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
        """One batch, as ``serve`` answers it. Picture i starts from the noise of seed + i."""
        import numpy as np

        kind, options = scheduler_of(scheduler)
        self._pipe.scheduler = getattr(import_module("diffusers"), kind).from_config(self._config, **options)
        self._spans, self._marks = {}, []
        self._timeline.settle()
        started = clock()
        made = self._pipe(
            prompt=prompt,
            negative_prompt=negative_prompt,
            width=width,
            height=height,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=batch,
            latents=noise(seed, batch, height, width).to(self._pipe.unet.dtype),
            callback_on_step_end=self._mark,
            output_type="np",
        )
        self._timeline.settle()
        total = clock() - started
        if save is not None:
            np.save(save, made.images.astype(np.float32))
        between = self._timeline.between
        seconds = {name: [between(*span) for span in spans] for name, spans in self._spans.items()}
        sample: dict[str, Any] = {name: sum(spans) for name, spans in seconds.items() if name != "network"}
        sample["network"] = seconds["network"]
        sample["steps"] = [between(before, after) for before, after in pairwise(self._marks)]
        return {"samples": [{"total": total, **sample}], "wall": total}

    def _timed(self, stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = self._timeline.mark()
            try:
                return call(*args, **kwargs)
            finally:
                self._spans.setdefault(stage, []).append((started, self._timeline.mark()))

        return timed

    def _marked(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def marked(*args: Any, **kwargs: Any) -> Any:
            self._marks.append(self._timeline.mark())
            return call(*args, **kwargs)

        return marked

    def _mark(self, pipe: Any, step: int, timestep: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        self._marks.append(self._timeline.mark())
        return arguments


def noise(seed: int, batch: int, height: int, width: int) -> Any:
    """Latents, torch.float32[B,4,H/8,W/8], that sdrt starts from too.

    Drawn as float32 for every pipeline: what torch draws as bfloat16 from one seed is other noise.
    """
    import torch

    shape = (4, height // 8, width // 8)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(batch)])
