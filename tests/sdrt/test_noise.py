"""Noise against torch.randn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sdrt.errors import InputError
from sdrt.noise import TorchGenerator, initial_latents

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


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range(seed: int) -> None:
    with pytest.raises(InputError, match="seed"):
        TorchGenerator(seed)
