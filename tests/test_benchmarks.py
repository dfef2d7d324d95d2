"""The benchmarks, each run once and not measured, so that they cannot rot."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT, environment


def test_benchmarks_run(bundle: Path) -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-disable", "-p", "no:cacheprovider"]
    kept = environment() | {"SDRT_TEST_CACHE": str(bundle.parent)}
    done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout
    assert re.search(r"= \d+ passed in ", done.stdout), "none skipped"
