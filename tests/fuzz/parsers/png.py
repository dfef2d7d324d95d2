"""``image.rgb`` of PNG files."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Sequence

from PIL import PngImagePlugin

from tests.fuzz import mutate as mutators
from tests.fuzz.parsers._pictures import encoded, exif, feed, picture

__all__ = ["feed", "monsters", "mutate", "seeds"]

NAMES = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"iCCP", b"zTXt", b"iTXt", b"tEXt", b"eXIf", b"acTL", b"fcTL", b"fdAT",
         b"gAMA", b"cHRM", b"pHYs", b"sRGB", b"cICP", b"bKGD", b"abcd", b"\0\0\0\0")  # fmt: skip


def seeds() -> list[bytes]:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a lighthouse", zip=True)
    info.add_itxt("XML:com.adobe.xmp", "<x/>", zip=True)
    table = encoded("PNG", "P", transparency=bytes(range(0, 256, 2)))
    return [
        *(encoded("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
        encoded("PNG", pnginfo=info, exif=exif(6), icc_profile=b"p" * 200),
        encoded("PNG", "P", bits=2), table, encoded("PNG", "L", transparency=7), encoded("PNG", transparency=(1, 2, 3)),
        encoded("PNG", save_all=True, append_images=[picture(), picture()]),
        _made(16, 6, 0), _made(16, 4, 0), _made(16, 2, 0), _made(8, 6, 1), _made(8, 2, 1),
    ]  # fmt: skip


def _made(depth: int, colour: int, interlace: int, size: tuple[int, int] = (5, 3)) -> bytes:
    """What Pillow does not write: 16 bits in colour, and interlaced."""
    head = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, interlace)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", head)
        + _chunk(b"IDAT", zlib.compress(bytes(4000)))
        + _chunk(b"IEND", b"")
    )


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _chunks(raw: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], 8
    while at + 12 <= len(raw):
        (length,) = struct.unpack_from(">I", raw, at)
        found.append((raw[at + 4 : at + 8], raw[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def monsters() -> list[tuple[str, bytes]]:
    good = encoded("PNG")
    zeros = zlib.compress(bytes(2**20), 9)
    bombs = {
        "iCCP": b"x\0\0" + zeros, "zTXt": b"x\0\0" + zeros, "iTXt": b"x\0\1\0\0\0" + zeros,
        "big iCCP": b"x\0\0" + zlib.compress(bytes(2**26), 9), "big zTXt": b"x\0\0" + zlib.compress(bytes(2**26), 9),
    }  # fmt: skip
    found = [
        (name, good[:33] + _chunk(name[-4:].encode(), data) * (1 if "big" in name else 3000) + good[33:])
        for name, data in bombs.items()
    ]
    found += [
        ("10^9 pixels", _made(8, 2, 0, (31623, 31623))),
        ("a picture too large by a pixel", _made(8, 6, 0, (8000, 8001))),
        ("the largest, of which a row is there", _made(8, 6, 0, (8000, 8000))),
        ("a million chunks", good[:33] + _chunk(b"abcd", b"") * 10**6 + good[33:]),
        ("IDAT in many pieces", good[:33] + _chunk(b"IDAT", b"") * 60_000 + good[33:]),
        ("an IDAT that goes on", good[:33] + _chunk(b"IDAT", zlib.compress(bytes(2**28), 9)) + good[33:]),
        ("texts", good[:33] + _chunk(b"tEXt", b"x\0" + b"y" * 10**6) * 60 + good[33:]),
    ]
    return found


def mutate(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    if rng.random() < 0.3:
        return mutators.raw_bytes(rng, seeds)
    chunks = _chunks(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(chunks))
        name, data = chunks[at]
        choice = rng.randrange(6)
        if choice < 3:
            chunks[at] = (name, mutators.raw_bytes(rng, [data]))
        elif choice == 3:
            chunks.insert(
                rng.randrange(len(chunks) + 1), (rng.choice(NAMES), rng.choice((data, rng.randbytes(13), b"")))
            )
        elif choice == 4:
            chunks.insert(at, rng.choice(_chunks(rng.choice(seeds))))
        elif len(chunks) > 1:
            del chunks[at]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*pair) for pair in chunks)
