"""One GPU's shared memory for activations, its stream, and the turn to use them.

Components run one after another, so that the largest one's activations are all the room that activations need.
Whoever runs holds ``lock``. The memory may grow, and is elsewhere then: ``generation`` tells, and what was recorded
with the old address must be recorded again.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque

from sdrt_engines import cuda


class Arena:
    """Memory and stream of one GPU; made by ``held``, freed when nobody holds it any more."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.lock = threading.RLock()
        self.generation = 0
        self._users = 0
        self._memory: cuda.Buffer | None = None
        self._stream: cuda.Stream | None = None

    @property
    def stream(self) -> cuda.Stream:
        if self._stream is None:
            self._stream = cuda.Stream()
        return self._stream

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes if self._memory is not None else 0

    @property
    def address(self) -> int:
        return self._memory.address if self._memory is not None else 0

    def require(self, nbytes: int) -> None:
        """Make it at least so large. The old memory is freed first: the two need not fit beside each other."""
        if self._memory is not None and nbytes <= self._memory.nbytes:
            return
        self.stream.synchronize()
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        self.generation += 1
        self._memory = cuda.Buffer(nbytes, "activations")

    def release(self) -> None:
        """The last of its holders frees everything."""
        with _arenas_lock:
            held = self._without_one()
        _settle()
        cuda.close_all(held)

    def leave(self) -> None:
        """``release`` for a finalizer, which waits for no lock: it runs in whichever thread Python collects garbage,
        and that one may hold the lock that another one waits for before it lets go of this one's."""
        _left.append(self)
        _settle()

    def _without_one(self) -> list[cuda.Buffer | cuda.Stream]:
        """What is to be freed, now that one holder fewer is there. Whoever calls it has ``_arenas_lock``."""
        self._users -= 1
        if self._users:
            return []
        _arenas.pop(self.index, None)
        held = [one for one in (self._memory, self._stream) if one is not None]
        self._memory = self._stream = None
        return held


_arenas: dict[int, Arena] = {}
_arenas_lock = threading.RLock()
"""Nothing is waited for while it is held. Entered anew by the thread that holds it where Python drops a session."""

_left: deque[Arena] = deque()
"""Once for each holder that nobody closed, while another thread had the lock."""


def held(index: int) -> Arena:
    """The arena of one GPU, to be released once for each call."""
    with _arenas_lock:
        arena = _arenas.get(index) or Arena(index)
        arena._users += 1
        _arenas[index] = arena  # again, should its last holder have been dropped just now
    _settle()
    return arena


def _settle() -> None:
    """Do what finalizers have left, unless another thread has the lock, which does it when it is done.

    What is dropped here frees itself, and waits for nothing either.
    """
    while _left and _arenas_lock.acquire(blocking=False):
        try:
            with contextlib.suppress(IndexError):  # taken by another thread, or by a finalizer meanwhile
                _left.popleft()._without_one()
        finally:
            _arenas_lock.release()
