"""A saved Core ML package as data: its functions, their operations, and its weights, mapped from the file.

Read from what lies on disk and nothing else, so that what is found wrong here is wrong there. Formats: coremltools'
``MIL.proto``; of weights, its ``mlmodel/src/MILBlob``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdrt import strict_json
from sdrt.bundle import check_relative
from sdrt.errors import BundleError

Array = NDArray[Any]

MANIFEST = "Manifest.json"
MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
"""Where coremltools puts them; the manifest says where the model is."""

_DTYPES: dict[int, Any] = {
    1: np.bool_, 2: np.str_, 10: np.float16, 11: np.float32, 21: np.int8, 22: np.int16, 23: np.int32, 31: np.uint8,
    32: np.uint16, 33: np.uint32,
}  # fmt: skip
"""By MIL's ``DataType``."""
_BITS = {35: 4, 36: 2, 37: 1, 38: 6, 39: 3}
"""Unsigned integers of less than a byte, packed from the least significant bit on; held as uint8 here."""
_STRING = 2

_BLOB_TYPES = {1: 10, 2: 11, 3: 31, 4: 21, 6: 22, 7: 32, 9: 37, 10: 36, 11: 35, 12: 39, 13: 38, 14: 23, 15: 33}
"""The weight file's numbers of types → MIL's."""
_SENTINEL = 0xDEADBEEF
_RECORD = np.dtype([("sentinel", "<u4"), ("type", "<u4"), ("bytes", "<u8"), ("offset", "<u8")])

MAX_SPEC = 1 << 29
"""Bytes of a ``model.mlmodel``; weights are not in it. A full-size U-Net's is 1 MB."""


@dataclass(frozen=True)
class Tensor:
    """Name, numpy type and shape of an input, or of what an operation makes."""

    name: str
    dtype: Any
    shape: tuple[int, ...]


class Name(str):
    """Of a tensor that an operation reads; a plain ``str`` is a text that is given to it."""

    __slots__ = ()


@dataclass(frozen=True)
class Operation:
    """inputs: by parameter, the ``Name`` of tensors, or values; a parameter may have several."""

    kind: str
    name: str
    inputs: Mapping[str, tuple[Any, ...]]
    attributes: Mapping[str, Any]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Function:
    """One function of the program; its operations in the order in which they are computed."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[str, ...]
    operations: tuple[Operation, ...]


@dataclass(frozen=True)
class Feature:
    """An input or output as Core ML shows it to an app."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Package:
    """``read`` makes it. inputs, outputs: of the function that is loaded when none is named, ``default``."""

    functions: Mapping[str, Function]
    default: str
    specification: int
    metadata: Mapping[str, str]
    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]


def read(folder: Path) -> Package:
    """The package in ``folder`` (``….mlpackage``). BundleError when it is damaged, or no mlprogram."""
    try:
        return _read(folder)
    except BundleError:
        raise
    except Exception as error:  # whatever a damaged file makes of protobuf, numpy or the file system
        raise BundleError(
            f"{folder.name}: cannot be read as a Core ML package: {error}", "sdrt verify tells whether it is damaged"
        ) from error


def _read(folder: Path) -> Package:
    from coremltools.proto import Model_pb2

    manifest: Any = strict_json.read(folder / MANIFEST)
    root = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
    check_relative(root)
    model = folder / "Data" / root
    if not model.is_file():  # a pipe would wait for its writer
        raise BundleError(f"{folder.name}: {root} is no file")
    if model.stat().st_size > MAX_SPEC:
        raise BundleError(f"{folder.name}: {root} has {model.stat().st_size} bytes, at most {MAX_SPEC}")
    spec = Model_pb2.Model()
    spec.ParseFromString(model.read_bytes())
    if spec.WhichOneof("Type") != "mlProgram":
        raise BundleError(f"{folder.name}: is a {spec.WhichOneof('Type')}, expected an mlProgram")
    values = _Values(model.parent)
    functions = {name: _function(proto, values) for name, proto in spec.mlProgram.functions.items()}
    told = spec.description
    default = told.defaultFunctionName or "main"
    if default not in functions:
        raise BundleError(f"{folder.name}: has no function {default}, it has {', '.join(functions) or 'none'}")
    shown = next((f for f in told.functions if f.name == default), told)
    return Package(
        functions, default, spec.specificationVersion, dict(told.metadata.userDefined),
        tuple(map(_feature, shown.input)), tuple(map(_feature, shown.output)),
    )  # fmt: skip


_ARRAYS = {65568: "f32", 65552: "f16", 131104: "i32", 65600: "f64", 131080: "i8"}
"""By ``ArrayFeatureType.ArrayDataType``."""


def _feature(told: Any) -> Feature:
    array = told.type.multiArrayType
    return Feature(told.name, _ARRAYS.get(array.dataType, str(array.dataType)), tuple(array.shape))


def _function(proto: Any, values: _Values) -> Function:
    if proto.opset not in proto.block_specializations:
        raise BundleError(f"a function is of {proto.opset}, and has no operations of it")
    block = proto.block_specializations[proto.opset]
    inputs = tuple(_tensor(told) for told in proto.inputs)
    operations = tuple(_operations(block, values))
    known: set[str] = set()

    def made(tensors: tuple[Tensor, ...]) -> None:
        for told in tensors:
            if told.name in known:
                raise BundleError(f"the name {told.name} is given twice")
            known.add(told.name)

    def read(names: Iterable[Any]) -> None:
        if unknown := [name for name in names if isinstance(name, Name) and name not in known]:
            raise BundleError(f"{unknown[0]} is read before it is made")

    made(inputs)
    for op in operations:
        read(value for several in op.inputs.values() for value in several)
        made(op.outputs)
    outputs = tuple(map(Name, block.outputs))
    read(outputs)
    return Function(inputs, outputs, operations)


def _operations(block: Any, values: _Values) -> Iterator[Operation]:
    for op in block.operations:
        if op.blocks:
            raise BundleError(f"{op.type}: control flow is not supported")
        attributes = {name: values.of(value) for name, value in op.attributes.items()}
        inputs = {
            name: tuple(
                Name(a.name) if a.WhichOneof("binding") == "name" else values.of(a.value) for a in told.arguments
            )
            for name, told in op.inputs.items()
        }
        label = str(attributes.pop("name", ""))
        outputs = tuple(map(_tensor, op.outputs))
        if empty := [name for name, several in inputs.items() if not several]:
            raise BundleError(f"{op.type} {label}: nothing is given as {empty[0]}")
        if op.type == "const" and (
            len(outputs) != 1 or "val" not in attributes or np.shape(attributes["val"]) != outputs[0].shape
        ):
            raise BundleError(f"const {label}: has no value of the shape that it says")
        yield Operation(op.type, label, inputs, attributes, outputs)


def _tensor(told: Any) -> Tensor:
    if told.type.WhichOneof("type") != "tensorType":
        raise BundleError(f"{told.name} is a {told.type.WhichOneof('type')}, expected a tensor")
    kind = told.type.tensorType
    return Tensor(told.name, _dtype(kind), _shape(kind))


def _dtype(kind: Any) -> Any:
    if kind.dataType in _BITS:
        return np.uint8
    if kind.dataType not in _DTYPES:
        raise BundleError(f"tensors of MIL's type {kind.dataType} are not supported")
    return _DTYPES[kind.dataType]


def _shape(kind: Any) -> tuple[int, ...]:
    if any(dim.WhichOneof("dimension") != "constant" for dim in kind.dimensions):
        raise BundleError("a size is not fixed")
    return tuple(dim.constant.size for dim in kind.dimensions)


class _Values:
    """Constants: those in the model's file, and those in the weight file, which stay there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}

    def of(self, value: Any) -> Any:
        """An array, a text, or for a tuple a list."""
        if value.type.WhichOneof("type") != "tensorType":
            raise BundleError(f"a constant is a {value.type.WhichOneof('type')}, expected a tensor")
        kind = value.type.tensorType
        if value.WhichOneof("value") == "blobFileValue":
            return self._stored(value.blobFileValue, kind)
        tensor = value.immediateValue.tensor
        which = tensor.WhichOneof("value")
        if kind.dataType == _STRING:
            return tensor.strings.values[0]
        dtype, shape = _dtype(kind), _shape(kind)
        if which == "bytes" and (bits := _BITS.get(kind.dataType)):
            return unpacked(np.frombuffer(tensor.bytes.values, np.uint8), bits, math.prod(shape)).reshape(shape)
        if which == "bytes":
            return np.frombuffer(tensor.bytes.values, dtype).reshape(shape)
        return np.array(list(getattr(tensor, which).values), dtype).reshape(shape)

    def _stored(self, where: Any, kind: Any) -> Array:
        raw = self._file(where.fileName)
        record = raw[where.offset : where.offset + _RECORD.itemsize].view(_RECORD)[0]
        if record["sentinel"] != _SENTINEL or _BLOB_TYPES.get(int(record["type"])) != kind.dataType:
            raise BundleError(f"{where.fileName}: no weight of this type starts at {where.offset}")
        start, length = int(record["offset"]), int(record["bytes"])
        shape, bits = _shape(kind), _BITS.get(kind.dataType)
        count = math.prod(shape)
        dtype = np.dtype(_dtype(kind))
        if length != (-(-count * bits // 8) if bits else count * dtype.itemsize) or start + length > len(raw):
            raise BundleError(f"{where.fileName}: the weight at {where.offset} has {length} bytes, for shape {shape}")
        data = raw[start : start + length]
        return unpacked(data, bits, count).reshape(shape) if bits else data.view(dtype).reshape(shape)

    def _file(self, name: str) -> Any:
        relative = name.removeprefix("@model_path/")
        check_relative(relative)
        if name not in self._files:
            path = self._folder / PurePosixPath(relative)
            if not path.is_file():
                raise BundleError(f"{name}: is no file")
            self._files[name] = np.memmap(path, np.uint8, "r")
        return self._files[name]


def unpacked(packed: Array, bits: int, count: int) -> Array:
    """u8[count] of integers of ``bits`` bits that follow each other from each byte's least significant bit on."""
    return np.packbits(
        np.unpackbits(np.ascontiguousarray(packed), bitorder="little")[: count * bits].reshape(count, bits),
        axis=1, bitorder="little",
    ).reshape(count)  # fmt: skip
