"""One request: every parameter of a generation, its default and its check, for Python call, CLI and files alike."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdrt import image
from sdrt.bundle import MAX_GUIDANCE
from sdrt.errors import InputError, quoted
from sdrt.image_file import MAX_SIDE
from sdrt.noise import MAX_SEED, Rng
from sdrt.schedulers.options import MAX_VALUES
from sdrt.schedulers.tables import by_hand

logger = logging.getLogger("sdrt")

OutputType = Literal["pil", "np", "latent"]
SampleMode = Literal["sample", "argmax"]
InitImage = str | Path | Image.Image | NDArray[Any]

MAX_PROMPT = 20_000
"""Characters. Far beyond what any text encoder takes; a guard against a file passed as a prompt."""
MAX_PICTURES = 1024
MAX_GROWTH = 4
"""How many times the model's own number of pixels a picture may have before its size must be asked for."""


class Arguments(TypedDict, total=False):
    """The keyword arguments of ``Pipeline.__call__`` and ``stream``: GenerationRequest's fields after ``prompt``."""

    negative_prompt: str | Sequence[str] | None
    width: int | None
    height: int | None
    num_inference_steps: int
    guidance_scale: float | None
    guidance_rescale: float
    guidance_interval: tuple[float, float] | None
    num_images_per_prompt: int
    seed: int | None
    rng: Rng
    variation_seed: int | None
    variation_strength: float
    latents: NDArray[np.float32] | None
    scheduler: str | Mapping[str, Any] | None
    eta: float | None
    timesteps: Sequence[float] | None
    sigmas: Sequence[float] | None
    clip_skip: int
    truncate: bool
    output_type: OutputType
    image: InitImage | Sequence[InitImage] | None
    strength: float
    sample_mode: SampleMode
    original_size: tuple[int, int] | None
    crops_coords_top_left: tuple[int, int]
    target_size: tuple[int, int] | None


@dataclass(frozen=True)
class GenerationRequest:
    """Argument names are diffusers'.

    prompt, negative_prompt: a text, or a list of texts (a batch). width, height: pixels, None for the model's own size.
    num_inference_steps ≥ 1. guidance_scale: 1 or less runs the network once a step, without the negative prompt; None
    for the model's own. num_images_per_prompt ≥ 1. seed: picture i of the batch has seed + i; None draws one. latents:
    f32[B,C,H/8,W/8], standard normal, instead of seeded noise. scheduler: a name, a config dict, or None for the
    model's own. eta: how much fresh noise each step draws, 0 to 1, for schedulers that can be told (DDIM, TCD, DPM++ 2S
    a); None for the scheduler's own. timesteps, sigmas: where the steps lie, falling, in training steps or as noise
    levels, for schedulers that can be told; they stand in for num_inference_steps. clip_skip: how many of the text
    encoder's last layers to leave out for the prompt (for the negative prompt none, as in diffusers). truncate: cut a
    prompt that is too long, with a warning, instead of refusing it. output_type: "pil", "np" (f32[B,H,W,3] in [0,1]) or
    "latent" (f32[B,C,H/8,W/8]).

    guidance_rescale: 0 to 1, how far the guided prediction is given the deviation of the prompt's own, picture by
    picture (arXiv 2305.08891, section 3.4). guidance_interval: (low, high) noise levels σ, guidance only in between;
    elsewhere the network runs for the prompt alone (arXiv 2404.07724). Both only with a guidance_scale above 1.

    rng: whose noise: "cpu" (torch's, as diffusers'), "cuda" (torch's on CUDA, A1111's "NV"), "numpy". variation_seed,
    variation_strength: mix so much (0 to 1) of another seed's noise into the first latents, along the sphere; then all
    pictures of a batch have ``seed``, and picture i the variation seed + i, as in A1111.

    image: start from a picture (image to image): a file, a PIL picture or an array (see ``sdrt.image.rgb``), or a list,
    one a prompt; all pictures of a prompt start from its own. Without width and height the picture's own size counts,
    rounded down to what the model can; with one of them the other follows the picture's shape. strength in (0, 1]: the
    part of the steps that is run on it; 1 keeps almost nothing. sample_mode: "sample" draws the picture's latents from
    the encoder's distribution, as diffusers does; "argmax" takes its mean.

    original_size, crops_coords_top_left, target_size: (height, width) or (top, left) in pixels, for models that are
    told them (SDXL); None for the picture's own size.

    Raises InputError for a value out of range.
    """

    prompt: str | Sequence[str]
    negative_prompt: str | Sequence[str] | None = None
    width: int | None = None
    height: int | None = None
    num_inference_steps: int = 50
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    num_images_per_prompt: int = 1
    seed: int | None = None
    rng: Rng = "cpu"
    variation_seed: int | None = None
    variation_strength: float = 0.0
    latents: NDArray[np.float32] | None = field(default=None, compare=False)
    scheduler: str | Mapping[str, Any] | None = None
    eta: float | None = None
    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None
    clip_skip: int = 0
    truncate: bool = False
    output_type: OutputType = "pil"
    image: InitImage | Sequence[InitImage] | None = field(default=None, compare=False)
    strength: float = 0.8
    sample_mode: SampleMode = "sample"
    original_size: tuple[int, int] | None = None
    crops_coords_top_left: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None
    prompts: tuple[str, ...] = field(init=False)
    """One a picture."""
    negative_prompts: tuple[str, ...] = field(init=False)
    pictures: tuple[Image.Image, ...] = field(init=False, compare=False)
    """RGB, one a picture to make; none for text to image."""

    def __post_init__(self) -> None:
        prompts = _texts("prompt", self.prompt)
        negative = _texts("negative_prompt", "" if self.negative_prompt is None else self.negative_prompt)
        if len(negative) == 1:
            negative = negative * len(prompts)
        if len(negative) != len(prompts):
            raise InputError(
                f"negative_prompt has {len(negative)} texts for {len(prompts)} prompts", "give one, or as many"
            )
        self._count_steps()
        for name in ("num_inference_steps", "num_images_per_prompt", "clip_skip", "width", "height", "seed"):
            object.__setattr__(self, name, _integer(getattr(self, name)))
        for name, least in (("num_inference_steps", 1), ("num_images_per_prompt", 1), ("clip_skip", 0)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= MAX_VALUES:
                raise InputError(f"{name} is {quoted(value)}, expected an integer of {least} to {MAX_VALUES}")
        for name in ("width", "height"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 1 <= value <= MAX_SIDE):
                raise InputError(f"{name} is {quoted(value)}, expected 1 to {MAX_SIDE} pixels")
        scale = self.guidance_scale
        if scale is not None and not (_is_number(scale) and -MAX_GUIDANCE <= scale <= MAX_GUIDANCE):
            raise InputError(f"guidance_scale is {quoted(scale)}, expected a finite number, at most {MAX_GUIDANCE}")
        self._check_guidance()
        self._check_guided()
        self._check_noise()
        eta = self.eta
        if eta is not None and not (_is_number(eta) and 0 <= eta <= 1):
            raise InputError(f"eta is {quoted(eta)}, expected a number from 0 to 1")
        if self.seed is not None and (type(self.seed) is not int or not 0 <= self.seed <= MAX_SEED):
            raise InputError(f"seed is {quoted(self.seed)}, expected an integer from 0 to 2^64 - 1")
        for name, kinds in (("output_type", OutputType), ("sample_mode", SampleMode), ("rng", Rng)):
            value, known = getattr(self, name), get_args(kinds)
            if not isinstance(value, str) or value not in known:
                raise InputError(f"{name} is {quoted(value)}, expected {' or '.join(map(repr, known))}")
        if type(self.truncate) is not bool:
            raise InputError(f"truncate is {quoted(self.truncate)}, expected True or False")
        pictures = len(prompts) * self.num_images_per_prompt
        if pictures > MAX_PICTURES:
            raise InputError(
                f"{pictures} pictures in one batch, at most {MAX_PICTURES}", "ask for them in several calls"
            )
        if self.latents is not None:
            _check_latents(self.latents, pictures)
        repeat = self.num_images_per_prompt
        object.__setattr__(self, "prompts", tuple(p for p in prompts for _ in range(repeat)))
        object.__setattr__(self, "negative_prompts", tuple(p for p in negative for _ in range(repeat)))
        self._check_sizes()
        object.__setattr__(self, "pictures", tuple(p for p in self._read(len(prompts)) for _ in range(repeat)))

    @classmethod
    def make(cls, prompt: str | Sequence[str], **arguments: Unpack[Arguments]) -> GenerationRequest:
        """The request of a call; InputError, which lists the known ones, for an argument that there is not."""
        if unknown := [name for name in arguments if name not in Arguments.__annotations__]:
            known = ", ".join(("prompt", *Arguments.__annotations__))
            raise InputError(f"there is no argument {unknown[0]!r}; known arguments: {known}")
        return cls(prompt, **arguments)

    def with_guidance(self, default: float) -> GenerationRequest:
        """This request, with the model's own guidance scale where it gives none."""
        if self.guidance_scale is not None:
            return self
        own = copy.copy(self)  # dataclasses.replace would read the initial pictures again
        object.__setattr__(own, "guidance_scale", default)
        own._check_guided()
        return own

    @property
    def guided(self) -> bool:
        """Whether each step runs the network for the negative prompt too. InputError until a scale is known."""
        if self.guidance_scale is None:
            raise InputError("guidance_scale is not known: the request leaves it to the model", "with_guidance(7.5)")
        return self.guidance_scale > 1

    def guided_at(self, sigma: float) -> bool:
        """Whether the step at this noise level runs the network for the negative prompt too."""
        if self.guidance_interval is None or not self.guided:
            return self.guided
        with np.errstate(over="ignore"):  # levels are float32, where a level of 3.3 is less than 3.3: so are the ends
            low, high = np.array(self.guidance_interval, np.float32)
        return bool(low <= sigma <= high)

    def _check_guidance(self) -> None:
        rescale, interval = self.guidance_rescale, self.guidance_interval
        if not _is_number(rescale) or not 0 <= rescale <= 1:
            raise InputError(f"guidance_rescale is {quoted(rescale)}, expected a number from 0 to 1")
        if interval is None:
            return
        pair = tuple(interval) if isinstance(interval, (tuple, list)) else ()
        if len(pair) != 2 or not all(map(_is_number, pair)) or not 0 <= pair[0] <= pair[1]:
            raise InputError(f"guidance_interval is {quoted(interval)}, expected two noise levels, low before high")
        object.__setattr__(self, "guidance_interval", (float(pair[0]), float(pair[1])))

    def _check_guided(self) -> None:
        """InputError for what says how to guide, where nothing is guided; a scale that is not known yet may be one."""
        for name, idle in (("guidance_rescale", 0), ("guidance_interval", None)):
            value = getattr(self, name)
            if value != idle and self.guidance_scale is not None and not self.guided:
                raise InputError(
                    f"{name} is {quoted(value)}, and guidance_scale {self.guidance_scale:g} guides nothing",
                    f"give guidance_scale above 1, or leave {name} out",
                )

    def _check_noise(self) -> None:
        object.__setattr__(self, "variation_seed", _integer(self.variation_seed))
        seed, strength = self.variation_seed, self.variation_strength
        if seed is not None and (type(seed) is not int or not 0 <= seed <= MAX_SEED):
            raise InputError(f"variation_seed is {quoted(seed)}, expected an integer from 0 to 2^64 - 1")
        if not _is_number(strength) or not 0 <= strength <= 1:
            raise InputError(f"variation_strength is {quoted(strength)}, expected a number from 0 to 1")
        if strength and seed is None:
            raise InputError("variation_strength is given without variation_seed", "give both, or leave both out")
        if seed is not None and not strength:
            raise InputError(
                "variation_seed is given without variation_strength, and changes nothing",
                "give variation_strength above 0, or leave variation_seed out",
            )
        if strength and self.latents is not None:
            raise InputError("variation_strength and latents are both given", "give one: latents stand for all noise")

    def _count_steps(self) -> None:
        """num_inference_steps of timesteps or sigmas that are given."""
        for name in ("timesteps", "sigmas"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, "num_inference_steps", by_hand(name, value)[1])
                object.__setattr__(self, name, tuple(value))

    def _check_sizes(self) -> None:
        for name, least in (("original_size", 1), ("crops_coords_top_left", 0), ("target_size", 1)):
            value = getattr(self, name)
            if value is None and name != "crops_coords_top_left":
                continue
            pair = tuple(map(_integer, value)) if isinstance(value, (tuple, list)) else ()
            if len(pair) != 2 or not all(type(v) is int and least <= v <= MAX_SIDE for v in pair):
                raise InputError(f"{name} is {quoted(value)}, expected two integers of {least} to {MAX_SIDE}")
            object.__setattr__(self, name, pair)

    def _read(self, prompts: int) -> list[Image.Image]:
        """The initial pictures, one a prompt."""
        strength = self.strength
        if not _is_number(strength) or not 0 < strength <= 1:
            raise InputError(f"strength is {quoted(strength)}, expected a number above 0, at most 1")
        if self.image is None:
            for name in ("strength", "sample_mode"):
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise InputError(f"{name} is given without image, and changes nothing", "give both, or neither")
            return []
        if self.latents is not None:
            raise InputError("image and latents are both given", "give one: latents are where text to image starts")
        if int(self.num_inference_steps * strength) < 1:
            least = math.ceil(10_000 / self.num_inference_steps) / 10_000
            raise InputError(
                f"strength {strength:g} of {self.num_inference_steps} steps leaves no step to run",
                f"give strength of at least {least:g}, or more steps",
            )
        several: list[Any] = list(self.image) if isinstance(self.image, (list, tuple)) else [self.image]
        if len(several) not in (1, prompts):
            raise InputError(f"image has {len(several)} pictures for {prompts} prompts", "give one, or as many")
        read = [image.rgb(picture) for picture in several]
        if len({picture.size for picture in read}) > 1:
            sizes = ", ".join(f"{w}x{h}" for w, h in dict.fromkeys(picture.size for picture in read))
            raise InputError(f"the pictures of one batch have several sizes: {sizes}", "give them one by one")
        return read * prompts if len(read) == 1 else read

    def begin(self) -> int:
        """How many of the first steps are left out: 0 for text to image; as diffusers' ``get_timesteps``."""
        steps = self.num_inference_steps
        return steps - min(int(steps * self.strength), steps) if self.pictures else 0

    def size(self, default: tuple[int, int], multiple: int) -> tuple[int, int]:
        """(width, height) in pixels. InputError unless both are multiples of ``multiple``."""
        if self.pictures:
            return self._fitted(default, multiple)
        width = default[0] if self.width is None else self.width
        height = default[1] if self.height is None else self.height
        if width % multiple or height % multiple:
            near = [max(multiple, round(side / multiple) * multiple) for side in (width, height)]
            raise InputError(
                f"{width}x{height} pixels: both sides must be multiples of {multiple}", f"try {near[0]}x{near[1]}"
            )
        return width, height

    def _fitted(self, default: tuple[int, int], multiple: int) -> tuple[int, int]:
        """The size to make from a picture, with a message in the log when it is not the picture's own."""
        own = self.pictures[0].size

        def whole(side: float) -> int:
            return max(multiple, round(side / multiple) * multiple)

        if self.width is None and self.height is None:
            width, height = (side // multiple * multiple for side in own)
        else:
            width = self.width or whole(own[0] * (self.height or 0) / own[1])
            height = self.height or whole(own[1] * width / own[0])
        if min(width, height) < 1 or width % multiple or height % multiple or max(width, height) > MAX_SIDE:
            raise InputError(
                f"the picture is {own[0]}x{own[1]}, to be made as {width}x{height}: both sides must be multiples of"
                f" {multiple}, at least {multiple} and at most {MAX_SIDE}",
                f"try width {min(whole(width), MAX_SIDE)} and height {min(whole(height), MAX_SIDE)}",
            )
        asked = self.width is not None and self.height is not None
        if not asked and width * height > MAX_GROWTH * default[0] * default[1]:
            shrink = math.sqrt(default[0] * default[1] / (own[0] * own[1]))
            near = [whole(side * shrink) for side in own]
            raise InputError(
                f"the picture would be made as {width}x{height}, the model's own size is {default[0]}x{default[1]}",
                f"say which size to make: width {near[0]} and height {near[1]}, for instance",
            )
        if (width, height) != own:
            logger.warning("the picture is resized from %dx%d to %dx%d", *own, width, height)
        return width, height

    def seeds(self, drawn: int) -> list[int]:
        """One a picture; ``drawn`` stands in when no seed was given."""
        first = drawn if self.seed is None else self.seed
        counted = 0 if self.variation_strength else 1
        return [(first + counted * i) & MAX_SEED for i in range(len(self.prompts))]

    def variation_seeds(self) -> list[int]:
        """One a picture; none where nothing is mixed in."""
        if not self.variation_strength or self.variation_seed is None:
            return []
        return [(self.variation_seed + i) & MAX_SEED for i in range(len(self.prompts))]


def _texts(name: str, value: object) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{name} is {type(value).__name__}, expected a text or a list of texts")
    for text in texts:
        if len(text) > MAX_PROMPT:
            raise InputError(
                f"{name} has {len(text)} characters, at most {MAX_PROMPT}", "shorten it: 75 tokens are used"
            )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(f"{name} holds a lone surrogate, which is no character: {text[:40]!r}") from None
    return tuple(texts)


def _is_number(value: Any) -> bool:
    """NaN and infinity are; an integer beyond 64 bits is nowhere meant, and of some no float can be made."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool) and -(2**63) <= value < 2**64
    return bool(whole or isinstance(value, (float, np.floating)))


def _integer(value: object) -> object:
    """numpy's integers as Python's; anything else as it is."""
    return int(value) if isinstance(value, np.integer) else value


def _check_latents(latents: object, pictures: int) -> None:
    if not isinstance(latents, np.ndarray) or latents.dtype != np.float32 or latents.ndim != 4:
        got = f"{latents.dtype}{list(latents.shape)}" if isinstance(latents, np.ndarray) else type(latents).__name__
        raise InputError(f"latents is {got}, expected float32[B,C,H/8,W/8]")
    if latents.shape[0] != pictures:
        raise InputError(f"latents holds {latents.shape[0]} pictures, the prompts ask for {pictures}")
    if not np.isfinite(latents).all():
        raise InputError("latents holds NaN or infinity")
