"""Options of the command line: ``--shape``, ``-O`` and an engine's own; an input is arguments, NUL between them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click

from sdrt.cli import common
from sdrt.engine import parse_options
from sdrt.errors import SdrtError
from tests.fuzz import mutate as mutators

REFUSALS = (SdrtError, click.BadParameter)
NONE: Any = None


@dataclass(frozen=True)
class Options:
    arena: bool = True
    threads: int = 1
    ratio: float = 1.0
    kind: Literal["a", "b"] = "a"
    folder: str = ""


def seeds() -> list[bytes]:
    return [
        b"512x512",
        b"1x99999",
        b"512x768\x00768x512",
        b"arena=true",
        b"threads=4\0ratio=0.5",
        b"kind=b\0folder=x=y",
        b"ratio=1e5",
    ]


def monsters() -> list[tuple[str, bytes]]:
    return [
        ("digits", b"9" * 10**6 + b"x" + b"9" * 10**6), ("a name", b"x" * 10**6), ("a value", b"arena=" + b"x" * 10**6),
        ("an integer", b"threads=" + b"9" * 10**6), ("a number", b"ratio=" + b"9" * 10**6), ("many", b"512x512\0" * 10**5),
        ("an unknown name", b"x" * 10**6 + b"=1"),
    ]  # fmt: skip


def mutate(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    return mutators.raw_bytes(rng, seeds)


def feed(data: bytes, folder: Path) -> None:
    values = tuple(data.decode("utf-8", "surrogateescape").split("\0"))
    refused: Exception | None = None
    try:
        shapes = common.parse_shapes(NONE, NONE, values)
        assert all(0 <= side < 10**5 for shape in shapes for side in shape)
    except click.BadParameter as error:
        refused = error
    try:
        extra = common.parse_extra(NONE, NONE, values)
        parse_options(Options, extra, "engine")
    except REFUSALS as error:
        if refused is not None:
            raise error
