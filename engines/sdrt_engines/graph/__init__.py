"""Passes over ONNX graphs that several engines share. They need the onnx package, which only ``build`` asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdrt.errors import EngineUnavailable


def load_graph(path: Path) -> Any:
    """The ModelProto of a graph without its external weights. EngineUnavailable when onnx is not installed."""
    try:
        import onnx
    except ImportError as error:
        raise EngineUnavailable(f"building needs onnx, which cannot be imported: {error}", "pip install onnx") from None
    return onnx.load(str(path), load_external_data=False)
