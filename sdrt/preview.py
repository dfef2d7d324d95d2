"""Pictures while they are made: the predicted x0 of a step, by the VAE or by a linear map that was fitted to it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdrt import image
from sdrt.errors import Cancelled, InputError, SdrtError, quoted
from sdrt.pipeline import Pipeline
from sdrt.sheet import Cell, contact_sheet

logger = logging.getLogger("sdrt")

How = Literal["vae", "linear"]


class Linear:
    """A map of latents to colours, position by position: least squares on pictures that the VAE decoded.

    Latents of Stable Diffusion's VAEs are nearly such a map of small pictures; each VAE has its own, so that none is
    written down here.
    """

    def __init__(self, latents: NDArray[np.float32], pictures: NDArray[np.float32]) -> None:
        """latents f32[B,C,h,w]; pictures f32[B,8h,8w,3] in [0,1], of any factor."""
        small = _shrunk(pictures, latents.shape[2], latents.shape[3])
        self._map = np.linalg.lstsq(_with_one(latents), small.reshape(-1, 3), rcond=None)[0]

    def __call__(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """f32[B,h,w,3] in [0,1]."""
        batch, _, height, width = latents.shape
        colours: NDArray[np.float32] = np.clip(_with_one(latents) @ self._map, 0, 1).astype(np.float32)
        return colours.reshape(batch, height, width, 3)


def _with_one(latents: NDArray[np.float32]) -> NDArray[np.float32]:
    rows = np.moveaxis(latents, 1, -1).reshape(-1, latents.shape[1])
    return np.concatenate([rows, np.ones((len(rows), 1), np.float32)], axis=1)


def _shrunk(pictures: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    batch, tall, wide, colours = pictures.shape
    blocks = pictures.reshape(batch, height, tall // height, width, wide // width, colours)
    mean: NDArray[np.float32] = blocks.mean(axis=(2, 4))
    return mean


class Previews:
    """A ``callback_on_step_end`` that keeps a PNG of the predicted pictures up to date, every ``every`` steps.

    None after the last step, which the pictures themselves follow.
    A preview that cannot be made or written is told in the log once, and is no reason to stop.
    """

    def __init__(self, path: str | Path, every: int, how: How = "vae") -> None:
        if type(every) is not int or every < 1:
            raise InputError(f"every is {quoted(every)}, expected an integer of at least 1")
        if how not in get_args(How):
            raise InputError(f"how is {quoted(how)}, expected 'vae' or 'linear'")
        self.path, self.written = Path(path), 0
        self._every, self._how, self._failed = every, how, False
        self._linear: Linear | None = None

    def __call__(self, pipe: Pipeline, index: int, timestep: float, state: Mapping[str, Any]) -> None:
        if self._failed or (index + 1) % self._every or index + 1 == state["total"]:
            return
        try:
            pictures = self._pictures(pipe, state["predicted_x0"])
            shown = pictures[0] if len(pictures) == 1 else contact_sheet([[Cell(picture) for picture in pictures]])
            image.save_png(shown, self.path, f"preview after step {index + 1}, timestep {timestep:g}")
            self.written += 1
        except Cancelled:
            raise
        except SdrtError as error:
            self._failed = True
            logger.warning("no previews: %s", error)

    def _pictures(self, pipe: Pipeline, x0: NDArray[np.float32]) -> list[Image.Image]:
        made = self.written + 1
        if self._how == "vae" or self._linear is None or made & (made - 1) == 0:
            # By the VAE; a map is fitted anew at the first, second, fourth, … preview, as early ones have few colours.
            decoded = pipe.decode(x0, "np")
            if self._how == "linear":
                self._linear = Linear(x0, decoded)
            return image.to_pil(decoded)
        factor = pipe.bundle.manifest.latents.downscale
        small = image.to_pil(self._linear(x0))
        return [
            picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)
            for picture in small
        ]

    def remove(self) -> None:
        """Delete the file, once the pictures themselves are there."""
        if self.written:
            self.path.unlink(missing_ok=True)
