"""What counts as right."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.alignment.reading import HEADS, NONE, NOTHING, Reading
from benchmarks.alignment.score import ATTRIBUTES, judge, shares
from benchmarks.demo.scenes import Scene, Thing, random_scene

STAR, RING = Thing("star", "red", "large"), Thing("ring", "blue", "small")
ONE = Scene((STAR,), "white")
TWO = Scene((STAR, RING), "white", "left of")
SCENES = st.integers(0, 10_000).map(lambda seed: random_scene(random.Random(seed)))


def wrong(judgement: dict[str, float]) -> dict[str, float]:
    return {name: part for name, part in judgement.items() if part != 1.0 and name != "everything"}


@given(SCENES)
def test_a_faithful_picture_is_right_in_everything(scene: Scene) -> None:
    found = judge(scene, Reading.of_scene(scene))
    assert (*ATTRIBUTES[len(scene.things)], "everything") == tuple(found)
    assert set(found.values()) == {1.0}


@given(SCENES)
def test_words_of_heads_and_back(scene: Scene) -> None:
    reading = Reading.of_scene(scene)
    assert list(reading.words) == list(HEADS)
    assert all(word in HEADS[head] for head, word in reading.words.items())
    assert Reading.of_words(reading.words) == reading


@given(SCENES)
def test_nothing_read_is_wrong_in_everything(scene: Scene) -> None:
    found = judge(scene, Reading(NONE, NONE, (NOTHING, NOTHING)))
    assert set(found.values()) == {0.0}


@pytest.mark.parametrize(
    ("reading", "expected"),
    [
        (Reading("one", "black", (STAR,)), {"background": 0}),
        (Reading("one", "white", (replace(STAR, shape="ring"),)), {"shape": 0}),
        (Reading("row", "white", (STAR, RING)), {"count": 0}),
        (Reading("row", "white", (RING, STAR)), {"count": 0}),
        (Reading(NONE, "white", (NOTHING, NOTHING)), {"count": 0, "shape": 0, "colour": 0, "size": 0}),
    ],
)
def test_one_thing(reading: Reading, expected: dict[str, float]) -> None:
    found = judge(ONE, reading)
    assert wrong(found) == expected
    assert found["everything"] == 0


@pytest.mark.parametrize(
    ("things", "axis", "expected"),
    [
        ((RING, STAR), "row", {"relation": 0}),
        ((STAR, RING), "column", {"relation": 0}),
        ((STAR, RING), NONE, {"relation": 0}),
        ((RING, STAR), "column", {"relation": 0}),
        ((replace(STAR, colour="blue"), RING), "row", {"colour": 0.5}),
        ((replace(RING, colour="red"), replace(STAR, colour="blue")), "row", {"relation": 0, "colour": 0}),
        # As many words agree either way: as it ought to lie.
        ((Thing("ring", "red", "large"), Thing("star", "blue", "large")), "row", {"shape": 0, "size": 0.5}),
        ((STAR, STAR), "row", {"shape": 0.5, "colour": 0.5, "size": 0.5}),
        ((STAR,), "one", {"relation": 0, "shape": 0.5, "colour": 0.5, "size": 0.5}),
        ((RING,), "one", {"relation": 0, "shape": 0.5, "colour": 0.5, "size": 0.5}),
    ],
)
def test_two_things(things: tuple[Thing, ...], axis: str, expected: dict[str, float]) -> None:
    assert wrong(judge(TWO, Reading(axis, "white", things))) == expected


@pytest.mark.parametrize(("relation", "axis"), [("right of", "row"), ("below", "column")])
def test_what_is_named_second_may_lie_first(relation: str, axis: str) -> None:
    scene = replace(TWO, relation=relation)
    assert not wrong(judge(scene, Reading(axis, "white", (RING, STAR))))
    assert wrong(judge(scene, Reading(axis, "white", (STAR, RING)))) == {"relation": 0}


def test_shares_count_captions_and_each_thing_half() -> None:
    half = judge(TWO, Reading("row", "white", (replace(STAR, colour="blue"), RING)))
    full = judge(TWO, Reading.of_scene(TWO))
    found = shares([half, full, full, full])
    assert (found["colour"].estimate, found["shape"].estimate, found["everything"].estimate) == (7 / 8, 1.0, 3 / 4)
    assert found["shape"].low == pytest.approx(0.5101, abs=1e-4), "four of four, not eight of eight"
