"""What Core ML packages look like from outside: the names, types and layouts that Apple's Swift package expects.

``StableDiffusionPipeline(resourcesAt:)`` of apple/ml-stable-diffusion hands over Float32 arrays and finds inputs and
outputs as written here; docs/apple.md is the contract in words. Networks that it has no names for keep the graph's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from sdrt.bundle import Component, TensorSpec
from sdrt.errors import BundleError, quoted, shortened

Array = NDArray[Any]

Layout = Literal["plain", "floats", "channels_first", "batched"]
"""How a tensor of the graph lies in the package. plain: as it is. floats: whole numbers as float32.
channels_first: [B,T,C] as [B,C,1,T]. batched: one value as [B]."""


@dataclass(frozen=True)
class Port:
    """One input or output: the graph's name, and the package's name, layout, and type ("f16", "f32")."""

    tensor: str
    name: str
    dtype: Literal["f16", "f32"]
    layout: Layout = "plain"

    def shape(self, plain: Sequence[int], batch: int) -> tuple[int, ...]:
        """In the package, given the graph's."""
        if self.layout == "channels_first":
            return plain[0], plain[2], 1, plain[1]
        return (batch,) if self.layout == "batched" else tuple(plain)

    def laid_out(self, array: Array, batch: int) -> Array:
        """The graph's array as the package takes it."""
        kind = {"f16": np.float16, "f32": np.float32}[self.dtype]
        if self.layout == "channels_first":
            array = array.transpose(0, 2, 1)[:, :, None]
        elif self.layout == "batched":
            array = np.resize(array, batch)
        with np.errstate(over="ignore"):  # infinity then, which the checks for finite outputs find
            return np.ascontiguousarray(array, kind)


_PACKAGES = {"text_encoder": "TextEncoder", "unet": "Unet", "vae_decoder": "VAEDecoder", "vae_encoder": "VAEEncoder"}
_NAMES: Mapping[tuple[str, str], str] = {
    ("text_encoder", "pooler_output"): "pooled_outputs",
    ("unet", "out_sample"): "noise_pred",
    ("vae_decoder", "latent_sample"): "z",
    ("vae_decoder", "sample"): "image",
    ("vae_encoder", "sample"): "x",
    ("vae_encoder", "latent_parameters"): "latent",
}
"""(component, tensor of the graph) → Apple's name, where it is another."""
_LAYOUTS: Mapping[tuple[str, str], Layout] = {
    ("unet", "encoder_hidden_states"): "channels_first",
    ("unet", "timestep"): "batched",
}


def package_names(component: str, chunks: int = 1) -> list[str]:
    """``Unet.mlpackage``; or ``UnetChunk1.mlpackage`` and ``UnetChunk2.mlpackage``."""
    name = _PACKAGES.get(component) or "".join(part.capitalize() for part in component.split("_"))
    return [f"{name}{f'Chunk{i}' if chunks > 1 else ''}.mlpackage" for i in range(1, chunks + 1)]


def input_ports(name: str, component: Component, half: bool) -> tuple[Port, ...]:
    """Inputs of a component's package. half: whether it computes in float16."""

    def port(spec: TensorSpec) -> Port:
        layout: Layout = "floats" if spec.dtype.startswith("i") else _LAYOUTS.get((name, spec.name), "plain")
        # Of a timestep float16 would keep half units only, and ids above 2048 are not whole in it.
        narrow = half and layout in ("plain", "channels_first")
        return Port(spec.name, _name(name, spec.name), "f16" if narrow else "f32", layout)

    return tuple(map(port, component.inputs))


def output_ports(name: str, component: Component) -> tuple[Port, ...]:
    """Outputs of a component's package: Float32 all of them."""
    return tuple(Port(spec.name, _name(name, spec.name), "f32") for spec in component.outputs)


def _name(component: str, tensor: str) -> str:
    return _NAMES.get((component, tensor)) or re.sub(r"[^A-Za-z0-9_]", "_", tensor)


def as_facts(ports: Sequence[Port]) -> list[dict[str, str]]:
    """As an artifact's facts hold them."""
    return [asdict(port) for port in ports]


def from_facts(component: Component, side: Literal["inputs", "outputs"]) -> tuple[Port, ...]:
    """BundleError where the artifact's facts are not what ``as_facts`` wrote, or not of this component."""
    try:
        ports = tuple(Port(**told) for told in component.artifact.facts[side])
    except (KeyError, TypeError) as error:
        raise BundleError(f"the artifact does not say what its {side} are: {error}", "build it again") from None
    specs = {spec.name: spec for spec in getattr(component, side)}
    for port in ports:
        for what, value, known in (("dtype", port.dtype, ("f16", "f32")), ("layout", port.layout, get_args(Layout))):
            if value not in known:
                raise BundleError(f"the artifact's {side} have the {what} {quoted(value)}", "build it again")
        for what, name in (("tensor", port.tensor), ("name", port.name)):
            if not isinstance(name, str):
                raise BundleError(f"the artifact's {side} have the {what} {quoted(name)}", "build it again")
        if (spec := specs.get(port.tensor)) is None:
            raise BundleError(
                f"the artifact's {side} tell of {shortened(port.tensor, 80)}, which it has not", "build it again"
            )
        if not _lies(spec, port.layout) or (side == "outputs" and port.layout != "plain"):
            raise BundleError(f"the artifact's {side} have the layout {port.layout} for {spec}", "build it again")
    return ports


def _lies(spec: TensorSpec, layout: Layout) -> bool:
    """Whether a tensor can lie in that way."""
    if layout == "floats":
        return spec.dtype.startswith("i")
    return layout == "plain" or len(spec.shape) == {"channels_first": 3, "batched": 1}[layout]


FUNCTION = "main"
"""Of a package of one size; where there are several, the first one's is loaded when none is named."""


def function_name(width: int, height: int) -> str:
    """Of one size of several."""
    return f"size_{width}x{height}"


SCRIPT = "compile.sh"
COMPILE = """\
#!/bin/sh
# Compiles the packages beside this script, on a Mac with Xcode, into a folder (Resources when none is given) that
# Apple's StableDiffusionPipeline(resourcesAt:) reads. docs/apple.md of sdrt says more.
set -eu
unset CDPATH # or cd goes elsewhere, and says so
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here/Resources}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$here"
rm -rf "$out"/Unet.mlmodelc "$out"/UnetChunk1.mlmodelc "$out"/UnetChunk2.mlmodelc # of another build: chunks come first
for package in *.mlpackage; do
    xcrun coremlcompiler compile "$package" "$out"
done
cp tokenizer/vocab.json tokenizer/merges.txt "$out"
"""
