"""The grammar: what a picture may show, how a caption says it, and which combinations are never trained on.

A scene has a background and one or two things; a thing has a shape, a colour and a size; two things have a relation.
A caption says all of it ("a large red star left of a small blue circle on a white background"), or leaves parts out.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "black")
BACKGROUNDS = ("white", "black", "gray", "blue", "green", "yellow")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")

_SYNONYMS = {"left of": "to the left of", "right of": "to the right of", "above": "over", "below": "under"}
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_LEAD_INS = ("a picture of", "a drawing of", "an image of", "a photo of", "draw", "there is")
_HELD_OUT = 0.12


@dataclass(frozen=True)
class Thing:
    """One thing in a picture: the words of its shape, colour and size."""

    shape: str
    colour: str
    size: str


@dataclass(frozen=True)
class Scene:
    """What a picture shows. ``relation`` is the first thing's to the second; None where there is only one."""

    things: tuple[Thing, ...]
    background: str
    relation: str | None = None

    def placed(self) -> tuple[Thing, ...]:
        """The things as they lie: left before right, above before below."""
        return self.things[::-1] if self.relation in ("right of", "below") else self.things

    @property
    def axis(self) -> str:
        """How the things lie: ``one``, ``row`` (left and right) or ``column`` (above and below)."""
        if self.relation is None:
            return "one"
        return "row" if self.relation in ("left of", "right of") else "column"


def random_scene(rng: random.Random, *, things: int | None = None, held_out: bool = False) -> Scene:
    """A scene of one or two things (None: either), of the combinations for training or of those held out."""
    while True:
        count = things or (1 if rng.random() < 0.4 else 2)
        background = rng.choice(BACKGROUNDS)
        colours = [colour for colour in COLOURS if colour != background]
        drawn = tuple(Thing(rng.choice(SHAPES), rng.choice(colours), rng.choice(SIZES)) for _ in range(count))
        scene = Scene(drawn, background, rng.choice(RELATIONS) if count == 2 else None)
        if is_held_out(scene) == held_out and not (count == 2 and drawn[0] == drawn[1]):
            return scene


def is_held_out(scene: Scene) -> bool:
    """Whether a combination of the scene is kept from training.

    Two kinds are kept back, 12 % of each: a shape in a colour on a background (wherever it is in a picture), and a
    pair of a shape in a colour with another, whichever comes first.
    """
    combinations = [(thing.shape, thing.colour, scene.background) for thing in scene.things]
    pair = tuple(sorted((thing.shape, thing.colour) for thing in scene.things))
    keys: list[object] = [*combinations, pair] if len(scene.things) == 2 else [*combinations]
    return any(_share(repr(key)) < _HELD_OUT for key in keys)


def _share(key: str) -> float:
    """A number in [0, 1) that a key always gets, on any machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def caption(scene: Scene) -> str:
    """The whole caption, as the evaluation asks for it."""
    first, *others = (f"a {thing.size} {thing.colour} {thing.shape}" for thing in scene.things)
    words = [first, *(f"{scene.relation} {other}" for other in others), f"on a {scene.background} background"]
    return " ".join(_articles(words))


def training_caption(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    """A caption as training sees it, and what it says: the scene with an empty string wherever it says nothing.

    Most say everything but perhaps a size; some leave out colours or the background; some are a few words only
    ("red", "large star", "white background"), so that a negative prompt of one word means something; some begin
    or end with words that mean nothing here.
    """
    if rng.random() < 0.12:
        return _few_words(scene, rng)
    things = [
        Thing(
            thing.shape if rng.random() < 0.96 else "",
            thing.colour if rng.random() < 0.94 else "",
            thing.size if rng.random() < 0.7 else "",
        )
        for thing in scene.things
    ]
    background = scene.background if rng.random() < 0.9 else ""
    relation = scene.relation
    if relation and rng.random() < 0.5:  # the same picture, told from the other side
        things.reverse()
        relation = _OPPOSITE[relation]
    said = Scene(tuple(things), background, relation)
    words = [_noun(things[0])]
    if relation:
        words += [relation if rng.random() < 0.75 else _SYNONYMS[relation], _noun(things[1])]
    if background:
        words.append(f"on a {background} background")
    if rng.random() < 0.08:
        words.insert(0, rng.choice(_LEAD_INS))
    if rng.random() < 0.06:
        words.insert(rng.choice((0, len(words))), _nonsense(rng))
    return " ".join(_articles(words)), said


def _noun(thing: Thing) -> str:
    return " ".join(word for word in ("a", thing.size, thing.colour, thing.shape or "shape") if word)


def _few_words(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    if rng.random() < 0.2:
        nothing = tuple(Thing("", "", "") for _ in scene.things)
        return f"{scene.background} background", Scene(nothing[:1], scene.background, "")
    thing = rng.choice(scene.things)
    kept = rng.choice(((0, 0, 1), (0, 1, 0), (0, 1, 0), (1, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 1, 1)))
    words = [word if keep else "" for word, keep in zip((thing.size, thing.colour, thing.shape), kept, strict=True)]
    said = Scene((Thing(words[2], words[1], words[0]),), "", "")
    return " ".join(word for word in words if word), said


def _nonsense(rng: random.Random) -> str:
    word = "".join(rng.choice("etaoinshrdlucmfwypvbgkjqxz") for _ in range(rng.randint(3, 9)))
    return rng.choice((word, f"{word},", f", {word}"))


def _articles(words: list[str]) -> list[str]:
    text = " ".join(words).split()
    return [
        "an" if word == "a" and following[:1] in "aeiou" and following else word
        for word, following in zip(text, [*text[1:], ""], strict=True)
    ]


def words() -> set[str]:
    """Every word that a caption may contain, but for nonsense."""
    phrases = (*SHAPES, *COLOURS, *BACKGROUNDS, *SIZES, *RELATIONS, *_SYNONYMS.values(), *_LEAD_INS)
    return {word for phrase in phrases for word in phrase.split()} | {"a", "an", "on", "background", "shape"}
