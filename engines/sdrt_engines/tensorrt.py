"""TensorRT: NVIDIA's GPUs of data centres and workstations. A plan is built on the kind of GPU that will run it.

https://docs.nvidia.com/deeplearning/tensorrt/latest
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sdrt.bundle import Artifact, Bundle
from sdrt.engine import BuildOptions, Device, OpenOptions
from sdrt_engines.trt import building, opening
from sdrt_engines.trt.library import TENSORRT as LIBRARY
from sdrt_engines.trt.session import TensorRtSession

OPENS = (LIBRARY.engine,)
INSTALL = LIBRARY.install
PRECISIONS = LIBRARY.precisions
MEASURES = LIBRARY.measures
CACHES = True
CHECKS_ON = None
PLAIN: Mapping[str, str] = {}


def devices() -> Sequence[Device]:
    return opening.devices(LIBRARY)


def elsewhere(artifact: Artifact) -> str:
    return opening.elsewhere(LIBRARY, artifact)


def build(source: Bundle, name: str, out: Path, options: BuildOptions) -> Artifact:
    return building.build(LIBRARY, source, name, out, options)


def open(bundle: Bundle, name: str, device: str | None, options: OpenOptions) -> TensorRtSession:
    return opening.open(LIBRARY, bundle, name, device, options)
