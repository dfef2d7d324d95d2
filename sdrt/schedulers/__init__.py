"""Schedulers by name: diffusers' class names, A1111's sampler names, or a scheduler_config.json as a dict."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdrt import strict_json
from sdrt.errors import BundleError, InputError, quoted
from sdrt.schedulers.ddim import DDIM
from sdrt.schedulers.dpmpp_2m import DPMSolverPP2M
from sdrt.schedulers.euler import Euler
from sdrt.schedulers.pndm import PNDM
from sdrt.schedulers.tables import FOREIGN, Scheduler

__all__ = ["A1111", "CLASSES", "Scheduler", "label", "make", "read_config", "resolve"]

logger = logging.getLogger("sdrt")

CLASSES: dict[str, type[DDIM | DPMSolverPP2M | Euler | PNDM]] = {
    "DDIMScheduler": DDIM,
    "DPMSolverMultistepScheduler": DPMSolverPP2M,
    "EulerDiscreteScheduler": Euler,
    "PNDMScheduler": PNDM,
}

_2M = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
_MINUS_INFINITY = re.compile(rb'("lambda_min_clipped"\s*:\s*)-Infinity')

A1111: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {**_2M, "use_karras_sigmas": False}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {**_2M, "use_karras_sigmas": True}),
    "Euler": ("EulerDiscreteScheduler", {"use_karras_sigmas": False}),
    "Euler Karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "PLMS": ("PNDMScheduler", {"skip_prk_steps": True}),
}
"""A1111 sampler names: the class, and the options that the name stands for."""


def read_config(path: Path) -> dict[str, Any]:
    """scheduler_config.json as diffusers writes it. BundleError when it is damaged.

    diffusers spells DPMSolverMultistepScheduler's default ``"lambda_min_clipped": -Infinity``, which is no JSON: it is
    left out, as the default. Any other number that is not finite is refused.
    """
    raw = strict_json.read_bytes(path)
    config = strict_json.parse(_MINUS_INFINITY.sub(rb"\1null", raw), str(path))
    if not isinstance(config, dict):
        raise BundleError(f"{path}: expected an object")
    return {key: value for key, value in config.items() if not (key == "lambda_min_clipped" and value is None)}


def resolve(scheduler: str | Mapping[str, Any] | None, base: Mapping[str, Any]) -> dict[str, Any]:
    """The full config that ``scheduler`` means on a model whose scheduler_config.json is ``base``.

    A name takes over the model's config (betas, prediction type, …) as diffusers' ``from_config`` does; a dict stands
    alone and names its class in ``_class_name``; None is the model's own. InputError for an unknown name.
    """
    base = _known(base)
    if scheduler is None:
        config = dict(base)
    elif isinstance(scheduler, str):
        by_lower = {name.lower(): name for name in (*CLASSES, *A1111)}
        name = by_lower.get(" ".join(scheduler.lower().split()), "")
        if not name:
            raise _unknown(scheduler)
        class_name, options = A1111.get(name, (name, {}))
        config = {**base, **options, "_class_name": class_name}
    elif isinstance(scheduler, Mapping):
        config = dict(scheduler)
    else:
        raise InputError(f"scheduler is {type(scheduler).__name__}, expected a name or a config dict")
    if not all(isinstance(key, str) for key in config):
        raise InputError("the scheduler's config has a key that is not a text")
    chosen = config.get("_class_name")
    if not isinstance(chosen, str) or chosen not in CLASSES:
        raise _unknown(chosen)
    return config


def _known(base: Mapping[str, Any]) -> dict[str, Any]:
    """A model's own config without keys that no diffusers scheduler has; like diffusers, with a warning in the log."""
    known = FOREIGN.union(*(solver.OPTIONS.__dataclass_fields__ for solver in CLASSES.values()))
    if unknown := [key for key in base if not key.startswith("_") and key not in known]:
        listed = ", ".join(map(quoted, unknown[:5])) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        logger.warning("scheduler_config.json: unknown options are passed over: %s", listed)
    return {key: value for key, value in base.items() if key.startswith("_") or key in known}


def make(config: Mapping[str, Any], steps: int) -> Scheduler:
    """A fresh scheduler for ``steps`` steps from a config that ``resolve`` returned. InputError for what it can not."""
    return CLASSES[config["_class_name"]](config, steps)


def label(config: Mapping[str, Any]) -> str:
    """The A1111 name that a config amounts to, or its class's name where there is none."""
    assumed = {**_2M, "use_karras_sigmas": False}  # the classes' own defaults
    for name, (class_name, options) in A1111.items():
        if config["_class_name"] == class_name and all(config.get(k, assumed.get(k)) == v for k, v in options.items()):
            return name
    return str(config["_class_name"])


def _unknown(name: object) -> InputError:
    known = ", ".join((*A1111, *CLASSES))
    return InputError(f"there is no scheduler {quoted(name)}; known schedulers: {known}", "choose another scheduler")
