"""The command, end to end, on a bundle that knows nothing and with a reader that guesses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks.alignment import evaluate, reader, runs
from benchmarks.alignment.proportions import Paired
from benchmarks.alignment.reading import HEADS, NONE, Reading
from benchmarks.alignment.score import judge
from benchmarks.demo.scenes import Scene, Thing, is_held_out
from sdrt.errors import InputError
from sdrt.pipeline import Pipeline


@pytest.fixture
def guessing(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_file(reader.Reader().half().state_dict(), tmp_path / "reader.safetensors")
    return tmp_path / "reader.safetensors"


def test_captions_are_kept_from_training_and_always_the_same() -> None:
    scenes = runs.scenes(20, seed=3)
    assert scenes == runs.scenes(20, seed=3) != runs.scenes(20, seed=4)
    assert scenes[:10] == runs.scenes(10, seed=3), "more are more of the same"
    assert all(map(is_held_out, scenes))
    assert [len(scene.things) for scene in scenes] == [1, 2] * 10
    singles = runs.scenes(288, seed=3)[::2]
    assert len(set(singles[:72])) == len(set(singles)) == 72 == len(runs.SINGLES), "each once before one comes again"


def test_ruined_pictures_do_not_pass_for_kept_free_of_the_unwanted() -> None:
    def star(*colours: str) -> Reading:
        things = tuple(Thing("star", colour, "large") for colour in colours)
        return Reading.of_scene(Scene(things, "white", "left of" if len(things) == 2 else None))

    mush = Reading.of_words(dict.fromkeys(HEADS, NONE))
    found = evaluate.negative_of([star("red"), star("blue"), star("blue", "red")], [mush, star("pink"), star("red")])
    assert found.unwanted == Paired(both=1, only_a=1, only_b=0, neither=1)
    assert found.wanted == Paired(both=1, only_a=1, only_b=1, neither=0)


def test_settings_are_named_by_what_differs() -> None:
    made = runs.settings(["a/x", "b/x"], [None], ["DDIM", "Euler"], [10], [None])
    assert [setting.name for setting in made] == ["x, DDIM", "x, Euler", "x, DDIM #2", "x, Euler #2"]
    assert [setting.model for setting in made] == ["a/x", "a/x", "b/x", "b/x"]
    made = runs.settings(["x", "y"], [None], ["DDIM"], [5], [None], devices=["cpu", "cuda:1"])
    assert [one.device for one in made] == ["cpu", "cuda:1"]
    with pytest.raises(InputError, match="--device: 2 for 1 models"):
        runs.settings(["x"], [None], ["DDIM"], [5], [None], devices=["cpu", "cuda:1"])
    made = runs.settings(["x"], [None, "null"], [None], [10, 20], [3.5])
    assert [setting.name for setting in made] == [
        "x, own engine, 10 steps", "x, own engine, 20 steps", "x, null, 10 steps", "x, null, 20 steps",
    ]  # fmt: skip


def test_a_picture_is_the_same_in_any_batch(pipe: Pipeline) -> None:
    setting = runs.Setting("tiny", "", steps=1, guidance=1.0, size=(64, 64))
    captions = ["a star", "a ring", "a heart"]
    by_batch = [
        runs.generate(pipe, setting, captions, seed=5, batch=batch, progress=lambda count: None) for batch in (1, 3)
    ]
    for one, other in zip(*by_batch, strict=True):
        assert np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max() <= 1, "but for rounding"
    assert len({picture.tobytes() for picture in by_batch[0]}) == 3


def test_end_to_end(bundle: Path, guessing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["-m", str(bundle), "--shape", "128x128", "--captions", "5", "--rendered", "6", "--batch", "2"]
    words += ["--steps", "1,2", "--negative", "3", "--reader", str(guessing), "--seed", "7"]
    words += ["--json", str(tmp_path / "out.json"), "--sheet", str(tmp_path / "out.png")]
    evaluate.evaluate(evaluate.parser().parse_args(words))
    said = capsys.readouterr().out
    for part in ("3 captions of one thing", "2 captions of two things", "reader, 3 drawn", "McNemar", "ratio"):
        assert part in said
    found = json.loads((tmp_path / "out.json").read_text())
    scenes = runs.scenes(5, seed=7)
    assert [one["words"] for one in found["asked"]] == [Reading.of_scene(scene).words for scene in scenes]
    assert [one["seed"] for one in found["asked"]] == [7, 8, 9, 10, 11]
    assert [one["setting"]["steps"] for one in found["runs"]] == [1, 2]
    for one in found["runs"]:
        assert one["right"] == [
            judge(scene, Reading.of_words(read)) for scene, read in zip(scenes, one["read"], strict=True)
        ]
        assert all(list(read) == list(HEADS) for read in one["read"])
        assert one["guidance_scale"] == 7.5
        for what in ("unwanted", "wanted"):
            assert sum(one["negative"][what][key] for key in ("both", "only_a", "only_b", "neither")) == 3
    (pairs,) = found["comparisons"]
    assert len(pairs["psnr"]) == 5
    assert pairs["attributes"]["captions of one thing"]["shape"].keys() >= {"both", "difference", "p_value"}
    for name in ("out.png", "out-2.png"):
        with Image.open(tmp_path / name) as paper:
            assert paper.width > 5 * 128


def test_a_run_beside_itself_differs_in_nothing() -> None:
    scenes = runs.scenes(4, seed=0)
    readings = [Reading.of_scene(scene) for scene in scenes]
    blank = [Image.new("RGB", (8, 8))] * 4
    judged = [judge(scene, reading) for scene, reading in zip(scenes, readings, strict=True)]
    one = evaluate.Run(runs.Setting("one", ""), blank, readings, judged, None, {})
    found = evaluate.compared(one, one, scenes)
    assert found.alike.estimate == 1.0
    assert {pairs for kind in found.attributes.values() for pairs in kind.values()} == {Paired(2, 0, 0, 0)}
    assert "4 of 4 identical" in evaluate.comparison(one, one, found)


@pytest.mark.parametrize(
    "words",
    [["--scheduler", "none such"], ["--sheet", "sheet.jpg"], ["--json", "no/such/folder.json"], ["--seed", "-1"]],
)
def test_what_cannot_be_done_is_said_before_anything_is_made(bundle: Path, guessing: Path, words: list[str]) -> None:
    args = evaluate.parser().parse_args(["-m", str(bundle), "--reader", str(guessing), *words])
    with pytest.raises(InputError):
        evaluate.evaluate(args)


@pytest.mark.parametrize("words", [["--steps", "0"], ["--steps", "5,"], ["--shape", "128"], ["--captions", "-3"]])
def test_options_that_are_no_numbers_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        evaluate.parser().parse_args(["-m", "x", *words])
    assert raised.value.code == 2
    assert words[0] in capsys.readouterr().err
