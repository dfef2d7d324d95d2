"""Damaged Core ML packages: parity or the hashes tell, and nothing but sdrt's own errors comes out."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdrt import bundle as bundles
from sdrt.engine import BuildOptions, OpenOptions, open_session
from sdrt.errors import BundleError, NumericsError, SdrtError
from sdrt.verify import measure, passed
from sdrt_engines.build import build
from sdrt_engines.mil.evaluate import evaluate
from sdrt_engines.mil.package import MANIFEST, MODEL, WEIGHTS, read
from tests.conftest import Cli

pytest.importorskip("coremltools")
Model_pb2 = pytest.importorskip("coremltools.proto.Model_pb2")

PACKAGES = {"text_encoder": "TextEncoder", "unet": "Unet", "vae_decoder": "VAEDecoder"}


@pytest.fixture(scope="module")
def built(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "coreml"
    build(bundle, out, "coreml", BuildOptions(shapes=((64, 64),)))
    return out


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "copy"))


def package(root: Path, name: str) -> Path:
    return next(root.rglob(f"{PACKAGES[name]}.mlpackage"))


def worst(root: Path, name: str) -> float:
    """The lowest PSNR of a component's outputs, and that it is below the floor or not; NaN counts as nothing."""
    held = bundles.load(root)
    session = open_session(held, name, device="verifier", options=OpenOptions())
    figures = list(measure(held, name, session))
    session.close()
    assert figures
    return min(math.inf if f.psnr is None else f.psnr if f.psnr == f.psnr else -math.inf for f in figures)


@pytest.mark.parametrize("name", PACKAGES)
def test_whole(built: Path, name: str) -> None:
    assert worst(built, name) >= 90
    assert not bundles.damaged(bundles.load(built), lambda _: None)
