"""Schedulers by name: diffusers' class names, A1111's sampler names, or a scheduler_config.json as a dict."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdrt import strict_json
from sdrt.errors import BundleError, InputError, quoted
from sdrt.schedulers import levels, options, tables
from sdrt.schedulers.ddim import DDIM
from sdrt.schedulers.ddpm import DDPM
from sdrt.schedulers.deis import DEISMultistep
from sdrt.schedulers.dpm_fast import DPMSolverFast
from sdrt.schedulers.dpm_multistep import DPMSolverMultistep
from sdrt.schedulers.dpm_singlestep import DPMSolverSinglestep
from sdrt.schedulers.dpmpp_2s_ancestral import DPMSolver2SAncestral
from sdrt.schedulers.dpmpp_sde import DPMSolverSDE
from sdrt.schedulers.edm import EDMEuler
from sdrt.schedulers.edm_dpm import EDMDPMSolverMultistep
from sdrt.schedulers.euler import Euler
from sdrt.schedulers.euler_ancestral import EulerAncestral
from sdrt.schedulers.flow_match import FlowMatchEuler
from sdrt.schedulers.flow_match_heun import FlowMatchHeun
from sdrt.schedulers.heun import Heun
from sdrt.schedulers.kdpm2 import KDPM2
from sdrt.schedulers.kdpm2_ancestral import KDPM2Ancestral
from sdrt.schedulers.lcm import LCM
from sdrt.schedulers.lms import LMS
from sdrt.schedulers.pndm import PNDM
from sdrt.schedulers.restart import Restart
from sdrt.schedulers.sa import SASolver
from sdrt.schedulers.tables import Array, Scheduler, Solver
from sdrt.schedulers.tcd import TCD
from sdrt.schedulers.unipc import UniPC

__all__ = ["A1111", "CLASSES", "NAMES", "SUFFIXES", "Scheduler", "label", "make", "read_config", "resolve"]

logger = logging.getLogger("sdrt")

_SOLVERS: tuple[Solver, ...] = (
    # Deterministic.
    DDIM,
    DEISMultistep,
    DPMSolverMultistep,
    DPMSolverSinglestep,
    Euler,
    FlowMatchEuler,
    FlowMatchHeun,
    Heun,
    KDPM2,
    LMS,
    PNDM,
    UniPC,
    # Stochastic.
    DDPM,
    DPMSolver2SAncestral,
    DPMSolverFast,
    DPMSolverSDE,
    EDMDPMSolverMultistep,
    EDMEuler,
    EulerAncestral,
    KDPM2Ancestral,
    LCM,
    Restart,
    SASolver,
    TCD,
)

CLASSES: dict[str, Solver] = {solver.ABOUT.diffusers: solver for solver in _SOLVERS}
"""By diffusers' class name."""

_2M = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}

_SDE = {**_2M, "algorithm_type": "sde-dpmsolver++"}

NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    # Deterministic.
    "DDIM": ("DDIMScheduler", {}),
    "DEIS": ("DEISMultistepScheduler", {"algorithm_type": "deis"}),  # not what SA-Solver's configs say
    "DPM++ 2M": ("DPMSolverMultistepScheduler", _2M),
    "DPM++ 2M Heun": ("DPMSolverMultistepScheduler", {**_2M, "solver_type": "heun"}),
    "DPM++ 3M": ("DPMSolverMultistepScheduler", {**_2M, "solver_order": 3}),
    "DPM++ 2S": ("DPMSolverSinglestepScheduler", _2M),
    "DPM2": ("KDPM2DiscreteScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "PLMS": ("PNDMScheduler", {"skip_prk_steps": True}),
    "UniPC": ("UniPCMultistepScheduler", {"lower_order_final": True}),  # other classes' configs may say otherwise
    # Stochastic.
    "DDPM": ("DDPMScheduler", {}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", _SDE),
    "DPM++ 2M SDE Heun": ("DPMSolverMultistepScheduler", {**_SDE, "solver_type": "heun"}),
    "DPM++ 2S a": ("DPMSolver2SAncestralScheduler", {}),
    "DPM++ 3M SDE": ("DPMSolverMultistepScheduler", {**_SDE, "solver_order": 3}),
    "DPM++ SDE": ("DPMSolverSDEScheduler", {}),
    "DPM fast": ("DPMSolverFastScheduler", {}),
    "DPM2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "LCM": ("LCMScheduler", {}),
    "Restart": ("RestartScheduler", {}),
    "SA-Solver": ("SASolverScheduler", {"algorithm_type": "data_prediction"}),  # DPM-Solver's configs have their own
    "TCD": ("TCDScheduler", {}),
}
"""A1111's sampler names without a schedule's: the class, and the options that the name stands for."""

SUFFIXES: dict[str, dict[str, Any]] = {
    "Karras": {"use_karras_sigmas": True},
    "Exponential": {"use_exponential_sigmas": True},
    "Beta": {"use_beta_sigmas": True},
    "SGM Uniform": {"timestep_spacing": "sgm_uniform"},
    "AYS": {"timestep_spacing": "ays"},
    "AYS XL": {"timestep_spacing": "ays_xl"},
    "Uniform": {"timestep_spacing": "uniform"},
    "Simple": {"timestep_spacing": "simple"},
    "DDIM": {"timestep_spacing": "ddim_uniform"},
    "KL Optimal": {"timestep_spacing": "kl_optimal", "final_sigmas_type": "sigma_min"},
    "Align Your Steps": {"timestep_spacing": "align_your_steps"},
    "Align Your Steps XL": {"timestep_spacing": "align_your_steps_xl"},
}
"""A1111's names of schedules, which follow a sampler's: what each adds to the options. AYS is as its authors, and
diffusers, have it."""

SAME = {"Normal": "Uniform", "Polyexponential": "Exponential"}
"""Schedules of A1111's that are others of them: Polyexponential with ρ = 1, as A1111 calls it."""

_FLAGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


def _named() -> dict[str, tuple[str, dict[str, Any]]]:
    """Every sampler's name, alone and with each schedule that its class has."""
    named = {}
    for name, (class_name, own) in NAMES.items():
        kind = CLASSES[class_name].OPTIONS
        plain = {flag: False for flag in _FLAGS if options.accepts(kind, **{flag: False})}
        named[name] = (class_name, {**own, **plain})
        needless: set[str] = set()
        if issubclass(kind, levels.SigmaSchedule) and kind.ALWAYS_ENDS_AT_SIGMA_MIN:
            needless = {"final_sigmas_type"}
        for suffix, options_of in SUFFIXES.items():
            schedule = {option: value for option, value in options_of.items() if option not in needless}
            if options.accepts(kind, **schedule) and not own.keys() & schedule.keys():
                named[f"{name} {suffix}"] = (class_name, {**own, **plain, **schedule})
    return named


A1111: dict[str, tuple[str, dict[str, Any]]] = _named()
"""All of A1111's names: the class, and the options that the name stands for, whatever the model's own are."""

_MINUS_INFINITY = re.compile(rb'("lambda_min_clipped"\s*:\s*)-Infinity')


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
        config = _without_extra(base, base.get("_class_name"))
    elif isinstance(scheduler, str):
        by_lower = {name.lower(): name for name in (*CLASSES, *A1111)}
        said = " ".join(scheduler.lower().split())
        for word, same in SAME.items():
            if said.endswith(f" {word.lower()}"):
                said = said[: -len(word)] + same.lower()
        name = by_lower.get(said, "")
        if not name:
            raise _unknown(scheduler)
        class_name, meant = A1111.get(name, (name, {}))
        if name in A1111 and base.get("timestep_spacing") in levels.OURS:
            del base["timestep_spacing"]  # a schedule's, which is for the name to say
        config = {**_without_extra(base, class_name), **meant, "_class_name": class_name}
    elif isinstance(scheduler, Mapping):
        config = dict(scheduler)
        _tell_of_foreign(config, base)
    else:
        raise InputError(f"scheduler is {type(scheduler).__name__}, expected a name or a config dict")
    if not all(isinstance(key, str) for key in config):
        raise InputError("the scheduler's config has a key that is not a text")
    chosen = config.get("_class_name")
    if not isinstance(chosen, str) or chosen not in CLASSES:
        raise _unknown(chosen)
    return config


def _tell_of_foreign(config: Mapping[str, Any], base: Mapping[str, Any]) -> None:
    """A warning of a caller's options that another class has, and not theirs; the model's own come along untold."""
    class_name = config.get("_class_name")
    if not isinstance(class_name, str) or class_name not in CLASSES:
        return  # an error soon
    solver = CLASSES[class_name]
    own = solver.OPTIONS.__dataclass_fields__.keys() - solver.ABOUT.unused
    spacing = config.get("timestep_spacing")
    if isinstance(spacing, str) and spacing in levels.OURS:
        own |= {"timestep_spacing"}
    asked = [key for key in config if key in options.FOREIGN and key not in own]
    if foreign := [key for key in asked if key not in base or quoted(config[key]) != quoted(base[key])]:
        logger.warning("%s has no %s: passed over, as other schedulers' options", class_name, ", ".join(foreign))


def _without_extra(base: Mapping[str, Any], class_name: object) -> dict[str, Any]:
    """A model's own config without options that diffusers' class has not, and ours has for A1111's names and dicts."""
    extra = CLASSES[class_name].ABOUT.extra if isinstance(class_name, str) and class_name in CLASSES else ()
    return {key: value for key, value in base.items() if key not in extra}


def _known(base: Mapping[str, Any]) -> dict[str, Any]:
    """A model's own config without keys that no diffusers scheduler has; like diffusers, with a warning in the log."""
    known = options.FOREIGN.union(*(solver.OPTIONS.__dataclass_fields__ for solver in CLASSES.values()))
    if unknown := [key for key in base if not key.startswith("_") and key not in known]:
        listed = ", ".join(map(quoted, unknown[:5])) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        logger.warning("scheduler_config.json: unknown options are passed over: %s", listed)
    return {key: value for key, value in base.items() if key.startswith("_") or key in known}


def make(
    config: Mapping[str, Any],
    steps: int | None,
    *,
    timesteps: Sequence[float] | Array | None = None,
    sigmas: Sequence[float] | Array | None = None,
    eta: float | None = None,
) -> Scheduler:
    """A fresh scheduler for ``steps`` steps from a config that ``resolve`` returned. InputError for what it can not.

    timesteps, sigmas: where the steps lie, instead of spacing them; falling, one of both; steps is None then, or as
    many. eta: how much fresh noise each step draws, 0 to 1. Each for the classes whose ``ABOUT.accepts`` has it.
    """
    solver = CLASSES[config["_class_name"]]
    return solver(config, tables.plan(solver.ABOUT, steps, timesteps=timesteps, sigmas=sigmas, eta=eta))


def label(config: Mapping[str, Any]) -> str:
    """The shortest A1111 name that a config amounts to, or its class's name where there is none."""
    class_name = str(config["_class_name"])
    assumed = CLASSES[class_name].OPTIONS()
    found = [
        name
        for name, (named, meant) in A1111.items()
        if named == class_name
        and all((config.get(key, getattr(assumed, key)) or False) == value for key, value in meant.items())
        and ("timestep_spacing" in meant or config.get("timestep_spacing") not in levels.OURS)
    ]
    return min(found, key=len, default=class_name)


def _unknown(name: object) -> InputError:
    known = ", ".join((*NAMES, *CLASSES))
    schedules = ", ".join((*SUFFIXES, *SAME))
    return InputError(
        f"there is no scheduler {quoted(name)}; known schedulers: {known}; most A1111 names may be followed by one of"
        f" {schedules}",
        "choose another scheduler",
    )
