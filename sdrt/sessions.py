"""The sessions of a pipeline: all of them kept, or one network in memory at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from sdrt.engine import Array, DeviceMemory, Session
from sdrt.errors import InputError
from sdrt.give_back import give_back

Opener = Callable[[str], Session]
"""Component → its session."""

Clock = Callable[[float], object]
"""Takes the seconds of each opening, of each compiling for sizes, and of each release."""

Sizes = Mapping[str, int]
"""As ``Session.prepare`` takes them."""


class Sessions(Protocol):
    """Where a pipeline's sessions come from. Threads may share it."""

    def use(
        self, name: str, timed: Clock, *, sizes: Sizes | None = None, keep: bool = False
    ) -> AbstractContextManager[Session]:
        """``with sessions.use(name, clock) as session``: opened where it is not yet, and prepared for sizes that differ
        from the last ones. keep: another use follows soon.

        Raises what opening and preparing raise, and InputError once closed.
        """

    def release(self, name: str) -> None:
        """There will be no more uses soon."""

    def memory(self) -> dict[str, DeviceMemory]:
        """What the sessions that are open now hold of devices' own memory, by component; those that tell."""

    def close(self) -> None:
        """Close them all, for good; waits for a call that is running."""


class Kept:
    """All sessions stay; one that is not there yet is opened at its first use."""

    def __init__(self, opened: dict[str, Session], opener: Opener) -> None:
        self._opened, self._opener = opened, opener
        self._prepared = _Prepared()
        self._lock = threading.Lock()  # a session is opened by a generation, and closed from any thread
        self._closed = False

    @contextmanager
    def use(self, name: str, timed: Clock, *, sizes: Sizes | None = None, keep: bool = False) -> Iterator[Session]:
        with self._lock:
            if self._closed:
                raise closed()
            if name not in self._opened:
                started = time.perf_counter()
                self._opened[name] = self._opener(name)
                timed(time.perf_counter() - started)
            session = self._opened[name]
        started = time.perf_counter()
        if self._prepared.compiled(name, session, sizes):
            timed(time.perf_counter() - started)
        yield session

    def release(self, name: str) -> None:
        """They stay."""

    def memory(self) -> dict[str, DeviceMemory]:
        with self._lock:
            return _memory(self._opened)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for session in self._opened.values():
                session.close()


class OneAtATime:
    """Never two networks in memory: one is released after its use, or, kept, when another one is to be used.

    A use holds the lock: another thread's waits until it is over.
    """

    def __init__(self, opened: dict[str, Session], opener: Opener) -> None:
        """``opened`` shows which one is open; it starts empty."""
        self._opened, self._opener = opened, opener
        self._prepared = _Prepared()
        # A stream that nobody holds any more releases its denoiser wherever Python collects it, so in a use, too.
        self._lock = threading.RLock()
        self._closed = False

    @contextmanager
    def use(self, name: str, timed: Clock, *, sizes: Sizes | None = None, keep: bool = False) -> Iterator[Session]:
        with self._lock:
            started = time.perf_counter()
            if self._closed:
                raise closed()
            opening = name not in self._opened
            if opening:
                for other in list(self._opened):
                    self.release(other)
                self._opened[name] = _Detached(self._opener(name))
            try:
                if self._prepared.compiled(name, self._opened[name], sizes) or opening:
                    timed(time.perf_counter() - started)
                yield self._opened[name]
            except BaseException:
                keep = False
                raise
            finally:
                if not keep:
                    started = time.perf_counter()
                    self.release(name)
                    timed(time.perf_counter() - started)

    def release(self, name: str) -> None:
        with self._lock:
            if name in self._opened:
                self._opened.pop(name).close()
                self._prepared.forget(name)
                give_back()

    def memory(self) -> dict[str, DeviceMemory]:
        with self._lock:
            return _memory(self._opened)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for name in list(self._opened):
                self.release(name)


class _Prepared:
    """The sizes that each session was prepared for last, so that steps, which are all alike, ask nothing."""

    def __init__(self) -> None:
        self._sizes: dict[str, Sizes] = {}

    def compiled(self, name: str, session: Session, sizes: Sizes | None) -> bool:
        """Whether anything had to be. None: a call of unknown sizes, after which nobody knows what is compiled."""
        if sizes is None:
            self.forget(name)
            return False
        if self._sizes.get(name) == sizes:
            return False
        compiled = session.prepare(sizes)
        self._sizes[name] = sizes
        return compiled

    def forget(self, name: str) -> None:
        self._sizes.pop(name, None)


class _Detached:
    """A session whose outputs are copies: an engine's own buffers would keep its memory, which is to be given back."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.spec = session.spec
        self.prepare, self.bind, self.memory, self.close = session.prepare, session.bind, session.memory, session.close

    def run(self, **inputs: Array) -> dict[str, Array]:
        return {name: array.copy() for name, array in self._session.run(**inputs).items()}


def _memory(sessions: Mapping[str, Session]) -> dict[str, DeviceMemory]:
    return {name: held for name, session in sessions.items() if (held := session.memory()) is not None}


def closed() -> InputError:
    """The error of everything that is asked of a closed pipeline."""
    return InputError("the pipeline is closed", "load it again with Pipeline.from_pretrained")
