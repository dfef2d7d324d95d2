"""Write whole or not at all: a death at every file-system call, kills at random moments, refusals, locks."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sdrt import bundle as bundles
from sdrt.bundle import Artifact, Component, Denoiser, LatentSpace, Manifest, Provenance, TensorSpec
from sdrt.errors import BundleError
from sdrt.staging import new_directory
from tests.conftest import Cli, environment

FILES = ("net/model.onnx", "net/model.onnx.data", "scheduler.json")


def fill(root: Path, kind: str) -> None:
    """A bundle of three tiny files that are all of one kind: ``old``, ``new`` …"""
    for name in FILES:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(f"{kind} {name}")
    x = TensorSpec("x", "f32", ("B", 4))
    files = [bundles.record(root, name) for name in FILES]
    manifest = Manifest(
        family=kind,
        components={"net": Component((x,), (x,), Artifact("onnx", "fp32", tuple(files[:2])))},
        text_encoders=(),
        denoiser=Denoiser("net", "x", {"x": ("latents",)}),
        latents=LatentSpace(4, 8, 1.0, 64, 64),
        scheduler=FILES[2],
        files=(files[2],),
        provenance=Provenance(kind, (), {}),
    )
    bundles.save(root, manifest)


def write(out: Path, kind: str, *, force: bool = False) -> None:
    with new_directory(out, force=force) as staging:
        fill(staging, kind)


def kind_of(out: Path) -> str | None:
    """Which bundle ``out`` is, having checked that it is wholly that one; None when there is nothing."""
    if not os.path.lexists(out):
        return None
    held = bundles.load(out)
    kind = held.manifest.family
    assert bundles.damaged(held) == []
    assert {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} == {*FILES, bundles.MANIFEST}
    assert [(out / name).read_text() for name in FILES] == [f"{kind} {name}" for name in FILES]
    return kind


# -- a death at every call --------------------------------------------------------------------------------------------

WATCHED = (
    "chmod", "close", "fstat", "fsync", "link", "listdir", "lstat", "mkdir", "open", "remove", "rename", "replace",
    "rmdir", "scandir", "stat", "symlink", "truncate", "unlink", "write",
)  # fmt: skip
"""Everything in ``os`` by which Python code sees or changes the file system; pathlib, tempfile and shutil go through
these attributes too. (What ``io.open`` does has no name here, but the block that it stands in is left by several.)"""

DIED = 137


def die_at(number: int, after: bool) -> None:
    """Make the ``number``-th watched call of this process its last: dead before it, or right after it."""
    counter = itertools.count(1)

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            last = next(counter) == number
            if last and not after:
                os._exit(DIED)
            try:
                return function(*arguments, **keywords)
            finally:
                if last:
                    os._exit(DIED)

        return call

    for name in WATCHED:
        setattr(os, name, watched(getattr(os, name)))


def serve_deaths() -> None:
    """For each line, ``[out, number, after, force]``, fork a run that dies, and answer with its status."""
    for line in sys.stdin:
        out, number, after, force = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                die_at(number, after)
                write(Path(out), "new", force=force)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


Mortal = Callable[[Path, int, bool, bool], int]
"""Runs and dies; its status."""


@pytest.fixture(scope="module")
def mortal() -> Iterator[Mortal]:
    """Forks come from a process of one thread: what a fork of this one inherits may be locked by threads of other
    tests, which it does not inherit."""
    command = [sys.executable, "-c", "from tests.sdrt.test_staging import serve_deaths; serve_deaths()"]
    alone = environment() | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=alone, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        asked, answers = process.stdin, process.stdout

        def run(out: Path, number: int, after: bool, force: bool) -> int:
            asked.write(json.dumps([str(out), number, after, force]) + "\n")
            asked.flush()
            return int(answers.readline())

        yield run
        asked.close()


def nothing(out: Path) -> None:
    """OUT is missing."""


def old(out: Path) -> None:
    """OUT is an older bundle."""
    out.mkdir()
    fill(out, "old")


def moved_away(out: Path) -> None:
    """An earlier run died when the older bundle was out of the way and the new one not yet in place."""
    old(out)
    out.rename(out.with_name(".out.replaced"))
    partial = out.with_name(".out.partial-abc")
    partial.mkdir()
    fill(partial, "half")
    (partial / FILES[0]).unlink()


def not_yet_removed(out: Path) -> None:
    """An earlier run died when the newer bundle was in place and the older one half removed."""
    moved_away(out)
    (out.with_name(".out.replaced") / bundles.MANIFEST).unlink()
    old(out)


SITUATIONS = (nothing, old, moved_away, not_yet_removed)


def deaths(mortal: Mortal, folder: Path, situation: Callable[[Path], None], after: bool) -> Any:
    """Yield OUT after a run that died at its first call, its second … until one lives."""
    out = folder / "out"
    for number in range(1, 1000):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        situation(out)
        status = mortal(out, number, after, situation is not nothing)
        if status == 0:
            assert number > 30, "the calls are no longer seen"
            assert kind_of(out) == "new"
            assert os.listdir(folder) == ["out"]
            return
        assert status == DIED
        yield out
    pytest.fail("a run makes no 1000 calls")


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="deaths are injected into forked processes")


@needs_fork
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda s: s.__name__)
def test_a_death_at_every_call(tmp_path: Path, mortal: Mortal, situation: Callable[[Path], None], after: bool) -> None:
    """OUT is absent, wholly the old bundle or wholly the new one; the next run succeeds and cleans up."""
    allowed = {None, "new"} if situation is nothing else {None, "old", "new"}
    seen = set()
    for out in deaths(mortal, tmp_path / "folder", situation, after):
        seen.add(kind_of(out))
        write(out, "next", force=True)
        assert kind_of(out) == "next"
        assert os.listdir(out.parent) == ["out"]
    assert seen <= allowed
    assert "new" in seen


@needs_fork
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_what_is_half_removed_does_not_come_back(tmp_path: Path, mortal: Mortal, after: bool) -> None:
    """A death, then OUT removed by hand: the next run may find the whole old bundle put back, but no remains of it."""
    for out in deaths(mortal, tmp_path / "folder", old, after):
        shutil.rmtree(out, ignore_errors=True)
        try:
            write(out, "next")
        except BundleError as error:
            said = error.message
        else:
            said = ""
        assert kind_of(out) == ("old" if said else "next")
        assert not said or said == f"{out}: exists"


# -- kills at random moments ------------------------------------------------------------------------------------------


def test_kills_at_random_moments(tmp_path: Path, bundle: Path, cli: Cli) -> None:
    """``sdrt build`` over a bundle, killed twenty times: OUT is absent or whole, and in the end a build succeeds."""
    kept, out = tmp_path / "kept", tmp_path / "folder" / "out"
    assert cli("build", bundle, kept, "--engine", "onnxruntime", "--batch", "1").returncode == 0
    arguments = ("build", bundle, out, "--engine", "onnxruntime", "--force")

    def restored() -> None:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(kept, out)

    restored()
    started = time.perf_counter()
    assert cli(*arguments).returncode == 0
    duration = time.perf_counter() - started
    new = bundles.load(out).manifest.components["unet"].artifact.profiles
    previous = bundles.load(kept).manifest.components["unet"].artifact.profiles
    assert new != previous
    rng = random.Random(20)
    for _ in range(20):
        restored()
        with contextlib.suppress(subprocess.TimeoutExpired):  # SIGKILL, from subprocess.run
            cli(*arguments, timeout=rng.uniform(0.05, 1.05) * duration)
        if os.path.lexists(out):
            held = bundles.load(out)
            assert bundles.damaged(held) == []
            profiles = {name: c.artifact.profiles for name, c in held.manifest.components.items()}
            assert profiles["unet"] in (new, previous)
    assert cli(*arguments).returncode == 0
    assert bundles.damaged(bundles.load(out)) == []
    assert os.listdir(out.parent) == ["out"]


# -- what is replaced, and what is not --------------------------------------------------------------------------------


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "out"


@pytest.fixture
def taken(out: Path) -> Path:
    """OUT, where an older bundle is."""
    out.parent.mkdir()
    old(out)
    return out


def test_parents_are_made(out: Path) -> None:
    write(out / "a" / "b", "new")
    assert kind_of(out / "a" / "b") == "new"


def test_a_relative_out_is_not_moved_by_a_change_of_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with new_directory("out") as staging:
        assert staging.is_absolute()
        fill(staging, "new")
        os.chdir("/")
    assert kind_of(tmp_path / "out") == "new"


def test_mode_is_what_the_umask_leaves(out: Path) -> None:
    mask = os.umask(0o027)
    try:
        write(out, "new")
    finally:
        os.umask(mask)
    assert out.stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("force", [False, True])
def test_an_empty_directory_is_accepted(out: Path, force: bool) -> None:
    out.mkdir(parents=True)
    write(out, "new", force=force)
    assert kind_of(out) == "new"
    assert os.listdir(out.parent) == ["out"]


def test_a_bundle_is_replaced_with_force_only(taken: Path) -> None:
    with pytest.raises(BundleError, match="exists") as caught:
        write(taken, "new")
    assert "--force" in caught.value.fix
    assert kind_of(taken) == "old"
    write(taken, "new", force=True)
    assert kind_of(taken) == "new"
    assert os.listdir(taken.parent) == ["out"]


def _folder_of_somebody(out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")


def _file(out: Path) -> None:
    out.write_text("years of work")


def _link_to_a_bundle(out: Path) -> None:
    old(out.with_name("elsewhere"))
    out.symlink_to("elsewhere")


def _dangling_link(out: Path) -> None:
    out.symlink_to("nowhere")


def _folder_called_as_the_manifest_is(out: Path) -> None:
    (out / bundles.MANIFEST).mkdir(parents=True)


def untouched(folder: Path) -> dict[Path, tuple[int, int, int, int]]:
    """What a write would change: not the access time, which looking changes."""
    stats = {path: path.lstat() for path in folder.rglob("*")}
    return {path: (s.st_ino, s.st_mode, s.st_size, s.st_mtime_ns) for path, s in stats.items()}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    "make", [_folder_of_somebody, _file, _link_to_a_bundle, _dangling_link, _folder_called_as_the_manifest_is]
)
def test_anything_else_is_never_replaced(out: Path, make: Callable[[Path], None], force: bool) -> None:
    out.parent.mkdir()
    make(out)
    before = untouched(out.parent)
    with pytest.raises(BundleError, match="exists and is not a"):
        write(out, "new", force=force)
    assert untouched(out.parent) == before


def test_refused_before_the_work_is_done(taken: Path) -> None:
    with pytest.raises(BundleError, match="exists"), new_directory(taken):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("place", ["file/out", "file/a/out", "/proc/out", "/dev/null/out", "x" * 300])
def test_a_parent_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    """Not by permission bits: root, as which tests often run, may write everywhere."""
    (tmp_path / "file").write_text("kept")
    with pytest.raises(BundleError, match="cannot be written") as caught:
        write(tmp_path / place, "new")
    assert caught.value.fix == "choose another OUT"
    assert (tmp_path / "file").read_text() == "kept"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("force", [False, True])
def test_the_root_directory(force: bool) -> None:
    with pytest.raises(BundleError) as caught:
        write(Path("/"), "new", force=force)
    assert caught.value.fix == "choose another OUT"


# -- when the block or the system fails -------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("x"), BundleError("x"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
@pytest.mark.parametrize("situation", [nothing, old])
def test_an_exception_in_the_block_leaves_nothing(
    out: Path, situation: Callable[[Path], None], error: BaseException
) -> None:
    out.parent.mkdir()
    situation(out)
    with pytest.raises(type(error)) as caught, new_directory(out, force=True) as staging:  # noqa: PT012
        fill(staging, "new")
        raise error
    assert caught.value is error
    assert kind_of(out) == (None if situation is nothing else "old")
    assert os.listdir(out.parent) == ([] if situation is nothing else ["out"])


def test_a_full_disk_leaves_nothing(taken: Path) -> None:
    with pytest.raises(BundleError, match="No space left on device"), new_directory(taken, force=True) as staging:  # noqa: PT012
        fill(staging, "new")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(staging / "model.onnx"))
    assert kind_of(taken) == "old"
    assert os.listdir(taken.parent) == ["out"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_rename_leaves_the_old_bundle(taken: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    counter, rename = itertools.count(1), os.rename

    def fails(source: Any, target: Any) -> None:
        if next(counter) == failing:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(target))
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(BundleError, match="cannot be written"):
        write(taken, "new", force=True)
    assert kind_of(taken) == "old"
    assert os.listdir(taken.parent) == ["out"]


def test_everything_is_flushed_before_it_is_in_place(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and directory of the bundle, then the rename, then the directory that it lies in."""
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def flushed(descriptor: int) -> None:
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renamed(source: Any, target: Any) -> None:
        events.append("renamed")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "rename", renamed)
    with new_directory(out) as staging:
        fill(staging, "new")
    before, after = events[: events.index("renamed")], events[events.index("renamed") + 1 :]
    assert sorted(before) == sorted(
        ["model.onnx", "model.onnx.data", "net", "scheduler.json", "sdrt.json", os.path.basename(staging)]
    )
    assert after == ["folder"]


# -- two writers ------------------------------------------------------------------------------------------------------

HOLDER = """
import sys
from sdrt.staging import new_directory
with new_directory(sys.argv[1], force=True) as staging:
    (staging / "half").touch()
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_writer_is_refused(taken: Path) -> None:
    """It waits for nothing and disturbs nothing; when the first is killed, the lock is free."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, taken], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            (staging,) = taken.parent.glob(".out.partial-*")
            with pytest.raises(BundleError, match="another process is writing it"):
                write(taken, "new", force=True)
            assert (staging / "half").exists()
            write(taken.with_name("other"), "new")  # another OUT beside it is free
        finally:
            holder.kill()
    assert kind_of(taken) == "old"
    write(taken, "new", force=True)
    assert kind_of(taken) == "new"
    assert sorted(os.listdir(taken.parent)) == ["other", "out"]


def test_a_second_writer_in_the_same_process_is_refused(out: Path) -> None:
    with new_directory(out) as staging:
        with pytest.raises(BundleError, match="another process is writing it"):
            write(out, "other")
        fill(staging, "new")
    assert kind_of(out) == "new"
    assert os.listdir(out.parent) == ["out"]


def test_names_that_begin_alike_do_not_meet(tmp_path: Path) -> None:
    """What a run for OUT cleans up belongs to OUT, not to OUT.partial-x or OUT2."""
    with new_directory(tmp_path / "out2") as second, new_directory(tmp_path / "out") as first:
        write(tmp_path / "out3", "third")
        fill(first, "first")
        fill(second, "second")
    assert [kind_of(tmp_path / name) for name in ("out", "out2", "out3")] == ["first", "second", "third"]
    assert sorted(os.listdir(tmp_path)) == ["out", "out2", "out3"]


def test_a_mount_point_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be renamed; a container's volume is one."""
    out = tmp_path / "volume"
    out.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == out)
    with pytest.raises(BundleError, match="is a mount point"), new_directory(out):
        raise AssertionError("the block must not run")
