"""Noise against torch.randn."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchsde
from PIL import Image

from sdrt import InputError, Pipeline
from sdrt.brownian import BrownianTree
from sdrt.noise import GENERATORS, NumpyGenerator, PhiloxGenerator, TorchGenerator, initial_latents, philox, slerp
from tests.conftest import Cli

SHAPES = [(1, 4, 64, 64), (1, 4, 9, 17), (4, 65, 33), (17,), (3,)]
SEEDS = [*range(95), 2**31, 2**32 - 1, 2**32 + 5, 2**63, 2**64 - 1]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_torch(shape: tuple[int, ...]) -> None:
    """100 seeds. The bar is 1e-6: the last bits of log, sin and cos differ between torch's and numpy's libraries."""
    worst = 0.0
    for seed in SEEDS:
        reference = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).numpy()
        got = TorchGenerator(seed).randn(shape)
        assert got.dtype == np.float32
        worst = max(worst, float(np.abs(reference - got).max()))
    assert worst <= 1e-6


def test_stream_goes_on_as_torchs_does() -> None:
    """Successive draws of all kinds (blocks of 16, a tail, single values and their kept halves) stay in step."""
    reference, ours = torch.Generator().manual_seed(7), TorchGenerator(7)
    for shape in [(3,), (4, 8, 8), (1,), (2,), (19,), (5,), (1, 4, 9, 17), (15,), (16,)]:
        expected = torch.randn(shape, generator=reference).numpy()
        np.testing.assert_allclose(ours.randn(shape), expected, rtol=0, atol=1e-6)


def test_one_picture_of_a_batch_is_the_single_run_of_its_seed() -> None:
    batch = initial_latents([TorchGenerator(seed) for seed in (3, 4, 5)], (4, 8, 8))
    for i, seed in enumerate((3, 4, 5)):
        np.testing.assert_array_equal(batch[i], TorchGenerator(seed).randn((4, 8, 8)))


@pytest.mark.parametrize("rng", GENERATORS)
@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range(seed: int, rng: Any) -> None:
    with pytest.raises(InputError, match="seed"):
        GENERATORS[rng](seed)


# -- other sources -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)  # fmt: skip
def test_philox_known_answers(counter: Any, key: Any, expected: Any) -> None:
    """Random123's vectors of Philox 4×32-10."""
    assert tuple(philox(np.array([counter], np.uint32).T, key)[:, 0]) == expected


def test_philox_equals_torch_on_cuda() -> None:
    """torch.randn((3, 4), generator=Generator("cuda").manual_seed(0)), as A1111's rng_philox.py records it."""
    recorded = [
        [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
        [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
        [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
    ]
    np.testing.assert_allclose(PhiloxGenerator(0).randn((3, 4)), recorded, rtol=0, atol=1e-6)


def test_philox_draws_are_a_stream_of_the_whole_seed() -> None:
    generator = PhiloxGenerator(2**40 + 3)
    first, second = generator.randn((4, 64, 64)), generator.randn((4, 64, 64))
    assert first.dtype == np.float32
    assert abs(float(first.mean())) < 0.03
    assert abs(float(first.std()) - 1) < 0.03
    assert np.abs(first - second).max() > 1
    assert np.abs(first - PhiloxGenerator(3).randn((4, 64, 64))).max() > 1
    np.testing.assert_array_equal(first, PhiloxGenerator(2**40 + 3).randn((4, 64, 64)))


def test_numpys_own() -> None:
    state = np.random.RandomState(7)
    generator = NumpyGenerator(7)
    for shape in ((4, 8, 8), (3,)):
        np.testing.assert_array_equal(generator.randn(shape), state.randn(*shape).astype(np.float32))
    np.testing.assert_array_equal(NumpyGenerator(2**32 + 7).randn((5,)), NumpyGenerator(7).randn((5,)))


# -- variations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_slerp_equals_an_independent_one(part: float) -> None:
    low, high = (torch.randn((4, 16, 12), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    a, b = (torch.nn.functional.normalize(x, dim=1) for x in (low, high))
    omega = torch.acos((a * b).sum(dim=1, keepdim=True))
    expected = (torch.sin((1 - part) * omega) * low + torch.sin(part * omega) * high) / torch.sin(omega)
    np.testing.assert_allclose(slerp(low.numpy(), high.numpy(), part), expected.numpy(), rtol=0, atol=5e-6)


def test_slerp_at_its_ends_and_between_equals() -> None:
    low, high = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    np.testing.assert_array_equal(slerp(low, high, 0), low)
    np.testing.assert_array_equal(slerp(low, high, 1), high)
    np.testing.assert_allclose(slerp(low, low, 0.3), low, rtol=1e-6)


@pytest.mark.parametrize(("height", "most"), [(1, 6), (2, 6 / 1e-3)])
def test_slerp_of_the_smallest_pictures(height: int, most: float) -> None:
    """Columns of one value point the same way or the opposite: no division by the sine of that. Of two, nearly so."""
    for seed in range(20):
        mixed = slerp(TorchGenerator(seed).randn((4, height, 8)), TorchGenerator(seed + 50).randn((4, height, 8)), 0.3)
        assert np.abs(mixed).max() < most


def test_a_variation_of_itself_is_itself(pipe: Pipeline) -> None:
    """Image to image, too, where the encoder draws first."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    plain, same = (
        pipe("a lighthouse", image=picture, seed=5, num_inference_steps=3, output_type="np", **more).images
        for more in ({}, {"variation_seed": 5, "variation_strength": 0.5})
    )
    np.testing.assert_allclose(plain, same, atol=1e-5)


SMALL: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 3, "output_type": "np"}


def test_variations_of_a_picture(pipe: Pipeline) -> None:
    """One seed, several variation seeds; the more of them, the further from it, until they are those of their seeds."""
    plain = pipe("a lighthouse", seed=5, **SMALL).images[0]
    distances = []
    for strength in (0.05, 0.3, 1.0):
        made = pipe(
            "a lighthouse", seed=5, variation_seed=90, variation_strength=strength, num_images_per_prompt=2, **SMALL
        )
        assert made.seeds == [5, 5]
        distances.append(float(np.abs(made.images[0] - plain).mean()))
    assert distances == sorted(distances)
    for i in (0, 1):
        np.testing.assert_allclose(made.images[i], pipe("a lighthouse", seed=90 + i, **SMALL).images[0], atol=1e-5)


@pytest.mark.parametrize("rng", ["cuda", "numpy"])
def test_a_source_is_what_all_noise_comes_from(rng: Any, pipe: Pipeline) -> None:
    """First latents and ancestral noise: the same as from latents by hand, and another picture than torch's."""
    made = pipe("a lighthouse", seed=5, rng=rng, scheduler="DDIM", **SMALL).images
    by_hand = pipe("a lighthouse", latents=GENERATORS[rng](5).randn((1, 4, 8, 8)), scheduler="DDIM", **SMALL).images
    np.testing.assert_allclose(made, by_hand, atol=1e-6)
    ancestral = [pipe("a lighthouse", seed=5, rng=r, scheduler="Euler a", **SMALL).images for r in (rng, rng, "cpu")]
    np.testing.assert_array_equal(ancestral[0], ancestral[1])
    assert np.abs(ancestral[0] - ancestral[2]).max() > 0.01


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rng": "gpu"}, "rng is 'gpu', expected 'cpu' or 'cuda' or 'numpy'"),
        ({"variation_seed": -1}, "variation_seed is -1"),
        ({"variation_seed": 3, "variation_strength": 2}, "variation_strength is 2"),
        ({"variation_strength": 0.5}, "variation_strength is given without variation_seed"),
        ({"variation_seed": 3}, "variation_seed is given without variation_strength"),
        (
            {"variation_seed": 3, "variation_strength": 0.5, "latents": np.zeros((1, 4, 8, 8), np.float32)},
            "variation_strength and latents are both given",
        ),
    ],
    ids=str,
)
def test_what_is_refused(pipe: Pipeline, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipe("a lighthouse", **{**SMALL, **given})


def test_what_the_png_tells(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    done = cli(
        "generate", "a red star", "--steps", "2", "--seed", "5", "--rng", "cuda", "--variation-seed", "9",
        "--variation-strength", "0.25", "--guidance-rescale", "0.7", "--guidance-interval", "0.5", "5", "-o", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with Image.open(out) as picture:
        told = picture.info["parameters"]
    for field in ("Seed: 5", "RNG: NV", "Variation seed: 9", "Variation seed strength: 0.25", "CFG Rescale phi: 0.7"):
        assert field in told


@pytest.mark.parametrize("seed", [0, 5, 2**40 + 3])
@pytest.mark.parametrize(("low", "high"), [(0.029167, 14.6146), (0.0413, 157.4)])
@pytest.mark.parametrize("shape", [(4, 8, 8), (1, 3, 5)])
def test_brownian_tree_equals_torchsdes(seed: int, low: float, high: float, shape: tuple[int, ...]) -> None:
    """Overlapping increments from high to low as samplers ask for them, beyond the ends, and all of it again."""
    theirs = torchsde.BrownianInterval(
        low, high, shape, torch.float32, entropy=seed, tol=1e-6, pool_size=24, halfway_tree=True
    )
    ours = BrownianTree(low, high, seed, shape, TorchGenerator)
    points = [*np.geomspace(high, low, 12), low]
    for _ in range(2):
        for above, below in itertools.pairwise(points):
            for end in (math.sqrt(above * below), below):
                got = ours(end, above)
                if round(min(max(end, low), high), 6) < round(min(above, high), 6):
                    expected = theirs(max(end, low), min(above, high)).numpy()
                    assert np.abs(expected - got).max() / math.sqrt(above - end) <= 2e-6
                else:
                    assert not got.any()
    np.testing.assert_array_equal(ours(low - 1, high + 1), ours(low, high))
