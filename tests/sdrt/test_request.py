"""What a request accepts, and what it says when it does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sdrt import GenerationRequest, InputError
from sdrt.errors import quoted
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
        ({"sigmas": np.array(3.0)}, "sigmas is array"),
        ({"sigmas": np.ones((2, 2))}, "sigmas are not all finite numbers"),
        ({"sigmas": [0]}, r"sigmas is \[0\], which is for no step"),
        ({"timesteps": [10**400, 1]}, "timesteps are not all finite numbers"),
        ({"timesteps": "999,1"}, "timesteps is '999,1'"),
        ({"guidance_interval": (0, 10**400)}, "guidance_interval"),
        ({"guidance_interval": np.array([[1, 2], [3, 4]])}, "guidance_interval"),
        ({"rng": np.array(["cpu", "cuda"])}, "rng is array"),
        ({"output_type": ["pil"]}, "output_type is"),
        ({"truncate": "no"}, "truncate is 'no'"),
        ({"num_inference_steps": 10**400}, "num_inference_steps is 1000"),
        ({"original_size": (1, 10**5000)}, "original_size is a value of type tuple that is too long to show"),
        *(
            ({name: bad}, f"{name} is {told}")
            for name in (
                "num_inference_steps",
                "num_images_per_prompt",
                "clip_skip",
                "width",
                "height",
                "seed",
                "eta",
                "strength",
                "guidance_scale",
                "guidance_rescale",
                "guidance_interval",
                "variation_seed",
                "variation_strength",
                "timesteps",
                "sigmas",
                "original_size",
                "crops_coords_top_left",
                "target_size",
            )
            for bad, told in ((10**5000, "a value of type int that is too long to show"), (True, "True"), ("1", "'1'"))
        ),
        *(
            ({name: float("nan")}, f"{name} is nan")
            for name in ("num_inference_steps", "clip_skip", "width", "seed", "eta", "strength", "guidance_rescale")
        ),
    ],
    ids=lambda value: quoted(value, 40),
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
    with pytest.raises(InputError, match="guidance_scale 1 guides nothing"):  # a distilled model's own
        GenerationRequest("a", guidance_rescale=0.7).with_guidance(1.0)


def test_arguments_are_the_requests_fields() -> None:
    fields = [name for name, field in GenerationRequest.__dataclass_fields__.items() if field.init]
    assert ["prompt", *Arguments.__annotations__] == fields
    with pytest.raises(InputError, match="no argument 'colour'"):
        GenerationRequest.make("a", colour="red")  # type: ignore[call-arg]
