"""ONNX → MIL: one function of a Core ML program, all of its sizes fixed.

What depends on no input is computed here, so that shapes, masks and the like are constants of the program. Types are
the graph's: what is float16 in it is float16 in the program, and nothing is converted behind its back.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sdrt.errors import BuildError
from sdrt_engines.graph.external import Weights

if TYPE_CHECKING:
    from sdrt_engines.mil.palettize import Palette

Array = NDArray[Any]
Value = Any
"""What a tensor of the graph is in the program: an Array where it is known by now, else coremltools' ``Var``."""

OPERATORS: dict[str, Callable[[Translation, Any, list[Value], dict[str, Any]], Value]] = {}
"""By ONNX name: (translation, node, inputs, attributes) → the output, or a list of outputs. See ``operators``."""


def operator(*names: str) -> Callable[[Any], Any]:
    """Register a function of ``OPERATORS``."""

    def registered(function: Any) -> Any:
        OPERATORS.update(dict.fromkeys(names, function))
        return function

    return registered


def known(value: Value) -> bool:
    """Whether a value is known while translating."""
    return isinstance(value, np.ndarray)


def narrowed(array: Array) -> Array:
    """As Core ML has it: no 64 bits. Bounds that stand for infinity ("to the end") stay the largest there is."""
    if array.dtype == np.int64:
        return np.clip(array, -(2**31), 2**31 - 1).astype(np.int32)
    return array.astype(np.float32) if array.dtype == np.float64 else array


@dataclass(frozen=True)
class Style:
    """What a graph does not say. attention: see ``CoreMLBuildOptions``. palette: what makes tables of weights."""

    attention: str = "original"
    palette: Palette | None = None


@dataclass
class Translation:
    """The state of translating one graph into the function that is open in coremltools' builder.

    ``values`` holds what is made so far, by the graph's names; the graph's inputs are put there first.
    """

    graph: Any
    """GraphProto."""
    weights: Weights
    opset: int
    style: Style = field(default_factory=Style)
    values: dict[str, Value] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    """What tensors of the graph are called in the program, where a name is asked for."""

    def __post_init__(self) -> None:
        self._taken = Counter([*self.renamed.values(), *self.values])
        self.producers = {name: node for node in self.graph.node for name in node.output if name}
        self.uses = Counter(name for node in self.graph.node for name in node.input)
        self.uses.update(output.name for output in self.graph.output)
        self.readers: dict[str, list[Any]] = {}
        for node in self.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def run(self, nodes: Sequence[Any] | None = None) -> None:
        """Translate these nodes, or all. BuildError, which names the node, for what there is no way to say in MIL."""
        from sdrt_engines.mil import operators, split_einsum

        operators.registered()
        for node in self.graph.node if nodes is None else nodes:
            if all(name in self.values for name in node.output if name):
                continue  # done together with an earlier one
            inputs = [self[name] if name else None for name in node.input]
            with self.about(node):
                outputs: Value = None
                if inputs and all(value is None or known(value) for value in inputs):
                    outputs = self._folded(node, inputs)
                elif self.style.attention == "split_einsum":
                    outputs = split_einsum.translated(self, node, inputs, attributes(node))
                    inputs = inputs if outputs is not None else [split_einsum.plain(value) for value in inputs]
                if outputs is None:
                    outputs = self.ordinary(node, inputs, attributes(node))
            outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
            self.values.update({name: value for name, value in zip(node.output, outputs, strict=False) if name})

    def ordinary(self, node: Any, inputs: list[Value], attributes: dict[str, Any]) -> Value:
        """What the table of operators makes of a node."""
        return OPERATORS[node.op_type](self, node, inputs, attributes)

    def with_bias(self, output: str, width: int) -> tuple[str, Array | None]:
        """What a product is called, and the bias f[width] that is added to it next, if nothing else reads it."""
        after = self.sole_reader(output, "Add")
        if after is not None and len(set(after.input)) == 2:
            (other,) = (name for name in after.input if name != output)
            if other in self.weights and self.weights.dims(other) in ((width,), (1, width)):
                return after.output[0], self[other].reshape(-1)
        return output, None

    def __getitem__(self, name: str) -> Value:
        """A tensor by the graph's name. Weights are read when they are used, and not kept."""
        if name in self.values:
            return self.values[name]
        return np.asarray(self.weights[name])

    def sole_reader(self, name: str, kind: str) -> Any:
        """The one node that reads a tensor, if it is of this kind and the tensor no output; else None."""
        readers = self.readers.get(name, [])
        return readers[0] if self.uses[name] == 1 and len(readers) == 1 and readers[0].op_type == kind else None

    def name(self, tensor: str) -> str:
        """A name that MIL takes, and that no other operation has, for what makes a tensor of the graph."""
        if tensor in self.renamed:
            return self.renamed[tensor]
        plain = re.sub(r"[^A-Za-z0-9_]", "_", tensor) or "_"
        plain = f"_{plain}" if plain[0].isdigit() else plain
        if re.search(r"_[0-9]+$", plain):
            plain += "_"  # coremltools' own names end in a number, and it does not look whether they are taken
        self._taken[plain] += 1
        return plain if self._taken[plain] == 1 else f"{plain}__{self._taken[plain]}"

    def weight(self, tensor: str, array: Array, how: str = "") -> Value:
        """A constant made of an initializer, ``how``: in which way. Functions of one program share it on disk."""
        from coremltools.converters.mil import Builder

        label = f"{tensor}{how}"
        if tensor not in self.weights:  # computed here, and of another size another one
            label += f".{_digest(array)}"
        if self.style.palette is not None and (found := self.style.palette(label, array)) is not None:
            return found.constant(self.name(label), self.style.palette.grouped)
        made = Builder.const(val=np.ascontiguousarray(array), name=self.name(label))
        made.op.weight_id = label
        return made

    @contextlib.contextmanager
    def about(self, node: Any) -> Iterator[None]:
        """Whatever goes wrong in here is about this node."""
        label = f"{node.op_type} {node.name or node.output[0]}"
        if node.op_type not in OPERATORS or node.domain not in ("", "ai.onnx"):
            raise BuildError(
                f"{label}: Core ML packages are made of graphs without this operator; there are"
                f" {', '.join(sorted(OPERATORS))}",
                "export the checkpoint with sdrt export, or build for another engine",
            )
        try:
            yield
        except BuildError as error:
            fix = error.fix or "export the checkpoint with sdrt export, or build for another engine"
            raise BuildError(f"{label}: {error.message}", fix) from None
        except Exception as error:  # coremltools raises whatever its checks raise
            raise BuildError(f"{label}: cannot be said in Core ML's terms: {error}") from error

    def _folded(self, node: Any, inputs: Sequence[Array | None]) -> list[Array]:
        from onnx import TypeProto, helper
        from onnx.reference import ReferenceEvaluator

        if len(set(node.input)) < len(node.input):  # named twice
            copy = type(node)()
            copy.CopyFrom(node)
            del copy.input[:]
            copy.input.extend(f"i{i}" if name else "" for i, name in enumerate(node.input))
            node = copy
        told = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in zip(node.input, inputs, strict=True)
            if value is not None
        ]
        made = [helper.make_value_info(name, TypeProto()) for name in node.output if name]
        model = helper.make_model(
            helper.make_graph([node], "folded", told, made), opset_imports=[helper.make_opsetid("", self.opset)]
        )
        fed = {name: value for name, value in zip(node.input, inputs, strict=True) if value is not None}
        found = iter(ReferenceEvaluator(model).run(None, fed))
        return [np.asarray(next(found)) if name else np.empty(0) for name in node.output]


def attributes(node: Any) -> dict[str, Any]:
    """A node's attributes as Python has them."""
    from onnx import helper

    found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}


def function(
    placeholders: Mapping[str, tuple[tuple[int, ...], str]],
    body: Callable[[Mapping[str, Value]], Mapping[str, Value]],
    target: Any,
) -> Any:
    """A MIL function. placeholders: name → (shape, "fp16", "fp32" or "int32"); body: inputs → outputs, by name."""
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil import Function, types

    inputs = {name: Builder.placeholder(shape, getattr(types, dtype)) for name, (shape, dtype) in placeholders.items()}
    with Function(inputs, opset_version=target) as made:
        outputs = body(made.inputs)
        _share_constants(made)
        names = Counter(var.name for op in made.operations for var in op.outputs)
        if twice := [name for name, count in names.items() if count > 1 or name in inputs]:
            raise BuildError(f"the name {twice[0]} is given twice", "please report it with the output of sdrt doctor")
        made.set_outputs(
            [value if value.name == name else Builder.identity(x=value, name=name) for name, value in outputs.items()]
        )
    return made


def _digest(array: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _share_constants(made: Any) -> None:
    """Let functions of one program share on disk what is the same: biases, tables, indices; weights have labels."""
    for op in made.operations:
        value = op.outputs[0].val if op.op_type == "const" else None
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiu" and op.weight_id is None:
            op.weight_id = f"{value.dtype}{value.shape}{_digest(value)}"
