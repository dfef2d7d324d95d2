"""Stable Diffusion 2.x: OpenCLIP-H's text encoder without its last layer, linear projections, heads by level.

Parts, facts and networks are those of 1.x: what differs is in the configs (heads, widths, the activation), and whether
the network predicts noise or v is in scheduler_config.json. ``upcast_attention`` changes nothing in float32; builds in
reduced precision read it from unet/config.json.
"""

from __future__ import annotations

from sdrt_export import parts as common
from sdrt_export.checkpoint import Checkpoint
from sdrt_export.families import sd1
from sdrt_export.families.sd1 import constants, facts, network, parts

__all__ = ["NAME", "constants", "facts", "mismatch", "network", "parts"]

NAME = "sd2"

_CONFIGS = sd1.CONFIGS | {("unet", "use_linear_projection"): True, ("text_encoder", "hidden_act"): "gelu"}


def mismatch(checkpoint: Checkpoint) -> str | None:
    if (pipeline := checkpoint.index.get("_class_name")) not in sd1.PIPELINES:
        return f"the pipeline is {pipeline}"
    return common.differs(checkpoint, _CONFIGS)
