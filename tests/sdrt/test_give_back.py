"""What is freed goes back to the system."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sdrt import give_back as module
from sdrt.give_back import give_back

PIECE, COUNT = 50_000, 4_000  # pieces that glibc takes from its heap, not from mappings of their own


def anonymous() -> int:
    """Bytes of anonymous memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024


@pytest.mark.skipif(module._trim() is None, reason="needs glibc's malloc_trim")
def test_freed_memory_leaves_the_process() -> None:
    """A piece at the end of the heap holds all below it, freed or not, unless the allocator is asked."""
    give_back()
    before = anonymous()
    pieces = [bytearray(b"\1") * PIECE for _ in range(COUNT)]
    last = pieces[-1]
    held = anonymous()
    pieces.clear()
    give_back()
    assert held - before > 0.9 * PIECE * COUNT
    assert anonymous() - before < 0.1 * PIECE * COUNT
    assert last


def test_another_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module._trim.cache_clear()
    monkeypatch.setattr(sys, "platform", "darwin")
    give_back()
    assert module._trim() is None
    module._trim.cache_clear()
