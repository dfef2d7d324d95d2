"""An NVIDIA GPU of host memory: what ``sdrt_engines.cuda`` gives engines, and what ONNX Runtime's provider does with it.

``Gpu`` takes the place of ``sdrt_engines.cuda``. Work that is put into a stream is done when the stream is synchronised,
so that whoever reads too early reads zeros. ``Runtime`` takes the place of onnxruntime: it computes with the real one on
the CPU, on the memory at the addresses that are bound, records graphs as the provider does, and replays them on the
addresses of the recording, whatever is bound by then.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from sdrt.errors import EngineUnavailable
from sdrt_engines import cuda
from sdrt_engines.graph import load_graph
from sdrt_engines.graph.cuda_kernels import without_kernel

MEMORY = 80 << 30
WEIGHTS, WORKSPACE = 1000, 10
"""What ONNX Runtime takes for a session, and for each recorded or first size, in bytes."""


def memory(address: int, shape: Any, dtype: Any) -> Any:
    """The array at an address."""
    kind = np.dtype(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    return np.frombuffer((ctypes.c_byte * nbytes).from_address(address), kind).reshape(shape)


class Gpu:
    """The functions and classes of ``sdrt_engines.cuda`` that a session uses; ``open`` counts what is not yet closed."""

    def __init__(self, count: int = 1, missing: str = "") -> None:
        self.count, self.missing = count, missing
        self.open: Counter[str] = Counter()
        self.taken: Counter[str] = Counter()
        self.current: list[int] = []
        self.streams: dict[int, Any] = {}
        self.uploads: list[str] = []
        gpu = self

        class Held:
            def __init__(self, kind: str, nbytes: int) -> None:
                self._kind, self._nbytes = kind, nbytes
                self._memory = np.zeros(max(nbytes, 1), np.uint8)
                self.address = self._memory.ctypes.data
                gpu.open[kind] += 1
                gpu.taken[kind] += nbytes

            def close(self) -> None:
                if self.address:
                    self._memory[:] = 0xAB  # whoever reads freed memory is seen to
                    self.address = 0
                    gpu.open[self._kind] -= 1
                    gpu.taken[self._kind] -= self._nbytes

        class Buffer(Held):
            def __init__(self, nbytes: int, what: str = "") -> None:
                super().__init__("buffer", nbytes)
                self.nbytes, self.what = nbytes, what

        class Pinned(Held):
            def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
                super().__init__("pinned", int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize)
                self.array = memory(self.address, shape, dtype)

        class Stream:
            def __init__(self) -> None:
                gpu.open["stream"] += 1
                self.handle = 4096 + 16 * len(gpu.streams)
                gpu.streams[self.handle] = self
                self.waiting: list[Callable[[], object]] = []

            def upload(self, to: Any, array: Any) -> None:
                gpu.uploads.append(to.what)
                assert array.flags.c_contiguous
                source, nbytes = array.ctypes.data, array.nbytes
                self.waiting.append(lambda: ctypes.memmove(to.address, source, nbytes))

            def download(self, array: Any, source: Any) -> None:
                assert array.flags.c_contiguous
                target, nbytes = array.ctypes.data, array.nbytes
                self.waiting.append(lambda: ctypes.memmove(target, source.address, nbytes))

            def synchronize(self) -> None:
                waiting, self.waiting = self.waiting, []
                for work in waiting:
                    work()

            def close(self) -> None:
                if self.handle:
                    assert not self.waiting, "closed with work in it"
                    self.handle = 0
                    gpu.open["stream"] -= 1

        self.Buffer, self.Pinned, self.Stream = Buffer, Pinned, Stream
        self.close_all, self.ALONE = cuda.close_all, cuda.ALONE

    def gpus(self) -> list[cuda.Gpu]:
        if self.missing:
            raise EngineUnavailable(
                f"no NVIDIA GPU can be used here: {self.missing}", "nvidia-smi shows GPUs and driver"
            )
        return [cuda.Gpu(i, f"Fake {i}", "sm90", MEMORY) for i in range(self.count)]

    def use(self, index: int) -> None:
        self.current.append(index)

    def memory(self) -> tuple[int, int]:
        return MEMORY - self.taken["buffer"] - self.taken["onnxruntime"], MEMORY


CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
TAKES = {
    CUDA: {
        "device_id", "user_compute_stream", "enable_cuda_graph", "use_tf32", "prefer_nhwc", "cudnn_conv_algo_search",
        "arena_extend_strategy", "gpu_mem_limit", "sdpa_kernel",
    },
    "DmlExecutionProvider": {"device_id"},
    "OpenVINOExecutionProvider": {"device_type"},
    "QNNExecutionProvider": {"backend_type"},
    "CoreMLExecutionProvider": {"ModelFormat"},
}  # fmt: skip
TELLS = {CUDA, "CoreMLExecutionProvider"}
"""Providers whose sessions tell the options that they took (onnxruntime-openvino 1.24.1 and -qnn 2.7.0 were asked)."""


class Runtime:
    """onnxruntime, as far as the engine uses it. What sessions were made with, and what they did, is kept.

    held: its providers. loads: those that can really be loaded; others are replaced by the CPU, as ONNX Runtime does.
    lacks: operators without kernel; asked: also those that the real provider has none of (``graph.cuda_kernels``).
    WARM: runs of a graph before it is recorded.
    """

    WARM = 1

    def __init__(
        self, gpu: Gpu, held: tuple[str, ...] = (CUDA,), lacks: tuple[str, ...] = (), loads: bool = True,
        asked: bool = False,
    ) -> None:  # fmt: skip
        import onnxruntime

        self.real, self.gpu, self.held, self.lacks, self.loads = onnxruntime, gpu, held, lacks, loads
        self.asked = asked
        self.sessions: list[FakeSession] = []
        self.preloaded = 0
        self.plugins: list[str] = []
        self.__version__ = onnxruntime.__version__
        self.GraphOptimizationLevel, self.OrtValue = onnxruntime.GraphOptimizationLevel, onnxruntime.OrtValue
        self.SessionOptions, self.RunOptions = _recording(onnxruntime.SessionOptions), onnxruntime.RunOptions

    def get_available_providers(self) -> list[str]:
        return [*self.held, CPU]

    def preload_dlls(self) -> None:
        self.preloaded += 1
        print("Failed to load libcublasLt.so.13" if not self.loads else "", end="")

    def get_ep_devices(self) -> list[Any]:
        return [SimpleNamespace(ep_name=name) for name in (*self.plugins, *self.held, CPU)]  # its own providers' too

    def InferenceSession(self, path: str, settings: Any, providers: Any = (), enable_fallback: int = 1) -> Any:
        assert enable_fallback == 0
        assert bool(providers) != bool(settings.plugged), "named, or asked for by devices, not both"
        # By a plugin's name there would be a session on the CPU.
        named = [pair for pair in providers if pair[0] not in self.plugins] or [settings.plugged or (CPU, {})]
        session = FakeSession(self, path, settings, *named[0])
        self.sessions.append(session)
        return session


def _recording(base: Any) -> Any:
    class SessionOptions(base):  # type: ignore[misc]
        """Whose free dimensions can be asked for."""

        def __init__(self) -> None:
            super().__init__()
            self.dims: dict[str, int] = {}
            self.plugged: tuple[str, dict[str, str]] | None = None

        def add_provider_for_devices(self, devices: Any, options: dict[str, str]) -> None:
            assert devices
            self.plugged = (devices[0].ep_name, options)

        def add_free_dimension_override_by_name(self, name: str, size: int) -> None:
            self.dims[name] = size
            super().add_free_dimension_override_by_name(name, size)

    return SessionOptions


class FakeSession:
    def __init__(self, runtime: Runtime, path: str, settings: Any, provider: str, options: dict[str, str]) -> None:
        self.runtime, self.provider, self.options, self.settings = runtime, provider, options, settings
        self.real = runtime.real.InferenceSession(path, None, providers=[CPU])
        self._lacks = [*without_kernel(load_graph(Path(path)))] if runtime.asked and provider == CUDA else []
        self.graphs: dict[int, Any] = {}
        self.runs: Counter[str] = Counter()
        self.released: list[int] = []
        if provider == CPU:
            return
        if provider == CUDA:
            runtime.gpu.taken["onnxruntime"] += WEIGHTS
        if unknown := set(options) - TAKES[provider]:
            if provider == CUDA:
                raise RuntimeError(f'x.cc:63 FAIL : x.h:182 Parse Unknown provider option: "{unknown.pop()}".')
            self.options = {key: value for key, value in options.items() if key in TAKES[provider]}
        strict = self._entry("session.disable_cpu_ep_fallback") == "1"
        if self._on_cpu() and (strict or (self.options.get("enable_cuda_graph") == "1" and runtime.loads)):
            raise RuntimeError(
                "graph nodes that are assigned to the default CPU EP, but fallback has been disabled" if strict
                else "as all compute graph nodes have not been partitioned to the CUDAExecutionProvider"
            )  # fmt: skip

    def _entry(self, name: str) -> str:
        try:
            return str(self.settings.get_session_config_entry(name))
        except RuntimeError:
            return ""

    def _on_cpu(self) -> list[str]:
        return [*self.runtime.lacks, *self._lacks]

    def get_providers(self) -> list[str]:
        return [self.provider, CPU] if self.runtime.loads else [CPU]

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        return {self.provider: self.options if self.provider in TELLS else {}, CPU: {}}

    def get_provider_graph_assignment_info(self) -> Any:
        assert self._entry("session.record_ep_graph_assignment_info") == "1"
        on_sizes = [SimpleNamespace(domain="", op_type="Squeeze", name="sizes")]
        left = [SimpleNamespace(domain="", op_type=op, name=op) for op in self._on_cpu()]
        return [SimpleNamespace(ep_name=CPU, get_nodes=lambda: on_sizes + left)]

    def io_binding(self) -> Any:
        return self.real.io_binding() if self.provider != CUDA else Binding()

    def run_with_iobinding(self, binding: Any, options: Any = None) -> None:
        if self.provider != CUDA:
            self.real.run_with_iobinding(binding)
            return
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        number = int(options.get_run_config_entry("gpu_graph_id"))
        stream = self.runtime.gpu.streams[int(self.options["user_compute_stream"])]
        if self.options["enable_cuda_graph"] != "1" or number == -1:
            self.runs["plain"] += 1
            bound = binding.copy()
        elif number in self.graphs:
            self.runs["replay"] += 1
            bound = self.graphs[number]
        else:
            self.runs["warm"] += self.runtime.WARM
            self.runs["record"] += 1
            bound = self.graphs[number] = binding.copy()
            self.runtime.gpu.taken["onnxruntime"] += WORKSPACE
        stream.waiting.append(lambda: self._compute(bound))

    def _compute(self, bound: Any) -> None:
        feeds = {name: memory(address, shape, kind) for name, (shape, kind, address) in bound.inputs.items()}
        names = list(bound.outputs)
        for name, value in zip(names, self.real.run(names, feeds), strict=True):
            shape, kind, address = bound.outputs[name]
            assert value.shape == tuple(shape)
            assert value.dtype == kind
            memory(address, shape, kind)[...] = value

    def release_captured_graph(self, number: int) -> None:
        self.released.append(number)
        del self.graphs[number]


class Binding:
    def __init__(self) -> None:
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}

    def bind_input(self, name: str, device: str, index: int, kind: Any, shape: list[int], address: int) -> None:
        assert device == "cuda"
        self.inputs[name] = (shape, kind, address)

    def bind_output(self, name: str, device: str, index: int, kind: Any, shape: list[int], address: int) -> None:
        assert device == "cuda"
        self.outputs[name] = (shape, kind, address)

    def copy(self) -> Binding:
        made = Binding()
        made.inputs, made.outputs = dict(self.inputs), dict(self.outputs)
        return made
