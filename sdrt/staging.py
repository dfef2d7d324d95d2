"""Write a directory, or a file, whole or not at all.

The directory is made under a temporary name beside its destination and renamed into place. What an interrupted run
left behind is cleaned up, or put back, by the next one.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sdrt import strict_json
from sdrt.bundle import MANIFEST, parse
from sdrt.errors import BundleError


@contextmanager
def new_directory(out: str | Path, *, force: bool = False, sources: Sequence[Path] = ()) -> Iterator[Path]:
    """Yield an empty directory that becomes ``out`` when the block ends without an exception.

    ``out`` may be missing or empty; a bundle is replaced with ``force`` only, anything else, and a directory that is or
    holds one of ``sources``, never. BundleError when it cannot be written, or when another process is writing it.
    """
    out = Path(os.path.abspath(out))
    for source in map(Path.resolve, sources):
        if out.resolve() in (source, *source.parents):
            raise BundleError(f"{out}: is, or holds, what is read: {source}", "choose another OUT")
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
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # a copy that finds no room names what it copied from
            raise BundleError(
                f"{out}: cannot be written: {error.strerror}", "make room, or choose another OUT"
            ) from error
        if place.is_relative_to(out.parent):
            raise BundleError(f"{place}: cannot be written: {error.strerror}", "choose another OUT") from error
        raise BundleError(f"{place}: {error.strerror or error}") from error  # what was to be copied from elsewhere


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file beside ``path`` that takes its place when the block ends without an exception. OSError.

    A link is followed; what is no file (``/dev/stdout``, a pipe) is written to, not replaced.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        with path.open("wb") as stream:
            yield stream
        return
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            yield file
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise


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
    if out.is_mount():
        raise BundleError(f"{out}: is a mount point, which cannot be replaced whole", f"choose {out / 'NAME'}")
    if (out / MANIFEST).is_file():
        if not force:
            raise BundleError(f"{out}: exists", "choose another OUT, or replace it with --force")
        _check_nothing_foreign(out)
    elif any(out.iterdir()):
        raise BundleError(f"{out}: exists and is not a bundle, so it is not replaced", "choose another OUT")


def _check_nothing_foreign(out: Path) -> None:
    """BundleError when the bundle's directory holds a file that is not the bundle's: it would be lost."""
    try:
        listed = {file.path for file in parse(strict_json.read(out / MANIFEST), MANIFEST).all_files()} | {MANIFEST}
    except BundleError as error:
        reason = f"{out}: its {MANIFEST} cannot be read, so it is not known what would be lost: {error.message}"
        raise BundleError(reason, "remove it yourself, or choose another OUT") from None
    for folder, _, files in os.walk(out):
        for name in files:
            path = Path(folder, name).relative_to(out).as_posix()
            if path not in listed:
                raise BundleError(
                    f"{out}: holds {path}, which is not part of the bundle", "move it, or choose another OUT"
                )


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
