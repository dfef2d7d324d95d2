"""Which passes a precision is made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from sdrt import BuildError
from sdrt import bundle as bundles
from sdrt.engine import BuildOptions, Samples
from sdrt_engines.graph.external import Weights
from sdrt_engines.graph.precision import reduce
from tests.sdrt_engines.graph.conftest import Node, component, make


def test_attention_of_sd2_stays_float(copied: Path) -> None:
    """The network's own config says that its attention overflows: no calibration can say otherwise."""
    held = bundles.load(copied)
    spec = held.component("unet")
    inputs = {s.name: np.zeros(s.at({"B": 1, "H": 64, "W": 64, "T": 77}), np.float32) for s in spec.inputs}
    options = BuildOptions(precision="fp16", samples=lambda: Samples((inputs,), {"calls": 1}))
    path = copied / "unet" / "config.json"
    config = json.loads(path.read_text())
    for upcast in (False, True):
        model, weights, folder = component(copied, "unet")
        path.write_text(json.dumps(config | {"upcast_attention": upcast}).ljust(path.stat().st_size))
        facts = reduce(model, weights, folder, held, spec, options)
        islands = [island for island in facts["islands"] if island["op"] == "Attention"]
        assert islands == ([{"op": "Attention", "why": "config", "nodes": 20}] if upcast else [])


def test_no_samples_and_no_pass(bundle: Path) -> None:
    held = bundles.load(bundle)
    model, weights, folder = component(bundle, "vae_decoder")
    for precision, message in (("int8", "were not recorded"), ("w4", "no pass; there are fp16, bf16, fp8, int8, w8")):
        options = BuildOptions(precision=precision)  # type: ignore[arg-type]
        with pytest.raises(BuildError, match=message):
            reduce(model, weights, folder, held, held.component("vae_decoder"), options)


@pytest.mark.parametrize("precision", ["fp16", "int8", "w8"])
def test_control_flow_is_refused(bundle: Path, tmp_path: Path, precision: Any) -> None:
    """Passes do not look into branches, and what is read there alone would be dropped."""
    branch = helper.make_graph([Node("Add", ["x", "w"], ["z"])], "b", [], [helper.make_tensor_value_info("z", 1, [1])])
    nodes = [Node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)]
    model = make(nodes, {"x": [1]}, {"y": [1]}, c=np.array(True), w=np.ones(1, np.float32))
    held = bundles.load(bundle)
    options = BuildOptions(precision=precision, samples=lambda: Samples(({"x": np.ones(1, np.float32)},), {}))
    with pytest.raises(BuildError, match=f"If holds a graph of its own, which this sdrt cannot convert to {precision}"):
        reduce(model, Weights(model, tmp_path), tmp_path, held, held.component("unet"), options)


def test_int8_of_what_another_domain_computes(bundle: Path, tmp_path: Path) -> None:
    """Nothing says of what type it is, nor how large it gets."""
    w = np.eye(32, dtype=np.float32)
    model = make(
        [Node("Identity", ["x"], ["a"]), Node("MatMul", ["a", "w"], ["y"])], {"x": [1, 32]}, {"y": [1, 32]}, w=w
    )  # fmt: skip
    model.graph.node[0].CopyFrom(Node("Gelu", ["x"], ["a"], domain="com.microsoft"))
    model.opset_import.add(domain="com.microsoft", version=1)
    held = bundles.load(bundle)
    options = BuildOptions(precision="int8", samples=lambda: Samples(({"x": np.ones((1, 32), np.float32)},), {}))
    facts = reduce(model, Weights(model, tmp_path), tmp_path, held, held.component("unet"), options)
    assert (facts["quantized"], facts["kept_float"]) == ({}, {"MatMul: unknown type": 1})
