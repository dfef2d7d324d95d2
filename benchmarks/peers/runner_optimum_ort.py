"""Serve optimum's ONNX Runtime pipeline, from optimum's own ONNX export, with default session options."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from common import clock, expect, loaded, serve  # type: ignore[import-not-found]


class Runner:
    """optimum's ``ORTStableDiffusionPipeline``."""

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
        expect(device, streams, options)
        started = clock()
        from onnxruntime import SessionOptions
        from pipelines import Watched  # type: ignore[import-not-found]

        pipeline = import_module("optimum.onnxruntime").ORTStableDiffusionPipeline
        imported = clock()
        session_options = SessionOptions()
        if threads is not None:
            session_options.intra_op_num_threads = threads
        pipe = pipeline.from_pretrained(model, session_options=session_options, safety_checker=None)
        self._watched = Watched(pipe)
        answer: Mapping[str, Any] = loaded(
            started, imported, "optimum", "optimum-onnx", "onnxruntime", "diffusers", "torch"
        )
        return answer

    def run(self, **request: Any) -> Mapping[str, Any]:
        answer: Mapping[str, Any] = self._watched.run(**request)
        return answer


if __name__ == "__main__":
    serve(Runner)
