"""Weights stored in float16, computed in float32."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from sdrt import bundle as bundles
from sdrt.engine import BuildOptions, OpenOptions, Samples, open_session
from sdrt.verify import reference_cases
from sdrt_engines import onnxruntime
from sdrt_engines.build import build
from sdrt_engines.graph import load_graph
from sdrt_engines.graph.external import Weights
from sdrt_engines.graph.storage import SMALL, float32_graph, is_exact, narrow, widen
from sdrt_engines.graph.work import work_of
from tests.sdrt_engines.graph.conftest import Node, component, evaluator, make, operators, runtime, saved

GENERATOR = np.random.default_rng(0)


def rounded(*shape: int) -> Any:
    """Float32 that float16 holds, numbers below its normal ones among them."""
    return GENERATOR.standard_normal(shape).astype(np.float16).astype(np.float32) * np.float32(2.0**-10)


def exact(*shape: int) -> Any:
    return rounded(*shape).astype(np.float16).astype(np.float32)


@pytest.mark.parametrize(
    ("values", "held"),
    [
        ([0.5, -0.0, 65504.0, 2.0**-24, np.inf], True),
        ([0.1], False),
        ([65536.0], False),
        ([2.0**-25], False),
        ([1e-30], False),
        ([np.nan], False),
        ([1.0] * 5000 + [1.0 + 2.0**-11], False),
        ([], True),
    ],
)
def test_is_exact(values: list[float], held: bool) -> None:
    assert is_exact(np.array(values, np.float32)) is held


def network() -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Weights of every fate: stored in float16, inexact, small, read twice, of integers, an output of the graph."""
    size = SMALL
    weights = {
        "w": exact(4, size), "twice": exact(size), "inexact": rounded(size) + np.float32(0.1), "small": exact(size - 1),
        "axes": np.arange(size), "out": exact(size),
    }  # fmt: skip
    nodes = [
        Node("MatMul", ["x", "w"], ["a"]),
        Node("Add", ["a", "twice"], ["b"]),
        Node("Mul", ["b", "twice"], ["c"]),
        Node("Add", ["c", "inexact"], ["d"]),
        Node("Gather", ["d", "axes"], ["e"], axis=1),
        Node("Add", ["e", "out"], ["y"]),
        Node("Concat", ["small", "small"], ["z"], axis=0),
    ]
    outputs = {"y": [3, size], "z": [2 * (size - 1)], "out": [size]}
    return make(nodes, {"x": [3, 4]}, outputs, **weights), weights


def test_narrow(tmp_path: Path) -> None:
    model, values = network()
    plain = saved(model, Weights(model, tmp_path), tmp_path / "plain")
    model = onnx.load(plain, load_external_data=False)
    weights = Weights(model, plain.parent)
    narrow(model, weights)
    path = saved(model, weights, tmp_path / "narrow")
    stored = {t.name: t.data_type for t in onnx.load(path).graph.initializer}
    assert stored == {name: TensorProto.FLOAT for name in values} | {
        "w": TensorProto.FLOAT16, "twice": TensorProto.FLOAT16, "axes": TensorProto.INT64
    }  # fmt: skip
    assert len(operators(model, "Cast")) == 2
    x = {"x": GENERATOR.standard_normal((3, 4)).astype(np.float32)}
    for run in (evaluator, runtime):
        for expected, got in zip(run(plain, x), run(path, x), strict=True):
            np.testing.assert_array_equal(expected, got)


def test_widen_undoes_narrow(bundle: Path, tmp_path: Path) -> None:
    """A network whose weights are rounded: the same file, to the byte, whether it was narrow in between or not."""
    model, weights, _ = component(bundle, "unet")
    round_weights(weights)
    plain = saved(model, weights, tmp_path / "plain")
    model = onnx.load(plain, load_external_data=False)
    weights = Weights(model, plain.parent)
    narrow(model, weights)
    path = saved(model, weights, tmp_path / "narrow")
    assert len(operators(model, "Cast")) > 50
    model = onnx.load(path, load_external_data=False)
    weights = Weights(model, path.parent)
    widen(model, weights)
    again = saved(model, weights, tmp_path / "again")
    for file in ("model.onnx", "model.onnx.data"):
        assert (again.parent / file).read_bytes() == (plain.parent / file).read_bytes()


def test_only_what_stores_is_widened(tmp_path: Path) -> None:
    """Float16 that something computes with, and casts to another type, are the graph's own."""
    half = exact(SMALL).astype(np.float16)
    nodes = [
        Node("Cast", ["stored"], ["a"], to=TensorProto.FLOAT),
        Node("Cast", ["used"], ["b"], to=TensorProto.FLOAT),
        Node("Cast", ["other"], ["c"], to=TensorProto.INT64),
        Node("Cast", ["shown"], ["y"], to=TensorProto.FLOAT),
        Node("IsNaN", ["used"], ["d"]),
        Node("Where", ["d", "a", "b"], ["z"]),
    ]
    shapes = {"c": np.zeros(SMALL, np.int64), "y": [SMALL], "z": [SMALL]}
    model = make(nodes, {}, shapes, stored=half, used=half, other=half, shown=half)
    weights = Weights(model, tmp_path)
    widen(model, weights)
    assert [node.input[0] for node in operators(model, "Cast")] == ["used", "other", "shown"]
    assert {t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT} == {"stored"}
    saved(model, weights, tmp_path / "out")


# -- bundles --------------------------------------------------------------------------------------------------------

NAMES = ("text_encoder", "vae_decoder")


def stored(bundle: Path, out: Path, store: Callable[[Any, Weights], None]) -> Path:
    """Two components of a bundle, their weights rounded to float16 and ``store``d, without reference vectors."""
    held = bundles.load(bundle)
    components = {}
    for name in NAMES:
        model, weights, _ = component(bundle, name)
        round_weights(weights)
        store(model, weights)
        (out / name).mkdir(parents=True)
        spec, files = held.component(name), weights.save(model, out / name)
        for file in (spec.config, spec.constants):
            if file is not None:
                shutil.copyfile(held.path(file.path), out / file.path)
        artifact = replace(spec.artifact, files=tuple(bundles.record(out, f"{name}/{file}") for file in files))
        components[name] = replace(spec, artifact=artifact, reference=None)
    for copied in held.manifest.files:
        (out / copied.path).parent.mkdir(exist_ok=True)
        shutil.copyfile(held.path(copied.path), out / copied.path)
    bundles.save(out, replace(held.manifest, components=components))
    return out


def round_weights(weights: Weights) -> None:
    for name in weights.names():
        if weights.dtype(name) == TensorProto.FLOAT:
            weights.retype(name, TensorProto.FLOAT16)
            weights.retype(name, TensorProto.FLOAT)


@pytest.fixture(scope="module")
def pair(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same weights, stored in float32 and in float16."""
    root = tmp_path_factory.mktemp("stored")
    return stored(bundle, root / "float", lambda *_: None), stored(bundle, root / "half", narrow)


def test_half_the_size(pair: tuple[Path, Path]) -> None:
    for name in NAMES:
        plain, half = (bundles.load(path).component(name).artifact.files[1].bytes for path in pair)
        assert half < 0.6 * plain  # the tiny network's shortest tensors, and its causal mask, stay float32


@pytest.mark.parametrize("optimization", ["all", "extended", "none"])
def test_the_same_numbers(pair: tuple[Path, Path], bundle: Path, optimization: str) -> None:
    """To the bit: ONNX Runtime sees the same float32 weights, whether it folds the casts or runs them."""
    for name in NAMES:
        inputs = next(iter(reference_cases(bundles.load(bundle), name).values()))[0]
        outputs = []
        for path in pair:
            options = OpenOptions(extra={"optimization": optimization})
            session = open_session(bundles.load(path), name, options=options)
            outputs.append(session.run(**inputs))
            session.close()
        for output, values in outputs[0].items():
            np.testing.assert_array_equal(values, outputs[1][output])


def test_the_same_work(pair: tuple[Path, Path]) -> None:
    for name in NAMES:
        plain, half = (
            work_of(load_graph(path / name / "model.onnx"), bundles.load(path).component(name)) for path in pair
        )
        assert plain == half


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "w8"])
def test_the_same_build(pair: tuple[Path, Path], bundle: Path, tmp_path: Path, precision: Any) -> None:
    """Byte by byte, and nothing is left of what was widened on the way."""
    held = bundles.load(bundle)
    calls = [inputs for inputs, _ in reference_cases(held, "text_encoder").values()]
    options = BuildOptions(precision=precision, samples=lambda: Samples(tuple(calls), {}))
    files = []
    for out, path in zip((tmp_path / "plain", tmp_path / "half"), pair, strict=True):
        out.mkdir()
        artifact = onnxruntime.build(bundles.load(path), "text_encoder", out, options)
        assert [entry.name for entry in out.iterdir()] == ["text_encoder"]
        assert artifact.built_from == bundles.load(path).component("text_encoder").artifact.files[0].sha256
        files.append(artifact.files)
    assert files[0] == files[1]


def test_build_begins_with_such_a_bundle(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The whole command, which holds what it built against what ONNX Runtime computes from the bundle."""
    made = build(pair[1], tmp_path / "out", "onnxruntime", BuildOptions(precision={"vae_decoder": "w8"}))
    precisions = {name: made.component(name).artifact.precision for name in NAMES}
    assert precisions == {"text_encoder": "fp32", "vae_decoder": "w8"}
    assert all("weights" not in made.component(name).artifact.facts for name in NAMES)
    assert bundles.damaged(made) == []


def test_a_plain_graph_stays_where_it_is(bundle: Path, tmp_path: Path) -> None:
    held = bundles.load(bundle)
    _, folder = float32_graph(held, held.component("unet"), tmp_path)
    assert folder == bundle / "unet"
    assert list(tmp_path.iterdir()) == []
