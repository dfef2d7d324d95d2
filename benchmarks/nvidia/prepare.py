"""From a checkpoint to bundles for each engine, each made once: what is there already is taken as it is."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile

from benchmarks.nvidia.findings import Build
from sdrt import bundle as bundles
from sdrt import strict_json
from sdrt.bench import facts
from sdrt.bench.memory import MemorySampler
from sdrt.bench.process import TAIL, worker_environment
from sdrt.engine import find_engine
from sdrt.errors import BundleError, EngineUnavailable, SdrtError

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = ROOT / "tests" / "data" / "clip_bpe_simple_vocab_16e6.txt.gz"

Progress = Callable[[str], object]


@dataclass(frozen=True)
class Ours:
    """One of ours: an engine, what it is built as, and how it is opened.

    key: what ``--only`` calls it, and its folder, unless ``folder`` names another one's. targets: of ``--target`` at
    build the first that can be built counts; None leaves it out. extra, options: ``-O`` when building and opening.
    """

    key: str
    name: str
    engine: str
    precision: str
    targets: tuple[str | None, ...] = (None,)
    folder: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, str] = field(default_factory=dict)

    def at(self, out: Path) -> Path:
        """The engine bundle's folder."""
        return out / (self.folder or self.key)


ON_A_GPU = (
    Ours("tensorrt-rtx", "sdrt, TensorRT-RTX fp16", "tensorrt-rtx", "fp16", ("current", None)),
    Ours("tensorrt", "sdrt, TensorRT fp16", "tensorrt", "fp16"),
    Ours("onnxruntime", "sdrt, ONNX Runtime CUDA fp16", "onnxruntime", "fp16", ("cuda", None)),
    Ours(
        "onnxruntime-fused", "sdrt, ONNX Runtime CUDA fp16, fused", "onnxruntime", "fp16", ("cuda",),
        extra={"fusions": "all"},
    ),
    Ours(
        "onnxruntime-nhwc", "sdrt, ONNX Runtime CUDA fp16, fused, NHWC", "onnxruntime", "fp16", ("cuda",),
        "onnxruntime-fused", {"nhwc": "true"}, {"fusions": "all"},
    ),
)  # fmt: skip
ON_THE_CPU = (Ours("onnxruntime", "sdrt, ONNX Runtime fp32", "onnxruntime", "fp32"),)


def why_not(ours: Ours, device: str) -> str:
    """Why an engine cannot be used on this device, here; empty where it can."""
    try:
        held = [found.name for found in find_engine(ours.engine).devices()]
    except EngineUnavailable as error:
        return error.message
    return "" if device in held else f"{ours.engine} has no device {device} here; it has {', '.join(held)}"


def watched(command: Sequence[str], what: str) -> tuple[float, int]:
    """Seconds and peak resident bytes of a process and its children. SdrtError, with its last words, if it fails."""
    with TemporaryFile() as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=worker_environment() | {"COLUMNS": "120"}
        )
        try:
            with MemorySampler(process.pid) as sampler:
                code = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds, peak = time.perf_counter() - started, sampler.peak().rss
        log.seek(0)
        words = log.read().decode("utf-8", "replace").strip()[-TAIL:]
    if code:
        last = words.splitlines()
        told = "\n".join(last[next((i for i, line in enumerate(last) if line.startswith("Error")), -8) :])
        raise SdrtError(f"{what} ended with status {code}: {told or 'it said nothing'}")
    return seconds, peak


def checkpoint(path: Path, progress: Progress) -> None:
    """Full-size SD 1.5 architecture with random weights, where there is no checkpoint."""
    if (path / "model_index.json").is_file():
        return
    progress(f"{path}: random weights, 4 GB")
    making = path.with_name(f"{path.name}.making")
    shutil.rmtree(making, ignore_errors=True)
    command = [sys.executable, "-m", "sdrt_export.testing", str(making), "--size", "full"]
    watched([*command, "--vocabulary", str(VOCABULARY)], "making a checkpoint")
    making.rename(path)


def exported(path: Path, out: Path, progress: Progress) -> bundles.Bundle:
    """The checkpoint's ONNX bundle, ``out/onnx``. BundleError where that is of another checkpoint."""
    there, source = out / "onnx", out / "onnx.json"
    if (there / bundles.MANIFEST).is_file():
        held = bundles.load(there)
        if source.is_file() and strict_json.read(source) != str(path.resolve()):
            raise BundleError(f"{there} was exported from {strict_json.read(source)}, not from {path}", "another OUT")
        return held
    progress("export")
    watched([sys.executable, "-m", "sdrt", "export", str(path), str(there)], "sdrt export")
    source.write_text(json.dumps(str(path.resolve())) + "\n", encoding="utf-8")
    return bundles.load(there)


def built(
    ours: Ours, onnx: bundles.Bundle, out: Path, shape: tuple[int, int], batch: int, about: str, progress: Progress
) -> Build:
    """Build it, unless it was built of the same for the same; the account of it, with why not where it failed.

    about: the card and its driver: what is built for one is no other one's.
    """
    made = Build(ours.name, ours.engine, ours.precision, version=_version(ours.engine))
    unet = onnx.component(onnx.manifest.denoiser.component).artifact.files[0].sha256
    extra = [f"{name}={value}" for name, value in ours.extra.items()]
    key = [
        _sources(),
        about,
        ours.engine,
        ours.precision,
        *extra,
        made.version,
        *map(str, shape),
        str(batch),
        str(unet),
    ]
    folder, account = ours.at(out), ours.at(out).with_suffix(".json")
    if (folder / bundles.MANIFEST).is_file() and account.is_file():
        held = strict_json.read(account)
        if isinstance(held, dict) and held.get("key") == key:
            return dataclasses.replace(strict_json.decode(Build, held.get("build"), str(account)), name=ours.name)
    failures = []
    for target in ours.targets:
        progress(f"{ours.name}: build" + (f" for {target}" if target else ""))
        command = [sys.executable, "-m", "sdrt", "build", str(onnx.root), str(folder), "--force"]
        command += ["--engine", ours.engine, "--precision", ours.precision, "--batch", str(batch)]
        command += ["--shape", f"{shape[0]}x{shape[1]}", *(["--target", target] if target else [])]
        command += [word for option in extra for word in ("-O", option)]
        try:
            seconds, peak = watched(command, f"sdrt build{f' --target {target}' if target else ''}")
        except SdrtError as error:
            failures.append(error.message)
            continue
        held_bundle = bundles.load(folder)
        artifacts = [component.artifact for component in held_bundle.manifest.components.values()]
        made = dataclasses.replace(
            made, target=str(artifacts[0].target), seconds=round(seconds, 1), peak_rss=peak,
            plan=sum(file.bytes for artifact in artifacts for file in artifact.files),
        )  # fmt: skip
        account.write_text(json.dumps({"key": key, "build": strict_json.encode(made)}) + "\n", encoding="utf-8")
        return made
    return dataclasses.replace(made, failure="; ".join(failures))


@functools.cache
def _sources() -> str:
    """A hash of the code that builds: a bundle of other code is built again."""
    held = hashlib.sha256()
    for file in sorted(path for folder in ("sdrt", "engines") for path in (ROOT / folder).rglob("*.py")):
        held.update(file.read_bytes())
    return held.hexdigest()


def _version(engine: str) -> str:
    """Of the distribution that an engine stands on."""
    names = {"onnxruntime": ("onnxruntime-gpu", "onnxruntime")}.get(engine, (engine,))
    return next(iter(facts.versions(names).values()), "")
