"""The reader, what it learns from, and its trained weights where they are."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.alignment import pictures, reader, runs, train
from benchmarks.alignment.reading import HEADS, NONE, Reading
from benchmarks.alignment.score import judge
from benchmarks.demo.draw import draw
from benchmarks.demo.scenes import COLOURS, Scene, Thing, is_held_out
from benchmarks.demo.training import Plan


def test_lessons_name_words_that_there_are_and_are_the_same_for_a_seed() -> None:
    seen: dict[str, set[str | None]] = {head: set() for head in HEADS}
    for seed in range(300):
        picture, labels = pictures.lesson(random.Random(seed))
        assert (picture.shape, picture.dtype) == ((128, 128, 3), np.uint8)
        assert list(labels) == list(HEADS)
        for head, word in labels.items():
            assert word is None or word in HEADS[head]
            seen[head].add(word)
    assert all(NONE in words for words in seen.values()), "each head learns that there may be nothing"
    assert None in seen["size_0"]
    one, other = (pictures.lesson(random.Random(7)) for _ in range(2))
    np.testing.assert_array_equal(one[0], other[0])
    assert one[1] == other[1]


def test_odd_pictures_name_nothing_that_is_held_out() -> None:
    for seed in range(400):
        labels = pictures.odd(random.Random(seed))[1]
        if labels["axis"] == "one" and labels["shape_0"] not in (None, NONE) and labels["colour_0"] in COLOURS:
            thing = Thing(str(labels["shape_0"]), str(labels["colour_0"]), "large")
            assert not is_held_out(Scene((thing,), str(labels["background"])))


def test_odd_pictures_have_a_thing_where_the_labels_say() -> None:
    for seed in range(40):
        picture, labels = pictures.odd(random.Random(seed))
        colours = {tuple(map(int, pixel)) for pixel in picture[::2, ::2].reshape(-1, 3)}
        assert len(colours) > 1, labels
        assert (labels["shape_1"] == NONE) or labels["axis"] != "one"


def test_spoilt_pictures_stay_pictures() -> None:
    generator = torch.Generator().manual_seed(1)
    batch = torch.rand(8, 3, 128, 128, generator=generator) * 2 - 1
    spoilt = pictures.spoil(batch, generator)
    assert spoilt.shape == batch.shape
    assert float(spoilt.abs().max()) <= 1
    changed = [not torch.equal(a, b) for a, b in zip(spoilt, batch, strict=True)]
    assert any(changed)


def test_gaussian_keeps_what_is_even_and_spreads_a_point() -> None:
    even = torch.full((1, 3, 16, 16), 0.25)
    torch.testing.assert_close(pictures.gaussian(even, 1.5), even)
    point = torch.zeros(1, 1, 33, 33)
    point[0, 0, 16, 16] = 1.0
    row = pictures.gaussian(point, 2.0)[0, 0].sum(0)
    variance = float((row * (torch.arange(33) - 16) ** 2).sum())
    assert variance == pytest.approx(4.0, rel=0.03), "cut at three sigma"


def test_reader_is_small_and_reads_any_size() -> None:
    network = reader.Reader().eval()
    assert sum(parameter.numel() for parameter in network.parameters()) <= 150_000
    made = [np.zeros((128, 128, 3), np.uint8), np.zeros((64, 96, 3), np.uint8)]
    found = reader.read(network, made, batch=1)
    assert found == reader.read(network, made), "whatever the batch"
    assert all(word in HEADS[head] for reading in found for head, word in reading.words.items())


def test_finished_training_is_not_repeated_and_its_weights_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "BATCH", 4)
    plan = Plan(updates=2, rate=1e-3)
    train.run(tmp_path / "reader.safetensors", tmp_path / "state", plan)
    assert (tmp_path / "reader.safetensors").stat().st_size < 400_000
    network = reader.load(tmp_path / "reader.safetensors")
    assert not network.training
    again = train.run(tmp_path / "again.safetensors", tmp_path / "state", plan)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "reader.safetensors").read_bytes()
    assert again.heads.weight.dtype == torch.float16


def test_without_weights_the_error_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"python -m benchmarks\.alignment\.train"):
        reader.load(tmp_path / "none.safetensors")


@pytest.fixture(scope="module")
def trained() -> reader.Reader:
    return reader.load()


def test_drawn_pictures_are_read_right(trained: reader.Reader) -> None:
    rng = random.Random(5)
    scenes = runs.scenes(48, seed=5)
    found = reader.read(trained, [draw(scene, rng) for scene in scenes])
    wrong = [(scene, r) for scene, r in zip(scenes, found, strict=True) if not judge(scene, r)["everything"]]
    assert len(wrong) <= 1, wrong  # at least 99 % of each attribute are read right, not all


def test_soft_pictures_are_read_right(trained: reader.Reader) -> None:
    rng = random.Random(6)
    scenes = runs.scenes(48, seed=6)
    batch = np.stack([draw(scene, rng) for scene in scenes]).astype(np.float32)
    soft = pictures.gaussian(torch.from_numpy(batch).permute(0, 3, 1, 2), 1.5).permute(0, 2, 3, 1).numpy()
    noisy = soft + np.random.default_rng(6).normal(0, 5, soft.shape) + 6
    found = reader.read(trained, list(noisy.clip(0, 255).round().astype(np.uint8)))
    wrong = [(scene, r) for scene, r in zip(scenes, found, strict=True) if not judge(scene, r)["everything"]]
    assert len(wrong) <= 3, wrong


def test_nothing_is_read_where_nothing_is(trained: reader.Reader) -> None:
    rng = random.Random(7)
    noise = [pictures.garbage(rng) for _ in range(20)]
    blank = [pictures.blank(rng) for _ in range(20)]
    found = reader.read(trained, noise + [picture for picture, _ in blank])
    assert sum(reading.axis == NONE for reading in found) >= 38
    for (_, labels), reading in zip(blank, found[20:], strict=True):
        assert reading.background == labels["background"]


def test_a_picture_of_another_scene_is_wrong(trained: reader.Reader) -> None:
    rng = random.Random(8)
    scenes = runs.scenes(24, seed=8)
    found = reader.read(trained, [draw(scene, rng) for scene in scenes])
    others = scenes[2:] + scenes[:2]
    assert not any(
        judge(other, reading)["everything"]
        for scene, other, reading in zip(scenes, others, found, strict=True)
        if Reading.of_scene(scene) != Reading.of_scene(other)
    )
