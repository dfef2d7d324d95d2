"""A plan at work: numpy arrays in, numpy arrays out, everything between on the GPU.

For each size there is one execution context with buffers at addresses of its own, so that a call can be recorded as a
CUDA graph: copies from pinned memory, the network, copies back. A step then costs the host two copies of latents
between arrays, one launch and one wait. What is bound is copied to the GPU once.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from sdrt.bundle import Component, solve
from sdrt.engine import NUMPY_DTYPES, Array, DeviceMemory
from sdrt.errors import BundleError, DeviceError, InputError
from sdrt_engines import cuda
from sdrt_engines.trt.arena import Arena
from sdrt_engines.trt.library import Spoken
from sdrt_engines.trt.plan import nearest

logger = logging.getLogger("sdrt")

DTYPES = {
    "FLOAT": "f32", "HALF": "f16", "BF16": "bf16", "INT64": "i64", "INT32": "i32", "INT8": "i8", "UINT8": "u8",
    "BOOL": "bool",
}  # fmt: skip
"""TensorRT's names of element types, and ours."""


@dataclass(frozen=True)
class TensorRtOptions:
    """``-O name=value`` when opening.

    graphs: record each size's call as a CUDA graph, and launch that. specialize: when TensorRT-RTX compiles kernels for
    a size: before its first call, beside the first calls, or never. keep: sizes whose buffers are kept. mismatch: what
    happens with a plan that is not for this GPU or this version: an error, or a plan built anew from the graph that
    ``-O keep_graph=true`` left beside it (kept in the cache where there is one). trust: run the code that a portable
    plan carries. budget: most MiB of each component's weights that stay on the GPU, of plans that were built with
    ``-O streaming=true``; the others come from the host's memory, in each call. -1: all stay.
    """

    graphs: bool = True
    specialize: Literal["eager", "lazy", "none"] = "eager"
    keep: int = 2
    mismatch: Literal["error", "rebuild"] = "error"
    trust: bool = False
    budget: int = -1


class Compiled(Protocol):
    """Where kernels that were compiled for this GPU are kept between processes."""

    def load(self, config: Any) -> None:
        """Hand what is kept to an IRuntimeConfig."""

    def save(self) -> None:
        """Keep what is there now."""


def check_ports(name: str, trt: Any, engine: Any, component: Component) -> None:
    """BundleError unless a plan has the inputs, outputs, types and profiles that the manifest says."""
    held = {}
    for i in range(engine.num_io_tensors):
        tensor = engine.get_tensor_name(i)
        side = "input" if engine.get_tensor_mode(tensor) == trt.TensorIOMode.INPUT else "output"
        held[tensor] = (side, DTYPES.get(engine.get_tensor_dtype(tensor).name, "another type"))
    said = {spec.name: ("input", spec.dtype) for spec in component.inputs}
    said |= {spec.name: ("output", spec.dtype) for spec in component.outputs}
    if held != said:
        differing = sorted(t for t in {*held, *said} if held.get(t) != said.get(t))
        raise BundleError(
            f"{name}: the plan's {differing[0]} is {held.get(differing[0], 'missing')}, the manifest says"
            f" {said.get(differing[0], 'there is none')}",
            "sdrt verify tells whether the files are damaged; build it again",
        )
    if engine.num_optimization_profiles != max(len(component.artifact.profiles), 1):
        raise BundleError(
            f"{name}: the plan has {engine.num_optimization_profiles} profiles, the manifest"
            f" {len(component.artifact.profiles)}",
            "build it again",
        )


class TensorRtSession:
    """One plan on one GPU. Calls of all sessions of a GPU take turns (``Arena.lock``)."""

    def __init__(
        self, name: str, trt: Any, engine: Any, component: Component, arena: Arena, options: TensorRtOptions,
        compiled: Compiled | None, weights: int, spoken: Spoken,
    ) -> None:  # fmt: skip
        self.name, self.spec = name, component
        self._spoken = spoken
        self._trt, self._engine, self._arena, self._options = trt, engine, arena, options
        self._compiled, self._weights = compiled, weights
        self._let_go = weakref.finalize(self, arena.leave)  # of a session that nobody closes
        self._kept: dict[str, Array] = {}
        self._bound = 0  # how often something was bound
        self._calls: OrderedDict[tuple[tuple[int, ...], ...], _Call] = OrderedDict()

    def prepare(self, sizes: Mapping[str, int]) -> bool:
        with self._arena.lock:
            cuda.use(self._arena.index)
            before = len(self._calls)
            known = set(self._calls)
            self._call({spec.name: spec.at(sizes) for spec in self.spec.inputs})
            return len(self._calls) != before or set(self._calls) != known

    def bind(self, **constants: Array) -> None:
        self._kept |= {name: np.array(array, order="C") for name, array in constants.items()}
        self._bound += 1

    def run(self, **inputs: Array) -> dict[str, Array]:
        arrays = {**self._kept, **inputs}
        with self._arena.lock:
            cuda.use(self._arena.index)
            call = self._call({spec.name: arrays[spec.name].shape for spec in self.spec.inputs})
            call.bind(self._kept, self._bound)
            return call.run(inputs)

    def memory(self) -> DeviceMemory:
        """Weights are what loading took of the GPU's free memory."""
        tensors = sum(call.nbytes for call in self._calls.values())
        return DeviceMemory(self._weights, tensors, shared=self._arena.nbytes, device=f"cuda:{self._arena.index}")

    def close(self) -> None:
        try:
            with self._arena.lock:
                cuda.use(self._arena.index)
                if self._compiled is not None and self._calls:
                    self._compiled.save()  # what was compiled beside the calls
        finally:
            with self._arena.lock:
                while self._calls:
                    self._calls.popitem()[1].close()
                self._kept.clear()
                self._engine = None
            if self._let_go.detach() is not None:
                self._arena.release()

    def _call(self, shapes: Mapping[str, tuple[int, ...]]) -> _Call:
        key = tuple(shapes[spec.name] for spec in self.spec.inputs)
        if (call := self._calls.get(key)) is None:
            while len(self._calls) >= self._options.keep:
                self._calls.popitem(last=False)[1].close()
            call = self._made(shapes)
            self._calls[key] = call
            try:
                call.warm_up()
            except BaseException:
                self._calls.pop(key).close()
                raise
            if self._compiled is not None:
                self._compiled.save()
            held = (self._weights, sum(c.nbytes for c in self._calls.values()), self._arena.nbytes)
            told = "%s on cuda:%d: weights %.0f MiB, tensors %.0f MiB, activations of all %.0f MiB"
            logger.info(told, self.name, self._arena.index, *(nbytes / 2**20 for nbytes in held))
        self._calls.move_to_end(key)
        return call

    def _made(self, shapes: Mapping[str, tuple[int, ...]]) -> _Call:
        sizes = solve(self.spec.inputs, shapes)
        profiles = self.spec.artifact.profiles
        if (index := nearest(profiles, sizes) if profiles else 0) < 0:
            raise InputError(f"{self.name}: no profile admits {dict(shapes)}")
        context, records = self._context()
        # Where weights that come from the host go; the memory that a size is said to need leaves it out.
        scratch = self._engine.weight_streaming_scratch_memory_size if self._options.budget >= 0 else 0
        return _Call(self.name, context, index, shapes, self.spec, self._arena, scratch, records, self._spoken)

    def _context(self) -> tuple[Any, bool]:
        """A context, and whether its calls are to be recorded here."""
        trt, records = self._trt, self._options.graphs
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if hasattr(config, "dynamic_shapes_kernel_specialization_strategy"):
            strategies = trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = getattr(strategies, self._options.specialize.upper())
            # Recorded here, copies included; but where kernels change while calls are made, the library knows when.
            theirs = records and self._options.specialize == "lazy"
            config.cuda_graph_strategy = getattr(trt.CudaGraphStrategy, "WHOLE_GRAPH_CAPTURE" if theirs else "DISABLED")
            records = records and not theirs
        if self._compiled is not None:
            self._compiled.load(config)
        with cuda.ALONE:
            context = self._engine.create_execution_context(config)
        if context is None:
            raise DeviceError(
                f"{self.name}: the plan gets no execution context on this GPU: {self._spoken.why()}",
                "free its memory, or build it again",
            )
        return context, records


class _Call:
    """One size: a context, buffers on both sides, and the recorded work."""

    def __init__(
        self, name: str, context: Any, profile: int, shapes: Mapping[str, tuple[int, ...]], component: Component,
        arena: Arena, scratch: int, graph: bool, spoken: Spoken,
    ) -> None:  # fmt: skip
        self._spoken = spoken
        self._name, self._context, self._arena, self._scratch = name, context, arena, scratch
        self._wants_graph = graph
        self._inputs = [spec.name for spec in component.inputs]
        self._outputs = [spec.name for spec in component.outputs]
        self._constants: set[str] = set()
        self._bound = 0
        self._graph: cuda.Graph | None = None
        self._generation = -1
        self._device: dict[str, cuda.Buffer] = {}
        self._host: dict[str, cuda.Pinned] = {}
        try:
            self._set_sizes(profile, shapes)
            dtypes = {spec.name: NUMPY_DTYPES[spec.dtype] for spec in (*component.inputs, *component.outputs)}
            for tensor in (*self._inputs, *self._outputs):
                shape = tuple(context.get_tensor_shape(tensor))
                if -1 in shape:
                    raise BundleError(
                        f"{name}: {tensor} has the shape {shape}, known only when it runs", "build it again"
                    )
                self._host[tensor] = cuda.Pinned(shape, dtypes[tensor])
                self._device[tensor] = cuda.Buffer(self._host[tensor].array.nbytes, f"{name}'s {tensor}")
                self._must(context.set_tensor_address(tensor, self._device[tensor].address), f"takes no {tensor}")
        except BaseException:
            self.close()
            raise

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._device.values())

    def warm_up(self) -> None:
        """Run once on zeros: kernels are compiled and loaded now, and not while a graph is recorded."""
        for tensor in self._inputs:
            self._host[tensor].array[...] = 0
        self._work()
        self._arena.stream.synchronize()

    def bind(self, kept: Mapping[str, Array], bound: int) -> None:
        """Let these inputs be constants: copied now, if anything was bound since, and by no call."""
        if self._bound == bound and self._constants == kept.keys():
            return
        for tensor, array in kept.items():
            self._host[tensor].array[...] = array
            self._arena.stream.upload(self._device[tensor], self._host[tensor].array)
        self._arena.stream.synchronize()
        if self._constants != kept.keys():
            self._forget()
            self._constants = set(kept)
        self._bound = bound

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        for tensor, array in inputs.items():
            np.copyto(self._host[tensor].array, array)
        stream = self._arena.stream
        if moved := self._generation != self._arena.generation:
            self._forget()
            self._work()  # what TensorRT puts off until the first call after a change must not be recorded
        if self._wants_graph and self._graph is None:
            self._graph = self._recorded()
        if self._graph is not None and not moved:
            stream.launch(self._graph)
        elif not moved:
            self._work()
        stream.synchronize()
        return {tensor: self._host[tensor].array.copy() for tensor in self._outputs}

    def close(self) -> None:
        with contextlib.suppress(DeviceError):  # of a call that failed, copies may be under way
            self._arena.stream.synchronize()
        held = [*([self._graph] if self._graph is not None else []), *self._device.values(), *self._host.values()]
        self._graph = self._context = None
        self._device.clear()
        self._host.clear()
        cuda.close_all(held)

    def _set_sizes(self, profile: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        stream = self._arena.stream
        self._must(self._context.set_optimization_profile_async(profile, stream.handle), f"has no profile {profile}")
        stream.synchronize()
        for tensor, shape in shapes.items():
            self._must(self._context.set_input_shape(tensor, shape), f"takes no {tensor} of shape {list(shape)}")
        try:
            missing = self._context.infer_shapes()
        except RuntimeError:  # how the bindings say that sizes do not fit each other
            raise InputError(f"{self._name}: the plan takes no inputs of these sizes: {self._spoken.why()}") from None
        if missing:
            raise BundleError(
                f"{self._name}: the plan does not tell the shape of {', '.join(missing)}", "build it again"
            )

    def _place(self) -> None:
        """Give the context the arena's memory, grown to what these sizes need."""
        if self._generation == self._arena.generation and self._arena.address:
            return
        needed = self._context.update_device_memory_size_for_shapes()
        self._arena.require(max(int(needed) + self._scratch, 1))
        self._context.set_device_memory(self._arena.address, self._arena.nbytes)
        self._generation = self._arena.generation

    def _work(self) -> None:
        """Copies to the GPU, the network, copies back: into the stream, or into what is being recorded there."""
        self._place()
        stream = self._arena.stream
        for tensor in self._inputs:
            if tensor not in self._constants:
                stream.upload(self._device[tensor], self._host[tensor].array)
        self._must(self._context.execute_async_v3(stream.handle), "failed to run")
        for tensor in self._outputs:
            stream.download(self._host[tensor].array, self._device[tensor])

    def _recorded(self) -> cuda.Graph | None:
        capturable = getattr(self._context, "is_stream_capturable", None)
        if capturable is not None and not capturable(self._arena.stream.handle):
            logger.warning("%s: cannot be recorded as a CUDA graph; each call is launched kernel by kernel", self._name)
            self._wants_graph = False
            return None
        try:
            return self._arena.stream.captured(self._work)
        except DeviceError as error:
            told = "%s: cannot be recorded as a CUDA graph (%s); each call is launched kernel by kernel"
            logger.warning(told, self._name, error.message)
            self._wants_graph = False
            return None

    def _forget(self) -> None:
        """Drop what was recorded: it holds addresses that are not in use any more."""
        if self._graph is not None:
            self._graph.close()
            self._graph = None

    def _must(self, done: bool, what: str) -> None:
        if not done:
            raise DeviceError(
                f"{self._name}: the plan {what}: {self._spoken.why()}",
                "sdrt verify tells whether the bundle is damaged",
            )
