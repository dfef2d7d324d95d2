"""What the file of a network says of itself, whichever format it is in: read by ``onnx_header`` and ``ir_header``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sdrt.bundle import DType, Precision
from sdrt.errors import BundleError

MAX_RANK = 16

Size = int | tuple[int, int] | None
"""One dimension: a size, the least and the largest one, or None where the file leaves it free."""


@dataclass(frozen=True)
class Value:
    """One input or output. ``aliases``: further names of the same tensor."""

    name: str
    dtype: DType
    dims: tuple[Size, ...]
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Header:
    """Inputs and outputs in the file's order.

    ``weights``: files that hold weights, as the file names them (relative to its own folder, unchecked).
    ``precision``: what the weights are kept in, and activations computed in.
    """

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    weights: tuple[str, ...]
    precision: Precision


def check_no_pointer(path: Path, start: bytes) -> None:
    """BundleError where a file starts as those that Git LFS leaves in place of large ones."""
    if start.startswith(b"version https://git"):
        raise BundleError(f"{path}: is a Git LFS pointer, not the file itself", "git lfs pull")
