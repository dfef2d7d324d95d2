"""Fixtures shared by all tests: tiny checkpoints from the real classes, their exports, and a way to call the CLI.

Exporting takes about a minute. SDRT_TEST_CACHE=DIR keeps checkpoints and bundles in DIR between runs; remove it after
changing the exporter.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import settings

from sdrt.pipeline import Pipeline

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = ROOT / "tests" / "data" / "clip_bpe_simple_vocab_16e6.txt.gz"

if "PYTEST_XDIST_WORKER" in os.environ:  # side by side, the workers are the threads; torch reads this when imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("sdrt", deadline=None, max_examples=100, derandomize=True)
settings.load_profile("sdrt")

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


def environment() -> dict[str, str]:
    """The environment of a subprocess that must find the sources, installed or not."""
    sources = [str(ROOT), str(ROOT / "export"), str(ROOT / "engines")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(sources), "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}


@pytest.fixture(scope="session")
def cli() -> Cli:
    """``cli("inspect", path)`` runs ``python -m sdrt inspect path`` and returns the finished process."""

    def run(*arguments: object, timeout: float = 500) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "error", "-m", "sdrt", *map(str, arguments)]
        return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout, check=False)

    return run


@pytest.fixture(scope="session")
def _store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kept = os.environ.get("SDRT_TEST_CACHE")
    if kept is None:
        own = tmp_path_factory.getbasetemp()
        store = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "store"  # one for all workers
        store.mkdir(exist_ok=True)
        return store
    Path(kept).mkdir(parents=True, exist_ok=True)
    return Path(kept)


@dataclass(frozen=True)
class Model:
    """A tiny checkpoint in diffusers' layout, and its ONNX bundle made by ``sdrt export``. Read only."""

    checkpoint: Path
    bundle: Path


@pytest.fixture(scope="session")
def models(_store: Path, cli: Cli) -> Callable[[str], Model]:
    """``models("sdxl")`` makes, once, a model of that name: ``tiny-sd`` (1.x), ``sd2``, ``sd2-v`` or ``sdxl``."""

    def make(name: str) -> Model:
        from sdrt_export import testing

        options: dict[str, dict[str, Any]] = {
            "tiny-sd": {},
            "sd2": {"architecture": "sd2"},
            "sd2-v": {"architecture": "sd2", "scheduler": testing.SD2V_SCHEDULER},
            "sdxl": {"architecture": "sdxl"},
        }
        model = Model(_store / name, _store / ("bundle" if name == "tiny-sd" else f"{name}-bundle"))
        with FileLock(_store / f"{name}.lock"):
            if not model.checkpoint.is_dir():
                making = _store / f"{name}-making"
                shutil.rmtree(making, ignore_errors=True)
                testing.make_checkpoint(making, VOCABULARY, **options[name])
                making.rename(model.checkpoint)
            if not model.bundle.is_dir():
                done = cli("export", model.checkpoint, model.bundle)
                assert done.returncode == 0, done.stderr
        return model

    return make


@pytest.fixture(scope="session")
def checkpoint(models: Callable[[str], Model]) -> Path:
    """A tiny SD 1.x checkpoint in diffusers' layout. Read only."""
    return models("tiny-sd").checkpoint


@pytest.fixture(scope="session")
def bundle(models: Callable[[str], Model]) -> Path:
    """The checkpoint's ONNX bundle, made by ``sdrt export``. Read only."""
    return models("tiny-sd").bundle


@pytest.fixture(scope="session")
def ort_bundle(tmp_path_factory: pytest.TempPathFactory, bundle: Path, cli: Cli) -> Path:
    """The bundle built for ONNX Runtime, any size. Read only."""
    path = tmp_path_factory.mktemp("ort") / "bundle"
    done = cli("build", bundle, path, "--engine", "onnxruntime")
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the ONNX bundle, to be damaged."""
    return Path(shutil.copytree(bundle, tmp_path / "copied"))


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> Iterator[Pipeline]:
    """The ONNX bundle, loaded with ONNX Runtime."""
    with Pipeline.from_pretrained(bundle) as made:
        yield made


@pytest.fixture
def null(bundle: Path) -> Iterator[Pipeline]:
    """The ONNX bundle with the null engine, which computes nothing."""
    with Pipeline.from_pretrained(bundle, engine="null") as made:
        yield made
