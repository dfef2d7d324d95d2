"""Headers of safetensors files: ``weights.float32_bytes``."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Sequence
from pathlib import Path

from sdrt_export.weights import float32_bytes
from tests.fuzz import mutate as mutators


def _file(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + bytes(64)


def seeds() -> list[bytes]:
    header = {
        "__metadata__": {"format": "pt"}, "a.weight": {"dtype": "F16", "shape": [4, 3], "data_offsets": [0, 24]},
        "a.bias": {"dtype": "F32", "shape": [4], "data_offsets": [24, 40]}, "b": {"dtype": "I64", "shape": [], "data_offsets": [40, 48]},
    }  # fmt: skip
    return [_file(json.dumps(header).encode())]


def monsters() -> list[tuple[str, bytes]]:
    def one(shape: str) -> bytes:
        return _file(b'{"a":{"dtype":"F32","shape":%s,"data_offsets":[0,4]}}' % shape.encode())

    return [
        ("a length of 2^63", struct.pack("<Q", 2**63) + b"{}"),
        ("a header of lists", _file(b"[" + b"[]," * 5_000_000 + b"0]")),
        ("a header of objects, beyond the limit", _file(b"[" + b'{"":0},' * 9_000_000 + b"0]")),
        ("deep", _file(b"[" * 10**6)),
        ("10^9 times a text", one('[1000000000,"aaaaaaaaaa"]')),
        ("many dimensions", one("[" + "9," * 10**6 + "9]")),
        ("a big dimension", one("[" + "9" * 4000 + "]")),
        ("negative", one("[-4]")),
        ("infinite", one("[Infinity]")),
        ("not a number", one("[NaN]")),
        ("no list", one("5")),
        ("many tensors", _file(json.dumps({f"a{i}": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for i in range(100_000)}).encode())),
        ("a dtype of megabytes", _file(json.dumps({"a": {"dtype": "F" * 10**7, "shape": "x" * 10**6}}).encode())),
    ]  # fmt: skip


def mutate(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    if rng.random() < 0.3:
        return mutators.raw_bytes(rng, seeds)
    return _file(mutators.json_bytes(rng, [seed[8:-64] for seed in seeds]))


def feed(data: bytes, folder: Path) -> None:
    path = folder / "x.safetensors"
    path.write_bytes(data)
    assert 0 <= float32_bytes([path]) < 2**63
