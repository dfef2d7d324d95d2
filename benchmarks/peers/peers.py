"""Which peers sdrt is compared with, and how each is started and loaded.

``peer.python(environments)`` runs ``peer.script``, which speaks ``sdrt.bench.serve``'s protocol; ``load`` gets the
folder ``peer.model`` of what ``prepare.py`` made, and ``peer.options_for(width, height, batch)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .make_env import python as interpreter

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Peer:
    """One line of the table."""

    name: str
    runner: str
    """A script beside this file."""
    model: str
    """The folder of ``prepare.py``'s DIR."""
    environment: str = "peers"
    """A key of ``make_env.ENVIRONMENTS``."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The runner's own, given to ``load``."""
    one_size: bool = False
    """Compiled for one size and batch, which ``load`` must be told."""

    @property
    def script(self) -> Path:
        """The runner's path."""
        return HERE / self.runner

    def python(self, environments: Mapping[str, Path]) -> Path:
        """The interpreter to run it with, in ``environments[self.environment]``."""
        # Not resolved: the link is what tells Python its environment.
        return interpreter(environments[self.environment].absolute())

    def options_for(self, width: int, height: int, batch: int) -> dict[str, Any]:
        """``load``'s options for pictures of this size, in pixels, and batch."""
        return {**self.options, **({"width": width, "height": height, "batch": batch} if self.one_size else {})}


PEERS = (
    Peer("diffusers fp32", "runner_diffusers.py", "checkpoint"),
    Peer("diffusers bf16 channels_last", "runner_diffusers.py", "checkpoint", options={"bf16": True}),
    Peer("optimum onnxruntime", "runner_optimum_ort.py", "onnx"),
    Peer("optimum-intel", "runner_optimum_intel.py", "openvino", one_size=True),
    Peer("openvino-genai", "runner_openvino_genai.py", "openvino", one_size=True),
    Peer("stable-diffusion.cpp", "runner_sd_cpp.py", "checkpoint", environment="sdcpp"),
)
