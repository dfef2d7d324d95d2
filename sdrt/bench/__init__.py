"""Latency and memory that can be trusted.

from sdrt import GenerationRequest, Pipeline
from sdrt.bench import measure
with Pipeline.from_pretrained("bundle") as pipe:
    report = measure(pipe, GenerationRequest("a lighthouse", seed=1), warmups=1, iterations=5)
    print(report.variants[0].stages["network"].median)
    report.save("report.json")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdrt.bench.compare import compare_reports
    from sdrt.bench.measuring import alternate, measure
    from sdrt.bench.report import Report, load

__all__ = ["Report", "alternate", "compare_reports", "load", "measure"]

_HOMES = {"Report": "report", "alternate": "measuring", "compare_reports": "compare", "load": "report",
          "measure": "measuring"}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: the measured process must not carry what measures it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
