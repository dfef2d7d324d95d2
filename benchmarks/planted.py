"""A runner of sdrt with a planted slowdown, to see whether measuring finds it (benchmarks/trust.py).

``PLANTED=vae_decoder=1.05`` makes every call of that component take 5 % longer, by waiting busily.
"""

from __future__ import annotations

import os
import time
from typing import Any

from sdrt import Pipeline
from sdrt.bench.serve import serve
from sdrt.bench.worker import SdrtRunner


class Planted(SdrtRunner):
    def opened(self, pipe: Pipeline) -> Pipeline:
        name, _, factor = os.environ["PLANTED"].partition("=")
        pipe.sessions[name].run = _slowed(pipe.sessions[name].run, float(factor) - 1.0)  # type: ignore[method-assign]
        return pipe


def _slowed(run: Any, share: float) -> Any:
    def slowed(**inputs: Any) -> Any:
        started = time.perf_counter()
        outputs = run(**inputs)
        ended = time.perf_counter()
        while time.perf_counter() - ended < share * (ended - started):
            pass
        return outputs

    return slowed


if __name__ == "__main__":
    serve(Planted)
