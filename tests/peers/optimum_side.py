"""The peers' side of the tests: runs in their environment, which has no sdrt, and is handed jobs as JSON.

    python optimum_side.py JOBS.json

JOBS: a list of {"do": "export", "to", "model", "out"} and {"do": "pictures", "with", "model", "cases", "latents", "out"}.
A case holds diffusers' arguments, the scheduler as (class, options), and how many latents it takes from the arrays.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def export(to: str, model: str, out: str) -> None:
    """What ``optimum-cli export onnx``, or ``openvino``, does."""
    if to == "openvino":
        from optimum.exporters.openvino import main_export

        main_export(model, out, task="text-to-image")
    else:
        from optimum.exporters.onnx import main_export

        main_export(model, out, task="text-to-image", do_validation=False)


def pictures(kind: str, model: str, cases: dict[str, dict[str, Any]], latents: str, out: str) -> None:
    """Write the pictures f32[B,H,W,3] of each case, by its name."""
    import diffusers
    import numpy as np
    import torch

    options: dict[str, Any] = {}
    if kind == "optimum":
        from optimum.onnxruntime import ORTDiffusionPipeline as Pipeline
    elif kind == "optimum-intel":
        from optimum.intel import OVDiffusionPipeline as Pipeline

        options = {"export": False, "device": "CPU", "ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}
    else:
        from diffusers import DiffusionPipeline as Pipeline
    pipe = Pipeline.from_pretrained(model, **options)
    pipe.set_progress_bar_config(disable=True)
    own, given, made = pipe.scheduler, np.load(latents), {}
    for name, case in cases.items():
        arguments = dict(case)
        scheduler = arguments.pop("scheduler")
        if scheduler is None:
            pipe.scheduler = type(own).from_config(own.config)
        else:
            pipe.scheduler = getattr(diffusers, scheduler[0]).from_config(own.config, **scheduler[1])
        if name in given:
            arguments["latents"] = torch.from_numpy(given[name])
        if (seed := arguments.pop("seed", None)) is not None:
            count = arguments.get("num_images_per_prompt", 1)
            arguments["generator"] = [torch.Generator().manual_seed(seed + i) for i in range(count)]
        made[name] = pipe(**arguments, output_type="np").images
    np.savez(out, **made)


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        do = job.pop("do")
        if do == "export":
            # A process of its own: torch's exporter leaves patched functions behind.
            code = f"import optimum_side; optimum_side.export({job['to']!r}, {job['model']!r}, {job['out']!r})"
            subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)
        else:
            pictures(job.pop("with"), **job)


if __name__ == "__main__":
    main()
