"""Channels first: the layout that Apple's neural engine wants, [B,C,1,S], through whole transformer blocks.

Tokens [B,S,C] are held as [B,C,1,S] from where a picture becomes tokens to where they become one again: products with
weights are 1x1 convolutions, norms run over the second axis, and attention is computed head by head, by einsum.
Source: "Deploying Transformers on the Apple Neural Engine" (Apple, 2022); SPLIT_EINSUM of apple/ml-stable-diffusion.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from sdrt_engines.mil.operators import builder, dtype, numbers
from sdrt_engines.mil.translate import Translation, Value, known

Form = Literal["tokens", "picture", "split", "heads"]
"""What the graph has: tokens [B,S,C], picture [B,h,w,C], split [B,S,H,D], heads [B,H,S,D]."""

Attributes = dict[str, Any]


@dataclass(frozen=True)
class Held:
    """A tensor of the graph, held channels first: ``var`` is [B,C,1,S], of a picture [B,C,h,w]."""

    var: Value
    form: Form
    heads: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """As the graph has it."""
        batch, channels, height, width = self.var.shape
        split = (self.heads, channels // self.heads)
        return {
            "picture": (batch, height, width, channels), "tokens": (batch, width, channels),
            "split": (batch, width, *split), "heads": (batch, split[0], width, split[1]),
        }[self.form]  # fmt: skip

    def plain(self) -> Value:
        """As the graph has it."""
        mb = builder()
        if self.form == "picture":
            return mb.transpose(x=self.var, perm=[0, 2, 3, 1])
        tokens = mb.transpose(x=mb.squeeze(x=self.var, axes=[2]), perm=[0, 2, 1])
        if self.form == "tokens":
            return tokens
        batch, count, width = tokens.shape
        split = mb.reshape(x=tokens, shape=[batch, count, self.heads, width // self.heads])
        return split if self.form == "split" else mb.transpose(x=split, perm=[0, 2, 1, 3])


def plain(value: Value) -> Value:
    """As the graph has it, whether it is held or not."""
    return value.plain() if isinstance(value, Held) else value


def translated(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value | None:
    """What a node makes of inputs that are held, or of a picture that becomes tokens; None where it is neither."""
    if not any(isinstance(value, Held) for value in inputs):
        return _begun(node, inputs, attributes)
    if node.op_type in _HELD and (isinstance(inputs[0], Held) or node.op_type in _POINTWISE):
        return _HELD[node.op_type](t, node, inputs, attributes)
    return None


def _begun(node: Any, inputs: list[Value], attributes: Attributes) -> Value | None:
    if node.op_type == "Transpose" and attributes.get("perm") == [0, 2, 3, 1] and not known(inputs[0]):
        return Held(inputs[0], "picture")
    return None


def _transpose(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value | None:
    x, perm = inputs[0], attributes.get("perm")
    if x.form == "picture" and perm == [0, 3, 1, 2]:
        return x.var
    if x.form in ("split", "heads") and perm == [0, 2, 1, 3]:
        return Held(x.var, "heads" if x.form == "split" else "split", x.heads)
    return None


def _reshape(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value | None:
    x, to = inputs[0], numbers(inputs[1])
    batch, channels, height, width = x.var.shape
    total = math.prod(x.var.shape)
    to = [x.shape[i] if size == 0 and not attributes.get("allowzero", 0) else size for i, size in enumerate(to)]
    to = [total // -math.prod(to) if size == -1 else size for size in to]
    if x.form == "picture" and to == [batch, height * width, channels]:
        return Held(builder().reshape(x=x.var, shape=[batch, channels, 1, height * width]), "tokens")
    if x.form == "tokens" and len(to) == 4 and to[:2] == [batch, width]:
        return Held(x.var, "split", to[2])
    if x.form == "tokens" and len(to) == 4 and to[1] * to[2] == width and to[3] == channels:
        return Held(builder().reshape(x=x.var, shape=[batch, channels, to[1], to[2]]), "picture")
    if x.form == "split" and to == [batch, width, channels]:
        return Held(x.var, "tokens")
    return None


def _matmul(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value | None:
    x, weight = inputs
    if not isinstance(x, Held) or not known(weight) or weight.ndim != 2 or x.form not in ("tokens", "picture"):
        return None
    output, bias = t.with_bias(node.output[0], weight.shape[1])
    kernel = t.weight(node.input[1], weight.T[:, :, None, None], ".1x1")
    extra = {} if bias is None else {"bias": bias.astype(weight.dtype)}
    made = Held(builder().conv(x=x.var, weight=kernel, pad_type="valid", name=t.name(output), **extra), x.form)
    t.values[output] = made
    return made


def _norm(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value | None:
    x, gamma, beta = [*inputs, None][:3]
    if x.form != "tokens" or attributes.get("axis", -1) not in (-1, 2):
        return None
    kind = dtype(x.var)
    made = builder().layer_norm(
        x=x.var, axes=[1], gamma=gamma.astype(kind), epsilon=kind(attributes.get("epsilon", 1e-5)),
        name=t.name(node.output[0]), **({} if beta is None else {"beta": beta.astype(kind)}),
    )  # fmt: skip
    return Held(made, "tokens")


def _pointwise(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value | None:
    """Operators that do the same to every number; what is known is one number, or one a channel."""
    held = next(value for value in inputs if isinstance(value, Held))
    if held.form not in ("tokens", "picture"):
        return None
    laid_out = []
    for value in inputs:
        if isinstance(value, Held):
            if value.form != held.form or value.var.shape != held.var.shape:
                return None
            laid_out.append(value.var)
        elif known(value) and value.size == 1:
            laid_out.append(value.reshape(()))
        elif known(value) and value.shape == (held.var.shape[1],):
            laid_out.append(value.reshape(1, -1, 1, 1))
        else:
            return None
    return Held(t.ordinary(node, laid_out, attributes), held.form)


def _split(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value | None:
    x = inputs[0]
    if x.form != "tokens" or attributes.get("axis", 0) not in (-1, 2):
        return None
    parts = t.ordinary(node, [x.var, *inputs[1:]], {**attributes, "axis": 1})
    return [Held(part, "tokens") for part in parts]


def _attention(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value | None:
    """Head by head: no tensor of all heads' scores, and none that is transposed but the keys."""
    if len(inputs) > 3 or not all(isinstance(v, Held) and v.form == "heads" for v in inputs):
        return None
    usual = {"is_causal": 0, "softcap": 0.0, "qk_matmul_output_mode": 0}
    if any(attributes.get(name, value) != value for name, value in usual.items()) or len(node.output) > 1:
        return None
    mb, (query, key, value), heads = builder(), (held.var for held in inputs), inputs[0].heads
    width = query.shape[1] // heads
    scale = dtype(query)(attributes.get("scale") or 1 / math.sqrt(width))
    sizes = [width] * heads
    keys = mb.transpose(x=key, perm=[0, 3, 2, 1])  # [B,S,1,C]
    split = [mb.split(x=x, split_sizes=sizes, axis=axis) for x, axis in ((query, 1), (keys, 3), (value, 1))]
    if heads == 1:
        split = [[query], [keys], [value]]
    made = []
    for q, k, v in zip(*split, strict=True):
        scores = mb.einsum(values=(k, mb.mul(x=q, y=scale)), equation="bkhc,bchq->bkhq")
        made.append(mb.einsum(values=(v, mb.softmax(x=scores, axis=1)), equation="bchk,bkhq->bchq"))
    name = t.name(node.output[0])
    return Held(mb.concat(values=made, axis=1, name=name), "heads", heads)


def _cast(t: Translation, node: Any, inputs: list[Value], attributes: Attributes) -> Value | None:
    made = t.ordinary(node, [inputs[0].var], attributes)
    return Held(made, inputs[0].form, inputs[0].heads)


_POINTWISE = ("Add", "Sub", "Mul", "Div", "Gelu", "Erf", "Tanh", "Sqrt")
_HELD: dict[str, Callable[[Translation, Any, list[Value], Attributes], Value | None]] = {
    "Transpose": _transpose, "Reshape": _reshape, "MatMul": _matmul, "LayerNormalization": _norm, "Split": _split,
    "Attention": _attention, "Cast": _cast, **dict.fromkeys(_POINTWISE, _pointwise),
}  # fmt: skip
