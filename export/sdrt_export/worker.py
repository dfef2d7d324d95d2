"""One step of an export in a process of its own, so that its memory goes back to the system when it ends.

    python -m sdrt_export.worker trace '{…}'      torch: graph, weights, reference vectors of one component
    python -m sdrt_export.worker check '{…}'      ONNX Runtime: the graph against the reference vectors

Progress and the result are JSON lines on standard output; ``sdrt_export.exporter`` reads them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdrt import bundle as bundles
from sdrt.errors import SdrtError
from sdrt_export import families
from sdrt_export.checkpoint import Checkpoint


def trace(job: dict[str, Any]) -> dict[str, Any]:
    """Write model.onnx, model.onnx.data, reference.npz and, where the family has some, constants.npz."""
    _tell(stage="import")
    import numpy as np

    from sdrt_export import trace, verify, weights

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is not there
    checkpoint = Checkpoint(Path(job["root"]), job["name"])
    family = families.load(job["family"])
    part = next(part for part in family.parts(checkpoint) if part.name == job["part"])
    config = checkpoint.config(part.folder)
    out = Path(job["out"]) / part.name
    with tempfile.TemporaryDirectory(dir=job["out"], prefix=".weights-") as scratch:
        _tell(stage="weights")
        state = weights.float32_state(checkpoint.weights(part.folder), Path(scratch))
        if job["weights"] == "fp16":
            weights.check_half(part.folder, state)
        real, hollow, fake = _networks(family, part, config)
        weights.load_into(real.model, state)
        state = dict(real.model.state_dict())
        trace.export_graph(part, hollow, state, fake, out / "model.onnx", lambda stage: _tell(stage=stage))
        del hollow
        if job["weights"] == "fp16":
            _store_half(out, Path(scratch))
        _tell(stage="reference")
        verify.write_reference(part, real, out / "reference.npz")
        if constants := family.constants(part.name, config, state):
            np.savez(out / "constants.npz", **constants)
    return {}


def _store_half(folder: Path, scratch: Path) -> None:
    """Store the graph's weights in float16. What folding constants made, and float16 cannot hold, stays float32."""
    from sdrt_engines.graph import load_graph
    from sdrt_engines.graph.external import Weights
    from sdrt_engines.graph.storage import narrow

    model = load_graph(folder / "model.onnx")
    held = Weights(model, folder)
    narrow(model, held)
    for name in held.save(model, scratch):
        os.replace(scratch / name, folder / name)


def _networks(family: families.Family, part: families.Part, config: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The network to load weights into, the one to trace, and the mode to trace it under.

    The first takes no memory for its parameters: mapped weights take their place. The second is hollow, shapes without
    values. Buffers that no checkpoint holds (CLIP's position_ids) need their values, in both: a network that has some
    is built once, for both uses, with its buffers.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.device("meta"):
        real = family.network(part.name, config)
    kept = set(real.state_dict())
    if not all(name in kept for name, _ in real.named_buffers()):
        with _parameters_without_memory():
            real = family.network(part.name, config)
        return real, real, contextlib.nullcontext()
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        return real, family.network(part.name, config), fake


@contextlib.contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Each parameter of a module that is made meanwhile loses its values at once; buffers keep theirs."""
    import torch

    register = torch.nn.Module.register_parameter

    def hollow(module: Any, name: str, parameter: Any) -> None:
        register(module, name, None if parameter is None else torch.nn.Parameter(parameter.to("meta")))

    torch.nn.Module.register_parameter = hollow
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register


def check(job: dict[str, Any]) -> dict[str, Any]:
    """Parity of one component of a directory that holds a (partial) bundle."""
    _tell(stage="check")
    from sdrt_export import verify

    bundle = bundles.Bundle(Path(job["out"]), bundles.parse(job["manifest"], "manifest"))
    figures = verify.check(bundle, job["part"])
    return {"parity": [dataclasses.asdict(figure) for figure in figures]}


def _die_with_parent() -> None:
    """The parent holds the other end of standard input: when it is gone, so is this process."""
    os.read(0, 1)
    os._exit(1)


def _tell(**message: Any) -> None:
    os.write(_channel, (json.dumps(message) + "\n").encode())


def main() -> int:
    """Run the step that the command line names; exit status 1 for an error that was told."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    step, job = sys.argv[1], json.loads(sys.argv[2])
    try:
        _tell(result={"trace": trace, "check": check}[step](job))
    except SdrtError as error:
        _tell(error={"kind": type(error).__name__, "message": error.message, "fix": error.fix})
        return 1
    return 0


if __name__ == "__main__":
    _channel = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints goes to standard error, not between the JSON lines
    sys.exit(main())
