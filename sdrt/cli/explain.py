"""sdrt explain"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np

from sdrt.cli import Command, common

COLUMNS = 10
"""Steps that are shown where not all are asked for."""
SIDE = 160


@dataclass(frozen=True)
class Row:
    """One step: its timestep and noise level, whether it was guided, its seconds, and how near the end it is, in dB."""

    step: int
    timestep: float
    sigma: float
    guided: bool
    seconds: float
    psnr: float


@click.command(
    cls=Command,
    examples="""
    sdrt explain "a large red star on a white background"
    sdrt explain "a lighthouse" -m sd15 --steps 30 --scheduler "Euler a" -o steps.png
    sdrt explain "a small blue ring" --guidance-interval 0.5 5 --every 1 --json -
    """,
)
@click.argument("prompt")
@common.model_option
@click.option("-n", "--negative-prompt", default=None, help="What not to show.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path("explain.png"), show_default=True,
    help="PNG file for the strip of pictures.",
)  # fmt: skip
@click.option("--steps", type=int, default=20, show_default=True, help="Denoising steps.")
@click.option("--every", type=click.IntRange(1), help="Show every n-th step; as many as fit, if left out.")
@click.option("--scheduler", metavar="NAME", help="As sdrt schedulers lists them; the model's own when left out.")
@click.option("--cfg-scale", type=float, help="Guidance scale; the model's own when left out.")
@click.option("--guidance-interval", type=float, nargs=2, metavar="LOW HIGH", help="Guidance between two noise levels.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the noise.")
@common.opening_options
@common.json_option
def command(
    prompt: str, model: str, negative_prompt: str | None, output: Path, steps: int, every: int | None,
    scheduler: str | None, cfg_scale: float | None, guidance_interval: tuple[float, float] | None, seed: int,
    engine: str | None, device: str | None, threads: int | None, cache: Path | None, extra: dict[str, str],
    json_file: str | None,
) -> None:  # fmt: skip
    """Show what the model does: the picture that it predicts at each step, and the noisy latents that are left.

    One column a step, with its timestep and noise level; the table tells when the picture is settled.
    """
    common.check_picture(output)
    common.check_writable("--json", json_file)
    import sdrt
    from sdrt import image
    from sdrt.metrics import psnr
    from sdrt.sheet import Cell, contact_sheet

    opened = sdrt.Pipeline.from_pretrained(model, engine, device, threads=threads, options=extra, cache=cache)
    with opened as pipe, common.progress() as report:
        made = []
        for step in pipe.stream(
            prompt, negative_prompt=negative_prompt, num_inference_steps=steps, scheduler=scheduler,
            guidance_scale=cfg_scale, guidance_interval=guidance_interval, seed=seed,
        ):  # fmt: skip
            made.append(step)
            report("steps", 0.8 * (step.index + 1) / step.total)
        final = pipe.decode(made[-1].latents, "np")
        nth = every or -(-len(made) // COLUMNS)
        predicted, left, rows = [], [], []
        for step in made:
            picture = pipe.decode(step.predicted_x0, "np")
            near = psnr(final, picture, 1.0)
            rows.append(Row(step.index + 1, step.timestep, step.sigma, step.guided, step.seconds, near))
            if (step.index + 1) % nth == 0 or step is made[-1]:
                told = f"step {step.index + 1}, timestep {step.timestep:.4g}, sigma {step.sigma:.3g}"
                predicted.append(Cell(image.to_pil(picture)[0], told))
                latents = step.latents / max(1.0, float(step.latents.std()))  # as strong as the decoder is used to
                left.append(Cell(pipe.decode(latents.astype(np.float32))[0]))
            report("pictures", 0.8 + 0.2 * (step.index + 1) / len(made))
    labels = "what the model takes the picture for, step by step", "what is left for the next step, noise and all"
    sheet = contact_sheet([predicted, left], labels, side=min(SIDE, final.shape[2]))
    image.save_png(sheet, output, f"{prompt}\nSteps: {steps}, Seed: {seed}, sdrt explain")
    if json_file is not None:
        common.write_json({"file": str(output), "steps": [asdict(row) for row in rows]}, json_file)
    if json_file != "-":
        click.echo(_table(rows))
        click.echo(f"{output}: {len(predicted)} of {len(made)} steps", err=True)


def _table(rows: list[Row]) -> str:
    head = ("step", "timestep", "sigma", "guided", "seconds", "to the final picture")
    return common.table(
        head,
        [
            (
                row.step, f"{row.timestep:.4g}", f"{row.sigma:.3g}", "yes" if row.guided else "no",
                f"{row.seconds:.3f}", "the same" if row.psnr == float("inf") else f"{row.psnr:.1f} dB",
            )
            for row in rows
        ],
    )  # fmt: skip
