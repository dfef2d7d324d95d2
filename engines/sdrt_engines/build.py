"""``sdrt build``: an ONNX bundle → a self-contained bundle for one engine, with parity figures measured here."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from sdrt import bundle as bundles
from sdrt import by_component
from sdrt.bundle import Bundle, Component, Precision, TensorSpec, solve, split_dim
from sdrt.engine import ONNX, BuildOptions, OpenOptions, Samples, find_engine, open_session
from sdrt.errors import BuildError, InputError
from sdrt.request import MAX_SIDE
from sdrt.staging import new_directory
from sdrt.verify import admitted, measure, passed, reference_cases
from sdrt_engines.calibration import PROMPTS, RANGES, SCALES, Recorder

Report = Callable[[str, str, float], object]
"""(component, what is being done, fraction of the whole in [0, 1])"""


def build(
    source: str | Path, out: str | Path, engine: str, options: BuildOptions | None = None, *, force: bool = False,
    report: Report = lambda *_: None,
) -> Bundle:  # fmt: skip
    """Build every component of an ONNX bundle for ``engine`` into the bundle ``out``.

    Each component is opened and held against the reference vectors that its profiles admit; a component that does not
    compute the same is a BuildError, and no bundle is left. Raises also BundleError, EngineUnavailable, InputError.
    """
    options = options or BuildOptions()
    source, out = os.path.abspath(source), os.path.abspath(out)
    origin = bundles.load(source)
    module = find_engine(engine)
    module.devices()  # an engine that is not usable here says so before anything is written
    _check(origin, options)
    precisions = _precisions(origin, options, engine, module.PRECISIONS)
    recorder = _recorder(origin, options, set(precisions.values()))
    with new_directory(out, force=force, sources=[origin.root]) as staging:
        components: dict[str, Component] = {}
        names = list(origin.manifest.components)
        for done, name in enumerate(names):
            report(name, "build", done / len(names))
            component = origin.component(name)

            def told(what: str, fraction: float, name: str = name, done: int = done) -> None:
                report(name, what, (done + 0.7 * fraction) / len(names))

            def samples(name: str = name, told: Callable[[str, float], None] = told) -> Samples:
                return recorder.samples(name, lambda what, fraction: told(what, 0.5 * fraction))

            own = replace(options, precision=precisions[name], samples=samples, report=told)
            artifact = module.build(origin, name, staging, own)
            for file in (component.config, component.reference, component.constants):
                if file is not None:
                    _copy(origin, file.path, staging)
            report(name, "check", (done + 0.7) / len(names))
            components[name] = _measured(origin, staging, name, replace(component, artifact=artifact))
        for file in origin.manifest.files:
            _copy(origin, file.path, staging)
        bundles.save(staging, replace(origin.manifest, components=components))
    return bundles.load(out)


def _check(origin: Bundle, options: BuildOptions) -> None:
    for name, component in origin.manifest.components.items():
        if component.artifact.engine != ONNX:
            raise BuildError(
                f"{origin.root}: {name} is built for {component.artifact.engine} already; build starts from ONNX",
                "give the bundle that sdrt export wrote",
            )
    multiple = origin.manifest.latents.downscale
    for width, height in options.shapes:
        if not (8 <= width <= MAX_SIDE and 8 <= height <= MAX_SIDE) or width % multiple or height % multiple:
            raise InputError(
                f"--shape {width}x{height}: both sides must be multiples of {multiple}, and not 0 or above {MAX_SIDE}"
            )
    if options.batch is not None and options.batch < 1:
        raise InputError(f"--batch {options.batch}: expected at least 1")


def _precisions(
    origin: Bundle, options: BuildOptions, engine: str, known: tuple[Precision, ...]
) -> dict[str, Precision]:
    """The precision of each component; InputError or BuildError, which list what there is, before anything is built."""
    default: Precision = "fp32"
    precisions = by_component.resolve(options.precision, origin.manifest.components, default, "--precision")
    for name, precision in precisions.items():
        if precision not in get_args(Precision):
            raise InputError(
                f"--precision: {precision!r} is no precision; there are {', '.join(get_args(Precision))}",
                "--precision VALUE, or by component: --precision unet=VALUE,vae_decoder=VALUE",
            )
        if precision not in known:
            raise BuildError(f"{name}: {engine} builds {', '.join(known)}; asked for {precision}", "choose one of them")
    return precisions


def _recorder(origin: Bundle, options: BuildOptions, precisions: set[Precision]) -> Recorder:
    few = not precisions & {"int8", "fp8"}
    effort = RANGES if few else SCALES
    if options.prompts:
        effort = replace(effort, prompts=min(effort.prompts, len(options.prompts)) if few else len(options.prompts))
    return Recorder(origin, effort, options.prompts or PROMPTS, options.shapes[0] if options.shapes else None)


def _copy(origin: Bundle, relative: str, staging: Path) -> None:
    target = staging / relative
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(origin.path(relative), target)


def _measured(origin: Bundle, staging: Path, name: str, component: Component) -> Component:
    """The component with its parity figures; BuildError when it does not compute the same.

    Where the profiles admit no reference case (``--shape 512x512``), cases of the profiles' own sizes are made: random
    inputs, and what ONNX Runtime computes in float32 from the ONNX bundle. They take the place of the others.
    """
    if component.reference is None or component.artifact.engine == "null":
        return component
    if not any(True for _ in admitted(origin, name, component.artifact.profiles)):
        arrays = _own_cases(origin, name, component)
        np.savez(staging / component.reference.path, **arrays)
        component = replace(component, reference=bundles.record(staging, component.reference.path))
    built = Bundle(staging, replace(origin.manifest, components={name: component}, text_encoders=()))
    session = open_session(built, name, options=OpenOptions())
    try:
        figures = list(measure(built, name, session))
    finally:
        session.close()
    for parity in figures:
        if not passed(parity, component.artifact.precision):
            raise BuildError(
                f"{name}: {component.artifact.engine} does not compute what torch computes: {parity.output} at"
                f" {parity.case} is {parity.max_abs:.3g} off ({parity.psnr} dB)",
                "please report it with the output of sdrt doctor",
            )
    return bundles.with_parity(component, figures)


def _own_cases(origin: Bundle, name: str, component: Component) -> dict[str, Any]:
    """Reference arrays at each profile's ``opt``; symbols that a profile leaves free are as in the first known case."""
    known = next(iter(reference_cases(origin, name).values()))[0]
    free = solve(component.inputs, {tensor: array.shape for tensor, array in known.items()})
    session = open_session(origin, name, options=OpenOptions(extra={"prepack": "false", "optimization": "extended"}))
    arrays: dict[str, Any] = {}
    try:
        for profile in component.artifact.profiles:
            sizes = free | {symbol: range_.opt for symbol, range_ in profile.items()}
            case = "-".join(f"{symbol}{size}" for symbol, size in sizes.items()) + "-onnx"
            generator = np.random.default_rng(zlib.crc32(case.encode()))
            inputs = {
                spec.name: generator.standard_normal(spec.at(sizes)).astype(np.float32)
                if _is_picture(spec)
                else np.resize(known[spec.name], spec.at(sizes))  # tokens and timesteps: the known ones, repeated
                for spec in component.inputs
            }
            arrays.update({f"{case}/in/{tensor}": array for tensor, array in inputs.items()})
            arrays.update({f"{case}/out/{tensor}": array for tensor, array in session.run(**inputs).items()})
    finally:
        session.close()
    return arrays


def _is_picture(spec: TensorSpec) -> bool:
    return any(isinstance(dim, str) and split_dim(dim)[0] in ("H", "W") for dim in spec.shape)
