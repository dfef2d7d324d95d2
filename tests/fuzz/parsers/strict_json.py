"""``sdrt.strict_json.parse``: any bytes."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from sdrt import strict_json
from tests.fuzz import mutate as mutators


def seeds() -> list[bytes]:
    return [
        b'{"a": [1, 2.5, null, true, "x"], "b": {"c": {"d": [[], {}]}}, "long": "' + b"y" * 300 + b'"}',
        rb'["\u00e9\ud83d\ude00", "\"\\\/\b\f\n\r\t", -0.0, 1e-300, 18446744073709551615, -9223372036854775808]',
        b"[" * 30 + b"]" * 30,
    ]  # fmt: skip


def monsters() -> list[tuple[str, bytes]]:
    size = strict_json.MAX_BYTES - 2
    return [
        ("a million levels", b"[" * 10**6),
        ("a million levels of objects", b'{"":' * 10**6),
        ("a million digits", b"9" * 10**6),
        ("a million digits behind the point", b"0." + b"9" * 10**6),
        ("an exponent of a million digits", b"1e" + b"9" * 10**6),
        ("as many lists as fit", b"[" + b"[]," * (size // 3 - 1) + b"[]]"),
        ("as many objects as fit", b"[" + b'{"":0},' * (size // 7 - 1) + b"0]"),
        ("as many numbers as fit", b"[" + b"0.5," * (size // 4 - 1) + b"0]"),
        ("as many texts as fit", b"[" + b'"ab",' * (size // 5 - 1) + b"0]"),
        ("as many keys as fit", b"{" + b",".join(b'"%d":0' % i for i in range(10**6)) + b"}"),
        ("one text", b'"' + b"x" * size + b'"'),
        ("a key of 8 MB twice", (b'{"' + b"x" * (size // 2 - 10) + b'":0,"' + b"x" * (size // 2 - 10) + b'":0}')),
        ("escapes", b'"' + b"\\u00e9" * (size // 6) + b'"'),
    ]


def mutate(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    return mutators.json_bytes(rng, seeds) if rng.random() < 0.5 else mutators.raw_bytes(rng, seeds)


def feed(data: bytes, folder: Path) -> None:
    value = strict_json.parse(data, "here")
    if len(data) < 2**20:  # else Python's own writer takes the time
        assert strict_json.parse(json.dumps(value, allow_nan=False).encode(), "again") == value
