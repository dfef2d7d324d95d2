"""A folder of compiled models in which damage is found: each ``X.blob`` has the hash of its bytes beside it.

OpenVINO 2026.4 compiles anew for a file that is cut or whose network is damaged, but takes constants with any bits
flipped, and computes other pictures with them.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

from sdrt.errors import InputError
from sdrt.staging import replacing


@contextlib.contextmanager
def checked(folder: str | None, name: str = "*") -> Iterator[None]:
    """Around compiling: what does not have its hash is removed before, what is new gets it after. None: no cache.

    name: of the one blob that is meant, where that is known; the others are left unread.

    Two processes that fill one folder may remove what the other just wrote; it is compiled once more then. InputError
    for a damaged file that cannot be removed: it would be used.
    """
    if folder is None:
        yield
        return
    for blob in Path(folder).glob(f"{name}.blob"):
        if _recorded(blob) != _hash(blob):
            try:
                blob.unlink(missing_ok=True)  # another process was faster
                _beside(blob).unlink(missing_ok=True)
            except OSError as error:  # another user's, or (Windows) open
                raise InputError(
                    f"{blob}: is damaged, or was not written to its end, and cannot be removed: {error.strerror}",
                    "remove it, or give another folder as cache",
                ) from None
    yield
    for blob in Path(folder).glob(f"{name}.blob"):
        if (found := _hash(blob)) is not None and found != _recorded(blob):
            with contextlib.suppress(OSError), replacing(_beside(blob)) as file:  # without, it is compiled once more
                file.write(found.encode())


def _beside(blob: Path) -> Path:
    return blob.with_suffix(".blob.sha256")


def _hash(blob: Path) -> str | None:
    try:
        with blob.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _recorded(blob: Path) -> str | None:
    try:
        return _beside(blob).read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
