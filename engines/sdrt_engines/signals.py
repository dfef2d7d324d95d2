"""Signals that wait while a library works in which what a handler raises would be lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""What is meant to end the process: the signals that sdrt's command line has handlers for, which raise."""


class Held:
    """Lets signals wait that Python has handlers for, such as Ctrl-C's: a handler that raises would do so in a call
    back from a library, or in an import that catches everything, and what is raised is dropped there. After the block
    the handlers are called."""

    def __init__(self) -> None:
        self.waiting: list[tuple[int, FrameType | None]] = []
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():  # no other one has handlers
            for number in ENDING:
                if callable(handler := signal.getsignal(number)):
                    self._handlers[number] = handler
                    signal.signal(number, lambda *caught: self.waiting.append(caught))

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        for number, frame in self.waiting:
            self._handlers[number](number, frame)
