"""CUDA without torch: GPUs, memory, streams and graphs, through ``cuda-bindings``. No engine: what NVIDIA's stand on.

Everything that belongs to a GPU is made and freed here, by objects that are closed. A failed call is a DeviceError that
names it. The current GPU is each thread's own: whoever calls from several threads calls ``use`` first.

https://docs.nvidia.com/cuda/cuda-runtime-api
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from sdrt.engine import Array
from sdrt.errors import DeviceError, EngineUnavailable

INSTALL = "pip install cuda-bindings (sdrt[ort-gpu] and sdrt[tensorrt] bring it); the GPU's driver comes from NVIDIA"


@dataclass(frozen=True)
class Gpu:
    """One GPU: its number, its name, its compute capability as a target (``sm90``), its memory in bytes."""

    index: int
    name: str
    target: str
    memory: int


@functools.cache
def _runtime() -> Any:
    """The bindings of the CUDA runtime, which they hold within themselves: the driver alone is looked for."""
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise EngineUnavailable(f"cuda-bindings cannot be imported: {error}", INSTALL) from None


def call(name: str, *arguments: Any, about: str = "") -> Any:
    """One function of the CUDA runtime; its single result, a tuple of several, or None. DeviceError where it fails."""
    status, *results = getattr(_runtime(), name)(*arguments)
    if int(status) != 0:
        raise DeviceError(f"{name}{about and f' {about}'} failed: {_said(status)}", _advice(int(status)))
    return results[0] if len(results) == 1 else tuple(results) or None


_OUT_OF_MEMORY = 2
_BROKEN = {700, 702, 710, 714, 715, 716, 717, 718, 719}
"""Errors after which the process can do nothing more on that GPU: an illegal address, a failed launch …"""


def _said(status: Any) -> str:
    text = _runtime().cudaGetErrorString(status)[1]
    name = getattr(status, "name", str(status))
    return f"{name}, {text.decode(errors='replace') if isinstance(text, bytes) else text}"


def _advice(status: int) -> str:
    if status == _OUT_OF_MEMORY:
        return "a smaller batch or size, --low-memory, or another process's memory freed (nvidia-smi shows whose it is)"
    return "start a new process; this GPU cannot be used in this one any more" if status in _BROKEN else ""


# -- what there is ----------------------------------------------------------------------------------------------------


def gpus() -> list[Gpu]:
    """The GPUs here, at least one. EngineUnavailable, which says what is missing.

    To be asked before any library of NVIDIA's is: TensorRT's runtime ends the process where there is no driver.
    """
    runtime = _runtime()
    status, count = runtime.cudaGetDeviceCount()
    if int(status) != 0 or not count:
        held = driver_version()
        why = _said(status) if int(status) != 0 else "the driver knows of none"
        raise EngineUnavailable(
            f"no NVIDIA GPU can be used here: {why} (its driver is for CUDA {held})"
            if held
            else "there is no NVIDIA driver here",
            "nvidia-smi shows GPUs and driver",
        )
    return [_gpu(runtime, index) for index in range(count)]


def _gpu(runtime: Any, index: int) -> Gpu:
    properties = call("cudaGetDeviceProperties", index)
    name = properties.name
    return Gpu(
        index,
        name.decode(errors="replace").rstrip("\0") if isinstance(name, bytes) else str(name),
        f"sm{properties.major}{properties.minor}",
        int(properties.totalGlobalMem),
    )


def driver_version() -> str:
    """The newest CUDA that the driver can run, such as "13.0"; empty where no driver is loaded."""
    number = call("cudaDriverGetVersion")
    return f"{number // 1000}.{number % 1000 // 10}" if number else ""


def memory() -> tuple[int, int]:
    """Bytes of the current GPU that are free, whoever holds the others, and all of them."""
    free, total = call("cudaMemGetInfo")
    return int(free), int(total)


def use(index: int) -> None:
    """Make a GPU this thread's current one."""
    call("cudaSetDevice", index)


# -- what is made -----------------------------------------------------------------------------------------------------


ALONE = threading.RLock()
"""Held while memory is taken or given back, and while ONNX Runtime records a graph: in CUDA's global mode, in which
memory that any other thread takes ends the recording."""

_left: deque[Callable[[], object]] = deque()
"""What finalizers found nobody else's turn to give back."""


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    with ALONE:
        yield
    _give_back()


def _give_back() -> None:
    """Call what finalizers have left, unless another thread has ALONE: it waits for nothing, and so it waits for none.

    A finalizer runs in whichever thread Python collects garbage, within whatever lock that thread holds.
    """
    while _left and ALONE.acquire(blocking=False):
        try:
            with contextlib.suppress(Exception):  # taken by another thread; at the end of the process, all is gone
                _left.popleft()()
        finally:
            ALONE.release()


class _Owned:
    """Something of a GPU's that is closed once, at the latest when nobody refers to it any more."""

    def close(self) -> None:
        """Give it back; again does nothing. Each kind has its own."""
        raise NotImplementedError

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at the end of the process, when all is given back
            _left.append(self.close)
            _give_back()


def close_all(held: Iterable[_Owned]) -> None:
    """Close each, whatever becomes of the others; DeviceError, the first one, after all of them."""
    failed = None
    for one in held:
        try:
            one.close()
        except DeviceError as error:
            failed = failed or error
    if failed is not None:
        raise failed


class Buffer(_Owned):
    """``nbytes`` of the current GPU's memory, 256-byte aligned, until it is closed."""

    def __init__(self, nbytes: int, what: str = "") -> None:
        self.nbytes = nbytes
        about = f"of {nbytes / 2**20:.1f} MiB{what and f' for {what}'}"
        with _alone():
            self.address = int(call("cudaMalloc", max(nbytes, 1), about=about))

    def close(self) -> None:
        if address := self.address:
            self.address = 0
            with _alone():
                call("cudaFree", address)


class Pinned(_Owned):
    """A numpy array in memory that the GPU reads and writes by itself, without a copy of the driver's in between."""

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        kind = np.dtype(dtype)
        count = int(np.prod(shape, dtype=np.int64))
        nbytes = max(count * kind.itemsize, 1)
        with _alone():
            self.address = int(call("cudaMallocHost", nbytes, about=f"of {nbytes} bytes"))
        memory = (ctypes.c_byte * nbytes).from_address(self.address)
        self.array: Array = np.frombuffer(memoryview(memory), kind, count).reshape(shape)

    def close(self) -> None:
        if address := self.address:
            self.address = 0
            del self.array
            with _alone():
                call("cudaFreeHost", address)


class Stream(_Owned):
    """A queue of the current GPU's; work in it is done in order, and waits for no other queue."""

    def __init__(self) -> None:
        self.handle = int(call("cudaStreamCreateWithFlags", _runtime().cudaStreamNonBlocking))

    def upload(self, to: Buffer, array: Array) -> None:
        """Copy a contiguous array; it must stay until the stream has been synchronised."""
        kind = _runtime().cudaMemcpyKind.cudaMemcpyHostToDevice
        call("cudaMemcpyAsync", to.address, array.ctypes.data, array.nbytes, kind, self.handle)

    def download(self, array: Array, source: Buffer) -> None:
        """Fill a contiguous array, which holds the values once the stream has been synchronised."""
        kind = _runtime().cudaMemcpyKind.cudaMemcpyDeviceToHost
        call("cudaMemcpyAsync", array.ctypes.data, source.address, array.nbytes, kind, self.handle)

    def synchronize(self) -> None:
        call("cudaStreamSynchronize", self.handle)

    def captured(self, work: Callable[[], None]) -> Graph:
        """What ``work`` puts into this stream, recorded instead of done. Other threads may go on meanwhile."""
        mode = _runtime().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call("cudaStreamBeginCapture", self.handle, mode)
        try:
            work()
        except BaseException:
            with contextlib.suppress(DeviceError):  # the capture is void already, and this tells why
                call("cudaGraphDestroy", call("cudaStreamEndCapture", self.handle))
            raise
        return Graph(call("cudaStreamEndCapture", self.handle))

    def launch(self, graph: Graph) -> None:
        call("cudaGraphLaunch", graph.executable, self.handle)

    def close(self) -> None:
        if handle := self.handle:
            self.handle = 0
            call("cudaStreamDestroy", handle)


class Graph(_Owned):
    """Recorded work that is launched as one. It reads and writes the addresses that it was recorded with."""

    def __init__(self, recorded: Any) -> None:
        try:
            self.executable = call("cudaGraphInstantiate", recorded, 0)
        finally:
            call("cudaGraphDestroy", recorded)

    def close(self) -> None:
        if (executable := self.executable) is not None:
            self.executable = None
            call("cudaGraphExecDestroy", executable)
