"""``bundle.read_arrays``: reference vectors and constants."""

from __future__ import annotations

import io
import random
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sdrt import bundle
from tests.fuzz import mutate as mutators
from tests.fuzz.parsers import manifest


def archive(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as out:
        for name, data in members.items():
            out.writestr(zipfile.ZipInfo(name), data, method)
    return file.getvalue()


def member(head: str, data: bytes = b"", version: bytes = b"\1\0") -> bytes:
    return b"\x93NUMPY" + version + struct.pack("<H", len(head)) + head.encode() + data


def seeds() -> list[bytes]:
    arrays = {"B1/in/sample": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "B1/in/ids": np.arange(5), "one": np.array(1.5, np.float16),
              "empty": np.zeros((0, 3), np.uint8), "fortran": np.asfortranarray(np.ones((3, 2))), "flags": np.array([True, False])}  # fmt: skip
    plain, packed = io.BytesIO(), io.BytesIO()
    np.savez(plain, **arrays)  # type: ignore[arg-type]
    np.savez_compressed(packed, **arrays)  # type: ignore[arg-type]
    return [plain.getvalue(), packed.getvalue()]


def monsters() -> list[tuple[str, bytes]]:
    def claims(shape: str, descr: str = "'<f4'") -> bytes:
        return member(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n", bytes(64))

    names = {f"a{i}.npy": b"" for i in range(3000)}
    found = [
        ("10^9 elements", archive({"a.npy": claims("(1000000000,)")})),
        ("10^18 elements", archive({"a.npy": claims("(1000000000, 1000000000)")})),
        ("negative", archive({"a.npy": claims("(-1,)")})),
        ("more than 64 bits", archive({"a.npy": claims("(99999999999999999999999,)")})),
        ("many axes", archive({"a.npy": claims("(" + "1," * 2000 + ")")})),
        ("nested header", archive({"a.npy": member("(" * 9000)})),
        ("signs", archive({"a.npy": member("-" * 9000 + "1")})),
        ("a header of megabytes", archive({"a.npy": b"\x93NUMPY\2\0" + struct.pack("<I", 2**31) + b" " * 10**6})),
        ("objects", archive({"a.npy": claims("(3,)", "'|O'")})),
        ("a text of 10^9", archive({"a.npy": claims("(3,)", "'<U1000000000'")})),
        ("a record", archive({"a.npy": claims("(3,)", "[('a', '<f4'), ('b', '|O')]")})),
        ("a gigabyte of zeros", _bomb(2**30)),
        ("many members", archive(names)),
        ("no array", archive({"a.npy": b"x" * 100, "b": b"y"})),
        ("bzip2", archive({"a.npy": claims("(16,)")}, zipfile.ZIP_BZIP2)),
        ("lzma", archive({"a.npy": claims("(16,)")}, zipfile.ZIP_LZMA)),
        ("not a zip", b"\x93NUMPY\1\0v\0{}"),
        ("empty", b""),
    ]
    twice = archive({"a.npy": claims("(16,)")})
    at = twice.index(b"PK\1\2")
    entry, end = twice[at : twice.index(b"PK\5\6")], twice[twice.index(b"PK\5\6") :]
    count = 300_000
    directory = entry * count
    found.append(
        (
            "a directory of 300,000 entries",
            twice[:at]
            + directory
            + end[:8]
            + struct.pack("<HHI", count % 65536, count % 65536, len(directory))
            + end[16:],
        )
    )
    return found


def _bomb(size: int) -> bytes:
    """A member of ``size`` zero bytes in a thousandth of it, with a true header and true sizes."""
    head = member(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({size},), }}".ljust(117) + "\n")
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block, crc = bytes(2**20), zlib.crc32(head)
    first = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    packed = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)  # which depends on nothing before it
    for _ in range(size // 2**20):
        crc = zlib.crc32(block, crc)
    data = first + packed * (size // 2**20) + packer.flush()
    fields = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 0, crc, len(data), len(head) + size, 5, 0)
    local = b"PK\3\4" + fields + b"a.npy" + data
    central = b"PK\1\2" + struct.pack("<H", 20) + fields + struct.pack("<HHHII", 0, 0, 0, 0, 0) + b"a.npy"
    return local + central + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local), 0)


def mutate(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    if rng.random() < 0.5:
        return mutators.raw_bytes(rng, seeds)
    with zipfile.ZipFile(io.BytesIO(rng.choice(seeds))) as good:
        members = {name: good.read(name) for name in good.namelist()}
    name = rng.choice(list(members))
    members[name] = mutators.raw_bytes(rng, [members[name][:140]]) + members[name][140:]
    return archive(members, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))


def feed(data: bytes, folder: Path) -> None:
    (folder / "x.npz").write_bytes(data)
    arrays = bundle.read_arrays(bundle.Bundle(folder, manifest.manifest()), "x.npz")
    for array in arrays.values():
        assert array.dtype != object
        assert array.nbytes <= 2**28
        np.isfinite(array).all()
