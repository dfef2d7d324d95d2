"""A GPU that is not there, for tests: CUDA's runtime and TensorRT's at their lowest boundary, over the host's memory.

What is put into a stream is done when the stream is waited for, no sooner, so that whoever reads too early, or frees or
overwrites too soon, gets the wrong numbers or an error. Memory is known by address: what is freed cannot be used.
Plans are built by the real TensorRT-RTX; what runs one computes its graph with ONNX Runtime on the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import enum
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sdrt_engines import cuda
from sdrt_engines.trt import library, plan

Work = Callable[[], None]


class Status(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorStreamCaptureUnsupported = 900


@dataclass
class Stream:
    waiting: list[Work] = field(default_factory=list)
    recording: list[Work] | None = None

    def put(self, work: Work) -> None:
        (self.waiting if self.recording is None else self.recording).append(work)


class Cuda:
    """``cuda.bindings.runtime`` with one or more GPUs. ``calls`` counts each function's calls."""

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self, gpus: list[tuple[str, int, int]], total: int = 8 * 2**30) -> None:
        self.gpus, self.total = gpus, total
        self.live: dict[int, tuple[Any, int]] = {}
        self.pinned: dict[int, Any] = {}
        self.streams: dict[int, Stream] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.executables: dict[int, list[Work]] = {}
        self.calls: dict[str, int] = {}
        self._next = 1

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name.startswith("cuda") and callable(value):
            self.calls[name] = self.calls.get(name, 0) + 1
        return value

    def _handle(self) -> int:
        self._next += 1
        return self._next

    def used(self) -> int:
        return sum(size for _, size in self.live.values())

    def nothing_left(self) -> bool:
        return not (self.live or self.pinned or self.streams or self.graphs or self.executables)

    def at(self, address: int, nbytes: int) -> Any:
        """Memory on the GPU from an address on; it must be of one allocation that is not freed."""
        for start, (_, size) in self.live.items():
            if start <= address and address + nbytes <= start + size:
                return (ctypes.c_byte * nbytes).from_address(address)
        raise AssertionError(f"{nbytes} bytes at {address:#x} are no memory of the GPU's")

    # what the engines call

    def cudaGetErrorString(self, status: Status) -> tuple[Status, bytes]:
        return Status.cudaSuccess, status.name.encode()

    def cudaGetDeviceCount(self) -> tuple[Status, int]:
        return (Status.cudaSuccess, len(self.gpus)) if self.gpus else (Status.cudaErrorInsufficientDriver, 0)

    def cudaDriverGetVersion(self) -> tuple[Status, int]:
        return Status.cudaSuccess, 13020 if self.gpus else 0

    def cudaGetDeviceProperties(self, index: int) -> tuple[Status, Any]:
        name, major, minor = self.gpus[index]
        return Status.cudaSuccess, SimpleNamespace(
            name=name.encode() + b"\0\0", major=major, minor=minor, totalGlobalMem=self.total
        )

    def cudaMemGetInfo(self) -> tuple[Status, int, int]:
        return Status.cudaSuccess, self.total - self.used(), self.total

    def cudaSetDevice(self, index: int) -> tuple[Status]:
        assert index < len(self.gpus)
        return (Status.cudaSuccess,)

    def cudaMalloc(self, nbytes: int) -> tuple[Status, int]:
        if self.used() + nbytes > self.total:
            return Status.cudaErrorMemoryAllocation, 0
        memory = (ctypes.c_byte * nbytes)(*([0x5A] * min(nbytes, 64)))  # not zeros: nobody may count on them
        address = ctypes.addressof(memory)
        self.live[address] = (memory, nbytes)
        return Status.cudaSuccess, address

    def cudaFree(self, address: int) -> tuple[Status]:
        assert not any(stream.waiting for stream in self.streams.values()), "freed while the GPU has work to do"
        del self.live[address]
        return (Status.cudaSuccess,)

    def cudaMallocHost(self, nbytes: int) -> tuple[Status, int]:
        memory = (ctypes.c_byte * nbytes)()
        self.pinned[ctypes.addressof(memory)] = memory
        return Status.cudaSuccess, ctypes.addressof(memory)

    def cudaFreeHost(self, address: int) -> tuple[Status]:
        del self.pinned[address]
        return (Status.cudaSuccess,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Status, int]:
        handle = self._handle()
        self.streams[handle] = Stream()
        return Status.cudaSuccess, handle

    def cudaStreamDestroy(self, handle: int) -> tuple[Status]:
        assert not self.streams.pop(handle).waiting
        return (Status.cudaSuccess,)

    def cudaMemcpyAsync(self, to: int, source: int, nbytes: int, kind: int, stream: int) -> tuple[Status]:
        def copy() -> None:
            self.at(to if kind == 1 else source, nbytes)
            ctypes.memmove(to, source, nbytes)

        self.streams[stream].put(copy)
        return (Status.cudaSuccess,)

    def cudaStreamSynchronize(self, handle: int) -> tuple[Status]:
        stream = self.streams[handle]
        if stream.recording is not None:
            return (Status.cudaErrorStreamCaptureUnsupported,)
        while stream.waiting:
            stream.waiting.pop(0)()
        return (Status.cudaSuccess,)

    def cudaStreamBeginCapture(self, handle: int, mode: int) -> tuple[Status]:
        self.streams[handle].recording = []
        return (Status.cudaSuccess,)

    def cudaStreamEndCapture(self, handle: int) -> tuple[Status, int]:
        graph, recorded = self._handle(), self.streams[handle].recording
        assert recorded is not None
        self.graphs[graph], self.streams[handle].recording = recorded, None
        return Status.cudaSuccess, graph

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Status, int]:
        executable = self._handle()
        self.executables[executable] = self.graphs[graph]
        return Status.cudaSuccess, executable

    def cudaGraphDestroy(self, graph: int) -> tuple[Status]:
        del self.graphs[graph]
        return (Status.cudaSuccess,)

    def cudaGraphExecDestroy(self, executable: int) -> tuple[Status]:
        del self.executables[executable]
        return (Status.cudaSuccess,)

    def cudaGraphLaunch(self, executable: int, stream: int) -> tuple[Status]:
        for work in self.executables[executable]:
            self.streams[stream].put(work)
        return (Status.cudaSuccess,)


class Plans:
    """The graph behind each plan that was built, by the plan's bytes; and how often something was built."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.built = 0

    def keep(self, graph: Path, content: bytes | memoryview, profiles: Any) -> None:
        self.built += 1
        shutil.copytree(graph.parent, self._at(content), dirs_exist_ok=True)
        (self._at(content) / "profiles.json").write_text(json.dumps([dict(profile) for profile in profiles]))

    def graph(self, content: Any) -> Path | None:
        path = self._at(content) / graph_name
        return path if path.exists() else None

    def _at(self, content: Any) -> Path:
        return self.folder / hashlib.sha256(content).hexdigest()


graph_name = "model.onnx"


class Context:
    """What one IExecutionContext is asked for; ``execute_async_v3`` computes when the stream is waited for."""

    def __init__(self, engine: Engine, config: Any) -> None:
        self.engine, self.config = engine, config
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory: tuple[int, int] | None = None

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return 0 <= index < self.engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None
        limits = self.engine.profiles[self.profile].get(name) if self.engine.profiles else None
        self.shapes[name] = tuple(shape)
        return limits is None or all(a <= n <= b for a, n, b in zip(limits[0], shape, limits[2], strict=True))

    def infer_shapes(self) -> list[str]:
        return [name for name in self.engine.inputs if name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name] if name in self.shapes else self.engine.output_shapes(self.shapes)[name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        return 1000 + sum(int(np.prod(shape)) for shape in self.shapes.values())

    def set_device_memory(self, address: int, nbytes: int) -> None:
        assert nbytes >= self.update_device_memory_size_for_shapes()
        self.memory = (address, nbytes)

    def is_stream_capturable(self, stream: int) -> bool:
        return self.engine.gpu.capturable

    def execute_async_v3(self, stream: int) -> bool:
        assert self.memory is not None
        assert self.addresses.keys() == {*self.engine.inputs, *self.engine.outputs}
        gpu, memory, addresses, shapes = self.engine.gpu, self.memory, dict(self.addresses), dict(self.shapes)
        outputs = self.engine.output_shapes(shapes)
        self.engine.gpu.enqueued += 1

        def compute() -> None:
            scratch = gpu.cuda.at(*memory)
            ctypes.memset(scratch, 0xA5, memory[1])  # others' activations lie there, too
            dtypes = self.engine.dtypes
            held = {
                name: np.frombuffer(gpu.cuda.at(addresses[name], _nbytes(shapes[name], dtypes[name])), dtypes[name])
                .reshape(shapes[name]).copy() for name in self.engine.inputs
            }  # fmt: skip
            made = self.engine.compute(held)
            for name, array in made.items():
                assert array.shape == outputs[name]
                ctypes.memmove(
                    gpu.cuda.at(addresses[name], array.nbytes), np.ascontiguousarray(array).ctypes.data, array.nbytes
                )

        gpu.cuda.streams[stream].put(compute)
        return True


def _nbytes(shape: tuple[int, ...], dtype: Any) -> int:
    return max(int(np.prod(shape)) * np.dtype(dtype).itemsize, 1)


class Engine:
    """An ICudaEngine that computes a graph."""

    def __init__(self, gpu: Gpu, path: Path) -> None:
        import onnx
        import onnxruntime

        self.gpu, self.path = gpu, path
        graph = onnx.load(str(path), load_external_data=False).graph
        self.inputs = {value.name: self._spec(value) for value in graph.input}
        self.outputs = {value.name: self._spec(value) for value in graph.output}
        self.dtypes = {name: dtype for name, (dtype, _) in (self.inputs | self.outputs).items()}
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 4
        self._session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        self.profiles = json.loads((path.parent / "profiles.json").read_text())
        self.num_io_tensors = len(self.inputs) + len(self.outputs)
        self.num_optimization_profiles = max(len(self.profiles), 1)
        self.weight_streaming_scratch_memory_size = 100
        self.streamable_weights_size = self.weight_streaming_budget_v2 = 1 << 20
        self.weights = gpu.cuda.cudaMalloc(1 << 20)[1]

    def __del__(self) -> None:
        if self.weights in self.gpu.cuda.live:
            self.gpu.cuda.cudaFree(self.weights)

    @staticmethod
    def _spec(value: Any) -> tuple[Any, tuple[Any, ...]]:
        from onnx import helper

        tensor = value.type.tensor_type
        dims = tuple(d.dim_value or d.dim_param for d in tensor.shape.dim)
        return np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)), dims

    def get_tensor_name(self, i: int) -> str:
        return [*self.inputs, *self.outputs][i]

    def get_tensor_mode(self, name: str) -> Any:
        mode = self.gpu.real.TensorIOMode
        return mode.INPUT if name in self.inputs else mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        names = {"float32": "FLOAT", "float16": "HALF", "int64": "INT64"}
        return getattr(self.gpu.real.DataType, names[self.dtypes[name].name])

    def create_runtime_config(self) -> Any:
        return RuntimeConfig(self.gpu)

    def create_execution_context(self, config: Any) -> Context:
        self.gpu.contexts += 1
        if config.cache is not None:
            config.cache.content += b"k"  # a kernel was compiled
        return Context(self, config)

    def compute(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(self.outputs, self._session.run(list(self.outputs), inputs), strict=True))

    def output_shapes(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """By the names of the free dimensions, of which H and W are given as the finest that there is."""
        known: dict[str, int] = {}
        for name, (_, dims) in self.inputs.items():
            known |= {dim: size for dim, size in zip(dims, shapes[name], strict=True) if isinstance(dim, str)}
        for side in "HW":
            if f"{side}/8" in known:
                known.setdefault(side, 8 * known[f"{side}/8"])
            elif side in known:
                known[f"{side}/8"] = -(-known[side] // 8)
        return {name: tuple(known.get(d, d) for d in dims) for name, (_, dims) in self.outputs.items()}


class RuntimeCache:
    def __init__(self) -> None:
        self.content = b""

    def deserialize(self, content: bytes) -> bool:
        self.content = bytes(content)
        return True

    def serialize(self) -> bytes:
        return self.content


class RuntimeConfig:
    """An IRuntimeConfig of TensorRT-RTX."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.cache: RuntimeCache | None = None
        self.strategy: Any = None
        self.dynamic_shapes_kernel_specialization_strategy: Any = None
        self.cuda_graph_strategy: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class Runtime:
    """An IRuntime: knows the plans that were built while the stand-in was there."""

    gpu: Gpu

    def __init__(self, logger: Any) -> None:
        assert self.gpu.cuda.gpus, "TensorRT's runtime ends the process where there is no driver"
        self.logger = logger
        self.gpu.runtimes.append(self)
        self.engine_host_code_allowed = False

    def get_engine_validity(self, content: Any) -> tuple[Any, int]:
        return self.gpu.validity

    def deserialize_cuda_engine(self, content: Any) -> Engine | None:
        self.gpu.loaded += 1
        if (graph := self.gpu.plans.graph(content)) is None:
            self.logger.log(self.gpu.real.ILogger.Severity.ERROR, "Serialization assertion failed")
            return None
        return Engine(self.gpu, graph)


class Refitter:
    """Fills an engine without weights; there is nothing to do for a stand-in but to be told the right graph."""

    def __init__(self, engine: Engine, logger: Any) -> None:
        self.engine = engine
        self.missing = ["all of them"]

    def get_missing_weights(self) -> list[str]:
        return self.missing

    def refit_cuda_engine(self) -> bool:
        self.engine.gpu.refitted += 1
        return not self.missing


class ParserRefitter:
    """Takes the graph that a plan was built from, and no other."""

    def __init__(self, refitter: Refitter, logger: Any) -> None:
        self.refitter = refitter

    def refit_from_file(self, path: str) -> bool:
        if Path(path).read_bytes() == self.refitter.engine.path.read_bytes():
            self.refitter.missing = []
        return True


class Mixed:
    """A module with some of its names replaced."""

    def __init__(self, real: Any, **own: Any) -> None:
        self._real = real
        self.__dict__ |= own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class Gpu:
    """One machine with GPUs. ``cuda`` and ``plans`` tell what was done there."""

    def __init__(self, real: Any, folder: Path, gpus: list[tuple[str, int, int]]) -> None:
        self.real = real
        self.cuda = Cuda(gpus)
        self.plans = Plans(folder)
        self.validity: tuple[Any, int] = (real.EngineValidity.VALID, 0)
        self.capturable = True
        self.enqueued = self.contexts = self.loaded = self.refitted = 0
        self.runtimes: list[Runtime] = []

    def trt(self) -> Any:
        """The real library but for what runs plans."""
        own = type("OwnRuntime", (Runtime,), {"gpu": self})
        return Mixed(self.real, Runtime=own, Refitter=Refitter, OnnxParserRefitter=ParserRefitter)


RTX_4090 = ("NVIDIA GeForce RTX 4090", 8, 9)


@contextlib.contextmanager
def stand_in(folder: Path, *gpus: tuple[str, int, int]) -> Iterator[Gpu]:
    """A machine with these GPUs (default: one RTX 4090) for the time being."""
    real = pytest.importorskip("tensorrt_rtx")
    machine = Gpu(real, folder, list(gpus or (RTX_4090,)))
    trt, build = machine.trt(), plan.build

    def building(of: library.Library, graph: Path, recipe: plan.Recipe, profiles: Any, *rest: Any, **named: Any) -> Any:
        # CURRENT asks a driver; what is here is named instead.
        target = cuda.gpus()[0].target if recipe.target == "current" and machine.cuda.gpus else recipe.target
        made, timings = build(of, graph, dataclasses.replace(recipe, target=target), profiles, *rest, **named)
        machine.plans.keep(graph, made, profiles)
        return made, timings

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_runtime", lambda: machine.cuda)
        patch.setattr(library, "_loaded", lambda of: trt)
        patch.setattr(plan, "build", building)
        yield machine
