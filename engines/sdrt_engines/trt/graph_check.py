"""Parity of the graph that a plan is built from: what can be known of a plan where no GPU is."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdrt.bundle import Artifact, Bundle, Component, Parity, Precision, record
from sdrt.engine import ONNX, OpenOptions
from sdrt.errors import BuildError
from sdrt.verify import measure, passed
from sdrt_engines import onnxruntime
from sdrt_engines.graph import load_graph, name_dims
from sdrt_engines.graph.external import Weights
from sdrt_engines.graph.rounded import rounded


def check_graph(source: Bundle, name: str, precision: Precision, folder: Path, graph: str) -> list[dict[str, Any]]:
    """Figures of ``folder/graph``, run by ONNX Runtime on the CPU at every size that there are reference vectors for.

    Empty where there are none. BuildError where it computes something else.
    """
    component = source.component(name)
    if component.reference is None:
        return []
    with tempfile.TemporaryDirectory(dir=folder, prefix=".check-") as scratch:
        checked = Path(scratch)
        model = load_graph(folder / graph)
        name_dims(model, component)  # sizes are free again: the reference vectors have others
        weights = Weights(model, folder)
        if precision == "bf16":  # of which ONNX Runtime has no kernels on a CPU
            rounded(model, weights, checked)
        else:
            weights.save(model, checked)
        figures = _measured(source, name, component, precision, checked)
    for parity in figures:
        if not passed(parity, precision):
            raise BuildError(
                f"{name}: the graph in {precision} does not compute what torch computes: {parity.output} at"
                f" {parity.case} is {parity.max_abs:.3g} off ({parity.psnr} dB)",
                "--precision fp32; please report it with the output of sdrt doctor",
            )
    return [{"case": p.case, "output": p.output, "max_abs": p.max_abs, "psnr": p.psnr} for p in figures]


def _measured(source: Bundle, name: str, component: Component, precision: Precision, folder: Path) -> list[Parity]:
    files = tuple(record(folder, file.name) for file in sorted(folder.iterdir()))
    only = {name: replace(component, artifact=Artifact(engine=ONNX, precision=precision, files=files))}
    manifest = replace(source.manifest, components=only, text_encoders=())
    # Unpacked, as ONNX Runtime else puts in operators for float8 that it has no kernels of.
    options = OpenOptions(extra={"prepack": "false", "optimization": "extended", "unpack": "true"})
    session = onnxruntime.open(Bundle(folder, manifest), name, "cpu", options)
    try:
        return list(measure(Bundle(source.root, manifest), name, session))
    finally:
        session.close()
