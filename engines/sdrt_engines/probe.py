"""What an engine can do on a device: the rates of the two operators in which a U-Net's time goes.

A small ONNX bundle is made, one chain of 3 × 3 convolutions and one of matrix products, each at a size of the U-Net's;
it is built where the engine or the precision wants it, and run. Rates are best rates: what the device reaches, not what
a network on it does. No engine itself: it has no ``OPENS``.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sdrt.bundle import (
    Artifact,
    Bundle,
    Component,
    Denoiser,
    LatentSpace,
    Manifest,
    Precision,
    Provenance,
    TensorSpec,
    record,
)
from sdrt.engine import ONNX, BuildOptions, Engine, OpenOptions, Samples, find_engine, open_session
from sdrt.errors import BuildError
from sdrt_engines.graph.work import count

SECONDS = 1.0
"""How long each chain is repeated; the best repetition counts."""


@dataclass(frozen=True)
class Size:
    """The sizes of the two chains. Defaults: SD 1.5's U-Net at 512 × 512 pixels for two pictures, as guidance has them.

    ``image``: (pictures, latents a side) and ``channels`` of the convolutions; ``tokens``: (pictures, tokens), and the
    products go from ``narrow`` features to ``wide`` and back. ``depth``: operators a chain.
    """

    image: tuple[int, int] = (2, 32)
    channels: int = 640
    tokens: tuple[int, int] = (2, 1024)
    narrow: int = 640
    wide: int = 2560
    depth: int = 6


def rates(
    engine: str, device: str | None = None, precision: Precision = "fp32", threads: int | None = None,
    extra: Mapping[str, str] | None = None, *, seconds: float = SECONDS, size: Size | None = None,
) -> dict[str, float]:  # fmt: skip
    """FLOP/s of ``convolution`` and ``matmul`` on one device of an engine, weights and compute in ``precision``.

    ``threads`` and ``extra`` (``-O name=value``) as in ``OpenOptions``. Nothing for the null engine, which computes
    nothing. Raises as the engine's ``build`` and ``open_session`` do: EngineUnavailable, BuildError, DeviceError,
    InputError.
    """
    module = find_engine(engine)
    if "*" in module.OPENS:
        return {}
    options = OpenOptions(threads=threads, extra=extra or {})
    found = {}
    with tempfile.TemporaryDirectory(prefix="sdrt-probe-") as folder:
        for kind, chain in (("convolution", _convolutions), ("matmul", _products)):
            bundle, flop = _bundle(Path(folder) / kind, *chain(size or Size()))
            if precision != "fp32" or ONNX not in module.OPENS:
                if precision not in module.PRECISIONS:
                    kinds = ", ".join(module.PRECISIONS)
                    raise BuildError(f"{engine} builds {kinds}; asked for precision {precision}", "choose one of them")
                bundle = _built(module, bundle, Path(folder) / f"{kind}-built", precision)
            found[kind] = flop / _best_time(bundle, engine, device, options, seconds)
    return found


def _best_time(bundle: Bundle, engine: str, device: str | None, options: OpenOptions, seconds: float) -> float:
    """Seconds of the fastest run, after one to warm up. The input is handed over once."""
    session = open_session(bundle, _NAME, engine=engine, device=device, options=options)
    try:
        session.bind(x=_input(session.spec))
        session.run()
        best, end = math.inf, time.perf_counter() + seconds
        while best == math.inf or time.perf_counter() < end:
            started = time.perf_counter()
            session.run()
            best = min(best, time.perf_counter() - started)
    finally:
        session.close()
    return best


# -- the chains -------------------------------------------------------------------------------------------------------

_NAME = "chain"
_THIN = 8
"""Channels or features of input and output: little to hand over, and what int8 leaves float at the ends is little."""

_Chain = tuple[list[Any], dict[str, Any], tuple[int, ...], tuple[int, ...]]
"""Nodes, weights, and the shapes of x and y."""


def _convolutions(size: Size) -> _Chain:
    pictures, side = size.image
    widths = [_THIN, *[size.channels] * (size.depth + 1), _THIN]
    shape = (pictures, _THIN, side, side)
    return *_chain("Conv", widths, lambda a, b: (b, a, 3, 3), kernel_shape=[3, 3], pads=[1] * 4), shape, shape


def _products(size: Size) -> _Chain:
    widths = [_THIN, *[(size.narrow, size.wide)[i % 2] for i in range(size.depth + 1)], _THIN]
    shape = (*size.tokens, _THIN)
    return *_chain("MatMul", widths, lambda a, b: (a, b)), shape, shape


def _chain(
    operator: str, widths: list[int], shape: Callable[[int, int], tuple[int, ...]], **attributes: Any
) -> tuple[list[Any], dict[str, Any]]:
    """Nodes from x to y, and weights that keep the numbers' size, so that no precision overflows."""
    from onnx import helper

    generator = np.random.default_rng(0)
    nodes, weights = [], {}
    for i, (a, b) in enumerate(pairwise(widths)):
        made = generator.standard_normal(shape(a, b), np.float32)
        weights[f"w{i}"] = made / np.float32(math.sqrt(made.size / b))
        names = ["x" if i == 0 else f"t{i}", f"w{i}"], ["y" if i == len(widths) - 2 else f"t{i + 1}"]
        nodes.append(helper.make_node(operator, *names, **attributes))
    return nodes, weights


def _bundle(
    root: Path, nodes: list[Any], weights: Mapping[str, Any], shape: tuple[int, ...], result: tuple[int, ...]
) -> tuple[Bundle, int]:
    """An ONNX bundle of one component, and the FLOP of one run of it."""
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        nodes,
        _NAME,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, result)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    (root / _NAME).mkdir(parents=True)
    (root / _NAME / "model.onnx").write_bytes(model.SerializeToString())
    work = count(model, {"x": shape})
    component = Component(
        (TensorSpec("x", "f32", shape),),
        (TensorSpec("y", "f32", result),),
        Artifact(ONNX, "fp32", (record(root, f"{_NAME}/model.onnx"),)),
    )
    manifest = Manifest(
        family="probe",
        components={_NAME: component},
        text_encoders=(),
        denoiser=Denoiser(_NAME, "y", {"x": ("latents",)}),
        latents=LatentSpace(_THIN, 8, 1.0, 64, 64),
        scheduler="scheduler_config.json",
        files=(),
        provenance=Provenance("probe", (), {}),
    )
    return Bundle(root, manifest), 2 * (work.convolution + work.linear)


def _input(spec: Component) -> Any:
    shape = tuple(int(size) for size in spec.inputs[0].shape)
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def _built(module: Engine, origin: Bundle, out: Path, precision: Precision) -> Bundle:
    """The bundle built for an engine; calibrated, where the precision asks for it, on the input that will be run."""
    component = origin.component(_NAME)
    samples = Samples(({"x": _input(component)},), {"source": "probe"})
    options = BuildOptions(precision=precision, samples=lambda: samples, extra=module.PLAIN)
    out.mkdir()
    artifact = module.build(origin, _NAME, out, options)
    components = {_NAME: replace(component, artifact=artifact)}
    return Bundle(out, replace(origin.manifest, components=components))
