"""sdrt bench"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import click

from sdrt.cli import Command, Group, common
from sdrt.errors import SdrtError

EXAMPLES = """
    sdrt bench -m sd15
    sdrt bench -m sd15-fp32 -m sd15-int8 --shape 512x512 --steps 20 -i 5 --json report.json
    sdrt bench -m sd15 --batch 1,2,4 --threads 1,2 --streams 1,2 --csv sweep.csv
    sdrt bench -m sd15 --low-memory --json low.json
    sdrt bench compare before.json after.json --fail-above 3
"""


def _several(least: int, most: int) -> Callable[[click.Context, click.Parameter, str], tuple[int, ...]]:
    """``1,2,4`` → (1, 2, 4)."""

    def parse(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[int, ...]:
        words = value.split(",") if value is not None else []
        if not all(word.isascii() and word.isdigit() and least <= int(word[:9]) <= most for word in words):
            raise click.BadParameter(f"{value!r} is not a list of numbers of {least} to {most}, such as 1,2,4")
        return tuple(dict.fromkeys(map(int, words)))

    return parse


@click.group(cls=Group, invoke_without_command=True, examples=EXAMPLES)
@click.option(
    "-m", "--model", "models", multiple=True, type=click.Path(), default=lambda: [common.demo()],
    show_default="demo, which comes with sdrt",
    help="Bundle; repeatable: compared in turn.",
)  # fmt: skip
@click.option("--engine", metavar="NAME", help="Engine; each bundle's own when left out.")
@common.device_option
@common.cache_option
@common.low_memory_option
@click.option(
    "--shape", "shapes", multiple=True, metavar="WxH", callback=common.parse_shapes,
    help="Picture size in pixels; repeatable; the model's own when left out.",
)  # fmt: skip
@click.option(
    "--batch", default="1", show_default=True, metavar="N,...", callback=_several(1, 1024), help="Pictures at once."
)
@click.option("--threads", metavar="N,...", callback=_several(1, 1024), help="Compute threads a stream.")
@click.option(
    "--streams", default="1", show_default=True, metavar="N,...", callback=_several(1, 64),
    help="Batches at the same time, each with its own sessions.",
)  # fmt: skip
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True, help="Steps of the scheduler.")
@click.option("--scheduler", metavar="NAME", help="As sdrt generate's; the model's own when left out.")
@click.option(
    "--cfg-scale", "--guidance-scale", type=float, help="1: no guidance; the model's own when left out."
)  # fmt: skip
@click.option(
    "-p", "--prompt", default="a lighthouse on a cliff at dawn, oil painting", metavar="TEXT", help="What is shown."
)
@click.option("-w", "--warmups", type=click.IntRange(0), default=1, show_default=True, help="Batches not counted.")
@click.option("-i", "--iterations", type=click.IntRange(1), default=5, show_default=True, help="Batches, a start.")
@click.option(
    "--starts", type=click.IntRange(1), help="Fresh processes, each with -w and -i.  [default: 1; 3 for several -m]"
)  # fmt: skip
@click.option("--memory/--no-memory", default=True, help="Measure memory and the cold start, in runs of their own.")
@click.option("--machine/--no-machine", default=True, help="Measure what the machine can do at best.")
@common.extra_option
@common.json_option
@click.option("--csv", "csv_file", metavar="FILE", help="Write the figures as CSV; - is standard output.")
@click.pass_context
def command(
    context: click.Context, models: tuple[str, ...], engine: str | None, device: str | None, cache: Path | None,
    low_memory: bool, shapes: tuple[tuple[int, int], ...], batch: tuple[int, ...], threads: tuple[int, ...],
    streams: tuple[int, ...],
    steps: int, scheduler: str | None, cfg_scale: float | None, prompt: str, warmups: int, iterations: int,
    starts: int | None, memory: bool, machine: bool, extra: dict[str, str], json_file: str | None, csv_file: str | None,
) -> None:  # fmt: skip
    """Measure latency, throughput and memory, stage by stage, in processes of their own.

    Several bundles, or a sweep (N,... is a list: 1,2,4), are measured in alternation; each is compared with the first
    one that does the same work, by ratios with confidence intervals. A sweep ends with the line that makes the most
    pictures a second.
    """
    if context.invoked_subcommand is not None:
        given = click.core.ParameterSource.COMMANDLINE
        if any(context.get_parameter_source(name) is given for name in context.params):
            raise click.UsageError("options of a measurement mean nothing to compare: sdrt bench compare A B")
        return
    common.check_writable("--json", json_file)
    common.check_writable("--csv", csv_file)
    if (json_file, csv_file) == ("-", "-"):
        raise click.UsageError("--json and --csv cannot both go to standard output")
    from sdrt.bench import measuring, show, sweep
    from sdrt.bench.report import Settings

    base = Settings(
        model="", width=0, height=0, engine=engine, device=device, steps=steps, scheduler=scheduler,
        prompt=prompt, options=extra, cache=None if cache is None else str(cache), low_memory=low_memory,
    )  # fmt: skip
    plans = sweep.plans(
        models, base, shapes=shapes, batches=batch, threads=threads or (None,), streams=streams,
        guidance_scale=cfg_scale,
    )  # fmt: skip
    starts = starts or (3 if len(models) > 1 else 1)
    total, done = measuring.steps(
        len(plans), warmups=warmups, iterations=iterations, processes=starts, memory=memory, machine=machine
    ), 0  # fmt: skip
    with common.progress() as bar:

        def progress(what: str) -> None:
            nonlocal done
            bar(what, min(done / total, 1.0))
            done += 1

        report = measuring.alternate(
            plans, warmups=warmups, iterations=iterations, processes=starts, memory=memory, machine=machine,
            command=shlex.join(["sdrt", *sys.argv[1:]]), progress=progress,
        )  # fmt: skip
    if "-" not in (json_file, csv_file):
        click.echo(show.text(report))  # first: a file that cannot be written must not cost the figures
    if json_file is not None:
        common.write_json(report.json(), json_file)
    if csv_file is not None:
        common.write_text(show.table(report), csv_file, "--csv")
    if report.failures:
        raise SdrtError(f"{len(report.failures)} of {len(plans)} failed: {'; '.join(report.failures.values())}")


@command.command(
    "compare",
    cls=Command,
    examples="""
    sdrt bench compare before.json after.json
    sdrt bench compare before.json after.json --fail-above 3
    """,
)
@click.argument("base", type=click.Path())
@click.argument("other", type=click.Path())
@click.option(
    "--fail-above", type=click.FloatRange(0), metavar="PERCENT",
    help="Exit 1 when a stage, or the whole, is slower by more than that, beyond doubt.",
)  # fmt: skip
@common.json_option
def compare(base: str, other: str, fail_above: float | None, json_file: str | None) -> None:
    """Compare two reports of sdrt bench --json: times of OTHER over those of BASE, with confidence intervals.

    Reports from different times also differ by what changed on the machine: where that matters, measure both bundles in
    one sdrt bench.
    """
    common.check_writable("--json", json_file)
    if fail_above is not None and not math.isfinite(fail_above):
        raise click.BadParameter(f"{fail_above} is not a percentage", param_hint="--fail-above")
    from sdrt import strict_json
    from sdrt.bench import show
    from sdrt.bench.compare import compare_reports
    from sdrt.bench.report import load

    comparisons, warnings = compare_reports(load(base), load(other))
    if json_file is not None:
        common.write_json({"comparisons": strict_json.encode(comparisons), "warnings": warnings}, json_file)
    if json_file != "-":
        click.echo("\n\n".join((*map(show.comparison, comparisons), *(f"warning: {line}" for line in warnings))))
    if fail_above is None:
        return
    limit = 1 + fail_above / 100
    judged = [(f"{c.other}, {stage}", ratio) for c in comparisons for stage, ratio in c.ratios.items()]
    for what, ratio in judged:
        if ratio.low is None or (ratio.low <= limit < (ratio.high or limit)):
            click.echo(f"warning: {what}: cannot tell whether it is {fail_above:g} % slower", err=True)
    slower = [
        f"{what}: {ratio.estimate - 1:+.1%}" for what, ratio in judged if ratio.low is not None and ratio.low > limit
    ]
    if slower:
        raise SdrtError(f"slower by more than {fail_above:g} %: {'; '.join(slower)}")
