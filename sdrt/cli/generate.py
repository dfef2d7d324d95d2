"""sdrt generate"""

from __future__ import annotations

import os
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import click

from sdrt.cli import Command, common
from sdrt.errors import InputError
from sdrt.noise import A1111_SOURCES, Rng


@click.command(
    cls=Command,
    examples="""
    sdrt generate "a large red star on a white background" -o star.png      (with the demo model that sdrt brings)
    sdrt generate "a lighthouse at dawn" -m sd15 -o lighthouse.png
    sdrt generate "a lighthouse" -m sd15 -n "blurry" --steps 20 --cfg-scale 7 --seed 1 --scheduler "DPM++ 2M Karras"
    sdrt generate "a lighthouse" -m sd15 -W 768 -H 512 --batch 4 -o lighthouse.png      (lighthouse-0.png ...)
    sdrt generate "a lighthouse" -m sd15-ov --low-memory --cache compiled --device unet=gpu,vae_decoder=cpu
    sdrt generate "a lighthouse in snow" -m sd15 --init-image lighthouse.png --strength 0.6 -o snow.png
    """,
)
@click.argument("prompt", required=False)
@common.model_option
@click.option(
    "-p", "--prompt", "prompt_option", metavar="TEXT", help="The prompt, when it is not given as an argument."
)
@click.option("-n", "--negative-prompt", metavar="TEXT", help="What the picture should not show.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("out.png"),
    show_default=True,
    help="PNG file to write.",
)
@click.option("-W", "--width", type=int, help="Pixels; the model's (or initial picture's) own size when left out.")
@click.option("-H", "--height", type=int, help="Pixels; as --width.")
@click.option("--init-image", type=click.Path(), metavar="FILE", help="PNG, JPEG or WebP to start from.")
@click.option(
    "--strength", type=float, help="With --init-image: part of the steps that is run on it.  [default: 0.8]"
)  # fmt: skip
@click.option(
    "--sample-mode", type=click.Choice(["sample", "argmax"]),
    help="With --init-image: draw its latents from the encoder's distribution, or take the mean.  [default: sample]",
)  # fmt: skip
@click.option("--steps", type=int, default=20, show_default=True, help="Steps of the scheduler.")
@click.option(
    "--cfg-scale", "--guidance-scale", type=float, help="1 turns guidance off; the model's own when left out."
)
@click.option("--seed", type=int, help="Picture i of the batch has seed + i; drawn when left out.")
@click.option("--batch", type=int, default=1, show_default=True, help="Pictures made at once.")
@click.option(
    "--scheduler",
    metavar="NAME",
    help='A1111 name ("DPM++ 2M Karras") or diffusers class; the model\'s own when left out.',
)
@click.option(
    "--eta", type=float,
    help="Fresh noise of each step, 0 to 1, for schedulers that can be told (DDIM, TCD, DPM++ 2S a, DPM fast).",
)  # fmt: skip
@click.option(
    "--timesteps", callback=common.parse_numbers, metavar="LIST",
    help="Where the steps lie, instead of --steps: 999,850,…, in training steps; for schedulers that can be told.",
)  # fmt: skip
@click.option(
    "--sigmas", callback=common.parse_numbers, metavar="LIST",
    help="The same as noise levels: 14.6,6.5,…; sdrt schedulers lists who takes which.",
)  # fmt: skip
@click.option(
    "--rng", type=click.Choice(["cpu", "cuda", "numpy"]), default="cpu", show_default=True,
    help="Whose noise: torch's on a CPU, as diffusers'; on CUDA, A1111's NV; numpy's.",
)  # fmt: skip
@click.option("--variation-seed", type=int, help="Another seed, mixed into the first noise.")
@click.option("--variation-strength", type=float, default=0.0, help="How much of it, 0 to 1.")
@click.option(
    "--guidance-rescale", type=float, default=0.0, help="0 to 1: against too much contrast of strong guidance."
)
@click.option(
    "--guidance-interval", type=float, nargs=2, metavar="LOW HIGH",
    help="Guidance only between two noise levels; elsewhere half of the work.",
)  # fmt: skip
@click.option(
    "--preview", type=click.IntRange(1), metavar="N",
    help="Every N steps, write what the picture will be to NAME-preview.png, which goes when the picture is there.",
)  # fmt: skip
@click.option(
    "--preview-by", type=click.Choice(["vae", "linear"]), default="vae", show_default=True,
    help="The VAE, or a linear map that is fitted to it at the first, second, fourth … preview: coarse, and free.",
)  # fmt: skip
@click.option("--clip-skip", type=int, default=0, show_default=True, help="Last layers of the text encoder left out.")
@click.option("--truncate", is_flag=True, help="Cut a prompt that is too long, with a warning.")
@common.opening_options
@common.low_memory_option
@common.json_option
def command(
    prompt: str | None, prompt_option: str | None, model: str, negative_prompt: str | None, output: Path,
    width: int | None, height: int | None, init_image: str | None, strength: float | None,
    sample_mode: Literal["sample", "argmax"] | None, steps: int, cfg_scale: float | None, seed: int | None, batch: int,
    scheduler: str | None, eta: float | None, timesteps: tuple[float, ...] | None, sigmas: tuple[float, ...] | None,
    rng: Rng, variation_seed: int | None, variation_strength: float, guidance_rescale: float,
    guidance_interval: tuple[float, float] | None, preview: int | None, preview_by: Literal["vae", "linear"],
    clip_skip: int, truncate: bool, engine: str | None, device: str | None, threads: int | None, cache: Path | None,
    extra: dict[str, str], low_memory: bool, json_file: str | None,
) -> None:  # fmt: skip
    """Make pictures from PROMPT. The PNG carries its settings as A1111's "parameters" text."""
    if (prompt is None) == (prompt_option is None):
        raise click.UsageError("give the prompt once, as an argument or with --prompt")
    text = prompt if prompt is not None else prompt_option
    assert text is not None
    if init_image is None and (strength is not None or sample_mode is not None):
        raise click.UsageError("--strength and --sample-mode need --init-image")
    common.check_picture(output)
    if init_image is not None and os.path.realpath(init_image) == os.path.realpath(output):
        raise InputError(f"--output {output}: is the picture to start from", "choose another --output")
    shown = output.with_stem(f"{output.stem}-preview")
    if preview is not None and os.path.lexists(shown):
        raise InputError(
            f"--preview: {shown} is there already, and would be lost", "move it, or choose another --output"
        )
    if variation_seed is not None and not variation_strength:
        raise click.UsageError("--variation-seed needs --variation-strength, above 0")
    _check_given(timesteps is not None or sigmas is not None, preview is not None)
    common.check_writable("--json", json_file)
    import sdrt
    from sdrt import image
    from sdrt.preview import Previews
    from sdrt.prompt import PromptTruncated

    warnings.simplefilter("ignore", PromptTruncated)  # the log says it, each time

    request = sdrt.GenerationRequest(
        text, negative_prompt=negative_prompt, width=width, height=height, num_inference_steps=steps,
        guidance_scale=cfg_scale, num_images_per_prompt=batch, seed=seed, scheduler=scheduler, eta=eta,
        rng=rng, variation_seed=variation_seed, variation_strength=variation_strength,
        guidance_rescale=guidance_rescale, guidance_interval=guidance_interval,
        timesteps=timesteps, sigmas=sigmas, clip_skip=clip_skip, truncate=truncate, image=init_image,
        strength=0.8 if strength is None else strength, sample_mode=sample_mode or "sample",
    )  # fmt: skip
    previews = None if preview is None else Previews(shown, preview, preview_by)
    started = time.perf_counter()
    with sdrt.Pipeline.from_pretrained(
        model, engine, device, threads=threads, options=extra, cache=cache, low_memory=low_memory
    ) as pipe:
        opened = time.perf_counter() - started
        result = pipe.generate(request, callback_on_step_end=previews, progress=sys.stderr.isatty())
        name = pipe.bundle.manifest.provenance.source
    paths = [output] if batch == 1 else [output.with_stem(f"{output.stem}-{i}") for i in range(batch)]
    others = request.variation_seeds()
    for i, (path, picture, picture_seed) in enumerate(zip(paths, result.images, result.seeds, strict=True)):
        parameters = image.parameters_text(
            text, negative_prompt or "", steps=request.num_inference_steps, sampler=result.scheduler,
            guidance_scale=result.guidance_scale, seed=picture_seed, size=result.size, model=name, clip_skip=clip_skip,
            eta=request.eta, strength=request.strength if request.pictures else None, version=sdrt.__version__,
            rng=A1111_SOURCES[request.rng], guidance_rescale=request.guidance_rescale,
            variation=(others[i], variation_strength) if others else None,
        )  # fmt: skip
        image.save_png(picture, path, parameters)
    if previews is not None:
        previews.remove()
    timings = result.timings
    load = opened + timings.load  # before the generation, and within it
    mean = sum(timings.steps) / len(timings.steps)
    picture = f" picture {timings.vae_encoder:.2f} s," if request.pictures else ""
    click.echo(
        f"{', '.join(map(str, paths))}: seed {result.seeds[0]}, load {load:.2f} s,"
        f" text {timings.tokenize + timings.text_encoder:.2f} s,{picture} {len(timings.steps)} steps of {mean:.3f} s,"
        f" VAE {timings.vae_decoder:.2f} s",
        err=True,
    )
    if json_file is not None:
        common.write_json(
            {
                "files": [str(path) for path in paths],
                "seeds": result.seeds,
                "size": list(result.size),
                "scheduler": result.scheduler,
                "guidance_scale": result.guidance_scale,
                "seconds": asdict(timings) | {"load": load},
            },
            json_file,
        )


def _check_given(by_hand: bool, previews: bool) -> None:
    """UsageError for an option that another one leaves without effect."""
    context = click.get_current_context()
    given = {
        name for name in context.params if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    }
    if by_hand and "steps" in given:
        raise click.UsageError("--timesteps and --sigmas say how many steps there are: leave --steps out")
    if not previews and "preview_by" in given:
        raise click.UsageError("--preview-by needs --preview")
