"""The second stage: the text encoder learns to read, before it has seen a picture.

CLIP's learns from pictures and their captions. Here what a picture shows is known: from the state at the end token,
and at a token after it, linear maps must tell what lies where (which colour belongs to which shape, and which thing
is on the left) and what was not said. The maps are thrown away; the third stage trains the encoder on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.demo.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, random_scene, training_caption
from benchmarks.demo.training import Draws, Plan, train

READING = Plan(updates=600, rate=1e-3, decay=0.5)

_AXES = ("one", "row", "column")
_FIELDS: dict[str, tuple[str, ...]] = {
    "axis": _AXES, "background": BACKGROUNDS,
    **{f"{field}{n}": known for n in (0, 1) for field, known in
       (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES))},
}  # fmt: skip
_BATCH = 96


class Reader(torch.nn.Module):
    """The text encoder and the linear maps that are asked."""

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        width = text_encoder.config.hidden_size
        self.maps = torch.nn.ModuleDict({name: torch.nn.Linear(width, len(v) + 1) for name, v in _FIELDS.items()})


def answers(said: Scene) -> dict[str, int]:
    """What the maps should tell of a caption that says ``said``: an index a field, the last one for "not said"."""
    told = dict.fromkeys(_FIELDS, "")
    told["axis"] = "" if said.relation == "" else said.axis
    told["background"] = said.background
    for n, thing in enumerate(said.placed()):
        told |= {f"shape{n}": thing.shape, f"colour{n}": thing.colour, f"size{n}": thing.size}
    return {name: known.index(told[name]) if told[name] else len(known) for name, known in _FIELDS.items()}


def tokens(tokenizer: Any, captions: list[str], device: torch.device) -> torch.Tensor:
    """``int64[B, 77]``."""
    ids = tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    return ids.to(device)


def train_words(folder: Path, text_encoder: Any, tokenizer: Any, device: torch.device, *, plan: Plan = READING) -> Any:
    """Train ``text_encoder`` in place and return it."""
    reader = Reader(text_encoder).to(device)

    def loss_of(_: int, chance: Draws) -> tuple[torch.Tensor, dict[str, float]]:
        drawn = [training_caption(random_scene(chance.python), chance.python) for _ in range(_BATCH)]
        ids = tokens(tokenizer, [caption for caption, _ in drawn], device)
        states = text_encoder(ids).last_hidden_state
        ends = (ids == tokenizer.eos_token_id).int().argmax(dim=1)
        after = ends + (torch.rand(len(ends), generator=chance.torch).to(device) * (77 - ends)).long()
        wanted = {
            name: torch.tensor([answers(said)[name] for _, said in drawn], device=device) for name in _FIELDS
        }  # fmt: skip
        loss, right = torch.zeros((), device=device), torch.ones(len(ids), dtype=torch.bool, device=device)
        for places in (ends, after):
            read = states[torch.arange(len(ids), device=device), places]
            for name, answer in wanted.items():
                told = reader.maps[name](read)
                loss = loss + torch.nn.functional.cross_entropy(told, answer)
                right &= told.argmax(dim=1) == answer
        return loss / (2 * len(_FIELDS)), {"all_right": float(right.float().mean())}

    train("words", folder, reader, plan, loss_of)
    return text_encoder
