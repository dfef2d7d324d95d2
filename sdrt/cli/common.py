"""What several commands share: option parsers, output to a file or to standard output, a table."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from sdrt.errors import InputError, quoted
from sdrt.staging import replacing


def parse_extra(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """``-O name=value`` → dict."""
    extra: dict[str, str] = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{quoted(value)} is not name=value")
        extra[name] = text
    return extra


def parse_numbers(_ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    """``14.6,6.5,2`` as numbers."""
    try:
        return None if value is None else tuple(float(number) for number in value.split(","))
    except ValueError:
        raise click.UsageError(f"{param.opts[0]} {value!r}: expected numbers, with commas between them") from None


def parse_shapes(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """``--shape 512x768`` → ((512, 768),), width first."""
    shapes = []
    for value in values:
        match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", value)
        if match is None:
            raise click.BadParameter(f"{quoted(value)} is not WIDTHxHEIGHT, such as 512x512")
        shapes.append((int(match[1]), int(match[2])))
    return tuple(shapes)


extra_option = click.option(
    "-O", "extra", multiple=True, metavar="NAME=VALUE", callback=parse_extra, help="Engine option; repeatable."
)
device_option = click.option(
    "--device", metavar="NAME", help="Device as the engine names it (sdrt doctor), or unet=NAME,vae_decoder=NAME."
)
cache_option = click.option(
    "--cache", type=click.Path(path_type=Path), metavar="DIR", help="Keep what the engine compiles, for the next time."
)
low_memory_option = click.option(
    "--low-memory", is_flag=True, help="Load, run and release components in turn: less memory, slower."
)


def demo() -> str:
    """The directory of the model that comes with sdrt: what is taken where none is named, whatever lies in the cwd."""
    from sdrt.bundle import SHIPPED

    return str(SHIPPED / "demo")


model_option = click.option(
    "-m", "--model", type=click.Path(), default=demo, show_default="demo, which comes with sdrt",
    help="Bundle, or directory of optimum's: ONNX, OpenVINO.",
)  # fmt: skip
json_option = click.option(
    "--json", "json_file", metavar="FILE", help="Write the result as JSON; - is standard output."
)


def opening_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of every command that opens a bundle: --engine, --device, --threads, --cache, -O."""
    for option in reversed((
        click.option("--engine", metavar="NAME", help="Engine; the bundle's own when left out."),
        device_option,
        click.option("--threads", type=click.IntRange(1, 1024), help="Compute threads; engine's choice when left out."),
        cache_option,
        extra_option,
    )):  # fmt: skip
        command = option(command)
    return command


@contextmanager
def progress() -> Iterator[Callable[[str, float], None]]:
    """Yield ``show(what, fraction)``: a bar with an estimate on a terminal, else a line whenever ``what`` changes."""
    from tqdm import tqdm

    layout = "{desc:32} {percentage:3.0f}% |{bar}| {elapsed}<{remaining}"
    last = ""
    terminal = sys.stderr.isatty()
    with tqdm(total=1.0, bar_format=layout, leave=False, disable=not terminal) as bar:

        def show(what: str, fraction: float) -> None:
            nonlocal last
            if not terminal and what != last:
                click.echo(f"{100 * fraction:3.0f} % {what}", err=True)
            last = what
            bar.n = fraction
            bar.set_description_str(what)

        yield show


def check_writable(option: str, file: str | None) -> None:
    """Before minutes of work: whether what ``option`` asks for will have a place to go."""
    if file in (None, "-"):
        return
    if not file or os.path.isdir(file) or not os.path.isdir(os.path.dirname(file) or "."):
        raise InputError(
            f"{file}: cannot be written: is a directory, or its directory is missing", f"choose another {option}"
        )


def check_picture(output: Path) -> None:
    """Before minutes of work: whether the picture will have a place to go."""
    if output.suffix.lower() != ".png":
        raise InputError(
            f"--output {output}: pictures are written as PNG",
            f"-o {output.with_suffix('.png') if output.name else 'out.png'}",
        )
    if os.path.isdir(output) or not os.path.isdir(output.parent):  # Path.is_dir raises for a name that is too long
        problem = "is a directory" if os.path.isdir(output) else f"there is no directory {output.parent}"
        raise InputError(f"--output {output}: {problem}", "choose another --output")


def write_json(value: Any, file: str) -> None:
    """Write JSON to a file, or to standard output for ``-``. InputError when it cannot be written."""
    ascii_only = file == "-"  # a terminal without the letters would put ? in their place
    text = json.dumps(_finite(value), indent=2, ensure_ascii=ascii_only, allow_nan=False) + "\n"
    write_text(text, file, "--json")


def write_text(text: str, file: str, option: str) -> None:
    """Write a text to a file, or to standard output for ``-``. InputError when it cannot be written."""
    if file == "-":
        click.echo(text, nl=False)
        return
    try:
        with replacing(Path(file)) as temporary:
            temporary.write(text.encode("utf-8", "replace"))
    except OSError as error:
        raise InputError(f"{file}: cannot be written: {error.strerror or error}", f"choose another {option}") from None


def _finite(value: Any) -> Any:
    """NaN and infinities, which JSON lacks, as null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as their widest cell; numbers to the right."""
    cells = [list(head), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    right = [all(isinstance(row[column], (int, float)) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("─" * width for width in widths), *lines[1:]])


def giga(count: int) -> str:
    """Billions: three digits, or one after the point."""
    return f"{count / 1e9:.1f}" if count > 10**11 else f"{count / 1e9:.3g}"


def size(count: int) -> str:
    """Bytes in the largest unit that leaves a number of at least 1."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
