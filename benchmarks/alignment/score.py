"""Which parts of a caption a picture shows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

from benchmarks.alignment.proportions import Interval, wilson
from benchmarks.alignment.reading import NOTHING, Reading
from benchmarks.demo.scenes import Scene, Thing

ATTRIBUTES = {
    1: ("count", "shape", "colour", "size", "background"),
    2: ("relation", "shape", "colour", "size", "background"),
}
"""What is judged, by the number of things asked for."""

Judgement = dict[str, float]
"""By attribute the part of it that is right: 0 or 1; of two things 0.5 too. ``everything``: 1 if all is right."""


def judge(scene: Scene, reading: Reading) -> Judgement:
    """What of the scene that was asked for is in the reading.

    Things asked for are matched with things read such that most of their attributes agree; as they ought to lie, where
    that is no worse than another way. ``relation`` is right if the axis is right and they lie as asked. ``count`` is
    right if one thing is read where one is asked for.
    """
    asked = scene.placed()
    seen = reading.things + (NOTHING,) * (len(asked) - len(reading.things))
    matched = max(permutations(range(len(seen)), len(asked)), key=lambda order: _alike(asked, [seen[i] for i in order]))
    pairs = [(thing, seen[i]) for thing, i in zip(asked, matched, strict=True)]
    found = {
        name: sum(getattr(thing, name) == getattr(other, name) for thing, other in pairs) / len(pairs)
        for name in ("shape", "colour", "size")
    }
    in_place = float(reading.axis == scene.axis and matched == tuple(range(len(asked))))
    found["relation" if len(asked) == 2 else "count"] = in_place
    found["background"] = float(reading.background == scene.background)
    return {**{name: found[name] for name in ATTRIBUTES[len(asked)]}, "everything": float(min(found.values()) == 1.0)}


def _alike(asked: Sequence[Thing], seen: Sequence[Thing]) -> int:
    """How many attributes agree."""
    return sum(
        word == other
        for one, two in zip(asked, seen, strict=True)
        for word, other in zip(vars(one).values(), vars(two).values(), strict=True)
    )


def shares(judgements: Sequence[Judgement]) -> dict[str, Interval]:
    """By attribute the share that is right, of captions with as many things each.

    Of two things each counts half. The interval is that of as many independent trials as there are captions: two
    things of one picture are not independent, so it is rather too wide.
    """
    n = len(judgements)
    return {name: wilson(sum(judgement[name] for judgement in judgements), n) for name in judgements[0]}
