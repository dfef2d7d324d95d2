"""Model families: one file each, found by its name. docs/adding-a-family.md tells how to add one."""

from __future__ import annotations

import importlib
import pkgutil
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from sdrt.bundle import Denoiser, LatentSpace, TensorSpec, TextEncoder
from sdrt.errors import ExportError
from sdrt_export.checkpoint import Checkpoint


@dataclass(frozen=True)
class Part:
    """One component to export: where its weights lie in the checkpoint, its tensors, and the sizes it is checked at.

    ``cases`` name the reference vectors by the symbols' sizes; ``trace_sizes`` are those of the example inputs while
    tracing. ``share`` is the part's time of export relative to the others'. ``vocabulary`` is the number of token ids,
    where there are any.
    """

    name: str
    folder: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    trace_sizes: Mapping[str, int]
    cases: tuple[Mapping[str, int], ...]
    share: float = 1.0
    vocabulary: int = 0


@dataclass(frozen=True)
class Facts:
    """What the runtime must know of the family, as the manifest says it."""

    text_encoders: tuple[TextEncoder, ...]
    denoiser: Denoiser
    latents: LatentSpace
    no_negative_prompt: Literal["empty", "zeros"] = "empty"
    guidance_scale: float = 7.5
    """What diffusers' pipeline of the family guides by when it is not told."""


class Family(Protocol):
    """Satisfied by a module in ``sdrt_export.families``; importing it must not import torch."""

    NAME: str

    def mismatch(self, checkpoint: Checkpoint) -> str | None:
        """Why this checkpoint is not of the family; None when it is."""

    def parts(self, checkpoint: Checkpoint) -> list[Part]:
        """All components of the family, from the checkpoint's configs."""

    def facts(self, checkpoint: Checkpoint) -> Facts:
        """The manifest's facts, from the checkpoint's configs."""

    def network(self, part: str, config: dict[str, Any]) -> Any:
        """The torch module of one component, whose ``forward`` takes and returns the part's tensors in their order.

        Its real network is the attribute ``model``; parameter names below it are the checkpoint's.
        """

    def constants(self, part: str, config: dict[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
        """Small arrays that the runtime needs beside the graph, from the network's state dict."""


def find(checkpoint: Checkpoint) -> Family:
    """The family that the checkpoint belongs to. ExportError tells, for each family, why it is not that one."""
    reasons = []
    for info in pkgutil.iter_modules(__path__):
        family = load(info.name)
        reason = family.mismatch(checkpoint)
        if reason is None:
            return family
        reasons.append(f"{family.NAME}: {reason}")
    raise ExportError(
        f"{checkpoint.name}: no supported model family fits ({'; '.join(reasons)})",
        "sdrt exports Stable Diffusion 1.x, 2.x and XL, and their fine-tunes",
    )


def load(name: str) -> Family:
    """The family in the file of that name."""
    return typing.cast(Family, importlib.import_module(f"{__name__}.{name}"))
