"""The measured side: a process that loads a model and makes pictures, one JSON line in, one JSON line out.

Only the standard library, and nothing of sdrt, is imported here: peers' runners, in environments without sdrt, serve
with this very file, so that all are measured alike. ``sdrt.bench.worker`` is sdrt's own runner.

| line in | answer |
|---|---|
| (process start) | ``{"ok": {}}`` |
| ``{"do": "load", "model": path, "engine", "device", "threads", "options": {}, "streams": 1}`` | ``{"ok": {"import": s, "load": s, "versions": {}, ...}}`` |
| ``{"do": "run", "prompt", "negative_prompt", "width", "height", "num_inference_steps", "guidance_scale", "seed", "batch", "scheduler", "save": path or null}`` | ``{"ok": {"samples": [{"total": s, ...}], "wall": s}}`` |
| ``{"do": "close"}`` | ``{"ok": {}}``, and the process ends |

``load`` also has ``"cache": path`` and ``"low_memory": true`` where they are asked for.

Seconds throughout. A sample holds ``total`` and, where the runner can tell, ``tokenize``, ``text_encoder``,
``vae_encoder``, ``vae_decoder``, ``post``, ``load`` (within the batch), ``steps`` (a list, one entry a network call) and ``network`` (likewise: what
of each step the network took). One sample a stream. ``save`` is where the picture goes as float32[B,H,W,3] in [0,1]
(``numpy.save``). ``held`` may stand beside the samples: bytes that engines hold on devices then, by kind. A failure is answered by ``{"error": {"type", "message", "fix"}}``.
"""  # noqa: E501

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol


class Runner(Protocol):
    """What is served. Both methods answer what stands above under ``ok``."""

    def load(self, *_: Any, **arguments: Any) -> Mapping[str, Any]:
        """Import what is needed, and load the model."""

    def run(self, *_: Any, **arguments: Any) -> Mapping[str, Any]:
        """Make one batch of pictures a stream."""


def serve(make: Callable[[], Runner]) -> None:
    """Answer standard input's lines until it ends or ``close`` is asked for.

    What libraries print goes to standard error: standard output holds answers only.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(line: Mapping[str, Any]) -> None:
        answers.write(json.dumps(line) + "\n")
        answers.flush()

    runner = make()
    answer({"ok": {}})
    for line in sys.stdin:
        arguments = json.loads(line)
        do = arguments.pop("do")
        if do == "close":
            answer({"ok": {}})
            return
        try:
            answer({"ok": {"load": runner.load, "run": runner.run}[do](**arguments)})
        except Exception as error:  # whatever a library raises is told to the side that asked
            message, fix = getattr(error, "message", None) or str(error), getattr(error, "fix", None)
            answer({"error": {"type": type(error).__name__, "message": message, "fix": fix}})
