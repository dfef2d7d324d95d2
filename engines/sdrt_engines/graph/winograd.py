"""3x3 convolutions by Winograd's minimal filtering along the height: half of the multiplications, nothing left out.

F(4,3) computes 4 outputs of a filter of 3 taps from 6 inputs with 6 multiplications, not 12: y = Aᵀ[(Gg) ⊙ (Bᵀd)].
Taken along the height alone, each multiplication becomes a convolution of 1x3, which engines have fast kernels for; Bᵀ
is a depthwise convolution of 6x1 with stride 4, Aᵀ a few sums. In both directions it would save more multiplications,
and lose four more digits.

Winograd, Arithmetic Complexity of Computations (1980); Lavin and Gray, Fast Algorithms for Convolutional Neural
Networks (2016), equations 9 to 13, for F(4,3) with the points 0, 1, -1, 2, -2.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdrt_engines.graph import work
from sdrt_engines.graph.external import Weights

_log = logging.getLogger("sdrt")

FLOAT = 1
"""ONNX's number of float32."""

ROWS, TAPS, POINTS = 4, 3, 6
"""Rows of output that one tile makes, taps of the filter, and rows of input that it takes: ROWS + TAPS - 1."""

OPSET = 15
"""From which on ``Shape`` can be asked for one dimension."""

LEAST = 128
"""Channels in and out. With fewer, the transforms cost what the multiplications save: a U-Net of 64 to 128 channels was
slower by an eighth with all of them rewritten, one of 320 to 1280 faster by a quarter (benchmarks/LOG.md)."""

POSITIONS = 32 * 32
"""Height × width of a picture from which on a filter is used often enough to be kept at twice its size. Of a full-size
U-Net at 512x512 these convolutions save two thirds of what all would, for a seventh of the memory (benchmarks/LOG.md).
"""

BT = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    np.float32,
)
G = np.array(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
    np.float64,
)
AT = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]], np.float32)


def winograd(
    model: Any, weights: Weights, which: str = "all", inputs: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Any]:
    """Rewrite 3x3 convolutions of a float32 ModelProto in place; returns the facts: how many, if any.

    Those of stride 1, padding 1 and constant weights, with at least ``LEAST`` channels on both sides. Any height and
    width. Filters take twice the memory. which: "all"; "large": those whose picture has ``POSITIONS`` or more with
    ``inputs`` of these shapes; "none". Graphs below ``OPSET`` stay as they are.
    """
    if max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0) < OPSET:
        which = "none"
    shapes = _shapes(model, inputs or {}) if which == "large" else None
    nodes: list[Any] = []
    rewritten = 0
    for node in model.graph.node:
        if which != "none" and _gains(node, weights, shapes):
            nodes += _tiled(node, weights)
            rewritten += 1
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return {"winograd": rewritten} if rewritten else {}


def _shapes(model: Any, inputs: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    try:
        return work.shapes(model, inputs)
    except Exception as error:  # of a graph that somebody else wrote, any; it is right as it is
        _log.warning("convolutions are left as they are: %s", getattr(error, "message", None) or repr(error))
        return {}


def _gains(node: Any, weights: Weights, shapes: Mapping[str, tuple[int, ...]] | None) -> bool:
    from onnx.helper import get_attribute_value

    if node.op_type != "Conv" or node.domain not in ("", "ai.onnx") or not all(i in weights for i in node.input[1:]):
        return False
    told = {a.name: get_attribute_value(a) for a in node.attribute}
    plain = (
        told.get("group", 1) == 1
        and told.get("auto_pad", b"NOTSET") == b"NOTSET"
        and set(told.get("strides", [1])) == {1}
        and set(told.get("dilations", [1])) == {1}
        and list(told.get("pads", [])) == [1, 1, 1, 1]
    )
    dims = weights.dims(node.input[1])
    height, width = (POSITIONS, 1) if shapes is None else shapes.get(node.output[0], (0, 0))[-2:]
    return (
        height * width >= POSITIONS
        and plain
        and dims[2:] == (TAPS, TAPS)
        and min(dims[:2]) >= LEAST
        and weights.dtype(node.input[1]) == FLOAT
    )


def _tiled(node: Any, weights: Weights) -> list[Any]:
    """The nodes that take a Conv's place. x: [B,C,H,W]; n = ⌈H/4⌉ tiles; products: POINTS × [B,O,n,W]."""
    from onnx import helper

    x, filters, *bias = node.input
    y = node.output[0]
    outputs, channels = weights.dims(filters)[:2]
    nodes: list[Any] = []

    def add(kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [f"{y}.{name}"], **attributes))
        return f"{y}.{name}"

    products = []
    for point in range(POINTS):
        tap = weights.constant(
            f"winograd.{channels}.{point}",
            np.broadcast_to(BT[point].reshape(1, 1, POINTS, 1), (channels, 1, POINTS, 1)),
        )
        # With 4 rows below, whatever the height, there are as many tiles as begin inside the picture.
        tile = add(
            "Conv", [x, tap], f"tile.{point}", group=channels, kernel_shape=[POINTS, 1], strides=[ROWS, 1],
            pads=[1, 0, ROWS, 0],
        )  # fmt: skip
        row = weights.declare(
            f"{filters}.winograd.{point}",
            FLOAT,
            (outputs, channels, 1, TAPS),
            partial(_transformed, weights, filters, point),
        )
        # The bias goes to the point 1, which Aᵀ adds to every row once.
        inputs = [tile, row, *(bias if point == 1 else [])]
        products.append(add("Conv", inputs, f"product.{point}", kernel_shape=[1, TAPS], pads=[0, 1, 0, 1]))

    # Aᵀ, by what its rows share: sums and differences of the points 1, -1 and of 2, -2.
    near, far = (add("Add", [products[i], products[i + 1]], f"sum.{i}") for i in (1, 3))
    tilt, steep = (add("Sub", [products[i], products[i + 1]], f"difference.{i}") for i in (1, 3))
    scaled = {
        (name, factor): add(
            "Mul", [name, weights.constant(f"winograd.{factor}", np.float32(factor))], f"{end}.{factor}"
        )
        for name, factor, end in ((far, 4, "far"), (steep, 2, "steep"), (steep, 8, "steep"))
    }
    rows = [
        add("Add", [add("Add", [near, far], "both"), products[0]], "row.0"),
        add("Add", [tilt, scaled[steep, 2]], "row.1"),
        add("Add", [near, scaled[far, 4]], "row.2"),
        add("Add", [add("Add", [tilt, scaled[steep, 8]], "odd"), products[5]], "row.3"),
    ]
    axis = weights.constant("winograd.axis", np.array([3], np.int64))
    tiles = add("Concat", [add("Unsqueeze", [r, axis], f"{i}.unsqueezed") for i, r in enumerate(rows)], "tiles", axis=3)
    taller = weights.constant("winograd.taller", np.array([1, 1, ROWS, 1], np.int64))
    shape = add("Mul", [add("Shape", [products[0]], "tiles.shape"), taller], "shape")
    whole = add("Reshape", [tiles, shape], "whole")
    zero, height = (weights.constant(f"winograd.{n}", np.array([i], np.int64)) for n, i in (("zero", 0), ("height", 2)))
    rows_there = add("Shape", [x], "height", start=2, end=3)
    nodes.append(helper.make_node("Slice", [whole, zero, rows_there, height], [y]))
    return nodes


def _transformed(weights: Weights, filters: str, point: int) -> NDArray[Any]:
    """f32[O,C,1,3]: what the filters f32[O,C,3,3] are at one point."""
    rows: NDArray[Any] = np.einsum("k,oikw->oiw", G[point], weights[filters])
    return rows[:, :, None].astype(np.float32)
