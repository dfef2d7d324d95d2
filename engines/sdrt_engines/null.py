"""The null engine: right names, dtypes and shapes, no compute. For tests, and for measuring what is not compute.

It opens any bundle. Outputs are zeros.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, get_args

import numpy as np

from sdrt.bundle import Artifact, Bundle, Component, Precision, solve
from sdrt.engine import (
    NUMPY_DTYPES,
    Array,
    BuildOptions,
    Device,
    DeviceMemory,
    OpenOptions,
    parse_options,
    unknown_device,
)
from sdrt_engines.graph.shapes import profiles

OPENS = ("*",)
INSTALL = "nothing to install"
PRECISIONS = get_args(Precision)
MEASURES: tuple[Precision, ...] = ()
CACHES = False
CHECKS_ON = None
PLAIN: Mapping[str, str] = {}


@dataclass(frozen=True)
class NullOptions:
    """The null engine has no options of its own."""


def elsewhere(artifact: Artifact) -> str:
    return ""


def devices() -> Sequence[Device]:
    return [Device("null", "no compute; outputs are zeros")]


def build(source: Bundle, name: str, out: Path, options: BuildOptions) -> Artifact:
    parse_options(NullOptions, options.extra, "null")
    component = source.component(name)
    artifact = component.artifact
    for file in artifact.files:
        (out / file.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.path(file.path), out / file.path)
    built_from = artifact.files[0].sha256
    return replace(
        artifact,
        engine="null",
        precision=cast(Precision, options.precision),
        profiles=profiles(component, options),
        built_from=built_from,
    )


def open(bundle: Bundle, name: str, device: str | None, options: OpenOptions) -> NullSession:
    if device not in (None, "null", "cpu"):
        raise unknown_device("null", device, devices())
    parse_options(NullOptions, options.extra, "null")
    return NullSession(bundle.component(name))


class NullSession:
    """Answers every call with zeros of the shape that the component's outputs have for these inputs."""

    def __init__(self, spec: Component) -> None:
        self.spec = spec
        self._shapes: dict[str, tuple[int, ...]] = {}

    def prepare(self, sizes: Mapping[str, int]) -> bool:
        return False

    def bind(self, **constants: Array) -> None:
        self._shapes.update({name: array.shape for name, array in constants.items()})

    def run(self, **inputs: Array) -> dict[str, Array]:
        sizes = solve(self.spec.inputs, self._shapes | {name: array.shape for name, array in inputs.items()})
        return {spec.name: np.zeros(spec.at(sizes), NUMPY_DTYPES[spec.dtype]) for spec in self.spec.outputs}

    def memory(self) -> DeviceMemory | None:
        return None

    def close(self) -> None:
        self._shapes.clear()
