"""coremltools without what it says. One thread at a time: what is changed for that is the whole process's."""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any, TextIO, cast

from sdrt_engines.signals import Held

_ALONE = threading.RLock()


class _Others:
    """A stream for all threads but the one that made it, whose words go nowhere until it is done."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.muted: int | None = threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if self.muted == threading.get_ident() else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what coremltools says of other libraries' versions, and without its bars. Other threads' words to stderr
    get there."""
    library = logging.getLogger("coremltools")
    with _ALONE:
        level, stderr = library.level, sys.stderr
        others = _Others(stderr)
        library.setLevel(logging.ERROR)
        sys.stderr = shown = cast(TextIO, others)
        try:
            yield
        finally:
            others.muted = None  # whoever took it for stderr meanwhile writes to the real one
            if sys.stderr is shown:  # else somebody has put another one there since
                sys.stderr = stderr
            library.setLevel(level)


def imported() -> Any:
    """coremltools; ImportError. It is quiet when it comes the first time, and nothing is changed for it after that.

    Signals wait for it: it imports what it may use within bare excepts, which drop what a handler raises.
    """
    with _ALONE:
        if sys.modules.get("coremltools") is None:
            with Held(), quiet(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return importlib.import_module("coremltools")
        return importlib.import_module("coremltools")
