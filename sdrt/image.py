"""Pictures: f32[B,H,W,3] in [0,1] ↔ PIL, and PNG files that carry their settings as A1111 writes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from sdrt.errors import InputError
from sdrt.staging import replacing


def from_sample(sample: NDArray[np.float32]) -> NDArray[np.float32]:
    """The VAE's sample f32[B,3,H,W] around [-1,1] → pictures f32[B,H,W,3] in [0,1]; as diffusers' VaeImageProcessor."""
    pictures = np.clip(sample / 2 + np.float32(0.5), 0, 1).astype(np.float32, copy=False).transpose(0, 2, 3, 1)
    return pictures


def to_pil(pictures: NDArray[np.float32]) -> list[Image.Image]:
    """Pictures f32[B,H,W,3] in [0,1] → 8-bit RGB, rounded half to even as in diffusers."""
    return [Image.fromarray(picture) for picture in (pictures * 255).round().astype(np.uint8)]


def parameters_text(
    prompt: str, negative_prompt: str, *, steps: int, sampler: str, guidance_scale: float, seed: int,
    size: tuple[int, int], model: str, clip_skip: int = 0, version: str,
) -> str:  # fmt: skip
    """The text of A1111's ``parameters`` chunk: the prompts, then one line of ``Name: value`` pairs."""
    fields = {
        "Steps": steps,
        "Sampler": sampler,
        "CFG scale": f"{guidance_scale:g}",
        "Seed": seed,
        "Size": f"{size[0]}x{size[1]}",
        "Model": _quoted(model),
    }
    if clip_skip:
        fields["Clip skip"] = clip_skip + 1  # A1111 counts the layer that it stops at
    fields["Version"] = f"sdrt {version}"
    lines = [prompt]
    if negative_prompt:
        lines.append(f"Negative prompt: {negative_prompt}")
    lines.append(", ".join(f"{name}: {value}" for name, value in fields.items()))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    """A1111 quotes, as JSON does, a value that holds one of its separators."""
    return json.dumps(value, ensure_ascii=False) if any(c in value for c in ",:\n") else value


def save_png(picture: Image.Image, path: Path, parameters: str) -> None:
    """Write a PNG whole or not at all, with ``parameters`` as a text chunk. InputError when it cannot be written."""
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", parameters)  # as tEXt, or as iTXt where Latin-1 does not hold it
    try:
        with replacing(path) as file:
            picture.save(file, format="PNG", pnginfo=info)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}", "choose another --output") from None
