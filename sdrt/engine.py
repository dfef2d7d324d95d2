"""Engines and sessions: what runs a component, and the door through which every tensor goes.

An engine is a module in ``sdrt_engines``, found by its file's name. ``open_session`` returns a session that checks
each input before the engine sees it, serialises calls, and holds each output against the manifest.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import pkgutil
import re
import tempfile
import threading
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from sdrt.bundle import Artifact, Bundle, Component, Precision, TensorSpec, fits, solve
from sdrt.by_component import parse, resolve
from sdrt.errors import BuildError, BundleError, DeviceError, EngineUnavailable, InputError, quoted

Array = NDArray[Any]
T = TypeVar("T")

ONNX = "onnx"
"""``Artifact.engine`` of a component as ``sdrt export`` leaves it: a graph that no engine owns yet."""

DEFAULT_ENGINE = "onnxruntime"
"""What opens an ONNX bundle when no engine is named."""

NUMPY_DTYPES: dict[str, type[Any]] = {
    "f32": np.float32, "f16": np.float16, "i64": np.int64, "i32": np.int32, "u8": np.uint8, "i8": np.int8,
    "bool": np.bool_,
}  # fmt: skip


@dataclass(frozen=True)
class Device:
    """A device as its engine names it (lower case), what it is, and its memory in bytes (0 when not known)."""

    name: str
    description: str
    memory: int = 0


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes that one session holds on its device.

    tensors: inputs and outputs, of all sizes that are kept. activations: what the network works in, the session's own.
    shared: the same, where all sessions of the device work in one place, of which each of them tells; ``device`` says
    which one.
    """

    weights: int
    tensors: int
    activations: int = 0
    shared: int = 0
    device: str = ""

    @staticmethod
    def together(held: Iterable[DeviceMemory]) -> dict[str, int]:
        """Bytes of several sessions, by ``weights``, ``activations``, ``tensors``; empty where there is none."""
        known = list(held)
        if not known:
            return {}
        shared: dict[str, int] = {}
        for one in known:
            shared[one.device] = max(shared.get(one.device, 0), one.shared)
        activations = sum(one.activations for one in known) + sum(shared.values())
        weights, tensors = sum(one.weights for one in known), sum(one.tensors for one in known)
        return {"weights": weights, "activations": activations, "tensors": tensors}


@dataclass(frozen=True)
class Samples:
    """Inputs of one component, by tensor name, one mapping a call; ``facts``: where they come from."""

    calls: tuple[Mapping[str, Array], ...]
    facts: Mapping[str, Any]


def _no_samples() -> Samples:
    raise BuildError("inputs to calibrate with were not recorded", "build through sdrt_engines.build, or sdrt build")


@dataclass(frozen=True)
class BuildOptions:
    """What is common to building for any engine. ``shapes`` are (width, height) in pixels; ``batch`` counts pictures.

    precision: one for all components, or by component (those not named are fp32); an engine's ``build`` always sees
    one. ``extra`` holds the engine's own ``-O name=value`` options. prompts: what calibration runs with; none for the
    built-in ones.

    Filled for an engine's ``build``: samples gives the component's inputs as real runs feed them (computed when first
    asked for, which takes a while); report takes what is being done and the fraction of it in [0, 1].
    """

    precision: Precision | Mapping[str, Precision] = "fp32"
    shapes: tuple[tuple[int, int], ...] = ()
    batch: int | None = None
    target: str | None = None
    threads: int | None = None
    extra: Mapping[str, str] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    samples: Callable[[], Samples] = field(default=_no_samples, compare=False, repr=False)
    report: Callable[[str, float], object] = field(default=lambda *_: None, compare=False, repr=False)


@dataclass(frozen=True)
class OpenOptions:
    """What is common to opening an artifact with any engine.

    threads: None leaves the choice to the engine. cache: a folder, made where missing, in which an engine keeps what it
    compiled, for the next opening; None for no cache. extra: the engine's own ``-O name=value``.
    """

    threads: int | None = None
    cache: Path | None = None
    extra: Mapping[str, str] = field(default_factory=dict)


class Session(Protocol):
    """One loaded component."""

    spec: Component

    def prepare(self, sizes: Mapping[str, int]) -> bool:
        """Calls of these sizes follow: compile now what is compiled for a size, and is not yet. Whether anything was.

        sizes: of all symbols, such as ``{"B": 2, "T": 77, "H": 512, "W": 512}`` (``TensorSpec.shape``).
        """

    def bind(self, **constants: Array) -> None:
        """Hand over inputs once; they are kept until bound again, and not given to ``run``."""

    def run(self, **inputs: Array) -> dict[str, Array]:
        """Compute all outputs; the caller owns the arrays."""

    def memory(self) -> DeviceMemory | None:
        """What it holds now of a device's own memory; None where it computes in main memory, or cannot tell."""

    def close(self) -> None:
        """Free what the session holds; it cannot be run any more."""


class Engine(Protocol):
    """Satisfied by a module in ``sdrt_engines``; importing the module must not import the engine's library."""

    OPENS: tuple[str, ...]
    """Artifacts that ``open`` takes, by ``Artifact.engine``."""

    INSTALL: str
    """The command that installs what the engine needs."""

    PRECISIONS: tuple[Precision, ...]
    """What ``build`` can build."""

    MEASURES: tuple[Precision, ...]
    """Of these, what is built from measured activations: what ``BuildOptions.prompts`` are for."""

    CACHES: bool
    """Whether ``open`` makes use of ``OpenOptions.cache``."""

    CHECKS_ON: str | None
    """The device that what was built is checked on when none is named, here; None for the default."""

    PLAIN: Mapping[str, str]
    """Build options with which a float32 graph's operators stay what they are, so that their rates can be measured."""

    def elsewhere(self, artifact: Artifact) -> str:
        """Why what ``build`` just made can be run on another machine only; empty where it can be run here."""

    def devices(self) -> Sequence[Device]:
        """Devices usable here, the default one first. EngineUnavailable, which says why, when there is none."""

    def build(self, source: Bundle, name: str, out: Path, options: BuildOptions) -> Artifact:
        """Write component ``name`` of an ONNX bundle for this engine into ``out/<name>/``. BuildError.

        EngineUnavailable where the engine's library is not here, or builds on devices only that are not here.
        """

    def open(self, bundle: Bundle, name: str, device: str | None, options: OpenOptions) -> Session:
        """Load component ``name``. DeviceError for a device that is not there; never another one instead."""


def engine_names() -> list[str]:
    """Names of all engines that are part of this installation, usable here or not."""
    try:
        package = importlib.import_module("sdrt_engines")
    except ModuleNotFoundError:
        return []
    names = [info.name for info in pkgutil.iter_modules(package.__path__) if not info.ispkg]
    return [name.replace("_", "-") for name in names if hasattr(_module(name), "OPENS")]


def find_engine(name: str) -> Engine:
    """The engine called ``name`` (``some-name`` is ``sdrt_engines/some_name.py``). EngineUnavailable if unknown."""
    module = str(name).replace("-", "_")
    if re.fullmatch(r"[a-z][a-z0-9_]*", module) and importlib.util.find_spec(f"sdrt_engines.{module}"):
        engine = _module(module)
        if hasattr(engine, "OPENS"):
            return typing.cast(Engine, engine)
    raise EngineUnavailable(
        f"there is no engine {name!r}; known engines: {', '.join(engine_names())}",
        "sdrt doctor shows what is usable here",
    )


def _module(name: str) -> Any:
    return importlib.import_module(f"sdrt_engines.{name}")


def parse_options(kind: type[T], extra: Mapping[str, str], engine: str) -> T:
    """Fill an engine's own options dataclass from ``-O name=value``; an unknown name lists the known ones."""
    hints = typing.get_type_hints(kind)
    known = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, text in extra.items():
        if name not in known:
            listed = ", ".join(f"{n} (default {f.default})" for n, f in known.items()) or "none"
            raise InputError(f"{engine} has no option {name!r}; known options: {listed}")
        values[name] = _parse_option(hints[name], text, f"{engine} option {name}")
    return kind(**values)


def _parse_option(kind: Any, text: str, what: str) -> Any:
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise InputError(f"{what}: expected true or false, got {text!r}")
    if typing.get_origin(kind) is typing.Literal:
        if text in typing.get_args(kind):
            return text
        raise InputError(f"{what}: expected {', '.join(typing.get_args(kind))}, got {text!r}")
    try:
        return kind(text)
    except InputError:  # a ValueError too: a kind of an engine's own says what it wants
        raise
    except ValueError:
        raise InputError(f"{what}: expected {kind.__name__}, got {text!r}") from None


def default_engine(component: Component) -> str:
    """The engine that opens a component when none is named: the one it was built for."""
    return DEFAULT_ENGINE if component.artifact.engine == ONNX else component.artifact.engine


def open_session(
    bundle: Bundle, name: str, *, engine: str | None = None, device: str | None = None,
    options: OpenOptions | None = None,
) -> Session:  # fmt: skip
    """Load component ``name`` with ``engine`` (default: the one it was built for) and check every call to it.

    Raises BundleError (no such component; the engine cannot open this kind of artifact), EngineUnavailable,
    DeviceError, InputError (an unknown option; a cache that the engine has no use for, or that cannot be written).
    """
    options = options or OpenOptions()
    component = bundle.component(name)
    session = opening_engine(bundle, name, engine, options).open(bundle, name, device, options)
    if any(spec.dtype == "f16" for spec in (*component.inputs, *component.outputs)):
        session = WidenedSession(session)
    return CheckedSession(bundle, name, session)


def opening_engine(bundle: Bundle, name: str, engine: str | None, options: OpenOptions) -> Engine:
    """The engine that ``open_session`` opens component ``name`` with; raises what can be told without opening it."""
    component = bundle.component(name)
    built_for = component.artifact.engine
    chosen = engine or default_engine(component)
    module = find_engine(chosen)
    if built_for not in module.OPENS and "*" not in module.OPENS:
        if built_for == ONNX:
            fix = f"sdrt build {bundle.root} OUT --engine {chosen}"
        else:
            fix = f"leave --engine out, or build for {chosen} from the ONNX bundle that this one came from"
        raise BundleError(f"{name}: {chosen} cannot open an artifact of {built_for}", fix)
    for spec in (*component.inputs, *component.outputs):
        if spec.dtype not in NUMPY_DTYPES:
            raise BundleError(f"{name}: {spec.name} is {spec.dtype}, which numpy does not have")
    if options.cache is not None:
        _check_cache(options.cache, chosen, module)
    return module


def _check_cache(folder: Path, name: str, engine: Engine) -> None:
    """Make the folder for compiled models; InputError unless the engine has use for it, and can write there."""
    if not engine.CACHES:
        caching = ", ".join(known for known in engine_names() if find_engine(known).CACHES)
        raise InputError(f"{name} keeps no compiled models; engines that do: {caching}", "leave the cache out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written, as a cache must be: {error.strerror or error}", "choose another folder"
        ) from None


def devices_by_component(bundle: Bundle, device: str | Mapping[str, str] | None) -> dict[str, str | None]:
    """The device of each component, None for the engine's default.

    device: one name for all; one by component; or that as a text, ``"unet=gpu,vae_decoder=cpu"``. InputError for
    another type, or a component that the bundle does not hold.
    """
    value: Any = parse(device, "device") if isinstance(device, str) else device
    names = [*value, *value.values()] if isinstance(value, Mapping) else []
    if not (value is None or isinstance(value, (str, Mapping))) or not all(isinstance(n, str) for n in names):
        raise InputError(
            f"device is {quoted(device)}, expected a name, or names by component",
            "such as 'cpu', 'unet=gpu,vae_decoder=cpu', or {'unet': 'gpu', 'vae_decoder': 'cpu'}",
        )
    return resolve(value, bundle.manifest.components, None, "device")


def threads_by_component(threads: int | None, devices: Mapping[str, str | None]) -> dict[str, int | None]:
    """Of components on several devices, ``threads`` are for those on a cpu or on the default.

    Where there is none of these they are for all: the engine tells what it cannot do.
    """
    processors = {name for name, device in devices.items() if device in (None, "cpu")} or set(devices)
    return {name: threads if name in processors else None for name in devices}


def check_profiles(name: str, component: Component, sizes: Mapping[str, int]) -> None:
    """InputError, which lists what is held and the command for more, unless one of the profiles admits ``sizes``."""
    profiles = component.artifact.profiles
    if profiles and not any(fits(profile, sizes) for profile in profiles):
        held = " or ".join(", ".join(f"{s}={r}" for s, r in profile.items()) for profile in profiles)
        asked = ", ".join(f"{s}={n}" for s, n in sizes.items())
        shape = f"{sizes['W']}x{sizes['H']}" if {"W", "H"} <= set(sizes) else "WxH"
        artifact = component.artifact
        precision = "" if artifact.precision == "fp32" else f" --precision {artifact.precision}"
        raise InputError(
            f"{name}: this artifact was built for {held}; asked for {asked}",
            f"use a size held, or: sdrt build ONNX_BUNDLE OUT --engine {artifact.engine}{precision} --shape {shape}"
            " --batch N",
        )


def unknown_device(engine: str, device: str, devices: Sequence[Device]) -> DeviceError:
    """The error of every engine for a device that it does not have."""
    held = ", ".join(d.name for d in devices)
    return DeviceError(
        f"{engine} has no device {device!r} here; it has {held}", "sdrt doctor lists engines and devices"
    )


class WidenedSession:
    """A network that takes and gives float16, as one of float32: everything above this border computes in float32."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._half = {spec.name for spec in session.spec.inputs if spec.dtype == "f16"}
        self.spec = widened(session.spec)

    def prepare(self, sizes: Mapping[str, int]) -> bool:
        return self._session.prepare(sizes)

    def bind(self, **constants: Array) -> None:
        self._session.bind(**self._rounded(constants))

    def run(self, **inputs: Array) -> dict[str, Array]:
        outputs = self._session.run(**self._rounded(inputs))
        return {name: a.astype(np.float32) if a.dtype == np.float16 else a for name, a in outputs.items()}

    def memory(self) -> DeviceMemory | None:
        return self._session.memory()

    def close(self) -> None:
        self._session.close()

    def _rounded(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        with np.errstate(over="ignore"):  # infinity then, which the checks for finite outputs find
            return {name: a.astype(np.float16) if name in self._half else a for name, a in inputs.items()}


def widened(component: Component) -> Component:
    """The component as its session shows it: what is float16 at its border is float32."""
    inputs, outputs = (tuple(map(_widened, specs)) for specs in (component.inputs, component.outputs))
    return dataclasses.replace(component, inputs=inputs, outputs=outputs)


def _widened(spec: TensorSpec) -> TensorSpec:
    return dataclasses.replace(spec, dtype="f32") if spec.dtype == "f16" else spec


class CheckedSession:
    """A session behind checks of names, dtypes, shapes and profiles, of inputs and outputs, and a lock.

    Steps differ in nothing that is checked: a call like the last one is compared with it, no more.
    """

    def __init__(self, bundle: Bundle, name: str, session: Session) -> None:
        self.spec = session.spec
        self.name = name
        self._root = bundle.root
        self._session: Session | None = session
        self._inputs = {spec.name: spec for spec in session.spec.inputs}
        self._bound: dict[str, tuple[int, ...]] = {}
        self._passed: dict[str, Any] | None = None  # the kinds of the inputs that were checked last
        self._outputs: dict[str, Any] = {}  # and of the outputs that they must give
        self._lock = threading.Lock()

    def prepare(self, sizes: Mapping[str, int]) -> bool:
        with self._lock:
            session = self._opened()
            check_profiles(self.name, self.spec, sizes)
            return session.prepare(sizes)

    def bind(self, **constants: Array) -> None:
        with self._lock:
            session = self._opened()
            shapes = self._check(constants)
            self._passed = None
            session.bind(**constants)
            self._bound.update(shapes)

    def run(self, **inputs: Array) -> dict[str, Array]:
        with self._lock:
            session = self._opened()
            kinds = _kinds(inputs)
            if kinds != self._passed:
                self._outputs = self._check_call(inputs)
                self._passed = kinds
            outputs = session.run(**inputs)
            if _kinds(outputs) != self._outputs:
                self._check_outputs(outputs)
            return outputs

    def memory(self) -> DeviceMemory | None:
        with self._lock:
            return self._opened().memory()

    def close(self) -> None:
        with self._lock:
            if self._session is not None:
                self._session.close()
                self._session = None

    def _opened(self) -> Session:
        if self._session is None:
            raise InputError(f"{self.name}: the session is closed", "open the pipeline again")
        return self._session

    def _expected(self) -> str:
        return "; ".join(map(str, self.spec.inputs))

    def _check(self, inputs: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
        for name, array in inputs.items():
            spec = self._inputs.get(name)
            if spec is None:
                raise InputError(f"{self.name}: has no input {name!r}; expected {self._expected()}")
            if not isinstance(array, np.ndarray):
                raise InputError(f"{self.name}: input {name} is {type(array).__name__}, expected a numpy array")
            if array.dtype != NUMPY_DTYPES[spec.dtype]:
                raise self._misfit(
                    spec, array, f"convert it: {name}.astype(numpy.{np.dtype(NUMPY_DTYPES[spec.dtype])})"
                )
            fixed = all(isinstance(d, str) or d == s for d, s in zip(spec.shape, array.shape, strict=False))
            if array.ndim != len(spec.shape) or not fixed or 0 in array.shape:
                raise self._misfit(
                    spec, array, "is it from another model family? sdrt inspect shows what a bundle takes"
                )
        return {name: array.shape for name, array in inputs.items()}

    def _check_call(self, inputs: Mapping[str, Array]) -> dict[str, Any]:
        """The kinds of the outputs that this call must give."""
        if bound := [name for name in inputs if name in self._bound]:
            raise InputError(f"{self.name}: input {bound[0]} is bound", "leave it out, or bind the other one")
        shapes = self._bound | self._check(inputs)
        if missing := [n for n in self._inputs if n not in shapes]:
            raise InputError(f"{self.name}: input {missing[0]} is missing; expected {self._expected()}")
        sizes = self._check_sizes(shapes)
        return {spec.name: (spec.at(sizes), np.dtype(NUMPY_DTYPES[spec.dtype])) for spec in self.spec.outputs}

    def _check_outputs(self, outputs: Mapping[str, Array]) -> None:
        for spec in self.spec.outputs:
            if spec.name not in outputs:
                raise BundleError(
                    f"{self.name}: gives no output {spec.name!r}, it gives {', '.join(outputs)}",
                    f"sdrt verify {self._root} tells whether the bundle is damaged",
                )
            array, (expected, dtype) = outputs[spec.name], self._outputs[spec.name]
            if array.shape != expected or array.dtype != dtype:
                got = f"{_dtype_name(array)}{list(array.shape)}"
                raise BundleError(
                    f"{self.name}: output {spec.name} is {got}, the manifest says {spec.dtype}{list(expected)}",
                    f"sdrt verify {self._root} tells whether the bundle is damaged",
                )

    def _misfit(self, spec: TensorSpec, array: Array, fix: str) -> InputError:
        got = f"{_dtype_name(array)}[{','.join(map(str, array.shape))}]"
        return InputError(f"{self.name}: input {spec.name} is {got}, engine expects {str(spec).split(': ')[1]}", fix)

    def _check_sizes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        sizes = solve(self.spec.inputs, shapes)
        for spec in self.spec.inputs:
            expected = spec.at(sizes)
            if shapes[spec.name] != expected:
                raise InputError(
                    f"{self.name}: input {spec.name} has shape {list(shapes[spec.name])}, but beside the other inputs"
                    f" it must be {list(expected)} ({spec})",
                    "give all inputs the same batch and size",
                )
        check_profiles(self.name, self.spec, sizes)
        return sizes


def _kinds(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Shape and dtype by name; None for what is no array of numpy's."""
    return {name: (a.shape, a.dtype) if isinstance(a, np.ndarray) else None for name, a in arrays.items()}


def _dtype_name(array: Array) -> str:
    names = {np.dtype(dtype): name for name, dtype in NUMPY_DTYPES.items()}
    return names.get(array.dtype, str(array.dtype))
