"""What is here, and opening a plan on it, after it is known to be for it."""

from __future__ import annotations

import contextlib
import logging
import mmap
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdrt.bundle import Artifact, Bundle, Component
from sdrt.engine import Device, OpenOptions, parse_options, unknown_device
from sdrt.errors import BundleError, DeviceError, ElsewhereError, EngineUnavailable, InputError
from sdrt_engines import cuda
from sdrt_engines.trt import arena, command, fingerprint, plan, stored, targets
from sdrt_engines.trt.building import GRAPH
from sdrt_engines.trt.library import Library, speaker
from sdrt_engines.trt.session import TensorRtOptions, TensorRtSession, check_ports

logger = logging.getLogger("sdrt")

_NO_ROOM = re.compile(r"out ?of ?memory", re.IGNORECASE)


def devices(library: Library) -> Sequence[Device]:
    """The GPUs here. EngineUnavailable without one: a plan may be built all the same, and the reason says so."""
    version = library.version()
    try:
        found = cuda.gpus()
    except EngineUnavailable as error:
        what = " (it builds here all the same: --target sm86)" if library.targets else ""
        raise EngineUnavailable(f"{error.message}{what}", error.fix) from None
    about = f"{library.title} {version}, CUDA {cuda.driver_version()}"
    return [Device(f"cuda:{gpu.index}", f"{gpu.name}, {gpu.target}, {about}", gpu.memory) for gpu in found]


def elsewhere(library: Library, artifact: Artifact) -> str:
    """Why a plan cannot be run on this machine, which built it; empty where it can."""
    try:
        gpus = cuda.gpus()
    except EngineUnavailable as error:
        return error.message
    return fingerprint.mismatch(library, artifact, gpus[0])


def open(library: Library, bundle: Bundle, name: str, device: str | None, options: OpenOptions) -> TensorRtSession:
    """Load a plan onto a GPU, after it is known to be for it."""
    own = parse_options(TensorRtOptions, options.extra, library.engine)
    trt = library.load()
    if own.keep < 1:
        raise InputError(f"{library.engine} option keep: expected at least 1, got {own.keep}")
    if not -1 <= own.budget <= plan.MAX_MIB:
        raise InputError(f"{library.engine} option budget: expected -1 (all) to {plan.MAX_MIB} MiB, got {own.budget}")
    if options.threads is not None:
        raise InputError(f"{library.engine}: a GPU has no threads to choose", "leave them out")
    found = cuda.gpus()
    named = {f"cuda:{gpu.index}": gpu for gpu in found}
    if (chosen := device or "cuda:0") not in named:
        raise unknown_device(library.engine, chosen, devices(library))
    gpu = named[chosen]
    component = bundle.component(name)
    recipe = plan.Recipe.of(component)
    why = fingerprint.mismatch(library, component.artifact, gpu)
    if own.budget >= 0 and not recipe.streaming:
        raise InputError(
            f"{name}: -O budget is for plans whose weights may stay in the host's memory, and this one's may not",
            "leave it out, or sdrt build with -O streaming=true",
        )
    cuda.use(gpu.index)
    runtime = trt.Runtime(speaker(trt))
    with _plan(library, runtime, bundle, component, name, gpu, own, options.cache, why) as content:
        free, _ = cuda.memory()
        engine = _deserialized(library, runtime, content, component, name, own)
    try:
        check_ports(name, trt, engine, component)
        if recipe.strip:
            _refit(library, trt, engine, bundle, component, name)
        if own.budget >= 0:
            _stream_weights(engine, name, own.budget)
        weights = max(free - cuda.memory()[0], 0)
        compiled = None
        if library.jit and options.cache is not None:
            built = component.artifact.files[0].sha256
            compiled = stored.RuntimeCache(
                options.cache, stored.key("kernels", built, gpu.name, library.version(), cuda.driver_version(), why)
            )
        held = arena.held(gpu.index)
    except BaseException:
        del engine
        raise
    return TensorRtSession(name, trt, engine, component, held, own, compiled, weights, runtime.logger.spoken)


@contextlib.contextmanager
def _plan(
    library: Library, runtime: Any, bundle: Bundle, component: Component, name: str, gpu: cuda.Gpu,
    own: TensorRtOptions, cache: Path | None, why: str,
) -> Iterator[Any]:  # fmt: skip
    """The plan's bytes: mapped from the bundle, or built anew where it is for another GPU and that was asked for."""
    if not why:
        with _mapped(bundle.path(component.artifact.files[0].path)) as content:
            if not (why := _invalid(library, runtime, content)):
                yield content
                return
    held = [bundle.path(file.path) for file in component.artifact.files if file.path.endswith(GRAPH)]
    if own.mismatch == "error" or not held:
        anew = (
            "" if own.mismatch == "error" else "; it cannot be built anew: no graph is beside it (-O keep_graph=true)"
        )
        raise ElsewhereError(
            f"{name}: the plan is not for this machine: {why}{anew}",
            command.rebuild(library, bundle, gpu, keep_graph=own.mismatch == "rebuild"),
        )
    yield _rebuilt(library, held[0], component, name, gpu, cache, why)


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[Any]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield content


def _stream_weights(engine: Any, name: str, budget: int) -> None:
    wanted = min(budget * 2**20, engine.streamable_weights_size)
    engine.weight_streaming_budget_v2 = wanted  # Python's property drops whether it was taken
    if (held := engine.weight_streaming_budget_v2) != wanted:
        raise DeviceError(
            f"{name}: -O budget={budget} is not taken: {held / 2**20:.0f} MiB of weights stay on the GPU", "another one"
        )


_ELSEWHERE = ("VERSION_MISMATCH", "UNSUPPORTED_CC", "OLD_CUDA_DRIVER", "OLD_CUDA_RUNTIME")
"""What makes a plan invalid here, and may be valid on another machine; anything else is the plan's own fault, or is
told by loading it."""


def _invalid(library: Library, runtime: Any, content: Any) -> str:
    """What TensorRT-RTX itself says against this machine for a plan; empty where it has nothing against it."""
    if not hasattr(runtime, "get_engine_validity"):
        return ""
    trt = library.load()
    validity, diagnostics = runtime.get_engine_validity(content)
    if validity != trt.EngineValidity.INVALID:
        return ""
    said = [kind.name for kind in trt.EngineInvalidityDiagnostics.__members__.values() if int(diagnostics) & int(kind)]
    if not set(said) & set(_ELSEWHERE):
        return ""
    return f"{library.title} {library.version()} says {', '.join(said).lower().replace('_', ' ')}"


def _rebuilt(
    library: Library, graph: Path, component: Component, name: str, gpu: cuda.Gpu, cache: Path | None, why: str
) -> bytes | memoryview:
    recipe = replace(plan.Recipe.of(component), target=targets.CURRENT)
    files = [file.sha256 for file in component.artifact.files]
    key = stored.key("plan", files, recipe, gpu.name, library.version(), cuda.driver_version())
    if cache is not None and (content := stored.read(cache, key)) is not None:
        return content
    logger.warning("%s: the plan is not for this machine (%s), and is built anew", name, why)
    shapes = [plan.ranges(component, profile) for profile in component.artifact.profiles]
    made, _ = plan.build(library, graph, recipe, shapes, name)
    if cache is not None:
        stored.write(cache, key, made)
    return made


def _deserialized(
    library: Library, runtime: Any, content: Any, component: Component, name: str, own: TensorRtOptions
) -> Any:
    if plan.Recipe.of(component).portable:
        if not own.trust:
            raise BundleError(
                f"{name}: a portable plan carries a runtime, that is code, which loading it would run",
                "-O trust=true, if you know who built it",
            )
        runtime.engine_host_code_allowed = True
    with cuda.ALONE:
        engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        why = runtime.logger.spoken.why()
        if _NO_ROOM.search(why):
            raise DeviceError(f"{name}: the GPU has no room for the plan: {why}", "free its memory")
        raise BundleError(
            f"{name}: {library.title} {library.version()} cannot load the plan: {why}",
            "sdrt verify tells whether the files are damaged",
        )
    return engine


def _refit(library: Library, trt: Any, engine: Any, bundle: Bundle, component: Component, name: str) -> None:
    """Fill a plan without weights from the graph beside it."""
    graphs = [bundle.path(file.path) for file in component.artifact.files if file.path.endswith(GRAPH)]
    if not graphs:
        raise BundleError(f"{name}: the plan has no weights, and no graph is beside it", "build it again")
    log = speaker(trt)
    refitter = trt.Refitter(engine, log)
    parser = trt.OnnxParserRefitter(refitter, log)
    if not parser.refit_from_file(str(graphs[0])) or refitter.get_missing_weights() or not refitter.refit_cuda_engine():
        raise BundleError(
            f"{name}: the graph beside the plan is not the one that it was built from: {log.spoken.why()}",
            "sdrt verify tells whether the files are damaged",
        )
