"""Which passes a precision is made of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sdrt import BuildError
from sdrt import bundle as bundles
from sdrt.engine import BuildOptions, Samples
from sdrt_engines.graph.precision import reduce
from tests.sdrt_engines.graph.conftest import component


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
    for precision, message in (("int8", "were not recorded"), ("w4", "no pass; there are fp16, int8, w8")):
        options = BuildOptions(precision=precision)  # type: ignore[arg-type]
        with pytest.raises(BuildError, match=message):
            reduce(model, weights, folder, held, held.component("vae_decoder"), options)
