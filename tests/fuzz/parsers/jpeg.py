"""``image.rgb`` of JPEG files."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence

from tests.fuzz import mutate as mutators
from tests.fuzz.parsers._pictures import encoded, exif, feed

__all__ = ["feed", "monsters", "mutate", "seeds"]


def seeds() -> list[bytes]:
    return [
        encoded("JPEG"), encoded("JPEG", quality=95, subsampling=0, optimize=True), encoded("JPEG", progressive=True),
        encoded("JPEG", "L"), encoded("JPEG", "CMYK"), encoded("JPEG", "CMYK", progressive=True), encoded("JPEG", keep_rgb=True),
        encoded("JPEG", restart_marker_rows=1), encoded("JPEG", exif=exif(6), icc_profile=b"p" * 200, comment=b"c", dpi=(72, 72)),
    ]  # fmt: skip


def monsters() -> list[tuple[str, bytes]]:
    good, progressive = encoded("JPEG"), encoded("JPEG", progressive=True)

    def sized(raw: bytes, width: int, height: int) -> bytes:
        at = max(raw.find(b"\xff\xc0"), raw.find(b"\xff\xc2"))
        return raw[: at + 5] + struct.pack(">HH", height, width) + raw[at + 9 :]

    entries = b"".join(struct.pack("<HHII", 300 + i, 7, 65_000, 8) for i in range(5000))
    directory = (b"Exif\0\0II*\0" + struct.pack("<IH", 8, 5000) + entries).ljust(65_500, b"\0")
    scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    return [
        ("2^32 pixels", sized(good, 65535, 65535)),
        ("the largest", sized(good, 8000, 8000)),
        ("the largest, progressive", sized(progressive, 8000, 8000)),
        ("too many scans", progressive[:-2] + scan * 10_000 + progressive[-2:]),
        ("the largest with the most scans", sized(progressive[:-2] + scan * 50 + progressive[-2:], 8000, 8000)),
        ("camera data", good[:2] + (b"\xff\xe1" + struct.pack(">H", len(directory) + 2) + directory) * 300 + good[2:]),
        ("camera data in crumbs", good[:2] + b"\xff\xe1\0\x0aExif\0\0ab" * 60_000 + good[2:]),
        ("tables", good[:2] + (b"\xff\xdb\0\x43\0" + bytes(64)) * 60_000 + good[2:]),
        ("fillers", good[:2] + b"\xff" * 10**7 + good[2:]),
        ("junk", good[:2] + b"\0" * 10**7 + good[2:]),
        ("zeros that are stuffed", good[:-2] + b"\xff\0" * 5 * 10**6 + good[-2:]),
        ("restarts", good[:-2] + b"\xff\xd0" * 5 * 10**6 + good[-2:]),
        ("many pictures", good * 10_000),
    ]  # fmt: skip


def mutate(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    raw = mutators.raw_bytes(rng, seeds)
    return raw if raw.startswith(b"\xff\xd8\xff") or rng.random() < 0.1 else b"\xff\xd8\xff" + raw[3:]
