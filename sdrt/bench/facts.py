"""What a report says of a bundle beside its figures."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sdrt.bundle import MANIFEST, Bundle
from sdrt.engine import default_engine, find_engine
from sdrt.errors import EngineUnavailable


def components(bundle: Bundle) -> tuple[str, ...]:
    """What making a picture from a text runs."""
    facts = bundle.manifest
    return (*(text.component for text in facts.text_encoders), facts.denoiser.component, "vae_decoder")


def engines(bundle: Bundle, engine: str | None) -> list[str]:
    """The engines that open these components, each once."""
    return list(dict.fromkeys(engine or default_engine(bundle.component(name)) for name in components(bundle)))


def files(bundle: Bundle) -> tuple[Path, ...]:
    """What loading reads, but for configs and tokenizer."""
    return tuple(
        bundle.path(file.path) for name in components(bundle) for file in bundle.component(name).artifact.files
    )


def cached(folder: str | None) -> tuple[Path, ...]:
    """The files that a cache of compiled models holds by now."""
    return tuple(path for path in Path(folder).rglob("*") if path.is_file()) if folder is not None else ()


def devices(bundle: Bundle, engine: str | None) -> dict[str, dict[str, str]]:
    """Engine → device → what it is, for the engines that open the bundle; what cannot be used here is left out."""
    found = {}
    for name in engines(bundle, engine):
        with contextlib.suppress(EngineUnavailable):
            found[name] = {device.name: device.description for device in find_engine(name).devices()}
    return found


def versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of the distributions of these names that are installed; what is part of sdrt has none of its own."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe(bundle: Bundle) -> dict[str, Any]:
    """The fields ``sha256``, ``precision`` and ``disk`` of ``sdrt.bench.report.Variant``."""
    manifest = bundle.root / MANIFEST
    ran = [(name, bundle.component(name).artifact) for name in components(bundle)]
    return {
        "sha256": hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else None,
        "precision": {name: artifact.precision for name, artifact in ran},
        "disk": sum(file.bytes for _, artifact in ran for file in artifact.files),
    }
