"""A checkpoint on disk in diffusers' layout: where it is, what its configs say, where its weights lie."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from sdrt import strict_json
from sdrt.bundle import MANIFEST, File, check_relative, record
from sdrt.errors import BundleError, ExportError

T = TypeVar("T")

_WEIGHT_NAMES = ("diffusion_pytorch_model", "model")
_HUB_FILES = ["*.json", "*/*.json", "*/*.txt", "unet/*.safetensors", "vae/*.safetensors",
              "text_encoder/*.safetensors", "text_encoder_2/*.safetensors"]  # fmt: skip
_HUB_VARIANTS = ["*.fp16*", "*.bf16*", "*.non_ema*"]
"""Second copies of the weights, gigabytes each; fetched only from a repository that has nothing else."""


@dataclass(frozen=True)
class Checkpoint:
    """``name`` is what the user called it, without a machine's folders."""

    root: Path
    name: str

    @cached_property
    def index(self) -> dict[str, Any]:
        """model_index.json."""
        return self.json("model_index.json")

    def json(self, relative: str) -> dict[str, Any]:
        """One JSON object; ExportError when it is missing or damaged."""
        try:
            value = strict_json.read(self.root / relative)
        except BundleError as error:
            raise ExportError(error.message, "the checkpoint is incomplete: download it again") from None
        if not isinstance(value, dict):
            raise ExportError(f"{self.root / relative}: expected an object")
        return value

    def config(self, folder: str) -> dict[str, Any]:
        """``<folder>/config.json`` without keys that name a machine's folders."""
        return {k: v for k, v in self.json(f"{folder}/config.json").items() if k != "_name_or_path"}

    def need(self, folder: str, key: str, kind: type[T], default: T | None = None) -> T:
        """One value of a network's config; ExportError when it is missing without a default, or of another type."""
        value = self.config(folder).get(key, default)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            expected = {int: "an integer", float: "a number", str: "a text", list: "a list"}.get(kind, kind.__name__)
            raise ExportError(f"{self.name}: {folder}/config.json: {key} is {value!r}, expected {expected}")
        return value

    def weights(self, folder: str) -> list[Path]:
        """The safetensors files of one network: one, or the shards that its index lists. ExportError without any."""
        where = self.root / folder
        for variant in ("", ".fp32", ".non_ema", ".fp16", ".bf16"):
            for name in _WEIGHT_NAMES:
                single = where / f"{name}{variant}.safetensors"
                if single.is_file():
                    return [single]
                index = where / f"{name}.safetensors.index{variant}.json"
                if index.is_file():
                    return self._shards(folder, index)
        pickles = sorted(path.name for ending in ("*.bin", "*.ckpt", "*.pt") for path in where.glob(ending))
        if pickles:
            raise ExportError(
                f"{self.name}: {folder} has its weights in {pickles[0]}, a pickle, which can run code when it is read",
                "convert it where you trust it: diffusers' pipeline.save_pretrained(DIR, safe_serialization=True)",
            )
        raise ExportError(
            f"{self.name}: {folder} has no safetensors file",
            "the checkpoint is incomplete, or has pickles only (.bin), which can run code when they are read",
        )

    def _shards(self, folder: str, index: Path) -> list[Path]:
        shards = self.json(f"{folder}/{index.name}").get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise ExportError(f"{index}: has no weight_map")
        paths = []
        for name in sorted(set(shards.values())):
            check_relative(name)
            if not os.path.isfile(index.parent / name):  # Path.is_file raises for a name that is too long
                raise ExportError(
                    f"{index.parent / name}: is missing", "the checkpoint is incomplete: download it again"
                )
            paths.append(index.parent / name)
        return paths

    def source_files(self, folders: list[str]) -> tuple[File, ...]:
        """Hashes of the weights and configs that the folders hold."""
        paths = [path for folder in folders for path in [self.root / folder / "config.json", *self.weights(folder)]]
        return tuple(record(self.root, path.relative_to(self.root).as_posix()) for path in paths)


def locate(model: str) -> Checkpoint:
    """A local directory, or a Hub id (``stable-diffusion-v1-5/stable-diffusion-v1-5``). ExportError when neither."""
    path = Path(model)
    if os.path.isdir(path):
        if (path / MANIFEST).is_file():
            raise ExportError(f"{path}: is a bundle already", f"sdrt generate PROMPT -m {path}")
        if not (path / "model_index.json").is_file():
            raise ExportError(
                f"{path}: has no model_index.json, so it is not a checkpoint in diffusers' layout",
                "give the folder that holds unet/, vae/ and text_encoder/",
            )
        return Checkpoint(path, path.resolve().name)
    if os.path.isfile(path):
        raise ExportError(
            f"{path}: is a single file, expected a directory in diffusers' layout",
            "convert it: diffusers' StableDiffusionPipeline.from_single_file(FILE).save_pretrained(DIR)",
        )
    if model.count("/") != 1 or model.startswith((".", "/", "~")) or model.endswith("/"):
        raise ExportError(f"{model}: no such directory, and not a Hub id (OWNER/NAME)")
    return Checkpoint(_download(model), model)


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(model, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_VARIANTS))
        if not any(path.glob("unet/*.safetensors")):
            path = Path(snapshot_download(model, allow_patterns=_HUB_FILES))
        return path
    except LocalEntryNotFoundError:
        raise ExportError(
            f"{model}: no such directory here, and the Hugging Face Hub cannot be reached, nor is it in its cache",
            "give a local directory, or try again with a network",
        ) from None
    except HfHubHTTPError as error:
        raise ExportError(
            f"{model}: the Hugging Face Hub refused it: {str(error).splitlines()[0]}",
            "check the name; for a gated model run: hf auth login",
        ) from None
    except (OSError, ValueError) as error:
        raise ExportError(f"{model}: cannot be fetched from the Hugging Face Hub: {error}") from None
