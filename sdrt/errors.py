"""The error tree: every error that sdrt raises on purpose is an ``SdrtError`` and says what, got, expected, fix."""

from __future__ import annotations

from typing import Any

MAX_MESSAGE = 1500
"""Characters. A message quotes what it got, and that may be megabytes of a damaged file; a person reads it."""


def shortened(text: str, most: int = MAX_MESSAGE) -> str:
    """The text, without its middle when it is longer: what is wrong stands first, what was expected often last."""
    return text if len(text) <= most else f"{text[: most * 2 // 3]} ... {text[-(most // 3) :]}"


def quoted(value: object, most: int = 80) -> str:
    """``repr`` for a message: short, and of any value; that of an integer beyond Python's limit on digits raises."""
    try:
        return shortened(repr(value), most)
    except ValueError:
        return f"a value of type {type(value).__name__} that is too long to show"


class SdrtError(Exception):
    """Base of all errors raised on purpose.

    ``message`` says what went wrong (what, got, expected); ``fix`` says what to do next, preferably as a command.
    """

    def __init__(self, message: str, fix: str = "") -> None:
        message = shortened(message)
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message}\n  fix: {self.fix}" if self.fix else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.fix)


class BundleError(SdrtError):
    """A bundle on disk is missing, damaged, of an unknown version, or cannot be written."""


class ExportError(SdrtError):
    """A checkpoint cannot be exported, or its graph does not compute what torch computes."""


class BuildError(SdrtError):
    """An engine cannot be built from a bundle."""


class EngineUnavailable(SdrtError):  # noqa: N818 - a state, not a fault
    """An engine is unknown, or its library is not installed or not usable on this machine."""


class DeviceError(SdrtError):
    """A device is unknown to the engine, or not what the artifact was built for."""


class ElsewhereError(DeviceError):
    """What was built is for other machines than this one."""


class InputError(SdrtError, ValueError):
    """An argument or a tensor has a wrong name, type, shape or value."""


class NumericsError(SdrtError):
    """A component produced NaN or infinity."""


class Cancelled(SdrtError):  # noqa: N818 - asked for, not a fault
    """A generation was stopped by its caller. ``step`` is the last step that was completed, or None."""

    def __init__(self, message: str, fix: str = "", step: Any = None) -> None:
        super().__init__(message, fix)
        self.step = step

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.fix, self.step)
