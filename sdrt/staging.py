"""Write a directory whole or not at all.

The directory is made under a temporary name beside its destination and renamed into place. What an interrupted run
left behind is cleaned up, or put back, by the next one.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdrt.bundle import MANIFEST
from sdrt.errors import BundleError


@contextmanager
def new_directory(out: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty directory that becomes ``out`` when the block ends without an exception.

    ``out`` may be missing or empty; a bundle is replaced with ``force`` only, anything else never. BundleError when it
    cannot be written, or when another process is writing the same ``out``.
    """
    out = Path(os.path.abspath(out))
    if not out.name:
        raise BundleError(f"{out}: cannot be replaced", "choose another OUT")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _lock(out):
            _recover(out)
            _check_replaceable(out, force)
            staging = Path(tempfile.mkdtemp(prefix=_partial(out), dir=out.parent))
            staging.chmod(0o777 & ~_umask())  # mkdtemp's 0700 would make the bundle unreadable for others
            try:
                yield staging
                _commit(staging, out)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        place = Path(os.fsdecode(error.filename)) if error.filename else out
        if place.is_relative_to(out.parent):
            raise BundleError(f"{place}: cannot be written: {error.strerror}", "choose another OUT") from error
        raise BundleError(f"{place}: {error.strerror or error}") from error  # what was to be copied from elsewhere


def _commit(staging: Path, out: Path) -> None:
    for folder, _, files in os.walk(staging, topdown=False):
        for name in files:
            _fsync(os.path.join(folder, name))
        _fsync(folder)
    old = _replaced(out)
    if out.exists():
        os.rename(out, old)
    try:
        os.rename(staging, out)  # the one moment at which the new bundle comes into being
    except OSError:
        if old.exists():
            os.rename(old, out)
        raise
    _fsync(out.parent)
    _discard(out)


def _discard(out: Path) -> None:
    """Remove the old bundle, under a name from which half of it will never be put back."""
    if _replaced(out).exists():
        doomed = Path(tempfile.mkdtemp(prefix=_partial(out), dir=out.parent))
        os.rename(_replaced(out), doomed / out.name)
        shutil.rmtree(doomed)


def _recover(out: Path) -> None:
    """Under the lock no other writer lives: what lies about is from a run that died."""
    old = _replaced(out)
    if old.exists():
        if out.exists():
            _discard(out)
        else:
            os.rename(old, out)
    for entry in out.parent.iterdir():
        if entry.name.startswith(_partial(out)):
            shutil.rmtree(entry)


def _check_replaceable(out: Path, force: bool) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir() or out.is_symlink():
        raise BundleError(f"{out}: exists and is not a directory", "choose another OUT")
    if (out / MANIFEST).is_file():
        if not force:
            raise BundleError(f"{out}: exists", "choose another OUT, or replace it with --force")
    elif any(out.iterdir()):
        raise BundleError(f"{out}: exists and is not a bundle, so it is not replaced", "choose another OUT")


def _partial(out: Path) -> str:
    return f".{out.name}.partial-"


def _replaced(out: Path) -> Path:
    return out.with_name(f".{out.name}.replaced")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fsync(path: str | Path) -> None:
    if os.name == "nt" and os.path.isdir(path):
        return  # Windows has no handle on a directory that could be flushed
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _lock(out: Path) -> Iterator[None]:
    """Hold ``.OUT.lock``; the system releases it when the process dies, however it dies."""
    path = out.with_name(f".{out.name}.lock")
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock_descriptor(descriptor)
        except OSError:
            os.close(descriptor)
            raise BundleError(f"{out}: another process is writing it", "wait for it to end") from None
        try:
            current = os.stat(path).st_ino == os.fstat(descriptor).st_ino
        except FileNotFoundError:
            current = False
        if current:
            break
        os.close(descriptor)  # the previous holder removed the file between our open and our lock
    try:
        yield
    finally:
        if os.name != "nt":
            os.unlink(path)
        os.close(descriptor)


def _lock_descriptor(descriptor: int) -> None:
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
