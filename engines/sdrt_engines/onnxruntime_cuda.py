"""ONNX Runtime's session on an NVIDIA GPU: buffers that stay where they are, a stream, a CUDA graph per size.

No engine: what ``onnxruntime.py`` opens on ``cuda:N``. The first call of a size runs some times, the last of them
recorded; later ones are one launch, which reads and writes the addresses of then. So every size has buffers of its own
for all inputs and outputs, constants too, and a constant that is bound anew is copied over the old one.

The stream is ours, since copies in it need no waiting in between: two inputs go up, the network runs, its output comes
down, and the host waits once. Copies from and to ordinary arrays, as ONNX Runtime makes them, wait for each.

https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdrt.bundle import MANIFEST, Component, solve
from sdrt.engine import NUMPY_DTYPES, Array, DeviceMemory
from sdrt.errors import BundleError, DeviceError, NumericsError
from sdrt_engines import cuda

Shapes = tuple[tuple[str, tuple[int, ...]], ...]

NO_GRAPH = -1
"""``gpu_graph_id`` of a call that is neither recorded nor replayed."""


def _key(shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
    return tuple(sorted(shapes.items()))


@dataclass
class _Network:
    """ONNX Runtime's session, the stream that it works in, and the bytes that it took of the GPU's memory.

    In this order: where nobody closes them, the stream goes after the session.
    """

    session: Any
    stream: cuda.Stream
    weights: int
    activations: int = 0


class _Size:
    """Buffers of one set of shapes: in the GPU's memory, and in host memory that the GPU reads and writes by itself."""

    def __init__(self, spec: Component, shapes: Mapping[str, tuple[int, ...]], network: _Network) -> None:
        self.network = network
        sizes = solve(spec.inputs, shapes)
        kinds = {i.name: (shapes[i.name], i.dtype) for i in spec.inputs} | {
            o.name: (o.at(sizes), o.dtype) for o in spec.outputs
        }
        self.shapes = {name: shape for name, (shape, _) in kinds.items()}
        self.buffers: dict[str, cuda.Buffer] = {}
        self.staged: dict[str, cuda.Pinned] = {}
        self.binding: Any = None
        self.options: Any = None
        self.graph = NO_GRAPH
        self.ran = False
        self.held: dict[str, int] = {}  # constants, and which binding of them is here
        self.nbytes = 0
        try:
            for name, (shape, dtype) in kinds.items():
                self.staged[name] = cuda.Pinned(shape, NUMPY_DTYPES[dtype])
                self.buffers[name] = cuda.Buffer(self.staged[name].array.nbytes, name)
                self.nbytes += self.staged[name].array.nbytes
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.binding = self.options = None
        held = [*self.buffers.values(), *self.staged.values()]
        self.buffers.clear()
        self.staged.clear()
        cuda.close_all(held)


class CudaSession:
    """One graph on one GPU. ``make`` is given the stream's address, and makes ONNX Runtime's session.

    graphs: record a CUDA graph per size. keep: sizes whose buffers and graphs are kept; the one used longest ago goes.
    fixed: each size has a session of ONNX Runtime's own, made when it comes first, whose graph has no free dimensions:
    ``make`` is given their sizes, by name. Otherwise one session, made now, serves all.
    """

    def __init__(
        self, library: Any, spec: Component, name: str, index: int, make: Callable[[int, Mapping[str, int]], Any], *,
        graphs: bool, keep: int, fixed: bool,
    ) -> None:  # fmt: skip
        self.name, self.spec = name, spec
        self._library, self._index, self._make = library, index, make
        self._graphs, self._keep = graphs, keep
        self._sizes: OrderedDict[Shapes, _Size] = OrderedDict()
        self._constants: dict[str, tuple[int, Array]] = {}
        self._numbers = itertools.count(1)
        cuda.use(index)
        with cuda.ALONE:
            self._stream = cuda.Stream()
            try:
                self._shared = None if fixed else self._made({})
            except BaseException:
                self._stream.close()
                raise

    def _made(self, dims: Mapping[str, int]) -> _Network:
        before = cuda.memory()[0]
        network = self._make(self._stream.handle, dims)
        return _Network(network, self._stream, max(before - cuda.memory()[0], 0))

    def prepare(self, sizes: Mapping[str, int]) -> bool:
        """Run the network on zeros, so that its kernels are chosen and its graph is recorded before the first call."""
        cuda.use(self._index)
        shapes = {spec.name: spec.at(sizes) for spec in self.spec.inputs}
        if (known := self._sizes.get(_key(shapes))) is not None and known.ran:
            return False
        size = self._size(shapes)
        for name in shapes:
            size.staged[name].array.fill(0)
            self._stream.upload(size.buffers[name], size.staged[name].array)
        self._execute(size)
        self._stream.synchronize()
        return True

    def bind(self, **constants: Array) -> None:
        for name, array in constants.items():
            self._constants[name] = (next(self._numbers), np.array(array, order="C"))

    def run(self, **inputs: Array) -> dict[str, Array]:
        cuda.use(self._index)
        given = {name: array for name, (_, array) in self._constants.items()} | inputs
        size = self._size({name: array.shape for name, array in given.items()})
        for name, array in given.items():
            number = self._constants[name][0] if name in self._constants and name not in inputs else 0
            if number == 0 or size.held.get(name) != number:
                np.copyto(size.staged[name].array, array)
                self._stream.upload(size.buffers[name], size.staged[name].array)
                size.held[name] = number
        self._execute(size)
        for spec in self.spec.outputs:
            self._stream.download(size.staged[spec.name].array, size.buffers[spec.name])
        self._stream.synchronize()
        return {spec.name: size.staged[spec.name].array.copy() for spec in self.spec.outputs}

    def _size(self, shapes: Mapping[str, tuple[int, ...]]) -> _Size:
        key = _key(shapes)
        if key in self._sizes:
            self._sizes.move_to_end(key)
            return self._sizes[key]
        with cuda.ALONE:
            while len(self._sizes) >= self._keep:
                self._release(self._sizes.popitem(last=False)[1])
            free = {d: n for i in self.spec.inputs for d, n in zip(i.shape, shapes[i.name], strict=True)}
            network = self._shared or self._made({dim: n for dim, n in free.items() if isinstance(dim, str)})
            size = _Size(self.spec, shapes, network)
            try:
                self._connect(size)
            except BaseException:
                size.close()
                raise
        self._sizes[key] = size
        return size

    def _connect(self, size: _Size) -> None:
        size.binding = size.network.session.io_binding()
        inputs = {spec.name for spec in self.spec.inputs}
        try:
            for name, buffer in size.buffers.items():
                bind = size.binding.bind_input if name in inputs else size.binding.bind_output
                kind = size.staged[name].array.dtype.type
                bind(name, "cuda", self._index, kind, list(size.shapes[name]), buffer.address)
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise BundleError(
                f"{self.name}: the graph is not what {MANIFEST} says: {error}", "sdrt verify tells more"
            ) from None
        size.options = self._library.RunOptions()
        size.options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if self._graphs:
            size.graph = next(self._numbers)  # never one that was another size's
        size.options.add_run_config_entry("gpu_graph_id", str(size.graph))

    def _execute(self, size: _Size) -> None:
        """Put a run into the stream: recorded the first time, or taken one by one where there are no graphs."""
        try:
            if size.ran and size.graph != NO_GRAPH:
                size.network.session.run_with_iobinding(size.binding, size.options)
                return
            with cuda.ALONE:
                before = 0 if size.ran else cuda.memory()[0]
                size.network.session.run_with_iobinding(size.binding, size.options)
                size.network.activations += 0 if size.ran else max(before - cuda.memory()[0], 0)
        except Exception as error:  # onnxruntime's exceptions share no base class
            said = str(error)
            if "cuDNN is unavailable" in said:
                raise DeviceError(
                    f"{self.name}: onnxruntime finds no cuDNN, without which it has no convolutions on CUDA",
                    "pip install 'sdrt[ort-gpu]' brings it",
                ) from error
            if "Failed to allocate memory" in said or "CUDA failure" in said:
                raise DeviceError(
                    f"{self.name}: onnxruntime failed on cuda:{self._index}: {said}",
                    "a smaller batch or size, or --low-memory, if memory ran out",
                ) from error
            raise NumericsError(f"{self.name}: onnxruntime failed while running: {said}") from error
        size.ran = True

    def _release(self, size: _Size) -> None:
        if size.ran and size.graph != NO_GRAPH:
            size.network.session.release_captured_graph(size.graph)
        size.close()

    def memory(self) -> DeviceMemory:
        """As the GPU's free memory told: weights when the session was made, activations at the first run of each size.
        What other sessions took in the same moment is counted, too."""
        networks = {id(size.network): size.network for size in self._sizes.values()}
        if self._shared is not None:
            networks[id(self._shared)] = self._shared
        weights, activations = (sum(getattr(n, kind) for n in networks.values()) for kind in ("weights", "activations"))
        return DeviceMemory(weights, sum(size.nbytes for size in self._sizes.values()), activations)

    def close(self) -> None:
        cuda.use(self._index)
        with cuda.ALONE:
            while self._sizes:
                self._release(self._sizes.popitem()[1])
            self._constants.clear()
            self._shared = None
            self._stream.close()
