"""Which of ONNX Runtime's execution providers a device is, and whether the one that was asked for is really used.

No engine: what ``onnxruntime.py`` stands on. ONNX Runtime takes another provider without a word where one cannot be
loaded, and the CPU for every node that a provider has no kernel for; here either is a DeviceError.

https://onnxruntime.ai/docs/execution-providers
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from sdrt.engine import Device
from sdrt.errors import DeviceError, EngineUnavailable, InputError
from sdrt_engines import cuda

logger = logging.getLogger("sdrt")

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"


@dataclass(frozen=True)
class Provider:
    """What a device's first word stands for.

    package: the wheel that brings it; systems: where there is one. choice: the provider's option that the word after
    the colon is the value of, ``default`` the value where there is none (None: it must be given), ``choices`` what it
    may be. plugin: the module of a wheel that is installed beside onnxruntime, and whose library is registered with it;
    other wheels take onnxruntime's place. options: set unless ``-O provider=`` says otherwise. told: whether a session
    tells the options that the provider took. capitals: whether the value of its choice is written so: OpenVINO's takes
    every node for "CPU", and none for "cpu".
    """

    name: str
    package: str
    systems: str
    choice: str = ""
    default: str | None = ""
    choices: tuple[str, ...] = ()
    plugin: str = ""
    told: bool = True
    capitals: bool = False
    options: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


PROVIDERS: Mapping[str, Provider] = {
    "cuda": Provider(CUDA, "onnxruntime-gpu", "Linux and Windows, x86-64", "device_id", "0"),
    "dml": Provider("DmlExecutionProvider", "onnxruntime-directml", "Windows", "device_id", "0", told=False),
    "coreml": Provider(
        "CoreMLExecutionProvider", "onnxruntime", "macOS", options=MappingProxyType({"ModelFormat": "MLProgram"})
    ),
    "openvino": Provider(
        "OpenVINOExecutionProvider", "onnxruntime-openvino", "Linux and Windows, x86-64", "device_type", None,
        ("cpu", "gpu", "npu"), told=False, capitals=True,
    ),
    "migraphx": Provider("MIGraphXExecutionProvider", "onnxruntime-migraphx", "Linux, AMD GPUs", "device_id", "0"),
    "qnn": Provider(
        "QNNExecutionProvider", "onnxruntime-qnn", "Windows and Linux on Snapdragon", "backend_type", "htp",
        ("htp", "gpu", "cpu"), "onnxruntime_qnn", told=False,
    ),
}  # fmt: skip
"""By the first word of a device's name. ROCm's own provider is no more in ONNX Runtime 1.31: ``migraphx`` is AMD's."""


class Pairs(tuple[tuple[str, str], ...]):
    """``key=value,key2=value2``, from text."""

    __slots__ = ()

    def __new__(cls, text: str = "") -> Pairs:
        pairs = [tuple(part.split("=", 1)) for part in text.split(",")] if text else []
        if any(len(pair) != 2 or not all(pair) for pair in pairs) or len(dict(pairs)) != len(pairs):  # type: ignore[arg-type]
            raise InputError(
                f"onnxruntime option provider: expected key=value pairs, each key once, got {text!r}",
                "such as -O provider=gpu_mem_limit=8000000000,sdpa_kernel=1",
            )
        return super().__new__(cls, pairs)  # type: ignore[arg-type]


NO_PAIRS = Pairs()


@dataclass(frozen=True)
class Chosen:
    """A provider with the options that a device's name means."""

    device: str
    provider: Provider
    options: Mapping[str, str]

    @property
    def index(self) -> int:
        """The number of the GPU."""
        return int(self.options.get("device_id", "0"))


def choose(library: Any, device: str) -> Chosen | None:
    """The provider of a device; None for a device that is none of these. DeviceError where it is not here."""
    word, colon, which = device.partition(":")
    provider = PROVIDERS.get(word)
    if provider is None:
        return None
    value = which if colon else provider.default
    numbered = provider.choice == "device_id"
    known = value is not None and (value.isdecimal() if numbered else value in (provider.choices or ("",)))
    if not known or (colon and not provider.choice):
        forms = [f"{word}:{choice}" for choice in provider.choices] or ([f"{word}:0"] if numbered else [word])
        raise DeviceError(f"onnxruntime has no device {device!r}; {word} is asked for as {', '.join(forms)}")
    held = _held(library)
    if provider.name not in held:
        raise DeviceError(
            f"{device} needs {provider.name}, which this onnxruntime {library.__version__} does not have; it has"
            f" {', '.join(held)}",
            _advice(provider),
        )
    if provider.name == CUDA:
        _check_gpu(device, int(value or 0))
    said = (value or "").upper() if provider.capitals else value or ""
    return Chosen(device, provider, {provider.choice: said} if provider.choice else {})


def _held(library: Any) -> list[str]:
    """The providers of this onnxruntime, with those whose plugins are installed, which are registered with it."""
    for provider in PROVIDERS.values():
        if provider.plugin and provider.name not in library.get_available_providers():
            with contextlib.suppress(ImportError):
                plugin = importlib.import_module(provider.plugin)
                try:
                    library.register_execution_provider_library(provider.name, plugin.get_library_path())
                except Exception as error:  # onnxruntime's exceptions share no base class
                    logger.warning("onnxruntime's %s is left out, it cannot be loaded: %s", provider.name, error)
    return list(library.get_available_providers())


def _advice(provider: Provider) -> str:
    if provider.package == "onnxruntime" or provider.plugin:
        return f"pip install {provider.package} brings it ({provider.systems})"
    package = "'sdrt[ort-gpu]'" if provider.name == CUDA else provider.package  # with CUDA's libraries
    return (
        f"pip uninstall onnxruntime, then pip install {package}, which takes its place ({provider.systems});"
        " the two cannot be installed together"
    )


def _check_gpu(device: str, index: int) -> None:
    """DeviceError where there is no such GPU, or no driver: ONNX Runtime would load, and run on the CPU."""
    try:
        found = cuda.gpus()
    except EngineUnavailable as error:
        raise DeviceError(f"{device}: {error.message}", error.fix) from None
    if index >= len(found):
        held = ", ".join(f"cuda:{gpu.index} ({gpu.name})" for gpu in found)
        raise DeviceError(f"onnxruntime has no device {device!r} here; it has {held}", "sdrt doctor lists devices")


def devices(library: Any) -> Sequence[Device]:
    """What can be used beside the CPU. Without asking a driver for its devices, ``:0`` stands for all of a provider."""
    held = _held(library)
    version = f"onnxruntime {library.__version__}"
    found: list[Device] = []
    for word, provider in PROVIDERS.items():
        if provider.name not in held:
            continue
        if provider.name == CUDA:
            try:
                found += [
                    Device(f"cuda:{gpu.index}", f"{gpu.name}, {gpu.target}, {version}", gpu.memory)
                    for gpu in cuda.gpus()
                ]
            except EngineUnavailable as error:
                logger.warning("onnxruntime's cuda is left out: %s", error.message)
        elif provider.choices:
            found += [Device(f"{word}:{choice}", f"{provider.name}, {version}") for choice in provider.choices]
        else:
            name = f"{word}:{provider.default}" if provider.default else word
            found.append(Device(name, f"{provider.name}, {version}"))
    return found


@functools.cache
def preload(library: Any) -> str:
    """Load CUDA's libraries from the wheels that hold them; what could not be loaded, and why."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # it prints
        library.preload_dlls()
    return " ".join(said.getvalue().split())


# -- what is really used ----------------------------------------------------------------------------------------------

ON_SIZES = frozenset({
    "Add", "Cast", "Concat", "Div", "Equal", "Expand", "Floor", "Gather", "Max", "Min", "Mod", "Mul", "Range",
    "Reshape", "Shape", "Size", "Slice", "Squeeze", "Sub", "Unsqueeze", "Where",
})  # fmt: skip
"""What ONNX Runtime keeps on the CPU on purpose: arithmetic on the sizes of tensors, which are known there. No GPU's
provider lacks a kernel of one of these."""

NO_FALLBACK = "session.disable_cpu_ep_fallback"
"""Refused are then also the nodes on sizes, of which a graph of free sizes has some."""

RECORD = "session.record_ep_graph_assignment_info"


def check_provider(name: str, session: Any, chosen: Chosen, asked: Mapping[str, str], hint: str = "") -> None:
    """DeviceError unless the session uses the provider; InputError unless it took every option, where it tells them."""
    used = list(session.get_providers())
    if chosen.provider.name not in used:
        raise DeviceError(
            f"{name}: asked for {chosen.provider.name}, onnxruntime loaded {', '.join(used)} in its place"
            f"{hint and f': {hint}'}",
            "onnxruntime's own messages, above, say why; for CUDA: pip install 'sdrt[ort-gpu]' brings its libraries"
            if chosen.provider.name == CUDA
            else "is the driver, or the vendor's library, installed?",
        )
    if not chosen.provider.told:
        return
    taken = {key: str(value) for key, value in session.get_provider_options().get(chosen.provider.name, {}).items()}
    for key, value in asked.items():
        if key not in taken:
            listed = ", ".join(sorted(taken)) or "none that it tells of"
            raise InputError(
                f"onnxruntime's {chosen.provider.name} ignores the option {key!r}; it has {listed}",
                "leave it out of -O provider=",
            )
        if taken[key].lower() != value.lower():
            raise InputError(
                f"onnxruntime's {chosen.provider.name} took {taken[key]!r} for {key}, asked for {value!r}",
                "leave it out of -O provider=",
            )


def left_to_cpu(session: Any) -> dict[str, int]:
    """Operators that run on the CPU, and how many nodes of each; without those on sizes."""
    counts = Counter(
        f"{node.domain}.{node.op_type}" if node.domain else str(node.op_type)
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name == CPU
        for node in part.get_nodes()
    )
    return {op: count for op, count in sorted(counts.items()) if op not in ON_SIZES}


def listed(operators: Mapping[str, int]) -> str:
    """For a message."""
    return ", ".join(f"{count} {op}" for op, count in operators.items())
