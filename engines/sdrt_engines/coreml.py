"""Core ML: Apple's GPUs, neural engines and CPUs. ``build`` runs anywhere; ``open`` predicts on a Mac.

Everywhere else there is the ``verifier``, which evaluates a saved package slowly (``sdrt_engines.mil.evaluate``): it
checks a build, and can make a picture to look at, when it is asked for by its name. Sizes are fixed when building; a
package of several sizes has one function for each, and its weights once.

https://apple.github.io/coremltools
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np

from sdrt import processor
from sdrt.bundle import Artifact, Bundle, Component, DimRange, Precision, record, solve, split_dim
from sdrt.engine import ONNX, Array, BuildOptions, Device, OpenOptions, parse_options, unknown_device
from sdrt.errors import BuildError, DeviceError, EngineUnavailable, InputError, NumericsError
from sdrt_engines import coreml_contract as contract
from sdrt_engines.coreml_contract import Port
from sdrt_engines.graph.external import Weights
from sdrt_engines.graph.precision import reduce
from sdrt_engines.graph.storage import float32_graph
from sdrt_engines.mil import package, split_einsum
from sdrt_engines.mil.evaluate import evaluate
from sdrt_engines.mil.palettize import Palette
from sdrt_engines.mil.translate import Style, Translation, function

logger = logging.getLogger("sdrt")

OPENS = ("coreml",)
INSTALL = "pip install 'sdrt[coreml]'"
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "w8", "w6", "w4")
CACHES = False
PLAIN: Mapping[str, str] = {}

VERIFIER = "verifier"
MAC = sys.platform == "darwin"
CHECKS_ON = None if MAC else VERIFIER

UNITS = {"all": "ALL", "cpu+gpu": "CPU_AND_GPU", "cpu+ne": "CPU_AND_NE", "cpu": "CPU_ONLY"}
"""Devices on a Mac, as coremltools' ``ComputeUnit`` calls them."""

TARGETS = {"ios17": "iOS17", "ios18": "iOS18"}
"""By name: coremltools' deployment target, which stands for the macOS of the same year too (14, 15)."""

SQUARED = 255.0
"""float16 holds the square of no larger number: norms that see larger ones stay in float32."""


@dataclass(frozen=True)
class CoreMLBuildOptions:
    """``-O name=value`` when building.

    attention: "original" writes products and softmax of all heads; "split_einsum" the denoiser's channels first and
    head by head, as the neural engine likes it; "fused" is Core ML's own operator, from ios18 on.
    """

    attention: Literal["original", "split_einsum", "fused"] = "original"


@dataclass(frozen=True)
class CoreMLOptions:
    """There are no options when opening."""


def _library() -> Any:
    try:
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            import coremltools
    except ImportError as error:
        raise EngineUnavailable(f"coremltools cannot be imported: {error}", INSTALL) from None
    if not hasattr(coremltools.target, TARGETS["ios18"]):
        raise EngineUnavailable(f"coremltools {coremltools.__version__} is too old for ios18", INSTALL)
    return coremltools


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what coremltools says of other libraries' versions, and without its bars."""
    library = logging.getLogger("coremltools")
    level = library.level
    library.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        library.setLevel(level)


def devices() -> Sequence[Device]:
    version = _library().__version__
    found = []
    if MAC:
        what = {"all": "whatever Core ML chooses", "cpu+gpu": "CPU and GPU", "cpu+ne": "CPU and neural engine"}
        found = [Device(name, f"{what.get(name, 'CPU')}, coremltools {version}", processor.memory()) for name in UNITS]
    slow = "sdrt's own evaluation of saved packages, slow: to check them, where it is named"
    return [*found, Device(VERIFIER, f"{slow}; coremltools {version}", processor.memory())]


# -- build ------------------------------------------------------------------------------------------------------------


def build(source: Bundle, name: str, out: Path, options: BuildOptions) -> Artifact:
    """Write a component's package into ``out``, under the name that Apple's Swift package expects.

    Sizes are the model's own when no shape is given; tokens are one text's. The denoiser's batch is twice
    ``options.batch`` (one picture), the others' 1.
    """
    library = _library()
    own = parse_options(CoreMLBuildOptions, options.extra, "coreml")
    component = source.component(name)
    if component.artifact.engine != ONNX:
        fix = "give the bundle that sdrt export wrote"
        raise BuildError(f"{name}: is built for {component.artifact.engine} already; build starts from ONNX", fix)
    target = options.target or "ios17"
    profiles = _profiles(source, component, options)
    _check_target(name, target, own, len(profiles))
    batch = 2 * (options.batch or 1) if name == source.manifest.denoiser.component else 1
    half = options.precision != "fp32"
    inputs, outputs = contract.input_ports(name, component, half), contract.output_ports(name, component)
    folder = out / f"{contract.package_name(name)}.mlpackage"
    with tempfile.TemporaryDirectory(dir=out, prefix=".coreml-") as scratch:
        graph, stored = float32_graph(source, component, Path(scratch))
        weights = Weights(graph, stored)
        facts: dict[str, Any] = {}
        if half:
            part = replace(options, precision="fp16")
            facts = reduce(graph, weights, stored, source, component, part, largest_normed=SQUARED)
        palette = None
        if options.precision in ("w8", "w6", "w4"):
            bits = int(options.precision[1:])
            palette = Palette(bits, 16 if bits == 4 and target == "ios18" else 0)
        split = own.attention == "split_einsum" and name != source.manifest.denoiser.component
        style = Style("original" if split else own.attention, palette)
        program = _program(library, graph, weights, component, profiles, batch, (inputs, outputs), style, target)
        del weights
        options.report("write", 0.9)
        _save(library, program, folder, target)
    facts |= _palette_facts(palette)
    files = [f"{folder.name}/{file}" for file in (package.MODEL, package.WEIGHTS, package.MANIFEST)]
    if name == source.manifest.denoiser.component:
        (out / contract.SCRIPT).write_text(contract.COMPILE)
        (out / contract.SCRIPT).chmod(0o755)
        files.append(contract.SCRIPT)
    return Artifact(
        engine="coreml",
        precision=cast(Precision, options.precision),
        files=tuple(record(out, file) for file in files if (out / file).exists()),
        target=target,
        profiles=profiles,
        built_from=component.artifact.files[0].sha256,
        facts={
            "coremltools": library.__version__, "attention": own.attention, "batch": batch,
            "inputs": contract.as_facts(inputs), "outputs": contract.as_facts(outputs), **facts,
        },
    )  # fmt: skip


def _check_target(name: str, target: str, own: CoreMLBuildOptions, sizes: int) -> None:
    if target not in TARGETS:
        raise BuildError(f"{name}: coreml has no target {target!r}", f"--target {' or '.join(TARGETS)}")
    wants = {"-O attention=fused": own.attention == "fused", f"{sizes} sizes in one package": sizes > 1}
    for what, wanted in wants.items():
        if wanted and target == "ios17":
            raise BuildError(
                f"{name}: {what} cannot be built for {target}: Core ML has it from iOS 18 and macOS 15 on",
                "--target ios18, or leave it out",
            )


def _profiles(source: Bundle, component: Component, options: BuildOptions) -> tuple[dict[str, DimRange], ...]:
    """One a size. The batch is free: a session makes calls of the package's own."""
    symbols = {split_dim(dim)[0] for spec in component.inputs for dim in spec.shape if isinstance(dim, str)}
    space = source.manifest.latents
    tokens = max((text.max_length for text in source.manifest.text_encoders), default=77)
    fixed = {"T": DimRange(tokens, tokens, tokens)} if "T" in symbols else {}
    if "H" not in symbols:
        return (fixed,) if fixed else ()
    shapes = dict.fromkeys(options.shapes or ((space.default_width, space.default_height),))
    return tuple({**fixed, "H": DimRange(h, h, h), "W": DimRange(w, w, w)} for w, h in shapes)


def _function_name(profile: Mapping[str, DimRange], count: int) -> str:
    return contract.FUNCTION if count == 1 else contract.function_name(profile["W"].opt, profile["H"].opt)


def _program(
    library: Any, graph: Any, weights: Weights, component: Component, profiles: Sequence[Mapping[str, DimRange]],
    batch: int, ports: tuple[tuple[Port, ...], tuple[Port, ...]], style: Style, target: str,
) -> Any:  # fmt: skip
    """A MIL program of one function for each profile."""
    from coremltools.converters.mil.mil import Program

    opset = next(o.version for o in graph.opset_import if o.domain in ("", "ai.onnx"))
    inputs, outputs = ports
    program = Program()
    for profile in profiles or ({},):
        sizes = {"B": batch} | {symbol: range_.opt for symbol, range_ in profile.items()}
        plain = {spec.name: spec.at(sizes) for spec in component.inputs}

        def body(given: Mapping[str, Any], plain: Mapping[str, tuple[int, ...]] = plain) -> dict[str, Any]:
            values = {port.tensor: _unpacked(port, given[port.name], plain[port.tensor], style) for port in inputs}
            renamed = {port.tensor: port.name for port in outputs}
            translation = Translation(graph.graph, weights, opset, style, values, renamed)
            translation.run()
            return {port.name: split_einsum.plain(translation[port.tensor]) for port in outputs}

        with _quiet():
            made = function(
                {p.name: (p.shape(plain[p.tensor], batch), f"fp{p.dtype[1:]}") for p in inputs},
                body, getattr(library.target, TARGETS[target]),
            )  # fmt: skip
        program.add_function(_function_name(profile, len(profiles)), made)
    if len(profiles) > 1:
        program.default_function_name = _function_name(profiles[0], len(profiles))
        program.export_as_multifunction = True
    return program


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


def _save(library: Any, program: Any, folder: Path, target: str) -> None:
    """Convert without coremltools' own rewriting, which would change types and take most of the time and memory."""
    with _quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = library.convert(
            program, source="milinternal", convert_to="mlprogram", skip_model_load=True,
            minimum_deployment_target=getattr(library.target, TARGETS[target]),
            compute_precision=library.precision.FLOAT32,
            pass_pipeline=library.PassPipeline(["common::dead_code_elimination"], "sdrt"),
        )  # fmt: skip
        model.user_defined_metadata["com.github.apple.ml-stable-diffusion.version"] = "1.1.1"
        model.save(str(folder))


def _palette_facts(palette: Palette | None) -> dict[str, Any]:
    if palette is None or not palette.errors:
        return {}
    worst = max(palette.errors.items(), key=lambda item: item[1])
    return {
        "palettized": len(palette.errors), "bits": palette.bits, "channels_per_table": palette.group or "all",
        "worst_weight": {"name": worst[0], "relative_error": float(f"{worst[1]:.3g}")},
    }  # fmt: skip


# -- open -------------------------------------------------------------------------------------------------------------


def open(bundle: Bundle, name: str, device: str | None, options: OpenOptions) -> CoreMLSession:
    parse_options(CoreMLOptions, options.extra, "coreml")
    library = _library()
    if options.threads is not None:
        raise InputError("coreml: threads are Core ML's own matter", "leave them out")
    held = [d.name for d in devices()]
    if not MAC and device in (None, *UNITS):
        raise EngineUnavailable(
            f"Core ML predicts on a Mac only, and this is {sys.platform}",
            f"--device {VERIFIER} evaluates the packages here, slowly; {contract.SCRIPT} compiles them on a Mac",
        )
    chosen = held[0] if device is None else device
    if chosen not in held:
        raise unknown_device("coreml", chosen, devices())
    folder = bundle.path(bundle.component(name).artifact.files[0].path).parents[2]
    load: _Load = _Verifier if chosen == VERIFIER else lambda where: _Predictor(library, where, UNITS[chosen])
    return CoreMLSession(bundle, name, load(folder))


class _Runs(Protocol):
    """Computes one call of a package's function."""

    def run(self, function: str, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        """Outputs by the package's names."""


class _Load(Protocol):
    def __call__(self, folder: Path) -> _Runs: ...


class _Verifier:
    def __init__(self, folder: Path) -> None:
        self._package = package.read(folder)

    def run(self, function: str, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        return evaluate(self._package.functions[function], feeds)


class _Predictor:
    """Core ML itself, through coremltools. The function of each size is loaded when it is first called."""

    def __init__(self, library: Any, folder: Path, units: str) -> None:
        self._library, self._folder, self._units = library, folder, units
        self._models: dict[str, Any] = {}

    def run(self, function: str, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        if function not in self._models:
            several = {} if function == contract.FUNCTION else {"function_name": function}
            try:
                self._models[function] = self._library.models.MLModel(
                    str(self._folder), compute_units=getattr(self._library.ComputeUnit, self._units), **several
                )
            except Exception as error:  # coremltools passes on whatever Core ML says
                raise DeviceError(f"{self._folder.name}: Core ML cannot load it: {error}") from error
        try:
            made: Mapping[str, Array] = self._models[function].predict(dict(feeds))
        except Exception as error:
            raise NumericsError(f"{self._folder.name}: Core ML failed while running: {error}") from error
        return made


class CoreMLSession:
    """One package. Calls of any batch become calls of the package's own; the last one is filled up."""

    def __init__(self, bundle: Bundle, name: str, runs: _Runs) -> None:
        self.spec = bundle.component(name)
        self._runs: _Runs | None = runs
        artifact = self.spec.artifact
        self._profiles = artifact.profiles
        self._batch = int(artifact.facts.get("batch", 1))
        self._inputs, self._outputs = (contract.from_facts(artifact.facts, side) for side in ("inputs", "outputs"))
        self._specs = {spec.name: spec for spec in (*self.spec.inputs, *self.spec.outputs)}
        self._kept: dict[str, Array] = {}

    def prepare(self, sizes: Mapping[str, int]) -> bool:
        return False

    def bind(self, **constants: Array) -> None:
        self._kept |= {name: np.array(array, order="C") for name, array in constants.items()}

    def run(self, **inputs: Array) -> dict[str, Array]:
        arrays = self._kept | inputs
        sizes = solve(self.spec.inputs, {name: array.shape for name, array in arrays.items()})
        function = self._function(sizes)
        parts = [self._call(function, arrays, start, sizes) for start in range(0, sizes.get("B", 1), self._batch)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def close(self) -> None:
        self._runs = None
        self._kept.clear()

    def _function(self, sizes: Mapping[str, int]) -> str:
        for profile in self._profiles:
            if all(range_.min <= sizes[symbol] <= range_.max for symbol, range_ in profile.items()):
                return _function_name(profile, len(self._profiles))
        return contract.FUNCTION

    def _call(
        self, function: str, arrays: Mapping[str, Array], start: int, sizes: Mapping[str, int]
    ) -> dict[str, Array]:
        assert self._runs is not None
        count = min(self._batch, sizes.get("B", 1) - start)
        rows = [*range(start, start + count)] + [start] * (self._batch - count)
        feeds = {}
        for port in self._inputs:
            batched = "B" in self._specs[port.tensor].shape
            array = arrays[port.tensor][rows] if batched else arrays[port.tensor]
            feeds[port.name] = port.laid_out(array, self._batch)
        made = self._runs.run(function, feeds)
        return {port.tensor: made[port.name][:count].astype(np.float32, copy=False) for port in self._outputs}
