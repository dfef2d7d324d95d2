"""A report as a person reads it, and as a spreadsheet does."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from statistics import median

from sdrt.bench.environment import warnings
from sdrt.bench.report import Comparison, Report, Roof, Settings, Variant
from sdrt.bench.statistics import CONFIDENCE, Ratio, Summary
from sdrt.cli import common

LABELS = {
    "tokenize": "tokenise", "text_encoder": "text encoder", "vae_encoder": "VAE encoder", "step": "step",
    "network": "  network", "host": "  host loop", "vae_decoder": "VAE decoder", "post": "to picture",
    "load": "load", "other": "noise and rest", "total": "whole",
}  # fmt: skip
BAR = 24
"""Characters of a bar that stands for the whole."""
WIDE = 0.1
"""Spread of the whole beyond which a warning is shown."""


def text(report: Report) -> str:
    """The report for a terminal."""
    blocks = [_machine(report), *(_variant(variant) for variant in report.variants)]
    if len(report.variants) > 1:
        blocks.append(_overview(report.variants))
    blocks += [comparison(each) for each in report.comparisons]
    blocks += [f"most pictures a second, {line}" for line in report.best]
    blocks += [f"warning: {line}" for line in (*report.warnings, *warnings(report.interference))]
    return "\n\n".join(blocks)


def _machine(report: Report) -> str:
    e = report.environment
    cores = f"{e.usable or e.threads} threads of {e.cores} cores" if e.cores else f"{e.threads} threads"
    told = [e.processor, cores, common.size(e.memory) if e.memory else "", " ".join(e.features)]
    software = [e.system, f"Python {e.python}", f"sdrt {e.sdrt}" + (f" ({e.commit})" if e.commit else "")]
    return ", ".join(filter(None, told)) + "\n" + ", ".join(software)


def _variant(variant: Variant) -> str:
    lines = [f"{variant.name}: {settings(variant.settings)}"]
    if variant.versions:
        lines[0] += " · " + ", ".join(f"{name} {version}" for name, version in variant.versions.items())
    rows = [
        (LABELS[stage], *(seconds(s) for s in (summary.median, summary.p90, summary.min)), _percent(summary.spread),
         _bar(variant, stage))
        for stage, summary in variant.stages.items()
    ]  # fmt: skip
    lines.append(common.table(("stage", "median", "p90", "min", "spread", "share of the whole"), rows))
    lines.append(", ".join(_facts(variant)))
    lines += [f"{name}: {_roof(roof, variant)}" for name, roof in variant.roof.items()]
    total = variant.stages["total"]
    if total.spread is not None and total.spread > WIDE:
        lines.append(f"warning: the spread is {total.spread:.0%}: the machine was noisy, or -i is too small")
    lines += [f"warning: {line}" for line in variant.warnings]
    return "\n".join(lines)


def settings(s: Settings) -> str:
    """What was run, in a line."""
    told = [
        f"{s.width}x{s.height}",
        f"batch {s.batch}",
        f"{s.steps} steps" + (f" of {s.scheduler}" if s.scheduler else ""),
    ]
    told.append(f"guidance {s.guidance_scale:g}")
    told += [
        f"{name} {value}"
        for name in ("engine", "device", "threads", "cache")
        if (value := getattr(s, name)) is not None
    ]
    told += [f"{s.streams} streams"] if s.streams > 1 else []
    told += ["low memory"] if s.low_memory else []
    return ", ".join((*told, *(f"{name}={value}" for name, value in s.options.items())))


def _bar(variant: Variant, stage: str) -> str:
    share = min(max(variant.share(stage), 0.0), 1.0)
    return f"{'█' * round(share * BAR)} {share:.1%}".strip()


def _facts(variant: Variant) -> Iterator[str]:
    yield f"{variant.images_per_second:.3g} images/s"
    if variant.steps_per_second is not None:
        yield f"{variant.steps_per_second:.3g} steps/s"
    yield f"n={len(variant.samples)}"
    if variant.load is not None:
        ready = [sum(parts) for parts in zip(variant.load.start, variant.load.imports, variant.load.load, strict=True)]
        yield f"start to loaded {seconds(median(ready))}"
        yield f"load {seconds(median(variant.load.load))}" + (
            f" (cold {seconds(variant.load.cold_load)})" if variant.load.cold_load is not None else ""
        )
        yield f"first batch {seconds(median(variant.load.first))}"
    if (memory := variant.memory) is not None:
        peak, steady = memory.peak, memory.steady
        yield f"peak {common.size(peak.rss)} ({common.size(peak.anonymous)} anonymous)"
        yield f"steady {common.size(steady.rss)} ({common.size(steady.anonymous)})"
        if peak.device is not None:
            yield f"on the device {common.size(peak.device)}"
        if memory.held:
            yield "there " + ", ".join(f"{kind} {common.size(nbytes)}" for kind, nbytes in memory.held.items())
    if variant.disk is not None:
        yield f"on disk {common.size(variant.disk)}"


def _roof(roof: Roof, variant: Variant) -> str:
    kinds = ", ".join(f"{name} {common.giga(macs)}" for name, macs in roof.macs.items() if macs)
    line = f"{common.giga(sum(roof.macs.values()))} GMAC a call ({kinds}), {common.size(roof.bytes)} moved"
    if roof.share is None or variant.rates is None:
        return line
    best = max(variant.rates.flops, key=variant.rates.flops.__getitem__)
    rate = variant.rates.flops[best] / 1e12
    return f"{line}: {roof.share:.0%} of what this chip can do (at best {rate:.3g} TFLOP/s, seen in {best})"


def _overview(variants: Sequence[Variant]) -> str:
    rows = [
        (v.name, f"{v.images_per_second:.3g}", f"{v.steps_per_second:.3g}" if v.steps_per_second is not None else "-",
         seconds(v.stages["total"].median), common.size(v.memory.peak.rss) if v.memory else "-",
         common.size(v.memory.peak.anonymous) if v.memory else "-", common.size(v.disk) if v.disk else "-")
        for v in variants
    ]  # fmt: skip
    return common.table(("", "images/s", "steps/s", "whole", "peak RSS", "anonymous", "on disk"), rows)


def comparison(each: Comparison) -> str:
    """One comparison as a table."""
    rows = [
        (LABELS[stage].strip(), f"{ratio.estimate:.3f}", _interval(ratio), verdict(ratio))
        for stage, ratio in each.ratios.items()
    ]
    head = f"{each.other} beside {each.base}" + ("" if each.paired else " (not in turn)")
    return f"{head}\n{common.table(('stage', 'time ratio', f'{CONFIDENCE:.0%} interval', ''), rows)}"


def verdict(ratio: Ratio) -> str:
    """``slower``, ``faster``, ``no difference`` or ``cannot tell``, with what would tell."""
    if ratio.verdict != "cannot tell":
        return ratio.verdict
    if ratio.needed is None:
        return "cannot tell, nor would more turns"
    return f"cannot tell: about {ratio.needed} turns would, here are {ratio.n}"


def _interval(ratio: Ratio) -> str:
    return "-" if ratio.low is None or ratio.high is None else f"{ratio.low:.3f} .. {ratio.high:.3f}"


def seconds(value: float) -> str:
    """Three digits, in s, ms or µs."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}" if abs(value) < 100 * size else f"{value / size:.0f} {unit}"
    return f"{value * 1e6:.3g} µs"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


COLUMNS = (
    "variant", "stage", "n", "median_s", "p90_s", "min_s", "max_s", "spread", "images_per_second", "peak_rss",
    "peak_anonymous", "steady_rss", "disk", "width", "height", "batch", "steps", "threads", "streams",
)  # fmt: skip


def table(report: Report) -> str:
    """CSV: one line a stage of a variant. Seconds and bytes; empty where a figure is not known."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for variant in report.variants:
        for stage, summary in variant.stages.items():
            writer.writerow(["" if cell is None else cell for cell in _row(variant, stage, summary)])
    return out.getvalue()


def _row(variant: Variant, stage: str, s: Summary) -> list[object]:
    memory, set_ = variant.memory, variant.settings
    return [
        variant.name, stage, s.n, s.median, s.p90, s.min, s.max, s.spread, variant.images_per_second,
        memory.peak.rss if memory else None, memory.peak.anonymous if memory else None,
        memory.steady.rss if memory else None, variant.disk, set_.width, set_.height, set_.batch, set_.steps,
        set_.threads, set_.streams,
    ]  # fmt: skip
