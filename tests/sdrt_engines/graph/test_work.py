"""Counted work: each operator by hand, whole networks against torch's own counter, and what cannot be counted."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sdrt import bundle as bundles
from sdrt.bundle import Artifact, Component, File, TensorSpec, Work
from sdrt.errors import BuildError
from sdrt_engines.build import build
from sdrt_engines.graph import load_graph
from sdrt_engines.graph.work import Count, count, counted, work_of
from sdrt_export import families
from tests.conftest import Model
from tests.sdrt_engines.graph.conftest import Node, make

# -- one layer of each kind, by hand ----------------------------------------------------------------------------------


def ones(*shape: int) -> Any:
    return np.ones(shape, np.float32)


X = {"x": (2, 6, 10, 14)}


@pytest.mark.parametrize(
    ("nodes", "shapes", "weights", "expected"),
    [
        pytest.param(  # 5 outputs of 6·3·3 numbers each, at 5 × 7 places of 2 pictures
            [Node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1], strides=[2, 2])], X, {"w": ones(5, 6, 3, 3)},
            Count(convolution=2 * 5 * 7 * 5 * 6 * 9, elements=2 * 6 * 10 * 14 + 2 * 5 * 5 * 7), id="convolution",
        ),
        pytest.param(  # each output sees 2 of the 6 input channels
            [Node("Conv", ["x", "w", "b"], ["y"], group=3, dilations=[2, 2])], X, {"w": ones(9, 2, 3, 1), "b": ones(9)},
            Count(convolution=2 * 6 * 14 * 9 * 2 * 3, elements=2 * 6 * 10 * 14 + 2 * 9 * 6 * 14), id="grouped",
        ),
        pytest.param(  # each input is added to 4·2·2 places
            [Node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2])], X, {"w": ones(6, 4, 2, 2)},
            Count(convolution=2 * 6 * 10 * 14 * 4 * 4, elements=2 * 6 * 10 * 14 + 2 * 4 * 20 * 28), id="transposed",
        ),
        pytest.param(  # what Pad adds is not read; the padded picture gives 11 - 3 + 1 rows
            [Node("Pad", ["x", "p"], ["z"]), Node("Conv", ["z", "w"], ["y"])], X,
            {"w": ones(5, 6, 3, 3), "p": np.array([0, 0, 0, 0, 0, 0, 1, 1])},
            Count(convolution=2 * 9 * 13 * 5 * 6 * 9, elements=2 * 6 * 10 * 14 + 2 * 5 * 9 * 13), id="padded",
        ),
        pytest.param(
            [Node("MatMul", ["x", "w"], ["y"])], {"x": (3, 7, 8)}, {"w": ones(8, 5)},
            Count(linear=3 * 7 * 8 * 5, elements=3 * 7 * 8 + 3 * 7 * 5), id="linear",
        ),
        pytest.param(
            [Node("Gemm", ["x", "w", "b"], ["y"], transA=1, transB=1)], {"x": (8, 3)}, {"w": ones(5, 8), "b": ones(5)},
            Count(linear=3 * 8 * 5, elements=3 * 8 + 3 * 5), id="gemm",
        ),
        pytest.param(
            [Node("MatMul", ["x", "k"], ["y"])], {"x": (2, 3, 7, 8), "k": (2, 3, 8, 9)}, {},
            Count(attention=2 * 3 * 7 * 8 * 9, elements=2 * 3 * (7 * 8 + 8 * 9 + 7 * 9)), id="both computed",
        ),
        pytest.param(  # an int8 weight on its way is a weight all the same
            [
                Node("Cast", ["w", ], ["c"], to=6), Node("Transpose", ["c"], ["t"]),
                Node("DequantizeLinear", ["t", "s"], ["d"]), Node("MatMul", ["x", "d"], ["y"]),
            ],
            {"x": (7, 8)}, {"w": np.ones((5, 8), np.int8), "s": np.float32(0.1)},
            Count(linear=7 * 8 * 5, elements=7 * 8 + 7 * 5), id="weight through other nodes",
        ),
        pytest.param(  # [batch, heads, tokens, size]: Q·Kᵀ is 7 × 9 × 8, ·V is 7 × 9 × 6, for each head
            [Node("Attention", ["x", "k", "v"], ["y"])], {"x": (2, 3, 7, 8), "k": (2, 3, 9, 8), "v": (2, 3, 9, 6)}, {},
            Count(attention=2 * 3 * 7 * 9 * (8 + 6), elements=2 * 3 * (7 * 8 + 9 * 8 + 9 * 6 + 7 * 6)), id="attention",
        ),
        pytest.param(  # [batch, tokens, heads · size]; a causal mask spares nothing
            [Node("Attention", ["x", "k", "v"], ["y"], q_num_heads=3, kv_num_heads=3, is_causal=1)],
            {"x": (2, 7, 24), "k": (2, 7, 24), "v": (2, 7, 18)}, {},
            Count(attention=2 * 3 * 7 * 7 * (8 + 6), elements=2 * 3 * 7 * (8 + 8 + 6 + 6)), id="attention of rank 3",
        ),
        pytest.param(  # four heads of queries over two of keys and values
            [Node("Attention", ["x", "k", "v"], ["y"])], {"x": (1, 4, 7, 8), "k": (1, 2, 9, 8), "v": (1, 2, 9, 8)}, {},
            Count(attention=4 * 7 * 9 * 16, elements=2 * 4 * 7 * 8 + 2 * 2 * 9 * 8), id="grouped queries",
        ),
        pytest.param(  # shapes that are computed: rows of 2
            [
                Node("Shape", ["x"], ["a"], start=0, end=1), Node("Concat", ["a", "m", "f", "f"], ["s"], axis=0),
                Node("Reshape", ["x", "s"], ["r"]), Node("MatMul", ["r", "w"], ["y"]),
            ],
            {"x": (2, 6, 10, 14)}, {"m": np.array([-1]), "f": np.array([2]), "w": ones(2, 5)},
            Count(linear=2 * 6 * 10 * 14 * 5, elements=2 * 6 * 10 * 14 + 6 * 10 * 14 * 5), id="computed shape",
        ),
        pytest.param([Node("Relu", ["x"], ["y"])], X, {}, Count(), id="no product"),
    ],
)  # fmt: skip
def test_operators(nodes: list[Any], shapes: dict[str, Any], weights: dict[str, Any], expected: Count) -> None:
    rank = {name: [f"{name}{i}" for i in range(len(shape))] for name, shape in shapes.items()}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, dims) for name, dims in rank.items()],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    assert count(model, shapes) == expected


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([Node("Einsum", ["x", "x"], ["y"], equation="ij,kj->ik")], "Einsum 'y': the work of this operator"),
        ([Node("Unique", ["x"], ["n"], axis=0), Node("Gemm", ["x", "n"], ["y"], transB=1)], "Gemm 'y': the shape of 'n' cannot be"),
        ([Node("NonZero", ["x"], ["n"]), Node("MatMul", ["n", "x"], ["y"])], "MatMul 'y': its shapes do not fit: "),
        ([Node("MatMul", ["x", "x"], ["y"])], "MatMul 'y': its shapes do not fit: "),
        ([Node("FusedMatMul", ["x", "x"], ["y"], domain="com.microsoft")], "com.microsoft.FusedMatMul 'y': is no operator"),
        ([Node("LinearRegressor", ["x"], ["y"], domain="ai.onnx.ml")], "ai.onnx.ml.LinearRegressor 'y': is no operator"),
        ([Node("LinearAttention", ["x", "x", "x"], ["y"])], "LinearAttention 'y': the work of this operator"),
        (
            [Node("If", ["x"], ["y"], then_branch=helper.make_graph([], "a", [], []), else_branch=helper.make_graph([], "b", [], []))],
            "If 'y': the work of this operator cannot be counted",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_counted(nodes: list[Any], said: str) -> None:
    """An error, which names the node; never a silent 0."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [value("x", onnx.TensorProto.FLOAT, ["N", "M"])], [value("y", onnx.TensorProto.FLOAT, None)]
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("ai.onnx.ml", 3)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    with pytest.raises(BuildError) as caught:
        count(model, {"x": (3, 4)})
    assert said in caught.value.message


# -- whole networks ---------------------------------------------------------------------------------------------------

KINDS = {"convolution": "convolution", "mm": "linear", "addmm": "linear", "bmm": "attention", "baddbmm": "attention"}
"""What torch calls on the meta device, where attention is the mathematical definition: two products of matrices."""


def torch_count(family: str, name: str, config: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, int]:
    """MACs by kind as torch.utils.flop_counter counts them on the real network."""
    with torch.device("meta"):
        network = families.load(family).network(name, dict(config)).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        network(*inputs.values())
    macs = dict.fromkeys(("convolution", "linear", "attention"), 0)
    for operator, flops in counter.get_flop_counts()["Global"].items():
        macs[KINDS[str(operator).removeprefix("aten.")]] += flops // 2
    return macs


SIZES = ({"B": 1, "H": 64, "W": 64, "T": 77}, {"B": 3, "H": 512, "W": 320, "T": 50})
ODD = {"B": 2, "H": 72, "W": 136, "T": 9}


@pytest.mark.parametrize("name", ["tiny-sd", "sd2", "sdxl"])
def test_torch_counts_the_same(models: Callable[[str], Model], name: str) -> None:
    """Every component of every family, number for number: by its polynomials, and counted at an uneven size."""
    model = models(name)
    held = bundles.load(model.bundle)
    for part, component in held.manifest.components.items():
        folder = "vae" if part.startswith("vae") else part
        config = json.loads((model.checkpoint / folder / "config.json").read_text())
        graph = load_graph(held.path(component.artifact.files[0].path))
        work = work_of(graph, component)
        for sizes in (*SIZES, ODD):
            shapes = {spec.name: spec.at(sizes) for spec in component.inputs}
            dtypes = {"i64": torch.int64, "f32": torch.float32}
            inputs = {
                spec.name: torch.empty(shapes[spec.name], dtype=dtypes[spec.dtype], device="meta")
                for spec in component.inputs
            }
            expected = torch_count(held.manifest.family, part, config, inputs)
            got = count(graph, shapes)
            assert {kind: getattr(got, kind) for kind in expected} == expected, (part, sizes)
            if sizes is not ODD:
                assert work.at(sizes) == expected, (part, sizes)
                assert work.elements_at(sizes) == got.elements > 0
        assert sum(work.at(SIZES[0]).values()) > 0


def test_export_writes_it_and_build_keeps_it(bundle: Path, ort_bundle: Path, tmp_path: Path) -> None:
    """The engine's own graph, whatever it looks like, does the work of the graph that it was built from."""
    exported = bundles.load(bundle).manifest.components
    for made in (ort_bundle, build(bundle, tmp_path / "null", "null").root):
        components = bundles.load(made).manifest.components
        assert {name: c.work for name, c in components.items()} == {name: c.work for name, c in exported.items()}
    assert all(c.work is not None for c in exported.values())


def test_build_counts_what_has_none(copied: Path, tmp_path: Path) -> None:
    """A bundle of an older version."""
    manifest = json.loads((copied / "sdrt.json").read_text())
    expected = {name: c.pop("work") for name, c in manifest["components"].items()}
    (copied / "sdrt.json").write_text(json.dumps(manifest))
    build(copied, tmp_path / "out", "null")
    built = json.loads((tmp_path / "out" / "sdrt.json").read_text())
    assert {name: c["work"] for name, c in built["components"].items()} == expected


# -- polynomials ------------------------------------------------------------------------------------------------------


def component(**inputs: tuple[Any, ...]) -> Component:
    specs = tuple(TensorSpec(name, "f32", shape) for name, shape in inputs.items())
    return Component(specs, (TensorSpec("y", "f32", (1,)),), Artifact("onnx", "fp32", (File("x/model.onnx", 1, None),)))


def test_terms_of_every_kind() -> None:
    """A product that is there once for all pictures beside one a picture; attention of picture over tokens."""
    nodes = [
        Node("MatMul", ["t", "w"], ["u"]), Node("Conv", ["x", "c"], ["z"]), Node("Reshape", ["z", "s"], ["f"]),
        Node("MatMul", ["k", "f"], ["y"]),
    ]  # fmt: skip
    inputs = {"t": [1, 4], "x": ["B", 3, "H/8", "W/8"], "k": ["B", "T", 5]}
    model = make(
        nodes, inputs, {"y": [None] * 3, "u": [1, 6]}, w=ones(4, 6), c=ones(5, 3, 1, 1), s=np.array([0, 0, -1])
    )
    work = work_of(model, component(**{name: tuple(shape) for name, shape in inputs.items()}))
    assert work == Work(
        convolution={"B*A": 64 * 15},
        linear={"1": 24},
        attention={"B*A*T": 64 * 5},
        elements={"1": 10, "B*T": 5, "B*A": 64 * (3 + 5 + 5), "B*A*T": 64},
    )


@pytest.mark.parametrize(
    ("shape", "nodes", "said"),
    [
        (("B", 4, "H/8", "S"), [Node("Relu", ["x"], ["y"])], "the inputs have B, H, S"),
        (("B", 4, "H/8", 8), [Node("Relu", ["x"], ["y"])], "the inputs have B, H"),
        # A convolution without padding: of each row one place is lost.
        (("B", 4, "H/8", "W/8"), [Node("Conv", ["x", "w"], ["y"])], "no polynomial in B, A = H·W / 4096 and T"),
        # At the sizes that are solved from, all is rounded up to 1; at the others it is not.
        (("B", 4, "H/192", "W/192"), [Node("Conv", ["x", "w"], ["y"], pads=[1] * 4)], "the polynomials say"),
    ],
)  # fmt: skip
def test_no_polynomial(shape: tuple[Any, ...], nodes: list[Any], said: str) -> None:
    model = make(nodes, {"x": list(shape)}, {"y": [None] * 4}, w=ones(5, 4, 3, 3))
    with pytest.raises(BuildError) as caught:
        work_of(model, component(x=shape))
    assert said in caught.value.message


def test_no_figure_is_worth_a_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Export and build go on, and say it."""
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\xff" * 99)
    with caplog.at_level(logging.WARNING, "sdrt"):
        assert counted(path, component(x=("B",)), "unet") is None
    assert "unet: its work is not counted: " in caplog.text
