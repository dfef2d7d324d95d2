"""Inputs recorded from denoising runs."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdrt import BundleError, InputError, Pipeline
from sdrt import bundle as bundles
from sdrt.engine import Samples
from sdrt.schedulers import label
from sdrt.verify import reference_cases
from sdrt_engines.calibration import PROMPTS, Effort, Recorder, read_prompts

EFFORT = Effort(prompts=3, steps=(4, 5), calls=5)


@pytest.fixture(scope="module")
def recorded(bundle: Path) -> dict[str, Samples]:
    recorder = Recorder(bundles.load(bundle), EFFORT, PROMPTS, (72, 64))
    return {name: recorder.samples(name) for name in recorder.bundle.manifest.components}


def test_every_component_is_fed_as_in_a_run(bundle: Path, recorded: dict[str, Samples]) -> None:
    """Names, types and shapes of the manifest; latents that get less noisy; pictures in [-1, 1] for the encoder."""
    held = bundles.load(bundle)
    for name, samples in recorded.items():
        for call in samples.calls:
            for spec in held.component(name).inputs:
                batch = 1 if name.startswith("vae") else 2 if name == "unet" else call["input_ids"].shape[0]
                assert call[spec.name].shape == spec.at({"B": batch, "H": 64, "W": 72, "T": 77})
    unet = recorded["unet"].calls
    assert len(unet) == 5
    assert len({float(call["timestep"][0]) for call in unet}) >= 3
    assert max(float(call["timestep"][0]) for call in unet) > 700
    assert min(float(call["timestep"][0]) for call in unet) < 300
    assert not np.array_equal(unet[0]["encoder_hidden_states"], unet[-1]["encoder_hidden_states"])
    assert len(recorded["vae_encoder"].calls) == len(recorded["vae_decoder"].calls) == 3
    for call in recorded["vae_encoder"].calls:
        assert -1 <= call["sample"].min() < call["sample"].max() <= 1


def test_what_is_recorded_is_what_the_pipeline_computes(bundle: Path, recorded: dict[str, Samples]) -> None:
    """The first prompt's decoder input: the latents of the same run, unscaled."""
    with Pipeline.from_pretrained(bundle) as pipe:
        latents = pipe(
            PROMPTS[0], seed=0, width=72, height=64, num_inference_steps=4, output_type="latent"
        ).images  # fmt: skip
    factor = bundles.load(bundle).manifest.latents.scaling_factor
    np.testing.assert_allclose(recorded["vae_decoder"].calls[0]["latent_sample"], latents / factor, atol=1e-3)


def test_facts_and_determinism(bundle: Path, recorded: dict[str, Samples]) -> None:
    again = Recorder(bundles.load(bundle), EFFORT, PROMPTS, (72, 64))
    told: list[tuple[str, float]] = []
    unet = again.samples("unet", lambda what, fraction: told.append((what, fraction)))
    for a, b in zip(unet.calls, recorded["unet"].calls, strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)
    assert unet.facts == recorded["unet"].facts
    assert unet.facts["source"] == "denoising runs"
    assert (unet.facts["prompts"], unet.facts["calls"], unet.facts["size"]) == (3, 5, [72, 64])
    assert (unet.facts["schedulers"], unet.facts["steps"]) == (["PLMS", "Euler", "DPM++ 2M Karras"], [4, 5])
    assert len(unet.facts["prompts_sha256"]) == 64
    assert [what for what, _ in told if "prompt 3 of 3" in what]
    assert all(0 <= a[1] <= b[1] <= 1 for a, b in itertools.pairwise(told))
    other = Recorder(bundles.load(bundle), EFFORT, ("a fox", "a hen"), (72, 64)).samples("unet")
    assert other.facts["prompts_sha256"] != unet.facts["prompts_sha256"]


def test_a_bundle_that_makes_no_picture(bundle: Path) -> None:
    """Reference vectors instead, and it is said, in the facts and while it happens."""
    held = bundles.load(bundle)
    alone = bundles.Bundle(
        held.root, replace(held.manifest, components={"unet": held.component("unet")}, text_encoders=())
    )
    told: list[str] = []
    samples = Recorder(alone, EFFORT).samples("unet", lambda what, _: told.append(what))
    assert samples.facts == {"source": "reference vectors", "why": "the bundle has no vae_decoder", "calls": 4}
    assert told == ["calibrate on reference vectors: the bundle has no vae_decoder"]
    reference = [inputs for inputs, _ in reference_cases(held, "unet").values()]
    assert all(np.array_equal(a["sample"], b["sample"]) for a, b in zip(samples.calls, reference, strict=True))


def test_what_latents_are_made_by(bundle: Path, recorded: dict[str, Samples]) -> None:
    """Another solver's latents have another spread: the decoder's scales must know it."""
    with Pipeline.from_pretrained(bundle) as pipe:
        arguments = {"seed": 1, "width": 72, "height": 64, "num_inference_steps": 5, "output_type": "latent"}
        latents = pipe(PROMPTS[1], scheduler="Euler", **arguments).images
    factor = bundles.load(bundle).manifest.latents.scaling_factor
    np.testing.assert_allclose(recorded["vae_decoder"].calls[1]["latent_sample"], latents / factor, atol=1e-3)


@pytest.mark.parametrize(
    ("changed", "labels"),
    [
        ({"interpolation_type": "nonsense"}, ["PLMS", "DPM++ 2M Karras"]),
        ({"final_sigmas_type": "nonsense"}, ["PLMS"]),
        ({"_class_name": "VQDiffusionScheduler"}, ["Euler", "DPM++ 2M Karras"]),
        ({"_class_name": "EulerDiscreteScheduler"}, ["Euler", "DPM++ 2M Karras"]),
    ],
)
def test_schedulers_that_cannot_be_made(bundle: Path, changed: dict[str, Any], labels: list[str]) -> None:
    """Of the model's own config, that is. Each that can meets every number of steps."""
    recorder = Recorder(bundles.load(bundle), Effort(4, (4, 5), 4), PROMPTS, (64, 64))
    with Pipeline.from_pretrained(bundle) as pipe:
        pipe.scheduler_config |= changed
        runs = recorder._runs(pipe, 4)
        assert [label(config) for config, _ in runs] == (labels * 4)[:4]
        assert {(label(config), steps) for config, steps in runs} == {(a, b) for a in labels for b in (4, 5)}
        pipe.scheduler_config["prediction_type"] = "nonsense"
        with pytest.raises(InputError, match=r"prediction_type|no scheduler 'VQDiffusion"):
            recorder._runs(pipe, 4)


def test_only_what_is_kept_is_held(bundle: Path) -> None:
    """Which calls are kept is known before they are made: more prompts or steps take no more memory."""
    recorder = Recorder(bundles.load(bundle), Effort(3, (6,), 4), PROMPTS, (64, 64))
    recorder.samples("unet")
    assert {name: len(calls) for name, calls in recorder._recorded.items()} == {
        "text_encoder": 3, "unet": 4, "vae_decoder": 3, "vae_encoder": 3
    }  # fmt: skip


def test_sources_that_no_pipeline_makes(bundle: Path) -> None:
    held = bundles.load(bundle)
    for source, why in (
        ("control", "the denoiser takes inputs that this sdrt cannot make"),
        ("text.pooled", "no text encoder of the bundle gives the pooled embedding"),
    ):
        inputs = {**held.manifest.denoiser.inputs, "encoder_hidden_states": ("text.hidden_states", source)}
        facts = replace(held.manifest, denoiser=replace(held.manifest.denoiser, inputs=inputs))
        assert Recorder(bundles.Bundle(held.root, facts), EFFORT).samples("unet").facts["why"] == why


@pytest.mark.parametrize("file", ["tokenizer/vocab.json", "text_encoder/model.onnx"])
def test_damage_is_not_passed_over(copied: Path, file: str) -> None:
    """Ranges of noise are no substitute for those of a bundle that can make pictures."""
    path = copied / file
    path.write_bytes(b"[" + path.read_bytes()[1:])
    with pytest.raises(BundleError, match=Path(file).name):
        Recorder(bundles.load(copied), EFFORT).samples("unet")


def test_a_component_that_no_run_uses(bundle: Path) -> None:
    held = bundles.load(bundle)
    components = {**held.manifest.components, "spare": held.component("unet")}
    recorder = Recorder(held, Effort(1, (1,), 1), PROMPTS, (64, 64))
    recorder.samples("unet")
    object.__setattr__(held.manifest, "components", components)
    assert recorder.samples("spare").facts["why"] == "text to image does not run it"


def test_prompts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a fox\n\n  ein Fuchs im Schnee \n", encoding="utf-8")
    assert read_prompts(path) == ("a fox", "ein Fuchs im Schnee")
    path.write_text(" \n")
    with pytest.raises(InputError, match="holds no prompt"):
        read_prompts(path)
    path.write_bytes("\ufeffa fox\r\na\u2028b\x0bc\x85d\r\n".encode())
    assert read_prompts(path) == ("a fox", "a\u2028b\x0bc\x85d")
    for bad in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            read_prompts(bad)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match="cannot be read"):
        read_prompts(path)
    shutil.rmtree(tmp_path)
