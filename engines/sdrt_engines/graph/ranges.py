"""How large a graph's activations get, measured: the float32 graph, with reductions added, over recorded inputs.

ONNX Runtime runs it, for whichever engine the figures are. Only scalars leave a run, so memory is what the graph itself
needs, however many tensors are watched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdrt.errors import BuildError, EngineUnavailable
from sdrt_engines.graph.group_norm import group_norm_as_instance_norm

Array = NDArray[Any]
Calls = Sequence[Mapping[str, Array]]
"""Inputs of a graph, by name, one mapping a call."""

Report = Callable[[str, float], object]
"""(what is being done, fraction of it in [0, 1])"""

CLIPPINGS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.32, 0.25)
"""Fractions of a tensor's largest magnitude at which quantisation is tried. See ``clipping``."""

SMALLEST_SCALE = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Ranges:
    """What was measured.

    largest: the largest magnitude of each float activation, by tensor; infinite for a causal mask. logits: the largest
    that an entry of Q·Kᵀ, unscaled, can be, by the attention's output.
    """

    largest: Mapping[str, float]
    logits: Mapping[str, float]


def element_types(model: Any) -> dict[str, int]:
    """ONNX's number of the element type of every tensor of the graph, as far as shape inference knows it."""
    import onnx

    types = _recorded(model)
    if any(name and name not in types for node in model.graph.node for name in node.output):
        types |= _recorded(onnx.shape_inference.infer_shapes(model))
    return types


def _recorded(model: Any) -> dict[str, int]:
    graph = model.graph
    values = (*graph.value_info, *graph.input, *graph.output)
    types = {v.name: v.type.tensor_type.elem_type for v in values if v.type.tensor_type.elem_type}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def measure(model: Any, folder: Path, calls: Calls, report: Report = lambda *_: None) -> Ranges:
    """Ranges of a float32 ModelProto whose external data lie in ``folder``. The model is left as it is."""
    from onnx import TensorProto, helper

    types = element_types(model)
    probe = _Probe(model)
    activations = [i.name for i in model.graph.input] + [name for node in model.graph.node for name in node.output]
    activations = [name for name in activations if types.get(name) == TensorProto.FLOAT and name not in probe.constants]
    for name in activations:
        probe.watch(f"{name}.max", helper.make_node("ReduceMax", [name], [f"{name}.max"], keepdims=0))
        probe.watch(f"{name}.min", helper.make_node("ReduceMin", [name], [f"{name}.min"], keepdims=0))
    for output in model.graph.output:  # ReduceMax looks past most NaN: they are looked for where they arrive
        if types.get(output.name) == TensorProto.FLOAT:
            y = output.name
            probe.add(helper.make_node("IsNaN", [y], [f"{y}.isnan"]))
            probe.add(helper.make_node("Cast", [f"{y}.isnan"], [f"{y}.isnan.float"], to=TensorProto.FLOAT))
            probe.watch(f"{y}.nan", helper.make_node("ReduceMax", [f"{y}.isnan.float"], [f"{y}.nan"], keepdims=0))
    attentions = [node for node in model.graph.node if node.op_type == "Attention"]
    for node in attentions:
        _watch_logits(probe, node)
    seen = probe.run(folder, calls, report, np.maximum, negated={f"{name}.min" for name in activations})
    if bad := [o.name for o in model.graph.output if seen.get(f"{o.name}.nan")]:
        raise _not_a_number(bad[0])
    return Ranges(
        {name: max(seen[f"{name}.max"], seen[f"{name}.min"]) for name in activations},
        {node.output[0]: seen[f"{node.output[0]}.logits"] for node in attentions},
    )


def _watch_logits(probe: _Probe, node: Any) -> None:
    """max ‖q‖·max ‖k‖ by picture and head: no entry of Q·Kᵀ is larger (Cauchy–Schwarz).

    The product itself has (H·W)² entries a head, a gigabyte for a U-Net at 512×512. Where heads are not an axis of
    their own the norms are over all heads, which is larger still.
    """
    from onnx import helper

    y = node.output[0]
    last = probe.constant("ranges.last", np.array([-1], np.int64))
    for side, x in zip("qk", node.input, strict=False):
        probe.add(helper.make_node("ReduceL2", [x, last], [f"{y}.{side}.norms"], keepdims=0))
        probe.add(helper.make_node("ReduceMax", [f"{y}.{side}.norms", last], [f"{y}.{side}.norm"], keepdims=0))
    probe.add(helper.make_node("Mul", [f"{y}.q.norm", f"{y}.k.norm"], [f"{y}.norms"]))
    probe.watch(f"{y}.logits", helper.make_node("ReduceMax", [f"{y}.norms"], [f"{y}.logits"], keepdims=0))


def clipping(
    model: Any, folder: Path, calls: Calls, largest: Mapping[str, float], report: Report = lambda *_: None
) -> dict[str, float]:
    """The clipping value of each tensor of ``largest`` (tensor → largest magnitude) for symmetric int8.

    Of CLIPPINGS times the largest magnitude, the one with the least squared error, relative to what each call holds:
    the calls of one solver, larger than another's, must not decide alone. The graph itself quantises: no histogram is
    kept, and the error is the exact one.
    """
    from onnx import helper

    probe = _Probe(model)
    zero = probe.constant("ranges.zero", np.zeros((), np.int8))
    tiny = probe.constant("ranges.tiny", np.float32(1e-30))
    for name, most in largest.items():
        for fraction in CLIPPINGS:
            at = f"{name}.at.{fraction}"
            scale = probe.constant(f"{at}.scale", np.float32(step(most * fraction)))
            probe.add(helper.make_node("QuantizeLinear", [name, scale, zero], [f"{at}.q"]))
            probe.add(helper.make_node("DequantizeLinear", [f"{at}.q", scale, zero], [f"{at}.dq"]))
            probe.add(helper.make_node("Sub", [name, f"{at}.dq"], [f"{at}.off"]))
            probe.add(helper.make_node("ReduceSumSquare", [f"{at}.off"], [f"{at}.squares"], keepdims=0))
            probe.add(helper.make_node("ReduceSumSquare", [name], [f"{at}.energy"], keepdims=0))
            probe.add(helper.make_node("Max", [f"{at}.energy", tiny], [f"{at}.some"]))
            probe.watch(f"{at}.error", helper.make_node("Div", [f"{at}.squares", f"{at}.some"], [f"{at}.error"]))
    seen = probe.run(folder, calls, report, np.add)
    return {
        name: most * min(CLIPPINGS, key=lambda fraction: seen[f"{name}.at.{fraction}.error"])
        for name, most in largest.items()
    }


def step(largest: float, levels: int = 127) -> float:
    """The scale of symmetric int8 for magnitudes up to ``largest``, which becomes ``levels``; -128 is not used.

    1 where all is zero, or so small that the scale is no normal float32: what is divided by that overflows.
    """
    scale = largest / levels
    return scale if scale >= SMALLEST_SCALE else 1.0


_FIX = "sdrt verify tells whether the bundle is damaged; else build this component in fp32"


def _not_a_number(name: str) -> BuildError:
    return BuildError(f"{name}: NaN already in float32", "sdrt verify tells whether it is damaged")


class _Probe:
    """A copy of a graph, made runnable by ONNX Runtime, whose outputs are the scalars that are watched."""

    def __init__(self, model: Any) -> None:
        import onnx

        self._model = onnx.ModelProto()
        self._model.CopyFrom(model)
        group_norm_as_instance_norm(self._model)
        del self._model.graph.output[:]
        self._groups: list[list[Any]] = [[]]
        self.constants = {tensor.name for tensor in self._model.graph.initializer}

    def constant(self, name: str, values: Any) -> str:
        from onnx import numpy_helper

        if name not in self.constants:
            self.constants.add(name)
            self._model.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def add(self, node: Any) -> None:
        """Add a node that the next one to be watched, and no later one, depends on."""
        self._groups[-1].append(node)

    def watch(self, name: str, node: Any) -> None:
        """Add a node whose only output ``name``, a float32 scalar, is an output of the graph."""
        from onnx import TensorProto, helper

        self.add(node)
        self._groups.append([])
        self._model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, []))

    def run(
        self, folder: Path, calls: Calls, report: Report, combine: Callable[[Any, Any], Any],
        negated: Iterable[str] = (),
    ) -> dict[str, float]:  # fmt: skip
        """The scalars over all calls; BuildError when one is NaN. ``negated``: their sign is turned first."""
        names = [output.name for output in self._model.graph.output]
        if not names:  # nothing to watch
            return {}
        session = self._session(folder)
        signs = np.where(np.isin(names, list(negated)), -1.0, 1.0)
        total: Any = None
        for done, inputs in enumerate(calls):
            report(f"measure, call {done + 1} of {len(calls)}", done / len(calls))
            try:
                scalars = session.run(names, dict(inputs))
            except Exception as error:  # onnxruntime's exceptions share no base class
                raise BuildError(f"onnxruntime cannot run the graph to measure it: {error}", _FIX) from error
            values = signs * np.array(scalars, np.float64)
            total = values if total is None else combine(total, values)
        if bad := [name for name, value in zip(names, total, strict=True) if np.isnan(value)]:
            raise _not_a_number(bad[0].rpartition(".")[0])
        return dict(zip(names, total.tolist(), strict=True))

    def _session(self, folder: Path) -> Any:
        try:
            import onnxruntime
        except ImportError as error:
            fix = "pip install 'sdrt[ort]'"
            raise EngineUnavailable(
                f"measuring activations needs onnxruntime, which cannot be imported: {error}", fix
            ) from None
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 4
        # Not optimised: every tensor that is watched must be there. Weights stay mapped from their file.
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        settings.enable_mem_reuse = False  # as when opening: planning takes most of the load time
        settings.enable_mem_pattern = False  # one block for all activations of a run
        settings.add_session_config_entry("session.disable_prepacking", "1")
        settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        # ONNX Runtime starts from the last node without readers, with all that it needs. In this order a tensor is
        # watched soon after it was made, and freed; in the other one all are held (VAE decoder: 0.13 against 0.62 GB).
        for group in reversed(self._groups):
            self._model.graph.node.extend(group)
        model = self._model.SerializeToString()
        try:
            return onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise BuildError(f"onnxruntime cannot load the graph to measure it: {error}", _FIX) from error
