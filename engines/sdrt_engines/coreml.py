"""Core ML: Apple's GPUs, neural engines and CPUs. ``build`` runs anywhere; ``open`` predicts on a Mac.

Everywhere else there is the ``verifier``, which evaluates a saved package slowly (``sdrt_engines.mil.evaluate``): it
checks a build, and can make a picture to look at, when it is asked for by its name. Sizes are fixed when building; a
package of several sizes has one function for each, and its weights once.

https://apple.github.io/coremltools
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np

from sdrt import processor
from sdrt.bundle import Artifact, Bundle, Component, DimRange, Precision, fits, record, solve, split_dim
from sdrt.engine import ONNX, Array, BuildOptions, Device, DeviceMemory, OpenOptions, parse_options, unknown_device
from sdrt.errors import BuildError, BundleError, DeviceError, EngineUnavailable, InputError, NumericsError, quoted
from sdrt_engines import coreml_contract as contract
from sdrt_engines.graph import load_graph
from sdrt_engines.graph.external import Weights
from sdrt_engines.graph.precision import reduce
from sdrt_engines.graph.storage import float32_graph
from sdrt_engines.mil import package
from sdrt_engines.mil.evaluate import evaluate
from sdrt_engines.mil.palettize import Palette
from sdrt_engines.mil.program import TARGETS, Network, function_names, save
from sdrt_engines.mil.quiet import imported
from sdrt_engines.mil.translate import Style

logger = logging.getLogger("sdrt")

OPENS = ("coreml",)
INSTALL = "pip install 'sdrt[coreml]'"
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "w8", "w6", "w4")
MEASURES: tuple[Precision, ...] = ("fp16", "w8", "w6", "w4")
CACHES = False
PLAIN: Mapping[str, str] = {}

VERIFIER = "verifier"
MAC = sys.platform == "darwin"
CHECKS_ON = None if MAC else VERIFIER

UNITS = {"all": "ALL", "cpu+gpu": "CPU_AND_GPU", "cpu+ne": "CPU_AND_NE", "cpu": "CPU_ONLY"}
"""Devices on a Mac, as coremltools' ``ComputeUnit`` calls them."""

CHANNELS = 16
"""Output channels that share a table of 16 values, where there may be several tables."""

SQUARED = 127.0
"""Norms that see larger numbers stay in float32: float16 holds the square of 255, and other prompts than those that
are measured with may give twice as much (``calibration.RANGES``)."""

MAX_BATCH = 4096


@dataclass(frozen=True)
class CoreMLBuildOptions:
    """``-O name=value`` when building.

    attention: "original" writes products and softmax of all heads; "split_einsum" the denoiser's channels first and
    head by head, as the neural engine likes it; "fused" is Core ML's own operator, from ios18 on.
    chunk_unet: the denoiser in two packages of about half of the weights each, for phones: an app holds one at a time.
    """

    attention: Literal["original", "split_einsum", "fused"] = "original"
    chunk_unet: bool = False


@dataclass(frozen=True)
class CoreMLOptions:
    """There are no options when opening."""


def _library() -> Any:
    try:
        coremltools = imported()
    except ImportError as error:
        raise EngineUnavailable(f"coremltools cannot be imported: {error}", INSTALL) from None
    if not hasattr(coremltools.target, TARGETS["ios18"]):
        raise EngineUnavailable(f"coremltools {coremltools.__version__} is too old for ios18", INSTALL)
    return coremltools


def elsewhere(artifact: Artifact) -> str:
    return ""


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
    profiles, sizes = _profiles(source, component, options), _sizes(source, options)
    _check_target(name, target, own, len(sizes))
    if name == source.manifest.denoiser.component:
        _check_attention(name, component, source, own)
    functions = function_names(sizes)
    batch = 2 * (options.batch or 1) if name == source.manifest.denoiser.component else 1
    half = options.precision != "fp32"
    inputs, outputs = contract.input_ports(name, component, half), contract.output_ports(name, component)
    chunks = 2 if own.chunk_unet and name == source.manifest.denoiser.component else 1
    packages = contract.package_names(name, chunks)
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
            grouped = target == "ios18"
            palette = Palette(bits, grouped, CHANNELS if grouped and bits == 4 else 0)
        split = own.attention == "split_einsum" and name != source.manifest.denoiser.component
        style = Style("original" if split else own.attention, palette)
        # A component that knows no size has them all, too: an app asks each package for the same function.
        shared = next(iter(profiles), {})
        known = profiles if len(profiles) == len(functions) else (shared,) * len(functions)
        each = dict(zip(functions, known, strict=True))
        network = Network(library, graph, weights, component, each, batch, inputs, outputs, style, target)
        for i, (folder, program) in enumerate(zip(packages, network.programs(chunks), strict=True)):
            options.report("write", 0.8 + 0.2 * i / chunks)
            save(library, program, out / folder, target)
            del program
    facts |= _palette_facts(palette)
    files = [f"{folder}/{file}" for folder in packages for file in (package.MODEL, package.WEIGHTS, package.MANIFEST)]
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
            "coremltools": library.__version__, "attention": style.attention, "batch": batch, "packages": packages,
            "functions": functions,
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


def _check_attention(name: str, component: Component, source: Bundle, own: CoreMLBuildOptions) -> None:
    """BuildError where a way to write attention was asked for, and there is no operator to be written so."""
    if own.attention == "original":
        return
    graph = load_graph(source.path(component.artifact.files[0].path))
    if not any(node.op_type == "Attention" for node in graph.graph.node):
        raise BuildError(
            f"{name}: its graph has attention as products and a softmax, which -O attention={own.attention} does not"
            " find",
            "leave it out, or export the checkpoint with sdrt export",
        )


def _sizes(source: Bundle, options: BuildOptions) -> list[tuple[int, int]]:
    """(width, height) of each size; the model's own when none is given."""
    space = source.manifest.latents
    return list(dict.fromkeys(options.shapes or ((space.default_width, space.default_height),)))


def _profiles(source: Bundle, component: Component, options: BuildOptions) -> tuple[dict[str, DimRange], ...]:
    """One a size. The batch is free: a session makes calls of the package's own."""
    symbols = {split_dim(dim)[0] for spec in component.inputs for dim in spec.shape if isinstance(dim, str)}
    tokens = max((text.max_length for text in source.manifest.text_encoders), default=77)
    fixed = {"T": DimRange(tokens, tokens, tokens)} if "T" in symbols else {}
    if not {"H", "W"} <= symbols:
        return (fixed,) if fixed else ()
    return tuple({**fixed, "H": DimRange(h, h, h), "W": DimRange(w, w, w)} for w, h in _sizes(source, options))


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
    folders = [bundle.path(f"{folder}/{package.MODEL}").parents[2] for folder in _packages(bundle.component(name))]
    load: _Load = _Verifier if chosen == VERIFIER else lambda where: _Predictor(library, where, UNITS[chosen])
    return CoreMLSession(bundle, name, [load(folder) for folder in folders], compares=chosen == VERIFIER)


def _packages(component: Component) -> list[str]:
    """The folders of the artifact's packages, in order. BundleError where its facts are not ours."""
    named = component.artifact.facts.get("packages")
    held = {file.path for file in component.artifact.files}
    if not isinstance(named, list) or not named or not all(f"{name}/{package.MODEL}" in held for name in named):
        raise BundleError("the artifact does not say which packages it has", "build it again")
    return named


def _batch(artifact: Artifact) -> int:
    """Rows of a call. BundleError where the facts are not ours."""
    told = artifact.facts.get("batch", 1)
    if type(told) is not int or not 1 <= told <= MAX_BATCH:
        raise BundleError(f"the artifact's batch is {quoted(told)}, expected 1 to {MAX_BATCH}", "build it again")
    return told


def _functions(artifact: Artifact) -> list[str]:
    """The functions of its packages, one for each profile, or for all. BundleError where the facts are not ours."""
    told = artifact.facts.get("functions")
    if not isinstance(told, list) or not all(isinstance(one, str) for one in told):
        raise BundleError("the artifact does not say which functions it has", "build it again")
    if not told or len(artifact.profiles) > len(told):
        raise BundleError(f"the artifact has {len(artifact.profiles)} sizes, {len(told)} functions", "build it again")
    return told


class _Runs(Protocol):
    """Computes one call of a package's function."""

    def run(self, function: str, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        """Outputs by the package's names. feeds may hold more than its inputs."""


class _Load(Protocol):
    def __call__(self, folder: Path) -> _Runs: ...


class _Verifier:
    def __init__(self, folder: Path) -> None:
        self._package = package.read(folder)

    def run(self, function: str, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        if (found := self._package.functions.get(function)) is None:
            held = ", ".join(self._package.functions)
            raise BundleError(f"a package has no function {function}; it has {held}", "sdrt verify tells more")
        return evaluate(found, feeds)


class _Predictor:
    """Core ML itself, through coremltools. The function of each size is loaded when it is first called."""

    def __init__(self, library: Any, folder: Path, units: str) -> None:
        self._library, self._folder, self._units = library, folder, units
        self._models: dict[str, Any] = {}
        # Not MLModel.input_description, which tells of packages with one function only.
        told = library.utils.load_spec(str(folder)).description
        inputs = {one.name: one.input for one in told.functions} or {contract.FUNCTION: told.input}
        self._inputs = {name: [one.name for one in held] for name, held in inputs.items()}

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
            wanted = {name: feeds[name] for name in self._inputs[function]}
            made: Mapping[str, Array] = self._models[function].predict(wanted)
        except Exception as error:
            raise NumericsError(f"{self._folder.name}: Core ML failed while running: {error}") from error
        return made


class CoreMLSession:
    """One package. Calls of any batch become calls of the package's own; the last one is filled up.

    compares: hold the functions of a component that knows no size, of which an app takes any, against each other once.
    """

    def __init__(self, bundle: Bundle, name: str, runs: Sequence[_Runs], *, compares: bool = False) -> None:
        self._name, self.spec = name, bundle.component(name)
        self._runs = list(runs)
        artifact = self.spec.artifact
        self._profiles = artifact.profiles
        self._batch, self._functions = _batch(artifact), _functions(artifact)
        self._inputs, self._outputs = (contract.from_facts(self.spec, side) for side in ("inputs", "outputs"))
        self._specs = {spec.name: spec for spec in (*self.spec.inputs, *self.spec.outputs)}
        sized = len(self._profiles) == len(self._functions)
        self._same = [] if sized or not compares else self._functions[1:]
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
        return parts[0] if len(parts) == 1 else {n: np.concatenate([part[n] for part in parts]) for n in parts[0]}

    def memory(self) -> DeviceMemory | None:
        return None

    def close(self) -> None:
        self._runs.clear()
        self._kept.clear()

    def _function(self, sizes: Mapping[str, int]) -> str:
        for profile, function in zip(self._profiles, self._functions, strict=False):  # the text has one profile only
            if fits(profile, sizes):
                return function
        return self._functions[0]

    def _call(
        self, function: str, arrays: Mapping[str, Array], start: int, sizes: Mapping[str, int]
    ) -> dict[str, Array]:
        count = min(self._batch, sizes.get("B", 1) - start)
        rows = [*range(start, start + count)] + [start] * (self._batch - count)
        feeds = {}
        for port in self._inputs:
            batched = "B" in self._specs[port.tensor].shape
            array = arrays[port.tensor][rows] if batched else arrays[port.tensor]
            feeds[port.name] = port.laid_out(array, self._batch)
        given = self._given(function, feeds)
        while self._same:
            again = self._given(other := self._same.pop(), feeds)
            if different := [name for name, array in given.items() if not np.array_equal(array, again[name], True)]:
                raise NumericsError(
                    f"{self._name}: the functions {function} and {other} are of the same network, and differ in"
                    f" {different[0]}",
                    "build it again; please report it with the output of sdrt doctor if it is as it was built",
                )
        return {name: array[:count] if "B" in self._specs[name].shape else array for name, array in given.items()}

    def _given(self, function: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs of one call, by the component's names."""
        made = dict(feeds)
        for runs in self._runs:  # each takes what it has inputs for of what there is
            made = made | dict(runs.run(function, made))
        if lacking := [port.name for port in self._outputs if port.name not in made]:
            raise BundleError(f"{self._name}: its packages give no {lacking[0]}", "sdrt verify tells more")
        return {port.tensor: made[port.name].astype(np.float32, copy=False) for port in self._outputs}
