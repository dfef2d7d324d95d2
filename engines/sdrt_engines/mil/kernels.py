"""What MIL's operators compute, in numpy: by parameter name, floats in float32. Written from their documentation.
NotImplementedError is for parameters that sdrt's packages never have; ``evaluate`` makes a NumericsError of it.

https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sdrt_engines.mil.package import unpacked

Array = Any
"""A numpy array."""
Parameters = Mapping[str, Any]
Kernel = Callable[[Parameters], Any]

KERNELS: dict[str, Kernel] = {}
"""By the operator's name: parameters → the output, or a list of outputs."""


GROWS: dict[str, Callable[[Parameters], int]] = {
    "tile": lambda p: p["x"].size * math.prod(integers(p["reps"])),
    "fill": lambda p: math.prod(integers(p["shape"])),
    "upsample_nearest_neighbor": lambda p: p["x"].size * math.prod(_factors(p)),
    "pad": lambda p: math.prod(sum(pair) + size for pair, size in zip(_pairs(p), p["x"].shape, strict=True)),
}
"""Elements of the output of those that make much of little: a damaged package must not take all the memory."""


def kernel(*names: str) -> Callable[[Kernel], Kernel]:
    """Register a function of ``KERNELS``."""

    def registered(function: Kernel) -> Kernel:
        KERNELS.update(dict.fromkeys(names, function))
        return function

    return registered


def integers(value: Array) -> list[int]:
    return [int(v) for v in np.asarray(value).reshape(-1)]


def integer(value: Array) -> int:
    return int(np.asarray(value).reshape(()))


_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "real_div": np.divide, "pow": np.power,
    "maximum": np.maximum, "minimum": np.minimum, "equal": np.equal, "not_equal": np.not_equal,
    "greater": np.greater, "greater_equal": np.greater_equal, "less": np.less, "less_equal": np.less_equal,
    "logical_and": np.logical_and, "logical_or": np.logical_or, "floor_div": np.floor_divide, "mod": np.mod,
}  # fmt: skip
_UNARY: dict[str, Callable[[Array], Array]] = {
    "sin": np.sin, "cos": np.cos, "tanh": np.tanh, "exp": np.exp, "sqrt": np.sqrt, "abs": np.abs, "floor": np.floor,
    "square": np.square, "logical_not": np.logical_not, "relu": lambda x: np.maximum(x, 0), "identity": lambda x: x,
}  # fmt: skip
KERNELS |= {name: lambda p, f=f: f(p["x"], p["y"]) for name, f in _BINARY.items()}  # type: ignore[misc]
KERNELS |= {name: lambda p, f=f: f(p["x"]) for name, f in _UNARY.items()}  # type: ignore[misc]


@functools.cache
def _erf_table() -> tuple[Array, Array]:
    points = np.linspace(-6, 6, 2**17 + 1)  # 9e-5 apart: between them a line is 1e-9 off
    return points, np.array([math.erf(point) for point in points])


@kernel("erf")
def erf(p: Parameters) -> Array:
    return np.interp(p["x"], *_erf_table()).astype(p["x"].dtype)


@kernel("sigmoid")
def sigmoid(p: Parameters) -> Array:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-p["x"]))


@kernel("silu")
def silu(p: Parameters) -> Array:
    return p["x"] * sigmoid(p)


@kernel("gelu")
def gelu(p: Parameters) -> Array:
    x, half = p["x"], p["x"].dtype.type(0.5)
    if p["mode"] == "EXACT":
        return x * half * (1 + erf({"x": x * x.dtype.type(math.sqrt(0.5))}))
    if p["mode"] == "TANH_APPROXIMATION":
        return x * half * (1 + np.tanh(x.dtype.type(math.sqrt(2 / math.pi)) * (x + x.dtype.type(0.044715) * x**3)))
    return x * sigmoid({"x": x * x.dtype.type(1.702)})


@kernel("rsqrt")
def rsqrt(p: Parameters) -> Array:
    return 1 / np.sqrt(p["x"] + p["epsilon"])


@kernel("inverse")
def inverse(p: Parameters) -> Array:
    return 1 / (p["x"] + p["epsilon"])


@kernel("clip")
def clip(p: Parameters) -> Array:
    return np.clip(p["x"], p["alpha"], p["beta"])


@kernel("select")
def select(p: Parameters) -> Array:
    return np.where(p["cond"], p["a"], p["b"])


@kernel("cast")
def cast(p: Parameters) -> Array:
    """To the type that the evaluator gives every output; here only what rounding does not do."""
    return np.trunc(p["x"]) if "int" in p["dtype"] and p["x"].dtype.kind == "f" else p["x"]


# -- sums -------------------------------------------------------------------------------------------------------------


def _reduced(function: Callable[..., Any]) -> Kernel:
    def reduce(p: Parameters) -> Array:
        axes = tuple(integers(p["axes"])) if "axes" in p else None
        return np.asarray(function(p["x"], axes, keepdims=bool(p["keep_dims"])))

    return reduce


KERNELS |= {
    "reduce_mean": _reduced(np.mean), "reduce_sum": _reduced(np.sum), "reduce_max": _reduced(np.max),
    "reduce_min": _reduced(np.min),
}  # fmt: skip


@kernel("reduce_argmax")
def reduce_argmax(p: Parameters) -> Array:
    return np.asarray(np.argmax(p["x"], integer(p["axis"]), keepdims=bool(p["keep_dims"])))


@kernel("softmax")
def softmax(p: Parameters) -> Array:
    axis = integer(p["axis"])
    made = p["x"] - p["x"].max(axis, keepdims=True)
    np.exp(made, out=made)
    made /= made.sum(axis, keepdims=True)
    return made


def _normal(x: Array, axes: tuple[int, ...], epsilon: Any) -> Array:
    centred = x - x.mean(axes, keepdims=True)
    centred /= np.sqrt(np.square(centred).mean(axes, keepdims=True) + x.dtype.type(epsilon))
    return centred


@kernel("layer_norm")
def layer_norm(p: Parameters) -> Array:
    x = p["x"]
    axes = tuple(axis % x.ndim for axis in (integers(p["axes"]) if "axes" in p else range(x.ndim)))
    shape = [size if axis in axes else 1 for axis, size in enumerate(x.shape)]
    return _affine(_normal(x, axes, p["epsilon"]), p, shape)


@kernel("instance_norm")
def instance_norm(p: Parameters) -> Array:
    x = p["x"]
    return _affine(_normal(x, tuple(range(2, x.ndim)), p["epsilon"]), p, [1, -1, *(1,) * (x.ndim - 2)])


@kernel("batch_norm")
def batch_norm(p: Parameters) -> Array:
    x, shape = p["x"], [1, -1, *(1,) * (p["x"].ndim - 2)]
    scaled = (x - p["mean"].reshape(shape)) / np.sqrt(p["variance"].reshape(shape) + p["epsilon"])
    return _affine(scaled, p, shape)


def _affine(normal: Array, p: Parameters, shape: Sequence[int]) -> Array:
    if p.get("gamma") is not None:
        normal *= p["gamma"].reshape(shape)
    if p.get("beta") is not None:
        normal += p["beta"].reshape(shape)
    return normal


# -- products ---------------------------------------------------------------------------------------------------------


@kernel("linear")
def linear(p: Parameters) -> Array:
    made = p["x"] @ p["weight"].T
    if p.get("bias") is not None:
        made += p["bias"]
    return made


@kernel("matmul")
def matmul(p: Parameters) -> Array:
    x, y = (p[n].swapaxes(-1, -2) if p.get(f"transpose_{n}") else p[n] for n in ("x", "y"))
    return np.asarray(x @ y)


@kernel("einsum")
def einsum(p: Parameters) -> Array:
    """nchw,nwhu->nchu, whatever its letters, is a product of matrices for each n and h."""
    x, y = p["values"]
    left, right, made = p["equation"].replace(" ", "").replace("->", ",").split(",")
    if x.ndim == 4 and (left[0] + left[3] + left[2], made) == (right[:3], left[:3] + right[3]):
        return (x.transpose(0, 2, 1, 3) @ y.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    return np.einsum(p["equation"], x, y)


@kernel("scaled_dot_product_attention")
def scaled_dot_product_attention(p: Parameters) -> Array:
    query, key, mask = p["query"], p["key"], p.get("attn_mask")
    scores = (query / np.float32(math.sqrt(query.shape[-1]))) @ key.swapaxes(-1, -2)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == np.bool_ else scores + mask
    return np.asarray(softmax({"x": scores, "axis": np.int32(-1)}) @ p["value"])


@kernel("conv")
def conv(p: Parameters) -> Array:
    """One product a position of the kernel: no copy of the picture is as large as all of them."""
    x, weight = p["x"], p["weight"]
    spatial = weight.ndim - 2
    if spatial == 1:
        wide = {name: p[name] for name in ("bias", "groups", "pad_type") if name in p}
        one = {name: np.array([1, *integers(p[name])]) for name in ("strides", "dilations")}
        pads = np.array([0, 0, *integers(p["pad"])])
        return conv({**wide, **one, "pad": pads, "x": x[:, :, None], "weight": weight[:, :, None]})[:, :, 0]
    strides, dilations, groups = integers(p["strides"]), integers(p["dilations"]), integer(p["groups"])
    kernel_size = weight.shape[2:]
    top, bottom, left, right = around = _padding(p, x.shape[2:], kernel_size, strides, dilations)
    if max(around) > max(d * taps for d, taps in zip(dilations, kernel_size, strict=True)):
        raise NotImplementedError(f"pads {around} that are larger than what a position sees")
    batch, channels = x.shape[:2]
    columns = np.pad(x.transpose(1, 0, 2, 3), ((0, 0), (0, 0), (top, bottom), (left, right)))
    height, width = (
        (columns.shape[2 + i] - dilations[i] * (kernel_size[i] - 1) - 1) // strides[i] + 1 for i in range(2)
    )
    taps = np.ascontiguousarray(weight.transpose(2, 3, 0, 1))
    made = np.zeros((groups, weight.shape[0] // groups, batch * height * width), x.dtype)
    for i in range(kernel_size[0]):
        for j in range(kernel_size[1]):
            y0, x0 = i * dilations[0], j * dilations[1]
            seen = columns[:, :, y0 : y0 + height * strides[0] : strides[0], x0 : x0 + width * strides[1] : strides[1]]
            seen = seen[:, :, :height, :width].reshape(groups, channels // groups, -1)
            made += taps[i, j].reshape(groups, -1, weight.shape[1]) @ seen
    result = made.reshape(weight.shape[0], batch, height, width)
    if p.get("bias") is not None:
        result += p["bias"].reshape(-1, 1, 1, 1)
    return result.transpose(1, 0, 2, 3)


def _padding(
    p: Parameters, sizes: Sequence[int], kernel_size: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[int]:
    if p["pad_type"] == "custom":
        return integers(p["pad"])
    if p["pad_type"] == "valid":
        return [0] * 4
    if p["pad_type"] not in ("same", "same_lower"):
        raise NotImplementedError(f"pad_type {p['pad_type']}")
    both = []
    for size, taps, stride, dilation in zip(sizes, kernel_size, strides, dilations, strict=True):
        total = max(0, (-(-size // stride) - 1) * stride + dilation * (taps - 1) + 1 - size)
        less, more = total // 2, total - total // 2
        both += [less, more] if p["pad_type"] == "same" else [more, less]
    return both


# -- shapes -----------------------------------------------------------------------------------------------------------


@kernel("reshape")
def reshape(p: Parameters) -> Array:
    """0 keeps a size; sizes are counted from the last one on, which differs from the first where ranks do (iOS 17)."""
    have, to = p["x"].shape, integers(p["shape"])
    kept = [1] * len(to) + list(have)
    return p["x"].reshape([kept[i - len(to)] if size == 0 else size for i, size in enumerate(to)])


@kernel("transpose")
def transpose(p: Parameters) -> Array:
    return p["x"].transpose(integers(p["perm"]))


@kernel("expand_dims")
def expand_dims(p: Parameters) -> Array:
    return np.expand_dims(p["x"], tuple(integers(p["axes"]) or ()))


@kernel("squeeze")
def squeeze(p: Parameters) -> Array:
    return np.squeeze(p["x"], tuple(integers(p["axes"])) if "axes" in p else None)


@kernel("concat")
def concat(p: Parameters) -> Array:
    values, axis = [np.atleast_1d(value) for value in p["values"]], integer(p["axis"])
    if not p.get("interleave"):
        return np.concatenate(values, axis)
    axis %= values[0].ndim
    shape = list(values[0].shape)
    shape[axis] *= len(values)
    return np.stack(values, axis + 1).reshape(shape)


@kernel("stack")
def stack(p: Parameters) -> Array:
    return np.stack(p["values"], integer(p["axis"]))


@kernel("split")
def split(p: Parameters) -> list[Array]:
    axis = integer(p["axis"])
    if "split_sizes" in p:
        return np.split(p["x"], np.cumsum(integers(p["split_sizes"]))[:-1], axis)
    return np.split(p["x"], integer(p["num_splits"]), axis)


@kernel("slice_by_index")
def slice_by_index(p: Parameters) -> Array:
    x = p["x"]
    stride = integers(p["stride"]) if "stride" in p else [1] * x.ndim
    masks = [integers(p.get(name, np.zeros(x.ndim))) for name in ("begin_mask", "end_mask", "squeeze_mask")]
    index: list[Any] = []
    each = zip(integers(p["begin"]), integers(p["end"]), stride, *masks, strict=True)
    for start, stop, step, no_start, no_stop, single in each:
        index.append(start if single else slice(None if no_start else start, None if no_stop else stop, step))
    return np.asarray(x[tuple(index)])


@kernel("slice_by_size")
def slice_by_size(p: Parameters) -> Array:
    begin, size = integers(p["begin"]), integers(p["size"])
    begin = [start % have for start, have in zip(begin, p["x"].shape, strict=True)]
    ends = (None if length == -1 else start + length for start, length in zip(begin, size, strict=True))
    return p["x"][tuple(slice(start, end) for start, end in zip(begin, ends, strict=True))]


@kernel("tile")
def tile(p: Parameters) -> Array:
    return np.tile(p["x"], integers(p["reps"]))


@kernel("fill")
def fill(p: Parameters) -> Array:
    return np.full(integers(p["shape"]), p["value"])


@kernel("fill_like")
def fill_like(p: Parameters) -> Array:
    return np.full(p["ref_tensor"].shape, p["value"])


@kernel("shape")
def shape(p: Parameters) -> Array:
    return np.array(p["x"].shape, np.int32)


def _pairs(p: Parameters) -> list[tuple[int, int]]:
    both = integers(p["pad"])
    return [(0, 0)] * (p["x"].ndim - len(both) // 2) + list(zip(both[::2], both[1::2], strict=True))


@kernel("pad")
def pad(p: Parameters) -> Array:
    if p["mode"] == "constant":
        return np.pad(p["x"], _pairs(p), constant_values=p["constant_val"])
    mode: Any = {"reflect": "reflect", "replicate": "edge"}[p["mode"]]
    return np.pad(p["x"], _pairs(p), mode=mode)


def _shared(p: Parameters) -> int:
    """Axes at the front that x and its indices have in common."""
    return integer(p["batch_dims"]) if p.get("batch_dims") is not None else 0


@kernel("gather")
def gather(p: Parameters) -> Array:
    x, indices, shared, axis = p["x"], p["indices"], _shared(p), integer(p["axis"]) % p["x"].ndim
    if not shared:
        return np.take(x, indices, axis)
    made = [np.take(x[at], indices[at], axis - shared) for at in np.ndindex(*x.shape[:shared])]
    return np.stack(made).reshape(*x.shape[:shared], *made[0].shape)


@kernel("gather_nd")
def gather_nd(p: Parameters) -> Array:
    x, indices, shared = p["x"], p["indices"], _shared(p)
    made = [np.asarray(x[at][tuple(np.moveaxis(indices[at], -1, 0))]) for at in np.ndindex(*x.shape[:shared])]
    return np.stack(made).reshape(*x.shape[:shared], *made[0].shape)


def _factors(p: Parameters) -> list[int]:
    factors = [float(np.asarray(p[f"scale_factor_{side}"])) for side in ("height", "width")]
    if any(factor != round(factor) for factor in factors):
        raise NotImplementedError(f"factors {factors}")
    return [int(factor) for factor in factors]


@kernel("upsample_nearest_neighbor")
def upsample_nearest_neighbor(p: Parameters) -> Array:
    height, width = _factors(p)
    return p["x"].repeat(height, -2).repeat(width, -1)


@kernel("band_part")
def band_part(p: Parameters) -> Array:
    lower, upper, made = integer(p["lower"]), integer(p["upper"]), p["x"]
    made = np.tril(made, upper) if upper >= 0 else made
    return np.triu(made, -lower) if lower >= 0 else made


# -- weights that are stored in fewer bits ----------------------------------------------------------------------------


@kernel("constexpr_lut_to_dense")
def lut_to_dense(p: Parameters) -> Array:
    """Of iOS 16: one table, indices packed. Of iOS 18: a table for each block of ``indices``."""
    lut, indices = p["lut"], p["indices"]
    if lut.ndim == 1:
        shape = integers(p["shape"])
        return lut[unpacked(indices, lut.size.bit_length() - 1, math.prod(shape))].reshape(shape)
    *groups, entries, vector = lut.shape
    if vector != 1:
        raise NotImplementedError("tables of vectors")
    made = np.empty(indices.shape, lut.dtype)
    blocks = [size // count for size, count in zip(indices.shape, groups, strict=True)]
    for group in np.ndindex(*groups):
        where = tuple(slice(g * block, (g + 1) * block) for g, block in zip(group, blocks, strict=True))
        made[where] = lut[group].reshape(entries)[indices[where]]
    return made


@kernel("constexpr_affine_dequantize")
def affine_dequantize(p: Parameters) -> Array:
    data, axis = p["quantized_data"], integer(p["axis"])
    shape = [-1 if i == axis else 1 for i in range(data.ndim)]
    zero, scale = (np.asarray(p[name], np.float32) for name in ("zero_point", "scale"))
    zero, scale = (value.reshape(shape) if value.ndim else value for value in (zero, scale))
    return (data.astype(np.float32) - zero) * scale
