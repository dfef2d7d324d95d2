"""Serve optimum-intel's OpenVINO pipeline, from optimum-intel's own export, reshaped to one size before it is compiled.

Options: ``width``, ``height``, ``batch`` (that size; guidance is taken to be on), ``precision`` (OpenVINO's
INFERENCE_PRECISION_HINT, as ``f32``; else OpenVINO's own choice, which is bf16 where the CPU has it).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from common import clock, expect, expect_size, loaded, serve  # type: ignore[import-not-found]


class Runner:
    """optimum-intel's ``OVStableDiffusionPipeline``."""

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
        from pipelines import Watched  # type: ignore[import-not-found]

        pipeline = import_module("optimum.intel").OVStableDiffusionPipeline
        imported = clock()
        width, height, batch = self._fixed = options["width"], options["height"], options["batch"]
        config: dict[str, Any] = {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
        if cache is not None:
            config["CACHE_DIR"] = cache
        if (precision := options.get("precision")) is not None:
            config["INFERENCE_PRECISION_HINT"] = precision
        pipe = pipeline.from_pretrained(model, device="CPU", ov_config=config, compile=False, safety_checker=None)
        pipe.reshape(batch_size=1, height=height, width=width, num_images_per_prompt=batch)
        pipe.compile()
        self._watched = Watched(pipe)
        ran_in = str(pipe.unet.request.get_property("INFERENCE_PRECISION_HINT").to_string())
        answer = loaded(started, imported, "optimum-intel", "openvino", "diffusers", "torch")
        return {**answer, "precision": ran_in}

    def run(self, **request: Any) -> Mapping[str, Any]:
        expect_size(self._fixed, request["width"], request["height"], request["batch"])
        answer: Mapping[str, Any] = self._watched.run(**request)
        return answer


if __name__ == "__main__":
    serve(Runner)
