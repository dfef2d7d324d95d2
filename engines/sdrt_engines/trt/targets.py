"""``--target`` for NVIDIA: which GPUs a plan is built for, and whether one that is here is among them."""

from __future__ import annotations

import re

from sdrt.bundle import Precision
from sdrt.errors import BuildError
from sdrt_engines.cuda import Gpu
from sdrt_engines.trt.library import Library

ANY = "any"
"""TensorRT-RTX's default: Ampere and later, one plan for all."""

AMPERE_PLUS = "ampere+"
CURRENT = "current"

PORTABLE = ("sm80", "sm86", "sm89", "sm120")
"""What ``any`` is known to cover. Later ones are promised; what lies between (sm90, sm100) nobody says."""

FLOAT8 = 89
"""The first compute capability with products of float8."""

_ONE = re.compile(r"sm([1-9][0-9]{1,2})")


def parsed(library: Library, target: str | None) -> str:
    """The target as a manifest spells it: ``any``, ``current``, ``ampere+``, or names in order, ``sm86,sm89``.

    BuildError for what the library cannot build for.
    """
    text = (target or (ANY if library.targets else CURRENT)).lower().replace(" ", "")
    special = (ANY, CURRENT) if library.targets else (CURRENT, AMPERE_PLUS)
    if text in special:
        return text
    names = sorted(dict.fromkeys(text.split(",")), key=lambda name: (len(name), name))
    if library.targets and all(name in library.targets for name in names):
        return ",".join(names)
    if not library.targets and len(names) == 1 and _ONE.fullmatch(names[0]):
        return names[0]  # checked against the GPU that is there
    held = f"{', '.join(special)}, {', '.join(library.targets)} (several: {','.join(library.targets[1:3])})"
    listed = held if library.targets else "current, ampere+, or the compute capability of the GPU here, such as sm89"
    raise BuildError(f"{library.engine} has no target {target!r}; it has {listed}", "--target NAME")


def covers(target: str, gpu: Gpu, precision: Precision) -> bool:
    """Whether a plan for ``target``, which is none of ``current``, is for this GPU. Of ``any`` the library has the
    last word."""
    if precision == "fp8" and number(gpu.target) < FLOAT8:
        return False
    if target == ANY:
        return number(gpu.target) >= 80
    return number(gpu.target) >= 80 if target == AMPERE_PLUS else gpu.target in target.split(",")


def surely_covers(target: str, gpu: Gpu, precision: Precision) -> bool:
    """Whether a plan for ``target`` runs on this GPU, whatever the library says of it when it is opened."""
    known = target != ANY or gpu.target in PORTABLE
    return target == CURRENT or (known and covers(target, gpu, precision))


def number(target: str) -> int:
    """``"sm86"`` → 86; 0 for what is no compute capability."""
    match = _ONE.fullmatch(target)
    return int(match[1]) if match else 0
