"""What a component's inputs look like in real runs: a few prompts, denoised on ONNX Runtime, recorded.

Ranges for float16 and scales for int8 are measured over these (``graph/ranges.py``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sdrt.bundle import Bundle, Component, Manifest
from sdrt.engine import Array, Samples, Session
from sdrt.errors import InputError
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

Report = Callable[[str, float], object]
"""(what is being done, fraction of it in [0, 1])"""


@dataclass(frozen=True)
class Effort:
    """How much is recorded. prompts: how many of those given. steps: of each run. calls: kept of each component."""

    prompts: int
    steps: int
    calls: int


RANGES = Effort(prompts=2, steps=4, calls=4)
"""Enough for float16, which wants to know the binade: no tensor of 18 calls with other prompts at another size was seen
above 1.8 times its largest in these 4 (tiny U-Net, benchmarks/LOG.md), and the margin is 4."""

SCALES = Effort(prompts=8, steps=6, calls=16)
"""For int8, whose error follows the scale."""


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """One prompt a line; empty lines are passed over. InputError when there is none, or the file cannot be read."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
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
            calls = _spread(self._recorded[name], self.effort.calls)
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
            pictures = self._denoise(opened, prompts, report)
        if (encoder := facts.components.get("vae_encoder")) is not None:
            self._recorded["vae_encoder"] = [_encoder_inputs(encoder, picture) for picture in pictures]
        width, height = self.size or (facts.latents.default_width, facts.latents.default_height)
        self._facts = {
            "source": "denoising runs",
            "prompts": len(prompts),
            "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
            "steps": self.effort.steps,
            "size": [width, height],
        }

    def _denoise(self, opened: Pipeline, prompts: Sequence[str], report: Report) -> list[Array]:
        """Run the prompts, record what each session is fed; returns the pictures, f32[1,H,W,3] in [0,1]."""
        recording = {name: _Recording(session) for name, session in opened.sessions.items()}
        pipe = Pipeline(self.bundle, dict(recording))
        width, height = self.size or (None, None)
        pictures = []
        for number, prompt in enumerate(prompts):
            what = f"calibrate, prompt {number + 1} of {len(prompts)}"
            report(what, number / len(prompts))
            arguments: dict[str, Any] = {"width": width, "height": height, "num_inference_steps": self.effort.steps}
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


def _spread(calls: list[dict[str, Array]], count: int) -> list[dict[str, Array]]:
    """``count`` of the calls, evenly over all runs; the golden section keeps it from meeting one timestep only."""
    if len(calls) <= count:
        return calls
    width = len(calls) / count
    return [calls[int((i + i * 0.618 % 1) * width)] for i in range(count)]


class _Recording:
    """A session that keeps what it is fed."""

    def __init__(self, session: Session) -> None:
        self.spec = session.spec
        self.calls: list[dict[str, Array]] = []
        self._session = session
        self._bound: dict[str, Array] = {}

    def bind(self, **constants: Array) -> None:
        self._bound |= constants
        self._session.bind(**constants)

    def run(self, **inputs: Array) -> dict[str, Array]:
        self.calls.append({name: np.array(array) for name, array in (self._bound | inputs).items()})
        return self._session.run(**inputs)

    def close(self) -> None:
        self._session.close()
