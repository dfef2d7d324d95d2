"""sdrt as it is measured: ``python -m sdrt.bench.worker`` serves ``sdrt.bench.serve``'s protocol."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from sdrt.bench.serve import serve

if TYPE_CHECKING:
    from sdrt import GenerationRequest, Pipeline, Timings


class SdrtRunner:
    """Pipelines of one bundle, one a stream. Streams make their pictures at the same time, each in its own thread."""

    def load(
        self, model: str, engine: str | None, device: str | None, threads: int | None, options: Mapping[str, str],
        streams: int, cache: str | None = None, low_memory: bool = False,
    ) -> Mapping[str, Any]:  # fmt: skip
        started = time.perf_counter()
        from sdrt import Pipeline, __version__
        from sdrt.bench import facts

        imported = time.perf_counter()
        self.pipes = [
            self.opened(
                Pipeline.from_pretrained(
                    model, engine, device, threads=threads, options=options, cache=cache, low_memory=low_memory
                )
            )
            for _ in range(streams)
        ]
        loaded = time.perf_counter()
        self._pool = ThreadPoolExecutor(streams)
        versions = facts.versions(("numpy", *facts.engines(self.pipes[0].bundle, engine)))
        return {"import": imported - started, "load": loaded - imported, "versions": {"sdrt": __version__, **versions}}

    def opened(self, pipe: Pipeline) -> Pipeline:
        """A pipeline as it is measured: what a runner that inherits from this one may change."""
        return pipe

    def run(self, save: str | None = None, batch: int = 1, **arguments: Any) -> Mapping[str, Any]:
        from sdrt import GenerationRequest

        request = GenerationRequest(num_images_per_prompt=batch, output_type="np" if save else "pil", **arguments)
        started = time.perf_counter()
        if len(self.pipes) == 1:
            made = [_run(self.pipes[0], request)]
        else:
            made = list(self._pool.map(lambda pipe: _run(pipe, request), self.pipes))
        wall = time.perf_counter() - started
        if save:
            import numpy as np

            np.save(save, made[0][1])
        from sdrt.engine import DeviceMemory

        held = DeviceMemory.together(one for pipe in self.pipes for one in pipe.memory().values())
        return {"wall": wall, "samples": [stages(timings) for timings, _ in made], "held": held}


def _run(pipe: Pipeline, request: GenerationRequest) -> tuple[Timings, Any]:
    result = pipe.generate(request)
    return result.timings, result.images


def stages(timings: Timings) -> dict[str, Any]:
    """A generation's timings as a sample of the protocol."""
    return {
        "tokenize": timings.tokenize, "text_encoder": timings.text_encoder, "vae_encoder": timings.vae_encoder,
        "steps": list(timings.steps), "network": list(timings.network), "vae_decoder": timings.vae_decoder,
        "post": timings.post, "load": timings.load, "total": timings.total,
    }  # fmt: skip


if __name__ == "__main__":
    serve(SdrtRunner)
