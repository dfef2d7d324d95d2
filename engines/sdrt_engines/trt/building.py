"""From a component of an ONNX bundle to a plan in an engine bundle."""

from __future__ import annotations

import logging
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from sdrt.bundle import Artifact, Bundle, Component, DimRange, Precision, record, split_dim
from sdrt.engine import ONNX, BuildOptions, parse_options
from sdrt.errors import BuildError, EngineUnavailable, InputError
from sdrt.staging import replacing
from sdrt_engines import cuda
from sdrt_engines.graph import fix_dims
from sdrt_engines.graph.external import Weights
from sdrt_engines.graph.precision import reduce
from sdrt_engines.graph.shapes import fixed_dims
from sdrt_engines.graph.storage import float32_graph
from sdrt_engines.trt import fingerprint, plan, targets
from sdrt_engines.trt.graph_check import check_graph
from sdrt_engines.trt.library import Library

logger = logging.getLogger("sdrt")

PLAN = "model.plan"
GRAPH = "model.onnx"
WEIGHTS = "model.onnx.data"

WRITTEN = ((0.0, 0.1), (0.9, 0.92))
"""The part of a build, for its report, in which the graph is written: in float32; in another precision, which takes
measuring first."""


@dataclass(frozen=True)
class TensorRtBuildOptions:
    """``-O name=value`` when building.

    tf32: float32 products with 10-bit mantissas, which GPUs from Ampere on multiply faster; float32 is float32 without.
    keep_graph: leave the graph that the plan was built from beside it, so that another GPU or version can build it anew
    (``-O mismatch=rebuild`` when opening). strip: a plan without weights, which come from that graph when it is opened.
    refit: let weights be replaced: by the same ones, or by any. portable: run in later versions of TensorRT, too.
    streaming: let weights stay in the host's memory. level: 0 (built fast) to 5 (runs fast). workspace: most MiB for
    one layer's scratch, 0 for the GPU's. timings: a file in which TensorRT keeps what it timed, for the next build.
    """

    tf32: bool = False
    keep_graph: bool = False
    strip: bool = False
    refit: Literal["no", "same", "any"] = "no"
    portable: bool = False
    streaming: bool = False
    level: Literal["0", "1", "2", "3", "4", "5"] = "3"
    workspace: int = 0
    timings: str = ""


def build(library: Library, source: Bundle, name: str, out: Path, options: BuildOptions) -> Artifact:
    """Write ``<name>/model.plan``. Where no GPU is that runs it, the graph that it is built from is held against the
    reference here.

    Sizes are the model's own when no shape is given, and the batch is one picture: a plan is fast for what it names.
    """
    own = parse_options(TensorRtBuildOptions, options.extra, library.engine)
    component = source.component(name)
    if component.artifact.engine != ONNX:
        fix = "give the bundle that sdrt export wrote"
        raise BuildError(f"{name}: is built for {component.artifact.engine} already; build starts from ONNX", fix)
    library.load()
    target = targets.parsed(library, options.target)
    gpu = _building_gpu(library, target, own)
    recipe = _recipe(library, target, own)
    options = _with_shapes(source, options)
    profiles = sized(library, source, component, options)
    known = _read_timings(own.timings)
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    keeps = own.keep_graph or own.strip
    with tempfile.TemporaryDirectory(dir=out, prefix=".tensorrt-") as scratch:
        stored_at, graph = Path(scratch, "stored"), folder if keeps else Path(scratch, "graph")
        stored_at.mkdir()
        graph.mkdir(exist_ok=True)
        facts = _write_graph(source, component, options, stored_at, graph)
        if gpu is None or not targets.surely_covers(target, gpu, cast(Precision, options.precision)):
            facts["graph_parity"] = check_graph(source, name, cast(Precision, options.precision), graph, GRAPH)
        done_by = WRITTEN[options.precision != "fp32"][1]

        def compiled(fraction: float) -> None:
            options.report("compile", done_by + (1 - done_by) * fraction)

        started = time.perf_counter()
        made, timings = plan.build(
            library, graph / GRAPH, recipe, [plan.ranges(component, profile) for profile in profiles], name,
            timings=known, report=compiled,
        )  # fmt: skip
        facts["seconds"] = round(time.perf_counter() - started, 2)
        (folder / PLAN).write_bytes(made)
        if own.timings and timings is not None:
            _write_timings(own.timings, timings)
    files = [file for file in (PLAN, GRAPH, WEIGHTS) if (folder / file).exists()]
    return Artifact(
        engine=library.engine,
        precision=cast(Precision, options.precision),
        files=tuple(record(out, f"{name}/{file}") for file in files),
        target=gpu.target if gpu is not None and target == targets.CURRENT else target,
        profiles=profiles,
        built_from=component.artifact.files[0].sha256,
        facts={
            **fingerprint.facts(library, gpu, cuda.driver_version() if gpu is not None else ""),
            "recipe": recipe.facts(), **facts,
        },
    )  # fmt: skip


def _building_gpu(library: Library, target: str, own: TensorRtBuildOptions) -> cuda.Gpu | None:
    """The GPU that the plan is built on; None where none is here, and none is needed."""
    try:
        gpu = cuda.gpus()[0]
    except EngineUnavailable as error:
        if not library.targets:
            raise EngineUnavailable(
                f"{library.title} times kernels on the GPU that it builds for, and {error.message}",
                "--engine tensorrt-rtx builds for named GPUs on any machine",
            ) from None
        needing = {"--target current": target == targets.CURRENT, "-O strip=true": own.strip,
                   "-O refit": own.refit != "no"}  # fmt: skip
        for what, asked in needing.items():
            if asked:
                raise BuildError(
                    f"{library.title} needs a GPU for {what}, and {error.message}", "leave it out"
                ) from None
        return None
    if not library.targets and target not in (targets.CURRENT, targets.AMPERE_PLUS, gpu.target):
        raise BuildError(
            f"{library.title} builds for the GPU that is here, {gpu.target} ({gpu.name}); asked for {target}",
            "--engine tensorrt-rtx builds for other ones",
        )
    return gpu


def _recipe(library: Library, target: str, own: TensorRtBuildOptions) -> plan.Recipe:
    wrong = {"portable": own.portable, "timings": bool(own.timings)} if library.jit else {}
    for what, asked in wrong.items():
        if asked:
            raise BuildError(f"{library.title} has no use for -O {what}", "leave it out, or --engine tensorrt")
    if not 0 <= own.workspace <= plan.MAX_MIB:
        raise InputError(f"{library.engine} option workspace: expected 0 to {plan.MAX_MIB} MiB, got {own.workspace}")
    return plan.Recipe(
        target=target, tf32=own.tf32, strip=own.strip, refit=own.refit, portable=own.portable,
        streaming=own.streaming, level=int(own.level), workspace=own.workspace,
    )  # fmt: skip


def _with_shapes(source: Bundle, options: BuildOptions) -> BuildOptions:
    """The options with the model's own size where none is given."""
    space = source.manifest.latents
    return replace(options, shapes=options.shapes or ((space.default_width, space.default_height),))


def sized(
    library: Library, source: Bundle, component: Component, options: BuildOptions
) -> tuple[dict[str, DimRange], ...]:
    """The profiles: one for each size, and where kernels are chosen while building, one for a single picture and one
    for the others. (TensorRT-RTX compiles for the batch that it meets, and each profile costs it time and room.)

    Guidance runs what sees the prompt with two rows a picture.
    """
    symbols = {split_dim(dim)[0] for spec in component.inputs for dim in spec.shape if isinstance(dim, str)}
    shapes = dict.fromkeys(options.shapes)
    length = max((text.max_length for text in source.manifest.text_encoders), default=77)
    takes_text = "T" in symbols
    most, one = (options.batch or 1) * (2 if takes_text else 1), 2 if takes_text else 1
    batches = [DimRange(1, one, one)] + ([DimRange(one + 1, most, most)] if most > one else [])
    if library.jit:
        batches = [DimRange(1, most, most)]
    tokens = DimRange(length, length, length)
    found = []
    for width, height in shapes if {"H", "W"} <= symbols else [(0, 0)]:
        for batch in batches:
            sizes = {"B": batch, "T": tokens}
            if width:
                sizes |= {"H": DimRange(height, height, height), "W": DimRange(width, width, width)}
            found.append({symbol: range_ for symbol, range_ in sizes.items() if symbol in symbols})
    return tuple(found)


def _write_graph(
    source: Bundle, component: Component, options: BuildOptions, stored_at: Path, folder: Path
) -> dict[str, Any]:
    """The graph as TensorRT takes it: in its final types, and with the sizes that are the only ones."""
    model, weights_at = float32_graph(source, component, stored_at)
    weights = Weights(model, weights_at)
    facts: dict[str, Any] = {}
    if options.precision != "fp32":
        facts = reduce(model, weights, weights_at, source, component, options, half_between=True)
    _without_softmax_precision(model)
    fix_dims(model, fixed_dims(component, options))
    del model.graph.value_info[:]  # inferred again from the fixed sizes
    start, end = WRITTEN[options.precision != "fp32"]
    weights.save(model, folder, lambda done: options.report("write", start + (end - start) * done))
    return facts


def _without_softmax_precision(model: Any) -> None:
    """TensorRT takes no such attribute: its fused attention sums a softmax in float32 whatever it reads."""
    for node in model.graph.node:
        if node.op_type == "Attention":
            for attribute in [a for a in node.attribute if a.name == "softmax_precision"]:
                node.attribute.remove(attribute)


def _write_timings(path: str, timings: bytes) -> None:
    try:
        with replacing(Path(path)) as file:
            file.write(timings)
    except OSError as error:  # the plan is there, and good without
        logger.warning("%s: timings cannot be kept: %s", path, error.strerror)


def _read_timings(path: str) -> bytes | None:
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise InputError(f"{path}: timings cannot be read: {error.strerror}", "another file, or none") from None
