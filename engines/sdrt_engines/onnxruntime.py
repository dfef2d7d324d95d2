"""ONNX Runtime on the CPU. Opens ONNX bundles directly; ``build`` saves the graph optimised once, for any CPU.

In fp16, int8 and w8 the graph is saved as the passes leave it: ONNX Runtime would save its weights in float32 again.
On x86 it has few float16 kernels: fp16 is computed in float32 there, rounded in between, and no faster. In int8, matrix
products are computed in int8, convolutions in float32 from int8's values (benchmarks/LOG.md).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from sdrt import processor
from sdrt.bundle import MANIFEST, Artifact, Bundle, Precision, record
from sdrt.engine import (
    ONNX,
    Array,
    BuildOptions,
    Device,
    OpenOptions,
    parse_options,
    unknown_device,
)  # fmt: skip
from sdrt.errors import BuildError, BundleError, EngineUnavailable, NumericsError
from sdrt_engines.graph import fix_dims
from sdrt_engines.graph.external import Weights
from sdrt_engines.graph.group_norm import group_norm_as_instance_norm
from sdrt_engines.graph.precision import reduce
from sdrt_engines.graph.shapes import fixed_dims, profiles, usual_shapes
from sdrt_engines.graph.storage import float32_graph
from sdrt_engines.graph.winograd import winograd

OPENS = (ONNX, "onnxruntime")
INSTALL = "pip install 'sdrt[ort]'"
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8", "w8")
CACHES = False
CHECKS_ON = None
PLAIN: Mapping[str, str] = {"winograd": "none"}


@dataclass(frozen=True)
class OrtOptions:
    """``-O name=value`` when opening.

    prepack: lay weights out for the kernels when loading (faster runs, a second copy of the weights in memory).
    arena: keep freed memory for the next run (faster, higher peak).
    plan: decide when loading which tensors share memory. Planning takes most of a U-Net's load time, and with the arena
    neither peak memory nor speed was better for it (benchmarks/LOG.md).
    spin: threads wait busily for work (faster, keeps cores busy between calls).
    optimization: how far the graph is rewritten when loading; "all" copies convolution weights into this CPU's layout
    (faster runs, slower load, a second copy in memory), "extended" leaves them mapped from the file.
    unpack: make int8 weights float32 when loading (as much memory as fp32), instead of at each run.
    """

    prepack: bool = True
    arena: bool = True
    plan: bool = False
    spin: bool = True
    optimization: Literal["all", "extended", "basic", "none"] = "all"
    unpack: bool = False


_LEVELS = {
    "all": "ORT_ENABLE_ALL", "extended": "ORT_ENABLE_EXTENDED", "basic": "ORT_ENABLE_BASIC", "none": "ORT_DISABLE_ALL"
}  # fmt: skip


@dataclass(frozen=True)
class OrtBuildOptions:
    """``-O name=value`` when building.

    winograd: which 3x3 convolutions of an fp32 build save half of their multiplications, at twice the memory for their
    filters: all, those of large pictures (at the model's own size, or the largest that is built for), or none.
    """

    winograd: Literal["all", "large", "none"] = "large"


def _library() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineUnavailable(f"onnxruntime cannot be imported: {error}", INSTALL) from None
    return onnxruntime


def elsewhere(artifact: Artifact) -> str:
    return ""


def devices() -> Sequence[Device]:
    library = _library()
    if "CPUExecutionProvider" not in library.get_available_providers():
        raise EngineUnavailable("this onnxruntime has no CPUExecutionProvider", INSTALL)
    return [
        Device(
            "cpu",
            f"{processor.name()}, {os.cpu_count()} threads, onnxruntime {library.__version__}",
            processor.memory(),
        )
    ]


def build(source: Bundle, name: str, out: Path, options: BuildOptions) -> Artifact:
    """Optimise the graph, without what ties it to this CPU (layout transformations), and fix the sizes given."""
    library = _library()
    own = parse_options(OrtBuildOptions, options.extra, "onnxruntime")
    component = source.component(name)
    if component.artifact.engine != ONNX:
        fix = "give the bundle that sdrt export wrote"
        raise BuildError(f"{name}: is built for {component.artifact.engine} already; build starts from ONNX", fix)
    if options.target not in (None, "any"):
        raise BuildError(
            f"{name}: onnxruntime's graphs run on any CPU, asked for target {options.target}", "leave it out"
        )
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    dims = fixed_dims(component, options)
    with tempfile.TemporaryDirectory(dir=out, prefix=".float32-") as scratch:
        stored, rewritten = Path(scratch, "stored"), Path(scratch, "rewritten")
        stored.mkdir()
        rewritten.mkdir()
        model, weights = float32_graph(source, component, stored)
        held = Weights(model, weights)
        if options.precision == "fp32":
            facts = winograd(model, held, own.winograd, usual_shapes(source, component, options))
            if facts:
                held.save(model, rewritten, lambda done: options.report("write", 0.5 * done))
                weights = rewritten
            _save_optimized(library, name, model, weights, dims, folder)
            facts["optimization"] = "extended"
        else:
            facts = reduce(model, held, weights, source, component, options)
            group_norm_as_instance_norm(model)
            fix_dims(model, dims)
            held.save(model, folder, lambda done: options.report("write", 0.9 + 0.1 * done))
    names = ["model.onnx"] + (["model.onnx.data"] if (folder / "model.onnx.data").exists() else [])
    return Artifact(
        engine="onnxruntime",
        precision=cast(Precision, options.precision),
        files=tuple(record(out, f"{name}/{file}") for file in names),
        target="any",
        profiles=profiles(component, options),
        built_from=component.artifact.files[0].sha256,
        facts={"onnxruntime": library.__version__, **facts},
    )


def _save_optimized(
    library: Any, name: str, model: Any, weights: Path, dims: Mapping[str, int], folder: Path
) -> None:  # fmt: skip
    """Let ONNX Runtime optimise the graph, whose external data lie in ``weights``, and save it in ``folder``."""
    settings = library.SessionOptions()
    settings.graph_optimization_level = library.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    settings.optimized_model_filepath = str(folder / "model.onnx")
    settings.add_session_config_entry("session.optimized_model_external_initializers_file_name", "model.onnx.data")
    settings.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    settings.add_session_config_entry("session.disable_prepacking", "1")
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 4
    for dim, size in dims.items():
        settings.add_free_dimension_override_by_name(dim, size)
    group_norm_as_instance_norm(model)
    # The rewritten graph is handed over in memory; its weights stay where they are.
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    try:
        library.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise BuildError(f"{name}: onnxruntime {library.__version__} cannot load the graph: {error}") from error


def open(bundle: Bundle, name: str, device: str | None, options: OpenOptions) -> OrtSession:
    if device not in (None, "cpu"):
        raise unknown_device("onnxruntime", device, devices())
    return OrtSession(bundle, name, options)


class OrtSession:
    """One graph. Constants are wrapped once; inputs are read in place, outputs are ONNX Runtime's own buffers.

    (np.asarray with an order, as np.ascontiguousarray would make a scalar an array of one.)
    """

    def __init__(self, bundle: Bundle, name: str, options: OpenOptions) -> None:
        library = _library()
        own = parse_options(OrtOptions, options.extra, "onnxruntime")
        self.name = name
        self.spec = bundle.component(name)
        settings = library.SessionOptions()
        settings.log_severity_level = 4
        settings.graph_optimization_level = getattr(library.GraphOptimizationLevel, _LEVELS[own.optimization])
        settings.enable_cpu_mem_arena = own.arena
        settings.enable_mem_pattern = own.arena
        settings.enable_mem_reuse = own.plan
        if options.threads is not None:
            settings.intra_op_num_threads = options.threads
        settings.add_session_config_entry("session.disable_prepacking", "0" if own.prepack else "1")
        settings.add_session_config_entry("session.intra_op.allow_spinning", "1" if own.spin else "0")
        settings.add_session_config_entry("session.disable_quant_qdq", "1" if own.unpack else "0")
        # Without it int8 becomes uint8 on x86, by a rewriting that leaves products unfused whose input others share.
        settings.add_session_config_entry("session.qdqisint8allowed", "1")
        # Matrix products with int8 weights: 1 computes in float32; the default, 4, would round activations to int8.
        settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        entry = bundle.path(self.spec.artifact.files[0].path)
        try:
            self._session = library.InferenceSession(str(entry), settings, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise BundleError(
                f"{name}: onnxruntime {library.__version__} cannot load {entry.name}: {error}",
                f"sdrt verify {bundle.root} tells whether the files are damaged",
            ) from error
        self._from_numpy = library.OrtValue.ortvalue_from_numpy
        self._binding = self._session.io_binding()
        self._kept: dict[str, Any] = {}

    def prepare(self, sizes: Mapping[str, int]) -> bool:
        return False  # one network runs all sizes

    def bind(self, **constants: Array) -> None:
        for name, array in constants.items():
            self._kept[name] = self._from_numpy(np.asarray(array, order="C"))
            self._bound(self._binding.bind_ortvalue_input, name, self._kept[name])

    def run(self, **inputs: Array) -> dict[str, Array]:
        held = {name: self._from_numpy(np.asarray(array, order="C")) for name, array in inputs.items()}
        for name, value in held.items():
            self._bound(self._binding.bind_ortvalue_input, name, value)
        # Bound anew for each call: ONNX Runtime would write into the previous call's arrays, which are the caller's.
        self._binding.clear_binding_outputs()
        for spec in self.spec.outputs:
            self._bound(self._binding.bind_output, spec.name, "cpu")
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise NumericsError(f"{self.name}: onnxruntime failed while running: {error}") from error
        values = self._binding.get_outputs()
        return {spec.name: value.numpy() for spec, value in zip(self.spec.outputs, values, strict=True)}

    def _bound(self, bind: Callable[[str, Any], None], name: str, value: Any) -> None:
        try:
            bind(name, value)
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise BundleError(
                f"{self.name}: the graph is not what {MANIFEST} says: {error}", "sdrt verify tells more"
            ) from None

    def close(self) -> None:
        self._kept.clear()
        del self._binding, self._session
