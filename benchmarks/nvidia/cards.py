"""How fast a card could be at best, and so how long a step takes at least."""

from __future__ import annotations

import re

from sdrt.bundle import Bundle

PEAKS: tuple[tuple[str, float], ...] = (
    # Data sheets say 989e12 of both; what large matrix products of float16 were seen to reach is what a floor is of.
    (r"H100 80GB HBM3|H100 SXM|H200|GH200", 790e12),
    # Data sheets, dense, float16 products summed in float32.
    (r"H100 PCIe", 756e12),
    (r"A100", 312e12),
    (r"L40S", 362e12),
    (r"L4\b", 121e12),
    (r"A10\b", 125e12),
    (r"T4\b", 65e12),
    (r"RTX 4090\b(?! D)", 165.2e12),
    (r"RTX 3090\b(?! Ti)", 71e12),
)
"""Names of cards, as CUDA tells them (regular expressions), and FLOP/s. Laptops' chips have the same names and less."""


def peak(name: str) -> float | None:
    """FLOP/s in float16 of the card of this name; None where it is not known."""
    if "laptop" in name.lower():
        return None
    return next((flops for pattern, flops in PEAKS if re.search(pattern, name)), None)


def step_flop(bundle: Bundle, width: int, height: int, batch: int) -> int | None:
    """FLOP of a guided step of ``batch`` pictures: two rows a picture; a multiply-accumulate is two. None: not counted.

    bundle: one whose manifest has the counts (``sdrt export`` writes them).
    """
    facts = bundle.manifest
    work = bundle.component(facts.denoiser.component).work
    if work is None:
        return None
    tokens = max((text.max_length for text in facts.text_encoders), default=1)
    return 2 * sum(work.at({"B": 2 * batch, "H": height, "W": width, "T": tokens}).values())


def floor(flop: int | None, flops: float | None) -> float | None:
    """Seconds; None where one of the two is not known."""
    return flop / flops if flop is not None and flops is not None else None
