"""ONNX Runtime, on the CPU or with a provider of its: NVIDIA's, AMD's, Apple's, Qualcomm's, DirectML, OpenVINO.

Opens ONNX bundles directly; ``build`` saves the graph optimised once, for any CPU, or rewritten for a provider: a
target that is called as its devices are.

In fp16, int8 and w8 the graph is saved as the passes leave it: ONNX Runtime would save its weights in float32 again.
On x86 it has few float16 kernels: fp16 is computed in float32 there, rounded in between, and no faster. In int8, matrix
products are computed in int8, convolutions in float32 from int8's values (benchmarks/LOG.md).
"""

from __future__ import annotations

import logging
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
    DeviceMemory,
    OpenOptions,
    Session,
    parse_options,
    unknown_device,
)  # fmt: skip
from sdrt.errors import BuildError, BundleError, DeviceError, EngineUnavailable, InputError, NumericsError
from sdrt_engines.graph import fix_dims, fused
from sdrt_engines.graph.cuda_kernels import argmax_in_float, without_kernel
from sdrt_engines.graph.external import Weights
from sdrt_engines.graph.fused import fuse, left_over, save_plain
from sdrt_engines.graph.group_norm import group_norm_as_instance_norm
from sdrt_engines.graph.opset20 import as_opset20, name_scales
from sdrt_engines.graph.precision import reduce
from sdrt_engines.graph.shapes import fixed_dims, profiles, usual_shapes
from sdrt_engines.graph.storage import float32_graph
from sdrt_engines.graph.winograd import winograd
from sdrt_engines.graph.work import shapes
from sdrt_engines.onnxruntime_cuda import CudaSession
from sdrt_engines.onnxruntime_providers import (
    CPU,
    CUDA,
    NO_FALLBACK,
    NO_PAIRS,
    PROVIDERS,
    RECORD,
    Chosen,
    Pairs,
    check_provider,
    choose,
    left_to_cpu,
    listed,
    preload,
)
from sdrt_engines.onnxruntime_providers import devices as provided

logger = logging.getLogger("sdrt")

OPENS = (ONNX, "onnxruntime")
INSTALL = "pip install 'sdrt[ort]'"
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8", "w8")
TARGETS = ("any", *PROVIDERS)
PROVIDER_PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")
MEASURES: tuple[Precision, ...] = ("fp16", "int8")
CACHES = False
CHECKS_ON = None
PLAIN: Mapping[str, str] = {"winograd": "none"}
OURS_ON_CUDA: Mapping[str, str] = {
    "user_compute_stream": "",
    "has_user_compute_stream": "",
    "enable_cuda_graph": "-O graphs",
    "use_tf32": "-O tf32",
    "prefer_nhwc": "-O nhwc",
    "gpu_external_alloc": "",  # addresses of code
    "gpu_external_free": "",
    "gpu_external_empty_cache": "",
    "cudnn_conv_algo_search": "-O search",
}
"""Options of the CUDA provider that sdrt sets, and what says them."""


@dataclass(frozen=True)
class OrtOptions:
    """``-O name=value`` when opening.

    On every device but the cpu:
    provider: options of the execution provider's own, ``key=value,key2=value2``; one that it does not take is an error.
    fallback: nodes that the provider has no kernel for run on the CPU; otherwise they are an error.

    On cuda:
    graphs: record a CUDA graph for each size, which later calls launch as one.
    keep: sizes whose graphs and buffers stay.
    tf32: compute float32 in products of 10 bits, several times faster.
    nhwc: convolutions with channels last, as tensor cores take them. Each size has a session, and weights, of its own:
    of a graph of free sizes ONNX Runtime 1.31.1 would compute these on the GPU, too, and could not record it.
    search: how cuDNN's algorithms are chosen: by rule, or by timing them all when a size comes first. Timing does not
    choose the same twice, so that pictures of one seed differ slightly between processes.

    On the cpu:
    prepack: lay weights out for the kernels when loading (faster runs, a second copy of the weights in memory).
    arena: keep freed memory for the next run (faster, higher peak).
    plan: decide when loading which tensors share memory. Planning takes most of a U-Net's load time, and with the arena
    neither peak memory nor speed was better for it (benchmarks/LOG.md).
    spin: threads wait busily for work (faster, keeps cores busy between calls).
    optimization: how far the graph is rewritten when loading; "all" copies convolution weights into this CPU's layout
    (faster runs, slower load, a second copy in memory), "extended" leaves them mapped from the file.
    unpack: make int8 weights float32 when loading (as much memory as fp32), instead of at each run.
    """

    provider: Pairs = NO_PAIRS
    fallback: bool = False
    graphs: bool = True
    keep: int = 4
    tf32: bool = False
    nhwc: bool = False
    search: Literal["heuristic", "exhaustive"] = "heuristic"
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
    filters: all, those of large pictures (at the model's own size, or the largest that is built for), or none. On the
    cpu only.
    fusions: whether a build for cuda uses ONNX Runtime's fused kernels (``graph/fused.py``): all of them, or none.
    """

    winograd: Literal["all", "large", "none"] = "large"
    fusions: Literal["all", "none"] = "none"


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
        ),
        *provided(library),
    ]


def build(source: Bundle, name: str, out: Path, options: BuildOptions) -> Artifact:
    """Optimise the graph, without what ties it to this CPU (layout transformations), and fix the sizes given."""
    library = _library()
    own = parse_options(OrtBuildOptions, options.extra, "onnxruntime")
    component = source.component(name)
    if component.artifact.engine != ONNX:
        fix = "give the bundle that sdrt export wrote"
        raise BuildError(f"{name}: is built for {component.artifact.engine} already; build starts from ONNX", fix)
    if options.target not in (None, *TARGETS):
        raise BuildError(
            f"{name}: onnxruntime builds for {' and '.join(TARGETS)}, asked for target {options.target}", "leave it out"
        )
    if options.target in PROVIDERS and options.precision not in PROVIDER_PRECISIONS:
        kinds = ", ".join(PROVIDER_PRECISIONS)
        raise BuildError(
            f"{name}: for {options.target} onnxruntime builds {kinds}; asked for {options.precision}",
            "choose one of them",
        )
    if options.target in PROVIDERS and own.winograd == "all":
        raise BuildError(f"{name}: winograd is for the cpu, the target is {options.target}", "leave it out")
    if own.fusions != "none" and options.target != "cuda":
        raise BuildError(f"{name}: fusions are for cuda, the target is {options.target or 'any'}", "--target cuda")
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    dims = fixed_dims(component, options)
    with tempfile.TemporaryDirectory(dir=out, prefix=".float32-") as scratch:
        stored, rewritten = Path(scratch, "stored"), Path(scratch, "rewritten")
        stored.mkdir()
        rewritten.mkdir()
        model, weights = float32_graph(source, component, stored)
        held = Weights(model, weights)
        if options.target == "cuda":
            facts = _build_for_cuda(source, name, model, held, weights, folder, own, options)
        elif options.target in PROVIDERS:
            facts = _build_for_older(source, name, model, held, weights, folder, options)
        elif options.precision == "fp32":
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
    names = ["model.onnx", *(file for file in ("model.onnx.data", fused.PLAIN) if (folder / file).exists())]
    return Artifact(
        engine="onnxruntime",
        precision=cast(Precision, options.precision),
        files=tuple(record(out, f"{name}/{file}") for file in names),
        target=options.target or "any",
        profiles=profiles(component, options),
        built_from=component.artifact.files[0].sha256,
        facts={"onnxruntime": library.__version__, **facts},
    )


def _build_for_cuda(
    source: Bundle, name: str, model: Any, held: Weights, folder: Path, out: Path, own: OrtBuildOptions,
    options: BuildOptions,
) -> dict[str, Any]:  # fmt: skip
    """Save the graph with nothing in it that the CUDA provider leaves to the CPU; the facts of how it was made.

    Not optimised by ONNX Runtime first: without a GPU it would optimise for the CPU.
    """
    component = source.component(name)
    # Several pictures: for one, what has a batch and what is the same for all of a batch look alike.
    known = shapes(model, usual_shapes(source, component, options, batch=3)) if own.fusions == "all" else {}
    facts = {} if options.precision == "fp32" else reduce(model, held, folder, source, component, options)
    argmax_in_float(model)
    if lacking := without_kernel(model):
        raise BuildError(
            f"{name}: onnxruntime's CUDA provider has no kernels for {listed(lacking)} in {options.precision}",
            "build it for the cpu (without --target), or for another engine",
        )
    dims = fixed_dims(component, options)
    plain, vectors = None, []
    if own.fusions == "all":
        plain = type(model)()
        plain.CopyFrom(model)
        counts = fuse(model, held, known)
        facts["fusions"] = {operator: count for operator, count in counts.items() if count}
        vectors = left_over(plain, model, held)
    fix_dims(model, dims)
    held.save(model, out, lambda done: options.report("write", 0.9 + 0.1 * done))
    if plain is not None and facts["fusions"]:
        fix_dims(plain, dims)
        save_plain(plain, model, vectors, out)
    return facts


def _build_for_older(
    source: Bundle, name: str, model: Any, held: Weights, weights: Path, folder: Path, options: BuildOptions
) -> dict[str, Any]:  # fmt: skip
    """Save the graph in opset 20, for providers that know no newer one; the facts of how it was made."""
    component = source.component(name)
    name_scales(model, shapes(model, usual_shapes(source, component, options)))
    facts = {} if options.precision == "fp32" else reduce(model, held, weights, source, component, options)
    argmax_in_float(model)
    facts["rewritten"] = as_opset20(model)
    fix_dims(model, fixed_dims(component, options))
    held.save(model, folder, lambda done: options.report("write", 0.9 + 0.1 * done))
    return facts


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


def open(bundle: Bundle, name: str, device: str | None, options: OpenOptions) -> Session:
    library = _library()
    own = parse_options(OrtOptions, options.extra, "onnxruntime")
    if own.keep < 1:
        raise InputError(f"onnxruntime: keep is {own.keep}, expected at least 1")
    chosen = None if device in (None, "cpu") else choose(library, str(device))
    _check_pairs(own, chosen)
    if device not in (None, "cpu") and chosen is None:
        raise unknown_device("onnxruntime", str(device), devices())
    if chosen is None and own.provider:
        raise InputError("onnxruntime: the cpu takes no provider options", "leave -O provider= out, or name a --device")
    artifact, word = bundle.component(name).artifact, (device or "cpu").partition(":")[0]
    if artifact.target not in (None, "any", "cpu") and word not in (artifact.target, "cpu"):
        raise DeviceError(
            f"{name}: was built for {artifact.target}, asked for {word}",
            "sdrt build ONNX_BUNDLE OUT --engine onnxruntime, without --target, builds for any device",
        )
    if chosen is None:
        settings = _settings(library, own, options)
        return OrtSession(library, bundle, name, _session(library, bundle, name, settings, CPU, {}))
    if options.threads is not None:
        raise InputError(f"onnxruntime: threads are for the cpu, the device is {device}", "leave them out")
    if chosen.provider.name == CUDA:
        return _open_cuda(library, bundle, name, chosen, own, options)
    settings = _settings(library, own, options)
    settings.enable_mem_pattern = False  # as DirectML asks for
    asked = {**chosen.provider.options, **chosen.options, **dict(own.provider)}
    session = _checked(library, bundle, name, settings, chosen, asked, own)
    return OrtSession(library, bundle, name, session)


def _check_pairs(own: OrtOptions, chosen: Chosen | None) -> None:
    """InputError for a provider option that says what sdrt says already: half of it would go by the one, half by the
    other."""
    ours = dict.fromkeys(chosen.options, "--device") if chosen is not None else {}
    if chosen is not None and chosen.provider.name == CUDA:
        ours |= OURS_ON_CUDA
    for key, _ in own.provider:
        if key in ours:
            raise InputError(
                f"onnxruntime: -O provider={key}=... is said by {ours[key] or 'sdrt itself'}",
                f"leave it out{f', and use {ours[key]}' if ours[key] else ''}",
            )


def _open_cuda(
    library: Any, bundle: Bundle, name: str, chosen: Chosen, own: OrtOptions, options: OpenOptions
) -> CudaSession:  # fmt: skip
    hint = preload(library)
    graphs = own.graphs and not own.fallback  # what runs on the CPU cannot be recorded

    def make(stream: int, dims: Mapping[str, int]) -> Any:
        asked = {
            **chosen.options,
            "user_compute_stream": str(stream),
            "enable_cuda_graph": str(int(graphs)),
            "use_tf32": str(int(own.tf32)),
            "prefer_nhwc": str(int(own.nhwc)),
            "cudnn_conv_algo_search": own.search.upper(),
            # Sizes are few and known: doubling would take up to twice the memory that is needed.
            "arena_extend_strategy": "kSameAsRequested",
            **dict(own.provider),
        }
        settings = _settings(library, own, options)
        for dim, size in dims.items():
            settings.add_free_dimension_override_by_name(dim, size)
        return _checked(library, bundle, name, settings, chosen, asked, own, hint)

    spec = bundle.component(name)
    return CudaSession(library, spec, name, chosen.index, make, graphs=graphs, keep=own.keep, fixed=own.nhwc)


def _settings(library: Any, own: OrtOptions, options: OpenOptions) -> Any:
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
    return settings


def _session(
    library: Any, bundle: Bundle, name: str, settings: Any, provider: str, asked: Mapping[str, str]
) -> Any:  # fmt: skip
    files = [bundle.path(file.path) for file in bundle.component(name).artifact.files]
    # Some of the fused kernels are CUDA's alone.
    entry = next((file for file in files if file.name == fused.PLAIN and provider == CPU), files[0])
    try:
        # enable_fallback: a provider that fails would be replaced by the CPU, and a message printed.
        if any(
            known.plugin for known in PROVIDERS.values() if known.name == provider
        ):  # it is asked for by its devices
            found = [device for device in library.get_ep_devices() if device.ep_name == provider]
            settings.add_provider_for_devices(found, dict(asked))
            return library.InferenceSession(str(entry), settings, enable_fallback=0)
        return library.InferenceSession(str(entry), settings, [(provider, dict(asked))], enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions share no base class
        said = str(error)
        if "provider option" in said:
            raise InputError(
                f"onnxruntime's {provider} refuses an option: {said.rpartition('Parse ')[2]}",
                "correct it, or leave it out of -O provider=",
            ) from error
        if "assigned to the default CPU EP" in said or "have not been partitioned" in said:
            missing = "" if provider == CUDA else ", or could not be made here, which its own messages say"
            raise DeviceError(
                f"{name}: {provider} has no kernels for all of the graph{missing}", _fix(provider, asked)
            ) from error
        if provider != CPU and "CUDA failure" in said:
            raise DeviceError(f"{name}: {provider} cannot be used: {said}", "sdrt doctor lists devices") from error
        if provider != CPU and ("shared object" in said or "LoadLibrary" in said or "Failed to load library" in said):
            raise DeviceError(
                f"{name}: {provider} cannot be loaded: {said}", "is the driver, or the vendor's library, installed?"
            ) from error
        if provider not in (CPU, CUDA):
            raise DeviceError(f"{name}: {provider} cannot load the graph: {said}", _fix(provider, asked)) from error
        raise BundleError(
            f"{name}: onnxruntime {library.__version__} cannot load {entry.name}: {error}",
            f"sdrt verify {bundle.root} tells whether the files are damaged",
        ) from error


def _fix(provider: str, asked: Mapping[str, str]) -> str:
    least = "-O fallback=true runs the rest on the CPU"
    if asked.get("prefer_nhwc") == "1":
        return f"sdrt build ONNX_BUNDLE OUT --engine onnxruntime --target cuda -O fusions=all; no nhwc=true; or {least}"
    word = next(word for word, known in PROVIDERS.items() if known.name == provider)
    sizes = "" if provider == CUDA else " --shape WxH --batch N"  # of free sizes, arithmetic on sizes is left
    return f"sdrt build ONNX_BUNDLE OUT --engine onnxruntime --target {word}{sizes}; or {least}"


def _checked(
    library: Any, bundle: Bundle, name: str, settings: Any, chosen: Chosen, asked: Mapping[str, str], own: OrtOptions,
    hint: str = "",
) -> Any:  # fmt: skip
    """A session that runs where it was asked to."""
    settings.add_session_config_entry(RECORD, "1")
    if not own.fallback and chosen.provider.name != CUDA:
        settings.add_session_config_entry(NO_FALLBACK, "1")
    session = _session(library, bundle, name, settings, chosen.provider.name, asked)
    check_provider(name, session, chosen, asked, hint)
    if left := left_to_cpu(session):
        text = f"{name}: {chosen.provider.name} has no kernels for {listed(left)}"
        if not own.fallback:
            raise DeviceError(text, _fix(chosen.provider.name, asked))
        logger.warning("%s; the CPU runs them", text)
    return session


class OrtSession:
    """One graph, fed from host memory. Constants are wrapped once, inputs read in place; outputs are ONNX Runtime's.

    (np.asarray with an order, as np.ascontiguousarray would make a scalar an array of one.)
    """

    def __init__(self, library: Any, bundle: Bundle, name: str, session: Any) -> None:
        self.name = name
        self.spec = bundle.component(name)
        self._session = session
        self._from_numpy = library.OrtValue.ortvalue_from_numpy
        self._binding = session.io_binding()
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

    def memory(self) -> DeviceMemory | None:
        return None

    def close(self) -> None:
        self._kept.clear()
        del self._binding, self._session
