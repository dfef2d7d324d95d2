"""From a float32 graph to one in another precision: what an engine that takes precision from the graph begins with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdrt import strict_json
from sdrt.bundle import Bundle, Component
from sdrt.engine import BuildOptions
from sdrt.errors import BuildError
from sdrt_engines.graph import quantize, ranges
from sdrt_engines.graph.external import Weights
from sdrt_engines.graph.half import BFLOAT, to_half

PRECISIONS = ("fp16", "bf16", "fp8", "int8", "w8")
"""What ``reduce`` knows beside fp32, which needs no pass."""


def reduce(
    model: Any, weights: Weights, folder: Path, source: Bundle, component: Component, options: BuildOptions, *,
    weight_bits: int = 8, largest_normed: float = math.inf, half_between: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Rewrite a ModelProto, whose external data lie in ``folder``, for ``options.precision``; returns the facts.

    weight_bits: as in ``quantize.to_int8``, for int8. largest_normed: as in ``half.to_half``, for fp16.
    half_between: what is not quantised is in float16 where it can be, for fp8 and int8.

    The graph's inputs and outputs keep their names, types and shapes. Only ONNX's own operators come in.
    """
    _check(model, options.precision)
    if options.precision == "fp16":
        samples = options.samples()
        seen = ranges.measure(model, folder, samples.calls, _part(options.report, 0.5, 0.9))
        upcast = _upcasts_attention(source, component)
        facts = to_half(model, weights, seen, upcast_attention=upcast, largest_normed=largest_normed)
        facts["calibration"] = dict(samples.facts)
    elif options.precision == "bf16":
        facts = to_half(model, weights, ranges.Ranges({}, {}), kind=BFLOAT)
    elif options.precision in ("int8", "fp8"):
        samples = options.samples()
        found = {t.activation for t in quantize.targets(model, weights) if not t.keep}
        integers = options.precision == "int8"
        seen = ranges.measure(model, folder, samples.calls, _part(options.report, 0.5, 0.65 if integers else 0.9))
        # Not measured: of an operator whose element types are not known. Infinite: a mask. Both stay float.
        largest = {
            name: seen.largest[name] for name in sorted(found) if math.isfinite(seen.largest.get(name, math.inf))
        }
        if integers:
            clips = ranges.clipping(model, folder, samples.calls, largest, _part(options.report, 0.65, 0.9))
            unscaled = found & set(seen.largest) - set(clips)
            facts = quantize.to_int8(model, weights, clips, infinite=unscaled, weight_bits=weight_bits)
            facts["clipped"] = sum(clips[name] < largest[name] for name in largest)
        else:
            facts = quantize.to_float8(model, weights, largest, infinite=found & set(seen.largest) - set(largest))
        if half_between:
            facts |= to_half(model, weights, seen, upcast_attention=_upcasts_attention(source, component))
        facts["calibration"] = dict(samples.facts)
    elif options.precision == "w8":
        facts = quantize.weights_to_int8(model, weights)
    else:
        raise BuildError(f"precision {options.precision} has no pass; there are {', '.join(PRECISIONS)}")
    return facts


def _check(model: Any, precision: object) -> None:
    for node in model.graph.node:
        if any(a.HasField("g") or a.graphs for a in node.attribute):
            raise BuildError(
                f"{node.op_type} holds a graph of its own, which this sdrt cannot convert to {precision}",
                "build this component in fp32",
            )


def _part(report: ranges.Report, start: float, end: float) -> ranges.Report:
    """A report of 0 to 1 that is ``start`` to ``end`` of the whole. Recording samples is what comes before 0.5."""
    return lambda what, fraction: report(what, start + (end - start) * fraction)


def _upcasts_attention(source: Bundle, component: Component) -> bool:
    """SD 2.x's ``"upcast_attention": true``: known from training to overflow, whatever calibration saw."""
    if component.config is None:
        return False
    config = strict_json.read(source.path(component.config.path))
    return isinstance(config, Mapping) and bool(config.get("upcast_attention"))
