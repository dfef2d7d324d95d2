"""The machine, and what else it does."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from sdrt.bench.environment import Interference, Watch, examine, warnings


def test_this_machine() -> None:
    found = examine()
    assert found.processor
    assert found.threads == os.cpu_count()
    assert found.memory > 2**28
    assert found.python == sys.version.split()[0]
    assert found.commit is None or len(found.commit.rstrip("+")) == 12


def test_others_are_seen_and_those_measured_are_not() -> None:
    """A busy process raises ``others`` unless it is named as measured."""
    busy = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    assert busy.stdout is not None
    try:
        busy.stdout.readline()
        stranger, measured = Watch(), Watch([busy.pid])
        time.sleep(1.0)
        seen, own = stranger.stop(), measured.stop()
    finally:
        busy.kill()
        busy.communicate()
    assert seen.others - own.others > 0.3 / (os.cpu_count() or 1)
    assert seen.seconds >= 1.0


def test_warnings_are_by_the_worst() -> None:
    quiet = Interference(1.0, 0.01, 0.0, (0.1, 0.1), (2000.0, 2010.0))
    assert warnings([]) == warnings([quiet, Interference(1.0, 0.0, None, None, None)]) == []
    noisy = Interference(1.0, 0.3, 0.1, (0.1, 0.1), (3000.0, 2000.0))
    assert warnings([quiet, noisy, Interference(1.0, 0.2, 0.05, None, (2000.0, 2400.0))]) == [
        "other processes used up to 30% of the processor",
        "the hypervisor gave up to 10% of the processor to others",
        "the clock changed from 3000 to 2000 MHz",
    ]


def test_a_tick_is_no_interference() -> None:
    """The system counts processor time in ticks, of which a short measurement has few."""
    assert warnings([Interference(0.06, 0.16, 0.16, None, None)]) == []
    assert len(warnings([Interference(0.06, 0.9, 0.9, None, None)])) == 2
    assert warnings([Interference(0.0, 1.0, 1.0, None, None)]) == []
