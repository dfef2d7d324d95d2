"""What can be read from a picture: the grammar's words, and ``none`` where nothing of the grammar is there."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.demo.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, Thing

NONE = "none"
"""Nothing is there, or nothing that the grammar has a word for. No caption asks for it, so it is never right."""

NOTHING = Thing(NONE, NONE, NONE)

SLOTS = 2
"""Things of which a picture is read: the first is the left or the upper one, or the only one."""

HEADS: dict[str, tuple[str, ...]] = {
    "axis": ("one", "row", "column", NONE),
    "background": (*BACKGROUNDS, NONE),
    **{
        f"{attribute}_{slot}": (*words, NONE)
        for slot in range(SLOTS)
        for attribute, words in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES))
    },
}
"""What is decided of a picture: by head, the words of which one is chosen."""


@dataclass(frozen=True)
class Reading:
    """What a picture shows. ``things`` as they lie; one where ``axis`` is ``one``, else two."""

    axis: str
    background: str
    things: tuple[Thing, ...]

    @classmethod
    def of_words(cls, words: dict[str, str]) -> Reading:
        """From one word a head."""
        things = [Thing(*(words[f"{name}_{slot}"] for name in ("shape", "colour", "size"))) for slot in range(SLOTS)]
        return cls(words["axis"], words["background"], tuple(things[:1] if words["axis"] == "one" else things))

    @classmethod
    def of_scene(cls, scene: Scene) -> Reading:
        """What is to be read from a picture of a scene."""
        return cls(scene.axis, scene.background, scene.placed())

    @property
    def words(self) -> dict[str, str]:
        """One word a head."""
        found = {"axis": self.axis, "background": self.background}
        for slot in range(SLOTS):
            thing = self.things[slot] if slot < len(self.things) else NOTHING
            found |= {f"{name}_{slot}": word for name, word in vars(thing).items()}
        return found
