"""sdrt verify"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from sdrt import bundle as bundles
from sdrt import verify
from sdrt.cli import Command, common
from sdrt.engine import ONNX, OpenOptions, devices_by_component, open_session, opening_engine, threads_by_component
from sdrt.errors import BundleError, NumericsError


@click.command(cls=Command, examples="sdrt verify sd15\nsdrt verify sd15 --engine onnxruntime --threads 2 --json -")
@click.argument("bundle", type=click.Path(), default=common.demo)
@common.opening_options
@common.json_option
def command(
    bundle: str,
    engine: str | None,
    device: str | None,
    threads: int | None,
    cache: Path | None,
    extra: dict[str, str],
    json_file: str | None,
) -> None:
    """Check the hashes of all files, then each component's outputs against its reference vectors, on this machine.

    They are what torch computed (cases named ...-onnx: what ONNX Runtime computed in float32); torch is not needed.
    """
    from tqdm import tqdm

    held = bundles.load(bundle)
    devices = devices_by_component(held, device)
    by_threads = threads_by_component(threads, devices)
    if held.manifest.unhashed():
        graphs = all(component.artifact.engine == ONNX for component in held.manifest.components.values())
        command = f"sdrt build {bundle} OUT --engine onnxruntime" if graphs else "sdrt export MODEL OUT"
        raise BundleError(
            f"{bundle}: has no {bundles.MANIFEST}, so there are no hashes and no reference vectors to check it against",
            f"{command} makes a bundle that has them",
        )
    total = sum(file.bytes for file in held.manifest.all_files())
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="hashes", leave=False, disable=not sys.stderr.isatty()
    ) as bar:
        damaged = bundles.damaged(held, bar.update)
    figures: list[dict[str, Any]] = []
    unmeasured: list[str] = []
    if not damaged:
        click.echo(f"{common.size(total)} in {sum(1 for _ in held.manifest.all_files())} files: hashes match", err=True)
        for name, component in held.manifest.components.items():
            measured = _measure(held, name, engine, devices[name], OpenOptions(by_threads[name], cache, extra))
            if not measured:
                unmeasured.append(name)
                click.echo(f"{name}: no reference vectors of the sizes that it was built for", err=True)
            recorded = {(p.case, p.output): p.psnr for p in component.artifact.parity}
            figures += [
                {"component": name, "case": p.case, "output": p.output, "max_abs": p.max_abs, "psnr": p.psnr,
                 "recorded_psnr": recorded.get((p.case, p.output)),
                 "passed": verify.passed(p, component.artifact.precision)}
                for p in measured
            ]  # fmt: skip
    if json_file is not None:
        common.write_json({"damaged": damaged, "unmeasured": unmeasured, "parity": figures}, json_file)
    if damaged:
        raise BundleError(
            f"{bundle}: {len(damaged)} of its files are damaged: {', '.join(damaged)}",
            f"copy the bundle again, or make it again from {held.manifest.provenance.source}",
        )
    if json_file != "-":
        click.echo(_table(figures))
    if failed := list(dict.fromkeys(figure["component"] for figure in figures if not figure["passed"])):
        raise NumericsError(
            f"{', '.join(failed)}: not what the reference vectors say",
            "the engine on this machine is at fault: try another engine or device",
        )


def _measure(
    held: bundles.Bundle, name: str, engine: str | None, device: str | None, options: OpenOptions
) -> list[bundles.Parity]:
    """Parity of one component on this machine; empty when the bundle has no reference vectors for it."""
    if held.component(name).reference is None:
        return []
    if device is None:
        device = opening_engine(held, name, engine, options).CHECKS_ON
    session = open_session(held, name, engine=engine, device=device, options=options)
    try:
        return list(verify.measure(held, name, session))
    finally:
        session.close()


def _table(figures: list[dict[str, Any]]) -> str:
    """What was measured, as a table; hidden states that passed are left out."""
    rows = [
        (f["component"], f["case"], f["output"], f"{f['max_abs']:.2e}", decibels(f["psnr"]),
         decibels(f["recorded_psnr"]), "ok" if f["passed"] else "FAILED")
        for f in figures
        if not (f["passed"] and f["output"].startswith("hidden_states."))
    ]  # fmt: skip
    return common.table(("component", "case", "output", "max abs", "PSNR", "recorded", ""), rows)


def decibels(psnr: float | None) -> str:
    """A figure of the manifest as a person reads it."""
    return "identical" if psnr is None else f"{psnr:.1f} dB"
