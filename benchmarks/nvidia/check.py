"""What has to be seen first on a machine with an NVIDIA GPU, in order: does it work at all? The demo model throughout.

Each check is a process of its own: a library that ends the process, or breaks the GPU for it, ends one check.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.nvidia.findings import Aligned
from benchmarks.nvidia.prepare import Ours, Progress, watched
from sdrt import bundle as bundles
from sdrt import processor
from sdrt.bench import facts
from sdrt.bench.process import TAIL, worker_environment
from sdrt.bundle import SHIPPED, Bundle, Precision, solve
from sdrt.engine import NUMPY_DTYPES, BuildOptions, OpenOptions, find_engine, open_session
from sdrt.errors import EngineUnavailable, SdrtError
from sdrt.verify import measure, passed, reference_cases
from sdrt_engines import cuda
from sdrt_engines.build import build

DEMO = SHIPPED / "demo"
PRECISION: Precision = "fp16"
SECONDS = 900
"""Longer than this, no check takes."""
MARK = "sdrt-check "
"""Before what a check says: libraries print, too."""


@dataclass(frozen=True)
class Here:
    """Where a check runs: a folder that all checks share, and the GPU."""

    out: Path
    device: str

    @property
    def gpu(self) -> cuda.Gpu:
        """The GPU."""
        return cuda.gpus()[int(self.device.partition(":")[2])]


Check = Callable[[Here], Iterator[str]]
"""Says what it saw, piece by piece. SdrtError: failed, and why; ``Skipped``: there is nothing to check."""


class Skipped(Exception):  # noqa: N818 - a state, not a fault
    """There is nothing to check here, and why."""


# -- what they share --------------------------------------------------------------------------------------------------


def _need(engine: str, device: str) -> None:
    """Skipped where the engine cannot be used on that device."""
    try:
        held = [found.name for found in find_engine(engine).devices()]
    except EngineUnavailable as error:
        raise Skipped(error.message) from None
    if device not in held:
        raise Skipped(f"{engine} has no {device} here; it has {', '.join(held)}")


def _demo(
    here: Here, engine: str, target: str | None = None, precision: Precision = PRECISION,
    extra: Mapping[str, str] | None = None,
) -> Bundle:  # fmt: skip
    """The demo model, built for all sizes of its reference vectors; once for the same options. It is not checked."""
    _need(engine, here.device)
    words = "-".join(
        (engine, precision, *([target] if target else []), *(f"{k}-{v}" for k, v in (extra or {}).items()))
    )
    folder = here.out / words
    if not (folder / bundles.MANIFEST).is_file():
        origin = bundles.load(DEMO)
        name = origin.manifest.denoiser.component
        specs = origin.component(name).inputs
        shapes: dict[tuple[int, int], None] = {}
        most = 1
        for inputs, _ in reference_cases(origin, name).values():
            sizes = solve(specs, {tensor: array.shape for tensor, array in inputs.items()})
            shapes[sizes["W"], sizes["H"]] = None
            most = max(most, sizes["B"])
        options = BuildOptions(precision, tuple(shapes), most, target, extra=extra or {})
        build(DEMO, folder, engine, options)
    return bundles.load(folder)


def _best_target(here: Here, engine: str) -> Bundle:
    """As ``_demo``, for the target that the benchmark would build for."""
    if engine != "onnxruntime":
        return _demo(here, engine)
    try:
        return _demo(here, engine, "cuda")
    except SdrtError:
        return _demo(here, engine)


def _verified(held: Bundle, here: Here, names: Sequence[str] = ()) -> Iterator[str]:
    """Each component's worst figure against its reference vectors; SdrtError, at the end, if one failed."""
    bad = []
    for name in names or held.manifest.components:
        precision = held.component(name).artifact.precision
        try:
            session = open_session(held, name, device=here.device)
            try:
                figures = list(measure(held, name, session))
            finally:
                session.close()
        except SdrtError as error:
            bad.append(f"{name}: {error.message}")
            continue
        worst = min((p.psnr for p in figures if p.psnr is not None), default=None)
        yield f"{name} {'equal' if worst is None else f'{worst:.0f} dB'} ({len(figures)})"
        bad += [f"{name}: {p.output} at {p.case} {p.psnr} dB" for p in figures if not passed(p, precision)]
    if bad:
        raise SdrtError("; ".join(bad))


def _first_case(held: Bundle, name: str) -> dict[str, Any]:
    """Inputs of a reference case that the bundle was built for."""
    inputs: dict[str, Any] = next(iter(reference_cases(held, name).values()))[0]
    return {
        spec.name: inputs[spec.name].astype(NUMPY_DTYPES["f32" if spec.dtype == "f16" else spec.dtype])
        for spec in held.component(name).inputs
    }


# -- the checks -------------------------------------------------------------------------------------------------------


def driver(here: Here) -> Iterator[str]:
    gpu = here.gpu
    told = processor.said("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    yield f"{gpu.name}, {gpu.target}, {gpu.memory / 1e9:.1f} GB, CUDA {cuda.driver_version()}"
    yield f"nvidia-smi: {'; '.join(told.splitlines()) or 'says nothing'}"
    cuda.use(gpu.index)
    free, total = cuda.memory()
    yield f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    names = ("tensorrt-rtx", "tensorrt", "onnxruntime-gpu", "onnxruntime", "cuda-bindings", "torch", "nvidia-ml-py")
    yield ", ".join(f"{name} {version}" for name, version in facts.versions(names).items())


def fingerprints(here: Here) -> Iterator[str]:
    fingerprint: Any = importlib.import_module("sdrt_engines.trt.fingerprint")
    library: Any = importlib.import_module("sdrt_engines.trt.library")
    for one in (library.TENSORRT_RTX, library.TENSORRT):
        try:
            yield f"{one.engine}: {json.dumps(fingerprint.facts(one, here.gpu, cuda.driver_version()))}"
        except EngineUnavailable as error:
            yield f"{one.engine}: {error.message}"


def _components(engine: str) -> Check:
    def check(here: Here) -> Iterator[str]:
        held = _best_target(here, engine)
        yield f"{held.component('unet').artifact.target}"
        yield from _verified(held, here)

    return check


def _fused(here: Here) -> Iterator[str]:
    """ONNX Runtime's fused kernels give the numbers of the graph that they took the place of."""
    yield from _verified(_demo(here, "onnxruntime", "cuda", extra={"fusions": "all"}), here)


def _plain_fp32(here: Here) -> Iterator[str]:
    """float32, built; and of the ONNX bundle as it is, which ONNX Runtime opens too, what has kernels for all of it."""
    yield from _verified(_demo(here, "onnxruntime", "cuda", "fp32"), here)
    plain = bundles.load(DEMO)
    names = [name for name in plain.manifest.components if name != "text_encoder"]  # its ArgMax has none
    yield from (f"as exported: {told}" for told in _verified(plain, here, names))


def _graphs(engine: str) -> Check:
    def check(here: Here) -> Iterator[str]:
        held = _best_target(here, engine)
        for name in ("unet", "vae_decoder"):
            inputs, made, took = _first_case(held, name), [], []
            for value in ("true", "false"):
                options = OpenOptions(extra={"graphs": value})
                session = open_session(held, name, device=here.device, options=options)
                try:
                    for _ in range(3):
                        started = time.perf_counter()
                        outputs = session.run(**inputs)
                        seconds = time.perf_counter() - started
                    took.append(seconds)
                    made.append(next(iter(outputs.values())))
                finally:
                    session.close()
            far = float(np.abs(made[0] - made[1]).max())
            yield f"{name}: {took[0] * 1e3:.2f} ms recorded, {took[1] * 1e3:.2f} ms not, {far:g} apart"
            if far > 0:
                raise SdrtError(f"{name}: what was recorded computes something else: {far:g} apart")

    return check


def _validity(here: Here) -> Iterator[str]:
    """What TensorRT-RTX says of plans and this card; of SM 90 nothing is documented."""
    library: Any = importlib.import_module("sdrt_engines.trt.library")
    _need("tensorrt-rtx", here.device)
    yield here.gpu.target
    bad = []
    for target in ("any", "current"):
        try:
            held = _demo(here, "tensorrt-rtx", target)
            trt = library.TENSORRT_RTX.load()
            runtime = trt.Runtime(library.speaker(trt))
            content = held.path(held.component("unet").artifact.files[0].path).read_bytes()
            validity, diagnostics = runtime.get_engine_validity(content)
            yield f"{target}: {validity.name}, {int(diagnostics)}"
            yield from (f"{target}: {told}" for told in _verified(held, here, ("unet",)))
        except SdrtError as error:
            bad.append(f"{target}: {error.message}")
    if bad:
        raise SdrtError("; ".join(bad))


def _option(**extra: str) -> Check:
    def check(here: Here) -> Iterator[str]:
        failures = []
        for engine in ("tensorrt-rtx", "tensorrt"):
            try:
                held = _demo(here, engine, extra=extra)
                size = sum(f.bytes for f in held.component("unet").artifact.files if f.path.endswith(".plan"))
                yield f"{engine}: U-Net's plan {size / 1e6:.1f} MB"
                yield from (f"{engine}: {told}" for told in _verified(held, here))
            except Skipped as skipped:
                yield f"{engine}: {skipped}"
            except SdrtError as error:
                failures.append(f"{engine}: {error.message}")
        if failures:
            raise SdrtError("; ".join(failures))

    return check


def _cache(here: Here) -> Iterator[str]:
    """Kernels that TensorRT-RTX compiled are found again by the next opening, and are not written again."""
    held = _best_target(here, "tensorrt-rtx")
    inputs = _first_case(held, "unet")
    with tempfile.TemporaryDirectory(dir=here.out) as folder:
        cache, took, kept = Path(folder), [], []
        for _ in range(2):
            session = open_session(held, "unet", device=here.device, options=OpenOptions(cache=cache))
            try:
                started = time.perf_counter()
                session.run(**inputs)
                took.append(time.perf_counter() - started)
            finally:
                session.close()
            kept.append({file.name: file.read_bytes() for file in cache.glob("*.blob")})
        yield f"first call {took[0]:.2f} s, from the cache {took[1]:.2f} s"
        yield f"{sum(map(len, kept[1].values())) / 1e6:.2f} MB kept"
        if not kept[0]:
            raise SdrtError("nothing was kept")
        if kept[0].keys() != kept[1].keys():
            raise SdrtError("the second opening did not look where the first one had written")
        yield "written again" if kept[0] != kept[1] else "as it was"


def _fallback(here: Here) -> Iterator[str]:
    """ONNX Runtime's CUDA provider is really used, for every node."""
    _need("onnxruntime", here.device)
    providers: Any = importlib.import_module("sdrt_engines.onnxruntime_providers")
    bad = []
    for held in (_demo(here, "onnxruntime", "cuda", "fp32"), _best_target(here, "onnxruntime")):
        for name in held.manifest.components:
            precision = held.component(name).artifact.precision
            try:
                session: Any = find_engine("onnxruntime").open(held, name, here.device, OpenOptions())
            except SdrtError as error:
                bad.append(f"{name} {precision}: {error.message}")
                continue
            try:
                inner = session._shared.session  # what nothing but this check asks for
                left = providers.left_to_cpu(inner)
                yield f"{name} {precision}: {inner.get_providers()[0]}, {providers.listed(left) or 'none'} on the CPU"
            finally:
                session.close()
    if bad:
        raise SdrtError("; ".join(bad))


CHECKS: dict[str, Check] = {
    "driver": driver,
    "fingerprints": fingerprints,
    "onnxruntime-fp32": _plain_fp32,
    "onnxruntime": _components("onnxruntime"),
    "onnxruntime-fused": _fused,
    "onnxruntime-fallback": _fallback,
    "onnxruntime-graphs": _graphs("onnxruntime"),
    "tensorrt-rtx-validity": _validity,
    "tensorrt-rtx": _components("tensorrt-rtx"),
    "tensorrt-rtx-graphs": _graphs("tensorrt-rtx"),
    "tensorrt-rtx-cache": _cache,
    "tensorrt": _components("tensorrt"),
    "tensorrt-graphs": _graphs("tensorrt"),
    "strip": _option(strip="true"),
    "refit": _option(refit="same"),
}
"""In their order."""


# -- running them -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How one check ended: ``ok``, ``skipped`` or ``FAILED``; what it saw until then, and why."""

    name: str
    state: str
    seen: tuple[str, ...] = field(default=())
    why: str = ""

    def __str__(self) -> str:
        told = "; ".join((*self.seen, *([self.why] if self.why else [])))
        return f"{self.state:8}{self.name}: {' '.join(told.split())}"


def run_one(name: str, here: Here) -> Outcome:
    """One check, in this process. Whatever it raises is its outcome."""
    seen: list[str] = []
    try:
        for told in CHECKS[name](here):
            seen.append(told)  # not extend: what was seen before a failure is kept
    except Skipped as skipped:
        return Outcome(name, "skipped", tuple(seen), str(skipped))
    except SdrtError as error:
        return Outcome(name, "FAILED", tuple(seen), str(error))
    except Exception as error:  # a library's own, or a fault of ours: the others go on
        return Outcome(name, "FAILED", tuple(seen), f"{type(error).__name__}: {error}")
    return Outcome(name, "ok", tuple(seen))


def run_apart(name: str, here: Here) -> Outcome:
    """One check, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.nvidia.check", name, str(here.out), here.device]
    try:
        done = subprocess.run(
            command, env=worker_environment(), capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return Outcome(name, "FAILED", (), f"not done after {SECONDS} s")
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            told = json.loads(line[len(MARK) :])
            return Outcome(told["name"], told["state"], tuple(told["seen"]), told["why"])
    return Outcome(
        name, "FAILED", (), f"its process ended with status {done.returncode}: {done.stderr[-TAIL:].strip()}"
    )


def run_all(names: Sequence[str], device: str, run: Callable[[str, Here], Outcome] = run_apart) -> int:
    """Each in its order, a line each on standard output. 1 if one failed."""
    failed = False
    with tempfile.TemporaryDirectory(prefix="sdrt-check-") as folder:
        here = Here(Path(folder), device)
        for name in [name for name in CHECKS if name in names]:
            started = time.perf_counter()
            outcome = run(name, here)
            print(f"{outcome} [{time.perf_counter() - started:.0f} s]", flush=True)
            failed = failed or outcome.state == "FAILED"
    return int(failed)


def main() -> None:
    """One check, for ``run_apart``."""
    name, out, device = sys.argv[1:]
    with contextlib.redirect_stdout(sys.stderr):
        outcome = run_one(name, Here(Path(out), device))
    print(MARK + json.dumps({"name": name, "state": outcome.state, "seen": outcome.seen, "why": outcome.why}))


# -- what the demo model's pictures show ------------------------------------------------------------------------------


def alignment(ours: Ours, out: Path, captions: int, device: str, progress: Progress) -> Iterator[Aligned]:
    """The demo model in fp32 beside one of ours, the same captions and noise (``benchmarks/alignment``). SdrtError."""
    held, file = out / f"demo-{ours.key}", out / f"alignment-{ours.key}.json"
    progress(f"{ours.name}: the demo model")
    for target in ours.targets:
        command = [sys.executable, "-m", "sdrt", "build", str(DEMO), str(held), "--force", "--engine", ours.engine]
        command += ["--precision", ours.precision, "--batch", "8", *(["--target", target] if target else [])]
        command += [word for name, value in ours.extra.items() for word in ("-O", f"{name}={value}")]
        try:
            watched(command, "sdrt build")
            break
        except SdrtError:
            if target == ours.targets[-1]:
                raise
    progress(f"{ours.name}: {captions} captions")
    command = [sys.executable, "-m", "benchmarks.alignment.evaluate", "-m", str(DEMO), "-m", str(held)]
    command += ["--captions", str(captions), "--json", str(file), "--device", "cpu", "--device", device]
    watched(command, "benchmarks.alignment.evaluate")
    report = json.loads(file.read_text(encoding="utf-8"))
    for kind, attributes in report["comparisons"][0]["attributes"].items():
        difference = attributes["everything"]["difference"]
        points = [100 * difference[key] for key in ("estimate", "low", "high")]
        yield Aligned(ours.name, kind, *points)


if __name__ == "__main__":
    main()
