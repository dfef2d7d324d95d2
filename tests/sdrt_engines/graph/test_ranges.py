"""Measured ranges."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sdrt import BuildError
from sdrt_engines.graph.ranges import CLIPPINGS, clipping, element_types, measure, step
from tests.conftest import environment
from tests.sdrt_engines.graph.conftest import Node, component, make


def test_largest_magnitudes(tmp_path: Path) -> None:
    """Over all calls, of either sign, for inputs and whatever is computed; integers and weights are not watched."""
    nodes = [
        Node("Mul", ["x", "w"], ["a"]), Node("Neg", ["a"], ["b"]), Node("Shape", ["b"], ["s"]), Node("Relu", ["b"], ["y"]),
    ]  # fmt: skip
    model = make(nodes, {"x": ["N"]}, {"y": ["N"]}, w=np.float32(10))
    calls = [{"x": np.array(x, np.float32)} for x in ([1, -2], [0.5, 1.5, 1], [-3, 2])]
    told: list[float] = []
    ranges = measure(model, tmp_path, calls, lambda _, fraction: told.append(fraction))
    assert dict(ranges.largest) == {"x": 3, "a": 30, "b": 30, "y": 30}
    assert told == [0, 1 / 3, 2 / 3]
    assert [o.name for o in model.graph.output] == ["y"]


@pytest.mark.parametrize("aligned", [False, True])
def test_logits_are_bounded(tmp_path: Path, aligned: bool) -> None:
    """Never below what Q·Kᵀ holds; equal to it where the longest query and the longest key point the same way."""
    generator = np.random.default_rng(0)
    q, k, v = generator.standard_normal((3, 2, 4, 16, 8)).astype(np.float32)
    q[0, 1] *= 10  # another head's keys must not meet this head's queries
    k[0, 2] *= 10
    if aligned:
        q[0, 1, 3], k[0, 1, 5] = 500, 100
    model = make([Node("Attention", ["q", "k", "v"], ["y"])], dict.fromkeys("qkv", q.shape), {"y": q.shape})
    bound = measure(model, tmp_path, [{"q": q, "k": k, "v": v}]).logits["y"]
    true = float(np.abs(q @ k.swapaxes(-1, -2)).max())
    assert true * 0.9999 <= bound <= (true * 1.0001 if aligned else true * 6)


def test_clipping_is_the_best_of_its_candidates(tmp_path: Path) -> None:
    """An even spread keeps its largest value; one outlier among many is cut off. Held against numpy."""
    generator = np.random.default_rng(1)
    even = generator.uniform(-1, 1, 5000).astype(np.float32)
    heavy = np.concatenate([generator.standard_normal(199_999), [12]]).astype(np.float32)
    zero = np.zeros(8, np.float32)
    inputs = {"even": even, "heavy": heavy, "zero": zero}
    model = make(
        [Node("Concat", list(inputs), ["y"], axis=0)], {n: a.shape for n, a in inputs.items()}, {"y": [205_008]}
    )
    largest = {name: float(np.abs(array).max()) for name, array in inputs.items()}
    chosen = clipping(model, tmp_path, [inputs, inputs], largest)
    for name, array in inputs.items():

        def error(fraction: float, array: np.ndarray = array, most: float = largest[name]) -> float:
            scale = step(most * fraction)
            return float(np.square(array - scale * np.clip(np.rint(array / scale), -128, 127)).sum())

        assert chosen[name] == largest[name] * min(CLIPPINGS, key=error)
    assert chosen["even"] == largest["even"]
    assert chosen["heavy"] <= 0.6 * largest["heavy"]
    assert step(0.0) == step(1e-44) == 1.0


def test_clipping_weighs_calls_alike(tmp_path: Path) -> None:
    """A loud call does not decide alone: many quiet ones, which its scale would drown, outweigh it."""
    generator = np.random.default_rng(2)
    loud = generator.uniform(-1, 1, 4096).astype(np.float32)
    quiet = (generator.standard_normal(4096) / 200).astype(np.float32)
    model = make([Node("Neg", ["x"], ["y"])], {"x": [4096]}, {"y": [4096]})
    alone = clipping(model, tmp_path, [{"x": loud}], {"x": 1.0})["x"]
    both = clipping(model, tmp_path, [{"x": loud}, *[{"x": quiet}] * 40], {"x": 1.0})["x"]
    assert both < 0.7 * alone


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_tensors_are_freed_when_they_were_watched(tmp_path: Path) -> None:
    """Sixty tensors of 8 MB, one after the other: far less than their 480 MB is held."""
    nodes = [Node("Neg", [f"t{i}"], [f"t{i + 1}"]) for i in range(60)]
    model = make(nodes, {"t0": [2 << 20]}, {"t60": [2 << 20]})
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    script = """
import onnx, re, sys
import numpy as np
from pathlib import Path
from sdrt_engines.graph.ranges import clipping, measure
model, calls = onnx.load(sys.argv[1]), [{"t0": np.ones(2 << 20, np.float32)}] * 2
measure(model, Path(), calls)
clipping(model, Path(), calls, {f"t{i}": 1.0 for i in range(60)})
print(int(re.findall(r"VmHWM:[ \t]+([0-9]+)", Path("/proc/self/status").read_text())[0]) // 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model.onnx")], env=environment(), capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert int(done.stdout) < 350  # MB; the libraries are 100 of it


def test_not_a_number_already(tmp_path: Path) -> None:
    """Wherever in the tensor it stands."""
    model = make([Node("Sqrt", ["x"], ["y"])], {"x": [3]}, {"y": [3]})
    for x in ([-1, 0, 1], [0, -1, 1], [1, 0, -1]):
        with pytest.raises(BuildError, match=r"y: NaN already in float32"):
            measure(model, tmp_path, [{"x": np.array(x, np.float32)}])


def test_infinity_is_a_range(tmp_path: Path) -> None:
    model = make([Node("Log", ["x"], ["a"]), Node("Exp", ["a"], ["y"])], {"x": [2]}, {"y": [2]})
    largest = measure(model, tmp_path, [{"x": np.array(x, np.float32)} for x in ([0, 1], [1, 1])]).largest
    assert largest == {"x": 1, "a": np.inf, "y": 1}


def test_graphs_that_do_not_run(tmp_path: Path) -> None:
    """onnxruntime's own exceptions become BuildError."""
    model = make([Node("Relu", ["x"], ["y"])], {"x": [2]}, {"y": [2]})
    with pytest.raises(BuildError, match="cannot run the graph to measure it"):
        measure(model, tmp_path, [{"z": np.ones(2, np.float32)}])
    model.graph.node[0].op_type = "Nonesuch"
    with pytest.raises(BuildError, match="cannot load the graph to measure it"):
        measure(model, tmp_path, [{"x": np.ones(2, np.float32)}])


def test_every_activation_of_a_component(bundle: Path) -> None:
    from sdrt import bundle as bundles
    from sdrt.verify import reference_cases

    model, _, folder = component(bundle, "unet")
    inputs = next(iter(reference_cases(bundles.load(bundle), "unet").values()))[0]
    ranges = measure(model, folder, [inputs])
    types = element_types(model)
    assert set(ranges.largest) == {n for node in model.graph.node for n in node.output if types[n] == 1} | set(inputs)
    assert len(ranges.logits) == 20
    assert ranges.largest["sample"] == np.abs(inputs["sample"]).max()
