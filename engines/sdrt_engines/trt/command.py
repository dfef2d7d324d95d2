"""The command that builds a bundle's plans again for a GPU, as far as the bundle tells how they were built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sdrt import by_component
from sdrt.bundle import Bundle, Component, Precision
from sdrt.errors import BundleError, shortened
from sdrt_engines.cuda import Gpu
from sdrt_engines.trt import plan, targets
from sdrt_engines.trt.building import GRAPH
from sdrt_engines.trt.library import Library


def rebuild(library: Library, bundle: Bundle, gpu: Gpu, *, keep_graph: bool = False) -> str:
    """``sdrt build`` with what all plans of the bundle were built with: one component may know no size, or no picture.

    keep_graph: whether to leave the graphs beside the plans, even if this bundle has none.
    """
    held = {n: c for n, c in bundle.manifest.components.items() if c.artifact.engine == library.engine}
    recipes = [recipe for component in held.values() if (recipe := _recipe(component)) is not None]
    precisions = {name: _precision(component, gpu) for name, component in held.items()}
    words = [f"sdrt build ONNX_BUNDLE OUT --engine {library.engine}", f"--precision {_spelt(precisions)}"]
    profiles = [profile for component in held.values() for profile in component.artifact.profiles]
    sizes = dict.fromkeys((p["W"].opt, p["H"].opt) for p in profiles if {"W", "H"} <= p.keys())
    words += [f"--shape {width}x{height}" for width, height in sizes]
    # Guidance runs what sees the prompt with two rows a picture.
    batch = max((p["B"].max // (2 if "T" in p else 1) for p in profiles if "B" in p), default=1)
    words += [f"--batch {batch}"] if batch > 1 else []
    words += _target(library, gpu, recipes, set(precisions.values()))
    words += _options(
        recipes, keep_graph or any(f.path.endswith(GRAPH) for c in held.values() for f in c.artifact.files)
    )
    return shortened(" ".join(words))  # a manifest may have been edited by hand


def _recipe(component: Component) -> plan.Recipe | None:
    try:
        return plan.Recipe.of(component)
    except BundleError:  # of another component than the one that is opened: told when it is
        return None


def _precision(component: Component, gpu: Gpu) -> Precision:
    precision = component.artifact.precision
    return "fp16" if precision == "fp8" and targets.number(gpu.target) < targets.FLOAT8 else precision


def _spelt(precisions: dict[str, Precision]) -> str:
    """As ``--precision`` takes it: what is not named is fp32."""
    if len(set(precisions.values())) == 1:
        return next(iter(precisions.values()))
    return by_component.text({name: precision for name, precision in precisions.items() if precision != "fp32"})


def _target(
    library: Library, gpu: Gpu, recipes: Sequence[plan.Recipe], precisions: set[Precision]
) -> list[str]:  # fmt: skip
    """The plan's own target where it was a choice that is good for this GPU; this GPU where the default is not."""
    default = targets.parsed(library, None)
    for recipe in recipes:
        known = recipe.target not in (default, targets.CURRENT, targets.ANY)
        if known and all(targets.covers(recipe.target, gpu, precision) for precision in precisions):
            return [f"--target {recipe.target}"]
    if default != targets.ANY or all(targets.covers(default, gpu, precision) for precision in precisions):
        return []
    return [f"--target {gpu.target}"]


def _options(recipes: Sequence[plan.Recipe], keep_graph: bool) -> list[str]:
    """``-O name=value`` for what differs from a default."""
    changed: dict[str, Any] = {}
    for recipe in recipes:
        default = plan.Recipe(recipe.target).facts()
        changed |= {name: value for name, value in recipe.facts().items() if value != default[name]}
    if keep_graph and "strip" not in changed:
        changed["keep_graph"] = True
    return [f"-O {name}={str(value).lower()}" for name, value in changed.items()]
