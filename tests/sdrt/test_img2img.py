"""Image to image against diffusers in float32, and what the pipeline makes of the picture that it is given."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable
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
from tests.conftest import Cli, Model

PROMPTS = ["a red star over a lighthouse", "two cats, it's raining"]
SCHEDULERS = {
    "DDIM": ("DDIMScheduler", {}),
    "Euler Karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "PLMS": ("PNDMScheduler", {}),
}  # fmt: skip


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Soft colours with edges in them."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    picture.paste((250, 10, 30), (width // 4, height // 4, width // 2, height // 2))
    return picture


def load(checkpoint: Path, kind: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = getattr(diffusers, kind).from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def theirs(checkpoint: Path) -> Any:
    return load(checkpoint, "StableDiffusionImg2ImgPipeline")


def pictures(theirs: Any, config: dict[str, Any], seed: int, **arguments: Any) -> np.ndarray:
    count = len(arguments["prompt"]) if isinstance(arguments["prompt"], list) else 1
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        return np.asarray(theirs(generator=generators, output_type="np", **arguments).images)


@pytest.mark.parametrize("strength", [0.2, 0.35, 0.5, 0.8, 1.0])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (128, 72)])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_pictures_equal_diffusers(
    pipe: Pipeline, theirs: Any, name: str, width: int, height: int, strength: float
) -> None:
    """Batch 2 with a picture each; the bar is 90 dB. The encoder's draw comes before the noise, from one generator."""
    class_name, options = SCHEDULERS[name]
    arguments: dict[str, Any] = {
        "prompt": PROMPTS, "negative_prompt": ["blurry", ""], "image": [photo(width, height, i) for i in (1, 2)],
        "strength": strength, "guidance_scale": 7.5, "num_inference_steps": 7,
    }  # fmt: skip
    config = {**pipe.scheduler_config, **options, "_class_name": class_name}
    expected = pictures(theirs, config, 3, **arguments)
    got = pipe(**arguments, seed=3, scheduler=name, output_type="np").images
    assert got.shape == (2, height, width, 3)
    assert psnr(expected, got, 1.0) >= 90


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("name", ["DEIS", "DPM++ 2S", "DPM2", "Heun", "Heun Karras", "LMS", "SA-Solver", "UniPC"])
def test_samplers_equal_diffusers(pipe: Pipeline, theirs: Any, name: str, strength: float) -> None:
    """Solvers of two calls a step begin at a step, and multistep ones without a history."""
    class_name, options = schedulers.A1111[name]
    arguments: dict[str, Any] = {
        "prompt": PROMPTS[0],
        "image": photo(64, 64),
        "strength": strength,
        "num_inference_steps": 7,
    }
    expected = pictures(theirs, {**pipe.scheduler_config, **options, "_class_name": class_name}, 3, **arguments)
    result = pipe(**arguments, seed=3, scheduler=name, output_type="np")
    assert psnr(expected, result.images, 1.0) >= 90
    steps = int(7 * strength)
    assert len(result.timings.steps) == (2 * steps - 1 if class_name.startswith(("Heun", "KDPM2")) else steps)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sd2-v", "StableDiffusionImg2ImgPipeline"), ("sdxl", "StableDiffusionXLImg2ImgPipeline")],
)
def test_other_families_equal_diffusers(models: Callable[[str], Model], name: str, kind: str) -> None:
    theirs = load(models(name).checkpoint, kind)
    arguments: dict[str, Any] = {
        "prompt": PROMPTS[0], "image": photo(72, 64), "strength": 0.6, "guidance_scale": 6.0, "num_inference_steps": 5,
    }  # fmt: skip
    with Pipeline.from_pretrained(models(name).bundle) as pipe:
        expected = pictures(theirs, pipe.scheduler_config, 3, **arguments)
        assert psnr(expected, pipe(**arguments, seed=3, output_type="np").images, 1.0) >= 90


def test_nearest_wrong_settings(pipe: Pipeline) -> None:
    arguments: dict[str, Any] = {
        "image": photo(64, 64), "strength": 0.8, "num_inference_steps": 10, "seed": 3, "scheduler": "DDIM",
        "output_type": "np",
    }  # fmt: skip
    right = pipe(PROMPTS[0], **arguments).images
    wrongs: list[dict[str, Any]] = [
        {"strength": 0.7}, {"guidance_scale": 7.0}, {"image": photo(64, 64, 1)}, {"sample_mode": "argmax"}
    ]  # fmt: skip
    for wrong in wrongs:
        assert psnr(right, pipe(PROMPTS[0], **(arguments | wrong)).images, 1.0) < 60, wrong


def test_the_mean_instead_of_a_draw(pipe: Pipeline, theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    arguments: dict[str, Any] = {
        "prompt": PROMPTS[0], "image": photo(64, 72), "strength": 0.5, "num_inference_steps": 6,
    }  # fmt: skip
    config = {**pipe.scheduler_config, "_class_name": "DDIMScheduler"}
    expected = pictures(theirs, config, 3, **arguments)
    got = pipe(**arguments, seed=3, scheduler="DDIM", sample_mode="argmax", output_type="np").images
    assert psnr(expected, got, 1.0) >= 90


def test_any_picture_is_taken(pipe: Pipeline, tmp_path: Path) -> None:
    """A file, a picture of another mode, an array and a turned JPEG are the same picture."""
    picture = photo(64, 72)
    arguments: dict[str, Any] = {"num_inference_steps": 4, "seed": 3, "output_type": "np"}
    right = pipe(PROMPTS[0], image=picture, **arguments).images
    picture.save(tmp_path / "a.png")
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 270 degrees
    turned.save(tmp_path / "turned.webp", exif=exif, lossless=True)
    for same in (
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        np.asarray(picture),
        picture.convert("RGBA"),
        tmp_path / "turned.webp",
    ):
        np.testing.assert_array_equal(pipe(PROMPTS[0], image=same, **arguments).images, right)


@pytest.mark.parametrize(
    ("picture", "asked", "made", "said"),
    [
        ((64, 72), {}, (64, 72), ""),
        ((70, 79), {}, (64, 72), "resized from 70x79 to 64x72"),
        ((200, 100), {"width": 96}, (96, 48), "resized from 200x100 to 96x48"),
        ((200, 100), {"height": 96}, (192, 96), "resized from 200x100 to 192x96"),
        ((200, 100), {"width": 64, "height": 64}, (64, 64), "resized from 200x100 to 64x64"),
        ((3000, 10), {"height": 8}, (2400, 8), "resized from 3000x10 to 2400x8"),
    ],
)
def test_size(
    null: Pipeline, caplog: pytest.LogCaptureFixture, picture: tuple[int, int], asked: dict[str, int],
    made: tuple[int, int], said: str,
) -> None:  # fmt: skip
    with caplog.at_level(logging.WARNING, "sdrt"):
        result = null("a fox", image=photo(*picture), num_inference_steps=2, **asked)
    assert result.size == made == result.images[0].size
    assert said in caplog.text
    assert bool(caplog.text) == bool(said)


def test_a_size_fitted_as_diffusers_does(pipe: Pipeline, theirs: Any) -> None:
    arguments: dict[str, Any] = {"prompt": "a fox", "image": photo(75, 94), "strength": 0.5, "num_inference_steps": 4}
    expected = pictures(theirs, {**pipe.scheduler_config, "_class_name": "DDIMScheduler"}, 3, **arguments)
    assert psnr(expected, pipe(**arguments, seed=3, scheduler="DDIM", output_type="np").images, 1.0) >= 90


def test_batch_from_one_picture(pipe: Pipeline) -> None:
    arguments: dict[str, Any] = {"image": photo(64, 64), "num_inference_steps": 4, "output_type": "np"}
    batch = pipe("a fox", seed=7, num_images_per_prompt=2, **arguments)
    for i, seed in enumerate(batch.seeds):
        assert psnr(pipe("a fox", seed=seed, **arguments).images[0], batch.images[i], 1.0) >= 90


def test_steps_begin_in_the_middle(null: Pipeline) -> None:
    steps = list(null.stream("a fox", image=photo(64, 64), strength=0.5, num_inference_steps=8, scheduler="DDIM"))
    assert [(step.index, step.total) for step in steps] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert [step.timestep for step in steps] == [376, 251, 126, 1]


def test_the_encoder_is_loaded_when_it_is_needed(null: Pipeline) -> None:
    null("a fox", num_inference_steps=1)
    assert "vae_encoder" not in null.sessions
    null("a fox", image=photo(64, 64), num_inference_steps=2)
    assert "vae_encoder" in null.sessions


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": 0}, "strength is 0, expected a number above 0, at most 1"),
        ({"strength": 1.1}, "strength is 1.1"),
        ({"image": None, "strength": 0.5}, "strength is given without image"),
        ({"image": None, "sample_mode": "argmax"}, "sample_mode is given without image"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"strength": "0.5"}, "strength is '0.5'"),
        ({"strength": True}, "strength is True"),
        ({"strength": 0.1, "num_inference_steps": 5}, "leaves no step to run"),
        ({"sample_mode": "mode"}, "sample_mode is 'mode', expected 'sample' or 'argmax'"),
        ({"image": []}, "image has 0 pictures for 1 prompts"),
        ({"image": [photo(64, 64)] * 2}, "image has 2 pictures for 1 prompts"),
        ({"prompt": ["a", "b"], "image": [photo(64, 64), photo(64, 72)]}, "several sizes: 64x64, 64x72"),
        ({"image": photo(7, 64)}, "the picture is 7x64, to be made as 0x64"),
        ({"image": photo(64, 64), "width": 60}, "try width 64 and height 64"),
        ({"image": photo(20, 600), "width": 64}, "would be made as 64x1920"),
        ({"image": photo(400, 300)}, "would be made as 400x296, the model's own size is 128x128"),
        ({"image": photo(3000, 9), "height": 64}, "at most 16384"),
        ({"image": "nowhere.png"}, "nowhere.png"),
        ({"image": 3}, "a picture is int"),
        ({"image": photo(64, 64), "latents": np.zeros((1, 4, 8, 8), np.float32)}, "both given"),
    ],
)  # fmt: skip
def test_refused(null: Pipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(sdrt.InputError, match=message):
        null(**({"prompt": "a fox", "image": photo(64, 64)} | arguments))


def test_a_bundle_without_the_encoder(copied: Path) -> None:
    import json

    facts = json.loads((copied / "sdrt.json").read_text())
    del facts["components"]["vae_encoder"]
    (copied / "sdrt.json").write_text(json.dumps(facts))
    with Pipeline.from_pretrained(copied, engine="null") as pipe:
        pipe("a fox", num_inference_steps=1)
        with pytest.raises(sdrt.BundleError, match="has no component 'vae_encoder'"):
            pipe("a fox", image=photo(64, 64))


def test_command(bundle: Path, cli: Cli, tmp_path: Path) -> None:
    photo(70, 64).save(tmp_path / "in.jpg")
    out = tmp_path / "out.png"
    common = ("generate", "a fox", "-m", bundle, "-o", out)
    done = cli(*common, "--init-image", tmp_path / "in.jpg", "--strength", 0.5, "--steps", 4, "--seed", 1)
    assert done.returncode == 0, done.stderr
    assert "resized from 70x64 to 64x64" in done.stderr
    assert "2 steps" in done.stderr or "3 steps" in done.stderr
    with Image.open(out) as made:
        assert made.size == (64, 64)
        assert "Denoising strength: 0.5" in made.text["parameters"]  # type: ignore[attr-defined]
    assert cli(*common, "--strength", 0.5).returncode == 2
    missing = cli(*common, "--init-image", tmp_path / "none.jpg")
    assert missing.returncode == 1
    assert "none.jpg" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_the_source_is_not_overwritten(bundle: Path, cli: Cli, tmp_path: Path) -> None:
    photo(64, 64).save(tmp_path / "in.png")
    before = (tmp_path / "in.png").read_bytes()
    done = cli("generate", "a fox", "-m", bundle, "--init-image", tmp_path / "in.png", "-o", tmp_path / "in.png")
    assert done.returncode == 1
    assert "is the picture to start from" in done.stderr
    assert (tmp_path / "in.png").read_bytes() == before


def test_the_least_strength_that_is_named_is_enough() -> None:
    for steps in range(2, 1001):
        with pytest.raises(sdrt.InputError, match="leaves no step to run") as caught:
            sdrt.GenerationRequest("a fox", image=photo(8, 8), strength=0.9 / steps, num_inference_steps=steps)
        named = float(caught.value.fix.split("at least ")[1].split(",")[0])
        assert sdrt.GenerationRequest("a", image=photo(8, 8), strength=named, num_inference_steps=steps).begin() < steps


def test_closing_while_the_encoder_is_opened(bundle: Path) -> None:
    """Whichever comes first, no session is left open, and the generation ends with a picture or an InputError."""
    opened, may_close = threading.Event(), threading.Event()
    loaded = Pipeline.from_pretrained(bundle, engine="null")
    made: list[Any] = []

    def slow(name: str) -> Any:
        opened.set()
        may_close.wait(0.2)
        made.append(open_session(loaded.bundle, name, engine="null"))
        return made[-1]

    pipe = Pipeline(loaded.bundle, loaded.sessions, slow)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            pipe("a fox", image=photo(64, 64), num_inference_steps=2)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert opened.wait(10)
    pipe.close()
    may_close.set()
    thread.join()
    assert all(isinstance(error, sdrt.InputError) for error in errors)
    for session in (*made, *pipe.sessions.values()):
        with pytest.raises(sdrt.InputError, match="closed"):
            session.run()


def test_steps_of_sdxl_do_not_drift(models: Callable[[str], Model]) -> None:
    """20 steps: what is rounded differently must not grow."""
    theirs = load(models("sdxl").checkpoint, "StableDiffusionXLImg2ImgPipeline")
    arguments: dict[str, Any] = {
        "prompt": PROMPTS[0], "image": photo(64, 64), "strength": 0.9, "guidance_scale": 7.5, "num_inference_steps": 20,
    }  # fmt: skip
    with Pipeline.from_pretrained(models("sdxl").bundle) as pipe:
        config = {**pipe.scheduler_config, "_class_name": "DDIMScheduler"}
        expected = pictures(theirs, config, 3, **arguments)
        got = pipe(**arguments, seed=3, scheduler="DDIM", output_type="np").images
    assert psnr(expected, got, 1.0) >= 90


@pytest.mark.parametrize("strength", [0.05, 0.25, 0.45, 1.0])
@pytest.mark.parametrize("name", ["Restart", "Restart SGM Uniform", "DPM fast"])
def test_samplers_of_a1111_alone_begin_where_their_step_is(pipe: Pipeline, name: str, strength: float) -> None:
    """Two calls a step, but the last one's."""
    common: dict[str, Any] = {"image": photo(64, 64), "seed": 1, "num_inference_steps": 20, "scheduler": name}
    left_out = 20 - int(20 * strength)
    made = pipe("a red star", strength=strength, **common)
    calls = 20 if name == "DPM fast" else 39
    assert len(made.timings.steps) == calls - left_out * (1 if name == "DPM fast" else 2)


def test_a_config_that_makes_fewer_steps_than_are_left_out(pipe: Pipeline) -> None:
    config = {
        "_class_name": "DPMSolverMultistepScheduler", "beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": 0.0,
        "timestep_spacing": "trailing", "prediction_type": "v_prediction",
    }  # fmt: skip
    with pytest.raises(sdrt.InputError, match=r"strength 0.3 leaves out 14 of 20 steps, and .* makes \d+ of them"):
        pipe("a red star", image=photo(64, 64), strength=0.3, num_inference_steps=20, scheduler=config)
