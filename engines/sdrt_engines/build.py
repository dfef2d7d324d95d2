"""``sdrt build``: an ONNX bundle → a self-contained bundle for one engine, with parity figures measured here."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sdrt import bundle as bundles
from sdrt.bundle import Bundle, Component
from sdrt.engine import ONNX, BuildOptions, OpenOptions, find_engine, open_session
from sdrt.errors import BuildError, InputError
from sdrt.request import MAX_SIDE
from sdrt.staging import new_directory
from sdrt.verify import measure, passed

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
    origin = bundles.load(source)
    module = find_engine(engine)
    module.devices()  # an engine that is not usable here says so before anything is written
    _check(origin, options)
    with new_directory(out, force=force) as staging:
        components: dict[str, Component] = {}
        names = list(origin.manifest.components)
        for done, name in enumerate(names):
            report(name, "build", done / len(names))
            component = origin.component(name)
            artifact = module.build(origin, name, staging, options)
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


def _copy(origin: Bundle, relative: str, staging: Path) -> None:
    target = staging / relative
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(origin.path(relative), target)


def _measured(origin: Bundle, staging: Path, name: str, component: Component) -> Component:
    built = Bundle(staging, replace(origin.manifest, components={name: component}, text_encoders=()))
    if component.reference is None or component.artifact.engine == "null":
        return component
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
