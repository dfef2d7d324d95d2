"""sdrt export"""

from __future__ import annotations

import importlib
import shlex
import time
from typing import Any

import click

from sdrt import bundle as bundles
from sdrt.cli import Command, common
from sdrt.errors import ExportError

INSTALL = "pip install 'sdrt[export,ort]'"


@click.command(
    cls=Command,
    examples="""
    sdrt export ./stable-diffusion-v1-5 sd15
    sdrt export stable-diffusion-v1-5/stable-diffusion-v1-5 sd15      (a Hub id)
    sdrt export ./my-fine-tune tuned-unet --component unet            (the U-Net alone)
    sdrt export ./my-fp16-model small --weights fp16                  (half the size, same pictures)
    """,
)
@click.argument("model")
@click.argument("out", type=click.Path())
@click.option(
    "--component",
    "components",
    multiple=True,
    metavar="NAME",
    help="Only this component; repeatable. OUT holds nothing else.",
)
@click.option(
    "--weights", type=click.Choice(["fp32", "fp16"]), default="fp32", show_default=True,
    help="Store weights so. fp16: half the size, for a checkpoint whose weights float16 holds exactly; same pictures.",
)  # fmt: skip
@click.option(
    "--guidance-scale", type=click.FloatRange(-bundles.MAX_GUIDANCE, bundles.MAX_GUIDANCE),
    help="What generate uses when it is given none; the family's default when left out.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace OUT if it is a bundle.")
def command(
    model: str, out: str, components: tuple[str, ...], weights: str, guidance_scale: float | None, force: bool
) -> None:  # fmt: skip
    """Trace the checkpoint MODEL into the ONNX bundle OUT.

    MODEL is a directory in diffusers' layout or a Hugging Face Hub id. Every graph is checked against torch; a graph
    that differs fails the export and leaves no bundle.
    """
    try:
        exporter: Any = importlib.import_module("sdrt_export.exporter")
        for library in ("torch", "diffusers", "transformers", "onnxscript"):
            importlib.metadata.version(library)
        importlib.import_module("onnxruntime")  # what is exported is held against torch with it
    except importlib.metadata.PackageNotFoundError as error:
        raise ExportError(f"{error.name} is not installed", INSTALL) from None
    except ModuleNotFoundError as error:
        raise ExportError(f"{error.name} is not installed", INSTALL) from None
    started = time.perf_counter()
    needed = exporter.estimate(model, components, weights)
    click.echo(f"about {common.size(needed.disk)} of disk, {common.size(needed.memory)} of memory", err=True)
    with common.progress() as show:
        bundle = exporter.export(
            model, out, components=components, weights=weights, guidance_scale=guidance_scale, force=force,
            report=lambda p: show(f"{p.component}: {p.stage}", p.fraction),
        )  # fmt: skip
    worst = min(
        (p.psnr for c in bundle.manifest.components.values() for p in c.artifact.parity if p.psnr is not None),
        default=None,
    )
    click.echo(f"{out}: {', '.join(bundle.manifest.components)} in {time.perf_counter() - started:.0f} s", err=True)
    click.echo(f"worst parity with torch: {'identical' if worst is None else f'{worst:.1f} dB'}", err=True)
    if not components:
        click.echo(f'next: sdrt generate "a lighthouse" -m {shlex.quote(out)} -o lighthouse.png', err=True)
