"""The verifier: what a saved Core ML package computes, without Core ML. Not what runs on a Mac; a second opinion.

Each operation is computed in float32 and rounded to the type that the package says, so that float16 overflows and
rounds where it would there. What Core ML does inside of an operation (sums in float16 on some units, other orders of
summation, fused operations) is not known here, and not imitated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdrt.errors import BundleError, NumericsError
from sdrt_engines.mil.kernels import GROWS, KERNELS
from sdrt_engines.mil.package import Function, Name, Operation

Array = NDArray[Any]
Watch = Callable[[Operation, Mapping[str, Any], list[Array]], object]
"""Called after each operation with its parameters and its outputs."""


def evaluate(function: Function, feeds: Mapping[str, Array], watch: Watch = lambda *_: None) -> dict[str, Array]:
    """Outputs of a function by name, each of its declared type.

    BundleError when the function takes other inputs; NumericsError for an operation that is not known, or whose
    parameters make no sense.
    """
    values: dict[str, Any] = {}
    for told in function.inputs:
        if told.name not in feeds or feeds[told.name].shape != told.shape:
            given = ", ".join(f"{name}{list(array.shape)}" for name, array in feeds.items())
            raise BundleError(f"the package takes {told.name}{list(told.shape)}, given {given or 'nothing'}")
        values[told.name] = feeds[told.name].astype(told.dtype, copy=False)
    last = dict(_reads(function))
    for i, op in enumerate(function.operations):
        if op.kind == "const":
            values[op.outputs[0].name] = op.attributes["val"]
            continue
        parameters = {
            **op.attributes,
            **{
                name: [_wide(values[v] if isinstance(v, Name) else v) for v in several]
                if name == "values"
                else _wide(values[several[0]] if isinstance(several[0], Name) else several[0])
                for name, several in op.inputs.items()
            },
        }
        outputs = _computed(op, parameters)
        watch(op, parameters, outputs)
        values.update({told.name: array for told, array in zip(op.outputs, outputs, strict=True)})
        for name in {name for name in _named(op) if last[name] == i}:
            del values[name]
    return {name: np.asarray(values[name], order="C") for name in function.outputs}


def _named(op: Operation) -> list[str]:
    """Tensors that an operation reads."""
    return [name for several in op.inputs.values() for name in several if isinstance(name, Name)]


def _reads(function: Function) -> Iterator[tuple[str, int]]:
    """Each tensor and where it is read, the last time last; outputs are read at the end."""
    for i, op in enumerate(function.operations):
        yield from ((name, i) for name in _named(op))
    yield from ((name, len(function.operations)) for name in function.outputs)


def _wide(value: Any) -> Any:
    return value.astype(np.float32) if isinstance(value, np.ndarray) and value.dtype == np.float16 else value


def _computed(op: Operation, parameters: Mapping[str, Any]) -> list[Array]:
    compute = KERNELS.get(op.kind)
    if compute is None:
        raise NumericsError(f"{op.name}: the verifier does not know the operation {op.kind}")
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        try:
            grown = GROWS.get(op.kind)
            if grown is not None and (count := grown(parameters)) > sum(math.prod(told.shape) for told in op.outputs):
                raise ValueError(f"it makes {count} elements, more than the package says")
            made = compute(parameters)
            several = made if isinstance(made, list) else [made]
            rounded = [np.asarray(a).astype(t.dtype, copy=False) for t, a in zip(op.outputs, several, strict=True)]
        except Exception as error:  # whatever a damaged package makes of numpy
            raise NumericsError(f"{op.name}: the verifier cannot compute this {op.kind}: {error!r}") from error
    for told, array in zip(op.outputs, rounded, strict=True):
        if array.shape != told.shape:
            raise NumericsError(f"{op.name}: {op.kind} gives {array.shape}, the package says {told.shape}")
    return rounded
