"""Reference vectors: random inputs and torch's float32 outputs at each of a part's cases; the graph against them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdrt.bundle import Bundle, Parity, TensorSpec
from sdrt.engine import OpenOptions, open_session
from sdrt.errors import ExportError
from sdrt.verify import measure, passed
from sdrt_export.families import Part


def case_name(sizes: Mapping[str, int]) -> str:
    """``{"B": 1, "H": 64, "W": 64}`` → ``B1-H64-W64``."""
    return "-".join(f"{symbol}{size}" for symbol, size in sizes.items())


def write_reference(part: Part, network: Any, path: Path) -> None:
    """Run torch at every case and write inputs and outputs as ``<case>/in/<name>`` and ``<case>/out/<name>``."""
    import torch

    arrays: dict[str, NDArray[Any]] = {}
    with torch.inference_mode():
        for sizes in part.cases:
            case = case_name(sizes)
            generator = np.random.default_rng(zlib.crc32(f"{part.name} {case}".encode()))
            inputs = {spec.name: _example(spec, sizes, part, generator) for spec in part.inputs}
            outputs = network.eval()(*(torch.from_numpy(array) for array in inputs.values()))
            tensors = outputs if isinstance(outputs, tuple) else (outputs,)
            arrays.update({f"{case}/in/{name}": array for name, array in inputs.items()})
            for spec, tensor in zip(part.outputs, tensors, strict=True):
                if tuple(tensor.shape) != spec.at(sizes):
                    raise ExportError(
                        f"{part.name}: torch's {spec.name} is {list(tensor.shape)}, expected {spec} at {case}"
                    )
                if not torch.isfinite(tensor).all():
                    raise ExportError(f"{part.name}: torch itself gives NaN or infinity in {spec.name} at {case}")
                arrays[f"{case}/out/{spec.name}"] = tensor.numpy()
    np.savez(path, **arrays)  # type: ignore[arg-type]


def _example(spec: TensorSpec, sizes: Mapping[str, int], part: Part, generator: np.random.Generator) -> NDArray[Any]:
    shape = spec.at(sizes)
    if spec.dtype == "i64":  # a prompt as the tokenizer makes it: the two last ids are start and end
        ids = generator.integers(0, part.vocabulary - 2, shape, dtype=np.int64)
        ids[:, 0] = part.vocabulary - 2
        ids[:, shape[1] * 2 // 3 :] = part.vocabulary - 1
        return ids
    if spec.name == "timestep":
        return generator.uniform(0, 999, shape).astype(np.float32)
    if spec.name == "time_ids":  # pixels
        return generator.integers(0, 1024, shape).astype(np.float32)
    return generator.standard_normal(shape).astype(np.float32)


def check(bundle: Bundle, name: str) -> list[Parity]:
    """Hold one component's graph, run by ONNX Runtime, against its reference vectors. ExportError when it differs.

    Weights stay mapped from the file, so that this takes little memory too.
    """
    options = OpenOptions(extra={"prepack": "false", "arena": "false", "optimization": "extended"})
    session = open_session(bundle, name, engine="onnxruntime", options=options)
    try:
        figures = list(measure(bundle, name, session))
    finally:
        session.close()
    for parity in figures:
        if not passed(parity, "fp32"):
            raise ExportError(
                f"{name}: the graph does not compute what torch computes: {parity.output} at {parity.case} is"
                f" {parity.max_abs:.3g} off ({parity.psnr} dB)",
                "this is a bug of the exporter; please report it with the checkpoint's name",
            )
    return figures
