"""The command line: one module a command, imported when it is called."""

from __future__ import annotations

import importlib
import io
import logging
import os
import signal
import sys
import warnings
from typing import Any

import click

import sdrt
from sdrt.errors import SdrtError

COMMANDS = {
    "demo": "Make pictures with every engine usable here, from a small model that is there.",
    "export": "Trace a checkpoint into an ONNX bundle.",
    "build": "Build an ONNX bundle for one engine.",
    "generate": "Make pictures from a prompt.",
    "explain": "Show what a model does, step by step, as a strip of pictures.",
    "bench": "Measure latency, throughput and memory; compare.",
    "schedulers": "List the schedulers: names, what a step takes, papers.",
    "inspect": "Show what a bundle holds.",
    "verify": "Check a bundle's files and its parity on this machine.",
    "doctor": "Show which engines and devices are usable here.",
}


_debugging = False


class _LazyGroup(click.Group):
    """Lists commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"sdrt.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


class _WithExamples:
    """Help that ends with examples, kept as they are written."""

    def __init__(self, *args: Any, examples: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples.strip().splitlines():
                    formatter.write(f"  {line.strip()}\n")


class Command(_WithExamples, click.Command):
    """A command whose help ends with examples."""


class Group(_WithExamples, click.Group):
    """A command with commands below it, whose help ends with examples."""


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(sdrt.__version__, "--version", prog_name="sdrt")
@click.option("--debug", is_flag=True, help="Show the traceback of an error, and log in detail.")
def cli(debug: bool) -> None:
    """Run Stable Diffusion on whatever chip is there: export, build, generate."""
    global _debugging  # noqa: PLW0603 - the one state of a command line
    _debugging = debug
    if debug:
        logging.getLogger("sdrt").setLevel(logging.DEBUG)


def _one_line(message: Warning | str, *_: Any, **__: Any) -> str:
    """One line for a person, without the place in the source."""
    return f"warning: {message}\n"


def main() -> None:
    """Entry point.

    Exit status: 0 done, 1 an error that sdrt raised, 2 wrong usage, 130 interrupted, 128 + n ended by signal n.
    """
    warnings.formatwarning = _one_line
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s: %(message)s")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a table's line must not fail where the terminal has no such sign
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # end as an exception does, so that what is half-written is cleaned up
            signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))
    try:
        sys.exit(cli.main(standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has gone: nothing is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except (SdrtError, OSError) as error:
        if _debugging:
            raise
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
