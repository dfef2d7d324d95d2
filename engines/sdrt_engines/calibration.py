"""What a component's inputs look like in real runs: a few prompts, denoised on ONNX Runtime, recorded.

Ranges for float16 and scales for int8 are measured over these (``graph/ranges.py``).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sdrt import schedulers
from sdrt.bundle import Bundle, Component, Manifest
from sdrt.engine import Array, DeviceMemory, Samples, Session
from sdrt.errors import InputError
from sdrt.image_file import MAX_SIDE
from sdrt.pipeline import SOURCES, Pipeline
from sdrt.verify import reference_cases

PROMPTS = (
    "a photograph of an old fisherman mending a net on a wooden pier, morning fog",
    "portrait of a young woman with freckles, studio light, 85mm",
    "a city street at night in the rain, neon signs, reflections on wet asphalt",
    "an oil painting of snow-covered mountains above a lake",
    "macro shot of a dew drop on a blade of grass, shallow depth of field",
    "isometric vector illustration of a tiny bakery, flat colours, white background",
    "a tabby cat asleep on a pile of books, watercolour",
    "black",
)
"""Different in subject, medium, brightness, detail and length: activations' ranges follow all of these."""

OPENING = {"prepack": "false", "optimization": "extended"}
"""Weights stay mapped from their file: this runs beside the build, and its speed matters less than its memory."""

_Settings = tuple[dict[str, Any], int]
"""A run's scheduler config and number of steps."""

Report = Callable[[str, float], object]
"""(what is being done, fraction of it in [0, 1])"""


@dataclass(frozen=True)
class Effort:
    """How much is recorded. prompts: the most that are run, the first of those given; no more than ``calls``. steps: of
    the runs, in turn. calls: kept of each component. side: pixels, the longer side of the pictures at most.
    """

    prompts: int
    steps: tuple[int, ...]
    calls: int
    side: int = MAX_SIDE

    def size(self, width: int, height: int) -> tuple[int, int]:
        """The size of the pictures that are made for width × height; multiples of 64, of the same proportions."""
        if max(width, height) <= self.side:
            return width, height
        shrunk = (side * self.side / max(width, height) for side in (width, height))
        small_width, small_height = (max(64, round(side / 64) * 64) for side in shrunk)
        return small_width, small_height


RANGES = Effort(prompts=2, steps=(4,), calls=4, side=256)
"""Enough for float16, which wants to know the binade: no tensor of 18 calls with other prompts at another size was seen
above 1.8 times its largest in these 4 (tiny U-Net, benchmarks/LOG.md), and the margin is 4."""

SCALES = Effort(prompts=16, steps=(6, 4, 8), calls=16)
"""For int8, whose error follows the scale."""

SCHEDULERS = (None, "Euler", "DPM++ 2M Karras")
"""In turn; None is the model's own. What solvers leave in the latents differs in spread: with scales of one, another's
pictures are clipped (benchmarks/LOG.md)."""


def read_prompts(path: str | Path) -> tuple[str, ...]:
    r"""One prompt a line (\n or \r\n); empty lines are passed over, and a byte order mark.

    InputError when there is no prompt, or the file cannot be read.
    """
    try:
        lines = Path(path).read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}", "give a text file, one prompt a line") from None
    if not (prompts := tuple(line.strip() for line in lines if line.strip())):
        raise InputError(f"{path}: holds no prompt", "give a text file, one prompt a line")
    return prompts


@dataclass
class Recorder:
    """The recorded inputs of a bundle's components. The runs are made when the first of them is asked for.

    size: (width, height) in pixels, None for the model's own.
    """

    bundle: Bundle
    effort: Effort
    prompts: tuple[str, ...] = PROMPTS
    size: tuple[int, int] | None = None
    _recorded: dict[str, list[dict[str, Array]]] = field(default_factory=dict)
    _facts: dict[str, Any] = field(default_factory=dict)

    def samples(self, name: str, report: Report = lambda *_: None) -> Samples:
        """The inputs of one component.

        Those of its reference vectors, which are noise, when the bundle cannot make pictures or none of its runs uses
        the component: ``facts`` and ``report`` say so.
        """
        if not self._facts:
            self._run(report)
        if name in self._recorded:
            calls = self._recorded[name]
            return Samples(tuple(calls), self._facts | {"calls": len(calls)})
        why = self._facts.get("why", "text to image does not run it")
        report(f"calibrate on reference vectors: {why}", 0.0)
        calls = [inputs for inputs, _ in reference_cases(self.bundle, name).values()]
        return Samples(tuple(calls), {"source": "reference vectors", "why": why, "calls": len(calls)})

    def _run(self, report: Report) -> None:
        prompts = self.prompts[: self.effort.prompts]
        facts = self.bundle.manifest
        if why := _cannot_run(facts):
            self._facts = {"why": why}
            return
        with Pipeline.from_pretrained(self.bundle.root, "onnxruntime", options=OPENING) as opened:
            runs = self._runs(opened, len(prompts))
            pictures = self._denoise(opened, prompts, runs, report)
        if (encoder := facts.components.get("vae_encoder")) is not None:
            self._recorded["vae_encoder"] = [_encoder_inputs(encoder, picture) for picture in pictures]
        self._facts = {
            "source": "denoising runs",
            "prompts": len(prompts),
            "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
            "schedulers": list(dict.fromkeys(schedulers.label(config) for config, _ in runs)),
            "steps": list(dict.fromkeys(steps for _, steps in runs)),
            "size": list(self._size()),
        }

    def _size(self) -> tuple[int, int]:
        """Width and height of the pictures."""
        space = self.bundle.manifest.latents
        return self.effort.size(*(self.size or (space.default_width, space.default_height)))

    def _runs(self, opened: Pipeline, count: int) -> list[_Settings]:
        """What each of ``count`` prompts is run with: schedulers that can be made of the model's config.

        Its own is left out, too, if this sdrt lacks its class: pictures are made with another then. InputError when
        none is left.
        """
        own = opened.scheduler_config
        configs: list[dict[str, Any]] = []
        errors: list[InputError] = []
        for name in SCHEDULERS:
            try:
                config = schedulers.resolve(name, own)
                for steps in self.effort.steps:
                    schedulers.make(config, steps)
            except InputError as error:
                errors.append(error)
                continue
            if schedulers.label(config) not in map(schedulers.label, configs):
                configs.append(config)
        if not configs:
            raise errors[0]
        numbers = self.effort.steps
        # Each scheduler meets every number of steps: where the two cycles would go in step, one is shifted each round.
        shift = math.gcd(len(configs), len(numbers)) > 1
        return [
            (configs[i % len(configs)], numbers[(i + shift * (i // len(configs))) % len(numbers)]) for i in range(count)
        ]

    def _denoise(
        self, opened: Pipeline, prompts: Sequence[str], runs: Sequence[_Settings], report: Report
    ) -> list[Array]:  # fmt: skip
        """Run the prompts, record what each session is fed; returns the pictures, f32[1,H,W,3] in [0,1]."""
        total = sum(len(schedulers.make(config, steps).timesteps) for config, steps in runs)
        denoiser = self.bundle.manifest.denoiser.component
        # The others are called at least once a prompt.
        counts = {name: total if name == denoiser else len(prompts) for name in opened.sessions}
        recording = {
            name: _Recording(session, _spread(counts[name], self.effort.calls))
            for name, session in opened.sessions.items()
        }
        pipe = Pipeline(self.bundle, dict(recording))
        width, height = self._size()
        pictures = []
        for number, (prompt, (config, steps)) in enumerate(zip(prompts, runs, strict=True)):
            what = f"calibrate, prompt {number + 1} of {len(prompts)}"
            report(what, number / len(prompts))
            arguments: dict[str, Any] = {
                "width": width, "height": height, "num_inference_steps": steps, "scheduler": config
            }  # fmt: skip
            step = None
            for step in pipe.stream(prompt, seed=number, truncate=True, **arguments):
                report(what, (number + (step.index + 1) / (step.total + 1)) / len(prompts))
            assert step is not None, "a scheduler makes at least one call"
            pictures.append(pipe.decode(step.latents, "np"))
        self._recorded |= {name: session.calls for name, session in recording.items()}
        return pictures


def _cannot_run(facts: Manifest) -> str:
    """Why the bundle makes no picture from a text, or "". By what it holds only: a damaged file must not pass here.

    The texts go into manifests: nothing of the bundle's own stands in them.
    """
    if facts.denoiser.component not in facts.components:
        return "the bundle has no denoiser"
    if "vae_decoder" not in facts.components:
        return "the bundle has no vae_decoder"
    wanted = {source for sources in facts.denoiser.inputs.values() for source in sources}
    if wanted - set(SOURCES):
        return "the denoiser takes inputs that this sdrt cannot make"
    if "text.hidden_states" in wanted and not facts.text_encoders:
        return "the bundle has no text encoder"
    if "text.pooled" in wanted and not any(text.pooled for text in facts.text_encoders):
        return "no text encoder of the bundle gives the pooled embedding"
    return ""


def _encoder_inputs(encoder: Component, picture: Array) -> dict[str, Array]:
    """picture: f32[1,H,W,3] in [0,1] → the encoder's f32[1,3,H,W] in [-1,1]."""
    sample = np.ascontiguousarray(2 * picture.transpose(0, 3, 1, 2) - 1)
    return {encoder.inputs[0].name: sample.astype(np.float32)}


def _spread(calls: int, count: int) -> frozenset[int]:
    """``count`` of the calls, evenly over all runs; the golden section keeps it from meeting one timestep only."""
    if calls <= count:
        return frozenset(range(calls))
    width = calls / count
    return frozenset(int((i + i * 0.618 % 1) * width) for i in range(count))


class _Recording:
    """A session that keeps what it is fed, of the calls whose numbers are given."""

    def __init__(self, session: Session, kept: Container[int]) -> None:
        self.spec = session.spec
        self.calls: list[dict[str, Array]] = []
        self._session = session
        self._kept = kept
        self._number = 0
        self._bound: dict[str, Array] = {}

    def prepare(self, sizes: Mapping[str, int]) -> bool:
        return self._session.prepare(sizes)

    def bind(self, **constants: Array) -> None:
        self._bound |= constants
        self._session.bind(**constants)

    def run(self, **inputs: Array) -> dict[str, Array]:
        if self._number in self._kept:
            self.calls.append({name: np.array(array) for name, array in (self._bound | inputs).items()})
        self._number += 1
        return self._session.run(**inputs)

    def memory(self) -> DeviceMemory | None:
        return None

    def close(self) -> None:
        self._session.close()
