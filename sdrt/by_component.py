"""One value for all components, or one by component: ``int8``, or ``unet=int8,vae_decoder=fp16``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from sdrt.errors import InputError

T = TypeVar("T")


def parse(text: str, what: str) -> str | dict[str, str]:
    """``"int8"`` → ``"int8"``; ``"unet=int8,vae_decoder=fp16"`` → a dict. ``what``: the option's name, for errors."""
    if "=" not in text and "," not in text:
        if not (value := text.strip()):
            raise InputError(f"{what} is empty, expected a value, or {_GRAMMAR}")
        return value
    values: dict[str, str] = {}
    for item in text.split(","):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not (name and equals and value):
            raise InputError(f"{what} {text!r}: {item!r} is not component=value", f"{what} {_GRAMMAR}")
        if name in values:
            raise InputError(f"{what} {text!r}: {name} is named twice", "name each component once")
        values[name] = value
    return values


def text(value: str | Mapping[str, str]) -> str:
    """What ``parse`` makes ``value`` of."""
    return value if isinstance(value, str) else ",".join(f"{name}={each}" for name, each in value.items())


def resolve(value: T | Mapping[str, T], components: Iterable[str], default: T, what: str) -> dict[str, T]:
    """The value of each of ``components``: the one given, or the one by its name, else ``default``.

    InputError for the name of a component that is not there.
    """
    names = list(components)
    if not isinstance(value, Mapping):
        return dict.fromkeys(names, value)
    if unknown := [name for name in value if name not in names]:
        raise InputError(f"{what}: there is no component {unknown[0]!r}; the bundle holds {', '.join(names)}")
    return {name: value.get(name, default) for name in names}


_GRAMMAR = "unet=VALUE,vae_decoder=VALUE"
