"""Does a bundle, on this machine, compute what torch computed? Reference vectors against an engine, without torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from numpy.typing import NDArray

from sdrt.bundle import Bundle, Parity, Profile, fits, read_arrays, solve
from sdrt.engine import Session
from sdrt.errors import BundleError
from sdrt.metrics import max_abs, psnr

FLOOR_DB = {"fp32": 90.0, "bf16": 35.0, "fp16": 45.0, "fp8": 20.0, "int8": 15.0, "w8": 30.0, "w6": 25.0, "w4": 15.0}
"""PSNR, by precision, below which a component does not count as computing the same thing.

fp32 graphs were seen at 115 to 145 dB; leaving out one bias or taking a norm's epsilon wrong costs more than 30 dB.
The reduced precisions' floors tell damage from rounding, not good from bad: what they cost is in the parity figures.
int8's scales are made for real runs: a tiny XL decoder scores 18 dB on the random inputs, a seventh as large as real
ones.
"""


def reference_cases(bundle: Bundle, name: str) -> dict[str, tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]]:
    """The component's reference vectors: case → (inputs, torch's float32 outputs), by tensor name.

    Arrays in the file are called ``<case>/in/<name>`` and ``<case>/out/<name>``. BundleError when there are none.
    """
    component = bundle.component(name)
    if component.reference is None:
        raise BundleError(f"{name}: has no reference vectors", "export the checkpoint again")
    cases: dict[str, tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]] = {}
    for key, array in read_arrays(bundle, component.reference.path).items():
        case, _, rest = key.partition("/")
        side, _, tensor = rest.partition("/")
        if side not in ("in", "out") or not tensor:
            raise BundleError(f"{component.reference.path}: array {key!r} is not <case>/in|out/<name>")
        cases.setdefault(case, ({}, {}))[side == "out"][tensor] = array
    if not cases:
        raise BundleError(f"{name}: {component.reference.path} holds no case", f"sdrt verify {bundle.root}")
    return cases


def admitted(
    bundle: Bundle, name: str, profiles: Sequence[Profile]
) -> Iterator[tuple[str, dict[str, NDArray[Any]], dict[str, NDArray[Any]]]]:
    """The reference cases (name, inputs, outputs) whose sizes one of the profiles admits; all when there is none."""
    specs = bundle.component(name).inputs
    for case, (inputs, outputs) in reference_cases(bundle, name).items():
        sizes = solve(specs, {tensor: array.shape for tensor, array in inputs.items()})
        if not profiles or any(fits(profile, sizes) for profile in profiles):
            yield case, inputs, outputs


def measure(bundle: Bundle, name: str, session: Session) -> Iterator[Parity]:
    """One figure for each output of each reference case that the artifact's profiles admit."""
    for case, inputs, outputs in admitted(bundle, name, bundle.component(name).artifact.profiles):
        got = session.run(**inputs)
        for output, reference in outputs.items():
            if output not in got or reference.shape != got[output].shape:
                raise BundleError(
                    f"{name}: the reference of case {case} has {output}{list(reference.shape)}, the component gives"
                    f" {', '.join(f'{o}{list(a.shape)}' for o, a in got.items())}",
                    "export the checkpoint again",
                )
            decibels = psnr(reference, got[output])
            yield Parity(case, output, max_abs(reference, got[output]), None if decibels == math.inf else decibels)


def passed(parity: Parity, precision: str) -> bool:
    """Whether a figure is above its precision's floor (NaN is not)."""
    return parity.psnr is None or parity.psnr >= FLOOR_DB[precision]
