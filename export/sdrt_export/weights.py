"""Weights in float32, memory-mapped: whatever precision the checkpoint has, no copy of it in anonymous memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sdrt import strict_json
from sdrt.errors import BundleError, ExportError, quoted


def float32_state(paths: Iterable[Path], scratch: Path) -> dict[str, Any]:
    """The state dict of some safetensors files: torch float32 tensors mapped from the files.

    Files in another floating-point type are rewritten, tensor by tensor, as float32 files in ``scratch`` first.
    ExportError for a damaged file.
    """
    from safetensors import SafetensorError, safe_open

    state: dict[str, Any] = {}
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                names = list(file.keys())
                kinds = {file.get_slice(name).get_dtype() for name in names}
            reduced = bool(kinds & {"F16", "BF16", "F64"})
            mapped: Any = safe_open(
                _rewritten(path, scratch / f"{path.stem}.fp32.safetensors") if reduced else path, "pt"
            )
            state.update({name: mapped.get_tensor(name) for name in names})
        except (SafetensorError, OSError) as error:
            raise ExportError(f"{path}: cannot be read: {error}", "download the checkpoint again") from None
    return state


def check_half(folder: str, state: Mapping[str, Any]) -> None:
    """ExportError unless float16 holds each value of a state dict, which is that of the checkpoint's ``folder``."""
    from sdrt_engines.graph.storage import is_exact

    floats = [name for name, tensor in state.items() if tensor.is_floating_point()]
    if changed := [name for name in floats if not is_exact(state[name].numpy())]:
        raise ExportError(
            f"{folder}: float16 would change {len(changed)} of {len(floats)} weight tensors, {changed[0]} first",
            "export with --weights fp32, or round the checkpoint to float16",
        )


def float32_bytes(paths: Iterable[Path]) -> int:
    """Size of the files' tensors as float32, from their headers. ExportError for a damaged header."""
    total = 0
    for path in paths:
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > strict_json.MAX_BYTES:
                    raise ValueError(f"its header has {length} bytes, at most {strict_json.MAX_BYTES}")
                header = strict_json.parse(file.read(length), "its header")
            if not isinstance(header, dict):
                raise ValueError("its header is no object")
            total += sum(4 * math.prod(_shape(name, entry)) for name, entry in header.items() if name != "__metadata__")
        except BundleError as error:
            raise ExportError(f"{path}: {error.message}", "download the checkpoint again") from None
        except (OSError, ValueError) as error:
            raise ExportError(f"{path}: cannot be read: {error}", "download the checkpoint again") from None
    return total


def _shape(name: str, entry: object) -> list[int]:
    """One tensor's sizes; ValueError for what is none, or claims more than any file holds."""
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or len(shape) > 32 or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"tensor {quoted(name)} has no shape")
    if math.prod(shape) > 2**40:
        raise ValueError(f"tensor {quoted(name)} claims {math.prod(shape)} elements")
    return shape


def _rewritten(source: Path, target: Path) -> Path:
    """``source`` with every floating-point tensor as float32: a header, then one tensor after the other."""
    import torch
    from safetensors import safe_open

    with safe_open(source, "pt") as file, target.open("wb") as out:
        header: dict[str, Any] = {}
        offset = 0
        for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
            piece = file.get_slice(name)
            floating = piece.get_dtype() in ("F16", "BF16", "F64", "F32")
            shape = piece.get_shape()
            width = 4 if floating else file.get_tensor(name).element_size()
            end = offset + width * math.prod(shape)
            header[name] = {
                "dtype": "F32" if floating else piece.get_dtype(), "shape": shape, "data_offsets": [offset, end]
            }  # fmt: skip
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        out.write(len(text).to_bytes(8, "little") + text)
        for name in header:
            tensor = file.get_tensor(name)
            if tensor.is_floating_point():
                tensor = tensor.to(torch.float32)
            out.write(tensor.contiguous().numpy().tobytes())
    return target


def load_into(model: Any, state: dict[str, Any]) -> None:
    """Give the network these tensors without copying them. ExportError when names or shapes do not fit.

    Old checkpoints of diffusers' VAE call the attention layers by other names, which the model itself translates.
    transformers' CLIP has lost its ``text_model.`` prefix; a checkpoint may have it still.
    """
    wanted = set(model.state_dict())
    if hasattr(model, "_fix_state_dict_keys_on_load"):
        model._fix_state_dict_keys_on_load(state)
    for renamed in (
        {name.removeprefix("text_model."): tensor for name, tensor in state.items()},
        {f"text_model.{name}": tensor for name, tensor in state.items()},
    ):
        if not wanted <= set(state) and wanted <= set(renamed):
            state = renamed
    missing = sorted(wanted - set(state))
    extra = sorted(name for name in set(state) - wanted if not name.endswith("position_ids"))
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"holds {extra[0]}, which the network does not have"
        raise ExportError(
            f"the weights do not fit the config: the file {what} ({len(missing)} missing, {len(extra)} too many)",
            "the checkpoint's config.json and weights are of different models",
        )
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise ExportError(f"{name} is {list(state[name].shape)} in the weights, {list(shape)} by the config")
    model.load_state_dict({name: state[name] for name in wanted}, assign=True)
