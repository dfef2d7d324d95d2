"""sdrt: Stable Diffusion on whatever chip is there.

from sdrt import Pipeline
with Pipeline.from_pretrained("bundle") as pipe:
    pipe("a lighthouse", seed=1).images[0].save("lighthouse.png")
"""

from __future__ import annotations

import logging

from sdrt.bundle import Bundle
from sdrt.errors import (
    BuildError,
    BundleError,
    Cancelled,
    DeviceError,
    EngineUnavailable,
    ExportError,
    InputError,
    NumericsError,
    SdrtError,
)
from sdrt.pipeline import Pipeline, Result, Step, Timings
from sdrt.request import GenerationRequest

logging.getLogger("sdrt").addHandler(logging.NullHandler())  # the program that embeds us decides what is shown

__version__ = "0.1.0"

__all__ = [
    "BuildError",
    "Bundle",
    "BundleError",
    "Cancelled",
    "DeviceError",
    "EngineUnavailable",
    "ExportError",
    "GenerationRequest",
    "InputError",
    "NumericsError",
    "Pipeline",
    "Result",
    "SdrtError",
    "Step",
    "Timings",
    "__version__",
]
