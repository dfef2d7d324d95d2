"""sdrt build"""

from __future__ import annotations

import importlib
import time
from typing import Any, get_args

import click

from sdrt import bundle as bundles
from sdrt import by_component
from sdrt.cli import Command, common
from sdrt.engine import BuildOptions


@click.command(
    cls=Command,
    examples="""
    sdrt build sd15 sd15-ort --engine onnxruntime
    sdrt build sd15 sd15-512 --engine onnxruntime --shape 512x512 --batch 1
    sdrt build sd15 sd15-half --engine onnxruntime --precision fp16
    sdrt build sd15 sd15-small --engine onnxruntime --precision unet=int8,vae_decoder=fp16 --calibration prompts.txt
    """,
)
@click.argument("bundle", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--engine", required=True, metavar="NAME", help="Engine to build for; sdrt doctor lists them.")
@click.option(
    "--precision", default="fp32", show_default=True, metavar="VALUE",
    help=f"One of {', '.join(get_args(bundles.Precision))} (not every engine has all), or by component:"
    " unet=int8,vae_decoder=fp16 (the others fp32).",
)  # fmt: skip
@click.option(
    "--shape", "shapes", multiple=True, metavar="WxH", callback=common.parse_shapes,
    help="Picture size in pixels that the engine is fixed to; repeatable. When left out any size, or, of TensorRT's and"
    " Core ML's, the model's own.",
)  # fmt: skip
@click.option(
    "--batch", type=click.IntRange(1, 1024),
    help="Most pictures at once. When left out any number, or, of TensorRT's and Core ML's, one.",
)  # fmt: skip
@click.option(
    "--calibration", metavar="FILE",
    help="Prompts, one a line, that int8 scales (the first 16) and fp16 ranges (the first two) are measured with."
    " Built-in ones when left out.",
)  # fmt: skip
@click.option("--target", metavar="NAME", help="What to build for, where an engine can build for another machine.")
@common.extra_option
@click.option("--force", is_flag=True, help="Replace OUT if it is a bundle.")
def command(
    bundle: str, out: str, engine: str, precision: str, shapes: tuple[tuple[int, int], ...],
    batch: int | None, calibration: str | None, target: str | None, extra: dict[str, str], force: bool,
) -> None:  # fmt: skip
    """Build the ONNX bundle BUNDLE for one engine into the self-contained bundle OUT.

    BUNDLE may also be a directory of ONNX models that optimum wrote. Each component is held against its reference
    vectors; the figures go into OUT.
    """
    builder: Any = importlib.import_module("sdrt_engines.build")
    prompts: tuple[str, ...] = ()
    if calibration is not None:
        prompts = importlib.import_module("sdrt_engines.calibration").read_prompts(calibration)
    precisions: Any = by_component.parse(precision, "--precision")  # what they are is checked by build
    options = BuildOptions(precisions, shapes, batch, target, extra=extra, prompts=prompts)
    started = time.perf_counter()
    with common.progress() as show:
        builder.build(
            bundle, out, engine, options, force=force, report=lambda name, what, done: show(f"{name}: {what}", done)
        )
    click.echo(f"{out}: built for {engine} in {time.perf_counter() - started:.0f} s", err=True)
