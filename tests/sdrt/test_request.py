"""What a request accepts, and what it says when it does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sdrt import GenerationRequest, InputError
from sdrt.request import Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": 3}, "prompt is int"),
        ({"prompt": []}, "prompt is list"),
        ({"prompt": ["a", 3]}, "prompt is list"),
        ({"prompt": "x" * 1_000_000}, "1000000 characters"),
        ({"prompt": "\ud800"}, "lone surrogate"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c", "d", "e"]}, "3 texts for 2 prompts"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5"),
        ({"num_inference_steps": True}, "num_inference_steps is True"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"num_images_per_prompt": 5000}, "5000 pictures"),
        ({"clip_skip": -1}, "clip_skip"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"guidance_scale": "7"}, "guidance_scale is '7'"),
        ({"width": 0}, "width is 0"),
        ({"height": 10**9}, "height is 1000000000"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is"),
        ({"output_type": "jpeg"}, "output_type is 'jpeg'"),
        ({"latents": np.zeros((1, 4, 8, 8))}, "latents is float64"),
        ({"latents": np.zeros((2, 4, 8, 8), np.float32)}, "holds 2 pictures"),
        ({"latents": np.full((1, 4, 8, 8), np.nan, np.float32)}, "NaN"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GenerationRequest(**({"prompt": "a"} | arguments))


def test_batches() -> None:
    request = GenerationRequest(["a", "b"], negative_prompt="c", num_images_per_prompt=2, seed=7)
    assert request.prompts == ("a", "a", "b", "b")
    assert request.negative_prompts == ("c",) * 4
    assert request.seeds(0) == [7, 8, 9, 10]
    assert GenerationRequest("a").seeds(5) == [5]


def test_numpy_numbers() -> None:
    request = GenerationRequest(
        "a", seed=np.int64(3), width=np.int32(64), num_inference_steps=np.uint8(4), guidance_scale=np.float32(2)
    )  # type: ignore[arg-type]
    assert (request.seed, request.width, request.num_inference_steps) == (3, 64, 4)
    assert type(request.seed) is int
    assert request.guided


def test_size() -> None:
    assert GenerationRequest("a").size((512, 768), 8) == (512, 768)
    assert GenerationRequest("a", width=64).size((512, 768), 8) == (64, 768)
    with pytest.raises(InputError, match="multiples of 8") as caught:
        GenerationRequest("a", width=100, height=64).size((512, 512), 8)
    assert "96x64" in caught.value.fix


def test_guidance_is_off_at_one() -> None:
    assert not GenerationRequest("a", guidance_scale=1.0).guided
    assert GenerationRequest("a", guidance_scale=1.01).guided


def test_guidance_that_is_not_given_is_the_models_own() -> None:
    request = GenerationRequest("a", seed=1)
    with pytest.raises(InputError, match="guidance_scale is not known"):
        _ = request.guided
    assert request.with_guidance(3.0) == GenerationRequest("a", seed=1, guidance_scale=3.0)
    given = GenerationRequest("a", guidance_scale=2.0)
    assert given.with_guidance(3.0) is given


def test_arguments_are_the_requests_fields() -> None:
    fields = [name for name, field in GenerationRequest.__dataclass_fields__.items() if field.init]
    assert ["prompt", *Arguments.__annotations__] == fields
    with pytest.raises(InputError, match="no argument 'colour'"):
        GenerationRequest.make("a", colour="red")  # type: ignore[call-arg]
