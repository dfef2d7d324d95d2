"""Picture files of any origin → PIL: PNG, JPEG and WebP, within limits that hold before anything is decoded.

Pillow keeps and inflates all that a file says about its picture: texts, colour profiles, camera data; each of these can
be made to take minutes or gigabytes. So it is given a copy that holds only what makes the picture, and the one thing
that is wanted besides, the orientation, is read here.
"""

from __future__ import annotations

import io
import logging
import os
import re
import stat
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from sdrt.errors import InputError

logger = logging.getLogger("sdrt")

MAX_BYTES = 128 * 2**20
MAX_SIDE = 16_384
"""Pixels, of any picture that is read or made."""
MAX_PIXELS = 64_000_000
"""More than any camera phone's usual picture. A progressive JPEG in CMYK takes 12 bytes a pixel while it is decoded, so
that a picture, and the copy that is turned upright, stay below 1 GB."""
MAX_WEBP_PIXELS = 32_000_000
"""Its decoder holds five copies of 4 bytes a pixel at its peak."""
MAX_PIECES = 65_536
"""Chunks of a PNG, segments of a JPEG."""
MAX_SCANS = 64
"""Of a progressive JPEG; usual are 10. A scan of a few bytes can make the decoder visit every pixel."""

FORMATS = "PNG, JPEG or WebP"
_FIX = f"give a picture as {FORMATS}"
TAG_ORIENTATION = 0x0112
_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
# After a 0xFF: what is neither a stuffed zero, nor a restart marker, nor a filler.
_JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_JPEG_COLOUR = {0xE0: b"JFIF", 0xEE: b"Adobe"}
_JPEG_ABOUT = {*range(0xE1, 0xF0), 0xFE} - {0xEE}
"""Segments of applications, and comments."""

_quiet_turn = threading.RLock()


class Damaged(Exception):  # noqa: N818 - internal: becomes an InputError that names the file
    """What is wrong with a file, without its name."""


@contextmanager
def quiet() -> Iterator[None]:
    """Without Pillow's warnings, which are about files and of no use to whoever runs this program.

    One thread at a time: ``catch_warnings`` is of the whole process, and two that interleave would leave it changed.
    """
    with _quiet_turn, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read(path: Path) -> tuple[Image.Image, int]:
    """The decoded picture (an animation's first frame), in the file's own mode, and its EXIF orientation, 1 to 8.

    InputError when the file is missing, unreadable, no PNG, JPEG or WebP, damaged, or beyond the limits.
    """
    raw = _content(path)
    try:
        if raw.startswith(b"\x89PNG\r\n\x1a\n"):
            kind: type[ImageFile.ImageFile] = PngImagePlugin.PngImageFile
            raw, exif, animated = _reduced_png(raw)
        elif raw.startswith(b"\xff\xd8\xff"):
            kind = JpegImagePlugin.JpegImageFile
            raw, exif, animated = _reduced_jpeg(raw)
        elif raw.startswith(b"RIFF") and raw[8:12] == b"WEBP":
            kind = WebPImagePlugin.WebPImageFile
            check_size(_webp_size(raw), MAX_WEBP_PIXELS)
            exif, animated = b"", False
        else:
            raise InputError(f"{path}: is not a picture that can be read, expected {FORMATS}", _FIX)
        # The class itself and not Image.open, which knows some forty formats more and has limits of its own.
        with quiet():
            picture = kind(io.BytesIO(raw))
            check_size(picture.size, MAX_PIXELS)
            picture.load()
    except Damaged as error:
        raise InputError(f"{path}: {error}", _FIX) from None
    except InputError:
        raise
    except MemoryError:
        raise InputError(f"{path}: there is not enough memory to decode it", "give a smaller picture") from None
    except Exception as error:  # Pillow's decoders raise a dozen unrelated ones
        raise InputError(f"{path}: is damaged: {str(error)[:200] or type(error).__name__}", _FIX) from None
    if isinstance(picture, WebPImagePlugin.WebPImageFile):
        exif, animated = picture.info.get("exif", b""), getattr(picture, "n_frames", 1) > 1
    if animated:
        logger.warning("%s: is animated; its first frame is used", path)
    return picture, orientation(exif, path)


def _content(path: Path) -> bytes:
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
        raw = b""
        if regular:  # a pipe would wait for its writer
            with path.open("rb") as file:
                raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}", _FIX) from None
    if not regular:
        raise InputError(f"{path}: is not a file, expected a picture", _FIX)
    if len(raw) > MAX_BYTES:
        raise InputError(f"{path}: is larger than {MAX_BYTES} bytes", "save it smaller, or as JPEG")
    return raw


def check_size(size: tuple[int, int], limit: int = MAX_PIXELS) -> None:
    """Damaged unless both sides are 1 to MAX_SIDE and the picture has at most ``limit`` pixels."""
    width, height = size
    if min(size) < 1:
        raise Damaged(f"is {width}x{height} pixels, which is no picture")
    if max(size) > MAX_SIDE:
        raise Damaged(f"is {width}x{height} pixels, at most {MAX_SIDE} a side are read")
    if width * height > limit:
        raise Damaged(f"is {width}x{height}, {width * height} pixels, at most {limit} are read")


def _reduced_png(raw: bytes) -> tuple[bytes, bytes, bool]:
    """The PNG with the chunks that make its picture only, its EXIF block, and whether it is animated."""
    if raw[12:16] != b"IHDR" or len(raw) < 33:
        raise Damaged("is damaged: a PNG begins with IHDR")
    kept, exif, animated, at = [raw[:8]], b"", False, 8
    for _ in range(MAX_PIECES):
        if at + 8 > len(raw):
            break
        length, name = struct.unpack_from(">I4s", raw, at)
        end = at + 12 + length
        if name == b"IHDR":
            check_size(struct.unpack(">II", raw[at + 8 : at + 16].ljust(8, b"\0")))
        if name == b"eXIf":
            exif = raw[at + 8 : end - 4]
        animated = animated or name == b"acTL"
        if name in _PNG_KEPT:
            kept.append(raw[at:end])
        if name == b"IEND":
            break
        at = end
    else:
        raise Damaged(f"has more than {MAX_PIECES} chunks")
    return b"".join(kept), exif, animated


def _reduced_jpeg(raw: bytes) -> tuple[bytes, bytes, bool]:
    """The JPEG with the segments that make its picture only, and its EXIF block; what follows its end is left out.

    JFIF's and Adobe's segments tell how colours are coded.
    """
    kept, exif, scans, at = [raw[:2]], b"", 0, 2
    for _ in range(MAX_PIECES):
        match = _JPEG_MARKER.search(raw, at)
        if match is None:
            break
        at, marker = match.start(), raw[match.start() + 1]
        if marker == 0xD9:
            kept.append(raw[at : at + 2])
            break
        if marker in (0x01, 0xD8):  # without content
            at += 2
            continue
        if at + 4 > len(raw):
            break
        end = at + 2 + max(2, int.from_bytes(raw[at + 2 : at + 4], "big"))
        content = raw[at + 4 : end]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(content) >= 5:
            check_size((int.from_bytes(content[3:5], "big"), int.from_bytes(content[1:3], "big")))
        if marker == 0xE1 and content.startswith(b"Exif\0\0"):
            exif = exif or content
        if marker == 0xDA:
            scans += 1
            if scans > MAX_SCANS:
                raise Damaged(f"has more than {MAX_SCANS} scans")
            following = _JPEG_MARKER.search(raw, end)
            end = following.start() if following is not None else len(raw)
            kept.append(raw[at:end])
        elif content.startswith(_JPEG_COLOUR.get(marker, b"")) and marker not in _JPEG_ABOUT:
            kept.append(raw[at:end])
        at = end
    else:
        raise Damaged(f"has more than {MAX_PIECES} segments")
    return b"".join(kept), exif, False


def _webp_size(raw: bytes) -> tuple[int, int]:
    """(width, height) of the canvas by the first chunk; the decoder makes it before anyone can ask for its size."""
    head = raw[12:30].ljust(18, b"\0")
    if head.startswith(b"VP8X"):
        return 1 + int.from_bytes(head[12:15], "little"), 1 + int.from_bytes(head[15:18], "little")
    if head.startswith(b"VP8L") and head[8] == 0x2F:
        bits = int.from_bytes(head[9:13], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if head.startswith(b"VP8 ") and head[11:14] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", head, 14)
        return width & 0x3FFF, height & 0x3FFF
    raise Damaged("is damaged: its first chunk is no WebP picture's")


def orientation(exif: bytes, name: object) -> int:
    """The orientation 1 (upright) to 8 that an EXIF block tells; 1, with a line in the log, when it is damaged."""
    try:
        return _orientation(exif) if exif else 1
    except (ValueError, struct.error) as error:
        logger.warning("%s: its EXIF data is damaged (%s); the orientation is ignored", name, error)
        return 1


def _orientation(exif: bytes) -> int:
    """TIFF 6.0: a header, and at its offset a directory of 12-byte entries."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        raise ValueError("no TIFF header")
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    (entries,) = struct.unpack_from(order + "H", tiff, start)
    for i in range(entries):
        tag, kind = struct.unpack_from(order + "HH", tiff, start + 2 + 12 * i)
        if tag == TAG_ORIENTATION:
            (value,) = struct.unpack_from(order + {3: "H", 4: "I"}.get(kind, "B"), tiff, start + 10 + 12 * i)
            if not 1 <= value <= 8:
                raise ValueError(f"orientation {value}")
            return int(value)
    return 1
