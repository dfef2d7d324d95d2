"""Plans at work, on a GPU that is not there: ``tests/nvidia.py``."""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdrt import BuildError, BundleError, DeviceError, EngineUnavailable, InputError, Pipeline, bundle
from sdrt.bundle import SHIPPED, Bundle
from sdrt.engine import BuildOptions, DeviceMemory, OpenOptions, Session, find_engine, open_session
from sdrt.metrics import psnr
from sdrt_engines import cuda
from sdrt_engines.build import build
from sdrt_engines.trt import arena
from tests import nvidia
from tests.nvidia import RTX_4090, Gpu, stand_in

DEMO = SHIPPED / "demo"
SIZES = {"B": 2, "T": 77, "H": 64, "W": 64}


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the stand-in keeps the graphs of the plans of this module."""
    return tmp_path_factory.mktemp("plans")


@pytest.fixture
def gpu(plans: Path) -> Iterator[Gpu]:
    with stand_in(plans) as machine:
        yield machine
        gc.collect()
        assert machine.cuda.nothing_left(), "something stayed on the GPU"


@pytest.fixture(scope="module")
def built(plans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "bundle"
    with stand_in(plans):
        options = BuildOptions(
            precision="fp16", shapes=((64, 64), (128, 64)), batch=2, extra={"keep_graph": "true"}
        )  # fmt: skip
        build(DEMO, out, "tensorrt-rtx", options)
    return out


def opened(root: Path, name: str = "unet", cache: Path | None = None, **extra: str) -> Session:
    return open_session(bundle.load(root), name, options=OpenOptions(cache=cache, extra=extra))


def inputs(held: Bundle, seed: int = 0, **sizes: int) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    made: dict[str, Any] = {}
    for spec in held.component("unet").inputs:
        made[spec.name] = generator.standard_normal(spec.at(SIZES | sizes)).astype(np.float32)
    return made


def expected(given: dict[str, Any]) -> Any:
    session = open_session(bundle.load(DEMO), "unet")
    try:
        return session.run(**given)["out_sample"]
    finally:
        session.close()


def with_facts(root: Path, to: Path, component: str = "unet", **changes: Any) -> Path:
    """A copy of a bundle of which one component's artifact says something else."""
    shutil.copytree(root, to)
    manifest = json.loads((to / "sdrt.json").read_text())
    artifact = manifest["components"][component]["artifact"]
    for key, value in changes.items():
        (artifact if key == "target" else artifact["facts"])[key] = value
    (to / "sdrt.json").write_text(json.dumps(manifest))
    return to


def test_devices(gpu: Gpu) -> None:
    (device,) = find_engine("tensorrt-rtx").devices()
    assert device.name == "cuda:0"
    assert device.memory == gpu.cuda.total
    assert "RTX 4090, sm89, TensorRT-RTX" in device.description
    assert "CUDA 13.2" in device.description


def test_what_is_built_is_checked_on_the_gpu(built: Path) -> None:
    for component in bundle.load(built).manifest.components.values():
        assert component.artifact.facts["built_on"] == {
            "gpu": RTX_4090[0], "target": "sm89", "driver": "13.2"
        }  # fmt: skip
        assert "graph_parity" not in component.artifact.facts
        assert component.artifact.parity
        assert all(p.psnr is None or p.psnr > 55 for p in component.artifact.parity)


@pytest.mark.parametrize(
    ("card", "target", "validity"),
    [
        (RTX_4090, "sm86", None),  # known to be for another one
        (("NVIDIA GeForce RTX 2080", 7, 5), "any", None),
        (("NVIDIA H100", 9, 0), "any", "INVALID"),  # only the library knows
    ],
)
def test_what_is_built_for_another_gpu_is_checked_as_a_graph(
    plans: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, card: Any, target: str, validity: str | None
) -> None:
    with stand_in(plans, card) as machine:
        if validity is not None:
            kinds = machine.real.EngineInvalidityDiagnostics
            machine.validity = (getattr(machine.real.EngineValidity, validity), int(kinds.UNSUPPORTED_CC))
        options = BuildOptions({"vae_encoder": "fp16"}, ((64, 64),), target=target)
        made = build(DEMO, tmp_path / "out", "tensorrt-rtx", options)
    for name, component in made.manifest.components.items():
        assert component.artifact.facts["graph_parity"], name
        assert not component.artifact.parity
        assert f"{name}: not checked, as it cannot be run here" in caplog.text


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_picture(gpu: Gpu, built: Path, low_memory: bool) -> None:
    """Through the pipeline: text, guidance, latents fed back, and both sides of guidance at once."""
    call: dict[str, Any] = {"num_inference_steps": 4, "seed": 1, "output_type": "np", "width": 128, "height": 64}
    with Pipeline.from_pretrained(DEMO) as pipe:
        reference = pipe("a red star", **call).images
    with Pipeline.from_pretrained(built, low_memory=low_memory) as pipe:
        first = pipe("a red star", **call).images
        launched = gpu.cuda.calls["cudaGraphLaunch"]
        np.testing.assert_array_equal(first, pipe("a red star", **call).images)  # the decoder made the arena grow
        copied = gpu.cuda.calls["cudaMemcpyAsync"]
        np.testing.assert_array_equal(first, pipe("a red star", **call).images)
    assert psnr(reference, first) > 55
    assert launched >= 6
    if not low_memory:  # nothing but what is bound is copied by a call of its own: all other copies are in the graphs
        assert gpu.cuda.calls["cudaMemcpyAsync"] - copied == 1


def test_a_graph_for_each_size(gpu: Gpu, built: Path) -> None:
    session = opened(built)
    held = bundle.load(built)
    small, large = inputs(held), inputs(held, W=128)
    for given in (small, large, small, large):
        assert psnr(expected(given), session.run(**given)["out_sample"]) > 55
    assert gpu.contexts == 2
    assert gpu.cuda.calls["cudaGraphInstantiate"] == 3  # the small one's again: the large one made the arena grow
    assert gpu.cuda.calls["cudaGraphLaunch"] == 3  # and its first call after that was made kernel by kernel
    session.close()


def test_prepare_compiles_once(gpu: Gpu, built: Path) -> None:
    session = opened(built)
    assert session.prepare(SIZES)
    assert not session.prepare(SIZES)
    contexts = gpu.contexts
    session.run(**inputs(bundle.load(built)))
    assert gpu.contexts == contexts
    session.close()


def test_without_graphs(gpu: Gpu, built: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = inputs(bundle.load(built))
    session = opened(built, graphs="false")
    plain = session.run(**given)["out_sample"]
    session.close()
    assert "cudaGraphLaunch" not in gpu.cuda.calls
    assert not caplog.records
    gpu.capturable = False
    session = opened(built)
    np.testing.assert_array_equal(plain, session.run(**given)["out_sample"])
    np.testing.assert_array_equal(plain, session.run(**given)["out_sample"])
    session.close()
    assert "cannot be recorded as a CUDA graph" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("asked", "theirs"), [({}, True), ({"graphs": "false"}, False)])
def test_who_records_while_kernels_change(
    gpu: Gpu, built: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, str], theirs: bool
) -> None:
    strategies = []
    original = nvidia.Context.__init__

    def made(self: Any, engine: Any, config: Any) -> None:
        strategies.append((config.cuda_graph_strategy.name, config.dynamic_shapes_kernel_specialization_strategy.name))
        original(self, engine, config)

    monkeypatch.setattr(nvidia.Context, "__init__", made)
    session = opened(built, specialize="lazy", **asked)
    session.run(**inputs(bundle.load(built)))
    session.close()
    assert strategies == [("WHOLE_GRAPH_CAPTURE" if theirs else "DISABLED", "LAZY")]
    assert "cudaGraphLaunch" not in gpu.cuda.calls


def test_constants_are_seen_by_what_was_recorded(gpu: Gpu, built: Path) -> None:
    """Bound anew, with the same shape, after the graph was recorded; unbound inputs in between change too."""
    session = opened(built)
    held = bundle.load(built)
    for seed in (1, 2, 3):
        given = inputs(held, seed)
        text = given.pop("encoder_hidden_states")
        session.bind(encoder_hidden_states=text)
        text_was = text.copy()
        text[...] = 0  # bound is bound
        for step in range(2):
            given["sample"] = given["sample"] + step
            made = session.run(**given)["out_sample"]
            assert psnr(expected({**given, "encoder_hidden_states": text_was}), made) > 55
    assert gpu.cuda.calls["cudaGraphInstantiate"] == 1
    session.close()


def test_one_picture_without_guidance_is_another_size(gpu: Gpu, built: Path) -> None:
    session = opened(built)
    with pytest.raises(InputError, match="T=154"):
        session.run(**inputs(bundle.load(built), T=154))
    for rows in (2, 1, 2):
        given = inputs(bundle.load(built), B=rows)
        text = given.pop("encoder_hidden_states")
        session.bind(encoder_hidden_states=text)
        assert psnr(expected({**given, "encoder_hidden_states": text}), session.run(**given)["out_sample"]) > 55
    assert gpu.contexts == 2
    session.close()


@pytest.mark.parametrize("low_memory", [False, True])
def test_what_nobody_closes_is_given_back(gpu: Gpu, built: Path, low_memory: bool) -> None:
    for _ in range(2):
        pipe = Pipeline.from_pretrained(built, low_memory=low_memory)
        pipe("a red star", width=64, height=64, num_inference_steps=2)
        assert low_memory or not gpu.cuda.nothing_left()
        del pipe
        gc.collect()
        assert gpu.cuda.nothing_left()


def test_what_cannot_be_recorded(
    gpu: Gpu, built: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """TensorRT itself has no word on it beforehand: it fails while it is recorded."""
    given = inputs(bundle.load(built))
    works = nvidia.Context.execute_async_v3

    def fails(self: Any, handle: int) -> bool:
        return gpu.cuda.streams[handle].recording is None and works(self, handle)

    monkeypatch.setattr(nvidia.Context, "execute_async_v3", fails)
    session = opened(built)
    first, second = (session.run(**given)["out_sample"] for _ in range(2))
    session.close()
    np.testing.assert_array_equal(first, second)
    assert psnr(expected(given), first) > 55
    assert [r.message.partition(" (")[0] for r in caplog.records] == ["unet: cannot be recorded as a CUDA graph"]


def test_sizes_that_the_library_cannot_infer(gpu: Gpu, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(_: Any) -> Any:
        raise RuntimeError("failed")

    monkeypatch.setattr(nvidia.Context, "infer_shapes", raises)
    session = opened(built)
    with pytest.raises(InputError, match="takes no inputs of these sizes"):
        session.prepare(SIZES)
    session.close()


def test_a_cache_that_fails_loses_nothing(
    gpu: Gpu, built: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    session = opened(built, cache=tmp_path)
    session.prepare(SIZES)

    def raises(_: Any) -> None:
        raise InputError("a damaged file cannot be removed")

    monkeypatch.setattr("sdrt_engines.trt.stored.RuntimeCache.save", raises)
    with pytest.raises(InputError, match="cannot be removed"):
        session.close()  # and the fixture sees that nothing stays


def test_activations_are_shared_and_graphs_are_recorded_anew_when_they_move(gpu: Gpu, built: Path) -> None:
    held = bundle.load(built)
    session, other = opened(built), opened(built, "vae_decoder")
    given = inputs(held)
    before = session.run(**given)["out_sample"]
    recorded = gpu.cuda.calls["cudaGraphInstantiate"]
    latents = np.random.default_rng(0).standard_normal((2, 4, 8, 16)).astype(np.float32)
    other.run(latent_sample=latents)
    session.prepare(SIZES | {"B": 4, "W": 128})  # more room: the arena moves
    np.testing.assert_array_equal(before, session.run(**given)["out_sample"])
    assert gpu.cuda.calls["cudaGraphInstantiate"] > recorded + 1
    other.run(latent_sample=latents)
    session.close()
    assert gpu.cuda.live  # the other one goes on
    other.run(latent_sample=latents)
    other.close()


def test_no_more_sizes_are_kept_than_asked_for(gpu: Gpu, built: Path) -> None:
    held = bundle.load(built)
    session = opened(built, keep="1")
    for _ in range(2):
        for width in (64, 128):
            session.run(**inputs(held, W=width))
    assert gpu.contexts == 4
    session.close()


def test_the_profile_is_the_nearest(gpu: Gpu, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    original = nvidia.Context.set_optimization_profile_async

    def seen(self: Any, index: int, stream: int) -> bool:
        chosen.append(index)
        return original(self, index, stream)

    monkeypatch.setattr(nvidia.Context, "set_optimization_profile_async", seen)
    session = opened(built, keep="9")
    for sizes in ({"B": 2}, {"B": 4}, {"B": 1, "W": 128}, {"B": 3, "W": 128}):
        session.prepare(SIZES | sizes)
    assert chosen == [0, 0, 1, 1]
    with pytest.raises(InputError, match=r"was built for .*asked for B=5") as caught:
        session.prepare(SIZES | {"B": 5})
    assert "sdrt build ONNX_BUNDLE OUT --engine tensorrt-rtx --precision fp16 --shape 64x64" in caught.value.fix
    session.close()


def test_two_threads(gpu: Gpu, built: Path) -> None:
    """Calls of two sessions of one GPU take turns: its arena and its stream are shared."""
    held = bundle.load(built)
    sessions = [opened(built), opened(built)]
    wanted = [s.run(**inputs(held, i))["out_sample"] for i, s in enumerate(sessions)]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(5):
            if not np.array_equal(sessions[i].run(**inputs(held, i))["out_sample"], wanted[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for session in sessions:
        session.close()


def test_what_is_collected_waits_for_no_other_thread(gpu: Gpu, built: Path) -> None:
    """One thread, in its turn, collects a session that nobody closed, while another thread drops one."""
    session = opened(built)
    session.prepare(SIZES)
    turn = arena._arenas[0].lock
    collecting, dropped = threading.Event(), [opened(built, "text_encoder")]

    def leave_garbage() -> None:
        cycle: list[Any] = [opened(built, "vae_encoder")]
        cycle.append(cycle)

    def collects() -> None:
        with turn:
            collecting.set()
            time.sleep(0.3)
            gc.collect()

    def drops() -> None:
        collecting.wait()
        dropped.clear()

    gc.disable()
    try:
        leave_garbage()
        threads = [threading.Thread(target=work, daemon=True) for work in (collects, drops)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads), "they wait for each other"
    finally:
        gc.enable()
    assert arena._arenas[0]._users == 1
    session.close()
    assert not arena._arenas


def test_a_holder_that_is_collected_while_another_thread_has_the_lock(gpu: Gpu) -> None:
    held = arena.held(0)
    with elsewhere(arena._arenas_lock):
        held.leave()
        assert held._users == 1
    other = arena.held(0)  # whoever comes next does it
    assert other._users == 1
    other.release()
    assert not arena._arenas


def test_memory_that_is_collected_while_another_thread_has_the_lock(gpu: Gpu) -> None:
    buffer, pinned = cuda.Buffer(64), cuda.Pinned((4,), np.float32)
    with elsewhere(cuda.ALONE):
        del buffer, pinned
        assert not gpu.cuda.nothing_left()
    cuda.Buffer(64).close()
    assert gpu.cuda.nothing_left()


@contextlib.contextmanager
def elsewhere(lock: Any) -> Iterator[None]:
    """While another thread has the lock."""
    taken, done = threading.Event(), threading.Event()

    def take() -> None:
        with lock:
            taken.set()
            done.wait(20)

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    taken.wait()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_memory_that_runs_out(gpu: Gpu, built: Path) -> None:
    session = opened(built)
    gpu.cuda.total = gpu.cuda.used() + 5000
    with pytest.raises(DeviceError, match=r"cudaMalloc of .* MiB for .* failed: cudaErrorMemoryAllocation") as caught:
        session.run(**inputs(bundle.load(built)))
    assert "--low-memory" in caught.value.fix
    gpu.cuda.total = 8 * 2**30
    session.run(**inputs(bundle.load(built)))  # nothing was lost
    session.close()


def test_what_the_library_said_is_told(gpu: Gpu, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, *_: Any) -> Any:
        self.gpu.runtimes[-1].logger.log(gpu.real.ILogger.Severity.ERROR, "Error Code 2: OutOfMemory (128 MiB)")

    with monkeypatch.context() as patched:
        patched.setattr(nvidia.Engine, "create_execution_context", fails)
        session = opened(built)
        with pytest.raises(DeviceError, match=r"no execution context on this GPU: Error Code 2: OutOfMemory \(128"):
            session.prepare(SIZES)
        session.close()
    with monkeypatch.context() as patched:
        patched.setattr(nvidia.Context, "execute_async_v3", lambda self, _: fails(self.engine))
        session = opened(built)
        with pytest.raises(DeviceError, match="failed to run: Error Code 2: OutOfMemory"):
            session.prepare(SIZES)
        session.close()
    monkeypatch.setattr(nvidia.Runtime, "deserialize_cuda_engine", fails)
    with pytest.raises(DeviceError, match="the GPU has no room for the plan: Error Code 2") as caught:
        opened(built)
    assert caught.value.fix == "free its memory"


def test_what_a_session_holds(gpu: Gpu, built: Path, caplog: pytest.LogCaptureFixture) -> None:
    from sdrt_engines import tensorrt_rtx

    session = tensorrt_rtx.open(bundle.load(built), "unet", None, OpenOptions())
    assert session.memory() == DeviceMemory(weights=1 << 20, tensors=0, device="cuda:0")  # the stand-in's
    with caplog.at_level("INFO", "sdrt"):
        session.prepare(SIZES)
    assert "unet on cuda:0: weights 1 MiB, tensors 0 MiB, activations of all 0 MiB" in caplog.text
    held = session.memory()
    assert held is not None
    assert held.shared > 1000
    assert sum(DeviceMemory.together([held]).values()) == gpu.cuda.used()
    session.close()


@pytest.mark.parametrize("low_memory", [False, True])
def test_what_a_pipeline_holds(gpu: Gpu, built: Path, low_memory: bool) -> None:
    """By component; what all of them work in is there once."""
    with Pipeline.from_pretrained(built, low_memory=low_memory) as pipe:
        pipe("a red star", width=64, height=64, num_inference_steps=2)
        held = pipe.memory()
        assert sorted(held) == ([] if low_memory else ["text_encoder", "unet", "vae_decoder"])
        assert sum(DeviceMemory.together(held.values()).values()) == gpu.cuda.used()
    assert pipe.memory() == {}


# -- for this machine? ------------------------------------------------------------------------------------------------


def test_the_driver_is_asked_before_the_library(plans: Path, built: Path) -> None:
    """The stand-in's runtime fails where there is no GPU, as the real one does."""
    with stand_in(plans) as machine:
        machine.cuda.gpus.clear()
        with pytest.raises(EngineUnavailable, match="no NVIDIA driver"):
            opened(built)


def test_another_gpu(plans: Path, built: Path, tmp_path: Path) -> None:
    narrowed = with_facts(built, tmp_path / "narrowed", target="sm86")
    with (
        stand_in(plans) as machine,
        pytest.raises(DeviceError, match=r"built for sm86, here is sm89 \(NVIDIA") as caught,
    ):
        opened(narrowed)
    assert machine.loaded == 0
    assert caught.value.fix.endswith("--precision fp16 --shape 64x64 --shape 128x64 --batch 2 -O keep_graph=true")
    with (
        stand_in(plans, ("NVIDIA GeForce RTX 2080", 7, 5)),
        pytest.raises(DeviceError, match="built for any, here is sm75"),
    ):
        opened(built)


def test_the_command_for_another_gpu_is_whole(plans: Path, built: Path, tmp_path: Path) -> None:
    """Whichever component is opened first: the text encoder knows no size, and no other one's precision."""
    recipe = bundle.load(built).component("unet").artifact.facts["recipe"]
    other = with_facts(built, tmp_path / "other", "text_encoder", version="1.6.0.5", recipe={**recipe, "level": 9})
    manifest = json.loads((other / "sdrt.json").read_text())
    for name, component in manifest["components"].items():
        artifact = component["artifact"]
        artifact["precision"] = {"unet": "fp8", "text_encoder": "fp32"}.get(name, "bf16")
        artifact["facts"]["version"] = "1.6.0.5"
        if name != "text_encoder":
            artifact["facts"]["recipe"] |= {"target": "sm86,sm89", "tf32": True, "workspace": 64}
        artifact["target"] = "sm86,sm89"
    (other / "sdrt.json").write_text(json.dumps(manifest))
    every = "unet={},vae_encoder=bf16,vae_decoder=bf16 --shape 64x64 --shape 128x64 --batch 2"
    kept = " -O tf32=true -O workspace=64 -O keep_graph=true"
    for card, expected in (
        (RTX_4090, every.format("fp8") + " --target sm86,sm89" + kept),
        (("NVIDIA H100", 9, 0), every.format("fp8") + kept),
        (("NVIDIA GeForce RTX 2080", 7, 5), every.format("fp16") + " --target sm75" + kept),
    ):
        with stand_in(plans, card), pytest.raises(DeviceError) as caught:
            opened(other, "vae_encoder")
        command = "sdrt build ONNX_BUNDLE OUT --engine tensorrt-rtx --precision "
        assert _sorted(caught.value.fix) == _sorted(command + expected)


def _sorted(command: str) -> list[list[str]]:
    return [sorted(word.split(",")) for word in command.split()]


def test_no_such_gpu(gpu: Gpu, built: Path) -> None:
    with pytest.raises(DeviceError, match="no device 'cuda:1' here; it has cuda:0"):
        Pipeline.from_pretrained(built, device="cuda:1")
    with pytest.raises(InputError, match="no threads"):
        open_session(bundle.load(built), "unet", options=OpenOptions(threads=2))
    with pytest.raises(InputError, match="no option 'speed'; known options: graphs"):
        opened(built, speed="9")


def test_numbers_that_mean_nothing(gpu: Gpu, built: Path) -> None:
    for option, value in (("keep", "0"), ("keep", "-3"), ("budget", "-7"), ("budget", str(2**40))):
        with pytest.raises(InputError, match=f"option {option}: expected .*, got {value}"):
            opened(built, **{option: value})


def test_float8_is_not_for_every_gpu(plans: Path, built: Path, tmp_path: Path) -> None:
    other = with_facts(built, tmp_path / "other")
    manifest = json.loads((other / "sdrt.json").read_text())
    manifest["components"]["unet"]["artifact"]["precision"] = "fp8"
    (other / "sdrt.json").write_text(json.dumps(manifest))
    with (
        stand_in(plans, ("NVIDIA GeForce RTX 3090", 8, 6)),
        pytest.raises(DeviceError, match="in float8, which GPUs have from sm89 on, here is sm86"),
    ):
        opened(other)


def test_another_version(gpu: Gpu, built: Path, tmp_path: Path) -> None:
    other = with_facts(built, tmp_path / "other", version="1.6.0.5")
    with pytest.raises(DeviceError, match=r"built by TensorRT-RTX 1\.6\.0\.5, here is"):
        opened(other)
    assert gpu.loaded == 0


def test_what_the_library_says_against_it(gpu: Gpu, built: Path) -> None:
    kinds = gpu.real.EngineInvalidityDiagnostics
    gpu.validity = (gpu.real.EngineValidity.INVALID, int(kinds.UNSUPPORTED_CC) | int(kinds.OLD_CUDA_DRIVER))
    with pytest.raises(DeviceError, match="says unsupported cc, old cuda driver"):
        opened(built)
    assert gpu.loaded == 0
    gpu.validity = (gpu.real.EngineValidity.INVALID, int(kinds.MALFORMED_ENGINE))
    opened(built).close()  # no other machine would help: loading it tells what is wrong with it
    assert gpu.loaded == 1


@pytest.mark.parametrize("facts", [{"recipe": None}, {"library": "tensorrt"}, {"version": 3}, {"recipe": {"target": "any", "x": 1}}])  # fmt: skip
def test_facts_that_are_none(facts: dict[str, Any], gpu: Gpu, built: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not say"):
        opened(with_facts(built, tmp_path / "other", **facts))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("level", "abc"), ("level", None), ("level", 2.5), ("level", 99), ("level", True), ("workspace", "x"),
        ("workspace", -5), ("workspace", 2**60), ("refit", "xyz"), ("refit", ["no"]), ("strip", "no"), ("tf32", None),
        ("portable", "yes"), ("streaming", 1), ("target", 5), ("target", ""), ("target", "sm86 " * 10**6),
    ],
    ids=lambda value: str(value)[:9],
)  # fmt: skip
def test_recipes_that_are_none(name: str, value: Any, gpu: Gpu, built: Path, tmp_path: Path) -> None:
    recipe = bundle.load(built).component("vae_encoder").artifact.facts["recipe"]
    other = with_facts(built, tmp_path / "other", "vae_encoder", recipe={**recipe, name: value}, target="sm86")
    for mismatch in ("error", "rebuild"):
        with pytest.raises(BundleError, match=f"its {name} is ") as caught:
            opened(other, "vae_encoder", mismatch=mismatch)
        assert len(str(caught.value)) < 250


def test_what_a_manifest_says_is_shown_shortly(gpu: Gpu, built: Path, tmp_path: Path) -> None:
    for i, changes in enumerate(({"target": "x" * 10**6}, {"version": "9" * 10**6})):
        with pytest.raises(DeviceError, match="here is") as caught:
            opened(with_facts(built, tmp_path / str(i), **changes))
        assert len(str(caught.value)) < 500


def test_a_profile_that_lacks_a_size(gpu: Gpu, built: Path, tmp_path: Path) -> None:
    other = with_facts(built, tmp_path / "other", "vae_encoder", target="sm86")
    manifest = json.loads((other / "sdrt.json").read_text())
    for profile in manifest["components"]["vae_encoder"]["artifact"]["profiles"]:
        del profile["H"], profile["W"]
    (other / "sdrt.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="a profile without 'H, W'"):
        opened(other, "vae_encoder", mismatch="rebuild")


def test_built_anew_for_another_gpu_and_kept(
    gpu: Gpu, built: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    narrowed, cache = with_facts(built, tmp_path / "narrowed", "vae_encoder", target="sm86"), tmp_path / "cache"
    picture = np.random.default_rng(0).standard_normal((1, 3, 64, 64)).astype(np.float32)

    def made() -> tuple[Any, int]:
        before = gpu.plans.built
        session = opened(narrowed, "vae_encoder", cache=cache, mismatch="rebuild")
        try:
            return session.run(sample=picture)["latent_parameters"], gpu.plans.built - before
        finally:
            session.close()

    first, count = made()
    assert count == 1
    assert "built for sm86, here is sm89" in caplog.text
    plain = opened(built, "vae_encoder")
    assert psnr(plain.run(sample=picture)["latent_parameters"], first) > 55
    plain.close()
    again, count = made()
    assert count == 0
    np.testing.assert_array_equal(first, again)
    for blob in cache.glob("*.blob"):
        blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    damaged, count = made()
    assert count == 1
    np.testing.assert_array_equal(first, damaged)


def test_nothing_to_build_it_anew_from(gpu: Gpu, built: Path, tmp_path: Path) -> None:
    narrowed = with_facts(built, tmp_path / "narrowed", target="sm86")
    manifest = json.loads((narrowed / "sdrt.json").read_text())
    del manifest["components"]["unet"]["artifact"]["files"][1:]
    (narrowed / "sdrt.json").write_text(json.dumps(manifest))
    with pytest.raises(DeviceError, match="-O keep_graph=true"):
        opened(narrowed, mismatch="rebuild")


def test_compiled_kernels_are_kept(gpu: Gpu, built: Path, tmp_path: Path) -> None:
    def kept() -> list[bytes]:
        session = opened(built, cache=tmp_path)
        session.prepare(SIZES)
        session.close()
        return [path.read_bytes() for path in sorted(tmp_path.glob("*.blob"))]

    assert kept() == [b"k"]
    assert kept() == [b"kk"]  # what was there was handed over, and what was compiled beside it was added


def test_kernels_compiled_beside_calls_are_kept(
    gpu: Gpu, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = []
    made = nvidia.RuntimeConfig.create_runtime_cache

    def create(self: Any) -> Any:
        caches.append(made(self))
        return caches[-1]

    monkeypatch.setattr(nvidia.RuntimeConfig, "create_runtime_cache", create)
    session = opened(built, cache=tmp_path, specialize="lazy")
    session.prepare(SIZES)
    caches[0].content += b", later"
    session.close()
    (file,) = tmp_path.glob("*.blob")
    assert file.read_bytes() == b"k, later"


def test_a_plan_that_is_not_one(gpu: Gpu, built: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built, tmp_path / "copy"))
    path = copy / "unet" / "model.plan"
    path.write_bytes(b"?" * path.stat().st_size)
    with pytest.raises(BundleError, match=r"cannot load the plan: Serialization assertion"):
        opened(copy)


def test_a_plan_of_other_tensors(gpu: Gpu, built: Path) -> None:
    from sdrt_engines import tensorrt_rtx

    held = bundle.load(built)
    unet = held.component("unet")
    for changed in (
        replace(unet, inputs=(replace(unet.inputs[0], dtype="f16"), *unet.inputs[1:])),
        replace(unet, outputs=(*unet.outputs, replace(unet.outputs[0], name="other"))),
        replace(unet, artifact=replace(unet.artifact, profiles=unet.artifact.profiles[:1])),
    ):
        other = Bundle(held.root, replace(held.manifest, components={**held.manifest.components, "unet": changed}))
        with pytest.raises(BundleError, match="the plan"):
            tensorrt_rtx.open(other, "unet", None, OpenOptions())


def test_portable_plans_carry_code(gpu: Gpu, built: Path, tmp_path: Path) -> None:
    recipe = bundle.load(built).component("unet").artifact.facts["recipe"]
    portable = with_facts(built, tmp_path / "portable", recipe={**recipe, "portable": True}, version="1.0.0.1")
    with pytest.raises(BundleError, match="carries a runtime, that is code") as caught:
        opened(portable)
    assert "trust=true" in caught.value.fix
    assert gpu.loaded == 0
    opened(portable, trust="true").close()


def test_cuda_errors_name_the_call(gpu: Gpu) -> None:
    with pytest.raises(DeviceError, match=r"cudaMalloc of 9536743\.2 MiB for nothing failed"):
        cuda.Buffer(10**13, "nothing")


def test_how_much_of_the_weights_stays(gpu: Gpu, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set before there is a context; never more than there is."""
    seen = []
    original = nvidia.Engine.create_execution_context
    monkeypatch.setattr(
        nvidia.Engine, "create_execution_context",
        lambda self, config: (seen.append(self.weight_streaming_budget_v2), original(self, config))[1],
    )  # fmt: skip
    recipe = bundle.load(built).component("vae_encoder").artifact.facts["recipe"]
    streaming = with_facts(built, tmp_path / "streaming", "vae_encoder", recipe={**recipe, "streaming": True})
    shared = []
    for options in ({"budget": "0"}, {"budget": "70000"}, {}):
        session = opened(streaming, "vae_encoder", **options)
        session.prepare(SIZES)
        held = session.memory()
        assert held is not None
        shared.append(held.shared)
        session.close()
    assert seen == [0, 1 << 20, 1 << 20]
    assert shared[0] == shared[1] == shared[2] + 100  # room for weights on their way
    with pytest.raises(InputError, match="-O budget is for plans whose weights may stay") as caught:
        opened(built, "vae_encoder", budget="1")
    assert "-O streaming=true" in caught.value.fix


def test_weights_come_from_the_graph_beside_a_stripped_plan(gpu: Gpu, built: Path, tmp_path: Path) -> None:
    recipe = bundle.load(built).component("vae_encoder").artifact.facts["recipe"]
    stripped = with_facts(built, tmp_path / "stripped", "vae_encoder", recipe={**recipe, "strip": True})
    opened(stripped, "vae_encoder").close()
    assert gpu.refitted == 1
    graph = stripped / "vae_encoder" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"?")
    with pytest.raises(BundleError, match="not the one that it was built from"):
        opened(stripped, "vae_encoder")
    manifest = json.loads((stripped / "sdrt.json").read_text())
    del manifest["components"]["vae_encoder"]["artifact"]["files"][1:]
    (stripped / "sdrt.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="no graph is beside it"):
        opened(stripped, "vae_encoder")


def test_tensorrt_builds_for_the_gpu_that_is_there(plans: Path, tmp_path: Path) -> None:
    """Its API is TensorRT-RTX's, which stands in for it."""

    def build_for(target: str | None) -> Any:
        options = BuildOptions(shapes=((64, 64),), target=target)
        (tmp_path / str(target)).mkdir()
        return find_engine("tensorrt").build(bundle.load(DEMO), "vae_encoder", tmp_path / str(target), options)

    with stand_in(plans):
        for target, kept in ((None, "sm89"), ("sm89", "sm89"), ("ampere+", "ampere+")):
            artifact = build_for(target)
            assert artifact.target == kept
            assert artifact.facts["built_on"]["gpu"] == RTX_4090[0]
            assert not find_engine("tensorrt").elsewhere(artifact)
        with pytest.raises(
            BuildError, match=r"builds for the GPU that is here, sm89 \(NVIDIA GeForce RTX 4090\); asked"
        ):
            build_for("sm90")
        exact, compatible = build_for("current"), build_for("SM89")
    with stand_in(plans, ("NVIDIA L4", 8, 9)):
        assert "for that kind of GPU alone, here is NVIDIA L4" in find_engine("tensorrt").elsewhere(exact)
        assert not find_engine("tensorrt").elsewhere(compatible)
