"""Processes that serve: the protocol, and what goes wrong."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdrt.bench import serve as served
from sdrt.bench.process import Process, forget, worker_environment
from sdrt.errors import SdrtError

RUNNER = """
import os, sys, runpy
serve = runpy.run_path({serve!r})["serve"]
answers, dup = [], os.dup
os.dup = lambda fd: answers.append(dup(fd)) or answers[-1]

class Failure(Exception):
    def __init__(self): self.message, self.fix = "it broke", "mend it"

class Runner:
    def load(self, what):
        if what == "die": print("last words", file=sys.stderr, flush=True); os._exit(3)
        if what == "fail": raise Failure
        if what == "plain": raise ValueError("plainly wrong")
        if what == "half": os.write(answers[-1], b'{{"ok": '); os._exit(4)
        if what == "garbage": os.write(answers[-1], b"no JSON\\n")
        print("chatter on standard output")
        return {{"heard": what}}
    def run(self, **arguments): return arguments

serve(Runner)
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    script = tmp_path / "runner.py"
    script.write_text(RUNNER.format(serve=served.__file__))
    return [sys.executable, str(script)]


def test_asks_and_answers_and_chatter(command: list[str]) -> None:
    """What a library prints to standard output does not get into the answers."""
    with Process(command, "it") as process:
        assert process.start > 0
        assert process.ask({"do": "load", "what": "this"}) == {"heard": "this"}
        assert process.ask({"do": "run", "a": 1, "b": [2.5]}) == {"a": 1, "b": [2.5]}
        assert process.ask({"do": "close"}) == {}


def test_errors_name_the_process_and_keep_the_fix(command: list[str]) -> None:
    with Process(command, "it") as process:
        with pytest.raises(SdrtError, match="it: it broke") as caught:
            process.ask({"do": "load", "what": "fail"})
        assert caught.value.fix == "mend it"
        with pytest.raises(SdrtError, match="it: plainly wrong"):
            process.ask({"do": "load", "what": "plain"})
        assert process.ask({"do": "load", "what": "again"}) == {"heard": "again"}, "it serves on"


def test_a_death_is_told_with_the_last_words(command: list[str]) -> None:
    with Process(command, "it") as process, pytest.raises(SdrtError, match=r"it: .* ended with status 3: last words"):
        process.ask({"do": "load", "what": "die"})


def test_an_answer_cut_short_is_a_death_and_another_is_quoted(command: list[str]) -> None:
    with Process(command, "it") as process, pytest.raises(SdrtError, match="ended with status 4"):
        process.ask({"do": "load", "what": "half"})
    with Process(command, "it") as process, pytest.raises(SdrtError, match="it: answered 'no JSON"):
        process.ask({"do": "load", "what": "garbage"})


def test_the_worker_is_of_the_same_sdrt(tmp_path: Path) -> None:
    """Wherever this process found it, and whatever else lies in the current folder."""
    (tmp_path / "here" / "sdrt").mkdir(parents=True)
    (tmp_path / "here" / "sdrt" / "__init__.py").write_text("raise SystemExit('another sdrt')")
    code = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from sdrt.bench.report import Settings\nfrom sdrt.bench.rounds import Plan\n"
        "with Plan('it', Settings('m', 64, 64)).start(): pass\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path / "here", env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_what_the_worker_imports_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    assert worker_environment()["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path)


def test_what_cannot_be_started(tmp_path: Path) -> None:
    with pytest.raises(SdrtError, match="cannot be started"):
        Process([str(tmp_path / "none")], "it")
    with pytest.raises(SdrtError, match="ended with status 1"):
        Process([sys.executable, "-c", "raise SystemExit('no')"], "it")


def test_the_protocol_imports_nothing_of_sdrt(command: list[str]) -> None:
    code = f"import runpy, sys; runpy.run_path({served.__file__!r}); print([m for m in sys.modules if 'sdrt' in m or 'numpy' in m])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot be asked to forget a file")
def test_forget_leaves_the_files_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"x" * 10_000)
    forget([path])
    assert path.read_bytes() == b"x" * 10_000


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot be asked to forget a file")
def test_what_another_mapping_keeps_is_not_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"x" * 2**20)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[:: mmap.PAGESIZE]) > 0
        assert forget([path]) is False
    assert forget([]) is True
