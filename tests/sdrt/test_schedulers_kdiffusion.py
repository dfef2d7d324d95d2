"""Samplers of A1111's that diffusers does not have, against k-diffusion's and A1111's formulas in float64."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Generator
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from sdrt import Pipeline, demo, schedulers
from sdrt.errors import InputError
from sdrt.metrics import psnr

SD1 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

Draw = Callable[[], np.ndarray]
Walk = Generator[tuple[np.ndarray, float], np.ndarray, np.ndarray]
"""Yields latents and the noise level at which ε is wanted; is sent it; returns the end."""


def training() -> np.ndarray:
    bar = diffusers.EulerDiscreteScheduler(**SD1).alphas_cumprod.double().numpy()
    sigmas: np.ndarray = np.sqrt((1 - bar) / bar)
    return sigmas


def ancestral(sigma: float, after: float, eta: float) -> tuple[float, float]:
    up = min(after, eta * math.sqrt(after**2 * (sigma**2 - after**2) / sigma**2))
    return math.sqrt(after**2 - up**2), up


def dpm_fast(x: np.ndarray, levels: np.ndarray, eta: float, draw: Draw) -> Walk:
    """``DPMSolver.dpm_solver_fast`` in t = -log σ."""
    calls = len(levels)
    first, end = -math.log(training()[-1]), -math.log(training()[0])
    count = calls // 3 + 1
    ts = np.linspace(first, end, count + 1)
    orders = [3] * (count - 2) + [2, 1] if calls % 3 == 0 else [3] * (count - 1) + [calls % 3]
    for t, after, order in zip(ts[:-1], ts[1:], orders, strict=True):
        down, _ = ancestral(math.exp(-t), math.exp(-after), eta)
        to = min(end, -math.log(down)) if eta else after
        up = math.sqrt(max(math.exp(-after) ** 2 - math.exp(-to) ** 2, 0.0))
        h = to - t
        e0 = yield x, math.exp(-t)
        if order == 1:
            x = x - math.exp(-to) * math.expm1(h) * e0
        elif order == 2:
            u1 = x - math.exp(-(t + h / 2)) * math.expm1(h / 2) * e0
            e1 = yield u1, math.exp(-(t + h / 2))
            x = x - math.exp(-to) * math.expm1(h) * e0 - math.exp(-to) * math.expm1(h) * (e1 - e0)
        else:
            s1, s2 = t + h / 3, t + 2 * h / 3
            u1 = x - math.exp(-s1) * math.expm1(h / 3) * e0
            e1 = yield u1, math.exp(-s1)
            bend = 2 * (math.expm1(2 * h / 3) / (2 * h / 3) - 1)
            u2 = x - math.exp(-s2) * math.expm1(2 * h / 3) * e0 - math.exp(-s2) * bend * (e1 - e0)
            e2 = yield u2, math.exp(-s2)
            bend = 1.5 * (math.expm1(h) / h - 1)
            x = x - math.exp(-to) * math.expm1(h) * e0 - math.exp(-to) * bend * (e2 - e0)
        x = x + up * draw()
    return x


def karras(count: int, low: float, high: float) -> np.ndarray:
    sigmas: np.ndarray = (high ** (1 / 7) + np.linspace(0, 1, count) * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    return sigmas


def restart(x: np.ndarray, levels: np.ndarray, eta: float, draw: Draw) -> Walk:
    """A1111's ``restart_sampler``."""
    steps = len(levels)
    sigmas = np.append(levels, 0.0)
    pairs = list(itertools.pairwise(sigmas))
    if steps >= 20:
        rounds, of_round = (2, steps // 4) if steps >= 36 else (1, 9)
        sigmas = np.append(karras(steps - of_round * rounds, sigmas[-2], sigmas[0]), 0.0)
        low, high = np.abs(sigmas[:-1] - 0.1).argmin(), np.abs(sigmas - 2).argmin()  # not at 0, as theirs may
        again = list(itertools.pairwise(karras(of_round + 1, sigmas[low], sigmas[high])))
        pairs = list(itertools.pairwise(sigmas))
        pairs = pairs[:low] + again * rounds + pairs[low:]
    last = math.inf
    for sigma, after in pairs:
        if last < sigma:
            x = x + draw() * math.sqrt(sigma**2 - last**2)
        e = yield x, sigma
        if after == 0:
            x = x - sigma * e
        else:
            ahead = x + (after - sigma) * e
            x = x + (after - sigma) * (e + (yield ahead, after)) / 2
        last = after
    return x


FORMULAS: dict[str, Callable[[np.ndarray, np.ndarray, float, Draw], Walk]] = {"DPM fast": dpm_fast, "Restart": restart}
CASES = [
    *(("DPM fast", steps, eta, "linspace") for steps in (1, 2, 3, 4, 5, 6, 19, 20, 50) for eta in (None, 0.0, 0.4)),
    # Not 2 to 4: Heun's slopes make much of float32's roundings. In 20 trailing steps it turns back at the last level.
    *(
        ("Restart", steps, None, spacing)
        for steps in (1, 5, 19, 20, 35, 36, 50)
        for spacing in ("linspace", "trailing")
    ),
]


def euler(steps: int, config: dict[str, Any]) -> np.ndarray:
    """f64[steps]: the noise levels of Euler's method."""
    return schedulers.make(schedulers.resolve("Euler", config), steps).sigmas.astype(np.float64)


def noise(seed: int) -> Draw:
    generator = np.random.default_rng(seed)
    return lambda: generator.standard_normal((2, 4, 8, 8), dtype=np.float32)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("name", "steps", "eta", "spacing"), CASES)
def test_steps_equal_the_formulas(name: str, steps: int, eta: float | None, spacing: str, prediction: str) -> None:
    """Re-synchronised at each call, in float32, 3e-6 relative (most: 1e-6); left to itself to the end 1e-5; the same noise."""
    model = {**SD1, "prediction_type": prediction, "timestep_spacing": spacing}
    config = schedulers.resolve(name, model)
    ours, alone = (schedulers.make(config, steps, eta=eta) for _ in range(2))
    generator = np.random.default_rng(steps)
    x = generator.standard_normal((2, 4, 8, 8)).astype(np.float32) * np.float32(ours.init_sigma)
    walk = FORMULAS[name](x.astype(np.float64), euler(steps, model), 1.0 if eta is None else eta, noise(7))
    of_ours, of_alone = noise(7), noise(7)
    theirs, sigma = next(walk)
    own = x
    for i in range(len(ours.timesteps)):
        assert ours.sigmas[i] == pytest.approx(sigma, rel=1e-6)
        near = theirs.astype(np.float32)
        seen = theirs / math.sqrt(sigma**2 + 1)
        assert relative(seen, ours.scale(near, i)) <= 1e-6
        pred = generator.standard_normal(x.shape).astype(np.float32)
        # Of x = x0 + σ·ε, where the network sees x/√(σ²+1): ε = (σ·x/√(σ²+1) + v) / √(σ²+1).
        epsilon = pred if prediction == "epsilon" else (sigma * seen + pred) / math.sqrt(sigma**2 + 1)
        got, x0 = ours.step(near, pred, i, of_ours)  # type: ignore[arg-type] # no Brownian motion is asked for
        own, _ = alone.step(own, pred, i, of_alone)  # type: ignore[arg-type]
        assert got.dtype == x0.dtype == np.float32
        assert relative(theirs - sigma * epsilon, x0) <= 2e-6
        try:
            theirs, sigma = walk.send(epsilon)
        except StopIteration as end:
            theirs = end.value
            assert i == len(ours.timesteps) - 1
        assert relative(theirs, got) <= 3e-6
    assert relative(theirs, own) <= 1e-5


def relative(expected: np.ndarray, got: np.ndarray) -> float:
    return float(np.abs(expected - got).max() / np.abs(expected).max())


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize(
    ("name", "begin"), [("DPM fast", 7), ("DPM fast", 8), ("DPM fast", 9), ("Restart", 10), ("Restart", 19)]
)
def test_image_to_image_begins_anywhere(name: str, begin: int, spacing: str) -> None:
    """With ε known and always the same, every sampler leads to x0 and what noise its end has."""
    config = schedulers.resolve(name, SD1 | {"timestep_spacing": spacing})
    solver = schedulers.make(config, 20, **({"eta": 0.0} if name == "DPM fast" else {}))
    x0, epsilon = np.random.default_rng(0).standard_normal((2, 2, 4, 8, 8)).astype(np.float32)
    begin *= solver.order
    x = solver.add_noise(x0, epsilon, begin)
    np.testing.assert_allclose(x, x0 + solver.sigmas[begin] * epsilon, rtol=1e-5, atol=1e-5)
    for i in range(begin, len(solver.timesteps)):
        known = (x - x0) / solver.sigmas[i]  # also after fresh noise
        x, shown = solver.step(x, known, i, noise(1))  # type: ignore[arg-type]
        np.testing.assert_allclose(shown, x0, atol=2e-4)
    end = training()[0] if name == "DPM fast" else 0.0
    assert np.abs(x - x0).max() == pytest.approx(end * np.abs(known).max(), abs=2e-4)


class ForDiffusers(diffusers.SchedulerMixin, diffusers.ConfigMixin):  # type: ignore[misc]
    """The formulas as a scheduler that diffusers' pipeline takes, with the timesteps of ours."""

    @diffusers.configuration_utils.register_to_config
    def __init__(self, name: str, model: dict[str, Any]) -> None:
        self.name, self.model, self.v = name, model, model["prediction_type"] == "v_prediction"

    def set_timesteps(self, steps: int, device: Any = None) -> None:
        made = schedulers.make(schedulers.resolve(self.name, self.model), steps)
        self.levels, self.order = euler(steps, self.model), made.order
        self.timesteps, self.init_noise_sigma = torch.from_numpy(made.timesteps), made.init_sigma
        self.sigma, self.walk = float(made.sigmas[0]), None

    def scale_model_input(self, x: torch.Tensor, t: Any) -> torch.Tensor:
        return x / math.sqrt(self.sigma**2 + 1)

    def step(self, pred: torch.Tensor, t: Any, x: torch.Tensor, generator: Any = None, **_: Any) -> Any:
        if self.walk is None:
            draw = lambda: torch.randn(x.shape, generator=generator[0]).numpy()  # noqa: E731
            self.walk = FORMULAS[self.name](x.double().numpy(), self.levels, 1.0, draw)
            self.at, self.sigma = next(self.walk)
        epsilon = pred.double().numpy()
        if self.v:
            epsilon = (self.sigma * self.at / math.sqrt(self.sigma**2 + 1) + epsilon) / math.sqrt(self.sigma**2 + 1)
        try:
            self.at, self.sigma = self.walk.send(epsilon)
        except StopIteration as end:
            self.at = end.value
        return (torch.from_numpy(self.at).float(),)


@pytest.mark.parametrize("steps", [8, 20])
@pytest.mark.parametrize("name", FORMULAS)
def test_pictures_equal_the_formulas_in_diffusers_pipeline(
    demo_pipe: Pipeline, demo_diffusers: Any, name: str, steps: int
) -> None:
    """The same weights, seed and noise. The bar is 80 dB."""
    own = demo_pipe.scheduler_config
    assert {key: own[key] for key in SD1} == SD1
    demo_diffusers.scheduler = ForDiffusers(name, own)
    common: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 4.0, "output_type": "np"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = demo_diffusers(
            demo.PROMPTS[2], negative_prompt="red", generator=[torch.Generator().manual_seed(5)], **common
        ).images
    got = demo_pipe(demo.PROMPTS[2], negative_prompt="red", seed=5, scheduler=name, **common).images
    assert psnr(expected, got, 1.0) >= 80


@pytest.mark.parametrize(
    "config",
    [
        {"num_train_timesteps": 20, "trained_betas": [0.96] + [0.3] * 19},
        {"num_train_timesteps": 20, "beta_start": 0.95, "beta_end": 0.95},
        {"beta_start": 1e-6, "beta_end": 1e-6},
    ],
    ids=str,
)
def test_no_restart_without_a_level_to_turn_back_to(config: dict[str, Any]) -> None:
    solver = schedulers.make({**config, "_class_name": "RestartScheduler"}, 20)
    assert len(solver.timesteps) == 2 * 11 - 1
    x = np.zeros((2, 4, 8, 8), np.float32)
    for i in range(len(solver.timesteps)):
        x, _ = solver.step(x, np.ones_like(x), i, noise(1))  # type: ignore[arg-type]
    assert np.isfinite(x).all()


def test_dpm_fast_between_equal_levels_is_refused() -> None:
    config = {"num_train_timesteps": 4, "trained_betas": [1 - 2**-24, 0.5, 0.5, 0.5], "rescale_betas_zero_snr": True}
    with pytest.raises(InputError, match="two would have the same noise"):
        schedulers.make({**config, "_class_name": "DPMSolverFastScheduler", "prediction_type": "v_prediction"}, 4)
