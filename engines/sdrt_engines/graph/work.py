"""How much a graph computes: multiply-accumulates and activation elements, counted from shapes alone.

Every node's shapes are inferred in order, at concrete sizes; small values that shapes are made of are computed on the
way. No weight is read. What ``work_of`` solves from a few such counts is exact at all sizes (``sdrt.bundle.Work``).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdrt.bundle import TERMS, TILE, Component, Work, split_dim
from sdrt.errors import BuildError
from sdrt_engines.graph import load_graph

Shape = tuple[int, ...]
Sizes = Mapping[str, int]

COUNTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Attention")
"""Operators whose work is counted. The others move and add numbers: little work beside these."""

REFUSED = (
    "Einsum", "ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "DeformConv", "LSTM", "GRU", "RNN",
    "CausalConvWithState", "LinearAttention",
)  # fmt: skip
"""Operators that multiply matrices in a way that is not counted here: an error, where leaving them out were a lie."""

SAME_SHAPE = ("GroupNormalization",)
"""Operators whose output is as their first input, which onnx's shape inference does not say."""

SMALL = 1024
"""Elements. A larger tensor is no shape, and its values are not computed."""

PICTURES = {1: (64, 64), 2: (64, 128), 3: (192, 64)}
"""Height and width in pixels, by area in tiles."""

TOKENS = (4, 8, 12)
CHECKED = ({"B": 3, "H": 320, "W": 128, "T": 16}, {"B": 5, "H": 192, "W": 448, "T": 11})
"""Sizes at which the solved polynomials must agree with a count. Text encoders take at most 77 tokens."""

_log = logging.getLogger("sdrt")


@dataclass(frozen=True)
class Count:
    """Multiply-accumulates by kind, and activation elements read and written, at one size. As ``sdrt.bundle.Work``."""

    convolution: int = 0
    linear: int = 0
    attention: int = 0
    elements: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))

    def values(self) -> tuple[int, int, int, int]:
        return self.convolution, self.linear, self.attention, self.elements


def count(model: Any, shapes: Mapping[str, Shape]) -> Count:
    """What one run of a ModelProto computes with inputs of these shapes, by name.

    Its weights need not be loaded. BuildError when an operator cannot be counted, or a shape cannot be inferred.
    """
    return _Graph(model).count(shapes)


def shapes(model: Any, inputs: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shapes of a ModelProto's tensors, by name, with inputs of these shapes; of those that can be told.

    BuildError when the graph holds operators that ``count`` refuses.
    """
    told = {name: _shape(kind) for name, kind in _Graph(model).infer(inputs).items()}
    return {name: shape for name, shape in told.items() if shape is not None}


def counted(path: Path, component: Component, name: str) -> Work | None:
    """``work_of`` the graph in a file; where it raises, a warning and None: nothing is worse for want of a figure."""
    try:
        return work_of(load_graph(path), component)
    except Exception as error:  # of a graph that somebody else wrote, any
        _log.warning("%s: its work is not counted: %s", name, getattr(error, "message", None) or repr(error))
        return None


def work_of(model: Any, component: Component) -> Work:
    """The component's work as polynomials, solved from counts at a few sizes and checked at others.

    BuildError as ``count`` raises it, and when the work is no such polynomial, or depends on other symbols than
    B, H and W, T.
    """
    graph = _Graph(model)
    symbols = {split_dim(dim)[0] for spec in component.inputs for dim in spec.shape if isinstance(dim, str)}
    if not symbols <= {"B", "H", "W", "T"} or len(symbols & {"H", "W"}) == 1:
        raise BuildError(f"work is counted for sizes B, H and W, T; the inputs have {', '.join(sorted(symbols))}")

    def counted_at(sizes: Sizes) -> Count:
        return graph.count({spec.name: spec.at(sizes) for spec in component.inputs})

    powers = [p for p in TERMS.values() if all(s in symbols for s, power in zip("BHT", p, strict=True) if power)]
    # As many points as terms, at which only the zero polynomial vanishes: powers as coordinates.
    points = [(1 + b, 1 + a, TOKENS[t]) for b, a, t in powers]
    counts = [counted_at({"B": b, "H": PICTURES[a][0], "W": PICTURES[a][1], "T": t}).values() for b, a, t in points]
    rows = [[b**i * a**j * t**k for i, j, k in powers] for b, a, t in points]
    coefficients = _solve(rows, counts)
    names = {p: term for term, p in TERMS.items()}
    polynomials = []
    for solved in zip(*coefficients, strict=True):
        if any(c < 0 or c.denominator != 1 for c in solved):
            raise BuildError(f"the work is no polynomial in B, A = H·W / {TILE**2} and T with whole coefficients")
        polynomials.append({names[p]: int(c) for p, c in zip(powers, solved, strict=True) if c})
    work = Work(*polynomials)
    for sizes in CHECKED:
        got, told = counted_at(sizes), Count(**work.at(sizes), elements=work.elements_at(sizes))
        if got != told:
            raise BuildError(f"the work at {dict(sizes)} is {got}, the polynomials say {told}")
    return work


def _solve(rows: Sequence[Sequence[int]], values: Sequence[Sequence[int]]) -> list[list[Fraction]]:
    """X of A·X = Y by Gauss and Jordan in fractions; ``rows`` of A (n × n, regular), ``values`` of Y (n × m)."""
    matrix = [[Fraction(x) for x in (*row, *value)] for row, value in zip(rows, values, strict=True)]
    for i in range(len(matrix)):
        pivot = next(k for k in range(i, len(matrix)) if matrix[k][i])
        matrix[i], matrix[pivot] = matrix[pivot], matrix[i]
        matrix[i] = [x / matrix[i][i] for x in matrix[i]]
        for k, row in enumerate(matrix):
            if k != i and row[i]:
                matrix[k] = [x - row[i] * y for x, y in zip(row, matrix[i], strict=True)]
    return [row[len(matrix) :] for row in matrix]


class _Graph:
    """A graph made ready for counts at many sizes."""

    def __init__(self, model: Any) -> None:
        import onnx
        from onnx import helper, numpy_helper

        self._graph = model.graph
        self._opsets = list(model.opset_import)
        version = max((opset.version for opset in self._opsets if not opset.domain), default=0)
        self._nodes: list[tuple[Any, Any]] = []
        self.weights: set[str] = {tensor.name for tensor in self._graph.initializer}
        for node in self._graph.node:
            what = _named(node)
            if node.op_type in REFUSED or any(a.HasField("g") or a.graphs for a in node.attribute):
                raise BuildError(f"{what}: the work of this operator cannot be counted")
            # Of "ai.onnx.ml" there are schemas too, and operators that multiply matrices.
            if node.domain or not onnx.defs.has(node.op_type, version):
                raise BuildError(f"{what}: is no operator of ONNX's own, so that its work cannot be counted")
            self._nodes.append((node, onnx.defs.get_schema(node.op_type, version)))
            if all(name in self.weights for name in node.input if name):
                self.weights.update(node.output)
        self._padded = {node.output[0]: node.input[0] for node, _ in self._nodes if node.op_type == "Pad"}
        self._evaluators: dict[int, Any] = {}
        self._types = {t.name: helper.make_tensor_type_proto(t.data_type, t.dims) for t in self._graph.initializer}
        self._values: dict[str, NDArray[Any]] = {
            tensor.name: numpy_helper.to_array(tensor)
            for tensor in self._graph.initializer
            if not tensor.external_data and math.prod(tensor.dims) <= SMALL
        }

    def count(self, shapes: Mapping[str, Shape]) -> Count:
        types, total = self.infer(shapes), Count()
        for node, _ in self._nodes:
            if node.op_type in COUNTED and not self.weights.issuperset(node.output):
                total += self._count(node, types)
        return total

    # -- shapes --------------------------------------------------------------------------------------------------

    def infer(self, shapes: Mapping[str, Shape]) -> dict[str, Any]:
        """The type (with its shape, where it can be told) of every tensor."""
        from onnx import checker, helper, numpy_helper, shape_inference

        types, values = dict(self._types), dict(self._values)
        for value in self._graph.input:
            if value.name in shapes:
                element = value.type.tensor_type.elem_type
                types[value.name] = helper.make_tensor_type_proto(element, shapes[value.name])
        for index, (node, schema) in enumerate(self._nodes):
            inputs = [name for name in node.input if name]
            if any(name not in types for name in inputs):
                continue  # whoever needs its shape says that it is not known
            known = {name: numpy_helper.from_array(values[name], name) for name in inputs if name in values}
            if node.op_type in SAME_SHAPE:
                made = {node.output[0]: types[inputs[0]]}
            else:
                try:
                    made = shape_inference.infer_node_outputs(
                        schema, node, {name: types[name] for name in inputs}, known, opset_imports=self._opsets
                    )
                except (shape_inference.InferenceError, checker.ValidationError) as error:
                    raise BuildError(f"{_named(node)}: its shapes do not fit: {error}") from None
            types.update(made)
            if node.op_type == "Shape" or len(known) == len(set(inputs)):
                self._evaluate(index, node, types, values)
        return types

    def _evaluate(self, index: int, node: Any, types: dict[str, Any], values: dict[str, NDArray[Any]]) -> None:
        """Compute a node's values where its inputs' are known (of Shape: its input's shape) and they are few."""
        from onnx import helper, numpy_helper
        from onnx.reference import ReferenceEvaluator

        given = {name: values[name] for name in node.input if name in values}
        if node.op_type == "Shape":
            shape = _shape(types.get(node.input[0]))
            if shape is None:
                return
            bounds = {a.name: a.i for a in node.attribute}
            made = [np.array(shape[bounds.get("start", 0) : bounds.get("end")], np.int64)]
        else:
            sizes = [_shape(types.get(name)) for name in node.output if name]
            if any(size is not None and math.prod(size) > SMALL for size in sizes):
                return
            if index not in self._evaluators:
                self._evaluators[index] = ReferenceEvaluator(node)
            made = self._evaluators[index].run(None, given)
        for name, value in zip(node.output, made, strict=True):
            array = np.asarray(value)
            element = helper.np_dtype_to_tensor_dtype(array.dtype)
            types[name] = helper.make_tensor_type_proto(element, array.shape)
            if array.size <= SMALL:
                values[name] = numpy_helper.to_array(numpy_helper.from_array(array, name))

    # -- operators -----------------------------------------------------------------------------------------------

    def _count(self, node: Any, types: Mapping[str, Any]) -> Count:
        def shape(name: str) -> Shape:
            found = _shape(types.get(name))
            if found is None:
                raise BuildError(f"{_named(node)}: the shape of {name!r} cannot be inferred, so it cannot be counted")
            return found

        def elements(name: str) -> int:
            return math.prod(shape(name))

        left, right, result = node.input[0], node.input[1], node.output[0]
        touched = [n for n in (*node.input, *node.output) if n and n not in self.weights]
        moved = sum(elements(self._padded.get(n, n)) for n in touched)  # what padding adds is read from nowhere
        if node.op_type == "Conv":  # each output: a window of the input channels of its group
            return Count(convolution=elements(result) * math.prod(shape(right)[1:]), elements=moved)
        if node.op_type == "ConvTranspose":  # each input: a window of the output channels of its group
            return Count(convolution=elements(left) * math.prod(shape(right)[1:]), elements=moved)
        if node.op_type == "Attention":  # [batch, tokens, heads·size] or [batch, heads, tokens, size]: Q·Kᵀ, then ·V
            if any(node.input[4:6]):
                raise BuildError(f"{_named(node)}: attention over a cache of keys and values cannot be counted")
            keys = shape(right)[-2]
            return Count(attention=(elements(left) + elements(result)) * keys, elements=moved)
        transposed = node.op_type == "Gemm" and any(a.name == "transA" and a.i for a in node.attribute)
        macs = elements(result) * shape(left)[0 if transposed else -1]
        if {left, right} & self.weights:
            return Count(linear=macs, elements=moved)
        return Count(attention=macs, elements=moved)


def _shape(kind: Any) -> Shape | None:
    """The sizes of a TypeProto; None where it has none, or not all of them."""
    if kind is None or not kind.tensor_type.HasField("shape"):
        return None
    dims = kind.tensor_type.shape.dim
    return tuple(d.dim_value for d in dims) if all(d.HasField("dim_value") for d in dims) else None


def _named(node: Any) -> str:
    domain = f"{node.domain}." if node.domain not in ("", "ai.onnx") else ""
    return f"{domain}{node.op_type} {node.name or node.output[0]!r}"
