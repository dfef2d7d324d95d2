"""OpenVINO: Intel CPUs, GPUs and NPUs, and any other x86 or ARM CPU. ``build`` writes IR, ``open`` compiles it.

IR keeps every size free; a session compiles the network for each size that it meets, since that is faster than one
network for every size (benchmarks/LOG.md), and is what an NPU needs. What is computed in is set, never left to a
device: float32, unless the artifact is in bf16, or in fp16 and the device has float16, or ``-O compute=`` says so.

https://docs.openvino.ai/2026/openvino-workflow/running-inference.html
"""

from __future__ import annotations

import functools
import logging
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from sdrt import processor
from sdrt.bundle import MANIFEST, Artifact, Bundle, Component, Precision, record, solve
from sdrt.engine import (
    NUMPY_DTYPES,
    ONNX,
    Array,
    BuildOptions,
    Device,
    DeviceMemory,
    OpenOptions,
    parse_options,
    unknown_device,
)
from sdrt.errors import BuildError, BundleError, DeviceError, EngineUnavailable, InputError, NumericsError
from sdrt_engines import openvino_tokenizer
from sdrt_engines.checked_cache import checked
from sdrt_engines.graph.external import Weights
from sdrt_engines.graph.precision import reduce
from sdrt_engines.graph.shapes import profiles, usual_shapes
from sdrt_engines.graph.storage import float32_graph
from sdrt_engines.graph.winograd import winograd
from sdrt_engines.openvino_graph import for_tiles, without_splits

logger = logging.getLogger("sdrt")

OPENS = ("openvino",)
INSTALL = "pip install 'sdrt[openvino]'"
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8", "w8")
MEASURES: tuple[Precision, ...] = ("fp16", "int8")
CACHES = True
CHECKS_ON = None
PLAIN: Mapping[str, str] = {"winograd": "none"}

MODEL = "openvino_model.xml"
WEIGHTS = "openvino_model.bin"
"""As optimum-intel and OpenVINO GenAI call them."""

TIMESTEP = "timestep"
AUTO = "auto"
"""OpenVINO's own choice among the devices that are here; taken only when asked for by this name."""

_DTYPES = {
    "f32": "f32",
    "f16": "f16",
    "bf16": "bf16",
    "i64": "i64",
    "i32": "i32",
    "u8": "u8",
    "i8": "i8",
    "boolean": "bool",
}
_CAPABILITY = {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}


@dataclass(frozen=True)
class OpenVinoOptions:
    """``-O name=value`` when opening.

    compute: the type that is computed in; a device that has no such type is refused. Left out: bf16 for an artifact in
    bf16; f16 for one in fp16 where the device has it; else f32.
    hint: what the device is tuned for: the time of one call, or calls from several sessions at a time.
    streams: parts that the device's cores are divided into; 0 leaves it to the hint.
    shapes: "each" compiles the network for each size that comes, and keeps the last ``keep`` of them; "any" compiles it
    once for all sizes (no time lost when sizes change, slower calls).
    """

    compute: Literal["auto", "f32", "bf16", "f16"] = "auto"
    hint: Literal["latency", "throughput"] = "latency"
    streams: int = 0
    shapes: Literal["each", "any"] = "each"
    keep: int = 1


@dataclass(frozen=True)
class OpenVinoBuildOptions:
    """``-O name=value`` when building.

    weight_bits: bits that int8 weights use. CPUs without VNNI add two products in 16 bits, which overflow where weights
    use 8 bits: 34 dB instead of 46 for a text encoder (benchmarks/LOG.md). 8 is for devices known to be newer.
    winograd: which 3x3 convolutions of an fp32 build save half of their multiplications, at twice the memory for their
    filters: all, those of large pictures (at the model's own size, or the largest that is built for), or none. Such a
    build computes in f32 only.
    """

    weight_bits: Literal["7", "8"] = "7"
    winograd: Literal["all", "large", "none"] = "large"


def _library() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise EngineUnavailable(f"openvino cannot be imported: {error}", INSTALL) from None
    return openvino


@functools.cache
def _core() -> Any:
    """One for the process: a second one would load every device's plugin again."""
    return _library().Core()


def elsewhere(artifact: Artifact) -> str:
    return ""


def devices() -> Sequence[Device]:
    library = _library()
    found = []
    for name in _core().available_devices:
        try:
            full = str(_core().get_property(name, "FULL_DEVICE_NAME"))
            capabilities = [c for c in _capabilities(name) if c in (*_CAPABILITY.values(), "INT8")]
        except RuntimeError as error:  # a broken driver is no reason to do without the processor
            logger.warning("openvino's %s is left out, it cannot be asked: %s", name, error)
            continue
        what = f"{full}, {' '.join(capabilities)}, openvino {library.__version__.split('-')[0]}"
        found.append(Device(name.lower(), what, _memory(name)))
    if not found:
        raise EngineUnavailable("this openvino finds no device", INSTALL)
    return found


def _capabilities(device: str) -> list[str]:
    return list(_core().get_property(device, "OPTIMIZATION_CAPABILITIES"))


def _memory(device: str) -> int:
    """Bytes; 0 where the device does not tell."""
    if device == "CPU":
        return processor.memory()
    try:
        return int(_core().get_property(device, f"{device.partition('.')[0]}_DEVICE_TOTAL_MEM_SIZE"))
    except RuntimeError:
        return 0


# -- build ------------------------------------------------------------------------------------------------------------


def build(source: Bundle, name: str, out: Path, options: BuildOptions) -> Artifact:
    """Convert a component to IR; what is computed in is the matter of ``open``.

    ``fp16`` and ``bf16`` store weights in float16: OpenVINO makes float32 of stored bfloat16 first, in three times the
    memory.
    """
    library = _library()
    own = parse_options(OpenVinoBuildOptions, options.extra, "openvino")
    component = source.component(name)
    if options.precision == "bf16" and not any("BF16" in _capabilities(device) for device in _core().available_devices):
        raise BuildError(
            f"{name}: nothing here computes in bfloat16, so that a build in it could not be checked",
            "build in fp16, and open it with -O compute=bf16 where there is bfloat16",
        )
    if component.artifact.engine != ONNX:
        fix = "give the bundle that sdrt export wrote"
        raise BuildError(f"{name}: is built for {component.artifact.engine} already; build starts from ONNX", fix)
    if options.target not in (None, "any"):
        fix = "leave it out"
        raise BuildError(f"{name}: IR runs on any device of OpenVINO's, asked for target {options.target}", fix)
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".openvino-") as scratch:
        entry, facts = _graph_file(source, component, options, own, Path(scratch))
        options.report("convert", 0.9)
        try:
            model = _core().read_model(entry)
            _with_ecosystem_timestep(library, model)
            _hide_pointwise_weights(model)
            without_splits(model)
            library.save_model(model, folder / MODEL, compress_to_fp16=options.precision in ("fp16", "bf16"))
        except RuntimeError as error:
            raise BuildError(f"{name}: openvino {library.__version__} cannot convert the graph: {error}") from error
        del model  # its weights are mapped from the folder that goes now
    files = [f"{name}/{file}" for file in (MODEL, WEIGHTS)]
    for text in source.manifest.text_encoders:
        if text.component == name:
            openvino_tokenizer.save(source.path(text.tokenizer), text, out / text.tokenizer)
            files += [f"{text.tokenizer}/{file}" for file in openvino_tokenizer.FILES]
    return Artifact(
        engine="openvino",
        precision=cast(Precision, options.precision),
        files=tuple(record(out, file) for file in files),
        target="any",
        profiles=profiles(component, options),
        built_from=component.artifact.files[0].sha256,
        facts={"openvino": library.__version__, **facts},
    )


def _graph_file(
    source: Bundle, component: Component, options: BuildOptions, own: OpenVinoBuildOptions, scratch: Path
) -> tuple[Path, dict[str, Any]]:
    """The component's graph as it is to be converted, and the facts of how it was made.

    Its weights lie where OpenVINO reads them: it follows no link out of the graph's folder, such as those of the
    Hugging Face Hub's cache.
    """
    float32, rewritten = scratch / "float32", scratch / "rewritten"
    float32.mkdir()
    rewritten.mkdir()
    graph, stored = float32_graph(source, component, float32)
    weights = Weights(graph, stored)
    facts: dict[str, Any] = {}
    if options.precision in ("int8", "w8"):
        facts = reduce(graph, weights, stored, source, component, options, weight_bits=int(own.weight_bits))
    elif options.precision == "fp32":
        facts = winograd(graph, weights, own.winograd, usual_shapes(source, component, options))
    weights.save(graph, rewritten, lambda done: options.report("write", 0.8 + 0.1 * done))
    return rewritten / "model.onnx", facts


def _with_ecosystem_timestep(library: Any, model: Any) -> None:
    """Take timesteps in int64, as OpenVINO GenAI hands them over, and convert them to float32 first.

    ``_read`` takes that back, so that fractional timesteps are kept.
    """
    layout = library.preprocess.PrePostProcessor(model)
    clocks = [port.any_name for port in model.inputs if TIMESTEP in port.names]
    for name in clocks:
        layout.input(name).tensor().set_element_type(library.Type.i64)
    if clocks:
        layout.build()


def _hide_pointwise_weights(model: Any) -> None:
    """Scale the int8 weights of 1x1 convolutions as matrices, and give them their two ones afterwards.

    OpenVINO 2026.4 would make matrix products of such convolutions, with wrong shapes where a picture is so small that
    batch, height and width are taken for each other ([2,C,1,1] became [2,C,2,1]).
    """
    from openvino import opset13 as opset

    for node in model.get_ops():
        scaled = node.input_value(1).get_node() if node.get_type_name() == "Convolution" else None
        if scaled is None or scaled.get_type_name() != "Multiply":
            continue
        shape = list(node.input_value(1).get_shape())
        values, scales = (scaled.input_value(i) for i in (0, 1))
        first, *others = list(scales.get_shape()) or [1]
        if shape[2:] == [1, 1] and first in (1, shape[0]) and math.prod(others) == 1:
            matrix = opset.multiply(
                opset.reshape(values, shape[:2], special_zero=False), opset.reshape(scales, [-1, 1], special_zero=False)
            )
            kernel = opset.reshape(matrix, shape, special_zero=False)
            node.input(1).replace_source_output(kernel.output(0))


# -- open -------------------------------------------------------------------------------------------------------------


def open(bundle: Bundle, name: str, device: str | None, options: OpenOptions) -> OpenVinoSession:
    library = _library()
    own = parse_options(OpenVinoOptions, options.extra, "openvino")
    if own.keep < 1 or own.streams < 0:
        raise InputError(f"openvino: keep is {own.keep} and streams {own.streams}, expected at least 1 and 0")
    held = devices()
    chosen = held[0].name if device is None else device
    if chosen != AUTO and chosen not in [d.name for d in held]:
        raise unknown_device("openvino", chosen, held)
    artifact = bundle.component(name).artifact
    if own.shapes == "any" and chosen.startswith("npu"):
        raise InputError("openvino: an npu takes one size at a time, shapes is any", "leave -O shapes out")
    compute = _compute(name, chosen, artifact, own)
    _check_weight_bits(name, chosen, artifact)
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": own.hint.upper(),
        "INFERENCE_PRECISION_HINT": getattr(library.Type, compute),
    }
    if own.streams:
        settings["NUM_STREAMS"] = own.streams
    if options.threads is not None:
        if chosen != "cpu":
            raise InputError(f"openvino: threads are for the cpu, the device is {chosen}", "leave them out")
        settings["INFERENCE_NUM_THREADS"] = options.threads
    if options.cache is not None:
        # With weights from the bundle: what is left in the cache is a few megabytes, whose hashes cost nothing.
        weights = bundle.path(artifact.files[1].path)
        settings |= {"CACHE_DIR": str(options.cache), "CACHE_MODE": "OPTIMIZE_SIZE", "WEIGHTS_PATH": str(weights)}
    tiles = compute == "bf16" and chosen == "cpu" and "amx_bf16" in processor.features()
    return OpenVinoSession(bundle, name, chosen, settings, own, tiles=tiles)


def _compute(name: str, device: str, artifact: Artifact, options: OpenVinoOptions) -> str:
    """What to compute in; DeviceError when the device has no such type, or the artifact is not for it."""
    listed = [] if device == AUTO else _capabilities(device.upper())
    if options.compute == "auto":
        asked = "bf16" if artifact.precision == "bf16" else "f32"
        if artifact.precision == "fp16" and "FP16" in listed:
            asked = "f16"
    else:
        asked = options.compute
    if device == AUTO and asked != "f32":
        # The choice may come after compiling, and may change: there is nothing to check or to read back.
        raise DeviceError(f"openvino's auto cannot promise to compute in {asked}", f"name the device: {_named()}")
    # The NPU lists what its compiler takes; GPUs and CPUs what they compute in.
    lacks = bool(listed) and _CAPABILITY[asked] not in listed
    has = [short for short, capability in _CAPABILITY.items() if capability in listed]
    if artifact.facts.get("winograd") and (asked != "f32" or lacks):
        raise DeviceError(
            f"{name}: was built with Winograd's convolutions, too coarse for anything but f32; asked for {asked}, "
            f"{device} has {', '.join(has) or 'not said what'}",
            "sdrt build ONNX_BUNDLE OUT --engine openvino -O winograd=none" + ("" if lacks else ", or -O compute=f32"),
        )
    if lacks:
        raise DeviceError(
            f"openvino's {device} does not compute in {asked} here; it has {', '.join(has)}",
            f"-O compute={has[0]}" if has else "choose another device",
        )
    return asked


def _named() -> str:
    return ", ".join(device.name for device in devices())


def _check_weight_bits(name: str, device: str, artifact: Artifact) -> None:
    """DeviceError for 8-bit weights on an x86 CPU whose sums of products would overflow, or that does not tell."""
    features = processor.features()
    overflows = processor.is_x86() and not {"avx512_vnni", "avx_vnni"} & set(features)
    if (
        device in ("cpu", AUTO)
        and overflows
        and artifact.precision == "int8"
        and artifact.facts.get("weight_bits") == 8
    ):
        raise DeviceError(
            f"{name}: was built with weight_bits=8, and this processor {'has' if features else 'is not known to have'} "
            f"{'no ' if features else ''}VNNI: sums would overflow in 16 bits",
            "sdrt build ONNX_BUNDLE OUT --engine openvino --precision int8, without -O weight_bits=8",
        )


class OpenVinoSession:
    """One network, compiled for each size that comes. Inputs are read in place, outputs are new arrays each call."""

    def __init__(
        self, bundle: Bundle, name: str, device: str, settings: Mapping[str, Any], options: OpenVinoOptions, *,
        tiles: bool = False,
    ) -> None:  # fmt: skip
        """``tiles``: whether the processor multiplies in tiles, see ``for_tiles``."""
        self.name = name
        self.spec = bundle.component(name)
        self._device, self._settings, self._options, self._tiles = device, settings, options, tiles
        self._bundle = bundle
        # Kept until it is compiled, which maps the weights again; another size reads it anew, in a tenth of a second.
        self._model = _read(bundle, name)
        self._requests: dict[Any, Any] = {}  # by the inputs' shapes, the one used last at the end
        self._kept: dict[str, Array] = {}
        self._holds_kept: Any = None
        self._compilations = 0
        if options.shapes == "any":
            self._requests[None] = self._compiled()

    def prepare(self, sizes: Mapping[str, int]) -> bool:
        before = self._compilations
        self._request({spec.name: spec.at(sizes) for spec in self.spec.inputs})
        return self._compilations > before

    def bind(self, **constants: Array) -> None:
        self._kept |= {name: np.array(array, order="C") for name, array in constants.items()}
        self._holds_kept = None

    def run(self, **inputs: Array) -> dict[str, Array]:
        # OpenVINO shares no array that cannot be written, such as a timestep that was broadcast to a batch.
        arrays = {name: np.require(array, requirements=["C", "W"]) for name, array in inputs.items()}
        shapes = {name: array.shape for name, array in (self._kept | arrays).items()}
        request = self._request(shapes)
        if self._holds_kept is not request:
            arrays = self._kept | arrays
        sizes = solve(self.spec.inputs, shapes)
        outputs = {o.name: np.empty(o.at(sizes), NUMPY_DTYPES[o.dtype]) for o in self.spec.outputs}
        tensor = _library().Tensor
        try:
            for name, array in (arrays | outputs).items():
                request.set_tensor(name, tensor(array, shared_memory=True))
            self._holds_kept = request
            request.infer()
        except RuntimeError as error:
            raise NumericsError(f"{self.name}: openvino failed while running: {error}") from error
        return outputs

    def memory(self) -> DeviceMemory | None:
        return None

    def close(self) -> None:
        self._requests.clear()
        self._kept.clear()
        self._holds_kept = self._model = None

    def _request(self, shapes: Mapping[str, tuple[int, ...]]) -> Any:
        if self._options.shapes == "any":
            return self._requests[None]
        key = tuple(shapes[spec.name] for spec in self.spec.inputs)
        request = self._requests.pop(key, None)
        if request is None:
            while len(self._requests) >= self._options.keep:  # before another one takes memory
                del self._requests[next(iter(self._requests))]
                self._holds_kept = None
            request = self._compiled(shapes)
        self._requests[key] = request
        return request

    def _compiled(self, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Any:
        """A request of the network as compiled for these shapes, or for all; DeviceError."""
        started = time.perf_counter()
        self._compilations += 1
        model, self._model = self._model if self._model is not None else _read(self._bundle, self.name), None
        try:
            if shapes is not None:
                model.reshape({name: list(shape) for name, shape in shapes.items()})
                if self._tiles:
                    for_tiles(model)
            with checked(self._settings.get("CACHE_DIR")):
                compiled = _core().compile_model(model, self._device.upper(), dict(self._settings))
        except RuntimeError as error:
            raise DeviceError(
                f"{self.name}: openvino {_library().__version__} cannot compile for {self._device}: {error}",
                f"sdrt verify {self._bundle.root} tells whether the files are damaged",
            ) from error
        asked = self._settings["INFERENCE_PRECISION_HINT"]
        if self._device != AUTO and (got := compiled.get_property("INFERENCE_PRECISION_HINT")) != asked:
            raise DeviceError(f"{self.name}: openvino's {self._device} computes in {got}, asked for {asked}")
        logger.debug("%s: compiled for %s in %.2f s", self.name, shapes or "all sizes", time.perf_counter() - started)
        return compiled.create_infer_request()


def _read(bundle: Bundle, name: str) -> Any:
    """The network, as the manifest describes it; BundleError."""
    library, spec = _library(), bundle.component(name)
    entry, weights = (bundle.path(file.path) for file in spec.artifact.files[:2])
    try:
        model = _core().read_model(entry, weights)
        fractional = any(told.name == TIMESTEP and told.dtype == "f32" for told in spec.inputs)
        for port in model.inputs:
            if fractional and TIMESTEP in port.names:  # in int64 for other loaders
                port.get_node().set_element_type(library.Type.f32)
        model.validate_nodes_and_infer_types()
    except RuntimeError as error:
        raise BundleError(
            f"{name}: openvino {library.__version__} cannot load {entry.name}: {error}",
            f"sdrt verify {bundle.root} tells whether the files are damaged",
        ) from error
    for told, ports in ((spec.inputs, model.inputs), (spec.outputs, model.outputs)):
        found = {str(tensor): _DTYPES.get(port.element_type.get_type_name()) for port in ports for tensor in port.names}
        for tensor in told:
            if found.get(tensor.name) != tensor.dtype:
                has = ", ".join(f"{n}: {dtype}" for n, dtype in found.items())
                raise BundleError(
                    f"{name}: the graph is not what {MANIFEST} says: it has no {tensor}; it has {has}",
                    "sdrt verify tells more",
                )
    return model
