"""Whole pictures against diffusers in float32, and everything else that the pipeline promises."""

from __future__ import annotations

import threading
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import sdrt
from sdrt import schedulers
from sdrt.engine import open_session
from sdrt.metrics import psnr
from sdrt.pipeline import Pipeline

PROMPTS = ["a red star over a lighthouse", "two cats, it's raining"]
NEGATIVE = ["blurry", "dark, low quality"]
SCHEDULERS = {
    "DDIM": ("DDIMScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler Karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "PLMS": ("PNDMScheduler", {}),
}  # fmt: skip
SIZES = [(64, 64), (72, 128), (520, 264)]


@pytest.fixture(scope="module")
def theirs(checkpoint: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def diffusers_pictures(theirs: Any, config: dict[str, Any], seed: int, **arguments: Any) -> np.ndarray:
    """diffusers' pictures f32[B,H,W,3], each picture of the batch with a generator of its own."""
    count = len(arguments["prompt"]) if isinstance(arguments["prompt"], list) else 1
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        return np.asarray(theirs(generator=generators, output_type="np", **arguments).images)


# -- parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_pictures_equal_diffusers(
    pipe: Pipeline, theirs: Any, name: str, width: int, height: int, guidance_scale: float
) -> None:
    """Batch 2, negative prompts. The bar is 100 dB on float pictures; 112 to 138 dB was seen."""
    class_name, options = SCHEDULERS[name]
    arguments: dict[str, Any] = {
        "prompt": PROMPTS, "negative_prompt": NEGATIVE, "width": width, "height": height,
        "guidance_scale": guidance_scale, "num_inference_steps": 6,
    }  # fmt: skip
    config = {**pipe.scheduler_config, **options, "_class_name": class_name}
    expected = diffusers_pictures(theirs, config, 5, **arguments)
    got = pipe(**arguments, seed=5, scheduler=name, output_type="np").images
    assert got.dtype == np.float32
    assert psnr(expected, got, 1.0) >= 100


@pytest.mark.parametrize(
    "name",
    ["DEIS", "DPM++ 2M Beta", "DPM++ 2M Heun", "DPM++ 3M", "DPM++ 2S", "DPM2 Karras", "Euler Exponential", "Heun", "LMS Karras", "UniPC"],
)  # fmt: skip
def test_samplers_equal_diffusers(pipe: Pipeline, theirs: Any, name: str) -> None:
    class_name, options = schedulers.A1111[name]
    arguments: dict[str, Any] = {"prompt": PROMPTS, "width": 64, "height": 72, "num_inference_steps": 8}
    config = {**pipe.scheduler_config, **options, "_class_name": class_name}
    expected = diffusers_pictures(theirs, config, 5, **arguments)
    result = pipe(**arguments, seed=5, scheduler=name, output_type="np")
    assert psnr(expected, result.images, 1.0) >= 100
    assert len(result.timings.steps) == (15 if class_name.startswith(("Heun", "KDPM2")) else 8)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("class_name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_scheduler_config_as_a_dict(
    pipe: Pipeline, theirs: Any, class_name: str, spacing: str, prediction: str
) -> None:
    config = {
        **pipe.scheduler_config,
        "_class_name": class_name,
        "timestep_spacing": spacing,
        "prediction_type": prediction,
    }
    arguments: dict[str, Any] = {"prompt": PROMPTS[0], "width": 64, "height": 72, "num_inference_steps": 5}
    expected = diffusers_pictures(theirs, config, 1, **arguments)
    assert psnr(expected, pipe(**arguments, seed=1, scheduler=config, output_type="np").images, 1.0) >= 100


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_clip_skip_equals_diffusers(
    pipe: Pipeline, theirs: Any, clip_skip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # diffusers 0.42 looks for the final layer norm where transformers 4 kept it.
    monkeypatch.setattr(type(theirs.text_encoder), "text_model", property(lambda model: model), raising=False)
    arguments: dict[str, Any] = {"prompt": PROMPTS[0], "width": 64, "height": 64, "num_inference_steps": 4}
    config = {**pipe.scheduler_config, "_class_name": "DDIMScheduler"}
    expected = diffusers_pictures(theirs, config, 1, **arguments, clip_skip=clip_skip)
    got = pipe(**arguments, seed=1, scheduler="DDIM", output_type="np", clip_skip=clip_skip).images
    plain = pipe(**arguments, seed=1, scheduler="DDIM", output_type="np").images
    assert psnr(expected, got, 1.0) >= 100
    assert psnr(plain, got, 1.0) < 60


def test_the_checkpoint_would_show_a_wrong_setting(pipe: Pipeline) -> None:
    """Guidance 7.0 for 7.5, another prompt, one step less: each must be far below the bar that parity passes."""
    arguments: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 6, "seed": 5, "output_type": "np"}
    for name in SCHEDULERS:
        right = pipe(PROMPTS, scheduler=name, **arguments).images
        for wrong in ({"guidance_scale": 7.0}, {"num_inference_steps": 7}, {"negative_prompt": "blurry"}):
            got = pipe(PROMPTS, **({"scheduler": name} | arguments | wrong)).images
            assert psnr(right, got, 1.0) < 60, (name, wrong)


def test_guidance_that_is_not_given_is_the_models_own(pipe: Pipeline) -> None:
    arguments: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 2, "seed": 5, "output_type": "np"}
    facts = pipe.bundle.manifest
    own = Pipeline(replace(pipe.bundle, manifest=replace(facts, guidance_scale=3.0)), pipe.sessions)
    left, given, usual = (
        own("a fox", **arguments),
        pipe("a fox", guidance_scale=3.0, **arguments),
        pipe("a fox", **arguments),
    )
    assert np.array_equal(left.images, given.images)
    assert not np.array_equal(left.images, usual.images)
    assert (left.guidance_scale, given.guidance_scale, usual.guidance_scale) == (3.0, 3.0, 7.5)


# -- seeds, batches, sizes ------------------------------------------------------------------------------------------


def test_picture_i_is_the_single_run_of_seed_plus_i(pipe: Pipeline) -> None:
    arguments: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 3, "output_type": "np"}
    batch = pipe("a fox", num_images_per_prompt=3, seed=11, **arguments)
    assert batch.seeds == [11, 12, 13]
    for i, seed in enumerate(batch.seeds):
        # Not bit-equal: another batch size is another order of summation in the matrix products.
        assert psnr(pipe("a fox", seed=seed, **arguments).images[0], batch.images[i], 1.0) >= 100


def test_same_seed_same_picture_and_latents_argument(pipe: Pipeline) -> None:
    arguments: dict[str, Any] = {"width": 64, "height": 72, "num_inference_steps": 3, "output_type": "np"}
    first = pipe("a fox", seed=4, **arguments).images
    np.testing.assert_array_equal(first, pipe("a fox", seed=4, **arguments).images)
    latents = torch.randn((1, 4, 9, 8), generator=torch.Generator().manual_seed(4)).numpy()
    assert psnr(first, pipe("a fox", latents=latents, **arguments).images, 1.0) >= 100
    assert not np.array_equal(first, pipe("a fox", seed=5, **arguments).images)


def test_outputs(pipe: Pipeline) -> None:
    arguments: dict[str, Any] = {"width": 64, "height": 72, "num_inference_steps": 2, "seed": 1}
    picture = pipe("a fox", **arguments).images[0]
    floats = pipe("a fox", output_type="np", **arguments)
    latents = pipe("a fox", output_type="latent", **arguments).images
    assert isinstance(picture, Image.Image)
    assert picture.size == (64, 72) == floats.size
    assert floats.images.shape == (1, 72, 64, 3)
    assert latents.shape == (1, 4, 9, 8)
    np.testing.assert_array_equal(np.asarray(picture), (floats.images[0] * 255).round().astype(np.uint8))
    np.testing.assert_array_equal(pipe.decode(latents, "np"), floats.images)
    assert floats.scheduler == "PLMS"


@pytest.mark.parametrize("output_type", ["pil", "np", "latent"])
@pytest.mark.parametrize("image", [None, Image.new("RGB", (64, 64))], ids=["text", "picture"])
def test_timings(null: Pipeline, image: Image.Image | None, output_type: Any) -> None:
    """Every stage that ran has its seconds, every other none, and together they are no more than the whole."""
    arguments: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 4}
    if image is not None:
        arguments |= {"image": image, "strength": 0.75}
    first, got = (null("a fox", output_type=output_type, **arguments).timings for _ in range(2))
    assert (first.load > 0) == (image is not None), "the VAE's encoder is opened at its first use"
    assert got.load == 0
    assert len(got.steps) == len(got.network) == (5 if image is None else 4), "PLMS makes its second call twice"
    assert all(0 < network < step for network, step in zip(got.network, got.steps, strict=True))
    np.testing.assert_allclose(np.add(got.host, got.network), got.steps)
    assert (got.vae_encoder > 0) == (image is not None)
    assert (got.vae_decoder > 0) == (got.post > 0) == (output_type != "latent")
    assert min(got.tokenize, got.text_encoder) > 0
    stages = got.tokenize + got.text_encoder + got.vae_encoder + sum(got.steps) + got.vae_decoder + got.post
    stages += got.load
    assert got.total >= stages


def test_default_size_is_the_models(null: Pipeline) -> None:
    assert null("a fox", num_inference_steps=1).images[0].size == (128, 128)


# -- streaming, callbacks, cancelling -------------------------------------------------------------------------------


def test_stream(pipe: Pipeline) -> None:
    arguments: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 4, "seed": 1, "scheduler": "DDIM"}
    steps = list(pipe.stream("a fox", **arguments))
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert [step.timestep for step in steps] == [751, 501, 251, 1]
    assert all(step.predicted_x0.shape == step.latents.shape == (1, 4, 8, 8) for step in steps)
    whole = pipe("a fox", output_type="latent", **arguments).images
    np.testing.assert_array_equal(steps[-1].latents, whole)
    with pytest.raises(sdrt.InputError, match="multiples of 8"):  # at the call, not at the first step
        pipe.stream("a fox", width=65)


def test_an_open_stream_does_not_deadlock_its_own_thread(null: Pipeline) -> None:
    stream = null.stream("a fox", num_inference_steps=3)
    next(stream)
    with pytest.raises(sdrt.SdrtError, match="stream of this pipeline is still open"):
        null("a fox", num_inference_steps=1)
    stream.close()  # type: ignore[attr-defined]
    null("a fox", num_inference_steps=1)


def test_callback_sees_and_changes_latents(null: Pipeline) -> None:
    seen = []

    def callback(pipe: Pipeline, index: int, timestep: float, values: dict[str, Any]) -> dict[str, Any] | None:
        seen.append((index, timestep))
        return {"latents": np.full_like(values["latents"], 3.0)} if index == 2 else None

    result = null("a fox", num_inference_steps=3, scheduler="DDIM", output_type="latent", callback_on_step_end=callback)
    assert seen == [(0, 667), (1, 334), (2, 1)]
    assert (result.images == 3.0).all()
    with pytest.raises(sdrt.InputError, match="callback's latents"):
        null("a fox", num_inference_steps=1, callback_on_step_end=lambda *_: {"latents": np.zeros(3)})


def test_cancel_from_the_callback_keeps_the_last_step(null: Pipeline) -> None:
    def callback(pipe: Pipeline, index: int, timestep: float, values: dict[str, Any]) -> None:
        if index == 1:
            raise sdrt.Cancelled("enough")

    with pytest.raises(sdrt.Cancelled) as caught:
        null("a fox", num_inference_steps=5, callback_on_step_end=callback)
    assert caught.value.step.index == 1
    assert len(null.decode(caught.value.step.latents)) == 1


def test_cancel_from_another_thread(null: Pipeline) -> None:
    stream = null.stream("a fox", num_inference_steps=5)
    next(stream)
    thread = threading.Thread(target=null.cancel)
    thread.start()
    thread.join()
    with pytest.raises(sdrt.Cancelled, match="before step 2 of 6") as caught:
        next(stream)
    assert caught.value.step.index == 0
    null("a fox", num_inference_steps=1)  # the next generation is not cancelled


def test_threads_take_turns(pipe: Pipeline) -> None:
    arguments: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 3, "output_type": "np"}
    prompts = [f"picture {i}" for i in range(6)]
    expected = [pipe(prompt, seed=i, **arguments).images for i, prompt in enumerate(prompts)]
    got: dict[int, np.ndarray] = {}

    def work(i: int) -> None:
        got[i] = pipe(prompts[i], seed=i, **arguments).images

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(6):
        np.testing.assert_array_equal(got[i], expected[i])


# -- errors ---------------------------------------------------------------------------------------------------------


def test_closed(bundle: Path) -> None:
    pipe = Pipeline.from_pretrained(bundle, engine="null")
    pipe.close()
    pipe.close()
    with pytest.raises(sdrt.InputError, match="closed"):
        pipe("a fox")


class Broken:
    """A session whose output turns NaN at one call."""

    def __init__(self, session: Any, call: int, output: str) -> None:
        self.session, self.spec, self.left, self.output = session, session.spec, call, output

    def prepare(self, sizes: Any) -> Any:
        return self.session.prepare(sizes)

    def bind(self, **constants: Any) -> None:
        self.session.bind(**constants)

    def run(self, **inputs: Any) -> Any:
        outputs = self.session.run(**inputs)
        self.left -= 1
        if self.left < 0:
            outputs[self.output][..., 0] = np.nan
        return outputs

    def close(self) -> None:
        self.session.close()


@pytest.mark.parametrize(
    ("component", "call", "output", "where"),
    [
        ("unet", 1, "out_sample", r"unet: step 2 of 3 \(timestep 334\): 32 of 256 values"),
        ("vae_decoder", 0, "sample", "vae_decoder: the picture"),
        ("text_encoder", 0, "last_hidden_state", "text_encoder: hidden_states is not finite"),
    ],
)
def test_nan_names_component_and_step(bundle: Path, component: str, call: int, output: str, where: str) -> None:
    pipe = Pipeline.from_pretrained(bundle, engine="null")
    broken: Any = Broken(pipe.sessions[component], call, output)
    sessions = pipe.sessions | {component: broken}
    with pytest.raises(sdrt.NumericsError, match=where):
        Pipeline(pipe.bundle, sessions)(
            "a fox", width=64, height=64, num_inference_steps=3, guidance_scale=1.0, scheduler="DDIM"
        )


def test_a_timestep_that_the_network_cannot_take_is_told_before_anything_runs(null: Pipeline) -> None:
    """Other exporters' networks take integers; schedulers with Karras sigmas ask for fractions, here at the second step."""
    facts = null.bundle.manifest
    spec = facts.components["unet"]
    inputs = tuple(replace(i, dtype="i64") if i.name == "timestep" else i for i in spec.inputs)
    components = {**facts.components, "unet": replace(spec, inputs=inputs)}
    bundle = replace(null.bundle, manifest=replace(facts, components=components))
    pipe = Pipeline(bundle, null.sessions | {"unet": open_session(bundle, "unet", engine="null")})
    assert len(pipe("a fox", num_inference_steps=3, scheduler="DDIM").timings.steps) == 3
    with pytest.raises(sdrt.InputError, match=r"asks for timestep 427\.49, the network takes whole ones"):
        pipe.check(sdrt.GenerationRequest("a fox", num_inference_steps=3, scheduler="Euler Karras"))


def test_long_prompt_is_never_cut_silently(null: Pipeline) -> None:
    prompt = " ".join(f"word{i}" for i in range(60))
    with pytest.raises(sdrt.InputError, match=r"tokens, text_encoder takes 75; beyond them: 'word\d+ word"):
        null(prompt, num_inference_steps=1)
    with pytest.warns(UserWarning, match="cut: the prompt has"):
        null(prompt, num_inference_steps=1, truncate=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"colour": "red"}, "no argument 'colour'; known arguments: prompt, negative_prompt, width"),
        ({"scheduler": "Euler b"}, "no scheduler 'Euler b'"),
        ({"num_inference_steps": 1001}, "num_inference_steps is 1001"),
        ({"scheduler": "Euler", "eta": 0.5}, "EulerDiscreteScheduler takes no eta"),
        ({"scheduler": "DDIM", "eta": 1.5}, "eta is 1.5, expected a number from 0 to 1"),
        (
            {"latents": np.zeros((1, 4, 3, 3), np.float32)},
            r"latents has shape \[1, 4, 3, 3\], expected \[1, 4, 16, 16\]",
        ),
        ({"clip_skip": 3}, "clip_skip is 3, text_encoder has at most 2"),
    ],
    ids=str,
)
def test_bad_arguments(null: Pipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(sdrt.InputError, match=message):
        null("a fox", **({"num_inference_steps": 1} | arguments))


def test_unknown_engine_and_device(bundle: Path) -> None:
    with pytest.raises(sdrt.EngineUnavailable, match=r"no engine 'warp'; known engines: .*null, onnxruntime"):
        Pipeline.from_pretrained(bundle, engine="warp")
    with pytest.raises(sdrt.DeviceError, match="onnxruntime has no device 'cpu:7' here; it has cpu"):
        Pipeline.from_pretrained(bundle, device="cpu:7")


def test_engine_bundle_gives_the_same_picture(pipe: Pipeline, ort_bundle: Path) -> None:
    arguments: dict[str, Any] = {"width": 72, "height": 64, "num_inference_steps": 4, "seed": 2, "output_type": "np"}
    with Pipeline.from_pretrained(ort_bundle) as built:
        assert psnr(pipe("a fox", **arguments).images, built("a fox", **arguments).images, 1.0) >= 100


def test_a_profile_that_the_vae_lacks_is_told_before_the_steps(bundle: Path, tmp_path: Path) -> None:
    from sdrt.engine import BuildOptions
    from sdrt_engines.build import build

    build(bundle, tmp_path / "out", "null", BuildOptions(shapes=((64, 64),), batch=1))
    with Pipeline.from_pretrained(tmp_path / "out") as pipe:
        two: dict[str, Any] = {"width": 64, "height": 64, "num_images_per_prompt": 2, "guidance_scale": 1.0}
        with pytest.raises(
            sdrt.InputError, match=r"vae_decoder: this artifact was built for B=1, H=64, W=64; asked for B=2"
        ):
            pipe.stream("a fox", **two)
        with pytest.raises(sdrt.InputError, match="tokens, text_encoder takes 75"):
            pipe.stream("word " * 90, width=64, height=64)
        with pytest.raises(sdrt.InputError, match="the negative_prompt has 90 tokens"):
            pipe.stream("a fox", negative_prompt="word " * 90, width=64, height=64)


def test_every_cut_is_logged(null: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        with pytest.warns(UserWarning, match="cut"):
            null("word " * 90, num_inference_steps=1, truncate=True)
    assert len([record for record in caplog.records if "cut: the prompt has 90 tokens" in record.message]) == 3


def test_a_stream_may_be_driven_by_another_thread(null: Pipeline) -> None:
    """A server's request begins in one worker and goes on in another; the first must wait, not be refused."""
    stream = null.stream("a fox", num_inference_steps=3, scheduler="DDIM")
    thread = threading.Thread(target=lambda: next(stream))
    thread.start()
    thread.join()
    assert [step.index for step in stream] == [1, 2]
    null("a fox", num_inference_steps=1)


def test_steps_are_the_callers_own(pipe: Pipeline) -> None:
    arguments: dict[str, Any] = {
        "width": 64,
        "height": 64,
        "num_inference_steps": 4,
        "seed": 1,
        "scheduler": "DPM++ 2M",
    }
    untouched = pipe("a fox", output_type="latent", **arguments).images
    for step in pipe.stream("a fox", **arguments):
        last = step.latents.copy()
        step.predicted_x0[...] = 0
        step.latents[...] = 0
    np.testing.assert_array_equal(last, untouched)


def test_the_models_own_config_may_hold_what_nobody_knows(null: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    """Old checkpoints do; diffusers passes it over as well. A caller's own dict is held to the letter."""
    null.scheduler_config = {**null.scheduler_config, "predict_epsilon": True, "variance_type": "fixed_small"}
    for name in (None, "Euler", "DPM++ 2M"):
        null("a fox", num_inference_steps=1, scheduler=name)
    assert "unknown options are passed over: 'predict_epsilon'" in caplog.text
    with pytest.raises(sdrt.InputError, match="no option 'predict_epsilon'"):
        null("a fox", num_inference_steps=1, scheduler=null.scheduler_config)


@pytest.mark.parametrize(
    "arguments",
    [
        {"path": None},
        {"threads": 0},
        {"threads": "2"},
        {"options": {"arena": True}},
        {"options": ["a"]},
        {"cache": 3},
        {"device": 3},
        {"device": {"unet": 3}},
        {"device": {"net": "cpu"}},
        {"device": "unet=cpu,"},
    ],
    ids=str,
)
def test_loading_checks_its_types(bundle: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(sdrt.InputError):
        Pipeline.from_pretrained(**({"path": bundle} | arguments))
    with pytest.raises(sdrt.EngineUnavailable):
        Pipeline.from_pretrained(bundle, engine=3)  # type: ignore[arg-type]


def test_decode_checks_its_latents(null: Pipeline) -> None:
    for latents in ("a", np.zeros((1, 4, 8, 8)), np.zeros((1, 3, 8, 8), np.float32)):
        with pytest.raises(sdrt.InputError):
            null.decode(latents)  # type: ignore[arg-type]


def test_cancelled_survives_pickling() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(sdrt.Cancelled("enough", "go on", step=3)))
    assert (error.message, error.fix, error.step) == ("enough", "go on", 3)
