"""Rewrites of an OpenVINO network that change how long it takes, and not what it computes (benchmarks/LOG.md).

``without_splits`` makes other weights of the same size, and is made when building. ``for_tiles`` is for processors with
AMX, and is made when opening, for the size that comes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

TILE = 32
"""Products of bfloat16 that one instruction of AMX sums up: rows of a matrix are padded to a multiple of it."""

LONG = 1024
"""Keys from which on attention is padded; with fewer, it takes no time that counts."""

LARGE = 64 * 64
"""Positions of a picture from which on its upsampling is rewritten. A U-Net's below gain 0.02 s a step at 512x512, and
making their weights takes 2 s and a seventh more memory."""

CHUNKS = 2
"""Parts that a gated linear unit is split into: the value and its gate."""

TAPS = 3
_SPREAD = np.array([[0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]], np.float32)
"""The taps (a, b, c) as (c, b + c, a + b, a)."""
SPREAD = np.kron(_SPREAD, _SPREAD)
"""The same along both axes, f32[9,16]: one product in place of many strided sums."""


def without_splits(model: Any) -> int:
    """Two narrow linear layers in place of a wide one whose result is split (GEGLU); returns how many.

    OpenVINO's CPU splits features by copying them one by one: 2.5 % of a U-Net's step in bfloat16.
    """
    from openvino import opset13 as opset

    done = 0
    for split in model.get_ordered_ops():
        if split.get_type_name() not in ("Split", "VariadicSplit") or split.get_output_size() != CHUNKS:
            continue
        total = split.input_value(0).get_node()
        product = total.input_value(0).get_node() if total.get_type_name() == "Add" else None
        if product is None or product.get_type_name() != "MatMul" or product.get_attributes()["transpose_a"]:
            continue
        kernel, bias = _weights(product.input_value(1)), _weights(total.input_value(1))
        whole, axis = split.input_value(0).get_partial_shape(), _constant(split.input_value(1))
        if kernel is None or bias is None or kernel.ndim != 2 or axis is None or whole.rank.is_dynamic:
            continue
        rank = len(whole)
        parts = [split.output(i).get_partial_shape()[rank - 1] for i in range(CHUNKS)]
        if axis.item() not in (-1, rank - 1) or any(part.is_dynamic for part in parts):
            continue
        by_output = kernel if product.get_attributes()["transpose_b"] else kernel.T
        flat = bias.reshape(-1)
        widths = [part.get_length() for part in parts]
        if not (sum(widths) == len(by_output) == len(flat) and bias.shape[-1:] == flat.shape):
            continue
        for i, begin in enumerate((0, widths[0])):
            rows = slice(begin, begin + widths[i])
            part = opset.matmul(product.input_value(0), np.ascontiguousarray(by_output[rows]), False, True)
            split.output(i).replace(opset.add(part, flat[rows].reshape([1] * (rank - 1) + [-1])).output(0))
        done += 1
    return done


def for_tiles(model: Any) -> tuple[int, int]:
    """What a processor with AMX takes less time for in bfloat16, in a network of known sizes; returns how many of each.

    Upsampled pictures and heads of attention; see ``_upsampled`` and ``_whole_tiles``.
    """
    return _upsampled(model), _whole_tiles(model)


def _upsampled(model: Any) -> int:
    """A transposed convolution in place of "twice as large, by repeating pixels, then 3x3".

    Of the 3x3 pixels that a filter sees after the repetition only 2x2 differ, so that 4 products do instead of 9; which
    taps share a pixel alternates from pixel to pixel, as a transposed convolution of 4x4 with stride 2 has it. Along
    one axis, the taps (a, b, c) become (c, b + c, a + b, a). At full size a decoder takes a tenth less.
    """
    from openvino import opset13 as opset

    done = 0
    for node in model.get_ordered_ops():
        above = node.input_value(0).get_node() if node.get_type_name() == "Convolution" else None
        if above is None or above.get_type_name() != "Interpolate" or not _repeats_pixels(above):
            continue
        kernel, told = _weights(node.input_value(1)), node.get_attributes()
        plain = {"strides": [1, 1], "dilations": [1, 1], "pads_begin": [1, 1], "pads_end": [1, 1]}
        if kernel is None or kernel.shape[2:] != (TAPS, TAPS) or any(list(told[k]) != v for k, v in plain.items()):
            continue
        outputs, inputs = kernel.shape[:2]
        spread = (kernel.reshape(-1, TAPS * TAPS) @ SPREAD).reshape(outputs, inputs, 4, 4).swapaxes(0, 1)
        made = opset.convolution_backprop_data(
            above.input_value(0), _stored_like(node.input_value(1), spread), [2, 2], pads_begin=[1, 1], pads_end=[1, 1]
        )
        made.set_friendly_name(node.get_friendly_name())
        node.output(0).replace(made.output(0))
        done += 1
    return done


def _repeats_pixels(node: Any) -> bool:
    """Whether an Interpolate makes 2x2 pixels of each of many: output o is input o / 2, rounded down."""
    told = node.get_attributes()
    how = told["mode"], told.get("coordinate_transformation_mode"), told.get("nearest_mode")  # opset 1 has neither
    if how != ("nearest", "asymmetric", "floor"):
        return False
    if any(told["pads_begin"]) or any(told["pads_end"]):
        return False
    taken, made = node.get_input_partial_shape(0), node.get_output_partial_shape(0)
    if taken.is_dynamic or made.is_dynamic or len(taken) != 4:
        return False
    batch, channels, height, width = taken.to_shape()
    if height * width < LARGE:
        return False
    return list(made.to_shape()) == [batch, channels, 2 * height, 2 * width]


def _whole_tiles(model: Any) -> int:
    """Pad the heads of long self-attentions with zeros to whole tiles.

    SD 1.5's largest have heads of 40 features, of which the last 8 take as long as 32 and are copied first: a fifth of
    the attention's time. Scores are the same: products with zeros, and the scale as it was.
    """
    from openvino import opset13 as opset

    done = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() != "ScaledDotProductAttention" or not _is_plain(node):
            continue
        query, key = (_before_heads(node.input_value(i).get_node()) for i in (0, 1))
        if query is None or key is None or query.get_element_type().to_string() != "f32":
            continue
        sizes, keys = query.get_partial_shape(), key.get_partial_shape()
        if sizes.is_dynamic or keys.is_dynamic or sizes != keys or keys[1].get_length() < LONG:
            continue
        size = sizes[3].get_length()
        missing = -size % TILE
        if not missing:
            continue
        none, zero = np.zeros(4, np.int64), np.float32(0)
        scaled = opset.multiply(query, np.float32(size**-0.5))
        q = opset.transpose(opset.pad(scaled, none, np.array([0, 0, 0, missing]), "constant", zero), [0, 2, 1, 3])
        # Padded after it was turned: turning rows of 64 features takes ten times as long as of 40.
        turned = opset.pad(opset.transpose(key, [0, 2, 3, 1]), none, np.array([0, 0, missing, 0]), "constant", zero)
        k = opset.transpose(turned, [0, 1, 3, 2])
        made = opset.scaled_dot_product_attention(q, k, node.input_value(2), None, np.float32(1))
        made.set_friendly_name(node.get_friendly_name())
        node.output(0).replace(made.output(0))
        done += 1
    return done


def _is_plain(node: Any) -> bool:
    """Whether an attention has no mask (or one that is 0), and the usual scale."""
    if node.get_attributes()["causal"] or node.get_input_size() > 4:
        return False
    mask = _constant(node.input_value(3)) if node.get_input_size() == 4 else np.float32(0)
    return mask is not None and mask.dtype != np.bool_ and not np.any(mask)  # False would mask everything


def _before_heads(node: Any) -> Any:
    """[batch, tokens, heads, features], of which ``node`` takes the heads to the front; or None."""
    if node.get_type_name() != "Transpose":
        return None
    order = _constant(node.input_value(1))
    return node.input_value(0) if order is not None and order.tolist() == [0, 2, 1, 3] else None


def _constant(output: Any) -> Any:
    """The values of a constant, in float32 where they are stored in a narrower type; else None."""
    node = output.get_node()
    if node.get_type_name() in ("Convert", "ConvertLike"):
        node = node.input_value(0).get_node()
        return node.get_data(dtype=np.float32) if node.get_type_name() == "Constant" else None
    return node.data if node.get_type_name() == "Constant" else None


def _weights(output: Any) -> Any:
    """The values of a float32 constant, or of one stored in float16; None for others, whose like cannot be stored.

    numpy has no bfloat16 or float8, and sums of integers may be none of their type.
    """
    node = output.get_node()
    stored = node.input_value(0) if node.get_type_name() in ("Convert", "ConvertLike") else output
    kinds = stored.get_element_type().to_string(), output.get_element_type().to_string()
    known = stored.get_node().get_type_name() == "Constant" and kinds in (("f32", "f32"), ("f16", "f32"))
    return stored.get_node().get_data(dtype=np.float32) if known else None


def _stored_like(output: Any, values: NDArray[np.float32]) -> Any:
    """A new constant in the type that ``output``'s is stored in (see ``_weights``), so that it takes no more memory."""
    from openvino import opset13 as opset

    if output.get_node().get_type_name() == "Constant":
        return opset.constant(np.ascontiguousarray(values))
    stored = output.get_node().get_input_element_type(0).to_dtype()
    return opset.convert(opset.constant(np.ascontiguousarray(values, stored)), "f32")
