"""Measuring: a loaded pipeline in this process, or several things in processes of their own, in alternation."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from datetime import UTC, datetime

from sdrt import bundle as bundles
from sdrt import schedulers
from sdrt.bench import environment, facts, report, roof
from sdrt.bench.compare import side_by_side
from sdrt.bench.environment import Watch
from sdrt.bench.memory import MemorySampler, library
from sdrt.bench.report import Memory, Report, Settings, Variant
from sdrt.bench.rounds import Plan, Progress, Taken, fits_in_memory, measure_memory, take_turns
from sdrt.bench.sweep import best
from sdrt.bench.worker import stages
from sdrt.bundle import Bundle
from sdrt.engine import DeviceMemory
from sdrt.errors import InputError
from sdrt.pipeline import Pipeline
from sdrt.request import GenerationRequest


def measure(
    pipe: Pipeline, request: GenerationRequest, *, warmups: int = 1, iterations: int = 5, memory: bool = True,
    machine: bool = True, progress: Progress = lambda _: None,
) -> Report:  # fmt: skip
    """Time a loaded pipeline in this process: ``iterations`` batches after ``warmups``, stage by stage.

    memory: afterwards, apart from timing, make one more batch and watch this whole process's memory. machine: measure
    what the machine can do, some seconds. Loading is not measured: ``sdrt bench`` does, in processes of their own.
    progress is called before each batch.

    Raises what ``pipe.generate`` does; EngineUnavailable without psutil; InputError for counts out of range.
    """
    library()  # before anything takes long
    _check_counts(warmups=warmups, iterations=iterations)
    for _ in range(warmups):
        progress("warm-up")
        pipe.generate(request)
    watch, taken = Watch(), []
    for turn in range(iterations):
        progress(f"batch {turn + 1} of {iterations}")
        sample = stages(pipe.generate(request).timings)
        taken += report.samples({"wall": sample["total"], "samples": [sample]}, 0, turn)
    interference = watch.stop()
    settings = _settings(pipe, request)
    made = report.variant(
        pipe.bundle.root.name, settings, taken,
        versions=facts.versions(("numpy", *facts.engines(pipe.bundle, settings.engine))),
        memory=_memory(pipe, request, progress) if memory else None, **facts.describe(pipe.bundle),
    )  # fmt: skip
    if machine:
        progress("what the machine can do")
        made = _with_roof(made, pipe.bundle, {})
    return Report(
        _now(),
        "",
        environment.examine(facts.devices(pipe.bundle, settings.engine)),
        (made,),
        interference=(interference,),
    )


def _memory(pipe: Pipeline, request: GenerationRequest, progress: Progress) -> Memory:
    progress("memory")
    with MemorySampler(os.getpid()) as sampler:
        before = sampler.now()
        pipe.generate(request)
        return Memory(before, sampler.now(), sampler.peak(), DeviceMemory.together(pipe.memory().values()))


def _settings(pipe: Pipeline, request: GenerationRequest) -> Settings:
    request = request.with_guidance(pipe.bundle.manifest.guidance_scale)
    assert request.guidance_scale is not None, "it has the model's own now"
    space = pipe.bundle.manifest.latents
    width, height = request.size((space.default_width, space.default_height), space.downscale)
    return Settings(
        model=str(pipe.bundle.root), width=width, height=height, batch=len(request.prompts),
        steps=request.num_inference_steps, guidance_scale=float(request.guidance_scale),
        scheduler=schedulers.label(schedulers.resolve(request.scheduler, pipe.scheduler_config)),
        prompt=request.prompts[0],
        negative_prompt=None if request.negative_prompt is None else request.negative_prompts[0],
        seed=request.seed or 0,
        engine=pipe.opening.engine, device=pipe.opening.device, threads=pipe.opening.options.threads,
        options=pipe.opening.options.extra, low_memory=pipe.opening.low_memory,
        cache=None if pipe.opening.options.cache is None else str(pipe.opening.options.cache),
    )  # fmt: skip


# -- in processes of their own -----------------------------------------------------------------------------------------


def alternate(
    plans: Mapping[str, Plan], *, warmups: int = 1, iterations: int = 5, processes: int = 1, memory: bool = True,
    machine: bool = True, resident: bool | None = None, command: str = "", progress: Progress = lambda _: None,
) -> Report:  # fmt: skip
    """Measure each plan (by name), in alternation, and compare each with the first one that does the same work.

    Each is loaded once with cold files and watched for memory; then timed, in ``processes`` fresh starts of ``warmups``
    and ``iterations`` batches. memory=False leaves the first part out, the cold start with it. machine: measure what
    the machine can do. resident: whether all stay loaded, and take turns batch by batch; None: if main memory has room
    for all, as far as that was measured. progress is called ``steps(...)`` times.

    A plan that fails is left out, and told under ``failures``. Raises its SdrtError, which names the plan, when all do;
    EngineUnavailable without psutil; InputError for counts out of range.
    """
    library()  # before anything takes long
    _check_counts(warmups=warmups, iterations=iterations, processes=processes)
    taken = {name: Taken() for name in plans}
    if memory:
        for name, plan in plans.items():
            with taken[name].failing():
                measure_memory(plan, taken[name], progress)
    resident = len(plans) > 1 and (fits_in_memory(taken.values()) if resident is None else resident)
    interference = take_turns(
        plans, taken, warmups=warmups, iterations=iterations, processes=processes, resident=resident, progress=progress
    )
    failures = {name: done.failure for name, done in taken.items() if done.failure is not None}
    if len(failures) == len(plans):
        raise next(iter(failures.values()))
    variants: list[Variant] = []
    devices: dict[str, dict[str, str]] = {}
    known: roof.Measured = {}
    for name, done in taken.items():
        if name in failures:
            continue
        settings, bundle = plans[name].settings, _bundle(plans[name])
        made = report.variant(
            name, settings, done.samples, versions=done.versions, load=done.loads(), memory=done.memory,
            **(facts.describe(bundle) if bundle is not None else {}),
        )  # fmt: skip
        if bundle is not None:
            devices |= facts.devices(bundle, settings.engine)
            if machine:
                progress(f"{name}: what the machine can do")
                made = _with_roof(made, bundle, known)
        variants.append(made)
    warnings = []
    if len(plans) > 1 and not resident:
        warnings.append("they do not fit into memory together: each had a start's batches in a row, not in turn")
    return Report(
        created=_now(),
        command=command,
        environment=environment.examine(devices),
        variants=tuple(variants),
        comparisons=tuple(side_by_side(variants, paired=resident)),
        interference=tuple(interference),
        best=best(variants, warmups, iterations),
        failures={name: str(error) for name, error in failures.items()},
        warnings=tuple(warnings),
    )


def _bundle(plan: Plan) -> Bundle | None:
    """What sdrt's own runner loads; what a peer loads is no bundle."""
    return bundles.load(plan.settings.model) if plan.settings.runner == "sdrt" else None


def steps(plans: int, *, warmups: int, iterations: int, processes: int, memory: bool, machine: bool) -> int:
    """How often ``alternate`` calls its progress, when all plans are sdrt's."""
    return plans * (2 * memory + processes * (1 + warmups + iterations) + machine)


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        least = 0 if name == "warmups" else 1
        if type(value) is not int or value < least:
            raise InputError(f"{name} is {value!r}, expected an integer of at least {least}")


def _with_roof(variant: Variant, bundle: Bundle, known: roof.Measured) -> Variant:
    rates, missing = roof.rates(bundle, variant.settings, known)
    roofs = roof.roof(bundle, variant.settings, rates, variant.stages)
    if rates is not None and not roofs:
        missing = [*missing, "its work was not counted: export the checkpoint, or build the bundle, again"]
    return dataclasses.replace(variant, rates=rates, roof=roofs, warnings=(*variant.warnings, *missing))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
