"""sdrt build"""

from __future__ import annotations

import importlib
import time
from typing import Any, get_args

import click

from sdrt import bundle as bundles
from sdrt.cli import Command, common
from sdrt.engine import BuildOptions


@click.command(
    cls=Command,
    examples="""
    sdrt build sd15 sd15-ort --engine onnxruntime
    sdrt build sd15 sd15-512 --engine onnxruntime --shape 512x512 --batch 1
    """,
)
@click.argument("bundle", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--engine", required=True, metavar="NAME", help="Engine to build for; sdrt doctor lists them.")
@click.option("--precision", type=click.Choice(get_args(bundles.Precision)), default="fp32", show_default=True)
@click.option(
    "--shape", "shapes", multiple=True, metavar="WxH", callback=common.parse_shapes,
    help="Picture size in pixels that the engine is fixed to; repeatable. Any size when left out.",
)  # fmt: skip
@click.option("--batch", type=click.IntRange(1, 1024), help="Most pictures at once. Any number when left out.")
@click.option("--target", metavar="NAME", help="What to build for, where an engine can build for another machine.")
@common.extra_option
@click.option("--force", is_flag=True, help="Replace OUT if it is a bundle.")
def command(
    bundle: str, out: str, engine: str, precision: bundles.Precision, shapes: tuple[tuple[int, int], ...],
    batch: int | None, target: str | None, extra: dict[str, str], force: bool,
) -> None:  # fmt: skip
    """Build the ONNX bundle BUNDLE for one engine into the self-contained bundle OUT.

    BUNDLE may also be a directory of ONNX models that optimum wrote. Each component is held against its reference
    vectors; the figures go into OUT.
    """
    builder: Any = importlib.import_module("sdrt_engines.build")
    options = BuildOptions(precision, shapes, batch, target, extra=extra)
    started = time.perf_counter()
    with common.progress() as show:
        builder.build(
            bundle, out, engine, options, force=force, report=lambda name, what, done: show(f"{name}: {what}", done)
        )
    click.echo(f"{out}: built for {engine} in {time.perf_counter() - started:.0f} s", err=True)
