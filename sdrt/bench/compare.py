"""One variant beside another: of one report, measured in turn, or of two reports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sdrt.bench.report import Comparison, Report, Settings, Variant
from sdrt.bench.statistics import compare_stages
from sdrt.errors import InputError

JUDGED = ("text_encoder", "vae_encoder", "step", "network", "host", "vae_decoder", "load", "total")
"""Stages that a comparison speaks about; ``step`` only where one of the two cannot tell its network apart."""

LEAST = 0.01
"""A stage with less than this share of the whole in both is not compared: what it gains or loses, nobody sees."""

SAME = ("width", "height", "batch", "steps", "streams", "guidance_scale", "scheduler")
"""Settings that make the work: where they differ, times say nothing about each other."""


def compared(base: Variant, other: Variant, *, paired: bool) -> Comparison:
    """Ratios other / base of the stages that both know."""
    known = [stage for stage in JUDGED if stage in base.stages and stage in other.stages]
    if "network" in known:
        known.remove("step")
    stages = {
        stage: (base.values(stage), other.values(stage))
        for stage in known
        if max(base.share(stage), other.share(stage)) >= LEAST and base.stages[stage].min > 0 < other.stages[stage].min
    }
    return Comparison(base.name, other.name, paired, compare_stages(stages, paired=paired))


def side_by_side(variants: Sequence[Variant], *, paired: bool) -> Iterator[Comparison]:
    """Each variant of one report beside the first one that does the same work."""
    for i, other in enumerate(variants):
        base = next((v for v in variants[:i] if not _different(v.settings, other.settings)), None)
        if base is not None:
            yield compared(base, other, paired=paired)


def compare_reports(base: Report, other: Report) -> tuple[list[Comparison], list[str]]:
    """Variants of the same name, or the only two there are; and what a reader must know about the two reports.

    Raises InputError when nothing can be compared.
    """
    pairs = [(a, b) for a in base.variants for b in other.variants if a.name == b.name]
    if not pairs and len(base.variants) == len(other.variants) == 1:
        pairs = [(base.variants[0], other.variants[0])]
    if not pairs:
        names = [", ".join(variant.name for variant in report.variants) for report in (base, other)]
        raise InputError(
            f"nothing to compare: the first report has {names[0]}; the second {names[1]}", "sdrt bench -m A -m B"
        )
    for a, b in pairs:
        if different := _different(a.settings, b.settings):
            raise InputError(
                f"{a.name} and {b.name} did different work: {different}", "measure both with the same settings"
            )
    warnings = ["the reports were not measured in turn: what changed on the machine in between is in the ratios"]
    warnings += [
        f"{field}: {one}, then {two}"
        for field in ("processor", "usable", "memory", "system", "python")
        if (one := getattr(base.environment, field)) != (two := getattr(other.environment, field))
    ]
    for which, report, matched in (("first", base, [a for a, _ in pairs]), ("second", other, [b for _, b in pairs])):
        warnings += [
            f"{variant.name}: only in the {which} report" for variant in report.variants if variant not in matched
        ]
    return [compared(a, b, paired=False) for a, b in pairs], warnings


def _different(a: Settings, b: Settings) -> str:
    return ", ".join(
        f"{name} {one} and {two}" for name in SAME if (one := getattr(a, name)) != (two := getattr(b, name))
    )
