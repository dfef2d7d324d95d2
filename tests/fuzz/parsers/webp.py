"""``image.rgb`` of WebP files."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence

from tests.fuzz import mutate as mutators
from tests.fuzz.parsers._pictures import encoded, exif, feed, picture

__all__ = ["feed", "monsters", "mutate", "seeds"]


def seeds() -> list[bytes]:
    return [
        encoded("WEBP"), encoded("WEBP", "RGBA"), encoded("WEBP", lossless=True), encoded("WEBP", "RGBA", lossless=True),
        encoded("WEBP", exif=exif(6), icc_profile=b"p" * 200), encoded("WEBP", exif=exif(3), xmp=b"<x/>", lossless=True),
        encoded("WEBP", save_all=True, append_images=[picture(), picture("L").convert("RGB")], duration=50),
    ]  # fmt: skip


def _riff(body: bytes) -> bytes:
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def _canvas(width: int, height: int, flags: int = 0) -> bytes:
    return (
        b"VP8X"
        + struct.pack("<I", 10)
        + bytes([flags, 0, 0, 0])
        + (width - 1).to_bytes(3, "little")
        + (height - 1).to_bytes(3, "little")
    )


def monsters() -> list[tuple[str, bytes]]:
    lossy, lossless = encoded("WEBP"), encoded("WEBP", lossless=True)
    frame = lossless[12:]
    part = (
        b"ANMF"
        + struct.pack("<I", 16 + len(frame))
        + bytes(6)
        + (19).to_bytes(3, "little")
        + (11).to_bytes(3, "little")
        + b"\1\0\0\0"
        + frame
    )
    animated = _canvas(20, 12, 2) + b"ANIM" + struct.pack("<I", 6) + bytes(6)
    return [
        ("2^48 pixels", _riff(_canvas(2**24, 2**24) + frame)),
        ("the largest canvas", _riff(_canvas(8000, 4000) + frame)),
        ("the largest canvas, animated", _riff(_canvas(8000, 4000, 2) + b"ANIM" + struct.pack("<I", 6) + bytes(6) + part)),
        ("a lossy frame of 16383", lossy[:26] + struct.pack("<HH", 16383, 16383) + lossy[30:]),
        ("a lossless frame of 16384", lossless[:21] + struct.pack("<I", 0x0FFFFFFF) + lossless[25:]),
        ("many frames", _riff(animated + part * 100_000)),
        ("many chunks", _riff(frame + (b"abcd" + bytes(4)) * 10**6)),
        ("a canvas of its own inside", _riff(frame + _canvas(16000, 16000))),
    ]  # fmt: skip


def mutate(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    raw = mutators.raw_bytes(rng, seeds)
    if rng.random() < 0.8:  # else few get beyond the first twelve bytes
        raw = _riff(raw[12:] if len(raw) > 12 else raw)
    return raw
