"""Whole pictures of Stable Diffusion 2.x and XL against diffusers in float32: what differs from 1.x."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import sdrt
from sdrt.metrics import psnr
from sdrt.pipeline import Pipeline
from tests.conftest import Model
from tests.pair import SCHEDULERS, Pair, load_diffusers

PROMPTS = ["a red star over a lighthouse!", "two cats, it's raining"]  # "!" pads OpenCLIP's encoders
NEGATIVE = ["blurry", "dark, low quality"]


@pytest.fixture(scope="module", params=["sd2", "sd2-v", "sdxl"])
def pair(request: pytest.FixtureRequest, models: Callable[[str], Model]) -> Iterator[Pair]:
    model = models(request.param)
    with Pipeline.from_pretrained(model.bundle) as ours:
        yield Pair(ours, load_diffusers(model.checkpoint))


@pytest.mark.parametrize(("width", "height", "guidance_scale"), [(64, 64, 7.5), (72, 128, 7.5), (264, 200, 1.0)])
@pytest.mark.parametrize("scheduler", [None, *SCHEDULERS])
def test_pictures_equal_diffusers(
    pair: Pair, scheduler: str | None, width: int, height: int, guidance_scale: float
) -> None:
    """None: the model's own scheduler (PLMS, DDIM with v-prediction, Euler). The bar is 100 dB."""
    expected, got = pair.both(
        scheduler, 5, prompt=PROMPTS, negative_prompt=NEGATIVE, width=width, height=height,
        guidance_scale=guidance_scale, num_inference_steps=6,
    )  # fmt: skip
    assert psnr(expected, got, 1.0) >= 100


def test_without_a_negative_prompt(pair: Pair) -> None:
    """SDXL puts zeros in its place; an empty negative prompt is another thing there, and the same thing in 2.x."""
    arguments: dict[str, Any] = {"prompt": PROMPTS, "width": 64, "height": 72, "num_inference_steps": 4}
    expected, got = pair.both("DDIM", 1, **arguments)
    assert psnr(expected, got, 1.0) >= 100
    empty_expected, empty = pair.both("DDIM", 1, **arguments, negative_prompt=["", ""])
    assert psnr(empty_expected, empty, 1.0) >= 100
    zeros = pair.ours.bundle.manifest.no_negative_prompt == "zeros"
    assert zeros == (pair.ours.bundle.manifest.family == "sdxl")
    assert (psnr(empty, got, 1.0) < 60) == zeros


def test_the_checkpoint_would_show_a_wrong_setting(pair: Pair) -> None:
    arguments: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 6, "seed": 5, "output_type": "np"}
    right = pair.ours(PROMPTS, negative_prompt=NEGATIVE, **arguments).images
    for wrong in ({"guidance_scale": 7.0}, {"num_inference_steps": 7}, {"negative_prompt": "blurry"}):
        got = pair.ours(PROMPTS, **({"negative_prompt": NEGATIVE} | arguments | wrong)).images
        assert psnr(right, got, 1.0) < 60, wrong


def test_sizes_that_the_model_is_told(pair: Pair) -> None:
    sizes: dict[str, Any] = {"original_size": (300, 500), "crops_coords_top_left": (8, 16), "target_size": (90, 80)}
    arguments: dict[str, Any] = {"prompt": PROMPTS[0], "width": 64, "height": 72, "num_inference_steps": 3}
    if pair.ours.bundle.manifest.family != "sdxl":
        for name, value in sizes.items():
            with pytest.raises(sdrt.InputError, match=f"{name} is given, but this model takes no sizes"):
                pair.ours(**arguments, **{name: value})
        return
    plain = pair.ours(**arguments, seed=1, scheduler="DDIM", output_type="np").images
    for name, value in sizes.items():
        expected, got = pair.both("DDIM", 1, **arguments, **{name: value})
        assert psnr(expected, got, 1.0) >= 100
        assert psnr(plain, got, 1.0) < 80, name


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_clip_skip_equals_diffusers(pair: Pair, clip_skip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if pair.ours.bundle.manifest.family != "sdxl":
        # diffusers 0.42 looks for the final layer norm where transformers 4 kept it.
        monkeypatch.setattr(type(pair.theirs.text_encoder), "text_model", property(lambda model: model), raising=False)
    elif clip_skip == 2:
        with pytest.raises(sdrt.InputError, match="clip_skip is 2, text_encoder has at most 1"):
            pair.ours(PROMPTS[0], clip_skip=2)
        return
    expected, got = pair.both(
        "DDIM", 1, prompt=PROMPTS[0], width=64, height=64, num_inference_steps=4, clip_skip=clip_skip
    )  # fmt: skip
    assert psnr(expected, got, 1.0) >= 100
    plain = pair.ours(
        PROMPTS[0], width=64, height=64, num_inference_steps=4, seed=1, scheduler="DDIM", output_type="np"
    )
    assert psnr(plain.images, got, 1.0) < 60


def test_manifest(pair: Pair) -> None:
    facts = pair.ours.bundle.manifest
    assert all(
        c.artifact.parity and min(p.psnr or 200 for p in c.artifact.parity) > 100 for c in facts.components.values()
    )
    assert facts.guidance_scale == (5.0 if facts.family == "sdxl" else 7.5)
    if facts.family == "sdxl":
        assert [text.hidden_states for text in facts.text_encoders] == ["hidden_states.2", "hidden_states.3"]
        assert [text.pooled for text in facts.text_encoders] == [None, "text_embeds"]
        assert facts.denoiser.inputs["time_ids"] == ("time_ids",)
        assert facts.text_encoders[1].pad_token == "!"
    else:
        assert facts.family == "sd2"
        assert facts.text_encoders[0].pad_token == "!"
