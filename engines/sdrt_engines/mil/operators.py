"""ONNX operators in MIL's terms. Known inputs are numpy arrays, the others coremltools' ``Var``; sizes are known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdrt.errors import BuildError
from sdrt_engines.mil.translate import OPERATORS, Translation, Value, known, narrowed, operator

Attributes = Mapping[str, Any]


def registered() -> None:
    """Importing this module is what registers its operators."""
    from sdrt_engines.mil import attention

    assert attention.__name__


def builder() -> Any:
    """coremltools' ``Builder``."""
    from coremltools.converters.mil import Builder

    return Builder


def dtype(value: Value) -> Any:
    """The numpy type of a value, as a class that makes one of it."""
    from coremltools.converters.mil.mil import types

    if known(value):
        return {np.int64: np.int32, np.float64: np.float32}.get(value.dtype.type, value.dtype.type)
    return types.nptype_from_builtin(value.dtype)


def alike(x: Value, y: Value) -> tuple[Value, Value]:
    """Both as MIL takes them, the known one in the other's type."""
    if known(x):
        return narrowed(x).astype(dtype(y)), y
    return x, narrowed(y).astype(dtype(x)) if known(y) else y


def numbers(value: Value) -> list[int]:
    """A known tensor of integers as a list."""
    if not known(value):
        raise BuildError("a shape, an axis or a size is computed from the inputs; Core ML packages are of fixed sizes")
    return [int(v) for v in np.asarray(value).reshape(-1)]


# -- arithmetic -------------------------------------------------------------------------------------------------------

_BINARY = {
    "Add": "add", "Sub": "sub", "Div": "real_div", "Pow": "pow", "Max": "maximum", "Min": "minimum",
    "Equal": "equal", "Greater": "greater", "GreaterOrEqual": "greater_equal", "Less": "less",
    "LessOrEqual": "less_equal", "And": "logical_and", "Or": "logical_or",
}  # fmt: skip
_UNARY = {
    "Sigmoid": "sigmoid", "Sin": "sin", "Cos": "cos", "Erf": "erf", "Tanh": "tanh", "Exp": "exp", "Sqrt": "sqrt",
    "Abs": "abs", "Relu": "relu", "Floor": "floor", "Not": "logical_not",
}  # fmt: skip


@operator(*_BINARY)
def binary(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value:
    x, *others = inputs
    if not others:  # Max and Min take any number
        return builder().identity(x=x, name=t.name(node.output[0]))
    kind = getattr(builder(), _BINARY[node.op_type])
    for y in others[:-1]:
        x = kind(**dict(zip("xy", alike(x, y), strict=True)))
    x, y = alike(x, others[-1])
    return kind(x=x, y=y, name=t.name(node.output[0]))


@operator(*_UNARY)
def unary(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value:
    after = t.sole_reader(node.output[0], "Mul") if node.op_type == "Sigmoid" else None
    if after is not None and node.input[0] in after.input:  # x · σ(x)
        silu = t.values[after.output[0]] = builder().silu(x=inputs[0], name=t.name(after.output[0]))
        return silu
    return getattr(builder(), _UNARY[node.op_type])(x=inputs[0], name=t.name(node.output[0]))


@operator("Mul")
def mul(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value:
    x, y = alike(*inputs)
    return builder().mul(x=x, y=y, name=t.name(node.output[0]))


@operator("Neg")
def neg(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value:
    return builder().mul(x=inputs[0], y=dtype(inputs[0])(-1), name=t.name(node.output[0]))


@operator("Reciprocal")
def reciprocal(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value:
    return builder().real_div(x=dtype(inputs[0])(1), y=inputs[0], name=t.name(node.output[0]))


@operator("IsNaN")
def is_nan(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value:
    return builder().not_equal(x=inputs[0], y=inputs[0], name=t.name(node.output[0]))


@operator("Identity")
def identity(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value:
    return inputs[0]


@operator("Gelu")
def gelu(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value:
    mode = "EXACT" if attributes.get("approximate", "none") == "none" else "TANH_APPROXIMATION"
    return builder().gelu(x=inputs[0], mode=mode, name=t.name(node.output[0]))


@operator("Softmax")
def softmax(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value:
    return builder().softmax(x=inputs[0], axis=attributes.get("axis", -1), name=t.name(node.output[0]))


@operator("Clip")
def clip(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value:
    kind = dtype(inputs[0])
    low, high = (
        kind(np.finfo(kind).min * sign) if bound is None else bound.astype(kind).reshape(())
        for sign, bound in zip((1, -1), [*inputs[1:], None, None][:2], strict=True)
    )
    return builder().clip(x=inputs[0], alpha=low, beta=high, name=t.name(node.output[0]))


@operator("Where")
def where(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value:
    a, b = alike(inputs[1], inputs[2])
    return builder().select(cond=inputs[0], a=a, b=b, name=t.name(node.output[0]))


_REDUCTIONS = {"ReduceMean": "reduce_mean", "ReduceSum": "reduce_sum", "ReduceMax": "reduce_max"}


@operator(*_REDUCTIONS)
def reduction(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value:
    axes = attributes.get("axes")
    if len(inputs) > 1 and inputs[1] is not None:
        axes = numbers(inputs[1])
    kept = bool(attributes.get("keepdims", 1))
    return getattr(builder(), _REDUCTIONS[node.op_type])(
        x=inputs[0], axes=None if axes is None else list(axes), keep_dims=kept, name=t.name(node.output[0])
    )


@operator("ArgMax")
def argmax(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value:
    if attributes.get("select_last_index"):
        raise BuildError("select_last_index is not what Core ML computes")
    x = inputs[0]
    if dtype(x) == np.bool_:
        x = builder().cast(x=x, dtype="int32")
    kept = bool(attributes.get("keepdims", 1))
    return builder().reduce_argmax(x=x, axis=attributes.get("axis", 0), keep_dims=kept, name=t.name(node.output[0]))


_CASTS = {1: "fp32", 10: "fp16", 6: "int32", 7: "int32", 9: "bool", 11: "fp32", 3: "int8", 2: "uint8"}


@operator("Cast")
def cast(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value:
    to = _CASTS[attributes["to"]]
    x = inputs[0]
    if x.op is not None and x.op.op_type == "cast" and to == "fp16" and dtype(x.op.x) == np.float16:
        return x.op.x  # float16 that was widened
    return builder().cast(x=x, dtype=to, name=t.name(node.output[0]))


# -- networks ---------------------------------------------------------------------------------------------------------


@operator("MatMul")
def matmul(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value:
    x, weight = inputs
    if not known(weight) or weight.ndim != 2:
        x, weight = alike(x, weight)
        return builder().matmul(x=x, y=weight, name=t.name(node.output[0]))
    output, bias = t.with_bias(node.output[0], weight.shape[1])
    weight_of = t.weight(node.input[1], weight.T, ".T")
    extra = {} if bias is None else {"bias": bias.astype(weight.dtype)}
    made = builder().linear(x=x, weight=weight_of, name=t.name(output), **extra)
    t.values[output] = made
    return made


@operator("Gemm")
def gemm(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value:
    a, b, c = [*inputs, None][:3]
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    if attributes.get("transA", 0):
        a = builder().transpose(x=a, perm=[1, 0])
    if not known(b) or not (c is None or known(c)):
        raise BuildError("its weights or its bias are computed from the inputs")
    transposed = not attributes.get("transB", 0)
    weight = (b.T if transposed else b) * b.dtype.type(alpha)
    extra = {} if c is None else {"bias": np.broadcast_to(c * c.dtype.type(beta), (weight.shape[0],)).copy()}
    how = (".T" if transposed else "") + (f".times_{alpha}" if alpha != 1 else "")
    weight = t.weight(node.input[1], weight, how)
    return builder().linear(x=a, weight=weight, name=t.name(node.output[0]), **extra)


def _pads(both: Sequence[int]) -> list[int]:
    """ONNX's begins and ends as MIL's pairs."""
    half = len(both) // 2
    return [pad for pair in zip(both[:half], both[half:], strict=True) for pad in pair]


@operator("Conv")
def conv(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value:
    x, weight, bias = [*inputs, None][:3]
    if attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise BuildError(f"auto_pad={attributes['auto_pad']!r} is not supported")
    if not known(weight):
        raise BuildError("its weights are computed from the inputs")
    spatial = weight.ndim - 2
    weight = t.weight(node.input[1], weight)
    return builder().conv(
        x=x, weight=weight, pad_type="custom", pad=_pads(attributes.get("pads", [0] * 2 * spatial)),
        strides=attributes.get("strides", [1] * spatial), dilations=attributes.get("dilations", [1] * spatial),
        groups=attributes.get("group", 1), name=t.name(node.output[0]), **({} if bias is None else {"bias": bias}),
    )  # fmt: skip


@operator("InstanceNormalization")
def instance_normalization(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value:
    epsilon = dtype(inputs[0])(attributes.get("epsilon", 1e-5))
    x, gamma, beta = inputs
    return builder().instance_norm(x=x, gamma=gamma, beta=beta, epsilon=epsilon, name=t.name(node.output[0]))


@operator("GroupNormalization")
def group_normalization(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value:
    """By ``instance_norm`` of groups: its sums and squares are inside, where no float16 of the program overflows."""
    x, scale, bias = inputs
    groups, mb = attributes["num_groups"], builder()
    if scale.size == groups != x.shape[1]:  # a group's, before opset 21
        scale, bias = (np.repeat(values, x.shape[1] // groups) for values in (scale, bias))
    whole = mb.reshape(x=x, shape=[x.shape[0], groups, math.prod(x.shape[1:]) // groups])
    epsilon = dtype(x)(attributes.get("epsilon", 1e-5))
    ones, zeros = np.ones(groups, dtype(x)), np.zeros(groups, dtype(x))
    normal = mb.reshape(x=mb.instance_norm(x=whole, gamma=ones, beta=zeros, epsilon=epsilon), shape=list(x.shape))
    scale, bias = (values.astype(dtype(x)).reshape(-1, *(1,) * (x.rank - 2)) for values in (scale, bias))
    return mb.add(x=mb.mul(x=normal, y=scale), y=bias, name=t.name(node.output[0]))


@operator("LayerNormalization")
def layer_normalization(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value:
    x, gamma, beta = [*inputs, None][:3]
    axes = list(range(attributes.get("axis", -1) % x.rank, x.rank))
    extra = {} if beta is None else {"beta": beta.astype(dtype(x))}
    return builder().layer_norm(
        x=x, axes=axes, gamma=gamma.astype(dtype(x)), epsilon=dtype(x)(attributes.get("epsilon", 1e-5)),
        name=t.name(node.output[0]), **extra,
    )  # fmt: skip


@operator("Resize")
def resize(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value:
    x, _, scales, sizes = [*inputs, None, None, None][:4]
    told = ("mode", "coordinate_transformation_mode", "nearest_mode")
    if (modes := [attributes.get(name) for name in told]) != ["nearest", "asymmetric", "floor"]:
        raise BuildError(f"only the nearest pixel to the left can be repeated; asked for {', '.join(map(str, modes))}")
    if sizes is not None and sizes.size:
        to = numbers(sizes)
    else:
        to = [int(size * factor) for size, factor in zip(x.shape, scales.reshape(-1), strict=True)]
    name, factors = t.name(node.output[0]), [size // have for size, have in zip(to, x.shape, strict=True)]
    if factors[:2] == [1, 1] and all(have * f == size for size, have, f in zip(to, x.shape, factors, strict=True)):
        return builder().upsample_nearest_neighbor(
            x=x, scale_factor_height=factors[2], scale_factor_width=factors[3], name=name
        )
    changed = [axis for axis in range(x.rank) if to[axis] != x.shape[axis]]
    for axis in changed:  # a part of a pixel: sizes that are no multiple of 64
        seen = (np.arange(to[axis]) * x.shape[axis] // to[axis]).astype(np.int32)
        x = builder().gather(
            x=x, indices=seen, axis=axis, name=name if axis == changed[-1] else t.name(f"{name}_{axis}")
        )
    return x


# -- shapes -----------------------------------------------------------------------------------------------------------


@operator("Shape")
def shape(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value:
    return np.array(inputs[0].shape[attributes.get("start", 0) : attributes.get("end")], np.int64)


@operator("Reshape")
def reshape(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value:
    to = numbers(inputs[1])
    if not attributes.get("allowzero", 0):
        to = [inputs[0].shape[i] if size == 0 else size for i, size in enumerate(to)]
    return builder().reshape(x=inputs[0], shape=to, name=t.name(node.output[0]))


@operator("Flatten")
def flatten(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value:
    first = math.prod(inputs[0].shape[: attributes.get("axis", 1)])
    return builder().reshape(x=inputs[0], shape=[first, -1], name=t.name(node.output[0]))


@operator("Transpose")
def transpose(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value:
    perm = attributes.get("perm", list(reversed(range(inputs[0].rank))))
    return builder().transpose(x=inputs[0], perm=perm, name=t.name(node.output[0]))


@operator("Unsqueeze")
def unsqueeze(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value:
    axes = attributes.get("axes") or numbers(inputs[1])
    return builder().expand_dims(x=inputs[0], axes=axes, name=t.name(node.output[0]))


@operator("Squeeze")
def squeeze(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value:
    axes = attributes.get("axes") or (numbers(inputs[1]) if len(inputs) > 1 else None)
    return builder().squeeze(x=inputs[0], axes=axes, name=t.name(node.output[0]))


@operator("Concat")
def concat(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value:
    kind = dtype(next(value for value in inputs if not known(value)))
    values = [narrowed(value).astype(kind) if known(value) else value for value in inputs]
    return builder().concat(values=values, axis=attributes["axis"], name=t.name(node.output[0]))


@operator("Split")
def split(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value:
    axis = attributes.get("axis", 0)
    size, parts = inputs[0].shape[axis], len(node.output)
    chunk = -(-size // parts)
    sizes = [min(chunk, size - chunk * i) for i in range(parts)]
    if len(inputs) > 1 and inputs[1] is not None:
        sizes = numbers(inputs[1])
    return list(builder().split(x=inputs[0], split_sizes=sizes, axis=axis, name=t.name(node.output[0])))


@operator("Slice")
def slice_(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value:
    x = inputs[0]
    starts, ends, axes, steps = (None if value is None else numbers(value) for value in [*inputs[1:], None, None][:4])
    begin, end, stride = [0] * x.rank, list(x.shape), [1] * x.rank
    for i, (start, stop) in enumerate(zip(starts or [], ends or [], strict=True)):
        axis = axes[i] % x.rank if axes is not None else i
        begin[axis], end[axis], stride[axis] = slice(start, stop, steps[i] if steps is not None else 1).indices(
            x.shape[axis]
        )
    if min(stride) < 1:
        raise BuildError("a slice runs backwards")
    return builder().slice_by_index(x=x, begin=begin, end=end, stride=stride, name=t.name(node.output[0]))


@operator("Expand")
def expand(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value:
    x, to = inputs[0], numbers(inputs[1])
    rank = max(len(to), x.rank)
    have, to = (1,) * (rank - x.rank) + tuple(x.shape), [1] * (rank - len(to)) + to
    reps = [wanted if size == 1 else 1 for size, wanted in zip(have, to, strict=True)]
    if len(have) != x.rank:
        x = builder().reshape(x=x, shape=list(have))
    return builder().tile(x=x, reps=reps, name=t.name(node.output[0]))


@operator("Pad")
def pad(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value:
    x, both, value, axes = [*inputs, None, None][:4]
    wanted = numbers(both)
    if axes is not None:
        chosen = [axis % x.rank for axis in numbers(axes)]
        ends = [dict(zip(chosen, half, strict=True)) for half in (wanted[: len(chosen)], wanted[len(chosen) :])]
        wanted = [end.get(axis, 0) for end in ends for axis in range(x.rank)]
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}[attributes.get("mode", "constant")]
    filled = dtype(x)(0 if value is None else value.reshape(-1)[0])
    return builder().pad(x=x, pad=_pads(wanted), mode=mode, constant_val=filled, name=t.name(node.output[0]))


@operator("Gather")
def gather(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value:
    x, indices = (narrowed(value) if known(value) else value for value in inputs)
    if known(x):  # token embeddings
        x = t.weight(node.input[0], x)
    return builder().gather(x=x, indices=indices, axis=attributes.get("axis", 0), name=t.name(node.output[0]))


@operator("GatherND")
def gather_nd(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value:
    if attributes.get("batch_dims"):
        raise BuildError("batch_dims is not supported")
    x, indices = (narrowed(value) if known(value) else value for value in inputs)
    return builder().gather_nd(x=x, indices=indices, name=t.name(node.output[0]))


@operator("Range", "ConstantOfShape", "Constant")
def constant(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value:
    """Known while translating, or nothing that can be said."""
    if inputs:
        raise BuildError("a shape is computed from the inputs; Core ML packages are of fixed sizes")
    return t._folded(node, [])


assert OPERATORS
