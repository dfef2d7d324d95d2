"""The verifier's operations, one by one, against coremltools' own inference of values, and torch where it has none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdrt.errors import NumericsError
from sdrt_engines.mil.evaluate import evaluate
from sdrt_engines.mil.kernels import KERNELS
from sdrt_engines.mil.package import Function, Operation, Tensor, read, unpacked
from sdrt_engines.mil.palettize import palettized
from tests.mil import saved, untouched

coremltools = pytest.importorskip("coremltools")
torch = pytest.importorskip("torch")
frontend = pytest.importorskip("coremltools.converters.mil")
utilities = pytest.importorskip("coremltools.optimize._utils")
Builder, mil, types = frontend.Builder, frontend.mil, frontend.mil.types

RANDOM = np.random.default_rng(0)
Array = Any


def f32(*shape: int) -> Array:
    return RANDOM.standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> Array:
    return RANDOM.uniform(0.1, 4, shape).astype(np.float32)


def i32(*values: Any) -> Array:
    return np.array(values, np.int32)


def whole(low: int, high: int, *shape: int) -> Array:
    return RANDOM.integers(low, high, shape).astype(np.int32)


def mask(*shape: int) -> Array:
    return RANDOM.integers(0, 2, shape).astype(bool)


Case = tuple[str, dict[str, Any]]


def outputs(kind: str, target: str = "iOS17", **given: Any) -> tuple[list[Any], list[Array]]:
    """(coremltools' variables, our arrays) of one operation. What is not given is coremltools' default; types and
    shapes are what it infers, and the evaluator refuses others."""
    with mil.Function({}, opset_version=getattr(coremltools.target, target)), np.errstate(over="ignore"):
        made = getattr(Builder, kind)(**given)
    several = list(made) if isinstance(made, (list, tuple)) else [made]
    inputs = {
        name: tuple(v.val for v in var) if isinstance(var, (list, tuple)) else (var.val,)
        for name, var in several[0].op.inputs.items()
        if var is not None
    }
    told = tuple(Tensor(f"y{i}", types.nptype_from_builtin(v.dtype), tuple(v.shape)) for i, v in enumerate(several))
    function = Function((), tuple(t.name for t in told), (Operation(kind, kind, inputs, {}, told),))
    return several, list(evaluate(function, {}).values())


def near(ours: Array, theirs: Array, tolerance: float) -> None:
    assert ours.shape == np.shape(theirs)
    if ours.dtype.kind == "f":
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)
    else:
        np.testing.assert_array_equal(ours, theirs)


# -- against coremltools -----------------------------------------------------------------------------------------------

PAIRS = [(f32(2, 3, 4), f32(2, 3, 4)), (f32(2, 3, 4), f32(3, 1)), (np.float32(1.5), f32(5)), (f32(4), f32(2, 4))]
WHOLE = [(whole(-9, 9, 3, 4), whole(1, 5, 3, 4)), (whole(-9, 9, 3, 4), i32(-3, 2, -1, 4)), (i32(7), i32(-7, 8))]
TIES = [(np.round(x), np.round(y)) for x, y in PAIRS]
X = f32(2, 3, 4, 5)

CASES: list[Case] = [
    *((kind, {"x": x, "y": y}) for kind in ("add", "sub", "mul", "maximum", "minimum") for x, y in PAIRS + WHOLE),
    *(("real_div", {"x": x, "y": y}) for x, y in PAIRS),
    *(("pow", {"x": abs(x), "y": y}) for x, y in PAIRS), ("pow", {"x": f32(3, 4), "y": np.float32(2)}),
    *((kind, {"x": x, "y": y}) for kind in ("floor_div", "mod") for x, y in PAIRS + WHOLE),
    *((kind, {"x": x, "y": y}) for x, y in TIES + WHOLE
      for kind in ("equal", "not_equal", "greater", "greater_equal", "less", "less_equal")),
    *((kind, {"x": mask(3, 4), "y": y}) for kind in ("logical_and", "logical_or") for y in (mask(3, 4), mask(4))),
    ("logical_not", {"x": mask(3, 4)}),
    *((kind, {"x": scale * X}) for kind in ("sin", "cos", "tanh", "abs", "floor", "relu", "identity", "sigmoid", "erf")
      for scale in (np.float32(0.3), np.float32(9))),
    *(("gelu", {"x": 3 * X, "mode": mode}) for mode in ("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION")),
    ("exp", {"x": X}), ("square", {"x": 9 * X}), ("sqrt", {"x": abs(X)}),
    *((kind, {"x": positive(3, 4)} | extra) for kind in ("rsqrt", "inverse") for extra in ({}, {"epsilon": np.float32(0.5)})),
    ("clip", {"x": X, "alpha": np.float32(-0.5), "beta": np.float32(1)}),
    ("clip", {"x": X, "alpha": np.float32(0), "beta": np.float32(np.inf)}),
    ("select", {"cond": mask(3, 4), "a": f32(3, 4), "b": f32(3, 4)}),
    ("select", {"cond": mask(3, 1), "a": f32(3, 4), "b": f32(4)}),
    *(("cast", {"x": 99 * X, "dtype": dtype}) for dtype in ("fp16", "fp32", "int32", "bool")),
    *(("cast", {"x": whole(-9, 9, 3, 4), "dtype": dtype}) for dtype in ("fp16", "fp32", "int32", "bool", "int8", "int16")),
    ("cast", {"x": whole(0, 255, 9), "dtype": "uint8"}), ("cast", {"x": mask(3, 4), "dtype": "int32"}),
    ("cast", {"x": mask(3, 4), "dtype": "fp32"}), ("cast", {"x": whole(0, 60000, 9), "dtype": "uint16"}),
    *((kind, {"x": X} | extra) for kind in ("reduce_mean", "reduce_sum", "reduce_max", "reduce_min")
      for extra in ({"axes": i32(1)}, {"axes": i32(-1, 1), "keep_dims": True}, {}, {"keep_dims": True}, {"axes": i32(2, 3)})),
    *(("reduce_argmax", {"x": x, "axis": axis, "keep_dims": kept}) for x in (X, whole(0, 3, 2, 3, 4)) for axis in (-1, 0, 1)
      for kept in (False, True)),
    ("reduce_argmax", {"x": X, "axis": 1, "output_dtype": "uint16"}),
    *(("softmax", {"x": scale * X, "axis": axis}) for axis in (-1, 1) for scale in (np.float32(1), np.float32(60))),
    *(("layer_norm", {"x": X, "axes": axes} | extra) for axes, shape in ((i32(3), (5,)), (i32(-1), (5,)), (i32(2, 3), (4, 5)))
      for extra in ({}, {"epsilon": np.float32(0.1)}, {"gamma": f32(*shape)}, {"gamma": f32(*shape), "beta": f32(*shape)})),
    ("linear", {"x": f32(2, 7, 4), "weight": f32(3, 4), "bias": f32(3)}), ("linear", {"x": f32(7, 4), "weight": f32(3, 4)}),
    ("linear", {"x": f32(4), "weight": f32(3, 4), "bias": f32(3)}),
    *(("matmul", {"x": f32(*((2, 4, 3) if tx else (2, 3, 4))), "y": f32(*((5, 4) if ty else (4, 5))), "transpose_x": tx,
                  "transpose_y": ty}) for tx in (False, True) for ty in (False, True)),
    ("matmul", {"x": f32(2, 1, 3, 4), "y": f32(5, 4, 6)}), ("matmul", {"x": f32(4), "y": f32(4, 5)}),
    ("matmul", {"x": f32(3, 4), "y": f32(4)}), ("matmul", {"x": f32(2, 3, 4), "y": f32(4), "transpose_x": False}),
    ("einsum", {"values": [f32(2, 5, 3, 7), f32(2, 7, 3, 4)], "equation": "nchw,nwhu->nchu"}),
    ("einsum", {"values": [f32(3, 5, 7), f32(7, 5, 4)], "equation": "chw,whr->chr"}),
    ("einsum", {"values": [f32(2, 5, 3, 7), f32(2, 7, 3, 4)], "equation": "bchk,bkhq->bchq"}),
    ("reshape", {"x": X, "shape": i32(6, -1)}), ("reshape", {"x": X, "shape": i32(2, 3, 20)}),
    ("reshape", {"x": X, "shape": i32(0, 0, -1)}), ("reshape", {"x": X, "shape": i32(2, 0, 5, 4)}),
    ("transpose", {"x": X, "perm": i32(0, 2, 3, 1)}), ("transpose", {"x": X, "perm": i32(-1, 0, 1, 2)}),
    ("expand_dims", {"x": X, "axes": i32(0, 3)}), ("expand_dims", {"x": X, "axes": i32(-1)}),
    ("expand_dims", {"x": np.float32(3), "axes": i32(0)}), ("expand_dims", {"x": X, "axes": i32(-1, 1)}),
    ("squeeze", {"x": f32(1, 3, 1, 4), "axes": i32(2)}), ("squeeze", {"x": f32(1, 3, 1, 4)}),
    ("squeeze", {"x": f32(1, 3, 1), "axes": i32(-1, 0)}), ("squeeze", {"x": f32(1)}),
    *(("concat", {"values": [f32(2, 3), f32(2, 3)], "axis": axis}) for axis in (0, -1)),
    ("concat", {"values": [f32(2, 3), f32(2, 1), f32(2, 4)], "axis": 1}), ("concat", {"values": [i32(1), i32(2, 3)], "axis": 0}),
    *(("stack", {"values": [f32(2, 3), f32(2, 3)], "axis": axis}) for axis in (0, 2, -1)),
    ("stack", {"values": [np.int32(1), np.int32(2)], "axis": 0}),
    *(("split", {"x": X, "axis": axis} | extra) for axis, extra in (
        (0, {"num_splits": 2}), (-1, {"split_sizes": i32(1, 3, 1)}), (2, {"num_splits": 4}), (1, {"num_splits": 1}))),
    *(("slice_by_index", {"x": X, "begin": i32(0, 1, 3, -4), "end": i32(1, -1, 0, 5)} | extra) for extra in (
        {"stride": i32(1, 1, -1, 2)}, {"stride": i32(1, 1, -2, 1), "end_mask": [False, True, True, False]},
        {"stride": i32(1, 1, -1, 1), "begin_mask": [True, True, True, True], "end_mask": [True, True, True, True]},
        {"stride": i32(1, 1, -1, 1), "squeeze_mask": [True, False, True, False]})),
    ("slice_by_index", {"x": X, "begin": i32(0, -1, 1, 0), "end": i32(0, 0, 0, 0), "squeeze_mask": [False, True, True, False],
                        "begin_mask": [False] * 4, "end_mask": [True, False, False, True]}),
    ("slice_by_index", {"x": f32(5), "begin": i32(-1), "end": i32(0), "squeeze_mask": [True]}),
    ("slice_by_index", {"x": f32(5), "begin": i32(1), "end": i32(2**31 - 1)}),
    ("slice_by_index", {"x": f32(5), "begin": i32(-9), "end": i32(99)}),
    ("slice_by_size", {"x": X, "begin": i32(1, 0, 2, 0), "size": i32(1, 2, -1, 5)}),
    ("slice_by_size", {"x": X, "begin": i32(0, -2, 1, -3), "size": i32(2, 2, 1, 2)}),
    ("tile", {"x": f32(2, 3), "reps": i32(1, 2)}), ("tile", {"x": f32(2, 3), "reps": i32(3, 2)}),
    ("fill", {"shape": i32(2, 3), "value": np.float32(7)}), ("fill", {"shape": i32(4), "value": np.int32(7)}),
    ("fill_like", {"ref_tensor": X, "value": np.int32(7)}), ("fill_like", {"ref_tensor": X, "value": np.float32(-0.5)}),
    ("shape", {"x": X}),
    *(("pad", {"x": X, "pad": i32(1, 2, 0, 3)} | extra) for extra in (
        {}, {"constant_val": np.float32(-3)}, {"mode": "reflect"}, {"mode": "replicate"})),
    ("pad", {"x": X, "pad": i32(0, 0, 1, 0, 0, 2, 3, 1), "mode": "constant"}),
    *(("gather", {"x": f32(5, 4, 3), "indices": indices, "axis": axis}) for axis in (0, 1, -1)
      for indices in (i32(2, 0, 1), whole(0, 3, 2, 4), np.int32(1), i32(-1, -2))),
    ("gather", {"x": f32(2, 5, 3), "indices": whole(0, 5, 2, 4), "axis": 1, "batch_dims": 1}),
    ("gather", {"x": f32(2, 3, 5), "indices": whole(0, 5, 2, 4), "axis": 2, "batch_dims": 1}),
    *(("band_part", {"x": f32(4, 5), "lower": lower, "upper": upper}) for lower in (-1, 0, 2) for upper in (-1, 0, 1)),
    ("band_part", {"x": f32(2, 4, 3), "lower": 1, "upper": -1}),
]  # fmt: skip


FUSED = [(f32(2, 3, 5, 4), f32(2, 3, 7, 4), f32(2, 3, 7, 6)), (f32(2, 5, 8), f32(2, 9, 8), f32(2, 9, 8))]
CASES += [
    ("scaled_dot_product_attention", {"target": "iOS18", "query": q, "key": k, "value": v} | extra)
    for q, k, v in FUSED
    for extra in ({}, {"attn_mask": f32(5, k.shape[-2])}, {"attn_mask": np.tri(5, k.shape[-2], 1).astype(bool)})
]


@pytest.mark.parametrize(("kind", "given"), CASES, ids=[kind for kind, _ in CASES])
def test_against_coremltools(kind: str, given: dict[str, Any]) -> None:
    theirs, ours = outputs(kind, **given)
    assert len(ours) == len(theirs)
    for array, var in zip(ours, theirs, strict=True):
        assert var.val is not None
        near(array, np.asarray(var.val), 2e-6)


def test_interleaved() -> None:
    """coremltools' inference passes over the parameter; this is its documentation's example."""
    values = [i32([1, 2], [3, 4], [5, 6]), i32([7, 8], [9, 10], [11, 12])]
    np.testing.assert_array_equal(
        outputs("concat", values=values, axis=0, interleave=True)[1][0],
        [[1, 2], [7, 8], [3, 4], [9, 10], [5, 6], [11, 12]],
    )
    np.testing.assert_array_equal(
        outputs("concat", values=values, axis=-1, interleave=True)[1][0], [[1, 7, 2, 8], [3, 9, 4, 10], [5, 11, 6, 12]]
    )


# -- against torch -----------------------------------------------------------------------------------------------------


def picture(
    pad_type: str, size: tuple[int, ...], taps: Sequence[int], step: Sequence[int], apart: Sequence[int]
) -> list[int]:
    """Pads before and after each axis, as TensorFlow defines "SAME"; ``same_lower`` puts the odd one before."""
    pads: list[int] = []
    for n, k, s, d in zip(size, taps, step, apart, strict=True):
        total = max((math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n, 0)
        pads += [total // 2, total - total // 2][:: 1 if pad_type == "same" else -1]
    return pads


CONVOLUTIONS: list[dict[str, Any]] = [
    {}, {"bias": True}, {"strides": [2, 1]}, {"strides": [2, 2], "pad": [1, 1, 1, 1], "bias": True}, {"dilations": [2, 1]},
    {"pad": [0, 1, 2, 0]}, {"pad": [2, 0, 0, 1], "strides": [3, 2]}, {"dilations": [1, 3], "pad": [1, 1, 3, 3], "strides": [1, 2]},
    {"groups": 2}, {"groups": 4, "bias": True, "pad": [1, 1, 1, 1]}, {"groups": 2, "strides": [2, 2], "dilations": [2, 2]},
    *({"pad_type": kind, "strides": step, "dilations": apart, "taps": taps} for kind in ("same", "same_lower")
      for step in ([1, 1], [2, 3]) for apart in ([1, 1], [2, 1]) for taps in ((3, 3), (2, 4))),
    {"pad_type": "valid", "strides": [2, 2]}, {"taps": (1, 1), "strides": [2, 2]}, {"taps": (5, 1)},
    *({"taps": (3,), "size": (9,), **extra} for extra in (
        {}, {"strides": [2], "pad": [2, 1], "bias": True}, {"dilations": [2]}, {"groups": 2}, {"pad_type": "same", "strides": [2]})),
]  # fmt: skip


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_conv(case: dict[str, Any]) -> None:
    taps, size, groups = case.get("taps", (3, 3)), case.get("size", (9, 8)), case.get("groups", 1)
    given = {name: case[name] for name in ("strides", "dilations", "groups", "pad_type", "pad") if name in case}
    if "pad" in case:
        given["pad_type"] = "custom"
    step, apart = (case.get(name, [1] * len(taps)) for name in ("strides", "dilations"))
    x, weight, bias = f32(2, 4, *size), f32(8, 4 // groups, *taps), f32(8) if "bias" in case else None
    ours = outputs("conv", x=x, weight=weight, bias=bias, **given)[1][0]
    pads = case.get("pad", [0] * 2 * len(taps))
    if given.get("pad_type", "").startswith("same"):
        pads = picture(given["pad_type"], size, taps, step, apart)
    wide = torch.nn.functional.pad(
        torch.tensor(x), [n for i in reversed(range(len(taps))) for n in pads[2 * i : 2 * i + 2]]
    )
    convolve: Any = torch.nn.functional.conv1d if len(taps) == 1 else torch.nn.functional.conv2d
    theirs = convolve(wide, torch.tensor(weight), None if bias is None else torch.tensor(bias), step, 0, apart, groups)
    near(ours, theirs.numpy(), 1e-5)


NORMS = [f32(2, 3, 4, 5), 40 + f32(2, 3, 6)]
RANDOM_INDICES = (whole(0, 2, 6), whole(-3, 3, 6))
F = torch.nn.functional
OTHERS: list[tuple[str, dict[str, Any], Callable[..., Any]]] = [
    ("silu", {"x": 5 * X}, F.silu), ("softmax", {"x": X, "axis": 2}, partial(F.softmax, dim=2)),
    ("gelu", {"x": X, "mode": "EXACT"}, F.gelu), ("gelu", {"x": X, "mode": "TANH_APPROXIMATION"}, partial(F.gelu, approximate="tanh")),
    ("linear", {"x": f32(2, 7, 4), "weight": f32(3, 4), "bias": f32(3)}, F.linear),
    *(("instance_norm", {"x": x, "gamma": f32(3), "beta": f32(3), "epsilon": np.float32(e)},
       lambda x, gamma, beta, e=e: F.instance_norm(x, weight=gamma, bias=beta, eps=e)) for x in NORMS for e in (1e-5, 0.1)),
    *(("batch_norm", {"x": x, "mean": f32(3), "variance": positive(3), "gamma": f32(3), "beta": f32(3), "epsilon": np.float32(e)},
       lambda x, mean, variance, gamma, beta, e=e: F.batch_norm(x, mean, variance, gamma, beta, eps=e)) for x in NORMS for e in (1e-5, 0.1)),
    ("batch_norm", {"x": X, "mean": f32(3), "variance": positive(3)}, F.batch_norm),
    ("layer_norm", {"x": X, "axes": i32(2, 3), "gamma": f32(4, 5), "beta": f32(4, 5), "epsilon": np.float32(1e-3)},
     lambda x, gamma, beta: F.layer_norm(x, (4, 5), gamma, beta, 1e-3)),
    *(("upsample_nearest_neighbor", {"x": X, "scale_factor_height": h, "scale_factor_width": w},
       lambda x, h=h, w=w: F.interpolate(x, scale_factor=(h, w), mode="nearest")) for h, w in ((2, 2), (3, 1), (1, 4))),
    ("upsample_nearest_neighbor", {"x": X, "scale_factor_height": np.float32(2), "scale_factor_width": np.float32(3)},
     lambda x: F.interpolate(x, scale_factor=(2.0, 3.0), mode="nearest")),
    *(("pad", {"x": X, "pad": i32(1, 2, 0, 3), "mode": mode}, lambda x, m=theirs: F.pad(x, (0, 3, 1, 2), mode=m))
      for mode, theirs in (("constant", "constant"), ("reflect", "reflect"), ("replicate", "replicate"))),
    ("gather_nd", {"x": X, "indices": np.stack(RANDOM_INDICES, -1)}, lambda x, indices: x[indices[:, 0], indices[:, 1]]),
    ("gather_nd", {"x": X, "indices": whole(0, 2, 3, 4, 1)}, lambda x, indices: x[indices[..., 0]]),
    ("gather_nd", {"x": X, "indices": whole(0, 3, 2, 6, 2), "batch_dims": 1},
     lambda x, indices: torch.stack([one[at[:, 0], at[:, 1]] for one, at in zip(x, indices, strict=True)])),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "given", "reference"), OTHERS, ids=[kind for kind, *_ in OTHERS])
def test_against_torch(kind: str, given: dict[str, Any], reference: Callable[..., Any]) -> None:
    told = {"gather_nd": ("x", "indices")}.get(kind)
    arrays = {
        n: torch.tensor(v)
        for n, v in given.items()
        if isinstance(v, np.ndarray) and n not in ("axes", "pad") and v.ndim
    }
    if told is None and kind in ("linear", "batch_norm"):
        theirs = reference(*arrays.values())
    else:
        theirs = reference(**arrays) if len(arrays) > 1 else reference(arrays["x"])
    near(outputs(kind, **given)[1][0], theirs.numpy(), 1e-5)


def test_every_operation_is_checked() -> None:
    """What is registered is held against one of the two; the last ones below."""
    checked = {kind for kind, *_ in (*CASES, *OTHERS)} | {
        "conv",
        "constexpr_lut_to_dense",
        "constexpr_affine_dequantize",
    }
    assert set(KERNELS) == checked


def test_float16_is_rounded_once() -> None:
    """Sums in float32, as Core ML's units that do not lose more; coremltools' own float16 sums are cruder."""
    x = f32(2, 3, 400).astype(np.float16)
    ((ours,), exact) = (outputs("reduce_sum", x=x, axes=[2])[1], x.astype(np.float64).sum(2))
    assert ours.dtype == np.float16
    np.testing.assert_array_equal(ours, exact.astype(np.float16))
    assert np.isinf(outputs("add", x=np.float16([40000]), y=np.float16([40000]))[1][0]).all()


def test_what_is_unknown_is_refused() -> None:
    for kind, given in (
        ("cumsum", {"x": X, "axis": 0}),
        ("upsample_nearest_neighbor", {"x": X, "scale_factor_height": np.float32(1.5)}),
    ):
        with pytest.raises(NumericsError, match=kind):
            outputs(kind, **given)


# -- weights in fewer bits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 101])
def test_unpacked(bits: int, count: int) -> None:
    values = RANDOM.integers(0, 2**bits, count).astype(np.uint8)
    packed = utilities.pack_elements_into_bits(values, bits)
    np.testing.assert_array_equal(unpacked(packed, bits, count), values)
    np.testing.assert_array_equal(
        unpacked(packed, bits, count), utilities.restore_elements_from_packed_bits(packed, bits, count)
    )


FORMS = [
    *(("iOS17", bits, 1, shape) for bits in (1, 2, 4, 6, 8) for shape in ((8, 5, 3, 3), (7, 13))),
    *(("iOS18", bits, groups, shape) for bits in (1, 2, 3, 4, 6, 8) for groups, shape in ((2, (8, 5, 3, 3)), (7, (7, 13)))),
]  # fmt: skip


def test_tables_in_packages(tmp_path: Path) -> None:
    """Written by coremltools and read from disk: what coremltools decompresses, what we meant, and what we read."""
    for target in ("iOS17", "iOS18"):
        made = []
        with mil.Function(
            {"x": Builder.placeholder((1,), types.fp16)}, opset_version=getattr(coremltools.target, target)
        ) as function:
            results = []
            for form, bits, groups, shape in FORMS:
                if form == target:
                    weight = palettized(f32(*shape).astype(np.float16), bits, groups)
                    var = weight.constant(f"w_{len(made)}_", target == "iOS18")
                    near(weight.dense(), var.op.materialized_val_inference(), 0)
                    made.append(weight.dense())
                    results.append(Builder.mul(x=var, y=function.inputs["x"]))
            function.set_outputs(results)
        program = mil.Program()
        program.add_function("main", function)
        held = read(untouched(program, tmp_path / f"{target}.mlpackage", target)).functions["main"]
        got = list(evaluate(held, {"x": np.ones(1, np.float16)}).values())
        assert sum(op.kind == "constexpr_lut_to_dense" for op in held.operations) == len(got) == len(made) >= 10
        for ours, expected in zip(got, made, strict=True):
            near(ours, expected, 0)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", [np.int8, np.uint8])
def test_affine(axis: int, kind: Any) -> None:
    data, zero = (
        RANDOM.integers(*((-128, 128) if kind is np.int8 else (0, 256)), shape).astype(kind)
        for shape in ((4, 5, 3), (4, 5)[axis])
    )
    with mil.Function({}, opset_version=coremltools.target.iOS17):
        several = [
            Builder.constexpr_affine_dequantize(quantized_data=data, zero_point=z, scale=s, axis=axis)
            for z, s in ((zero, positive(len(zero))), (kind(3), np.float32(0.1)), (zero, np.float32(0.1)))
        ]
    for var in several:
        given = {name: value.val for name, value in var.op.inputs.items()}
        near(KERNELS["constexpr_affine_dequantize"](given), var.op.materialized_val_inference(), 1e-6)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_tables_are_as_good_as_coremltools(bits: int, tmp_path: Path) -> None:
    """Whose k-means is exact, and slower; its package is read here too."""
    weight = (f32(160, 160, 3, 3) / 16).astype(np.float16)
    with mil.Function(
        {"x": Builder.placeholder((1, 160, 3, 3), types.fp16)}, opset_version=coremltools.target.iOS17
    ) as function:
        function.set_outputs([Builder.conv(x=function.inputs["x"], weight=weight)])
    program = mil.Program()
    program.add_function("main", function)
    optimize, passes = coremltools.optimize.coreml, coremltools.PassPipeline.DEFAULT_PALETTIZATION
    told = optimize.OptimizationConfig(optimize.OpPalettizerConfig(mode="kmeans", nbits=bits))
    passes.set_options("compression::palettize_weights", {"config": told})
    saved(program, tmp_path / "theirs.mlpackage", target="iOS17", passes=passes, source="milinternal")
    held = read(tmp_path / "theirs.mlpackage").functions["main"]
    dense: dict[str, Array] = {}
    evaluate(held, {"x": f32(1, 160, 3, 3)}, lambda op, given, made: dense.setdefault(op.kind, made[0]))
    theirs, ours = (
        float(np.linalg.norm(made.astype(np.float64) - weight))
        for made in (dense["constexpr_lut_to_dense"], palettized(weight, bits).dense())
    )
    assert 0 < ours <= 1.02 * theirs


def test_few_values_stay_as_they_are() -> None:
    weight = RANDOM.choice(np.array([-2.0, -0.0, 0.0, 0.5, 65504, 6e-8], np.float16), (9, 8))
    np.testing.assert_array_equal(palettized(weight, 4).dense(), weight)
