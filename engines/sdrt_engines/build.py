"""``sdrt build``: an ONNX bundle → a self-contained bundle for one engine, with parity figures measured here."""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from sdrt import bundle as bundles
from sdrt import by_component, strict_json
from sdrt.bundle import (
    Artifact,
    Bundle,
    Component,
    DimRange,
    File,
    Precision,
    Profile,
    TensorSpec,
    read_arrays,
    solve,
    split_dim,
)  # fmt: skip
from sdrt.engine import NUMPY_DTYPES, ONNX, BuildOptions, OpenOptions, Samples, find_engine, open_session
from sdrt.errors import BuildError, BundleError, ElsewhereError, InputError
from sdrt.foreign import INDEX
from sdrt.image_file import MAX_SIDE
from sdrt.staging import new_directory
from sdrt.verify import admitted, measure, passed, reference_cases
from sdrt_engines.calibration import PROMPTS, RANGES, SCALES, Recorder
from sdrt_engines.graph.work import counted

logger = logging.getLogger("sdrt")

Report = Callable[[str, str, float], object]
"""(component, what is being done, fraction of the whole in [0, 1])"""


def build(
    source: str | Path, out: str | Path, engine: str, options: BuildOptions | None = None, *, force: bool = False,
    report: Report = lambda *_: None,
) -> Bundle:  # fmt: skip
    """Build every component of an ONNX bundle for ``engine`` into the bundle ``out``.

    Each component is opened and held against the reference vectors that its profiles admit; a component that does not
    compute the same is a BuildError, and no bundle is left. What runs on other machines only (``Engine.elsewhere``) is
    left unchecked, and said to be. Raises also BundleError, EngineUnavailable, InputError.
    """
    options = options or BuildOptions()
    out, found = os.path.abspath(out), bundles.load(source)
    origin = _hashed(replace(found, root=Path(os.path.abspath(found.root))))
    module = find_engine(engine)
    _check(origin, options)
    precisions = _precisions(origin, options, engine, module.PRECISIONS)
    recorder = _recorder(origin, options, set(precisions.values()), module.MEASURES)
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
            component = replace(
                component,
                artifact=module.build(origin, name, staging, own),
                work=component.work or counted(origin.path(component.artifact.files[0].path), component, name),
                config=component.config and _copy(origin, component.config, staging),
                reference=component.reference and _copy(origin, component.reference, staging),
                constants=component.constants and _copy(origin, component.constants, staging),
            )
            report(name, "check", (done + 0.7) / len(names))
            components[name] = _measured(origin, staging, name, component)
        files = tuple(_copy(origin, file, staging) for file in origin.manifest.files)
        bundles.save(staging, replace(origin.manifest, components=components, files=files))
    return bundles.load(out)


def _hashed(origin: Bundle) -> Bundle:
    """The bundle with its artifacts' hashes where its manifest was inferred: the new one is built from them."""
    facts = origin.manifest
    if not facts.unhashed():
        return origin

    def hashed(artifact: Artifact) -> Artifact:
        return replace(artifact, files=tuple(bundles.record(origin.root, file.path) for file in artifact.files))

    components = {name: replace(c, artifact=hashed(c.artifact)) for name, c in facts.components.items()}
    sources = tuple(file for component in components.values() for file in component.artifact.files)
    provenance = replace(facts.provenance, source_files=sources)
    return Bundle(origin.root, replace(facts, components=components, provenance=provenance))


def _check(origin: Bundle, options: BuildOptions) -> None:
    for name, component in origin.manifest.components.items():
        if component.artifact.engine != ONNX:
            raise BuildError(
                f"{origin.root}: {name} is built for {component.artifact.engine} already; build starts from ONNX",
                "give the bundle that sdrt export wrote",
            )
        if component.artifact.precision != "fp32":
            raise BuildError(
                f"{origin.root}: {name} is in {component.artifact.precision}; build starts from float32",
                "sdrt generate -m runs it as it is; to build, export the checkpoint in float32",
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


def _recorder(
    origin: Bundle, options: BuildOptions, precisions: set[Precision], measures: Sequence[Precision]
) -> Recorder:  # fmt: skip
    if options.prompts and not precisions & set(measures):
        raise InputError(
            f"--calibration: nothing is measured in {', '.join(sorted(precisions))}, so that prompts have no use",
            f"leave it out, or build a component in {', '.join(measures)}" if measures else "leave it out",
        )
    effort = SCALES if precisions & {"int8", "fp8"} else RANGES
    return Recorder(origin, effort, options.prompts or PROMPTS, options.shapes[0] if options.shapes else None)


def _copy(origin: Bundle, file: File, staging: Path) -> File:
    """Copy one file; what another exporter wrote is recorded, and loses the names of its machine's folders."""
    source, target = origin.path(file.path), staging / file.path
    target.parent.mkdir(parents=True, exist_ok=True)
    if file.sha256 is not None:
        shutil.copyfile(source, target)
        return file
    config = strict_json.read(source) if target.name in ("config.json", INDEX) else None
    if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
        target.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    else:
        shutil.copyfile(source, target)
    return bundles.record(staging, file.path)


def _measured(origin: Bundle, staging: Path, name: str, component: Component) -> Component:
    """The component with its parity figures; BuildError when it does not compute the same.

    For a profile that admits no reference case (``--shape 512x512``), and where another exporter wrote the ONNX bundle,
    which then has none, cases are made: random inputs, and what ONNX Runtime computes in float32 from the ONNX bundle.
    Where no profile admits any, they take the place of the others.
    """
    if component.artifact.engine == "null":
        return component
    profiles = component.artifact.profiles
    if lacking := [each for each in profiles or ({},) if not _has_case(origin, name, each)]:
        path = component.reference.path if component.reference is not None else f"{name}/reference.npz"
        kept = read_arrays(origin, path) if component.reference is not None and len(lacking) < len(profiles) else {}
        np.savez(staging / path, **{**kept, **_own_cases(origin, name, component, lacking)})
        component = replace(component, reference=bundles.record(staging, path))
    if why := find_engine(component.artifact.engine).elsewhere(component.artifact):
        logger.warning("%s: not checked, as it cannot be run here (%s); sdrt verify checks it where it can", name, why)
        return component
    built = Bundle(staging, replace(origin.manifest, components={name: component}, text_encoders=()))
    try:
        checks_on = find_engine(component.artifact.engine).CHECKS_ON
        session = open_session(built, name, device=checks_on, options=OpenOptions())
        try:
            figures = list(measure(built, name, session))
        finally:
            session.close()
    except ElsewhereError as error:  # which only its library could tell
        logger.warning("%s: not checked, as it cannot be run here (%s)", name, error.message)
        return component
    except BundleError as error:  # of a folder that is gone when it is read
        raise BuildError(
            f"{name}: what was built in {component.artifact.precision} for {component.artifact.engine} cannot be used:"
            f" {error.message.replace(str(staging), '(what was built)')}",
            "build this component in fp32; if that fails, too, please report it with the output of sdrt doctor",
        ) from error
    for parity in figures:
        if not passed(parity, component.artifact.precision):
            raise BuildError(
                f"{name}: {component.artifact.engine} does not compute what torch computes: {parity.output} at"
                f" {parity.case} is {parity.max_abs:.3g} off ({parity.psnr} dB)",
                "please report it with the output of sdrt doctor",
            )
    return bundles.with_parity(component, figures)


def _has_case(origin: Bundle, name: str, profile: Profile) -> bool:
    return origin.component(name).reference is not None and any(True for _ in admitted(origin, name, (profile,)))


def _own_cases(origin: Bundle, name: str, component: Component, profiles: Sequence[Profile]) -> dict[str, Any]:
    """Reference arrays at each profile's ``opt``; symbols that a profile leaves free are as in the first known case."""
    if component.reference is None:
        known, free = _made_up(origin, name, component)
    else:
        known = next(iter(reference_cases(origin, name).values()))[0]
        free = solve(component.inputs, {tensor: array.shape for tensor, array in known.items()})
    session = open_session(origin, name, options=OpenOptions(extra={"prepack": "false", "optimization": "extended"}))
    arrays: dict[str, Any] = {}
    try:
        any_size: tuple[Profile, ...] = ({}, {"B": DimRange(2, 2, 2)} if "B" in free else {})
        for profile in profiles if component.artifact.profiles else any_size:
            sizes = free | {symbol: _usual(symbol, range_) for symbol, range_ in profile.items()}
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


def _usual(symbol: str, sizes: DimRange) -> int:
    """What is held against the reference of a range: what it was tuned for, but of a batch no more than two rows."""
    return max(sizes.min, min(sizes.opt, 2)) if symbol == "B" else sizes.opt


def _made_up(origin: Bundle, name: str, component: Component) -> tuple[dict[str, Any], dict[str, int]]:
    """Inputs (tokens, timestep, texts) and sizes of one picture of 64 × 64, for a component without reference vectors.

    Other exporters' U-Nets take multiples of 64 pixels only.
    """
    facts = origin.manifest
    tokens = max((text.max_length for text in facts.text_encoders), default=77)
    symbols = [split_dim(dim)[0] for spec in component.inputs for dim in spec.shape if isinstance(dim, str)]
    sizes = {symbol: {"T": tokens, "H": 64, "W": 64}.get(symbol, 1) for symbol in symbols}
    clocks = [tensor for tensor, sources in facts.denoiser.inputs.items() if sources == ("timestep",)]
    generator = np.random.default_rng(0)

    def values(spec: TensorSpec) -> Any:
        shape, dtype = spec.at(sizes), NUMPY_DTYPES[spec.dtype]
        if name == facts.denoiser.component and spec.name in clocks:
            return np.full(shape, 501, dtype)
        if np.issubdtype(dtype, np.integer):  # token ids, fewer than any CLIP vocabulary has
            return generator.integers(0, 10_000, shape).astype(dtype)
        return generator.standard_normal(shape).astype(dtype)

    return {spec.name: values(spec) for spec in component.inputs if not _is_picture(spec)}, sizes


def _is_picture(spec: TensorSpec) -> bool:
    return any(isinstance(dim, str) and split_dim(dim)[0] in ("H", "W") for dim in spec.shape)
