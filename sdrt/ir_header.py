"""What an OpenVINO IR file (``.xml``) says about itself, read without openvino: inputs, outputs, precision.

The file is walked as a stream of elements; of ``net/layers`` and ``net/edges`` only what is named below is looked at.
https://docs.openvino.ai/2026/documentation/openvino-ir-format.html
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from xml.parsers import expat

from sdrt.bundle import DType, Precision
from sdrt.errors import BundleError
from sdrt.header import MAX_RANK, Header, Size, Value, check_no_pointer

MAX_BYTES = 32 * 2**20
"""Of a file; weights lie in another one. The U-Net of SD 1.5 has 1.4 MB."""

MAX_ELEMENTS = 1_000_000
"""In one file. The U-Net of SD 1.5 has some 36,000."""

MAX_DEPTH = 64
MAX_TEXT = 16_384
"""Characters of an attribute that is looked at: the names of one tensor are one attribute."""

VERSIONS = ("10", "11")

_CHUNK = 2**20
_DTYPES: dict[str, DType] = {
    "f32": "f32", "f16": "f16", "bf16": "bf16", "i64": "i64", "i32": "i32", "u8": "u8", "i8": "i8", "boolean": "bool",
}  # fmt: skip
_PORT_DTYPES: dict[str, DType] = {
    "FP32": "f32", "FP16": "f16", "BF16": "bf16", "I64": "i64", "I32": "i32", "U8": "u8", "I8": "i8", "BOOL": "bool",
}  # fmt: skip
_FLOATS: dict[str, Precision] = {"f32": "fp32", "f16": "fp16", "bf16": "bf16"}
_FOUR_BITS, _EIGHT_BITS = {"i4", "u4", "nf4"}, {"i8", "u8"}
_NO_WEIGHTS = {"boolean", "i16", "i32", "i64", "u16", "u32", "u64", "f64", "string"}
"""Types of indices, shapes and masks, and of numbers that are folded before anything runs."""

_LAYER = ("net", "layers", "layer")
_DATA, _PORT, _EDGE = (*_LAYER, "data"), (*_LAYER, "output", "port"), ("net", "edges", "edge")
_DIM = (*_PORT, "dim")


def read(path: Path) -> Header:
    """Read one ``.xml`` file's header; its weights are in the ``.bin`` of the same name. BundleError names the file."""
    try:
        with path.open("rb") as file:
            if (size := os.fstat(file.fileno()).st_size) > MAX_BYTES:
                raise _damaged(path, f"has {size} bytes, at most {MAX_BYTES} are read")
            walk = _Walk(path)
            while chunk := file.read(_CHUNK):
                walk.feed(chunk)
            return walk.header()
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror or error}") from None


def _damaged(path: Path, what: str) -> BundleError:
    return BundleError(f"{path}: is not OpenVINO IR, or is damaged: {what}", "copy or export it again")


@dataclass
class _Port:
    """One output of a layer that has names. ``dims``: the text of each."""

    names: str
    precision: str
    dims: list[str]


class _Walk:
    """One pass over a file. ``_at`` is the path of elements down to the present one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at: tuple[str, ...] = ()
        self._elements = 0
        self._start = b""
        self._kind, self._id = "", ""  # of the layer
        self._data: dict[str, str] = {}
        self._port: _Port | None = None
        self._ports: dict[tuple[str, str], _Port] = {}  # by layer and port
        self._inputs: list[Value] = []
        self._results: dict[str, tuple[str, str] | None] = {}  # layer → what feeds it
        self._constants: Counter[str] = Counter()  # bytes by element type
        self._quantized = False
        self._parser = expat.ParserCreate("UTF-8")  # whatever encoding the file claims
        self._parser.buffer_text = True
        self._parser.StartElementHandler = self._begin
        self._parser.EndElementHandler = self._finish
        self._parser.CharacterDataHandler = self._text
        self._parser.StartDoctypeDeclHandler = self._doctype

    def feed(self, chunk: bytes) -> None:
        if not self._start:
            self._start = chunk[:20]
            check_no_pointer(self._path, self._start)
        self._parse(chunk)

    def header(self) -> Header:
        """What was found, now that the file is at its end."""
        self._parse(b"", last=True)
        inputs, outputs = tuple(self._inputs), tuple(self._output(layer) for layer in self._results)
        if not inputs or not outputs:
            raise self._damaged("has no inputs, or no outputs")
        return Header(inputs, outputs, (self._path.with_suffix(".bin").name,), self._precision())

    def _parse(self, chunk: bytes, *, last: bool = False) -> None:
        try:
            self._parser.Parse(chunk, last)
        except (expat.ExpatError, UnicodeError) as error:
            raise self._damaged(str(error)) from None

    # -- events -------------------------------------------------------------------------------------------------------

    def _doctype(self, *_: object) -> None:
        raise self._damaged("declares a document type, in which entities could be")

    def _begin(self, tag: str, attributes: dict[str, str]) -> None:
        self._elements += 1
        if self._elements > MAX_ELEMENTS or len(self._at) >= MAX_DEPTH:
            raise self._damaged(f"has more than {MAX_ELEMENTS} elements, or more than {MAX_DEPTH} in each other")
        self._at = (*self._at, tag)
        if len(self._at) == 1:
            version = attributes.get("version", "")
            if tag != "net" or version not in VERSIONS:
                raise self._damaged(
                    f"is a {tag[:40]!r} of version {version[:40]!r}, expected 'net' of version 10 or 11"
                )
        elif self._at == _LAYER:
            self._kind, self._id, self._data = self._value(attributes, "type"), self._value(attributes, "id"), {}
            self._quantized |= self._kind == "FakeQuantize"
            if self._kind == "Result":
                self._results[self._id] = None
        elif self._at == _DATA and self._kind in ("Parameter", "Const"):
            self._data = attributes
        elif self._at == _PORT and attributes.get("names"):
            self._port = _Port(self._value(attributes, "names"), self._value(attributes, "precision"), [])
            key = (self._id, self._value(attributes, "id"))
            if key in self._ports:
                raise self._damaged(f"has port {key[1][:40]!r} of layer {key[0][:40]!r} twice")
            self._ports[key] = self._port
        elif self._at == _DIM and self._port is not None:
            self._port.dims.append("")
            if len(self._port.dims) > MAX_RANK:
                raise self._damaged(f"has a tensor of more than {MAX_RANK} dimensions")
        elif self._at == _EDGE and (to := attributes.get("to-layer")) in self._results:
            if self._results[to] is not None:
                raise self._damaged(f"has two edges to the output {to[:40]!r}")
            self._results[to] = (self._value(attributes, "from-layer"), self._value(attributes, "from-port"))

    def _finish(self, tag: str) -> None:
        if self._at == _PORT:
            self._port = None
        elif self._at == _LAYER and self._kind == "Parameter":
            self._inputs.append(self._input())
        elif self._at == _LAYER and self._kind == "Const":
            self._constant()
        self._at = self._at[:-1]

    def _text(self, text: str) -> None:
        if self._at == _DIM and self._port is not None:
            if len(self._port.dims[-1]) + len(text) > 40:
                raise self._damaged("has a dimension that is no number")
            self._port.dims[-1] += text

    # -- layers -------------------------------------------------------------------------------------------------------

    def _input(self) -> Value:
        port = self._ports.get((self._id, "0"))
        if port is None:
            raise self._damaged(f"has an input without a name, layer {self._id[:40]!r}")
        name, *aliases = _names(port.names)
        kind, shape = self._value(self._data, "element_type"), self._value(self._data, "shape")
        if kind not in _DTYPES:
            raise self._damaged(f"{name[:40]!r} has element type {kind[:40]!r}, which a bundle cannot say")
        return Value(name, _DTYPES[kind], self._shape(name, shape.split(",") if shape.strip() else []), tuple(aliases))

    def _output(self, layer: str) -> Value:
        port = self._ports.get(self._results[layer] or ("", ""))
        if port is None:
            raise self._damaged(f"has an output that nothing with a name feeds, layer {layer[:40]!r}")
        name, *aliases = _names(port.names)
        if port.precision not in _PORT_DTYPES:
            raise self._damaged(f"{name[:40]!r} has precision {port.precision[:40]!r}, which a bundle cannot say")
        return Value(name, _PORT_DTYPES[port.precision], self._shape(name, port.dims), tuple(aliases))

    def _shape(self, name: str, dims: list[str]) -> tuple[Size, ...]:
        if len(dims) > MAX_RANK:
            raise self._damaged(f"has a tensor of more than {MAX_RANK} dimensions")
        try:
            return tuple(_size(dim.strip()) for dim in dims)
        except ValueError:
            raise self._damaged(f"does not say what shape {name[:40]!r} has") from None

    def _constant(self) -> None:
        kind, size = self._value(self._data, "element_type"), self._value(self._data, "size")
        if kind not in _FOUR_BITS | _EIGHT_BITS | _NO_WEIGHTS | set(_FLOATS):
            raise BundleError(
                f"{self._path}: has weights of element type {kind[:40]!r} of OpenVINO, which no precision stands for",
                "use float32, float16, int8 or int4 weights",
            )
        if not re.fullmatch(r"[0-9]{1,18}", size):
            raise self._damaged(f"has a constant of {size[:40]!r} bytes")
        self._constants[kind] += int(size)

    def _precision(self) -> Precision:
        if _FOUR_BITS & set(self._constants):
            return "w4"
        if _EIGHT_BITS & set(self._constants):
            return "int8" if self._quantized else "w8"
        return _FLOATS[max(_FLOATS, key=lambda kind: self._constants[kind])]

    def _value(self, attributes: dict[str, str], name: str) -> str:
        """An attribute that is needed, of bounded length."""
        value = attributes.get(name)
        if value is None or len(value) > MAX_TEXT:
            raise self._damaged(f"a {self._at[-1][:40]!r} has no {name!r}, or one of more than {MAX_TEXT} characters")
        return value

    def _damaged(self, what: str) -> BundleError:
        return _damaged(self._path, what)


def _names(text: str) -> list[str]:
    """Names between commas; a comma in a name has a backslash before it."""
    return [name.replace("\\,", ",") for name in re.split(r"(?<!\\),", text)]


def _size(text: str) -> Size:
    """``77``, ``1..77``; ``?``, ``-1``, and ranges without an upper end, are free. ValueError for anything else."""
    if text in ("?", "-1"):
        return None
    found = re.fullmatch(r"([0-9]{1,18})|([0-9]{0,18})\.\.([0-9]{0,18})", text)
    if found is None or text == "..":
        raise ValueError(text)
    if found[1]:
        return int(found[1])
    if not found[3]:
        return None
    low, high = max(1, int(found[2] or 0)), int(found[3])
    if low > high:
        raise ValueError(text)
    return high if low == high else (low, high)
