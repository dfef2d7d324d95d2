"""sdrt verify"""

from __future__ import annotations

import sys
from typing import Any

import click

from sdrt import bundle as bundles
from sdrt.cli import Command, common
from sdrt.errors import BundleError, NumericsError


@click.command(cls=Command, examples="sdrt verify sd15\nsdrt verify sd15 --engine onnxruntime --threads 2 --json -")
@click.argument("bundle", type=click.Path())
@common.opening_options
@common.json_option
def command(
    bundle: str,
    engine: str | None,
    device: str | None,
    threads: int | None,
    extra: dict[str, str],
    json_file: str | None,
) -> None:
    """Check the hashes of all files, then each component's outputs against torch's, on this machine, without torch."""
    from tqdm import tqdm

    from sdrt import verify
    from sdrt.engine import OpenOptions, open_session

    held = bundles.load(bundle)
    total = sum(file.bytes for file in held.manifest.all_files())
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="hashes", leave=False, disable=not sys.stderr.isatty()
    ) as bar:
        damaged = bundles.damaged(held, bar.update)
    if damaged:
        raise BundleError(
            f"{bundle}: {len(damaged)} of its files are damaged: {', '.join(damaged)}",
            f"copy the bundle again, or make it again from {held.manifest.provenance.source}",
        )
    rows: list[tuple[Any, ...]] = []
    failed: list[str] = []
    for name, component in held.manifest.components.items():
        if component.reference is None:
            rows.append((name, "-", "-", "no reference vectors", "-", "-"))
            continue
        session = open_session(held, name, engine=engine, device=device, options=OpenOptions(threads, extra=extra))
        try:
            figures = list(verify.measure(held, name, session))
        finally:
            session.close()
        recorded = {(p.case, p.output): p for p in component.artifact.parity}
        for parity in figures:
            good = verify.passed(parity, component.artifact.precision)
            if not good:
                failed.append(name)
            before = recorded.get((parity.case, parity.output))
            rows.append((name, parity.case, parity.output, f"{parity.max_abs:.2e}", decibels(parity.psnr),
                         decibels(before.psnr) if before else "-", "ok" if good else "FAILED"))  # fmt: skip
    if json_file is not None:
        keys = ("component", "case", "output", "max_abs", "psnr", "recorded_psnr", "result")
        common.write_json(
            {"damaged": damaged, "parity": [dict(zip(keys, row, strict=False)) for row in rows]}, json_file
        )
    if json_file != "-":
        head = ("component", "case", "output", "max abs", "PSNR", "recorded", "")
        shown = [row for row in rows if not str(row[2]).startswith("hidden_states.") or row[-1] != "ok"]
        click.echo(common.table(head, [(*row, *[""] * (len(head) - len(row))) for row in shown]))
        click.echo(f"{common.size(total)} in {sum(1 for _ in held.manifest.all_files())} files: hashes match", err=True)
    if failed:
        components = ", ".join(dict.fromkeys(failed))
        raise NumericsError(
            f"{components}: not what torch computed",
            "the engine on this machine is at fault: try another engine or device",
        )


def decibels(psnr: float | None) -> str:
    """A figure of the manifest as a person reads it."""
    return "identical" if psnr is None else f"{psnr:.1f} dB"
