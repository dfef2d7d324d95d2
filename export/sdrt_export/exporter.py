"""``sdrt export``: one checkpoint → one ONNX bundle, each component in processes of its own."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import sdrt
from sdrt import bundle as bundles
from sdrt import errors, schedulers
from sdrt.bundle import Artifact, Bundle, Component, File, Manifest, Parity, Provenance
from sdrt.engine import ONNX
from sdrt.errors import ExportError
from sdrt.staging import new_directory
from sdrt_engines.graph.work import counted
from sdrt_export import checkpoint as checkpoints
from sdrt_export import families
from sdrt_export.checkpoint import Checkpoint
from sdrt_export.families import Facts, Family, Part
from sdrt_export.weights import float32_bytes

STAGES = {
    "import": 5, "weights": 1, "capture": 18, "lower": 32, "optimize": 10, "save": 8, "reference": 8, "check": 8,
}  # fmt: skip
"""What a component goes through, in order, and how its time divides (full-size SD 1.5; see benchmarks/LOG.md)."""

LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnxscript")


@dataclass(frozen=True)
class Progress:
    """What a running export is about to do, and the fraction of the whole, in [0, 1], that lies behind it."""

    component: str
    stage: str
    fraction: float


@dataclass(frozen=True)
class Estimate:
    """What an export will take, in bytes: ``disk`` for the bundle, ``memory`` resident in its largest process."""

    disk: int
    memory: int


Report = Callable[[Progress], object]

Storage = Literal["fp32", "fp16"]
"""In what the bundle stores weights. They are computed in float32 in either case."""


def export(
    model: str, out: str | Path, *, components: Sequence[str] = (), weights: Storage = "fp32",
    guidance_scale: float | None = None, force: bool = False, report: Report = lambda _: None,
) -> Bundle:  # fmt: skip
    """Export a checkpoint (a directory in diffusers' layout, or a Hub id) into the bundle ``out``.

    ``components``: some of the family's components only; none means all. ``weights``: ``fp16`` stores them so, in half
    the bytes, without loss: a checkpoint with a weight that float16 changes is an ExportError. ``guidance_scale``: that
    of requests which give none; None for the family's default. Each graph is checked against torch at every reference
    case; a failed check is an ExportError and leaves no bundle. Raises ExportError, BundleError.
    """
    out = Path(os.path.abspath(out))
    checkpoint = checkpoints.locate(model)
    family = families.find(checkpoint)
    parts = _chosen(family, checkpoint, components)
    if weights not in get_args(Storage):
        raise ExportError(f"weights are stored in {' or '.join(get_args(Storage))}, asked for {weights!r}")
    _check_disk(_estimate(checkpoint, parts, weights).disk, out)
    with new_directory(out, force=force, sources=[checkpoint.root]) as staging, ThreadPoolExecutor(1) as hashing:
        files = _copy_configs(checkpoint, family, staging)
        sources = hashing.submit(checkpoint.source_files, sorted({part.folder for part in parts}))
        made: dict[str, Component] = {}
        tracker = _Tracker(report, parts)
        for part in parts:
            made[part.name] = _export_part(checkpoint, family, part, staging, weights, tracker)
        manifest = _manifest(checkpoint, family, made, tuple(files), sources.result())
        if guidance_scale is not None:
            manifest = replace(manifest, guidance_scale=guidance_scale)
        bundles.save(staging, manifest)
    return bundles.load(out)


class _Tracker:
    def __init__(self, report: Report, parts: Sequence[Part]) -> None:
        self._report, self._parts = report, parts

    def at(self, part: Part, stage: str) -> None:
        stages = list(STAGES)
        behind = sum(STAGES[name] for name in stages[: stages.index(stage)]) / sum(STAGES.values()) * part.share
        behind += sum(other.share for other in self._parts[: self._parts.index(part)])
        self._report(Progress(part.name, stage, behind / sum(other.share for other in self._parts)))


def _chosen(family: Family, checkpoint: Checkpoint, components: Sequence[str]) -> list[Part]:
    parts = family.parts(checkpoint)
    names = [part.name for part in parts]
    if unknown := [name for name in components if name not in names]:
        raise ExportError(f"{family.NAME} has no component {unknown[0]!r}; it has {', '.join(names)}")
    return [part for part in parts if not components or part.name in components]


def estimate(model: str, components: Sequence[str] = (), weights: Storage = "fp32") -> Estimate:
    """What exporting these components will take. Raises as ``export`` does."""
    checkpoint = checkpoints.locate(model)
    return _estimate(checkpoint, _chosen(families.find(checkpoint), checkpoint, components), weights)


def _estimate(checkpoint: Checkpoint, parts: Sequence[Part], storage: Storage) -> Estimate:
    """Beside float32 weights: 20 MB of other files, and 0.8 GB of libraries and graph in memory, as was seen.

    Weights in another precision are rewritten beside the output while their component is exported; what is stored in
    float16 is written in float32 first.
    """
    paths = {part.folder: checkpoint.weights(part.folder) for part in parts}
    sizes = {folder: float32_bytes(files) for folder, files in paths.items()}
    rewritten = [size for folder, size in sizes.items() if size > 1.5 * sum(p.stat().st_size for p in paths[folder])]
    total = sum(sizes.values()) if storage == "fp32" else sum(sizes.values()) // 2 + max(sizes.values())
    return Estimate(total + max(rewritten, default=0) + 20 * 2**20, max(sizes.values()) + 8 * 10**8)


def _check_disk(need: int, out: Path) -> None:
    folder = out.parent  # the bundle is made beside its destination
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < need:
        raise ExportError(
            f"{folder}: {free >> 20} MiB free, the bundle needs {need >> 20} MiB",
            "make room, or choose another OUT",
        )


def _export_part(
    checkpoint: Checkpoint, family: Family, part: Part, staging: Path, storage: Storage, tracker: _Tracker
) -> Component:
    folder = staging / part.name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(checkpoint.config(part.folder), indent=2) + "\n", encoding="utf-8")
    job = {"root": str(checkpoint.root), "name": checkpoint.name, "family": family.NAME, "part": part.name}
    _work("trace", job | {"out": str(staging), "weights": storage}, lambda stage: tracker.at(part, stage))
    files = [f"{part.name}/{name}" for name in ("model.onnx", "model.onnx.data") if (folder / name).exists()]
    facts = {"weights": storage} if storage == "fp16" else {}

    def recorded(name: str) -> File | None:
        return bundles.record(staging, f"{part.name}/{name}") if (folder / name).exists() else None

    component = Component(
        inputs=part.inputs,
        outputs=part.outputs,
        artifact=Artifact(ONNX, "fp32", tuple(bundles.record(staging, file) for file in files), facts=facts),
        config=recorded("config.json"),
        reference=recorded("reference.npz"),
        constants=recorded("constants.npz"),
    )
    manifest = _manifest(checkpoint, family, {part.name: component}, (), ())
    job = {"out": str(staging), "manifest": json.loads(bundles.dumps(manifest)), "part": part.name}
    result = _work("check", job, lambda stage: tracker.at(part, stage))
    component = replace(component, work=counted(folder / "model.onnx", component, part.name))
    return bundles.with_parity(component, (Parity(**figure) for figure in result["parity"]))


def _work(step: str, job: dict[str, Any], stage: Callable[[str], None]) -> dict[str, Any]:
    """Run one step of the worker and return its result. Its errors are raised here as what they are."""
    command = [sys.executable, "-m", "sdrt_export.worker", step, json.dumps(job)]
    with tempfile.TemporaryFile() as log:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, stdin=subprocess.PIPE) as process:
            assert process.stdout is not None
            try:
                result = None
                for line in process.stdout:
                    message = json.loads(line)
                    if "stage" in message:
                        stage(message["stage"])
                    elif "error" in message:
                        error = message["error"]
                        raise getattr(errors, error["kind"])(error["message"], error["fix"])
                    else:
                        result = message["result"]
            except BaseException:
                process.kill()
                raise
        if process.returncode == 0 and result is not None:
            return dict(result)
        log.seek(0)
        said = log.read().decode(errors="replace").strip().splitlines()
    what = f"{job['part']}: the process that ran {step!r} died with exit status {process.returncode}"
    if process.returncode == -9:
        raise ExportError(
            f"{what}: killed, most likely for want of memory", "close other programs, or export on a larger machine"
        )
    raise ExportError(f"{what}: {said[-1] if said else 'it said nothing'}\n" + "\n".join(said[-12:]))


def _copy_configs(checkpoint: Checkpoint, family: Family, staging: Path) -> list[File]:
    """model_index.json, scheduler/ and the tokenizers' folders as diffusers lays them out."""
    files: list[File] = []

    def write(relative: str, text: str) -> None:
        path = staging / relative
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
        files.append(bundles.record(staging, relative))

    # What the bundle does not hold is named null, as diffusers does, so that other readers do not look for it.
    absent = ("safety_checker", "feature_extractor", "image_encoder")
    index = {k: [None, None] if k in absent else v for k, v in checkpoint.index.items() if k != "_name_or_path"}
    write("model_index.json", json.dumps({**index, "requires_safety_checker": False}, indent=2) + "\n")
    scheduler = schedulers.read_config(checkpoint.root / "scheduler" / "scheduler_config.json")
    write("scheduler/scheduler_config.json", json.dumps(scheduler, indent=2, allow_nan=False) + "\n")
    for text in family.facts(checkpoint).text_encoders:
        folder = text.tokenizer
        for name in ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"):
            if (checkpoint.root / folder / name).is_file():
                write(f"{folder}/{name}", (checkpoint.root / folder / name).read_text(encoding="utf-8"))
        vocabulary, merges = _bpe(checkpoint, folder)
        write(f"{folder}/vocab.json", vocabulary)
        write(f"{folder}/merges.txt", merges)
    return files


def _bpe(checkpoint: Checkpoint, folder: str) -> tuple[str, str]:
    """vocab.json and merges.txt; out of tokenizer.json where a newer transformers wrote nothing else."""
    vocabulary, merges = (checkpoint.root / folder / name for name in ("vocab.json", "merges.txt"))
    if vocabulary.is_file() and merges.is_file():
        return vocabulary.read_text(encoding="utf-8"), merges.read_text(encoding="utf-8")
    model = checkpoint.json(f"{folder}/tokenizer.json").get("model")
    if (
        not isinstance(model, dict)
        or not isinstance(model.get("vocab"), dict)
        or not isinstance(model.get("merges"), list)
    ):
        raise ExportError(f"{checkpoint.root / folder / 'tokenizer.json'}: holds no byte-pair vocabulary")
    lines = [" ".join(merge) if isinstance(merge, list) else str(merge) for merge in model["merges"]]
    return json.dumps(model["vocab"], ensure_ascii=False), "#version: 0.2\n" + "\n".join(lines) + "\n"


def _manifest(
    checkpoint: Checkpoint, family: Family, components: dict[str, Component], files: tuple[File, ...],
    sources: tuple[File, ...],
) -> Manifest:  # fmt: skip
    facts: Facts = family.facts(checkpoint)
    versions = {"sdrt": sdrt.__version__} | {name: importlib.metadata.version(name) for name in LIBRARIES}
    versions["onnxruntime"] = importlib.import_module("onnxruntime").__version__  # of one of several distributions
    return Manifest(
        family=family.NAME,
        components=components,
        text_encoders=tuple(text for text in facts.text_encoders if text.component in components),
        denoiser=facts.denoiser,
        latents=facts.latents,
        no_negative_prompt=facts.no_negative_prompt,
        guidance_scale=facts.guidance_scale,
        scheduler="scheduler/scheduler_config.json",
        files=files,
        provenance=Provenance(checkpoint.name, sources, versions),
    )
