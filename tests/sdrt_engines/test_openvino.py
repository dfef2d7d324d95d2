"""What is particular to the OpenVINO engine. It runs where openvino is installed; a GPU or an NPU is not needed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdrt
from sdrt import BuildError, BundleError, DeviceError, InputError, Pipeline, demo
from sdrt import bundle as bundles
from sdrt.engine import BuildOptions, Device, OpenOptions, open_session
from sdrt.metrics import psnr
from sdrt.tokenizer import ClipTokenizer
from sdrt.verify import reference_cases
from sdrt_engines import openvino as engine
from sdrt_engines.build import build
from tests.conftest import Cli, Model
from tests.pair import Pair, load_diffusers

openvino = pytest.importorskip("openvino")
PROMPTS, NEGATIVE = ["a red star over a lighthouse!", "two cats, it's raining"], ["blurry", "dark"]


ALL = {"winograd": "all"}


@pytest.fixture(scope="module")
def built(models: Callable[[str], Model], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``built("sdxl", precision="w8", extra=…)``: that tiny model, built once for OpenVINO.

    Its channels are too few to be rewritten by Winograd; ``extra=ALL`` rewrites them all the same.
    """
    root = tmp_path_factory.mktemp("openvino")

    def make(name: str = "tiny-sd", **options: Any) -> Path:
        out = root / f"{name}-{'-'.join(map(str, options.values()))}".replace(" ", "")
        if not out.exists():
            with pytest.MonkeyPatch.context() as patch:
                if options.get("extra") == ALL:
                    patch.setattr("sdrt_engines.graph.winograd.LEAST", 16)
                build(models(name).bundle, out, "openvino", BuildOptions(**options))
        return out

    return make


# -- whole pictures ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["tiny-sd", "sd2-v", "sdxl"])
def pair(request: pytest.FixtureRequest, models: Callable[[str], Model], built: Callable[..., Path]) -> Iterator[Pair]:
    path = built(request.param, extra=ALL)
    assert bundles.load(path).component("unet").artifact.facts["winograd"] >= 20
    with Pipeline.from_pretrained(path) as ours:
        yield Pair(ours, load_diffusers(models(request.param).checkpoint))


@pytest.mark.parametrize(
    ("scheduler", "width", "height", "guidance_scale", "steps"),
    [("DDIM", 64, 64, 7.5, 6), ("Euler", 72, 136, 7.5, 4), ("DPM++ 2M Karras", 200, 264, 1.0, 3)],
)
def test_pictures_equal_diffusers(
    pair: Pair, scheduler: str, width: int, height: int, guidance_scale: float, steps: int
) -> None:
    """In float32, with every convolution that can be rewritten rewritten; Euler's timesteps are fractional."""
    expected, got = pair.both(
        scheduler, 5, prompt=PROMPTS, negative_prompt=NEGATIVE, width=width, height=height,
        guidance_scale=guidance_scale, num_inference_steps=steps,
    )  # fmt: skip
    assert psnr(expected, got, 1.0) >= 95


# Seen with the tiny model: fp16 70, w8 50, int8 27 dB; with the demo model's trained weights 77, 49 and 33 dB. Guidance
# 7.0 for 7.5 scores 50 dB in the tiny one: float16 must be well above.
FLOORS = {"fp16": 60, "bf16": 30, "w8": 42, "int8": 20}


needs_bfloat16 = pytest.mark.skipif("BF16" not in engine._capabilities("CPU"), reason="no bfloat16 here")


def some(floors: dict[str, float]) -> list[Any]:
    """Precisions, those left out that cannot be computed in here."""
    return [pytest.param(name, marks=needs_bfloat16 if name == "bf16" else ()) for name in floors]


@pytest.mark.parametrize("precision", some(FLOORS))
def test_precisions(precision: str, built: Callable[..., Path], pipe: Pipeline) -> None:
    arguments: dict[str, Any] = {"width": 128, "height": 64, "num_inference_steps": 6, "seed": 5, "output_type": "np"}
    expected = pipe(PROMPTS, negative_prompt=NEGATIVE, **arguments).images
    with Pipeline.from_pretrained(built(precision=precision)) as ours:
        figure = psnr(expected, ours(PROMPTS, negative_prompt=NEGATIVE, **arguments).images, 1.0)
    print(f"{precision}: {figure:.1f} dB")
    assert figure >= FLOORS[precision]


DEMO_FLOORS = {"fp32": 95, "fp16": 50, "bf16": 30, "w8": 42, "int8": 25}


@pytest.mark.parametrize("precision", some(DEMO_FLOORS))
def test_trained_weights(precision: Any, tmp_path: Path) -> None:
    """The demo model: pictures of 20 steps of its own scheduler."""
    build("demo", tmp_path / "out", "openvino", BuildOptions(precision=precision))
    arguments: dict[str, Any] = {"seed": 3, "output_type": "np"}
    with Pipeline.from_pretrained("demo") as ort, Pipeline.from_pretrained(tmp_path / "out") as ours:
        pairs = [(ort(prompt, **arguments).images, ours(prompt, **arguments).images) for prompt in demo.PROMPTS[:3]]
    figures = [psnr(a, b, 1.0) for a, b in pairs]
    print(f"{precision}: {', '.join(f'{figure:.1f}' for figure in figures)} dB")
    assert np.median(figures) >= DEMO_FLOORS[precision]


# -- what is built -----------------------------------------------------------------------------------------------------


def test_engine_bundle_is_self_contained(built: Callable[..., Path], bundle: Path) -> None:
    path = built()
    held, origin = bundles.load(path), bundles.load(bundle)
    assert bundles.damaged(held) == []
    assert not [file for file in path.rglob("*") if "onnx" in file.name]
    for name, component in held.manifest.components.items():
        source = origin.component(name)
        assert component.artifact.built_from == source.artifact.files[0].sha256
        assert (component.artifact.engine, component.artifact.precision) == ("openvino", "fp32")
        assert (component.inputs, component.outputs) == (source.inputs, source.outputs)
        assert all(p.psnr is None or p.psnr >= 110 for p in component.artifact.parity)
        text = (path / name / "openvino_model.xml").read_text()
        assert str(path.parent) not in text, "names a folder of the machine that built it"


def test_names_and_types_are_the_ecosystems(built: Callable[..., Path]) -> None:
    """optimum-intel's, which OpenVINO GenAI shares: timesteps in int64."""
    model = openvino.Core().read_model(built() / "unet" / "openvino_model.xml")
    found = {port.any_name: port.element_type.get_type_name() for port in model.inputs}
    assert found == {"sample": "f32", "timestep": "i64", "encoder_hidden_states": "f32"}
    assert [port.any_name for port in model.outputs] == ["out_sample"]


def test_fractional_timesteps_are_kept(built: Callable[..., Path], bundle: Path) -> None:
    ours = open_session(bundles.load(built()), "unet")
    ort = open_session(bundles.load(bundle), "unet")
    inputs, _ = next(iter(reference_cases(ours_bundle := bundles.load(built()), "unet").values()))
    assert ours_bundle.component("unet").inputs[1].dtype == "f32"
    whole = ours.run(**inputs | {"timestep": np.array([500], np.float32)})["out_sample"]
    between = inputs | {"timestep": np.array([500.4], np.float32)}
    assert psnr(ort.run(**between)["out_sample"], ours.run(**between)["out_sample"]) >= 95
    assert psnr(whole, ours.run(**between)["out_sample"]) < 80
    ours.close()
    ort.close()


def test_weights_take_half_and_a_quarter(built: Callable[..., Path]) -> None:
    sizes = {p: (built(precision=p) / "unet" / "openvino_model.bin").stat().st_size for p in ("fp32", "fp16", "w8")}
    assert sizes["fp16"] < 0.52 * sizes["fp32"]
    assert sizes["w8"] < 0.32 * sizes["fp32"]


def test_int8_weights_use_seven_bits(
    built: Callable[..., Path], tmp_path: Path, models: Callable[[str], Model]
) -> None:
    """CPUs without VNNI add two products in 16 bits: twice 63 · 128 fits, twice 127 · 128 · 2 does not."""
    model = openvino.Core().read_model(built(precision="int8") / "unet" / "openvino_model.xml")
    most = [
        np.abs(node.data.astype(int)).max()
        for node in model.get_ops()
        if node.get_type_name() == "Constant" and node.get_element_type() == openvino.Type.i8 and node.data.size > 256
    ]
    assert len(most) > 50
    assert max(most) == 63
    assert bundles.load(built(precision="int8")).component("unet").artifact.facts["weight_bits"] == 7


def test_eight_bits_are_refused_without_vnni(
    built: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, models: Callable[[str], Model], tmp_path: Path
) -> None:
    options = BuildOptions(precision={"vae_decoder": "int8"}, extra={"weight_bits": "8"})
    monkeypatch.setattr("sdrt.processor.is_x86", lambda: True)
    monkeypatch.setattr("sdrt.processor.features", lambda: ("avx", "avx2", "avx512_vnni"))
    build(models("tiny-sd").bundle, tmp_path / "out", "openvino", options)
    held = bundles.load(tmp_path / "out")
    assert held.component("vae_decoder").artifact.facts["weight_bits"] == 8
    open_session(held, "vae_decoder").close()
    monkeypatch.setattr("sdrt.processor.features", lambda: ("avx", "avx2"))
    with pytest.raises(DeviceError, match="no VNNI") as caught:
        open_session(held, "vae_decoder")
    assert "without -O weight_bits=8" in caught.value.fix
    monkeypatch.setattr("sdrt.processor.features", lambda: ())  # Windows and macOS tell nothing
    with pytest.raises(DeviceError, match="is not known to have VNNI"):
        open_session(held, "vae_decoder")
    monkeypatch.setattr("sdrt.processor.is_x86", lambda: False)
    open_session(held, "vae_decoder").close()


def test_links_out_of_the_graphs_folder(models: Callable[[str], Model], tmp_path: Path) -> None:
    """As in the Hugging Face Hub's cache: OpenVINO follows none."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1", tmp_path / "models--a--b" / "blobs"
    shutil.copytree(models("tiny-sd").bundle, snapshot)
    blobs.mkdir()
    for i, file in enumerate(snapshot.rglob("model.onnx.data")):
        file.rename(blobs / str(i))
        file.symlink_to(blobs / str(i))
    held = build(snapshot, tmp_path / "out", "openvino")
    assert min(p.psnr or 999 for p in held.component("unet").artifact.parity) >= 110


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BuildOptions(target="sm86"), "any device of OpenVINO's, asked for target sm86"),
        (BuildOptions(precision="w4"), "builds fp32, fp16, bf16, int8, w8; asked for w4"),
        (BuildOptions(extra={"winograd": "some"}), "winograd: expected all, large, none, got 'some'"),
    ],
    ids=str,
)
def test_build_refuses(bundle: Path, tmp_path: Path, options: BuildOptions, message: str) -> None:
    with pytest.raises((BuildError, InputError), match=message):
        build(bundle, tmp_path / "out", "openvino", options)
    assert list(tmp_path.iterdir()) == []


def test_build_starts_from_onnx(built: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="is built for openvino already"):
        build(built(), tmp_path / "out", "openvino")


# -- opening -----------------------------------------------------------------------------------------------------------


def compiled(session: Any) -> Any:
    """What the session's only request runs."""
    (request,) = session._session._requests.values()
    return request.get_compiled_model()


def test_open_options_give_the_same_picture(built: Callable[..., Path]) -> None:
    held = bundles.load(built())
    inputs, _ = next(iter(reference_cases(held, "unet").values()))
    seen = []
    for extra, device in (
        ({}, None),
        ({"shapes": "any"}, "cpu"),
        ({"hint": "throughput"}, "cpu"),
        ({"streams": "2"}, "cpu"),
        ({"keep": "3", "compute": "f32"}, "auto"),
    ):
        session = open_session(held, "unet", device=device, options=OpenOptions(threads=None, extra=extra))
        seen.append(session.run(**inputs)["out_sample"])
        if device == "cpu":
            hint = str(compiled(session).get_property("PERFORMANCE_HINT"))
            assert ("THROUGHPUT" in hint) == (extra.get("hint") == "throughput")
            if "streams" in extra:
                assert compiled(session).get_property("NUM_STREAMS") == 2
        session.close()
    assert min(psnr(seen[0], other) for other in seen[1:]) >= 110


def test_threads(built: Callable[..., Path]) -> None:
    held = bundles.load(built())
    inputs, _ = next(iter(reference_cases(held, "unet").values()))
    session = open_session(held, "unet", options=OpenOptions(threads=1))
    session.run(**inputs)
    assert compiled(session).get_property("INFERENCE_NUM_THREADS") == 1
    session.close()
    with pytest.raises(InputError, match="threads are for the cpu, the device is auto"):
        open_session(held, "unet", device="auto", options=OpenOptions(threads=1))


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Component and shapes of each compilation from now on."""
    seen: list[Any] = []
    original = engine.OpenVinoSession._compiled
    monkeypatch.setattr(
        engine.OpenVinoSession,
        "_compiled",
        lambda self, shapes=None: (seen.append((self.name, shapes)), original(self, shapes))[1],
    )
    return seen


def test_a_generation_compiles_each_network_once(built: Callable[..., Path], compilations: list[Any]) -> None:
    """Before its first call, in the loading that is told; another size anew, and the same one not again."""
    arguments: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np"}
    with Pipeline.from_pretrained(built()) as pipe:
        for side, guidance_scale, expected in (
            (64, 7.5, ["text_encoder", "unet", "vae_decoder"]),
            (64, 7.5, []),
            (72, 7.5, ["unet", "vae_decoder"]),
            (72, 1.0, ["text_encoder", "unet"]),
        ):
            compilations.clear()
            got = pipe("a fox", width=side, height=64, guidance_scale=guidance_scale, **arguments)
            assert [name for name, _ in compilations] == expected
            assert (got.timings.load > 0) == bool(expected)
        compilations.clear()
        pipe.decode(np.zeros((1, 4, 8, 8), np.float32), "np")
        got = pipe("a fox", width=72, height=64, guidance_scale=1.0, **arguments)
        assert [name for name, _ in compilations] == ["vae_decoder"] * 2, "a preview of another size took its place"
        assert got.timings.load > 0


def test_sizes_that_come_again_are_kept(built: Callable[..., Path], compilations: list[Any]) -> None:
    held = bundles.load(built())
    small, large = (np.zeros((1, 4, side, side), np.float32) for side in (8, 9))
    for keep, expected in ((1, 4), (2, 2)):
        compilations.clear()
        session = open_session(held, "vae_decoder", options=OpenOptions(extra={"keep": str(keep)}))
        first = session.run(latent_sample=small)["sample"]
        session.run(latent_sample=large)
        np.testing.assert_array_equal(session.run(latent_sample=small)["sample"], first)
        session.run(latent_sample=large)
        session.close()
        assert len(compilations) == expected


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"keep": "0"}, "keep is 0"),
        ({"streams": "-1"}, "streams -1"),
        ({"compute": "fp8"}, "expected auto, f32, bf16, f16"),
        ({"shapes": "some"}, "expected each, any"),
    ],
    ids=str,
)
def test_bad_options(built: Callable[..., Path], extra: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_session(bundles.load(built()), "unet", options=OpenOptions(extra=extra))


def test_a_type_that_the_device_does_not_have(built: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    held = bundles.load(built(precision="fp16"))
    monkeypatch.setattr(engine, "_capabilities", lambda device: ["FP32", "INT8"])
    with pytest.raises(DeviceError, match=r"cpu does not compute in bf16 here; it has f32") as caught:
        open_session(held, "unet", options=OpenOptions(extra={"compute": "bf16"}))
    assert caught.value.fix == "-O compute=f32"
    open_session(held, "unet").close()  # fp16 is stored so, and computed in float32 where there is nothing else
    monkeypatch.setattr(engine, "_capabilities", lambda device: ["FP16", "INT8"])
    plain = bundles.load(built())
    with pytest.raises(DeviceError, match="does not compute in f32 here; it has f16"):  # an NPU
        open_session(plain, "unet")


def test_bfloat16_is_said_where_there_is_none(
    built: Callable[..., Path], bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither built where nothing can check it, nor computed in float32 instead."""
    held = bundles.load(built(precision="fp16"))
    artifact = held.component("unet").artifact
    monkeypatch.setattr(engine, "_capabilities", lambda device: ["FP32", "FP16", "INT8"])
    with pytest.raises(DeviceError, match="cpu does not compute in bf16 here; it has f32, f16") as caught:
        engine._compute("unet", "cpu", replace(artifact, precision="bf16"), engine.OpenVinoOptions())
    assert caught.value.fix == "-O compute=f32"
    with pytest.raises(BuildError, match="nothing here computes in bfloat16") as refused:
        build(bundle, tmp_path / "out", "openvino", BuildOptions(precision="bf16"))
    assert refused.value.fix == "build in fp16, and open it with -O compute=bf16 where there is bfloat16"
    assert not (tmp_path / "out").exists()


@needs_bfloat16
def test_bfloat16_is_what_a_build_in_it_computes_in(
    built: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the rewrites for tiles where the processor has them; without, as in float32 on request."""
    held, called = bundles.load(built(precision="bf16")), []
    monkeypatch.setattr(engine, "for_tiles", called.append)
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    made = {}
    for features in ((), ("amx_bf16",)):
        monkeypatch.setattr("sdrt.processor.features", lambda features=features: features)
        session = open_session(held, "vae_decoder")
        made[len(features)] = session.run(latent_sample=latents)["sample"]
        assert len(called) == len(features)
        session.close()
    session = open_session(held, "vae_decoder", options=OpenOptions(extra={"compute": "f32"}))
    exact = session.run(latent_sample=latents)["sample"]
    session.close()
    assert len(called) == 1
    assert 30 < psnr(exact, made[0]) < 80


def test_what_is_computed_in_is_read_back(built: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that claims a type and then computes in another is found out."""
    held = bundles.load(built())
    if "BF16" in engine._capabilities("CPU"):
        pytest.skip("this processor has bfloat16, so that a claim to it cannot be a false one")
    monkeypatch.setattr(engine, "_capabilities", lambda device: ["FP32", "BF16"])
    session = open_session(held, "vae_decoder", options=OpenOptions(extra={"compute": "bf16"}))
    with pytest.raises(DeviceError, match=r"computes in .*float32.*, asked for .*bfloat16|cannot compile"):
        session.run(latent_sample=np.zeros((1, 4, 8, 8), np.float32))


def test_rewritten_convolutions_compute_in_float32_only(
    built: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = bundles.load(built(extra=ALL))
    monkeypatch.setattr(engine, "_capabilities", lambda device: ["FP32", "BF16"])
    with pytest.raises(
        DeviceError, match="too coarse for anything but f32; asked for bf16, cpu has f32, bf16"
    ) as caught:
        open_session(held, "unet", options=OpenOptions(extra={"compute": "bf16"}))
    assert caught.value.fix.endswith("-O winograd=none, or -O compute=f32")
    monkeypatch.setattr(engine, "_capabilities", lambda device: ["FP16", "INT8"])  # an NPU: no other -O helps
    with pytest.raises(DeviceError, match="too coarse for anything but f32; asked for f32, cpu has f16") as caught:
        open_session(held, "unet")
    assert caught.value.fix.endswith("-O winograd=none")


@pytest.mark.parametrize("compute", ["bf16", "f16"])
def test_auto_promises_no_type(built: Callable[..., Path], compute: str) -> None:
    """Of what it chooses, later perhaps, nothing can be read back."""
    with pytest.raises(DeviceError, match=f"auto cannot promise to compute in {compute}"):
        open_session(bundles.load(built()), "unet", device="auto", options=OpenOptions(extra={"compute": compute}))


def test_an_npu_takes_one_size_at_a_time(built: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "devices", lambda: [Device("cpu", "a CPU", 0), Device("npu", "an NPU", 0)])
    with pytest.raises(InputError, match="an npu takes one size at a time, shapes is any"):
        open_session(bundles.load(built()), "unet", device="npu", options=OpenOptions(extra={"shapes": "any"}))


def test_a_device_that_cannot_be_asked_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    core = engine._core()

    class Broken:
        available_devices = (*core.available_devices, "GPU")

        def get_property(self, device: str, name: str) -> Any:
            if device == "GPU":
                raise RuntimeError("driver says no")
            return core.get_property(device, name)

    monkeypatch.setattr(engine, "_core", Broken)
    assert [device.name for device in engine.devices()] == ["cpu"]
    assert "GPU is left out, it cannot be asked: driver says no" in caplog.text


def test_no_other_device_in_place_of_one_that_is_missing(built: Callable[..., Path]) -> None:
    for device in ("gpu.7", "npu.3", "CPU", "cuda:0"):
        with pytest.raises(DeviceError, match=f"no device '{device}' here; it has cpu"):
            open_session(bundles.load(built()), "unet", device=device)


def test_a_wrong_manifest_is_told(built: Callable[..., Path], tmp_path: Path) -> None:
    copied = Path(shutil.copytree(built(), tmp_path / "copied"))
    text = (copied / "sdrt.json").read_text()
    (copied / "sdrt.json").write_text(text.replace('"latent_sample"', '"latents"'))
    with pytest.raises(BundleError, match=r"the graph is not what sdrt.json says: it has no latents: f32"):
        open_session(bundles.load(copied), "vae_decoder")


def test_a_damaged_graph_is_told(built: Callable[..., Path], tmp_path: Path) -> None:
    copied = Path(shutil.copytree(built(), tmp_path / "copied"))
    path = copied / "unet" / "openvino_model.xml"
    path.write_bytes(path.read_bytes()[:-400].ljust(path.stat().st_size))
    with pytest.raises(BundleError, match=r"cannot load openvino_model\.xml") as caught:
        open_session(bundles.load(copied), "unet")
    assert "sdrt verify" in caught.value.fix


def test_cli(built: Callable[..., Path], cli: Cli, tmp_path: Path) -> None:
    done = cli("generate", "a fox", "-m", built(), "-o", tmp_path / "fox.png", "--steps", 2, "--seed", 1)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "fox.png").stat().st_size > 100
    done = cli("doctor")
    assert "openvino" in done.stdout
    assert "FP32" in done.stdout


# -- the tokenizer for others ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-sd", "sd2-v"])
def test_tokenizer_gives_the_same_ids(name: str, built: Callable[..., Path]) -> None:
    tokenizers = pytest.importorskip("openvino_tokenizers")
    held = bundles.load(built(name, extra=ALL))
    text = held.manifest.text_encoders[0]
    folder = held.path(text.tokenizer)
    core = openvino.Core()
    core.add_extension(str(tokenizers._ext_path))
    compiled = core.compile_model(folder / "openvino_tokenizer.xml", "CPU")
    ours = ClipTokenizer.load(folder, (text.bos_token, text.eos_token, text.pad_token))
    bos, eos = ours.id(text.bos_token), ours.id(text.eos_token)
    generator = np.random.default_rng(0)
    letters = list("abc XYZ'0123?.,éß漢字😀\n\t-_<|>")  # SD 2.x pads with "!", which is a special token there
    prompts = ["", "A  Photo\tof a Café, it's 2024.", "(masterpiece:1.3)", "word " * 200, "e\u0301 don't"]
    prompts += ["".join(generator.choice(letters, generator.integers(60))) for _ in range(100)]
    for prompt in prompts:
        expected = [bos, *ours.encode(prompt)[: text.max_length - 2], eos]
        assert compiled(openvino.Tensor([prompt]))["input_ids"][0].tolist() == expected, prompt


def test_tokenizer_is_a_file_of_the_bundle(built: Callable[..., Path]) -> None:
    files = bundles.load(built()).component("text_encoder").artifact.files
    assert [file.path for file in files][2:] == ["tokenizer/openvino_tokenizer.xml", "tokenizer/openvino_tokenizer.bin"]


def test_without_the_tokenizers_library(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "openvino_tokenizers", None)
    with pytest.raises(sdrt.EngineUnavailable, match="openvino_tokenizers cannot be imported"):
        build(bundle, tmp_path / "out", "openvino")
    assert list(tmp_path.iterdir()) == []
