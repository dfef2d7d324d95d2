"""What an ONNX file says about itself, read without the onnx package: inputs, outputs, and the files of its weights.

This walks protobuf's wire format and seeks over everything else: nodes, and the weights, which may be gigabytes. Fields
are those of onnx.proto; only what is named below is looked at. https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from sdrt.bundle import DType, Precision
from sdrt.errors import BundleError
from sdrt.header import MAX_RANK, Header, Size, Value, check_no_pointer

MAX_FIELDS = 1_000_000
"""Fields walked in one file. A full-size SDXL U-Net has some 50,000; a damaged file must not keep anyone waiting."""

MAX_TEXT = 4096
"""Bytes of a name."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_GRAPH = 7  # ModelProto
_INITIALIZER, _INPUT, _OUTPUT = 5, 11, 12  # GraphProto
_TENSOR_TYPE, _TENSOR_NAME, _EXTERNAL_DATA = 2, 8, 13  # TensorProto
_FLOAT8 = 17
"""The first of the element types that no precision of ours stands for: 8-bit floats, and all of fewer bits."""
_DTYPES: dict[int, DType] = {
    1: "f32", 2: "u8", 3: "i8", 6: "i32", 7: "i64", 9: "bool", 10: "f16", 16: "bf16"
}  # fmt: skip
_PRECISIONS: dict[DType, Precision] = {"i8": "int8", "u8": "int8", "bf16": "bf16", "f16": "fp16"}
"""The first whose element type an initializer has."""


def read(path: Path) -> Header:
    """Read one ``.onnx`` file's header, whatever the file's size. BundleError, which names the file."""
    try:
        with path.open("rb") as file:
            return _Walk(file, path).header()
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror or error}") from None


@dataclass(frozen=True)
class _Field:
    """``value`` of a varint, else 0; ``end``: where the field's bytes end in the file."""

    number: int
    wire: int
    value: int
    end: int


def _precision(dtypes: Set[DType]) -> Precision:
    """What the initializers are kept in."""
    for dtype, precision in _PRECISIONS.items():
        if dtype in dtypes:
            return precision
    return "fp32"


class _Walk:
    """One pass over a file. A message is known by where it ends; its fields are come to in the file's order."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path = file, path
        self._at, self._fields = 0, 0

    def header(self) -> Header:
        size = os.fstat(self._file.fileno()).st_size
        check_no_pointer(self._path, self._file.read(20))
        self._seek(0)
        header = None
        for field in self._message(size):
            if field.number == _GRAPH:
                if header is not None:
                    raise self._damaged("has two graphs")
                header = self._graph(self._bytes(field))
        if header is None:
            raise self._damaged("has no graph")
        return header

    # -- onnx.proto ---------------------------------------------------------------------------------------------------

    def _graph(self, end: int) -> Header:
        inputs: list[Value] = []
        outputs: list[Value] = []
        names: set[str] = set()
        weights: dict[str, None] = {}
        dtypes: set[DType] = set()
        for field in self._message(end):
            if field.number == _INPUT:
                inputs.append(self._value(self._bytes(field)))
            elif field.number == _OUTPUT:
                outputs.append(self._value(self._bytes(field)))
            elif field.number == _INITIALIZER:
                self._initializer(self._bytes(field), names, weights, dtypes)
        # Before version 4 of the format, initializers were listed among the inputs.
        asked = tuple(value for value in inputs if value.name not in names)
        return Header(asked, tuple(outputs), tuple(weights), _precision(dtypes))

    def _initializer(self, end: int, names: set[str], weights: dict[str, None], dtypes: set[DType]) -> None:
        for field in self._message(end):
            if field.number == _TENSOR_NAME:
                names.add(self._text(field))
            elif field.number == _TENSOR_TYPE and field.value in _DTYPES:
                dtypes.add(_DTYPES[field.value])
            elif field.number == _TENSOR_TYPE and field.value >= _FLOAT8:
                raise BundleError(
                    f"{self._path}: has weights of element type {field.value} of ONNX, of 8-bit floats or fewer bits",
                    "use float32, float16 or int8 weights",
                )
            elif field.number == _EXTERNAL_DATA:
                key, value = self._entry(self._bytes(field))
                if key == "location":
                    weights[value] = None

    def _entry(self, end: int) -> tuple[str, str]:
        texts = {1: "", 2: ""}  # StringStringEntryProto: key, value
        for field in self._message(end):
            if field.number in texts:
                texts[field.number] = self._text(field)
        return texts[1], texts[2]

    def _value(self, end: int) -> Value:
        name, kind, dims = "", 0, None
        for field in self._message(end):  # ValueInfoProto: name, type
            if field.number == 1:
                name = self._text(field)
            elif field.number == 2:
                for typed in self._message(self._bytes(field)):  # TypeProto: tensor_type
                    if typed.number == 1:
                        kind, dims = self._tensor_type(self._bytes(typed))
        if kind not in _DTYPES:
            raise self._damaged(f"{name[:40]!r} has element type {kind} of ONNX, which a bundle cannot say")
        if dims is None:
            raise self._damaged(f"does not say what shape {name[:40]!r} has")
        return Value(name, _DTYPES[kind], dims)

    def _tensor_type(self, end: int) -> tuple[int, tuple[Size, ...] | None]:
        kind, dims = 0, None
        for field in self._message(end):  # TypeProto.Tensor: elem_type, shape
            if field.number == 1:
                kind = field.value
            elif field.number == 2:
                dims = self._shape(self._bytes(field))
        return kind, dims

    def _shape(self, end: int) -> tuple[Size, ...]:
        dims: list[Size] = []
        for field in self._message(end):  # TensorShapeProto: dim
            if field.number == 1:
                size = None
                for told in self._message(self._bytes(field)):  # Dimension: dim_value, dim_param
                    if told.number == 1:
                        size = told.value
                dims.append(size)
                if len(dims) > MAX_RANK:
                    raise self._damaged(f"has a tensor of more than {MAX_RANK} dimensions")
        return tuple(dims)

    # -- the wire -----------------------------------------------------------------------------------------------------

    def _message(self, end: int) -> Iterator[_Field]:
        """The fields of the message that ends at ``end``. Whatever of a field is not read is passed over."""
        while self._at < end:
            self._fields += 1
            if self._fields > MAX_FIELDS:
                raise self._damaged(f"has more than {MAX_FIELDS} fields")
            key = self._varint(end)
            number, wire, value, length = key >> 3, key & 7, 0, 0
            if wire == _VARINT:
                value = self._varint(end)
            elif wire == _BYTES:
                length = self._varint(end)
            elif wire in (_FIXED32, _FIXED64):
                length = 4 if wire == _FIXED32 else 8
            else:
                raise self._damaged(f"has wire type {wire} at byte {self._at}")
            if not 1 <= number < 2**29 or self._at + length > end:
                raise self._damaged(f"breaks off, or is no protobuf, at byte {self._at}")
            field = _Field(number, wire, value, self._at + length)
            yield field
            self._seek(field.end)

    def _bytes(self, field: _Field) -> int:
        """Where the message that the field holds ends."""
        if field.wire != _BYTES:
            raise self._damaged(f"has a number where a message belongs, at byte {self._at}")
        return field.end

    def _text(self, field: _Field) -> str:
        length = self._bytes(field) - self._at
        if length > MAX_TEXT:
            raise self._damaged(f"has a name of {length} bytes")
        try:
            return self._take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self._damaged(f"has a name that is not UTF-8, before byte {self._at}") from None

    def _varint(self, end: int) -> int:
        value = 0
        for shift in range(0, 70, 7):
            if self._at >= end:
                break
            byte = self._take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value >= 2**64:
                    break
                return value
        raise self._damaged(f"breaks off, or is no protobuf, at byte {self._at}")

    def _take(self, count: int) -> bytes:
        raw = self._file.read(count)
        if len(raw) != count:
            raise self._damaged(f"breaks off at byte {self._at + len(raw)}")
        self._at += count
        return raw

    def _seek(self, position: int) -> None:
        if position != self._at or position == 0:
            self._file.seek(position)
        self._at = position

    def _damaged(self, what: str) -> BundleError:
        return BundleError(f"{self._path}: is not an ONNX model, or is damaged: {what}", "copy or export it again")
