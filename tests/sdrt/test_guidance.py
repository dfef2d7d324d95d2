"""Guidance rescaled, and guidance between two noise levels only."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from sdrt import InputError, Pipeline, schedulers
from sdrt.pipeline import _rescaled

ARGUMENTS: dict[str, Any] = {
    "width": 64, "height": 64, "num_inference_steps": 6, "seed": 5, "guidance_scale": 7.0, "negative_prompt": "blurry",
    "output_type": "latent", "scheduler": "DPM++ 2M",
}  # fmt: skip
PROMPTS = ["a lighthouse", "two cats"]


@pytest.mark.parametrize("part", [0.0, 0.3, 0.7, 1.0])
def test_rescaling_equals_diffusers(part: float) -> None:
    positive, pred = np.random.default_rng(0).standard_normal((2, 3, 4, 16, 8)).astype(np.float32)
    expected = rescale_noise_cfg(torch.from_numpy(5 * pred), torch.from_numpy(positive), part).numpy()
    np.testing.assert_allclose(_rescaled(5 * pred, positive, part), expected, rtol=0, atol=2e-6)


def test_rescaling_is_what_a_call_does(pipe: Pipeline) -> None:
    plain = pipe(PROMPTS, **ARGUMENTS).images
    half, whole = (pipe(PROMPTS, guidance_rescale=part, **ARGUMENTS).images for part in (0.5, 1.0))
    assert plain.std() > half.std() > whole.std()


def sigmas(pipe: Pipeline) -> list[float]:
    levels: list[float] = schedulers.make(schedulers.resolve("DPM++ 2M", pipe.scheduler_config), 6).sigmas.tolist()
    return levels


def test_an_interval_of_everything_and_of_nothing(pipe: Pipeline) -> None:
    always = pipe(PROMPTS, **ARGUMENTS).images
    np.testing.assert_array_equal(pipe(PROMPTS, guidance_interval=(0, 1e9), **ARGUMENTS).images, always)
    never = pipe(PROMPTS, **{**ARGUMENTS, "guidance_scale": 1.0}).images
    got = pipe(PROMPTS, guidance_interval=(1e8, 1e9), **ARGUMENTS).images
    np.testing.assert_allclose(got, never, rtol=0, atol=1e-5)


def test_half_of_the_steps_are_guided(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network gets two pictures where there is guidance, one where there is none; pictures are as by hand."""
    levels = sigmas(pipe)
    interval = levels[4], levels[2]
    unet, batches = pipe.sessions["unet"], []
    run = unet.run

    def counted(**inputs: Any) -> Any:
        batches.append(inputs["sample"].shape[0])
        return run(**inputs)

    monkeypatch.setattr(unet, "run", counted)
    steps = list(pipe.stream("a lighthouse", guidance_interval=interval, **ARGUMENTS))
    assert batches == [1, 1, 2, 2, 2, 1]
    assert [step.guided for step in steps] == [False, False, True, True, True, False]
    np.testing.assert_allclose([step.sigma for step in steps], levels)

    monkeypatch.setattr(unet, "run", run)
    config = schedulers.resolve("DPM++ 2M", pipe.scheduler_config)
    made, x = schedulers.make(config, 6), None
    for i, step in enumerate(steps):  # each step by hand from the one before it
        scale = 7.0 if step.guided else 1.0
        one = {**ARGUMENTS, "guidance_scale": scale}
        if x is None:
            x = next(iter(pipe.stream("a lighthouse", **{**one, "num_inference_steps": 6}))).latents
            np.testing.assert_allclose(step.latents, x, rtol=0, atol=1e-5)
        assert made.timesteps[i] == step.timestep


@pytest.mark.parametrize("name", sorted({*schedulers.CLASSES, *schedulers.A1111}))
def test_noise_levels_are_those_of_the_latents(name: str, pipe: Pipeline) -> None:
    """As much noise as ``add_noise`` adds at each call, over what it leaves of the picture; of flows the former.

    SA-Solver's adds that of the whole timestep, as diffusers' does, up to 6 % off a sigma schedule's.
    """
    flow = name.startswith("Flow")
    base = {} if flow or name.startswith("EDM") else pipe.scheduler_config
    made = schedulers.make(schedulers.resolve(name, base), 8 if name.endswith(" DDIM") else 7)
    one, none = np.float32(1), np.float32(0)
    mixed = [(made.add_noise(none, one, i), made.add_noise(one, none, i)) for i in range(len(made.timesteps))]
    assert made.sigmas.dtype == np.float32
    rounded = 6e-2 if name.startswith("SA-Solver ") else 1e-5
    np.testing.assert_allclose(made.sigmas, [s if flow else s / alpha for s, alpha in mixed], rtol=rounded)
    ahead = ("PNDMScheduler", "DPMSolverFastScheduler", "DPM fast")  # Runge-Kutta's steps look ahead
    assert (np.diff(made.sigmas) < 1e-6).all() or name in ahead


def test_noise_levels_by_hand_are_what_was_given(pipe: Pipeline) -> None:
    """Beyond the training schedule, too, where there is no timestep for them; an interval that ends at one has it."""
    sigmas = [50.0, 20.0, 3.3, 0.01]
    steps = list(
        pipe.stream(
            "a lighthouse",
            guidance_interval=(3.3, 20),
            **{**ARGUMENTS, "scheduler": "Euler", "sigmas": [*sigmas, 0]},
        )
    )
    np.testing.assert_allclose([step.sigma for step in steps], sigmas, rtol=1e-6)
    assert [step.guided for step in steps] == [False, True, True, False]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"guidance_rescale": 1.5}, "guidance_rescale is 1.5, expected a number from 0 to 1"),
        ({"guidance_rescale": True}, "guidance_rescale is True"),
        ({"guidance_interval": (5, 1)}, r"guidance_interval is \(5, 1\), expected two noise levels, low before high"),
        ({"guidance_interval": (1,)}, "guidance_interval"),
        ({"guidance_interval": (float("nan"), 3)}, "guidance_interval"),
        ({"guidance_interval": "1-3"}, "guidance_interval"),
        ({"guidance_interval": (1, 3), "guidance_scale": 1}, r"is \(1.0, 3.0\), and guidance_scale 1 guides nothing"),
        ({"guidance_rescale": 0.7, "guidance_scale": 0.5}, "is 0.7, and guidance_scale 0.5 guides nothing"),
    ],
    ids=str,
)
def test_what_is_refused(pipe: Pipeline, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipe("a lighthouse", **{**ARGUMENTS, **given})
