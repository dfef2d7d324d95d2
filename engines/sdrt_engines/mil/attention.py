"""Attention in MIL's terms, in three ways: see ``CoreMLBuildOptions.attention``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from sdrt.errors import BuildError
from sdrt_engines.mil.operators import alike, builder, dtype
from sdrt_engines.mil.translate import Array, Translation, Value, known, operator

MASKED = -3e4
"""What is added to scores that a mask hides: e^-30000 is 0 in float32 too, and float16 holds it. (Minus infinity gives
NaN on some units.)"""


@operator("Attention")
def attention(t: Translation, node: Any, inputs: list[Value], attributes: Mapping[str, Any]) -> Value:
    q, k, v, mask = [*inputs, None][:4]
    unknown = {"softcap": 0.0, "qk_matmul_output_mode": 0, "q_num_heads": 0, "kv_num_heads": 0}
    for option, plain in unknown.items():
        if attributes.get(option, plain) != plain:
            raise BuildError(f"{option}={attributes[option]!r} is not supported")
    if q.rank != 4 or len([name for name in node.input if name]) > 4 or len(node.output) > 1:
        raise BuildError("only attention of four dimensions, without a past, is supported")
    if q.shape[1] != k.shape[1]:
        raise BuildError(f"{q.shape[1]} heads ask {k.shape[1]} heads; as many are supported only")
    if attributes.get("is_causal", 0):
        causal = np.tril(np.ones((q.shape[2], k.shape[2]), bool))
        if mask is not None and not (known(mask) and mask.dtype == np.bool_):
            raise BuildError("is_causal with another mask is not supported")
        mask = causal if mask is None else causal & mask
    if known(mask):
        mask = additive(mask, dtype(q))
        mask = mask if mask.any() else None
    scale = attributes.get("scale") or 1 / math.sqrt(q.shape[-1])
    name = t.name(node.output[0])
    # Of what ``split_einsum`` does not take (masks, other layouts) attention is written as ``original``.
    return (_fused if t.style.attention == "fused" else _original)(q, k, v, mask, scale, name)


def additive(mask: Array, kind: Any) -> Array:
    """A known mask as numbers that are added to scores."""
    if mask.dtype == np.bool_:
        mask = np.where(mask, 0, MASKED)
    return np.maximum(mask, MASKED).astype(kind)


def _scores(q: Value, k: Value, scale: float, **names: str) -> Value:
    """q · scale · kᵀ: scaled first, so that large products are never there."""
    mb = builder()
    return mb.matmul(x=mb.mul(x=q, y=dtype(q)(scale)), y=k, transpose_y=True, **names)


def _original(q: Value, k: Value, v: Value, mask: Value, scale: float, name: str) -> Value:
    mb = builder()
    scores = _scores(q, k, scale)
    if mask is not None:
        scores = mb.add(**dict(zip("xy", alike(scores, mask), strict=True)))
    return mb.matmul(x=mb.softmax(x=scores, axis=-1), y=v, name=name)


def _fused(q: Value, k: Value, v: Value, mask: Value, scale: float, name: str) -> Value:
    """Core ML's own operator, of iOS 18 and macOS 15; its scale is 1/√d."""
    mb = builder()
    factor = scale * math.sqrt(q.shape[-1])
    if not math.isclose(factor, 1, rel_tol=1e-6):
        q = mb.mul(x=q, y=dtype(q)(factor))
    extra = {} if mask is None else {"attn_mask": mask}
    return mb.scaled_dot_product_attention(query=q, key=k, value=v, name=name, **extra)
