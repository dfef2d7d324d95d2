"""The demo checkpoint's recipe: its grammar, its pictures, and training that can be stopped at any moment."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.demo import denoiser, networks, scenes, train, vae, words
from benchmarks.demo.draw import SHADES, SIZE, draw
from benchmarks.demo.scenes import Scene, Thing, caption, is_held_out, random_scene, training_caption
from benchmarks.demo.training import Draws, Plan
from benchmarks.demo.training import train as train_stage

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return networks.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


# -- the grammar -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.booleans())
def test_a_scene_is_of_the_kind_that_is_asked_for(seed: int, held_out: bool) -> None:
    scene = random_scene(random.Random(seed), held_out=held_out)
    assert is_held_out(scene) == held_out
    assert all(thing.colour != scene.background for thing in scene.things)
    assert (scene.relation is None) == (len(scene.things) == 1)


def test_what_is_held_out_is_never_trained_on_from_either_side() -> None:
    singles = [
        Scene((Thing(s, c, z),), b)
        for s in scenes.SHAPES for c in scenes.COLOURS for z in scenes.SIZES for b in scenes.BACKGROUNDS if b != c
    ]  # fmt: skip
    kept = [scene for scene in singles if is_held_out(scene)]
    assert 0.08 < len(kept) / len(singles) < 0.16
    for scene in kept[:20]:  # beside another thing it is held out too
        pair = Scene((Thing("ring", "white", "small"), *scene.things), scene.background, "above")
        assert is_held_out(pair)
    rng = random.Random(0)
    for _ in range(200):
        scene = random_scene(rng, things=2)
        assert is_held_out(scene) == is_held_out(Scene(scene.things[::-1], scene.background, scene.relation))


def test_captions_as_they_are_asked_for() -> None:
    assert caption(Scene((Thing("star", "red", "large"),), "white")) == "a large red star on a white background"
    two = Scene((Thing("ring", "orange", "small"), Thing("cross", "blue", "large")), "gray", "below")
    assert caption(two) == "a small orange ring below a large blue cross on a gray background"
    assert [thing.shape for thing in two.placed()] == ["cross", "ring"]


@given(st.integers(0, 2**32))
def test_a_training_caption_says_what_it_is_said_to_say(seed: int) -> None:
    rng = random.Random(seed)
    scene = random_scene(rng)
    text, said = training_caption(scene, rng)
    spoken = text.split()
    for thing in said.things:
        assert all(word in spoken for word in (thing.shape, thing.colour, thing.size) if word)
    assert not said.background or f"{said.background} background" in text
    assert " a a" not in text
    assert "  " not in text
    if said.relation:  # from whichever side it is told, the same thing lies left or above
        assert [(a.shape or b.shape) == b.shape for a, b in zip(said.placed(), scene.placed(), strict=True)] == [
            True
        ] * 2


def test_a_word_is_a_token_and_no_caption_is_too_long(tokenizer) -> None:
    for word in scenes.words():
        assert len(tokenizer(word).input_ids) == 3, word
    rng = random.Random(1)
    texts = [training_caption(random_scene(rng), rng)[0] for _ in range(500)]
    assert max(len(ids) for ids in tokenizer(texts).input_ids) <= 77


@given(st.integers(0, 2**32))
def test_a_picture_shows_its_scene(seed: int) -> None:
    rng = random.Random(seed)
    scene = random_scene(rng)
    picture = draw(scene, rng).astype(int)
    assert picture.shape == (SIZE, SIZE, 3)
    assert np.abs(picture[0, 0] - SHADES[scene.background]).max() <= 8
    for n, thing in enumerate(scene.placed()):
        half = np.s_[:, n * 64 : n * 64 + 64] if scene.axis == "row" else np.s_[n * 64 : n * 64 + 64, :]
        part = picture[half] if scene.axis != "one" else picture
        near = np.abs(part - SHADES[thing.colour]).max(axis=2) <= 8
        assert near.sum() >= 150, (scene, n)


# -- training ----------------------------------------------------------------------------------------------------------


def test_a_run_that_was_stopped_goes_on_as_if_it_never_had_been(tmp_path: Path) -> None:
    plan = Plan(updates=12, rate=1e-2, warmup=3)

    class Stopped(Exception):
        pass

    def weights(folder: Path, stop: int | None) -> torch.Tensor:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)

        def loss_of(update: int, chance: Draws):
            if update == stop:
                raise Stopped
            x = torch.randn(5, 3, generator=chance.torch) + chance.python.random()
            return (model(x) - x[:, :2]).square().mean(), {}

        return train_stage("stage", folder, model, plan, loss_of, save_every=-1.0).weight.detach()

    whole = weights(tmp_path / "whole", None)
    with pytest.raises(Stopped):
        weights(tmp_path / "stopped", 7)
    assert torch.equal(weights(tmp_path / "stopped", None), whole)
    assert torch.equal(weights(tmp_path / "stopped", None), whole), "a finished one stays as it is"


def test_the_learning_rate_rises_stays_and_falls() -> None:
    plan = Plan(updates=100, rate=1.0, warmup=10, decay=0.2)
    assert [plan.rate_at(n) for n in (0, 9, 50, 80, 90, 99)] == pytest.approx([0.1, 1, 1, 1, 0.5, 0.05])


def test_the_whole_recipe_makes_a_checkpoint_that_diffusers_loads(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    short = Plan(updates=1, rate=1e-4)
    recipe = train.Recipe(crops=short, whole=short, reading=short, denoising=short, scenes=50)
    folder = train.run(tmp_path, CPU, recipe)
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, torch_dtype=torch.float32)
    networks_ = (pipe.vae, pipe.unet, pipe.text_encoder)
    assert all(p.dtype == torch.float32 for n in networks_ for p in n.parameters())
    assert sum(p.numel() for n in networks_ for p in n.parameters()) <= 6_000_000
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    latents = denoiser.latents(tmp_path, pipe.vae, CPU, scenes=50)
    assert latents.float().std() == pytest.approx(1, abs=0.2)
    assert vae.reconstruction(pipe.vae, CPU, pictures=16) > 0


def test_what_the_text_encoder_is_asked_tells_left_from_right() -> None:
    _, ring, cross = "", Thing("ring", "red", ""), Thing("cross", "blue", "small")
    told = words.answers(Scene((ring, cross), "", "right of"))
    assert told == words.answers(Scene((cross, ring), "", "left of"))
    assert told["shape0"] == scenes.SHAPES.index("cross")
    assert told["size1"] == len(scenes.SIZES), "not said"
    assert told["background"] == len(scenes.BACKGROUNDS)


def test_nothing_that_is_held_out_is_trained_on() -> None:
    assert not any(is_held_out(denoiser.scene_of(n)[0]) for n in range(500))


def test_latents_of_another_number_of_scenes_are_not_taken_for_these(tmp_path: Path) -> None:
    np.save(tmp_path / "latents.npy", np.zeros((50, 4, 16, 16), np.float16))
    with pytest.raises(ValueError, match="latents of 50 scenes, expected 100"):
        denoiser.latents(tmp_path, None, CPU, scenes=100)
