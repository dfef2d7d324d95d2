"""Findings as a person reads them: Markdown tables, and the places in README and log where they go."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.nvidia.findings import EQUAL, Findings, Row
from sdrt.bench import show
from sdrt.bench.statistics import Ratio
from sdrt.errors import InputError, shortened
from sdrt.staging import replacing

BEGIN, END = "<!-- nvidia: begin -->", "<!-- nvidia: end -->"
PUBLISHED = 0.572
"""Seconds of 50 steps and all else at 512×512 on an H100, ONNX Runtime CUDA in float16 with bound memory: onnxruntime's
pull request 22834."""


def table(found: Findings, batch: int) -> list[str]:
    """The rows of one batch size, as lines."""
    rows = [row for row in found.rows if row.batch == batch]
    peers = [row.name for row in rows if not row.ours]
    head = ["", f"{found.steps} steps, whole", "pictures/s", *(f"{name} / it" for name in peers), "step", "/ floor",
            "VAE decoder", "host a step", "peak VRAM", "PSNR"]  # fmt: skip
    return list(_lines(head, [list(_cells(row, peers)) for row in rows]))


def _lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _cells(row: Row, peers: Sequence[str]) -> Iterator[str]:
    yield row.name
    if row.failure:
        yield f"no figures: {plain(row.failure)}"
        yield from ["–"] * (8 + len(peers) - 1)
        return
    total, step = row.stages["total"], row.median("step")
    yield f"{show.seconds(total.median)}" + (f" ± {total.spread / 2:.1%}" if total.spread is not None else "")
    yield f"{row.images_per_second:.3g}" if row.images_per_second is not None else "–"
    for name in peers:
        yield ratio(row.over.get(name)) if row.ours else "1" if name == row.name else "–"
    yield _seconds(step)
    yield f"{step / row.floor:.2f}" if step is not None and row.floor else "–"
    yield _seconds(row.median("vae_decoder"))
    yield _seconds(row.median("host")) if row.ours else "–"
    yield f"{row.vram / 1e9:.2f} GB" if row.vram is not None else "–"
    yield "–" if row.psnr is None else "equal" if row.psnr >= EQUAL else f"{row.psnr:.0f} dB"


def _seconds(value: float | None) -> str:
    return "–" if value is None else show.seconds(value)


def plain(text: str) -> str:
    """A text of several lines for a cell."""
    return shortened(re.sub(r"\s+", " ", text).replace("|", "/").strip(), 240)


def ratio(found: Ratio | None) -> str:
    """``1.23 (1.20–1.26)``"""
    if found is None:
        return "–"
    interval = "" if found.low is None or found.high is None else f" ({found.low:.2f}–{found.high:.2f})"
    return f"{found.estimate:.2f}{interval}"


# -- what was asked ---------------------------------------------------------------------------------------------------


def fastest(found: Findings, batch: int) -> Row | None:
    """Ours that takes the least time; None where none has figures."""
    rows = [row for row in found.rows if row.ours and row.batch == batch and not row.failure]
    return min(rows, key=lambda row: row.stages["total"].median, default=None)


def bars(found: Findings) -> Iterator[tuple[str, str, str]]:
    """What was asked, what was seen, and ``yes``, ``no`` or ``–`` where it was not measured. Of the fastest of ours."""
    one = fastest(found, 1)
    compiled = _least(one, "compiled")
    yield _bar("times as fast as compiled diffusers, batch 1: 1.3", compiled, lambda r: r.estimate >= 1.3)
    yield _bar("times as fast as eager diffusers, batch 1: 2.5", _least(one, "eager"), lambda r: r.estimate >= 2.5)
    more = max((row.batch for row in found.rows), default=1)
    if more > 1:
        beside = _least(fastest(found, more), "compiled")
        yield _bar(f"as many pictures a second as compiled, batch {more}: 1.2", beside, lambda r: r.estimate >= 1.2)
    step = one.median("step") if one is not None else None
    if one is not None and step is not None and one.floor:
        times = step / one.floor
        yield "a step over its floor: at most 2", f"{times:.2f} ({show.seconds(one.floor)})", _yes(times <= 2)
    host = one.median("host") if one is not None else None
    if host is not None:
        yield "host's part of a step: at most 0.1 ms", show.seconds(host), _yes(host <= 1e-4)
    if one is not None and one.psnr is not None:
        yield "PSNR to diffusers in float32: 45 dB", f"{one.psnr:.0f} dB", _yes(one.psnr >= 45)
    if one is not None and step is not None and (found.width, found.height) == (512, 512) and "H100" in found.device:
        whole = one.stages["total"].median + (50 - found.steps) * step
        seen = f"{show.seconds(whole)} (what the stages add up to)"
        yield f"50 steps on an H100: {show.seconds(PUBLISHED / 2)}", seen, _yes(whole <= PUBLISHED / 2)
    for aligned in found.aligned:
        seen = f"{aligned.difference:+.1f} points [{aligned.low:+.1f}, {aligned.high:+.1f}]"
        yield f"{aligned.name}, {aligned.captions}: no significant loss", seen, _yes(aligned.high >= 0)


def _least(row: Row | None, word: str) -> Ratio | None:
    """Beside the fastest of the peers with this word in their names."""
    ratios = [found for name, found in row.over.items() if word in name] if row is not None else []
    return min(ratios, key=lambda found: found.estimate, default=None)


def _bar(what: str, found: Ratio | None, met: Callable[[Ratio], bool]) -> tuple[str, str, str]:
    return what, ratio(found), "–" if found is None else _yes(met(found))


def _yes(met: bool) -> str:
    return "yes" if met else "no"


# -- whole texts ------------------------------------------------------------------------------------------------------


def summary(found: Findings) -> str:
    """What the README shows."""
    return "\n".join(_summary(found)) + "\n"


def _summary(found: Findings) -> Iterator[str]:
    libraries = ", ".join(f"{name} {version}" for name, version in sorted(found.versions.items()))
    yield (
        f"On one {found.device} ({found.about}), {found.created[:10]}, {found.width}×{found.height},"
        f" {found.scheduler}, guidance {found.guidance_scale:g}: `python -m benchmarks.nvidia`. {_how(found)}"
        f" {libraries}."
    )
    for batch in sorted({row.batch for row in found.rows}):
        yield f"\nBatch {batch}:\n"
        yield from table(found, batch)
    if asked := list(bars(found)):
        yield ""
        yield from _lines(("asked of the fastest of sdrt's", "seen", "met"), asked)


def _how(found: Findings) -> str:
    turns = f"{found.starts} fresh processes, warmed up, of {found.turns} batches each (n={found.starts * found.turns})"
    order = "all loaded, in turn" if found.paired else "one after another, as the card has no room for all"
    return (
        f"{turns}, {order}. Medians, ± half the interquartile range; ratios are times over its, with intervals that"
        " hold with 95 % pair by pair. The floor: a step's products and convolutions at the card's best rate."
    )


def section(found: Findings) -> str:
    """What the log keeps."""
    return "\n".join(_section(found)) + "\n"


def _section(found: Findings) -> Iterator[str]:
    yield f"## {found.created[:10]}: {found.device}, beside diffusers"
    commit = f" ({found.commit})" if found.commit else ""
    yield f"`{found.command}`, sdrt {found.sdrt}{commit}. Random weights unless the checkpoint was given.\n"
    yield from _summary(found)
    if found.builds:
        yield "\nBuilds:\n"
        rows = [
            (b.name, f"no: {plain(b.failure)}", "–", "–", "–")
            if b.failure
            else (b.name, b.target, f"{b.seconds:.0f} s", f"{b.plan / 1e9:.2f} GB", f"{b.peak_rss / 1e9:.1f} GB")
            for b in found.builds
        ]
        yield from _lines(("", "target", "`sdrt build`", "bytes", "peak RSS"), rows)
    if found.loop is not None:
        told = f"{show.seconds(found.loop.median)} (n={found.loop.n})"
        yield f"\nA step of the loop around an engine that computes nothing: {told}."
    by = sorted({row.vram_by for row in found.rows if row.vram_by})
    if by:
        told = "of a process alone, its context and its warming up included"
        yield f"\nPeak VRAM is {told}; told by {', '.join(by)}."
        for row in found.rows:
            if row.held:
                parts = ", ".join(f"{kind} {nbytes / 1e9:.2f} GB" for kind, nbytes in row.held.items())
                yield f"Of it, {row.name}, batch {row.batch}: {parts}."
    for warning in found.warnings:
        yield f"\nWarning: {plain(warning)}."


# -- where they go ----------------------------------------------------------------------------------------------------


def filled(text: str, block: str, name: str = "README.md") -> str:
    """The text with what stands between the markers replaced. InputError unless both are there once, in order."""
    if (text.count(BEGIN), text.count(END)) != (1, 1) or text.index(BEGIN) > text.index(END):
        raise InputError(
            f"{name}: expected one {BEGIN} and after it one {END}, found {text.count(BEGIN)} and {text.count(END)}",
            "put the two lines where the table belongs, or leave --readme out",
        )
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{block.strip()}\n{END}{rest.partition(END)[2]}"


def logged(text: str, block: str) -> str:
    """The log with one more section, before the others: newest first."""
    match = re.search(r"^## \d{4}-\d{2}-\d{2}", text, re.MULTILINE)
    at = match.start() if match else len(text)
    gap = "" if not text[:at] or text[:at].endswith("\n\n") else "\n" if text[:at].endswith("\n") else "\n\n"
    return f"{text[:at]}{gap}{block.strip()}\n" + (f"\n{text[at:]}" if match else "")


def check_readme(path: Path) -> None:
    """InputError, before hours of work, where it could not be filled."""
    filled(_read(path), "", str(path))


def write_readme(path: Path, found: Findings) -> None:
    """Fill it. InputError, OSError."""
    _write(path, filled(_read(path), summary(found), str(path)))


def write_log(path: Path, found: Findings) -> None:
    """Add a section. InputError, OSError."""
    _write(path, logged(_read(path), section(found)))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}", "name another file") from None


def _write(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())
