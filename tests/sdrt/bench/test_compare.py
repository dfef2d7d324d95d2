"""Comparing variants, and reports."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sdrt.bench import report
from sdrt.bench.compare import compare_reports, compared, side_by_side
from sdrt.bench.report import Sample, Settings, Variant
from sdrt.errors import InputError

from .test_report import ENVIRONMENT, whole


def noisy(name: str, seed: int, network: float = 0.1, vae: float = 0.2) -> Variant:
    """3 starts of 8 turns with 0.5 % of noise; 4 steps, no text encoder to speak of."""
    generator = np.random.default_rng(seed)
    taken = []
    for process in range(3):
        for turn in range(8):
            n, v = (mean * float(np.exp(generator.normal(0, 0.005))) for mean in (network, vae))
            total = 4 * n + v + 4 * 1e-5 + 1e-4
            taken.append(
                Sample(process, turn, total, total, (n + 1e-5,) * 4, (n,) * 4, text_encoder=1e-4, vae_decoder=v)
            )
    return report.variant(name, Settings("m", 64, 64, steps=4), taken, versions={})


def test_nothing_and_something() -> None:
    alike = compared(noisy("a", 1), noisy("b", 2), paired=True)
    assert {ratio.verdict for ratio in alike.ratios.values()} == {"no difference"}
    slower = compared(noisy("a", 1), noisy("b", 2, vae=0.21), paired=True)
    assert slower.ratios["vae_decoder"].verdict == "slower"
    assert slower.ratios["vae_decoder"].estimate == pytest.approx(1.05, abs=0.01)
    assert slower.ratios["network"].verdict == "no difference"


def test_small_stages_are_not_judged() -> None:
    """The host loop and the text encoder take less than a hundredth of the whole in both."""
    assert list(compared(noisy("a", 1), noisy("b", 2), paired=True).ratios) == ["network", "vae_decoder", "total"]


def test_a_stage_that_grew_is_judged() -> None:
    grown = noisy("b", 2)
    grown = report.variant(
        "b", grown.settings, [replace(s, text_encoder=0.02, total=s.total + 0.02) for s in grown.samples], versions={}
    )
    assert compared(noisy("a", 1), grown, paired=True).ratios["text_encoder"].verdict == "slower"


def test_each_beside_the_first_that_does_the_same_work() -> None:
    """In a sweep over batches nothing is compared across them; bundles at the same batch are."""

    def at(name: str, batch: int) -> Variant:
        variant = noisy(name, 1)
        return replace(variant, settings=replace(variant.settings, batch=batch))

    variants = [at("a1", 1), at("a2", 2), at("b1", 1), at("b2", 2), at("c1", 1)]
    assert [(c.base, c.other, c.paired) for c in side_by_side(variants, paired=True)] == [
        ("a1", "b1", True), ("a2", "b2", True), ("a1", "c1", True)
    ]  # fmt: skip


def test_reports_by_name_or_the_only_ones() -> None:
    comparisons, warnings = compare_reports(whole(noisy("a", 1), noisy("b", 2)), whole(noisy("b", 3), noisy("c", 4)))
    assert [(c.base, c.other, c.paired) for c in comparisons] == [("b", "b", False)]
    assert "not measured in turn" in warnings[0]
    assert warnings[1:] == ["a: only in the first report", "c: only in the second report"]
    comparisons, _ = compare_reports(whole(noisy("a", 1)), whole(noisy("z", 2)))
    assert [(c.base, c.other) for c in comparisons] == [("a", "z")]
    with pytest.raises(InputError, match="first report has a, b; the second c"):
        compare_reports(whole(noisy("a", 1), noisy("b", 2)), whole(noisy("c", 3)))


def test_other_work_is_refused_and_another_machine_is_said() -> None:
    one, two = noisy("a", 1), noisy("a", 2)
    changed = replace(two, settings=replace(two.settings, batch=2))
    with pytest.raises(InputError, match="batch 1 and 2"):
        compare_reports(whole(one), whole(changed))
    elsewhere = replace(whole(two), environment=replace(ENVIRONMENT, processor="another chip"))
    assert "processor: a chip, then another chip" in compare_reports(whole(one), elsewhere)[1]
