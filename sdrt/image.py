"""Pictures: any picture → RGB → the VAE's f32[1,3,H,W]; f32[B,H,W,3] in [0,1] ↔ PIL; PNG files with their settings.

Settings are written as A1111 writes them. What files are read, and within which limits, is in ``sdrt.image_file``.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from sdrt import image_file
from sdrt.errors import InputError
from sdrt.staging import replacing

logger = logging.getLogger("sdrt")

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""What undoes each EXIF orientation but 1, which is upright."""


def rgb(source: str | Path | Image.Image | NDArray[Any]) -> Image.Image:
    """Any picture → upright 8-bit RGB: a PNG, JPEG or WebP file, a PIL picture of any mode, or an array.

    Arrays are u8[H,W,3], u8[H,W] (grey) or floating point [H,W,3] in [0,1]. The orientation of the EXIF block is
    applied (of a file, that one alone; of a PIL picture without one, what Pillow takes from elsewhere).
    Transparency is dropped, as in diffusers, with a warning in the log. 16-bit grey is scaled to 8 bits; PIL's mode I
    counts as 16 bits, its mode F as 0 to 255. Raises InputError for what is no picture, damaged, or too large.
    """
    if isinstance(source, (str, Path)):
        picture, orientation = image_file.read(Path(source))
        return _upright_rgb(picture, orientation, str(source))
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        try:
            image_file.check_size(source.size)
            with image_file.quiet():
                source.load()
                orientation = _orientation(source)
        except image_file.Damaged as error:
            raise InputError(f"the picture {error}") from None
        except Exception as error:  # a picture that was opened and not yet read fails in any of Pillow's ways
            raise InputError(f"the picture cannot be used: {str(error)[:200] or type(error).__name__}") from None
        return _upright_rgb(source, orientation, "the picture")
    raise InputError(f"a picture is {type(source).__name__}, expected a file's path, a PIL picture or an array")


def to_sample(picture: Image.Image, size: tuple[int, int]) -> NDArray[np.float32]:
    """RGB picture → f32[1,3,H,W] in [-1,1] of ``size`` (width, height), by Lanczos where it differs.

    Equals diffusers' ``VaeImageProcessor.preprocess`` of that PIL picture. InputError unless it is RGB.
    """
    if picture.mode != "RGB":
        raise InputError(f"the picture's mode is {picture.mode}, expected RGB", "sdrt.image.rgb makes it so")
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    pixels = np.asarray(picture).astype(np.float32) / np.float32(255)
    sample = np.float32(2) * pixels - np.float32(1)
    return np.ascontiguousarray(sample.transpose(2, 0, 1)[None])


def _orientation(picture: Image.Image) -> int:
    """1 to 8, of a picture that somebody else opened."""
    exif = picture.info.get("exif")
    if isinstance(exif, bytes):
        return image_file.orientation(exif, "the picture")
    try:
        value = picture.getexif().get(image_file.TAG_ORIENTATION, 1)
        return value if type(value) is int and 1 <= value <= 8 else 1
    except Exception as error:
        logger.warning("the picture: its EXIF data is damaged (%s); the orientation is ignored", error)
        return 1


def _upright_rgb(picture: Image.Image, orientation: int, name: str) -> Image.Image:
    """A picture of any mode as RGB, turned upright, without the metadata that would turn it once more."""
    try:
        with image_file.quiet():
            if _is_transparent(picture):
                logger.warning("%s: is transparent in places; transparency is dropped", name)
            made = _to_rgb(picture)
            if orientation in _UPRIGHT:
                made = made.transpose(_UPRIGHT[orientation])
    except InputError as error:
        raise InputError(f"{name}: {error.message}", error.fix) from None
    except MemoryError:
        raise InputError(f"{name}: there is not enough memory to convert it", "give a smaller picture") from None
    except Exception as error:  # a mode without a conversion, or a palette that does not fit
        raise InputError(f"{name}: cannot be made RGB from mode {picture.mode}: {str(error)[:200]}") from None
    made.info = {}
    return made


def _is_transparent(picture: Image.Image) -> bool:
    """Whether some pixel is not opaque."""
    if not picture.has_transparency_data:
        return False
    if picture.mode.startswith("I;16"):  # which Pillow's conversion would clip
        return bool((np.asarray(picture) == picture.info["transparency"]).any())
    if picture.mode in ("La", "LA", "PA", "RGBa", "RGBA"):
        alpha = picture.getchannel(picture.getbands()[-1])
    else:
        alpha = picture.convert("RGBA").getchannel("A")
    low, _ = alpha.getextrema()
    return isinstance(low, (int, float)) and low < 255


def _to_rgb(picture: Image.Image) -> Image.Image:
    """A new picture. Pillow's ``convert`` clips what has more than 8 bits; here it is scaled."""
    mode = picture.mode
    if mode == "I" or mode.startswith("I;16"):
        grey = np.asarray(picture)
        if grey.min() < 0 or grey.max() > 65535:
            raise InputError(f"mode I holds {grey.min()} to {grey.max()}, expected 16 bits: 0 to 65535")
        return Image.fromarray(((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")
    if mode == "F":
        grey = np.asarray(picture)
        if not (grey.min() >= 0 and grey.max() <= 255):  # so put, NaN is refused too
            raise InputError(f"mode F holds {grey.min()} to {grey.max()}, expected 0 to 255")
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    if mode == "La":
        picture = picture.convert("LA")
    return picture.convert("RGB")  # of an RGB picture, a copy


def _from_array(array: NDArray[Any]) -> Image.Image:
    expected = "expected uint8[H,W,3], uint8[H,W], or floating point [H,W,3] in [0,1]"
    got = f"the picture is {array.dtype}{list(array.shape)}"
    grey = array.ndim == 2 and array.dtype == np.uint8
    if not (grey or (array.ndim == 3 and array.shape[2] == 3)):
        raise InputError(f"{got}, {expected}", "one picture a call, channels last")
    try:
        image_file.check_size((array.shape[1], array.shape[0]))
    except image_file.Damaged as error:
        raise InputError(f"the picture {error}") from None
    if array.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")
    if array.dtype not in (np.float16, np.float32, np.float64):
        raise InputError(f"{got}, {expected}")
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= 1):  # so put, NaN is refused too
        raise InputError(f"{got} from {low:g} to {high:g}, {expected}")
    return to_pil(array[None].astype(np.float32, copy=False))[0]


def from_sample(sample: NDArray[np.float32]) -> NDArray[np.float32]:
    """The VAE's sample f32[B,3,H,W] around [-1,1] → pictures f32[B,H,W,3] in [0,1]; as diffusers' VaeImageProcessor."""
    pictures = sample.astype(np.float32)  # one copy, worked on in place: fresh megabytes cost more than the arithmetic
    pictures *= np.float32(0.5)
    pictures += np.float32(0.5)
    return np.clip(pictures, 0, 1, out=pictures).transpose(0, 2, 3, 1)


def to_pil(pictures: NDArray[np.float32]) -> list[Image.Image]:
    """Pictures f32[B,H,W,3] in [0,1] → 8-bit RGB, rounded half to even as in diffusers."""
    scaled = pictures * np.float32(255)
    pixels = np.rint(scaled, out=scaled).astype(np.uint8).transpose(0, 3, 1, 2)
    # Channel by channel, as they lie in the decoder's sample: Pillow interleaves them several times as fast as numpy.
    planes = [[Image.fromarray(np.ascontiguousarray(plane)) for plane in picture] for picture in pixels]
    return [Image.merge("RGB", picture) for picture in planes]


def parameters_text(
    prompt: str, negative_prompt: str, *, steps: int, sampler: str, guidance_scale: float, seed: int,
    size: tuple[int, int], model: str, clip_skip: int = 0, eta: float | None = None,
    strength: float | None = None, rng: str = "CPU", guidance_rescale: float = 0.0,
    variation: tuple[int, float] | None = None, version: str,
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
    if eta is not None:
        fields["Eta"] = f"{eta:g}"
    if strength is not None:
        fields["Denoising strength"] = f"{strength:g}"
    if guidance_rescale:
        fields["CFG Rescale phi"] = f"{guidance_rescale:g}"  # as its extension calls it
    if variation is not None:
        fields["Variation seed"], fields["Variation seed strength"] = variation[0], f"{variation[1]:g}"
    if rng != "CPU":
        fields["RNG"] = rng
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
