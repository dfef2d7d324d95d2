"""Taking turns: what is compared is measured in alternation, so that a machine that gets slower slows all alike."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdrt.bench import report
from sdrt.bench.environment import Interference, Watch
from sdrt.bench.memory import MemorySampler, library
from sdrt.bench.process import WORKER, Process, forget, worker_environment
from sdrt.bench.report import Load, Memory, Sample, Settings
from sdrt.errors import SdrtError

ROOM = 0.8
"""Share of the memory available that all processes together may take, for them to stay loaded between their turns."""

SETTLE = 0.05
"""Seconds between two processes' turns: the threads of the last one still wait busily for work for a while."""

Progress = Callable[[str], object]
"""Called before each batch with what is about to be run."""


@dataclass(frozen=True)
class Plan:
    """One thing to measure: what a process that serves is asked.

    environment: None for this process's. files: what loading reads (none when not known).
    """

    name: str
    settings: Settings
    command: Sequence[str] = WORKER
    environment: Mapping[str, str] | None = None
    files: tuple[Path, ...] = ()

    def start(self) -> Process:
        environment = self.environment
        if environment is None and self.command == WORKER:
            environment = worker_environment()
        return Process(self.command, self.name, environment)

    def loading(self) -> dict[str, Any]:
        """The line of the protocol that loads."""
        s = self.settings
        line = {"do": "load", "model": s.model, "engine": s.engine, "device": s.device, "threads": s.threads,
                "options": dict(s.options), "streams": s.streams}  # fmt: skip
        asked = {"cache": s.cache, "low_memory": s.low_memory}  # peers need not know what nobody asks for
        return line | {name: value for name, value in asked.items() if value}

    def running(self, save: str | None = None) -> dict[str, Any]:
        """The line for one turn: a batch of pictures on each stream. save: a file for the pictures."""
        s = self.settings
        return {"do": "run", "prompt": s.prompt, "negative_prompt": s.negative_prompt, "width": s.width,
                "height": s.height, "num_inference_steps": s.steps, "guidance_scale": s.guidance_scale, "seed": s.seed,
                "batch": s.batch, "scheduler": s.scheduler, "save": save}  # fmt: skip


@dataclass
class Taken:
    """What was measured of one plan, process by process. Seconds."""

    samples: list[Sample] = field(default_factory=list)
    start: list[float] = field(default_factory=list)
    imports: list[float] = field(default_factory=list)
    load: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    versions: Mapping[str, str] = field(default_factory=dict)
    memory: Memory | None = None
    cold: tuple[float, float] | None = None
    failure: SdrtError | None = None

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Keep an SdrtError: what others have measured, for hours perhaps, is not lost for it."""
        try:
            yield
        except SdrtError as error:
            self.failure = error

    def loads(self) -> Load:
        cold_load, cold_first = self.cold if self.cold is not None else (None, None)
        return Load(
            tuple(self.start), tuple(self.imports), tuple(self.load), tuple(self.first), cold_load, cold_first
        )  # fmt: skip


def measure_memory(plan: Plan, taken: Taken, progress: Progress) -> None:
    """Load from cold files, make two batches, and watch the memory from outside meanwhile; no stage is timed."""
    progress(f"{plan.name}: memory")
    cold = bool(plan.files) and forget(plan.files)
    with plan.start() as process, MemorySampler(process.pid) as sampler:
        answer = process.ask(plan.loading())
        loaded = sampler.now()
        first = process.ask(plan.running())["wall"]
        progress(f"{plan.name}: memory")
        held = process.ask(plan.running()).get("held", {})
        taken.memory = Memory(loaded, sampler.now(), sampler.peak(), held)
    taken.versions = answer["versions"]
    if cold:
        taken.cold = (answer["load"], first)


def take_turns(
    plans: Mapping[str, Plan], taken: Mapping[str, Taken], *, warmups: int, iterations: int, processes: int,
    resident: bool, progress: Progress,
) -> list[Interference]:  # fmt: skip
    """``iterations`` turns in each of ``processes`` starts, in an order that changes from turn to turn.

    resident: all processes of a start stay loaded, and take turns batch by batch; otherwise each is started for its
    turns alone, one after another. Fills ``taken``; says what else went on, start by start. A plan that fails is left
    out from then on.
    """
    order = random.Random(0)
    interference = []
    for number in range(processes):
        left = [name for name in plans if taken[name].failure is None]
        for names in [left] if resident else [[name] for name in order.sample(left, len(left))]:
            with contextlib.ExitStack() as stack:
                running: dict[str, Process] = {}
                for name in order.sample(names, len(names)):
                    with taken[name].failing(), contextlib.ExitStack() as failed:
                        process = failed.enter_context(plans[name].start())
                        _begin(plans[name], process, taken[name], warmups, progress)
                        running[name] = process
                        stack.push(failed.pop_all())  # one that fails is ended at once: it would hold its memory
                watch = Watch(process.pid for process in running.values())
                for turn in range(iterations):
                    for name in order.sample(list(running), len(running)):
                        progress(f"{name}: turn {turn + 1} of {iterations}")
                        time.sleep(SETTLE)
                        with taken[name].failing():
                            answer = running[name].ask(plans[name].running())
                            taken[name].samples += report.samples(answer, number, turn)
                            if turn == 0 and not warmups:
                                taken[name].first.append(answer["wall"])
                        if taken[name].failure is not None:
                            running.pop(name).close()
                            watch = Watch(process.pid for process in running.values())  # whose time can still be read
                interference.append(watch.stop())
    return interference


def _begin(plan: Plan, process: Process, taken: Taken, warmups: int, progress: Progress) -> None:
    """Load, and warm up; without warm-ups the first batch is that of the first turn."""
    progress(f"{plan.name}: load")
    answer = process.ask(plan.loading())
    taken.versions = answer["versions"]
    taken.start.append(process.start)
    taken.imports.append(answer["import"])
    taken.load.append(answer["load"])
    for number in range(warmups):
        progress(f"{plan.name}: warm-up")
        wall = process.ask(plan.running())["wall"]
        if number == 0:
            taken.first.append(wall)


def fits_in_memory(taken: Iterable[Taken]) -> bool:
    """Whether all that was measured can stay loaded at the same time, going by the peaks seen."""
    peaks = [t.memory.peak.rss for t in taken if t.memory is not None]
    return bool(sum(peaks) <= ROOM * library().virtual_memory().available)
