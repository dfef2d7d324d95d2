"""Serve OpenVINO GenAI's ``Text2ImagePipeline``, from optimum-intel's export, reshaped to one size, then compiled.

Options: as optimum-intel's runner. Stages are GenAI's own performance metrics, which name neither tokenizing nor what
follows the decoder. Its pictures have 8 bits. When a picture is saved, it starts from torch's noise, so that it can be
compared; else from GenAI's own generator, as importing torch for timing alone would be charged to GenAI.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from common import clock, expect, expect_ddim, expect_size, loaded, serve  # type: ignore[import-not-found]


class Runner:
    """OpenVINO GenAI."""

    def load(
        self,
        *,
        model: str,
        threads: int | None = None,
        options: Mapping[str, Any],
        device: str | None = None,
        engine: str | None = None,
        streams: int = 1,
        cache: str | None = None,
    ) -> Mapping[str, Any]:
        expect(device, streams, options, "width", "height", "batch", "precision")
        started = clock()
        genai: Any = import_module("openvino_genai")
        imported = clock()
        width, height, batch = self._fixed = options["width"], options["height"], options["batch"]
        config: dict[str, Any] = {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
        if cache is not None:
            config["CACHE_DIR"] = cache
        if (precision := options.get("precision")) is not None:
            config["INFERENCE_PRECISION_HINT"] = precision
        self._pipe = genai.Text2ImagePipeline(model)
        scheduler = Path(model, "scheduler", "scheduler_config.json")
        self._pipe.set_scheduler(genai.Scheduler.from_config(scheduler, genai.Scheduler.Type.DDIM))
        # Guidance is on or off in the compiled network; how much is said with each request.
        self._pipe.reshape(batch, height, width, self._pipe.get_generation_config().guidance_scale)
        self._pipe.compile("CPU", **config)
        answer: Mapping[str, Any] = loaded(started, imported, "openvino-genai", "openvino")
        return answer

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
        import numpy as np

        expect_ddim(scheduler)
        expect_size(self._fixed, width, height, batch)
        arguments: dict[str, Any] = {} if negative_prompt is None else {"negative_prompt": negative_prompt}
        arguments["generator"] = generator(seed, batch, given=save is not None)  # may import torch: not GenAI's time
        started = clock()
        made = self._pipe.generate(
            prompt,
            width=width,
            height=height,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=batch,
            **arguments,
        )
        total = clock() - started
        if save is not None:
            np.save(save, made.data.astype(np.float32) / 255)
        metrics = self._pipe.get_performance_metrics()
        sample = {  # milliseconds, and microseconds in the raw metrics
            "total": total,
            "text_encoder": sum(metrics.get_text_encoder_infer_duration().values()) / 1e3,
            "steps": [span / 1e6 for span in metrics.raw_metrics.iteration_durations],
            "network": [span / 1e6 for span in metrics.raw_metrics.unet_inference_durations],
            "vae_decoder": metrics.get_vae_decoder_infer_duration() / 1e3,
        }
        return {"samples": [sample], "wall": total}


def generator(seed: int, batch: int, *, given: bool) -> Any:
    """GenAI's generator: of the noise that sdrt starts from, picture i from seed + i, or its own."""
    genai: Any = import_module("openvino_genai")
    if not given:
        return genai.CppStdGenerator(seed)
    import numpy as np

    openvino: Any = import_module("openvino")

    class Pictures(genai.Generator):
        def __init__(self) -> None:
            super().__init__()
            self.seed(seed)

        def seed(self, new_seed: int) -> None:
            self._pictures = [genai.TorchGenerator(new_seed + i) for i in range(batch)]

        def next(self) -> float:
            # GenAI's base class wants it; were it called after all, the pictures would not be those of the same noise.
            raise NotImplementedError("DDIM draws nothing after the latents")

        def randn_tensor(self, shape: Any) -> Any:
            one = openvino.Shape([1, *list(shape)[1:]])
            self._kept = np.concatenate([picture.randn_tensor(one).data for picture in self._pictures])
            return openvino.Tensor(self._kept)

    return Pictures()


if __name__ == "__main__":
    serve(Runner)
