"""ONNX Runtime on a GPU and with other providers, on a GPU of host memory (``tests/cuda_fake.py``)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdrt import BundleError, DeviceError, InputError, Pipeline
from sdrt import bundle as bundles
from sdrt.engine import NUMPY_DTYPES, DeviceMemory, OpenOptions, Session, find_engine, open_session
from sdrt.metrics import psnr
from sdrt_engines import onnxruntime as engine
from sdrt_engines import onnxruntime_cuda, onnxruntime_providers
from sdrt_engines.onnxruntime_providers import Pairs
from tests.cuda_fake import CPU, CUDA, WEIGHTS, WORKSPACE, Gpu, Runtime

Install = Callable[..., Runtime]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """``install(gpu, held=(…))`` puts both fakes in place; the runtime, which has the GPU, is returned."""

    def put(gpu: Gpu | None = None, **arguments: Any) -> Runtime:
        made = Runtime(gpu or Gpu(), **arguments)
        monkeypatch.setattr(onnxruntime_cuda, "cuda", made.gpu)
        monkeypatch.setattr(onnxruntime_providers, "cuda", made.gpu)
        monkeypatch.setattr(engine, "_library", lambda: made)
        return made

    return put


def opened(bundle: Path, name: str = "unet", device: str = "cuda:0", **extra: str) -> Session:
    return open_session(bundles.load(bundle), name, device=device, options=OpenOptions(extra=extra))


def inputs_of(session: Session, seed: int = 0, **sizes: int) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    sizes = {"B": 2, "H": 64, "W": 64, "T": 77} | sizes
    return {
        spec.name: generator.integers(0, 1000, spec.at(sizes))
        if spec.dtype == "i64"
        else generator.standard_normal(spec.at(sizes)).astype(NUMPY_DTYPES[spec.dtype])
        for spec in session.spec.inputs
    }


def on_cpu(bundle: Path, name: str, **inputs: Any) -> dict[str, Any]:
    session = opened(bundle, name, "cpu")
    try:
        return session.run(**inputs)
    finally:
        session.close()


def same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(got) == list(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(got[name], array, atol=1e-4, err_msg=name)


# -- a session on a GPU -----------------------------------------------------------------------------------------------


def test_what_it_holds(bundle: Path, install: Install) -> None:
    """By the GPU's free memory: what other sessions take is not counted, nor is a second run of a size."""
    runtime = install()
    session = opened(bundle)
    assert session.memory() == DeviceMemory(weights=WEIGHTS, tensors=0)
    tensors = 0
    for i, width in enumerate((64, 128, 64), 1):
        arrays = inputs_of(session, W=width)
        made = session.run(**arrays)
        tensors += sum(array.nbytes for array in (*arrays.values(), *made.values())) if i < 3 else 0
        assert session.memory() == DeviceMemory(WEIGHTS, tensors, activations=min(i, 2) * WORKSPACE)
    assert tensors == runtime.gpu.taken["buffer"]
    session.close()


@pytest.mark.parametrize("name", ["text_encoder", "unet", "vae_encoder", "vae_decoder"])
@pytest.mark.parametrize("graphs", ["true", "false"])
def test_same_as_on_the_cpu(bundle: Path, install: Install, name: str, graphs: str) -> None:
    runtime = install()
    session = opened(bundle, name, graphs=graphs)
    for seed in range(3):
        arrays = inputs_of(session, seed)
        same(session.run(**arrays), on_cpu(bundle, name, **arrays))
    runs = runtime.sessions[0].runs
    assert runs == ({"warm": 1, "record": 1, "replay": 2} if graphs == "true" else {"plain": 3})
    session.close()
    assert not +runtime.gpu.open


def test_options_of_the_session(bundle: Path, install: Install) -> None:
    """What is asked of the provider, and that it runs in the stream of this session."""
    runtime = install(Gpu(2))
    sessions = [
        opened(bundle, device="cuda:1"),
        opened(bundle, tf32="true", nhwc="true", search="exhaustive", provider="gpu_mem_limit=1000,sdpa_kernel=2"),
        opened(bundle, tf32="true"),
    ]
    sessions[1].prepare({"B": 2, "T": 77, "H": 64, "W": 64})  # channels last: made when a size comes
    first, third, second = (made.options for made in runtime.sessions)
    assert first | {"user_compute_stream": ""} == {
        "device_id": "1", "user_compute_stream": "", "enable_cuda_graph": "1", "use_tf32": "0", "prefer_nhwc": "0",
        "cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested",
    }  # fmt: skip
    assert second.items() >= {
        "device_id": "0", "use_tf32": "1", "prefer_nhwc": "1", "cudnn_conv_algo_search": "EXHAUSTIVE",
        "gpu_mem_limit": "1000", "sdpa_kernel": "2",
    }.items()  # fmt: skip
    assert third["use_tf32"] == "1"
    assert len({made.options["user_compute_stream"] for made in runtime.sessions}) == 3
    assert runtime.gpu.current == [1, 0, 0, 0]
    for session in sessions:
        session.close()
    assert not +runtime.gpu.open


def test_a_session_for_each_size(bundle: Path, install: Install) -> None:
    """With channels last: dimensions are fixed, and what is dropped takes its weights along."""
    runtime = install()
    session = opened(bundle, nhwc="true", keep="2")
    assert runtime.sessions == []
    for sizes in ({}, {"B": 1}, {}, {"W": 72}, {"B": 1}):
        arrays = inputs_of(session, **sizes)
        same(session.run(**arrays), on_cpu(bundle, "unet", **arrays))
    usual = {"B": 2, "T": 77, "H/8": 8, "W/8": 8}
    made = [one for one in runtime.sessions if one.provider == CUDA]
    assert [one.settings.dims for one in made] == [usual, usual | {"B": 1}, usual | {"W/8": 9}, usual | {"B": 1}]
    assert [one.runs["record"] for one in made] == [1, 1, 1, 1]
    assert [one.runs["replay"] for one in made] == [1, 0, 0, 0]
    assert [len(one.released) for one in made] == [1, 1, 0, 0]
    held = session.memory()
    assert held is not None
    assert (held.weights, held.activations) == (2 * WEIGHTS, 2 * WORKSPACE)
    session.close()
    assert not +runtime.gpu.open


def test_a_graph_for_each_size(bundle: Path, install: Install) -> None:
    runtime = install()
    session = opened(bundle)
    for sizes in ({}, {"B": 1}, {}, {"W": 72}, {"B": 1}, {}):
        arrays = inputs_of(session, **sizes)
        same(session.run(**arrays), on_cpu(bundle, "unet", **arrays))
    made = runtime.sessions[0]
    assert made.runs == {"warm": 3, "record": 3, "replay": 3}
    session.close()
    assert sorted(made.released) == sorted(set(made.released))
    assert len(made.released) == 3
    assert not made.graphs
    assert not +runtime.gpu.open


def test_sizes_that_are_kept(bundle: Path, install: Install) -> None:
    """The size used longest ago goes, with its graph and its memory; when it comes back it is recorded anew."""
    runtime = install()
    session = opened(bundle, keep="2")
    arrays = {width: inputs_of(session, W=width) for width in (64, 72, 80)}
    expected = {width: on_cpu(bundle, "unet", **arrays[width]) for width in arrays}
    for width in (64, 72, 64, 80, 64, 72):
        same(session.run(**arrays[width]), expected[width])
    made = runtime.sessions[0]
    assert made.runs["record"] == 4
    assert len(made.released) == 2
    tensors = len(session.spec.inputs) + len(session.spec.outputs)
    assert runtime.gpu.open["buffer"] == runtime.gpu.open["pinned"] == 2 * tensors
    session.close()
    assert not +runtime.gpu.open


def test_preparing_records(bundle: Path, install: Install) -> None:
    runtime = install()
    session = opened(bundle)
    sizes = {"B": 2, "T": 77, "H": 64, "W": 64}
    assert session.prepare(sizes)
    assert runtime.sessions[0].runs["record"] == 1
    assert not session.prepare(sizes)
    arrays = inputs_of(session)
    text = arrays.pop("encoder_hidden_states")
    session.bind(encoder_hidden_states=text)
    same(session.run(**arrays), on_cpu(bundle, "unet", encoder_hidden_states=text, **arrays))
    assert runtime.sessions[0].runs == {"warm": 1, "record": 1, "replay": 1}
    session.close()


def test_constants_go_up_once_and_anew_when_bound_again(bundle: Path, install: Install) -> None:
    """The recorded graph must see the new values; a constant of another shape is another graph."""
    runtime = install()
    session = opened(bundle)
    arrays = inputs_of(session)
    text = arrays.pop("encoder_hidden_states")

    def check(values: Any, batch: int, **rest: Any) -> None:
        given = {name: array[:batch] if array.shape[0] == 2 else array for name, array in rest.items()}
        same(session.run(**given), on_cpu(bundle, "unet", encoder_hidden_states=values, **given))

    session.bind(encoder_hidden_states=text)
    for _ in range(3):
        check(text, 2, **arrays)
    assert runtime.gpu.uploads.count("encoder_hidden_states") == 1
    session.bind(encoder_hidden_states=-text)
    check(-text, 2, **arrays)
    assert runtime.gpu.uploads.count("encoder_hidden_states") == 2
    session.bind(encoder_hidden_states=text[:1])
    check(text[:1], 1, **arrays)
    session.bind(encoder_hidden_states=2 * text)
    check(2 * text, 2, **arrays)
    assert runtime.sessions[0].runs == {"warm": 2, "record": 2, "replay": 4}
    session.close()


def test_bound_array_may_change_afterwards(bundle: Path, install: Install) -> None:
    install()
    session = opened(bundle)
    arrays = inputs_of(session)
    text = arrays.pop("encoder_hidden_states")
    expected = on_cpu(bundle, "unet", encoder_hidden_states=text, **arrays)
    own = text.copy()
    session.bind(encoder_hidden_states=own)
    own[:] = 0
    same(session.run(**arrays), expected)
    session.close()


def test_results_are_the_callers(bundle: Path, install: Install) -> None:
    install()
    session = opened(bundle)
    first = session.run(**inputs_of(session, 1))["out_sample"]
    kept = first.copy()
    second = session.run(**{k: np.asfortranarray(v) for k, v in inputs_of(session, 2).items()})["out_sample"]
    session.close()
    np.testing.assert_array_equal(first, kept)
    assert first.flags.owndata
    assert first.flags.writeable
    assert np.abs(first - second).max() > 1e-3


def test_every_thread_chooses_its_gpu(bundle: Path, install: Install) -> None:
    """CUDA's current device is each thread's own."""
    runtime = install(Gpu(2))
    session = opened(bundle, device="cuda:1")
    arrays = inputs_of(session)
    del runtime.gpu.current[:]
    thread = threading.Thread(target=lambda: session.run(**arrays))
    thread.start()
    thread.join()
    assert runtime.gpu.current == [1]
    session.prepare({"B": 1, "T": 77, "H": 64, "W": 64})
    session.close()
    assert runtime.gpu.current == [1, 1, 1]


def test_a_picture(bundle: Path, install: Install) -> None:
    runtime = install()
    arguments: dict[str, Any] = {"width": 72, "height": 64, "num_inference_steps": 3, "seed": 1, "output_type": "np"}
    with Pipeline.from_pretrained(bundle) as pipe:
        expected = pipe("a fox", **arguments).images
    with Pipeline.from_pretrained(bundle, device="cuda:0") as pipe:
        for _ in range(2):
            assert psnr(pipe("a fox", **arguments).images, expected, 1.0) >= 100
    assert not +runtime.gpu.open
    with Pipeline.from_pretrained(bundle, device="cuda:0", low_memory=True) as pipe:
        assert psnr(pipe("a fox", **arguments).images, expected, 1.0) >= 100
    assert not +runtime.gpu.open


@pytest.mark.parametrize(
    ("said", "kind", "message"),
    [
        (
            "Failed to allocate memory for requested buffer of size 7",
            DeviceError,
            "unet: onnxruntime failed on cuda:0: F",
        ),
        ("cuDNN is unavailable or disabled", DeviceError, "unet: onnxruntime finds no cuDNN"),
    ],
)
def test_failures_while_running(bundle: Path, install: Install, said: str, kind: type[Exception], message: str) -> None:
    runtime = install()
    session = opened(bundle)
    fake = runtime.sessions[0]
    working = fake.run_with_iobinding

    def fail(*_: Any) -> None:
        raise RuntimeError(said)

    fake.run_with_iobinding = fail  # type: ignore[method-assign]
    with pytest.raises(kind, match=message):
        session.run(**inputs_of(session))
    fake.run_with_iobinding = working  # type: ignore[method-assign]
    arrays = inputs_of(session)
    runtime.gpu.streams[int(fake.options["user_compute_stream"])].waiting.clear()
    same(session.run(**arrays), on_cpu(bundle, "unet", **arrays))
    session.close()
    assert not +runtime.gpu.open


def test_what_cannot_be_opened_leaves_nothing(copied: Path, install: Install) -> None:
    runtime = install()
    (copied / "unet" / "model.onnx").write_bytes(b"\0" * (copied / "unet" / "model.onnx").stat().st_size)
    with pytest.raises(BundleError, match=r"unet: onnxruntime .* cannot load model\.onnx"):
        opened(copied)
    assert not +runtime.gpu.open


# -- providers --------------------------------------------------------------------------------------------------------


def test_devices(install: Install) -> None:
    install(Gpu(2), held=(CUDA, "OpenVINOExecutionProvider", "CoreMLExecutionProvider"))
    found = find_engine("onnxruntime").devices()
    assert [device.name for device in found] == [
        "cpu", "cuda:0", "cuda:1", "coreml", "openvino:cpu", "openvino:gpu", "openvino:npu",
    ]  # fmt: skip
    assert found[1].memory == 80 << 30
    assert "Fake 0, sm90, onnxruntime" in found[1].description
    install(Gpu(missing="the driver knows of none"), held=(CUDA, "DmlExecutionProvider"))
    assert [device.name for device in find_engine("onnxruntime").devices()] == ["cpu", "dml:0"]


@pytest.mark.parametrize(
    ("device", "held", "message", "fix"),
    [
        ("cuda:0", (), "cuda:0 needs CUDAExecutionProvider, which this .* does not have; it has CPU", "pip uninstall onnxruntime, then pip install 'sdrt.ort-gpu.'"),
        ("dml:1", (CUDA,), "dml:1 needs DmlExecutionProvider", r"onnxruntime-directml, which takes its place \(Windows\)"),
        ("coreml", (), "coreml needs CoreMLExecutionProvider", "pip install onnxruntime brings it .macOS"),
        ("migraphx:0", (), "needs MIGraphXExecutionProvider", "onnxruntime-migraphx"),
        ("openvino:gpu", (), "needs OpenVINOExecutionProvider", "onnxruntime-openvino"),
        ("qnn", (), "needs QNNExecutionProvider", "pip install onnxruntime-qnn brings it"),
        ("cuda:2", (CUDA,), r"no device 'cuda:2' here; it has cuda:0 \(Fake 0\)", "sdrt doctor"),
        ("cuda:x", (CUDA,), "no device 'cuda:x'; cuda is asked for as cuda:0", ""),
        ("cuda:", (CUDA,), "no device 'cuda:'", ""),
        ("openvino", (), "openvino is asked for as openvino:cpu, openvino:gpu, openvino:npu", ""),
        ("openvino:tpu", (), "no device 'openvino:tpu'", ""),
        ("coreml:0", (), "coreml is asked for as coreml", ""),
        ("rocm:0", (), "no device 'rocm:0' here; it has cpu", "sdrt doctor"),
    ],
)  # fmt: skip
def test_devices_that_are_not_here(
    bundle: Path, install: Install, device: str, held: tuple[str, ...], message: str, fix: str
) -> None:
    install(held=held)
    with pytest.raises(DeviceError, match=message) as caught:
        opened(bundle, device=device)
    assert __import__("re").search(fix, caught.value.fix)


def test_no_driver(bundle: Path, install: Install) -> None:
    runtime = install(Gpu(missing="the driver knows of none"))
    with pytest.raises(DeviceError, match="cuda:0: no NVIDIA GPU can be used here: the driver knows of none"):
        opened(bundle)
    assert runtime.sessions == []


def test_a_provider_that_is_replaced_is_found_out(bundle: Path, install: Install) -> None:
    """ONNX Runtime goes on with the CPU when a provider's library cannot be loaded."""
    runtime = install(loads=False)
    onnxruntime_providers.preload.cache_clear()
    with pytest.raises(
        DeviceError, match=f"asked for {CUDA}, onnxruntime loaded {CPU} in its place: Failed to load libcublas"
    ) as caught:
        opened(bundle)
    assert "sdrt[ort-gpu]" in caught.value.fix
    assert not +runtime.gpu.open
    onnxruntime_providers.preload.cache_clear()


@pytest.mark.parametrize("graphs", ["true", "false"])
def test_nodes_without_a_kernel(bundle: Path, install: Install, graphs: str, caplog: pytest.LogCaptureFixture) -> None:
    runtime = install(lacks=("ArgMax", "ArgMax", "Attention"))
    with pytest.raises(
        DeviceError, match="has no kernels for " + ("all" if graphs == "true" else "2 ArgMax, 1 Attention")
    ) as caught:
        opened(bundle, graphs=graphs)
    assert "--target cuda" in caught.value.fix
    assert not +runtime.gpu.open
    session = opened(bundle, graphs=graphs, fallback="true")
    assert "unet: CUDAExecutionProvider has no kernels for 2 ArgMax, 1 Attention; the CPU runs them" in caplog.text
    arrays = inputs_of(session)
    same(session.run(**arrays), on_cpu(bundle, "unet", **arrays))
    assert runtime.sessions[-2].runs == {"plain": 1}, "what runs on the CPU cannot be recorded"
    session.close()


@pytest.mark.parametrize("device", ["dml:0", "openvino:gpu", "coreml"])
def test_other_providers(bundle: Path, install: Install, device: str, caplog: pytest.LogCaptureFixture) -> None:
    held = ("DmlExecutionProvider", "OpenVINOExecutionProvider", "CoreMLExecutionProvider")
    runtime = install(held=held)
    session = opened(bundle, device=device)
    made = runtime.sessions[0]
    assert made._entry("session.disable_cpu_ep_fallback") == "1"
    assert made.options == {
        "dml:0": {"device_id": "0"}, "openvino:gpu": {"device_type": "GPU"}, "coreml": {"ModelFormat": "MLProgram"},
    }[device]  # fmt: skip
    arrays = inputs_of(session)
    same(session.run(**arrays), on_cpu(bundle, "unet", **arrays))
    session.close()
    install(held=held, lacks=("Attention",))
    with pytest.raises(DeviceError, match="no kernels for all") as caught:
        opened(bundle, device=device)
    word = device.partition(":")[0]
    assert f"--target {word} --shape" in caught.value.fix
    assert "-O fallback=true" in caught.value.fix
    opened(bundle, device=device, fallback="true").close()
    assert "1 Attention; the CPU runs them" in caplog.text


def test_provider_options(bundle: Path, install: Install) -> None:
    """A wrong one is an error whether ONNX Runtime refuses it or goes on without it."""
    runtime = install(held=(CUDA, "CoreMLExecutionProvider"))
    with pytest.raises(InputError, match='refuses an option: Unknown provider option: "colour"'):
        opened(bundle, provider="colour=red")
    with pytest.raises(InputError, match="CoreMLExecutionProvider ignores the option 'colour'; it has ModelFormat"):
        opened(bundle, device="coreml", provider="colour=red")
    with pytest.raises(InputError, match="the cpu takes no provider options"):
        opened(bundle, device="cpu", provider="colour=red")
    for pair in ("device_id=1", "user_compute_stream=123", "enable_cuda_graph=0", "use_tf32=1", "prefer_nhwc=1"):
        with pytest.raises(InputError, match=f"provider={pair.partition('=')[0]}=... is said by (--device|-O|sdrt)"):
            opened(bundle, provider=pair)
    with pytest.raises(InputError, match="keep is 0"):
        opened(bundle, keep="0")
    with pytest.raises(InputError, match="threads are for the cpu"):
        open_session(bundles.load(bundle), "unet", device="coreml", options=OpenOptions(threads=2))
    assert not +runtime.gpu.open


@pytest.mark.parametrize("text", ["a", "a=", "=b", "a=1,", "a=1,a=2", ","])
def test_pairs_refuse(text: str) -> None:
    with pytest.raises(InputError, match="expected key=value pairs"):
        Pairs(text)


def test_pairs() -> None:
    assert dict(Pairs("a=1,b=x=y")) == {"a": "1", "b": "x=y"}
    assert not Pairs("")


def test_plugins_are_registered(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = install(held=())
    registered = []
    plugin = type("plugin", (), {"get_library_path": staticmethod(lambda: "/there/qnn.so")})
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime_qnn", plugin)

    def register(name: str, path: str) -> None:
        registered.append((name, path))
        runtime.held = (*runtime.held, name)
        runtime.plugins.append(name)

    monkeypatch.setattr(runtime, "register_execution_provider_library", register, raising=False)
    for _ in range(2):
        assert [d.name for d in find_engine("onnxruntime").devices()] == ["cpu", "qnn:htp", "qnn:gpu", "qnn:cpu"]
    assert registered == [("QNNExecutionProvider", "/there/qnn.so")]


def test_a_plugin_is_asked_for_by_its_devices(bundle: Path, install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its provider's name onnxruntime makes a session on the CPU, and says nothing."""
    runtime = install(held=("QNNExecutionProvider",))
    runtime.plugins.append("QNNExecutionProvider")
    session = opened(bundle, device="qnn:gpu")
    assert runtime.sessions[0].provider == "QNNExecutionProvider"
    assert runtime.sessions[0].options == {"backend_type": "gpu"}
    session.close()


@pytest.mark.parametrize(
    ("said", "message", "fix"),
    [
        ("libmigraphx_c.so.3: cannot open shared object file", "cannot be loaded: .*libmigraphx", "vendor's library"),
        ("OpenVINO does not support Attention", "cannot load the graph: .*Attention", "--target migraphx --shape"),
    ],
)
def test_what_a_provider_says_is_not_damage(
    bundle: Path, install: Install, monkeypatch: pytest.MonkeyPatch, said: str, message: str, fix: str
) -> None:
    runtime = install(held=("MIGraphXExecutionProvider",))

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError(said)

    monkeypatch.setattr(runtime, "InferenceSession", fails)
    with pytest.raises(DeviceError, match=message) as caught:
        opened(bundle, device="migraphx:0")
    assert fix in caught.value.fix


def test_pairs_say_what_they_want_on_the_command_line(bundle: Path, install: Install) -> None:
    install(held=("CoreMLExecutionProvider",))
    with pytest.raises(InputError, match="expected key=value pairs, each key once, got 'a'"):
        opened(bundle, device="coreml", provider="a")
