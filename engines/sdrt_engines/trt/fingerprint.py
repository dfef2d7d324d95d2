"""What a plan was built for and by, and whether that is what is here: told before anything of it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdrt.bundle import Artifact
from sdrt.errors import BundleError, shortened
from sdrt_engines.cuda import Gpu
from sdrt_engines.trt import targets
from sdrt_engines.trt.library import Library

SHOWN = 100
"""Characters of what a manifest says, in a message: it may have been edited by hand."""


def facts(library: Library, gpu: Gpu | None, driver: str) -> dict[str, Any]:
    """For the artifact's facts. gpu: the one that it was built on; None where it was built without."""
    built_on = None if gpu is None else {"gpu": gpu.name, "target": gpu.target, "driver": driver}
    return {"library": library.module, "version": library.version(), "built_on": built_on}


def mismatch(library: Library, artifact: Artifact, gpu: Gpu) -> str:
    """Why the plan is not for this GPU and this library, in words of both sides; empty where it is.

    BundleError where the artifact does not say what it was built by.
    """
    said = artifact.facts
    recipe = said.get("recipe")
    if (
        said.get("library") != library.module
        or not isinstance(said.get("version"), str)
        or not isinstance(recipe, dict)
    ):
        raise BundleError(
            f"the artifact does not say which version of {library.module} it was built by", "build it again"
        )
    here, by = library.version(), shortened(said["version"], SHOWN)
    if said["version"] != here and not (recipe.get("portable") is True and _number(said["version"]) <= _number(here)):
        return f"it was built by {library.title} {by}, here is {here}"
    if not targets.covers(artifact.target, gpu, artifact.precision):
        floats = f" in float8, which GPUs have from sm{targets.FLOAT8} on" if artifact.precision == "fp8" else ""
        return f"it was built for {shortened(artifact.target, SHOWN)}{floats}, here is {gpu.target} ({gpu.name})"
    built_on = said.get("built_on")
    exact = recipe.get("target") == targets.CURRENT and not library.targets
    if exact and isinstance(built_on, Mapping) and built_on.get("gpu") != gpu.name:
        on = shortened(str(built_on.get("gpu")), SHOWN)
        return f"it was built on {on} for that kind of GPU alone, here is {gpu.name}"
    return ""


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal() and len(part) < 10)
