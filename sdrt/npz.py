"""``.npz`` files that somebody else wrote: plain arrays of numbers, read within limits.

``numpy.load`` believes a header: it makes room for the 10⁹ elements that a file of 1 KB claims, inflates a member to
whatever it holds, and evaluates header texts as Python literals. Here sizes are compared before memory is taken.
"""

from __future__ import annotations

import math
import os
import re
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

MAX_BYTES = 256 * 2**20
"""Of the arrays of one file, unpacked."""
MAX_DIRECTORY = 2**20
"""Bytes of the zip file's directory: some 10,000 members."""

_HEADER = re.compile(
    rb"\{'descr': '([<|](?:[fiu][1248]|b1))', 'fortran_order': (True|False),"
    rb" 'shape': \(((?:\d{1,18},? ?){0,32})\), \} *\n"
)
_END, _END_64 = b"PK\x05\x06", b"PK\x06\x07"


def read(path: Path) -> dict[str, NDArray[Any]]:
    """All arrays of the file by their names, in their shapes and dtypes (bool, integers, floats; little endian).

    Raises ValueError, which tells what is wrong, or one of the many exceptions of ``zipfile`` and ``zlib``.
    """
    with path.open("rb") as file:
        _check_end(file)
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if (total := sum(member.file_size for member in members)) > MAX_BYTES:
                raise ValueError(f"its arrays have {total} bytes, at most {MAX_BYTES}")
            arrays = {}
            for member in members:
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ValueError(f"{member.filename[:80]!r} is packed by a method that numpy does not use")
                with archive.open(member) as content:
                    # With a size: without one, zipfile inflates what there is before it compares.
                    raw = content.read(member.file_size)
                arrays[member.filename.removesuffix(".npy")] = _array(raw, member.filename[:80])
            return arrays


def _check_end(file: IO[bytes]) -> None:
    """ValueError unless the directory that ``zipfile`` would read whole is small; numpy writes no comment, no ZIP64."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 42))
    tail = file.read()
    end = tail[-22:]
    if len(end) < 22 or not end.startswith(_END) or end[20:] != b"\0\0" or tail[:-22].startswith(_END_64):
        raise ValueError("it is not a zip file as numpy writes it")
    (directory,) = struct.unpack_from("<I", end, 12)
    if directory > MAX_DIRECTORY:
        raise ValueError(f"its directory has {directory} bytes, at most {MAX_DIRECTORY}")


def _array(raw: bytes, name: str) -> NDArray[Any]:
    """One ``.npy`` file: magic, version, length of the header, header, elements."""
    wide = raw[6:7] != b"\1"
    start = 12 if wide else 10
    if not raw.startswith(b"\x93NUMPY") or len(raw) < start:
        raise ValueError(f"{name!r} is not an array")
    (length,) = struct.unpack_from("<I" if wide else "<H", raw, 8)
    match = _HEADER.fullmatch(raw, start, min(len(raw), start + length))
    if match is None:
        raise ValueError(
            f"{name!r} has a header that numpy does not write for plain numbers: {raw[start : start + 80]!r}"
        )
    dtype = np.dtype(match[1].decode())
    shape = tuple(int(number) for number in re.findall(rb"\d+", match[3]))
    held = len(raw) - start - length
    if math.prod(shape) * dtype.itemsize != held:
        raise ValueError(f"{name!r} is {dtype}{list(shape)}, but holds {held} bytes")
    order: Any = "F" if match[2] == b"True" else "C"
    return np.frombuffer(raw, dtype, offset=start + length).reshape(shape, order=order).copy(order)
