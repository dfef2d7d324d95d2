"""Serve diffusers' own pipeline on torch, from the checkpoint.

Options: ``bf16`` or ``fp16`` (true: weights and activations in that type, convolutions' memory in channels_last; else
float32; fp16 on a GPU only), ``compile`` (a mode of ``torch.compile``, such as ``reduce-overhead``, which records CUDA
graphs: the U-Net and the VAE's decoder are compiled at the first picture of a size).

Device: ``cpu`` or ``cuda:N``. On a GPU float32 is float32, without TF32; attention is torch's
``scaled_dot_product_attention``, which is diffusers' own choice; cuDNN times its convolutions at the first picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common import clock, expect, loaded, serve  # type: ignore[import-not-found]

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


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
        expect(device, streams, options, "bf16", "fp16", "compile", cuda=True)
        bf16, fp16, mode = options.get("bf16", False), options.get("fp16", False), options.get("compile")
        on_gpu = device not in (None, "cpu")
        if bf16 and fp16:
            raise ValueError("bf16 and fp16: choose one of them")
        if fp16 and not on_gpu:
            raise ValueError("fp16 is for GPUs: torch has few float16 kernels for a CPU; bf16, or neither, runs there")
        if mode is not None and mode not in MODES:
            raise ValueError(f"compile is {mode!r}, expected one of {', '.join(MODES)}")
        started = clock()
        import torch
        from diffusers import StableDiffusionPipeline
        from pipelines import Cuda, Watched  # type: ignore[import-not-found]

        imported = clock()
        if on_gpu and not torch.cuda.is_available():
            raise ValueError(f"torch {torch.__version__} finds no GPU: install its build for CUDA")
        if threads is not None:  # torch's own choice is one a core
            torch.set_num_threads(threads)
        if on_gpu:
            torch.cuda.set_device(device)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
            torch.backends.cudnn.benchmark = True
        kind = torch.bfloat16 if bf16 else torch.float16 if fp16 else torch.float32
        pipe = StableDiffusionPipeline.from_pretrained(model, torch_dtype=kind, safety_checker=None)
        if on_gpu:
            pipe.to(device)
        if bf16 or fp16:
            pipe.unet.to(memory_format=torch.channels_last)
            pipe.vae.to(memory_format=torch.channels_last)
        if mode is not None:
            pipe.unet.forward = torch.compile(pipe.unet.forward, mode=mode, fullgraph=True)
            pipe.vae.decode = torch.compile(pipe.vae.decode, mode=mode, fullgraph=True)
        self._watched = Watched(pipe, Cuda(str(device)) if on_gpu else None)
        answer: dict[str, Any] = dict(loaded(started, imported, "diffusers", "transformers", "torch"))
        if on_gpu:
            libraries = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
            answer["versions"] |= {name: str(version) for name, version in libraries.items()}
        return answer

    def run(self, **request: Any) -> Mapping[str, Any]:
        answer: Mapping[str, Any] = self._watched.run(**request)
        return answer


if __name__ == "__main__":
    serve(Runner)
