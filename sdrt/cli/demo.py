"""sdrt demo"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, get_args

import click

from sdrt import bundle as bundles
from sdrt.cli import Command, common
from sdrt.errors import EngineUnavailable, InputError, SdrtError


@click.command(
    cls=Command,
    examples="""
    sdrt demo
    sdrt demo -o sheet.png --precision fp32 --precision fp16 --json -
    sdrt demo --engine onnxruntime --keep built      (and: sdrt generate "a red ring" -m built/onnxruntime-fp32-cpu)
    """,
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path("demo.png"), show_default=True,
    help="PNG file for the contact sheet.",
)  # fmt: skip
@click.option("--engine", "engines", multiple=True, metavar="NAME", help="Only this engine; repeatable.")
@click.option(
    "--precision", "precisions", multiple=True, default=["fp32"], show_default=True,
    type=click.Choice(get_args(bundles.Precision)), help="Precision to build; repeatable.",
)  # fmt: skip
@click.option("--keep", type=click.Path(path_type=Path), metavar="DIR", help="Keep the built bundles in this folder.")
@common.json_option
def command(
    output: Path, engines: tuple[str, ...], precisions: tuple[bundles.Precision, ...], keep: Path | None,
    json_file: str | None,
) -> None:  # fmt: skip
    """Make the same pictures with each engine that is usable here, from the small model that sdrt brings.

    A table tells what each took and how far its pictures are from diffusers' in float32; the contact sheet shows them.
    """
    common.check_picture(output)
    common.check_writable("--json", json_file)
    from sdrt import demo, image
    from sdrt.engine import find_engine
    from sdrt.sheet import Cell, contact_sheet

    started = time.perf_counter()
    for name in engines:
        find_engine(name).devices()  # a name that there is not says so, and an engine that is not usable
        if name == "null":
            raise InputError("the null engine makes no pictures", "choose another --engine; sdrt doctor lists them")
    targets, missing = demo.usable()
    targets = [target for target in targets if not engines or target[0] in engines]
    if not targets:
        raise EngineUnavailable("no engine runs here:\n  " + "\n  ".join(missing), "sdrt doctor tells more")
    if keep is not None and keep.exists() and not keep.is_dir():
        raise InputError(f"--keep {keep}: is a file, expected a folder", "choose another --keep")
    bundle = bundles.load(common.demo())
    total, done = 2 * len(targets) * len(set(precisions)), 0
    with common.progress() as bar:

        def progress(what: str) -> None:
            nonlocal done
            bar(what, min(done / total, 1.0))
            done += 1

        shown = list(demo.show(bundle, targets, tuple(dict.fromkeys(precisions)), keep=keep, progress=progress))
    problems = [f"{s.row.engine} {s.row.precision}: {s.row.problem}" for s in shown if s.row.problem]
    if len(problems) == len(shown):
        raise SdrtError("no engine made pictures:\n  " + "\n  ".join(problems))
    pictures: list[tuple[str, Any]] = [("diffusers, float32", demo.reference(bundle))]
    pictures += [
        (f"{s.row.engine} {s.row.precision} on {s.row.device}", s.pictures) for s in shown if s.pictures is not None
    ]
    rows = [
        [Cell(picture, prompt) for picture, prompt in zip(image.to_pil(made), demo.PROMPTS, strict=True)]
        for _, made in pictures
    ]
    sheet = contact_sheet(rows, [label for label, _ in pictures], side=160)
    image.save_png(sheet, output, f"sdrt demo: seed {demo.SEED}, {demo.STEPS} steps")
    if json_file is not None:
        found = {"rows": [dataclasses.asdict(s.row) for s in shown], "unusable": missing, "sheet": str(output)}
        common.write_json(found, json_file)
    if json_file != "-":
        click.echo(table([s.row for s in shown]))
    for line in (*problems, *missing):
        click.echo(line, err=True)
    click.echo(f"{output}: {len(demo.PROMPTS)} pictures each, {time.perf_counter() - started:.1f} s in all", err=True)
    click.echo('next: sdrt generate "a large yellow heart above a small red ring on a blue background"', err=True)


def table(rows: list[Any]) -> str:
    """The rows as a person reads them."""

    def seconds(value: float | None, digits: int = 2) -> str:
        return "-" if value is None else f"{value:.{digits}f} s"

    def size(value: int | None) -> str:
        return "-" if value is None else common.size(value)

    def decibels(value: float) -> str:
        return "≥ 95 dB" if value > 95 else f"{value:.1f} dB"  # what demo.WHITE can tell

    cells = [
        (
            row.engine, row.precision, row.device, seconds(row.build, 1), seconds(row.load), seconds(row.first),
            seconds(row.step, 3), size(row.resident), size(row.device_memory),
            "-" if row.psnr is None else decibels(row.psnr),
        )
        for row in rows
    ]  # fmt: skip
    head = (
        "engine", "precision", "device", "build", "load", "first picture", "a step", "peak memory", "on the device",
        "least PSNR, diffusers",
    )  # fmt: skip
    return common.table(head, cells)
