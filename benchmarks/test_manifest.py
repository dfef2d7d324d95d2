"""Opening what lies on disk. (What importing sdrt takes is in startup.py.)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdrt import bundle as bundles
from sdrt.pipeline import Pipeline


def test_load_a_bundle(benchmark: Any, bundle: Path) -> None:
    benchmark(bundles.load, bundle)


def test_load_a_pipeline(benchmark: Any, bundle: Path) -> None:
    """On the null engine: manifest, scheduler config, tokenizer."""
    benchmark(lambda: Pipeline.from_pretrained(bundle, engine="null").close())
