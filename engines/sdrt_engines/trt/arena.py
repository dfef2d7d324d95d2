"""One GPU's shared memory for activations, its stream, and the turn to use them.

Components run one after another, so that the largest one's activations are all the room that activations need.
Whoever runs holds ``lock``. The memory may grow, and is elsewhere then: ``generation`` tells, and what was recorded
with the old address must be recorded again.
"""

from __future__ import annotations

import threading

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
        with _arenas_lock, self.lock:
            self._users -= 1
            if self._users:
                return
            _arenas.pop(self.index, None)
            held = [one for one in (self._memory, self._stream) if one is not None]
            self._memory = self._stream = None
            cuda.close_all(held)


_arenas: dict[int, Arena] = {}
_arenas_lock = threading.RLock()
"""Entered anew by the thread that holds it where Python drops a session, which releases, while it makes an arena."""


def held(index: int) -> Arena:
    """The arena of one GPU, to be released once for each call."""
    with _arenas_lock:
        arena = _arenas.setdefault(index, Arena(index))
        arena._users += 1
        return arena
