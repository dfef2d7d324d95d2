"""From an ONNX graph whose types are final to a plan: what TensorRT calls an engine, as bytes.

Networks are strongly typed: a plan computes in the types that the graph has, TF32 aside, which a recipe asks for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sdrt.bundle import Component, Profile, split_dim
from sdrt.errors import BuildError, BundleError, quoted
from sdrt_engines.signals import Held
from sdrt_engines.trt.library import Library, Spoken, refused, speaker
from sdrt_engines.trt.targets import AMPERE_PLUS, ANY, CURRENT

MAX_MIB = 2**23
"""8 TiB, more than any GPU has."""


@dataclass(frozen=True)
class Recipe:
    """How a plan is built: what it takes, beside the graph, to build the same one again.

    target: as ``targets.parsed`` spells it. tf32: float32 products with 10-bit mantissas. strip: no weights in the
    plan; they are read from the graph, which stays beside it. refit: weights can be replaced; "same" promises that they
    will be these very ones, as a stripped plan does. portable: runs in later versions of the library, too, for which
    the plan carries its own runtime. streaming: weights may stay in the host's memory while the plan runs. level: 0
    (built fast) to 5. workspace: most MiB for one layer's scratch, 0 for no limit of ours.
    """

    target: str
    tf32: bool = False
    strip: bool = False
    refit: Literal["no", "same", "any"] = "no"
    portable: bool = False
    streaming: bool = False
    level: int = 3
    workspace: int = 0

    def facts(self) -> dict[str, Any]:
        """For the artifact's facts."""
        return asdict(self)

    @staticmethod
    def of(component: Component) -> Recipe:
        """The one in its artifact's facts. BundleError where it is none: a manifest may be edited by hand."""
        told = component.artifact.facts.get("recipe")
        try:
            recipe = Recipe(**told)  # type: ignore[arg-type]  # whatever it is
        except TypeError:
            raise BundleError("the artifact does not say how its plan was built", "build it again") from None
        for name, value in recipe.facts().items():
            if not _RECIPE[name](value):
                raise BundleError(
                    f"the artifact does not say how its plan was built: its {name} is {quoted(value)}", "build it again"
                )
        return recipe


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


_RECIPE: Mapping[str, Callable[[Any], bool]] = {
    "target": lambda value: isinstance(value, str) and re.fullmatch(r"[a-z0-9+,]{1,99}", value) is not None,
    "tf32": _is_flag, "strip": _is_flag, "portable": _is_flag, "streaming": _is_flag,
    "refit": lambda value: value in ("no", "same", "any"),
    "level": lambda value: type(value) is int and 0 <= value <= 5,
    "workspace": lambda value: type(value) is int and 0 <= value <= MAX_MIB,
}  # fmt: skip
"""What each part of a recipe can be."""


Ranges = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""Of each input with free sizes: the smallest shape, the usual one, the largest."""


def ranges(component: Component, profile: Profile) -> Ranges:
    """A profile of the manifest, which is by symbol, as shapes of the inputs. BundleError unless it names every one."""
    symbols = {split_dim(dim)[0] for spec in component.inputs for dim in spec.shape if isinstance(dim, str)}
    if lacking := sorted(symbols - profile.keys()):
        raise BundleError(f"the artifact has a profile without {quoted(', '.join(lacking))}", "build it again")
    sizes = [{symbol: getattr(r, end) for symbol, r in profile.items()} for end in ("min", "opt", "max")]
    return {
        spec.name: (spec.at(sizes[0]), spec.at(sizes[1]), spec.at(sizes[2]))
        for spec in component.inputs
        if any(isinstance(dim, str) for dim in spec.shape)
    }


def nearest(profiles: Sequence[Profile], sizes: Mapping[str, int]) -> int:
    """The index of the profile that admits ``sizes`` and was tuned for those nearest to them, by ratio.

    -1 where none admits them.
    """

    def distance(profile: Profile) -> float:
        return sum(abs(math.log(sizes[symbol] / r.opt)) for symbol, r in profile.items() if symbol in sizes)

    fitting = [
        i for i, profile in enumerate(profiles)
        if all(r.min <= sizes[symbol] <= r.max for symbol, r in profile.items() if symbol in sizes)
    ]  # fmt: skip
    return min(fitting, key=lambda i: distance(profiles[i]), default=-1)


def build(
    library: Library, graph: Path, recipe: Recipe, profiles: Sequence[Ranges], what: str,
    *, timings: bytes | None = None, report: Callable[[float], object] = lambda _: None,
) -> tuple[memoryview, bytes | None]:  # fmt: skip
    """The plan, and the timing cache after it (None where none was given; empty starts one).

    what: the component, for errors. BuildError with the library's own words: the node that it cannot take, types that
    do not fit each other, no kernel for a target.
    """
    trt = library.load()
    log = speaker(trt)
    builder = trt.Builder(log)
    network = builder.create_network(0)  # from 11 on always with an explicit batch, and strongly typed
    parser = trt.OnnxParser(network, log)  # reads the network as long as it lives
    _parse(library, trt, parser, graph, what, log.spoken)
    _decomposable(trt, network)
    config = builder.create_builder_config()
    _configure(library, trt, config, recipe)
    cache = None
    if timings is not None:
        cache = config.create_timing_cache(timings)
        if cache is None or not config.set_timing_cache(cache, False):  # of another GPU or version, or damaged
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, False)
    inputs = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
    for shapes in profiles:
        if free := {name: shape for name, shape in shapes.items() if name in inputs and -1 in inputs[name].shape}:
            _add_profile(library, builder, config, free, what, log.spoken)
    signals = Held()
    progress = _progress(trt, report, signals)
    config.progress_monitor = progress
    with signals:
        plan = builder.build_serialized_network(network, config)
    if progress.stopped_by is not None:
        raise progress.stopped_by
    if plan is None:
        raise refused(library, what, log.spoken)
    return memoryview(plan), bytes(memoryview(cache.serialize())) if cache is not None else None


def _parse(library: Library, trt: Any, parser: Any, graph: Path, what: str, spoken: Spoken) -> None:
    if parser.parse_from_file(str(graph)):
        return
    said = Spoken()
    for i in range(parser.num_errors):
        error = parser.get_error(i)
        node = f"{error.node_operator()} {error.node_name()!r}: " if error.node_operator() else ""
        said.hear("ERROR", f"{node}{' '.join(_without_noise(error.desc()))}")
    raise refused(
        library, what, said if said.errors else spoken, "--precision fp32 tells whether it is the conversion's"
    )


def _without_noise(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and "checkMacros" not in line]


def _decomposable(trt: Any, network: Any) -> None:
    """Attention that no fused kernel covers (float32, wide heads) may be computed as products and a softmax.

    Without this leave it is an error; the parser has no way to give it.
    """
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # how TensorRT's Python gets from a layer to its kind
            layer.attention.decomposable = True


def _configure(library: Library, trt: Any, config: Any, recipe: Recipe) -> None:
    flag = trt.BuilderFlag
    # What a stripped plan is filled with are the same weights; TensorRT-RTX documents stripping beside REFIT alone.
    refit = recipe.refit
    if recipe.strip and refit == "no":
        refit = "any" if library.jit else "same"
    wanted = {
        "TF32": recipe.tf32,
        "STRIP_PLAN": recipe.strip,
        "REFIT_IDENTICAL": refit == "same",
        "REFIT": refit == "any",
        "VERSION_COMPATIBLE": recipe.portable,
        "WEIGHT_STREAMING": recipe.streaming,
        # Else memory may be taken while a call runs, which no CUDA graph can record; streaming weights has to.
        "REQUIRE_USER_ALLOCATION": hasattr(flag, "REQUIRE_USER_ALLOCATION") and not recipe.streaming,
    }
    for name, on in wanted.items():
        if on:
            config.set_flag(getattr(flag, name))
        elif hasattr(flag, name):
            config.clear_flag(getattr(flag, name))
    config.builder_optimization_level = recipe.level
    if recipe.workspace:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, recipe.workspace * 2**20)
    if library.targets and recipe.target != ANY:
        names = ["CURRENT"] if recipe.target == CURRENT else recipe.target.upper().split(",")
        config.num_compute_capabilities = len(names)
        for i, name in enumerate(names):
            if not config.set_compute_capability(getattr(trt.ComputeCapability, name), i):
                raise BuildError(f"{name} is refused as a target", "--target any")
    elif not library.targets and recipe.target != CURRENT:
        level = "AMPERE_PLUS" if recipe.target == AMPERE_PLUS else "SAME_COMPUTE_CAPABILITY"
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)


def _add_profile(library: Library, builder: Any, config: Any, shapes: Ranges, what: str, spoken: Spoken) -> None:
    profile = builder.create_optimization_profile()
    for name, (smallest, usual, largest) in shapes.items():
        profile.set_shape(name, smallest, usual, largest)
    if config.add_optimization_profile(profile) < 0:
        raise refused(library, f"{what}, sizes {shapes}", spoken)


def _progress(trt: Any, report: Callable[[float], object], signals: Held) -> Any:
    """Tells how much of the outermost phase is done. An exception of the report's stops the build, and is kept; a
    signal that waits stops it, too."""

    class Progress(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.outermost, self.steps = "", 1
            self.stopped_by: BaseException | None = None

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.outermost, self.steps = phase, max(steps, 1)

        def step_complete(self, phase: str, step: int) -> bool:
            try:
                if phase == self.outermost:
                    report(min((step + 1) / self.steps, 1.0))
            except BaseException as error:  # nothing may pass through the library's own frames
                self.stopped_by = error
            return self.stopped_by is None and not signals.waiting

        def phase_finish(self, phase: str) -> None:
            pass

    return Progress()
