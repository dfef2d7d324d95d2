"""The two libraries, by name: what each can build for, and how it speaks."""

from __future__ import annotations

import functools
import importlib
import logging
import re
from dataclasses import dataclass
from typing import Any

from sdrt.bundle import Precision
from sdrt.errors import BuildError, EngineUnavailable

logger = logging.getLogger("sdrt")


@dataclass(frozen=True)
class Library:
    """One of the two.

    targets: GPUs that it builds for by name, anywhere; none: only for the one that is there while building.
    jit: kernels are compiled on the GPU that a plan meets, not when it is built.
    """

    engine: str
    module: str
    title: str
    install: str
    precisions: tuple[Precision, ...]
    targets: tuple[str, ...] = ()
    jit: bool = False

    @property
    def measures(self) -> tuple[Precision, ...]:
        """Precisions that are built from measured activations."""
        return tuple(precision for precision in self.precisions if precision in ("fp16", "fp8", "int8"))

    def load(self) -> Any:
        """The Python module. EngineUnavailable where it is not installed, or older than its API that is used here."""
        return _loaded(self)

    def version(self) -> str:
        return str(self.load().__version__)


TENSORRT = Library(
    engine="tensorrt",
    module="tensorrt",
    title="TensorRT",
    install="pip install 'tensorrt>=11,<12' cuda-bindings",
    precisions=("fp32", "fp16", "bf16", "fp8", "int8"),
)

TENSORRT_RTX = Library(
    engine="tensorrt-rtx",
    module="tensorrt_rtx",
    title="TensorRT-RTX",
    install="pip install 'sdrt[tensorrt]'",
    precisions=("fp32", "fp16", "bf16", "fp8"),
    targets=("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"),
    jit=True,
)


@functools.cache
def _loaded(library: Library) -> Any:
    try:
        module = importlib.import_module(library.module)
    except Exception as error:  # TensorRT's stub raises whatever it meets while it looks for the real one
        raise EngineUnavailable(f"{library.module} cannot be imported: {error}", library.install) from None
    if not hasattr(module, "Builder") or not hasattr(module, "IAttention"):
        version = getattr(module, "__version__", "without a version")
        raise EngineUnavailable(f"{library.module} {version} is not TensorRT's API of 11 or later", library.install)
    return module


_NOISE = re.compile(r"\s*\[?checkMacros\.cpp[^\n]*(\n|$)")
"""What is said of CUDA, after every other error, where there is no driver."""


class Spoken:
    """What a library said while it worked: errors are kept, the rest goes to sdrt's log."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def hear(self, severity: str, text: str) -> None:
        if severity in ("ERROR", "INTERNAL_ERROR"):
            if text := _NOISE.sub("", text).strip():
                self.errors.append(text)
        else:
            logger.debug("tensorrt %s: %s", severity.lower(), text)

    def why(self) -> str:
        """The errors as one text, once: what comes after is of another failure."""
        text = " | ".join(dict.fromkeys(self.errors))
        self.errors.clear()
        return text or "it does not say why"


@functools.cache
def _speaker(module: Any) -> Any:
    """TensorRT's logger class filled in; made when the module is there to inherit from."""

    class Speaker(module.ILogger):
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.spoken = Spoken()

        def log(self, severity: Any, text: str) -> None:
            self.spoken.hear(severity.name, text)

    return Speaker


def speaker(module: Any) -> Any:
    """A logger for one builder or runtime, which must not outlive it. ``.spoken`` holds what was said."""
    return _speaker(module)()


def refused(library: Library, what: str, spoken: Spoken, fix: str = "") -> BuildError:
    """A BuildError of what the library said, and what to do about what it is known to say."""
    text = spoken.why()
    if "fp8" in text:
        fix = "GPUs have float8 from Ada on: --target sm89 or later; or --precision fp16"
    elif "for Turing" in text or "sm75" in text:
        fix = "a GPU from Ampere on (--target sm80 or later), or --precision fp16"
    elif "tactics_tiled_layout" in text:  # float16 attention whose heads are no multiple of 8 wide
        fix = f"leave this component in float32: --precision {what}=fp32 (and the others named beside it)"
    elif "CUDA_SUCCESS" in text or "cudaError 35" in text:
        fix = "build it on a machine with an NVIDIA GPU: only plans with all their weights can be built without"
    elif "workspace limit" in text:
        fix = "a larger -O workspace=MIB; without it there is no limit but the GPU's memory"
    elif "Myelin" in text and not fix:
        fix = "a fault of the library's own; it may not have it at another --shape, --precision or --target"
    return BuildError(f"{what}: {library.title} {library.version()} cannot build it: {text}", fix)
