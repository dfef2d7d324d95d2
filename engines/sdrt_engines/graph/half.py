"""float16 or bfloat16 weights and compute, with float32 islands where either overflows or tells nothing any more.

Which nodes stay in float32 is decided by measured ranges (``graph/ranges.py``), by what is known of an operator's
inside, and by what the weights hold; see ``_reasons``. Inputs and outputs of the graph stay float32.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdrt.errors import BuildError
from sdrt_engines.graph.external import Weights
from sdrt_engines.graph.ranges import Ranges, element_types

FLOAT, HALF, BFLOAT = 1, 10, 16
"""ONNX's numbers of float32, float16 and bfloat16."""

_TYPES = {HALF: ("tensor(float16)", "half"), BFLOAT: ("tensor(bfloat16)", "bfloat")}
"""As schemas call them, and as what is converted is called here."""

LARGEST = 65504.0
SMALLEST_NORMAL = 2.0**-14

MARGIN = 4.0
"""How much larger than in calibration an activation may get. Two of float16's thirty binades: a few prompts are
measured, and other prompts, sizes and seeds reach further (benchmarks/LOG.md has how far)."""

_INSIDE = {
    # Sums over a picture or a row: the sum overflows, or stops growing (2048 + 1 is 2048 in float16), long before the
    # mean does, and grows with the picture, which calibration sees at one size. Layer normalisation, and group
    # normalisation since opset 21, are not here: their stash_type says float32 for the sums, whatever the input is.
    "InstanceNormalization": "sums", "MeanVarianceNormalization": "sums", "LpNormalization": "sums",
    "ReduceMean": "sums", "ReduceSum": "sums", "ReduceSumSquare": "sums", "ReduceL1": "sums", "ReduceL2": "sums",
    "ReduceLogSum": "sums", "ReduceLogSumExp": "sums", "ReduceProd": "sums", "CumSum": "sums",
    "GlobalAveragePool": "sums", "Softmax": "sums", "LogSoftmax": "sums",
    # Angles: a timestep of 999 is known to 0.5 rad in float16. What makes the angle is kept, too (see _reasons).
    "Sin": "angles", "Cos": "angles", "Tan": "angles",
}  # fmt: skip

_NORMS = {"GroupNormalization", "InstanceNormalization", "LayerNormalization"}

_SOURCES = {"Cast", "Range", "ConstantOfShape", "Constant", "EyeLike", "RandomNormal", "RandomUniform"}
"""Float32 comes out of them because an attribute or integers say so. (Integers are exact to 2048 only in float16.)"""

_READERS = {"Cast", "Shape", "Size"}
"""They take either type, and nothing of it comes out."""

_MOVERS = {
    "Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape", "Slice", "Split",
    "Squeeze", "Tile", "Transpose", "Unsqueeze",
}  # fmt: skip
"""They compute nothing, so that between two islands they need not leave float32."""


def to_half(
    model: Any, weights: Weights, ranges: Ranges, *, upcast_attention: bool = False, islands: bool = True,
    largest_normed: float = math.inf, kind: int = HALF,
) -> dict[str, Any]:  # fmt: skip
    """Convert a float32 ModelProto in place; returns the facts: what stayed in float32 and why.

    kind: HALF or BFLOAT. bfloat16 reaches as far as float32 does, and no range is asked for. upcast_attention: all
    attention in float32, as a network's config asks for. islands: False converts everything that has a float16 form; it
    is there to show what the islands are for. largest_normed: norms that saw a larger magnitude stay in float32, for
    engines that may not keep a float32 ``stash_type``.
    """
    types = element_types(model)
    _check_types(model, types)
    halves = _Typing(model, types, kind)
    reasons: dict[int, str] = {}
    if islands:
        reasons = _reasons(model, halves, weights, ranges, upcast_attention, largest_normed)
        _join_islands(model, halves, reasons)
        _float_softmax(model, reasons)
    facts = _facts(model, reasons, ranges)
    facts["casts"] = _rewrite(model, halves, weights, reasons)
    del model.graph.value_info[:]  # their types are not true any more
    return facts


def _check_types(model: Any, types: Mapping[str, int]) -> None:
    for node in model.graph.node:
        if any(name and name not in types for name in node.output):
            raise BuildError(
                f"{node.op_type} of {node.domain or 'ONNX'}: element types of its outputs are not known",
                "build this component in fp32",
            )


class _Typing:
    """Which inputs and outputs of each node can be float16 (or bfloat16), by the operator's schema."""

    def __init__(self, model: Any, types: Mapping[str, int], kind: int) -> None:
        self.types = types
        self.kind = kind
        self._versions = {opset.domain: opset.version for opset in model.opset_import}
        self._known: dict[tuple[str, str], Any] = {}

    def is_float(self, name: str) -> bool:
        return bool(name) and self.types.get(name) == FLOAT

    def inputs(self, node: Any) -> list[int]:
        """Indices of the float inputs that take float16 where the node is computed in it."""
        if node.op_type in _READERS or (schema := self._schema(node)) is None:
            return []
        # Resize has room for float16 in its region of interest, of which engines read float32 alone.
        count = 1 if node.op_type == "Resize" else len(node.input)
        formal = schema.inputs
        return [
            i for i, name in enumerate(node.input[:count])
            if self.is_float(name) and self._takes_half(schema, formal[min(i, len(formal) - 1)].type_str)
        ]  # fmt: skip

    def outputs(self, node: Any) -> list[int]:
        """Indices of the outputs that are float16 then: those whose type is that of one of these inputs."""
        schema = self._schema(node)
        if schema is None:
            return []
        if node.op_type == "DequantizeLinear":  # whose output is of its scale's type, which its schema cannot say
            return [0] if 1 in self.inputs(node) and all(a.name != "output_dtype" for a in node.attribute) else []
        formal = schema.inputs
        variables = {formal[min(i, len(formal) - 1)].type_str for i in self.inputs(node)}
        last = len(schema.outputs) - 1
        return [i for i, name in enumerate(node.output) if name and schema.outputs[min(i, last)].type_str in variables]

    def floats(self, node: Any) -> bool:
        """Whether the node is one to decide about: it has a float form and computes in it."""
        return node.op_type not in _SOURCES | _READERS and any(map(self.is_float, (*node.input, *node.output)))

    def stashes(self, node: Any) -> bool:
        """Whether the operator's definition says of what type its sums are."""
        schema = self._schema(node)
        return schema is not None and "stash_type" in schema.attributes

    def _schema(self, node: Any) -> Any:
        """The operator's schema, None when it is not one of ONNX's own."""
        import onnx

        domain = "" if node.domain == "ai.onnx" else node.domain
        key = (domain, node.op_type)
        if key not in self._known:
            try:
                self._known[key] = onnx.defs.get_schema(node.op_type, self._versions.get(domain, 1), domain)
            except onnx.defs.SchemaError:
                self._known[key] = None
        return self._known[key] if domain == "" else None

    def _takes_half(self, schema: Any, type_str: str) -> bool:
        allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
        return _TYPES[self.kind][0] in allowed.get(type_str, ())


def _reasons(
    model: Any, halves: _Typing, weights: Weights, ranges: Ranges, upcast_attention: bool, largest_normed: float
) -> dict[int, str]:
    """Nodes that stay in float32, by index, with the reason:

    operator: it has no float16 form. config: the checkpoint's config asks for it. range: an input or output is, times
    the margin, beyond 65,504. squares: what a norm squares is. logits: Q·Kᵀ is, inside an attention. sums, angles: what
    is inside overflows, or loses its meaning, before inputs and outputs do (``_INSIDE``). weight: a weight is beyond
    65,504, or all of it is denormal in float16 (an epsilon).
    """
    too_large = {name for name, largest in ranges.largest.items() if largest * MARGIN > LARGEST}
    bad_weights = set[str]()
    if halves.kind == HALF:
        bad_weights = {name for name in weights.names() if halves.is_float(name) and _is_lost(weights[name])}
    makers = {name: i for i, node in enumerate(model.graph.node) for name in node.output}
    upcast = _attention(model, makers) if upcast_attention else set()
    if upcast_attention and not upcast:
        raise BuildError(
            "the config asks for attention in float32 (upcast_attention), and none is recognised in the graph: neither"
            " Attention nor MatMul, Softmax, MatMul",
            "build this component in fp32",
        )
    reasons: dict[int, str] = {}
    for i, node in enumerate(model.graph.node):
        if not halves.floats(node):
            continue
        inputs = [node.input[k] for k in halves.inputs(node)]
        inside = ranges.logits.get(node.output[0], 0.0) * MARGIN > LARGEST
        if not inputs or (len(halves.outputs(node)) < sum(map(halves.is_float, node.output))):
            reasons[i] = "operator"
        elif i in upcast:
            reasons[i] = "config"
        elif too_large & {*inputs, *node.output}:
            reasons[i] = "range"
        elif node.op_type in _NORMS and ranges.largest.get(node.input[0], 0.0) > largest_normed:
            reasons[i] = "squares"
        elif inside:
            reasons[i] = "logits"
        elif node.op_type in _INSIDE:
            reasons[i] = _INSIDE[node.op_type]
        elif node.op_type == "GroupNormalization" and not halves.stashes(node):
            reasons[i] = "sums"
        elif bad_weights & set(inputs):
            reasons[i] = "weight"
    angles = [i for i, why in reasons.items() if why == "angles"]
    while angles:  # what an angle is made of, as far back as it is computed in float
        for name in model.graph.node[angles.pop()].input:
            maker = makers.get(name)
            if maker is not None and halves.is_float(name) and halves.floats(model.graph.node[maker]):
                if reasons.get(maker) != "angles":
                    angles.append(maker)
                reasons[maker] = "angles"
    return reasons


_BETWEEN = {"Add", "Cast", "Div", "Identity", "Mul", "Reshape", "Sub", "Where"}
"""What stands between Q·Kᵀ and its softmax, or the softmax and the product with V: scale, mask, casts."""


def _attention(model: Any, makers: Mapping[str, int]) -> set[int]:
    """Indices of the nodes that compute attention: Attention, or MatMul → … → Softmax → … → MatMul."""
    nodes = model.graph.node
    readers: dict[str, list[int]] = defaultdict(list)
    for i, node in enumerate(nodes):
        for name in node.input:
            readers[name].append(i)

    def reached(start: int, next_nodes: Callable[[Any], Iterable[int]]) -> tuple[set[int], set[int]]:
        """(products, what is passed through on the way to them)."""
        products, passed, waiting = set[int](), set[int](), [start]
        while waiting:
            for i in next_nodes(nodes[waiting.pop()]):
                if nodes[i].op_type == "MatMul":
                    products.add(i)
                elif nodes[i].op_type in _BETWEEN and i not in passed:
                    passed.add(i)
                    waiting.append(i)
        return products, passed

    def before(node: Any) -> list[int]:
        return [makers[name] for name in node.input if name in makers]

    def after(node: Any) -> list[int]:
        return [i for name in node.output for i in readers[name]]

    found = {i for i, node in enumerate(nodes) if node.op_type == "Attention"}
    for i, node in enumerate(nodes):
        if node.op_type == "Softmax":
            (first, scaled), (second, spread) = reached(i, before), reached(i, after)
            if first and second:
                found |= {i} | first | scaled | second | spread
    return found


def _is_lost(values: NDArray[Any]) -> bool:
    """Whether a weight cannot be float16: part of it overflows, or nothing that is not 0 is a normal number in it."""
    largest = float(np.max(np.abs(values), initial=0.0))
    return not largest <= LARGEST or 0.0 < largest < SMALLEST_NORMAL


def _join_islands(model: Any, halves: _Typing, reasons: dict[int, str]) -> None:
    """Nodes that only move data, between nothing but islands, join them: no pair of casts around them.

    Neighbouring movers are taken as one. A neighbour that takes or gives float32 anyway counts as an island.
    """
    nodes = model.graph.node
    makers = {name: i for i, node in enumerate(nodes) for name in node.output}
    readers: dict[str, list[int]] = defaultdict(list)
    for i, node in enumerate(nodes):
        for name in node.input:
            readers[name].append(i)
    movers = {i for i, n in enumerate(nodes) if n.op_type in _MOVERS and i not in reasons and halves.inputs(n)}
    outputs = {output.name for output in model.graph.output}

    def moved(i: int) -> list[str]:
        return [nodes[i].input[k] for k in halves.inputs(nodes[i])]

    while movers:
        group, ends, waiting = set[int](), set[bool](), [movers.pop()]
        while waiting:
            group.add(i := waiting.pop())
            makers_of = [makers[name] for name in moved(i) if name in makers]
            ends |= {True for name in moved(i) if name not in makers}  # inputs of the graph and weights are float32
            readers_of = [k for name in nodes[i].output for k in readers[name]]
            ends |= {True for name in nodes[i].output if name in outputs}
            for k in {*makers_of, *readers_of} - group:
                if k in movers:
                    movers.remove(k)
                    waiting.append(k)
                elif nodes[k].op_type not in _READERS:
                    ends.add(k in reasons or nodes[k].op_type in _SOURCES)
        if ends == {True} and any(k in reasons for i in group for k in _around(nodes, i, makers, readers)):
            reasons.update(dict.fromkeys(group, "between islands"))


def _around(nodes: Any, i: int, makers: Mapping[str, int], readers: Mapping[str, list[int]]) -> set[int]:
    before = {makers[name] for name in nodes[i].input if name in makers}
    return before | {k for name in nodes[i].output for k in readers[name]}


def _float_softmax(model: Any, reasons: Mapping[int, str]) -> None:
    """Attention in float16 sums its softmax in float32, for the same reason as Softmax by itself."""
    from onnx import helper

    for i, node in enumerate(model.graph.node):
        named = {attribute.name for attribute in node.attribute}
        if node.op_type == "Attention" and i not in reasons and "softmax_precision" not in named:
            node.attribute.append(helper.make_attribute("softmax_precision", FLOAT))


def _facts(model: Any, reasons: Mapping[int, str], ranges: Ranges) -> dict[str, Any]:
    """``{"islands": [{"op", "why", "nodes", "largest"}], …}``; ``largest`` where a measured magnitude decided."""
    nodes = model.graph.node
    counts = Counter((nodes[i].op_type, why) for i, why in reasons.items())
    largest: dict[tuple[str, str], float] = {}
    for i, why in reasons.items():
        seen = ranges.logits if why == "logits" else ranges.largest
        if why in ("range", "squares", "logits"):
            names = nodes[i].output if why == "logits" else (*nodes[i].input, *nodes[i].output)
            key = (nodes[i].op_type, why)
            largest[key] = max(largest.get(key, 0.0), *(seen.get(name, 0.0) for name in names))
    islands: list[dict[str, Any]] = []
    for (op, why), count in sorted(counts.items()):
        seen_here = largest.get((op, why), np.inf)  # JSON has no infinity
        measured = {"largest": float(f"{seen_here:.4g}")} if np.isfinite(seen_here) else {}
        islands.append({"op": op, "why": why, "nodes": count, **measured})
    # Of what is computed, that is: an angle of 999 rad is large and means nothing.
    made = {name for i, node in enumerate(nodes) if reasons.get(i) != "angles" for name in node.output}
    top = max((seen for name, seen in ranges.largest.items() if name in made and np.isfinite(seen)), default=0.0)
    return {"islands": islands, "largest_activation": float(f"{top:.4g}"), "margin": MARGIN}


def _rewrite(model: Any, halves: _Typing, weights: Weights, reasons: Mapping[int, str]) -> int:
    """Retype weights and tensors, and insert the casts that are needed; returns how many."""
    from onnx import helper

    graph = model.graph
    outputs = {output.name for output in graph.output}
    renamed: dict[str, str] = {}
    dtypes: dict[str, int] = {}  # of float tensors, where it is not float32
    nodes: list[Any] = []
    casts: dict[tuple[str, int], str] = {}

    def cast(name: str, dtype: int) -> str:
        if (name, dtype) not in casts:
            casts[name, dtype] = f"{name}.{'float' if dtype == FLOAT else _TYPES[dtype][1]}"
            nodes.append(helper.make_node("Cast", [name], [casts[name, dtype]], to=dtype))
        return casts[name, dtype]

    def as_type(name: str, dtype: int) -> str:
        if name in weights:
            return name if dtype == FLOAT else _half_weight(weights, name, dtype)
        name = renamed.get(name, name)
        return name if dtypes.get(name, FLOAT) == dtype else cast(name, dtype)

    for i, node in enumerate(graph.node):
        converted = halves.floats(node) and i not in reasons
        half_inputs = set(halves.inputs(node)) if converted else set()
        half_outputs = halves.outputs(node) if converted else []
        for k, name in enumerate(node.input):
            if node.op_type in _READERS:
                node.input[k] = renamed.get(name, name)
            elif halves.is_float(name):
                node.input[k] = as_type(name, halves.kind if k in half_inputs else FLOAT)
        nodes.append(node)
        for k in half_outputs:
            name = node.output[k]
            if name in outputs:  # the graph's outputs stay float32, under their names
                renamed[name] = node.output[k] = f"{name}.computed"
                casts[node.output[k], FLOAT] = name
                nodes.append(helper.make_node("Cast", [node.output[k]], [name], to=FLOAT))
            dtypes[node.output[k]] = halves.kind
    del graph.node[:]
    graph.node.extend(nodes)
    return len(casts)


def _half_weight(weights: Weights, name: str, kind: int) -> str:
    from onnx.helper import tensor_dtype_to_np_dtype

    def make() -> NDArray[Any]:
        return weights[name].astype(tensor_dtype_to_np_dtype(kind))  # to nearest

    return weights.declare(f"{name}.{_TYPES[kind][1]}", kind, weights.dims(name), make)
