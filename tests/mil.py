"""Core ML packages for tests."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any


def saved(
    model: Any, folder: Path, *, target: str, precision: str = "FLOAT32", passes: Any = None, **extra: Any
) -> Path:
    """A torch or MIL program as coremltools converts it, in ``folder``."""
    import coremltools

    logging.getLogger("coremltools").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = coremltools.convert(
            model, convert_to="mlprogram", minimum_deployment_target=getattr(coremltools.target, target),
            compute_precision=getattr(coremltools.precision, precision), skip_model_load=True,
            pass_pipeline=passes or coremltools.PassPipeline.DEFAULT, **extra,
        )  # fmt: skip
        made.save(str(folder))
    return folder


def untouched(program: Any, folder: Path, target: str = "iOS17") -> Path:
    """A MIL program as it is: coremltools' passes would compute what depends on constants alone."""
    import coremltools

    passes = coremltools.PassPipeline(["common::dead_code_elimination"], "tests")
    return saved(program, folder, target=target, passes=passes, source="milinternal")
