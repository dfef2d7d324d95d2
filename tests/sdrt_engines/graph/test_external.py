"""Initializers outside the graph's file."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from sdrt_engines.graph.external import INLINE, LARGE, LINE, PAGE, Weights
from tests.sdrt_engines.graph.conftest import Node, component, evaluator, make, saved


def test_round_trip(tmp_path: Path) -> None:
    """What is large goes into the data file, aligned; what is small stays in the graph; scalars stay scalars."""
    shape = (33, LARGE // (4 * 33) + 1)
    generator = np.random.default_rng(0)
    large, other = generator.standard_normal((2, *shape)).astype(np.float32)
    row = generator.standard_normal(shape[1]).astype(np.float32)
    nodes = [
        Node("Add", ["x", "large"], ["a"]),
        Node("Mul", ["a", "scalar"], ["b"]),
        Node("Add", ["b", "row"], ["c"]),
        Node("Sub", ["c", "other"], ["y"]),
    ]
    values = {"large": large, "row": row, "other": other, "scalar": np.float32(3), "unused": large}
    model = make(nodes, {"x": shape}, {"y": shape}, **values)
    path = saved(model, Weights(model, tmp_path), tmp_path / "out")
    held = onnx.load(path, load_external_data=False)
    places = {t.name: {e.key: e.value for e in t.external_data} for t in held.graph.initializer}
    assert set(places) == {"large", "row", "other", "scalar"}
    assert not places["scalar"]
    assert all(int(places[name]["offset"]) % PAGE == 0 for name in ("large", "other"))
    assert int(places["row"]["offset"]) % PAGE > 0
    assert int(places["row"]["offset"]) % LINE == 0
    assert [list(t.dims) for t in held.graph.initializer if t.name == "scalar"] == [[]]
    x = generator.standard_normal(shape).astype(np.float32)
    np.testing.assert_array_equal(evaluator(path, {"x": x})[0], (x + large) * 3 + row - other)
    again = Weights(held, path.parent)
    np.testing.assert_array_equal(again["other"], other)
    assert isinstance(again["other"], np.memmap)


def test_no_data_file_for_small_weights(tmp_path: Path) -> None:
    small = np.ones(INLINE // 4 - 1, np.float32)
    model = make([Node("Add", ["x", "w"], ["y"])], {"x": small.shape}, {"y": small.shape}, w=small)
    assert Weights(model, tmp_path).save(model, tmp_path) == ["model.onnx"]
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_declared_once(tmp_path: Path) -> None:
    model = make([Node("Add", ["x", "w"], ["y"])], {"x": [2]}, {"y": [2]}, w=np.zeros(2, np.float32))
    weights = Weights(model, tmp_path)
    assert weights.constant("c", np.float32(1)) == weights.constant("c", np.float32(2)) == "c"
    assert weights["c"] == 1
    assert [t.name for t in model.graph.initializer] == ["w", "c"]


def test_retype(tmp_path: Path) -> None:
    """From the file, from the graph, and of what was declared; there and back again."""
    large, small = np.linspace(0, 1, INLINE, dtype=np.float32), np.float32([1, 0.1])
    nodes = [Node("Add", ["x", "large"], ["y"]), Node("Add", ["z", "small"], ["s"])]
    model = make(nodes, {"x": [INLINE], "z": [2]}, {"y": [INLINE], "s": [2]}, large=large, small=small)
    path = saved(model, Weights(model, tmp_path), tmp_path / "out")
    model = onnx.load(path, load_external_data=False)
    weights = Weights(model, path.parent)
    weights.declare("made", 1, (2,), lambda: small * 3)
    for name, values in (("large", large), ("small", small), ("made", small * 3)):
        weights.retype(name, 10)
        assert (weights.dtype(name), weights.dims(name)) == (10, values.shape)
        np.testing.assert_array_equal(weights[name], values.astype(np.float16))
        assert weights[name].dtype == np.float16
        weights.retype(name, 1)
        assert weights.dtype(name) == 1
        np.testing.assert_array_equal(weights[name], values.astype(np.float16).astype(np.float32))


def test_one_tensor_in_memory(tmp_path: Path) -> None:
    """Thirty-two megabytes go through, four at a time."""
    count, size = 8, 1 << 20
    model = make(
        [Node("Sum", ["x", *(f"w{i}" for i in range(count))], ["y"])], {"x": [size]}, {"y": [size]},
        **{f"w{i}": np.full(size, i, np.float32) for i in range(count)},
    )  # fmt: skip
    saved(model, Weights(model, tmp_path), tmp_path / "source")
    model = onnx.load(tmp_path / "source" / "model.onnx", load_external_data=False)
    weights = Weights(model, tmp_path / "source")
    for i, node_input in enumerate(list(model.graph.node[0].input)[1:]):
        weights.declare(f"v{i}", 1, (size,), lambda name=node_input: weights[name] + 1)
        model.graph.node[0].input[i + 1] = f"v{i}"
    (tmp_path / "out").mkdir()
    tracemalloc.start()
    weights.save(model, tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 4 * size
    written = onnx.load(tmp_path / "out" / "model.onnx")
    assert [float(numpy_helper.to_array(t)[-1]) for t in written.graph.initializer] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_weights_of_a_bundle(bundle: Path) -> None:
    model, weights, _ = component(bundle, "unet")
    assert "model.conv_in.weight" in weights
    assert weights["model.conv_in.weight"].shape == weights.dims("model.conv_in.weight") == (16, 4, 3, 3)
    assert set(weights.names()) == {t.name for t in model.graph.initializer}
