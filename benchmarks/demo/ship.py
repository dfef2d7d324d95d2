"""Make the bundle that sdrt brings out of the trained checkpoint.

    python -m benchmarks.demo.ship [CHECKPOINT] [OUT]    # benchmarks/demo/checkpoint → sdrt/models/demo

`sdrt export` with weights stored in float16, which loses nothing as the checkpoint's are; then diffusers' own pictures
of `sdrt demo`'s prompts, in float32, so that engines can be held against them without torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdrt import bundle as bundles
from sdrt.bundle import Bundle
from sdrt.demo import PROMPTS, SEED, SHOWCASE, STEPS, WHITE
from sdrt.staging import new_directory
from sdrt_export.exporter import export

HERE = Path(__file__).parent
NAME = "sdrt-demo"
GUIDANCE = 4.0
"""What pictures of this model are guided by when nobody says: see the model card for others."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=HERE / "checkpoint")
    parser.add_argument("out", type=Path, nargs="?", default=bundles.SHIPPED / "demo")
    parser.add_argument("--guidance-scale", type=float, default=GUIDANCE)
    args = parser.parse_args()
    bundle = ship(args.checkpoint, args.out, args.guidance_scale)
    size = sum(file.bytes for file in bundle.manifest.all_files())
    print(f"{args.out}: {size / 1e6:.1f} MB")


def ship(checkpoint: Path, out: Path, guidance_scale: float = GUIDANCE) -> Bundle:
    """Export the checkpoint and add diffusers' pictures. An ``out`` that is a bundle is replaced when all is done."""
    pictures = showcase(checkpoint, guidance_scale)
    with tempfile.TemporaryDirectory() as scratch, new_directory(out, force=True, sources=[checkpoint]) as staging:
        exported = export(str(checkpoint), Path(scratch) / NAME, weights="fp16", guidance_scale=guidance_scale)
        shutil.copytree(exported.root, staging, dirs_exist_ok=True)
        np.savez_compressed(staging / SHOWCASE, pictures=np.rint(pictures * WHITE).astype(np.uint16))
        facts = exported.manifest
        facts = dataclasses.replace(
            facts, files=(*facts.files, bundles.record(staging, SHOWCASE)),
            provenance=dataclasses.replace(facts.provenance, source=NAME),
        )  # fmt: skip
        bundles.save(staging, facts)
    return bundles.load(out)


def showcase(checkpoint: Path, guidance_scale: float) -> NDArray[np.float32]:
    """``float32[6, H, W, 3]`` in [0, 1]: diffusers' pictures of ``sdrt demo``'s prompts, by its CPU in float32."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipe: Any = StableDiffusionPipeline.from_pretrained(
        checkpoint, torch_dtype=torch.float32, safety_checker=None, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    pictures = [
        pipe(
            prompt, num_inference_steps=STEPS, guidance_scale=guidance_scale, output_type="np",
            generator=torch.Generator().manual_seed(SEED),
        ).images[0]
        for prompt in PROMPTS
    ]  # fmt: skip
    return np.stack(pictures).astype(np.float32)


if __name__ == "__main__":
    main()
