"""Strict JSON ↔ frozen dataclasses: no key ignored, no value coerced, every error names the path to it."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import stat
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from sdrt.errors import BundleError, quoted, shortened

T = TypeVar("T")

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

MAX_BYTES = 16 * 2**20
MAX_DEPTH = 32


def read(path: Path) -> Json:
    """Parse one JSON file; BundleError when it is missing, too big, not UTF-8, not JSON, too deep or not finite."""
    return parse(read_bytes(path), str(path))


def read_bytes(path: Path) -> bytes:
    """A small file's content; BundleError when it cannot be read, is no file, or is larger than 16 MiB."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for its writer
            raise BundleError(f"{path}: cannot be read: it is not a file")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise BundleError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(raw) > MAX_BYTES:
        raise BundleError(f"{path}: larger than {MAX_BYTES} bytes; this is not a file that sdrt wrote")
    return raw


def parse(raw: bytes, where: str) -> Json:
    """Parse JSON text; duplicate keys, NaN, infinities and integers beyond 64 bits are refused."""
    try:
        value: Json = json.loads(
            raw.decode("utf-8"),
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            parse_int=_int64,
            object_pairs_hook=_unique_keys,
        )
    except RecursionError:
        raise BundleError(f"{where}: nested more than {MAX_DEPTH} levels deep") from None
    except ValueError as error:
        raise BundleError(f"{where}: not valid JSON: {error}") from None
    _check_depth(value, where)
    if b"\\ud" in raw.lower():  # only an escape can spell half a character; UTF-8 has none
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise BundleError(f"{where}: not valid JSON: a string holds a lone surrogate") from None
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {text[:32]} is out of range")
    return value


def _int64(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= (value := int(text)) < 2**64:
        raise ValueError(f"integer {text[:32]} is out of range")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {quoted(twice)} stands twice in one object")
    return result


def _check_depth(value: Json, where: str) -> None:
    level: list[Json] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return
    raise BundleError(f"{where}: nested more than {MAX_DEPTH} levels deep")


def encode(value: Any) -> Any:
    """Turn a dataclass tree into JSON values; fields that equal their default are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: encode(item)
            for field in dataclasses.fields(value)
            if (item := getattr(value, field.name)) != _default(field)
        }
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    return value


def decode(kind: type[T], value: Json, where: str) -> T:
    """Build the dataclass ``kind`` from parsed JSON. BundleError names the path of what does not fit."""
    return typing.cast(T, _decode(kind, value, where))


_NAMES = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "an integer",
          float: "a number", type(None): "null"}  # fmt: skip


@functools.cache
def _fields(kind: type) -> tuple[dict[str, Any], list[str]]:
    """A dataclass's fields with their types, and the names of those without a default."""
    hints, fields = typing.get_type_hints(kind), dataclasses.fields(kind)
    required = [field.name for field in fields if _default(field) is dataclasses.MISSING]
    return {field.name: hints[field.name] for field in fields}, required


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _short(key: str) -> str:
    """A key as a path to its content shows it: each value below it would copy a key of megabytes."""
    return shortened(key, 60)


def _wrong(where: str, expected: str, value: Json) -> BundleError:
    shown = json.dumps(value, ensure_ascii=False)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return BundleError(f"{where}: expected {expected}, got {_NAMES[type(value)]}: {shown}")


def _decode(kind: Any, value: Json, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _decode_object(typing.cast(type, kind), value, where)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(args, value, where)
    if origin is typing.Literal:
        if value not in args or isinstance(value, bool):
            raise _wrong(where, "one of " + ", ".join(map(repr, args)), value)
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong(where, "a list", value)
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        if len(value) != len(args):
            raise _wrong(where, f"a list of {len(args)}", value)
        return tuple(_decode(arg, item, f"{where}[{i}]") for i, (arg, item) in enumerate(zip(args, value, strict=True)))
    if origin is Mapping or origin is dict:
        if not isinstance(value, dict):
            raise _wrong(where, "an object", value)
        return {key: _decode(args[1], item, f"{where}.{_short(key)}") for key, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise _wrong(where, _NAMES[kind], value)
    return value


def _decode_union(args: tuple[Any, ...], value: Json, where: str) -> Any:
    if value is None and type(None) in args:
        return None
    rest = [arg for arg in args if arg is not type(None)]
    for arg in rest:
        if type(value) is arg:
            return value
    if len(rest) == 1:
        return _decode(rest[0], value, where)
    raise _wrong(where, " or ".join(_NAMES[arg] for arg in rest), value)


def _decode_object(kind: type, value: Json, where: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(where, "an object", value)
    hints, required = _fields(kind)
    if unknown := sorted(value.keys() - hints.keys()):
        known = ", ".join(hints)
        raise BundleError(f"{where}: unknown key {quoted(unknown[0])}; known keys: {known}")
    for name in required:
        if name not in value:
            raise BundleError(f"{where}: missing key {name!r}")
    made = {name: _decode(hints[name], item, f"{where}.{name}") for name, item in value.items()}
    try:
        return kind(**made)
    except BundleError as error:  # a dataclass's own checks know no path
        raise BundleError(f"{where}: {error.message}", error.fix) from None
