"""How much of what the chip can do: counted work beside measured rates (the roofline model, Williams et al. 2009)."""

from __future__ import annotations

import importlib
from collections.abc import Hashable, Mapping
from typing import Any

from sdrt.bench.machine import measure
from sdrt.bench.report import Rates, Roof, Settings
from sdrt.bench.statistics import Summary
from sdrt.bundle import Bundle, Work
from sdrt.engine import ONNX, default_engine, devices_by_component
from sdrt.errors import SdrtError

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1, "int8": 1, "w8": 4, "w6": 4, "w4": 4}
"""Bytes of an activation by the artifact's precision."""


Measured = dict[Hashable, tuple[Rates | None, list[str]]]
"""What was measured already, so that variants which share engine, device and precision share their rates."""


def rates(bundle: Bundle, settings: Settings, known: Measured) -> tuple[Rates | None, list[str]]:
    """What this machine does at best: through numpy, and through the denoiser's engine; and what could not be measured.

    None without numpy's part: then no floor is known. Takes seconds; with a precision that is calibrated, up to a
    minute.
    """
    component = bundle.component(bundle.manifest.denoiser.component)
    engine, precision = settings.engine or default_engine(component), component.artifact.precision
    device = devices_by_component(bundle, settings.device)[bundle.manifest.denoiser.component]
    key = (engine, device, precision, settings.threads, *sorted(settings.options.items()))
    if key not in known:
        known[key] = _rates(engine, device, precision, settings)
    return known[key]


def _rates(engine: str, device: str | None, precision: str, settings: Settings) -> tuple[Rates | None, list[str]]:
    try:
        machine = measure(settings.threads)
    except SdrtError as error:  # by now everything else is measured, and worth keeping
        return None, [str(error)]
    flops, missing = {"sgemm": machine["sgemm"]}, []
    try:
        probe: Any = importlib.import_module("sdrt_engines.probe")
        flops |= probe.rates(engine, device, precision, settings.threads, dict(settings.options))
    except Exception as error:  # likewise
        missing.append(f"what the engine does at best was not measured: {error}")
    return Rates(flops, machine["bandwidth"]), missing


def roof(bundle: Bundle, settings: Settings, measured: Rates | None, stages: Mapping[str, Summary]) -> dict[str, Roof]:
    """The roof of each component that ran and whose work was counted; of none without rates.

    A share can be more than 1 where a component's numbers stay in caches, which are faster than the memory whose
    bandwidth was measured.
    """
    if measured is None:
        return {}
    best = max(measured.flops.values())
    found = {}
    for name, (stage, sizes) in _calls(bundle, settings).items():
        artifact, work = bundle.component(name).artifact, _work(bundle, name)
        if work is None:
            continue
        macs = work.at(sizes)
        weights = sum(file.bytes for file in artifact.files)
        if artifact.facts.get("weights") == "fp16" and artifact.precision == "fp32":
            weights *= 2  # stored in float16, widened when they are loaded
        moved = weights + work.elements_at(sizes) * BYTES[artifact.precision]
        floor = max(2 * sum(macs.values()) / best, moved / measured.bandwidth)
        summary = stages.get(stage) if stage is not None else None
        found[name] = Roof(macs, moved, floor, floor / summary.median if summary is not None else None)
    return found


def _work(bundle: Bundle, name: str) -> Work | None:
    """As the manifest says; where it does not (a directory of optimum's, an older bundle), from the ONNX graph."""
    component = bundle.component(name)
    if component.work is not None or component.artifact.engine != ONNX:
        return component.work
    try:
        graph: Any = importlib.import_module("sdrt_engines.graph.work")
        found: Work | None = graph.counted(bundle.path(component.artifact.files[0].path), component, name)
    except ImportError:  # the onnx package, without which nothing can be counted here
        return None
    return found


def _calls(bundle: Bundle, settings: Settings) -> dict[str, tuple[str | None, dict[str, int]]]:
    """Component → (the stage that is one call of it, sizes of that call)."""
    facts = bundle.manifest
    guided = settings.guidance_scale > 1
    texts = 2 if guided and settings.prompt != (settings.negative_prompt or "") else 1
    if guided and settings.negative_prompt is None and facts.no_negative_prompt == "zeros":
        texts = 1
    size = {"H": settings.height, "W": settings.width}
    tokens = {"T": max((text.max_length for text in facts.text_encoders), default=1)}
    encoders = {text.component for text in facts.text_encoders}
    one_stage = "text_encoder" if len(encoders) == 1 else None  # two encoders share the stage
    calls: dict[str, tuple[str | None, dict[str, int]]] = {
        name: (one_stage, {"B": texts} | tokens) for name in encoders
    }
    calls[facts.denoiser.component] = ("network", {"B": settings.batch * (2 if guided else 1)} | size | tokens)
    calls["vae_decoder"] = ("vae_decoder", {"B": settings.batch} | size)
    return calls
