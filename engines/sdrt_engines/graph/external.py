"""Initializers outside the graph's own file: read one at a time from the mapped file, and written one at a time.

A full-size U-Net's weights are 3.4 GB. A pass declares what a weight becomes as a function of what it was; the function
is called when the weight is written, and its result is dropped before the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

LARGE = 64 * 1024
"""Bytes. Tensors of this size start at a page, so that an engine can map each from the file."""

PAGE, LINE = 4096, 64
"""Bytes. Where large and other tensors start: padding all to pages makes a small network's file half as large again."""

INLINE = 1024
"""Bytes. Smaller tensors stay in the graph, where shape inference sees them."""


class Weights:
    """The values of a graph's initializers, by name: views of the mapped file, or what passes declared instead.

    ``folder`` is where the graph's external data lie. ``Constant`` nodes become initializers first: other exporters
    hold scalars so, epsilons among them, and passes look at initializers only.
    """

    def __init__(self, model: Any, folder: Path) -> None:
        _lift_constants(model.graph)
        self._graph = model.graph
        self._folder = folder
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self._made: dict[str, Callable[[], Array]] = {}
        self._told = {value.name: value for value in model.graph.value_info}  # exporters tell initializers' types too

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Array:
        """The values of one initializer. Read only when they come from the file."""
        if (make := self._made.get(name)) is not None:
            return make()
        return _read(self._tensors[name], self._folder)

    def names(self) -> list[str]:
        return list(self._tensors)

    def dims(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].dims)

    def dtype(self, name: str) -> int:
        """ONNX's number of the element type."""
        return int(self._tensors[name].data_type)

    def declare(self, name: str, dtype: int, dims: tuple[int, ...], make: Callable[[], Array]) -> str:
        """Add an initializer whose values ``make`` computes when they are written; returns its name.

        A name that is declared already keeps what it was declared to be.
        """
        from onnx import TensorProto

        if name not in self._tensors:
            self._graph.initializer.append(TensorProto(name=name, data_type=dtype, dims=dims))
            self._tensors[name] = self._graph.initializer[-1]
            self._made[name] = make
        return name

    def retype(self, name: str, dtype: int) -> None:
        """Let an initializer have another element type: its values are converted, to nearest, when they are read."""
        from onnx import TensorProto, helper

        tensor, make = self._tensors[name], self._made.get(name)
        if make is None:
            stored = TensorProto()
            stored.CopyFrom(tensor)
            make = partial(_read, stored, self._folder)
        values, kind = make, helper.tensor_dtype_to_np_dtype(dtype)
        self._made[name] = lambda: values().astype(kind)
        tensor.CopyFrom(TensorProto(name=name, data_type=dtype, dims=tensor.dims))
        if name in self._told:
            self._told[name].type.tensor_type.elem_type = dtype

    def constant(self, name: str, values: Any) -> str:
        """Add a small initializer; returns its name."""
        from onnx.helper import np_dtype_to_tensor_dtype

        array = np.asarray(values)
        return self.declare(name, np_dtype_to_tensor_dtype(array.dtype), array.shape, lambda: array)

    def save(self, model: Any, folder: Path, report: Callable[[float], object] = lambda _: None) -> list[str]:
        """Write the graph as ``model.onnx``, and its weights as ``model.onnx.data``; returns the files' names.

        Initializers that no node reads any more are left out. ``report`` is called with the fraction that is written.
        """
        used = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
        kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
        self._tensors |= {tensor.name: tensor for tensor in kept}  # other passes add small ones of their own
        names = ["model.onnx"]
        written: list[Any] = []
        with (folder / "model.onnx.data").open("wb") as file:
            for done, tensor in enumerate(kept):
                report(done / len(kept))
                written.append(_write(tensor.name, tensor.data_type, np.asarray(self[tensor.name], order="C"), file))
            if file.tell():
                names.append("model.onnx.data")
        if len(names) == 1:
            (folder / "model.onnx.data").unlink()
        del model.graph.initializer[:]
        model.graph.initializer.extend(written)
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        return names


def _lift_constants(graph: Any) -> None:
    """Make initializers of the ``Constant`` nodes that hold a tensor, numbers, or a number."""
    from onnx import helper, numpy_helper

    dtypes = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    nodes = []
    for node in graph.node:
        attribute = node.attribute[0] if node.op_type == "Constant" and len(node.attribute) == 1 else None
        if attribute is not None and attribute.name == "value":
            graph.initializer.append(attribute.t)
            graph.initializer[-1].name = node.output[0]
        elif attribute is not None and attribute.name in dtypes:
            values = np.array(helper.get_attribute_value(attribute), dtypes[attribute.name])
            graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
        else:
            nodes.append(node)
    if len(nodes) < len(graph.node):
        del graph.node[:]
        graph.node.extend(nodes)


def _read(tensor: Any, folder: Path) -> Array:
    from onnx import TensorProto, helper, numpy_helper

    if tensor.data_location != TensorProto.EXTERNAL:
        return np.asarray(numpy_helper.to_array(tensor))
    where = {item.key: item.value for item in tensor.external_data}
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    offset = int(where.get("offset", 0))
    return np.memmap(folder / where["location"], dtype, "r", offset, tuple(tensor.dims))


def _write(name: str, dtype: int, array: Array, file: Any) -> Any:
    from onnx import TensorProto

    tensor = TensorProto(name=name, data_type=dtype, dims=array.shape)
    if array.nbytes < INLINE:
        tensor.raw_data = array.tobytes()
        return tensor
    file.write(b"\0" * (-file.tell() % (PAGE if array.nbytes >= LARGE else LINE)))
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "model.onnx.data"), ("offset", file.tell()), ("length", array.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    file.write(array.reshape(-1).view(np.uint8).data)  # of some types, bfloat16 among them, numpy gives no buffer
    return tensor
