"""int8 and float8, in the form that every engine reads: QuantizeLinear and DequantizeLinear of ONNX's own domain.

Weights are of eight bits with one scale an output channel; activations, where they are quantised, with one scale a
tensor. Zero points are 0, as TensorRT wants it. What the residual sums carry stays float: only what a convolution or a
matrix product reads is quantised, once a tensor, however many nodes read it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdrt.errors import BuildError
from sdrt_engines.graph.external import Weights
from sdrt_engines.graph.ranges import element_types, step

FLOAT = 1
"""ONNX's number of float32."""


@dataclass(frozen=True)
class Grid:
    """A type of eight bits: ONNX's number, its name in the graph, the largest magnitude that is used of it."""

    kind: int
    name: str
    levels: int


INT8 = Grid(3, "int8", 127)
FLOAT8 = Grid(17, "float8", 448)
"""E4M3 without infinities: 4 bits of exponent, 3 of mantissa."""

SCHEME = "symmetric, zero point 0; weights: one scale an output channel"
"""For the artifact's facts."""

SMALL = 256
"""Elements. A smaller weight stays float: its scales and its node cost what it saves."""


@dataclass(frozen=True)
class Target:
    """A node that multiplies an activation by a constant weight. ``axis``: the weight's output channels.

    ``keep``: why int8 leaves it float, or "" (decibels: a tiny U-Net over recorded inputs, benchmarks/LOG.md):

    first, last: the convolution next to a picture-shaped input or output of the graph. Little work, and nothing comes
    after, or before, that could make up for it: 46 dB with either of them alone in int8.
    stream: a 1x1 convolution of what the residual sums carry (ResNet shortcuts, the way out of a transformer). Little
    work, and rounding it is rounding the stream itself (41.9 dB for all others with them, 47.3 dB without).
    rows: one row a picture, as the time embedding is. No work worth saving; its rounding was not seen (75 dB alone).
    """

    node: Any
    activation: str
    weight: str
    axis: int
    keep: str = ""


def targets(model: Any, weights: Weights) -> list[Target]:
    """Every Conv, MatMul and Gemm with a constant float weight that is worth it, in the graph's order."""
    makers = {name: node for node in model.graph.node for name in node.output}
    ends = _ends(model, weights, makers)
    found = []
    for node in model.graph.node:
        axis = _output_axis(node, weights)
        if axis is None:
            continue
        if node.op_type == "Gemm":
            keep = "rows"
        elif node.output[0] in ends:
            keep = ends[node.output[0]]
        else:
            keep = "stream" if _is_pointwise(node, weights) and _reads_stream(node, makers) else ""
        found.append(Target(node, node.input[0], node.input[1], axis, keep))
    return found


def _is_pointwise(node: Any, weights: Weights) -> bool:
    return node.op_type == "Conv" and set(weights.dims(node.input[1])[2:]) == {1}


def _reads_stream(node: Any, makers: Mapping[str, Any]) -> bool:
    """Whether the node reads a sum, what was joined to it, or a convolution: anything but a norm or an activation."""
    maker = makers.get(node.input[0])
    while maker is not None and maker.op_type in ("Reshape", "Transpose", "Resize"):
        maker = makers.get(maker.input[0])
    return maker is not None and maker.op_type in ("Add", "Concat", "Conv")


def _output_axis(node: Any, weights: Weights) -> int | None:
    """The axis of the weight's output channels; None when the node is no target."""
    if node.op_type not in ("Conv", "MatMul", "Gemm") or node.domain not in ("", "ai.onnx"):
        return None
    activation, weight = node.input[:2]
    if activation in weights or weight not in weights or weights.dtype(weight) != FLOAT:
        return None
    dims = weights.dims(weight)
    # A stack of matrices has no one axis of output channels.
    if int(np.prod(dims)) < SMALL or len(dims) < 2 or (node.op_type == "MatMul" and len(dims) > 2):
        return None
    rows = node.op_type == "Conv" or any(a.name == "transB" and a.i for a in node.attribute)
    return 0 if rows else 1


def _ends(model: Any, weights: Weights, makers: Mapping[str, Any]) -> dict[str, str]:
    """The targets next to picture-shaped inputs and outputs: their output's name → first or last."""
    types = element_types(model)
    readers: dict[str, list[Any]] = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            readers[name].append(node)

    def walk(values: Any, next_nodes: Callable[[str], list[Any]], side: str) -> Iterable[str]:
        waiting = [v.name for v in values if len(v.type.tensor_type.shape.dim) == 4]
        seen = set(waiting)
        while waiting:
            for node in next_nodes(waiting.pop()):
                if _output_axis(node, weights) is not None:
                    yield node.output[0]
                    continue
                if node.op_type == "Conv" and not _is_pointwise(node, weights):
                    continue  # small, and float for that; a VAE's 1x1 convolutions over latents are passed through
                more = {name for name in getattr(node, side) if types.get(name) == FLOAT and name not in weights}
                waiting += more - seen
                seen |= more

    def before(name: str) -> list[Any]:
        return [makers[name]] if name in makers else []

    found = dict.fromkeys(walk(model.graph.output, before, "input"), "last")
    return found | dict.fromkeys(walk(model.graph.input, lambda name: readers[name], "output"), "first")


def weights_to_int8(model: Any, weights: Weights) -> dict[str, Any]:
    """Weights in int8, compute in float32. In place; returns the facts: how many nodes, by operator.

    Embeddings too: rows are gathered in int8, then scaled, by columns.
    """
    rewriting = _Rewriting(model, weights)
    found = targets(model, weights)
    for target in found:
        rewriting.weight(target)
    embeddings = [node for node in model.graph.node if _is_embedding(node, weights)]
    for node in embeddings:
        rewriting.embedding(node)
    rewriting.finish()
    return {"quantized": _by_operator([target.node for target in found] + embeddings), "scheme": SCHEME}


def to_int8(
    model: Any, weights: Weights, clips: Mapping[str, float], *, infinite: Container[str] = (), keep: bool = True,
    weight_bits: int = 8,
) -> dict[str, Any]:  # fmt: skip
    """Weights and activations in int8. In place; returns the facts: how many nodes, by operator, and what stayed float.

    clips: the clipping value of each activation that a target reads; what reads others stays float. infinite: which of
    those others have values but no scale. keep: leave float what ``Target.keep`` says. weight_bits: how many of int8's
    bits weights use: with 7, a sum of two products fits in 16 bits. Embeddings are as in ``weights_to_int8``: nothing
    is computed in them.
    """
    rewriting = _Rewriting(model, weights)
    chosen, kept = _quantized(rewriting, targets(model, weights), clips, infinite, keep, weight_bits)
    embeddings = [node for node in model.graph.node if _is_embedding(node, weights)]
    for node in embeddings:
        rewriting.embedding(node)
    rewriting.finish()
    return {
        "quantized": _by_operator(chosen + embeddings),
        "kept_float": dict(sorted(Counter(kept).items())),
        "weight_bits": weight_bits,
        "scheme": f"{SCHEME}; activations: one scale a tensor",
    }


def to_float8(
    model: Any, weights: Weights, largest: Mapping[str, float], *, infinite: Container[str] = ()
) -> dict[str, Any]:
    """Weights and activations in float8. In place; returns the facts, as ``to_int8`` does.

    largest: the largest magnitude of each activation that a target reads: floats of eight bits need no clipping for the
    sake of small values. Embeddings stay float.
    """
    rewriting = _Rewriting(model, weights, FLOAT8)
    chosen, kept = _quantized(rewriting, targets(model, weights), largest, infinite, True, 8)
    rewriting.finish()
    return {
        "quantized": _by_operator(chosen), "kept_float": dict(sorted(Counter(kept).items())),
        "scheme": "float8 E4M3, up to 448; weights: one scale an output channel; activations: one scale a tensor",
    }  # fmt: skip


def _quantized(
    rewriting: _Rewriting, found: Iterable[Target], clips: Mapping[str, float], infinite: Container[str], keep: bool,
    weight_bits: int,
) -> tuple[list[Any], list[str]]:  # fmt: skip
    """The nodes that compute in eight bits now, and why others do not."""
    chosen: list[Any] = []
    kept: list[str] = []
    for target in found:
        why = target.keep if keep else ""
        if not why and target.activation not in clips:
            why = "infinite" if target.activation in infinite else "unknown type"
        if why:
            kept.append(f"{target.node.op_type}: {why}")
            continue
        chosen.append(target.node)
        rewriting.weight(target, weight_bits)
        rewriting.activation(target, clips[target.activation])
    return chosen, kept


def _by_operator(nodes: Iterable[Any]) -> dict[str, int]:
    return dict(sorted(Counter(node.op_type for node in nodes).items()))


def _is_embedding(node: Any, weights: Weights) -> bool:
    if node.op_type != "Gather" or node.input[0] not in weights:
        return False
    if any(a.name == "axis" and a.i for a in node.attribute):
        return False
    dims = weights.dims(node.input[0])
    return weights.dtype(node.input[0]) == FLOAT and len(dims) == 2 and int(np.prod(dims)) >= SMALL


class _Rewriting:
    """Nodes to be added to a graph, each once and behind what it reads."""

    def __init__(self, model: Any, weights: Weights, grid: Grid = INT8) -> None:
        self._graph = model.graph
        self._weights = weights
        self._grid = grid
        self._behind: dict[str, list[Any]] = defaultdict(list)  # by the tensor that they read; "": by none
        self._done: set[str] = set()

    def weight(self, target: Target, bits: int = 8) -> None:
        """Let the target read its weight through DequantizeLinear."""
        from onnx import helper

        name = f"{target.weight}.dequantized.{target.axis}"
        if name not in self._done:
            self._done.add(name)
            pair = self._stored(target.weight, target.axis, bits)
            self._behind[""].append(helper.make_node("DequantizeLinear", pair, [name], axis=target.axis))
        target.node.input[1] = name

    def embedding(self, node: Any) -> None:
        """Gather rows in int8, then scale them by columns."""
        from onnx import helper

        y = node.output[0]
        table, scales = self._stored(node.input[0], 1)
        node.input[0], node.output[0] = table, f"{y}.int8"
        self._behind[node.output[0]].append(helper.make_node("DequantizeLinear", [f"{y}.int8", scales], [y], axis=-1))

    def activation(self, target: Target, clip: float) -> None:
        """Let the target read its activation through QuantizeLinear and DequantizeLinear."""
        from onnx import helper

        x = target.activation
        if x not in self._done:
            self._done.add(x)
            grid, kind = self._grid, helper.tensor_dtype_to_np_dtype(self._grid.kind)
            scale = self._weights.constant(f"{x}.{grid.name}.scale", np.float32(step(clip, grid.levels)))
            zero = self._weights.declare(f"{grid.name}.zero", grid.kind, (), lambda: np.zeros((), kind))
            self._behind[x] += [
                helper.make_node("QuantizeLinear", [x, scale, zero], [f"{x}.{grid.name}"]),
                helper.make_node("DequantizeLinear", [f"{x}.{grid.name}", scale, zero], [f"{x}.dequantized"]),
            ]
        target.node.input[0] = f"{x}.dequantized"

    def finish(self) -> None:
        nodes = list(self._behind[""])
        for value in self._graph.input:
            nodes += self._behind[value.name]
        for node in self._graph.node:
            nodes.append(node)
            for name in node.output:
                nodes += self._behind[name] if name else []
        del self._graph.node[:]
        self._graph.node.extend(nodes)

    def _stored(self, name: str, axis: int, bits: int = 8) -> tuple[str, str]:
        """Names of a float weight's values in eight bits and of their float32 scales, one an index of ``axis``."""
        from onnx.helper import tensor_dtype_to_np_dtype

        grid, values = self._grid, self._weights[name]
        levels = grid.levels >> (8 - bits)  # of integers with fewer bits
        others = tuple(i for i in range(values.ndim) if i != axis)
        most = np.maximum(values.max(others), -values.min(others))
        if not np.isfinite(most).all():
            raise BuildError(f"{name}: the weight holds NaN or infinity", "export the checkpoint again, or mend it")
        scales = np.array([step(float(largest), levels) for largest in most], np.float32)
        column = scales.reshape([-1 if i == axis else 1 for i in range(values.ndim)])

        def make() -> NDArray[Any]:
            scaled = np.clip(self._weights[name] / column, -levels, levels)
            return (np.rint(scaled) if grid is INT8 else scaled).astype(tensor_dtype_to_np_dtype(grid.kind))

        return (
            self._weights.declare(f"{name}.{grid.name}.{axis}", grid.kind, values.shape, make),
            self._weights.constant(f"{name}.{grid.name}.{axis}.scale", scales),
        )
