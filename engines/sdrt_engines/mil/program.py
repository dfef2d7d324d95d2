"""A network as Core ML programs: one, or several that hand tensors on, with a function for each size."""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sdrt.bundle import Component, DimRange
from sdrt.engine import Array
from sdrt.errors import BuildError
from sdrt_engines import coreml_contract as contract
from sdrt_engines.coreml_contract import Port
from sdrt_engines.graph.external import Weights
from sdrt_engines.mil import split_einsum
from sdrt_engines.mil.operators import dtype
from sdrt_engines.mil.quiet import quiet
from sdrt_engines.mil.translate import Style, Translation, function, known

TARGETS = {"ios17": "iOS17", "ios18": "iOS18"}
"""By name: coremltools' deployment target, which stands for the macOS of the same year too (14, 15)."""

CUT_WITHIN = 0.1
"""Of a part: how far from an even share of the weights a cut may be, for few tensors to cross."""


def function_names(sizes: Sequence[tuple[int, int]]) -> list[str]:
    """What the functions of a package of these sizes (width, height) are called."""
    return [contract.FUNCTION] if len(sizes) == 1 else [contract.function_name(*size) for size in sizes]


@dataclass(frozen=True)
class Network:
    """A component, to be made into one program or, in order, several. functions: by name, each one's sizes."""

    library: Any
    graph: Any
    weights: Weights
    component: Component
    functions: Mapping[str, Mapping[str, DimRange]]
    batch: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    style: Style
    target: str

    def programs(self, chunks: int) -> Iterator[Any]:
        """MIL programs that have all functions; the outputs of each are inputs of the next."""
        from coremltools.converters.mil.mil import Program

        ends = cuts(self.graph.graph, self.weights, chunks)
        states = {name: _State() for name in self.functions}
        for first, last in itertools.pairwise([0, *ends]):
            program = Program()
            for name, profile in self.functions.items():
                with quiet():
                    made, states[name] = self._function(profile, states[name], first, last)
                program.add_function(name, made)
            if len(self.functions) > 1:
                program.default_function_name = next(iter(self.functions))
                program.export_as_multifunction = True
            yield program

    def _function(self, profile: Mapping[str, DimRange], state: _State, first: int, last: int) -> tuple[Any, _State]:
        """Nodes ``first`` to ``last`` of the graph, and what is known after them."""
        sizes = {"B": self.batch} | {symbol: range_.opt for symbol, range_ in profile.items()}
        plain = {spec.name: spec.at(sizes) for spec in self.component.inputs}
        nodes, rest = self.graph.graph.node[first:last], self.graph.graph.node[last:]
        wanted = {name for node in nodes for name in node.input}
        ports = [port for port in self.inputs if port.tensor in wanted]
        placeholders = {p.name: (p.shape(plain[p.tensor], self.batch), f"fp{p.dtype[1:]}") for p in ports}
        crossing: dict[str, Any] = {}

        def body(given: Mapping[str, Any]) -> dict[str, Any]:
            values = {p.tensor: _unpacked(p, given[p.name], plain[p.tensor], self.style) for p in ports}
            values |= dict(state.known) | {name: held.again(given[held.name]) for name, held in state.crossing.items()}
            t = Translation(
                self.graph.graph, self.weights, self.opset, self.style, values, {p.tensor: p.name for p in self.outputs}
            )
            t.run(nodes)
            if not rest:
                return {port.name: split_einsum.plain(t[port.tensor]) for port in self.outputs}
            later = {name for node in rest for name in node.input} | {port.tensor for port in self.outputs}
            made = {name: value for name, value in t.values.items() if name in later and name not in plain}
            crossing.update(made)
            # What is an input as it came is no output: the next program is given it, too.
            own = [_var(value) for value in made.values() if not known(value)]
            return {var.name: var for var in own if var.name not in given}

        made = function(
            placeholders | {held.name: held.placeholder for held in state.crossing.values()}, body, self._target
        )
        after = _State(
            {name: value for name, value in crossing.items() if known(value)},
            {name: _Crossing.of(value) for name, value in crossing.items() if not known(value)},
        )
        return made, after

    @property
    def opset(self) -> int:
        return next(int(o.version) for o in self.graph.opset_import if o.domain in ("", "ai.onnx"))

    @property
    def _target(self) -> Any:
        return getattr(self.library.target, TARGETS[self.target])


@dataclass(frozen=True)
class _Crossing:
    """A tensor that one program hands to the next. ``held``: how, where it is held channels first."""

    name: str
    placeholder: tuple[tuple[int, ...], str]
    held: Any = None

    @staticmethod
    def of(value: Any) -> _Crossing:
        var = _var(value)
        kind = {np.float16: "fp16", np.float32: "fp32", np.int32: "int32"}[dtype(var)]
        return _Crossing(var.name, (tuple(var.shape), kind), None if var is value else value)

    def again(self, var: Any) -> Any:
        return var if self.held is None else replace(self.held, var=var)


@dataclass(frozen=True)
class _State:
    """What the programs before have made, by the graph's names: what is known, and what is handed over."""

    known: Mapping[str, Array] = field(default_factory=dict)
    crossing: Mapping[str, _Crossing] = field(default_factory=dict)


def _var(value: Any) -> Any:
    return value.var if isinstance(value, split_einsum.Held) else value


def cuts(graph: Any, weights: Weights, chunks: int) -> list[int]:
    """Where parts end, so that each has about as many weights, and few tensors cross; the last is the whole's end."""
    sizes = [sum(math.prod(weights.dims(name)) for name in node.input if name in weights) for node in graph.node]
    done = np.cumsum(sizes) / max(sum(sizes), 1)
    last = {name: i for i, node in enumerate(graph.node) for name in node.input if name not in weights}
    opened = Counter(i for i, node in enumerate(graph.node) for name in node.output if name in last)
    closed = Counter(last[name] for node in graph.node for name in node.output if name in last)
    alive = np.cumsum([opened[i] - closed[i] for i in range(len(graph.node))])  # tensors that cross after each node
    ends = []
    for part in range(1, chunks):
        away = np.abs(done[:-1] - part / chunks)
        near = np.flatnonzero(away <= max(CUT_WITHIN / chunks, away.min()))
        ends.append(int(min(near, key=lambda i: (alive[i], abs(done[i] - part / chunks)))) + 1)
    return [*ends, len(graph.node)]


def _unpacked(port: Port, given: Any, plain: Sequence[int], style: Style) -> Any:
    """The graph's tensor, made of the package's."""
    from coremltools.converters.mil import Builder as builder  # noqa: N813

    if port.layout == "floats":
        return builder.cast(x=given, dtype="int32")
    if port.layout == "batched":
        given = builder.slice_by_index(x=given, begin=[0], end=[plain[0]])
    if port.dtype == "f16":
        given = builder.cast(x=given, dtype="fp32")
    if port.layout == "channels_first":
        held = split_einsum.Held(given, "tokens")
        return held if style.attention == "split_einsum" else held.plain()
    return given


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """BuildError for whatever coremltools finds wrong, or the disk."""
    try:
        yield
    except Exception as error:
        raise BuildError(
            f"{folder.name}: coremltools cannot write it: {error}", "please report it with the output of sdrt doctor"
        ) from error


def save(library: Any, program: Any, folder: Path, target: str) -> None:
    """Convert without coremltools' own rewriting, which would change types and take most of the time and memory."""
    with quiet(), warnings.catch_warnings(), _told(folder):
        warnings.simplefilter("ignore")
        model = library.convert(
            program, source="milinternal", convert_to="mlprogram", skip_model_load=True,
            minimum_deployment_target=getattr(library.target, TARGETS[target]),
            compute_precision=library.precision.FLOAT32,
            pass_pipeline=library.PassPipeline(["common::dead_code_elimination"], "sdrt"),
        )  # fmt: skip
        model.user_defined_metadata["com.github.apple.ml-stable-diffusion.version"] = "1.1.1"
        model.save(str(folder))
        for file in folder.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)  # coremltools makes some for nobody else to read
