"""The processor and the memory of this machine, as far as the system names them."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

FEATURES = (
    "avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile",
    "amx_bf16", "amx_int8", "neon", "asimd", "asimddp", "asimdhp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip
"""Processor features that matrix kernels are chosen by, as Linux names them."""


def name() -> str:
    """Linux and macOS say more than Python's platform module."""
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return said("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or platform.machine()


def features() -> tuple[str, ...]:
    """Those of ``FEATURES`` that the processor has; none where the system does not list them."""
    for line in _cpuinfo():
        if line.startswith(("flags", "Features")):
            held = set(line.partition(":")[2].split())
            return tuple(feature for feature in FEATURES if feature in held)
    return ()


def is_x86() -> bool:
    """Of 32 or 64 bits."""
    return platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")


def memory() -> int:
    """Bytes of main memory; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def said(*command: str) -> str:
    """What a command prints; nothing where there is no such command, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
