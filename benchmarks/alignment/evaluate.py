"""Do generated pictures show what their captions say? Read by a network that was trained on drawn pictures.

    python -m benchmarks.alignment.evaluate -m demo-bundle --sheet sheet.png
    python -m benchmarks.alignment.evaluate -m fp32 -m int8 --json alignment.json
    python -m benchmarks.alignment.evaluate -m fp32 --scheduler "DPM++ 2M,DDIM,Euler" --steps 10,20 --negative

Captions are of scenes kept from training, of one thing and of two in turn. Lists (N,...) and several -m make every
combination; each is compared with the first, caption by caption from the same noise. Every interval is of 95 % by
itself: of the pictures, as if each had a caption of its own (of one thing there are but 72, which come in turn). The
first column says how the reader does on drawn pictures of such scenes, which it was not shown either: what it cannot
read there, it cannot judge.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import random
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks.alignment import reader as readers
from benchmarks.alignment import runs, score
from benchmarks.alignment.proportions import Interval, Paired, wilson
from benchmarks.alignment.reading import Reading
from benchmarks.alignment.runs import Setting
from benchmarks.demo.draw import draw
from benchmarks.demo.scenes import Scene, Thing, caption
from sdrt import image
from sdrt.bench import environment, facts, memory
from sdrt.cli import common
from sdrt.errors import InputError, SdrtError
from sdrt.metrics import psnr
from sdrt.schedulers import label, resolve
from sdrt.sheet import Cell, contact_sheet

PROMPT, UNWANTED = "a large star on a white background", "red"
"""Of the experiment with a negative prompt."""
SHOWN = 48
"""Pictures on a contact sheet: the first ones, whatever they show."""
KINDS = {1: "captions of one thing", 2: "captions of two things"}


@dataclass(frozen=True)
class Negative:
    """Of ``PROMPT``'s pictures without (a) and with (b) the negative prompt ``UNWANTED``, how many show what.

    unwanted: a thing of that colour. wanted: one large star on white, whatever its colour: what ruins every picture
    has not kept anything out of them.
    """

    unwanted: Paired
    wanted: Paired


@dataclass(frozen=True)
class Run:
    """One setting's pictures, one a scene, what was read from them and how that was judged."""

    setting: Setting
    pictures: list[Image.Image]
    readings: list[Reading]
    judgements: list[score.Judgement]
    negative: Negative | None
    facts: dict[str, Any]


def rendered(reader: readers.Reader, count: int) -> dict[int, list[score.Judgement]]:
    """Judgements of drawn pictures of scenes kept from training, by the number of things."""
    rng = random.Random("alignment/rendered")
    scenes = runs.scenes(count + count % 2, seed=-1)  # no generation has this seed
    found = readers.read(reader, [draw(scene, rng) for scene in scenes])
    return by_kind(scenes, [score.judge(scene, reading) for scene, reading in zip(scenes, found, strict=True)])


def by_kind(scenes: Sequence[Scene], judgements: Sequence[score.Judgement]) -> dict[int, list[score.Judgement]]:
    """Judgements by the number of things asked for."""
    kinds: dict[int, list[score.Judgement]] = {}
    for scene, judgement in zip(scenes, judgements, strict=True):
        kinds.setdefault(len(scene.things), []).append(judgement)
    return dict(sorted(kinds.items()))


def run(setting: Setting, scenes: Sequence[Scene], reader: readers.Reader, args: argparse.Namespace) -> Run:
    """Generate, read and judge."""
    captions = [caption(scene) for scene in scenes]
    total = len(captions) + 2 * (args.negative or 0)
    with setting.open() as pipe, tqdm(total=total, desc=setting.name, unit="picture") as bar:
        known = facts.describe(pipe.bundle) | {
            "engines": facts.engines(pipe.bundle, setting.engine),
            "sampler": label(resolve(setting.scheduler, pipe.scheduler_config)),
            "guidance_scale": pipe.bundle.manifest.guidance_scale if setting.guidance is None else setting.guidance,
        }
        pictures = runs.generate(pipe, setting, captions, seed=args.seed, batch=args.batch, progress=bar.update)
        found: list[list[Reading]] = []
        for negative in (None, UNWANTED) if args.negative else ():
            made = runs.generate(
                pipe, setting, [PROMPT] * args.negative, seed=args.seed, batch=args.batch, progress=bar.update,
                negative=negative,
            )  # fmt: skip
            found.append(readers.read(reader, made))
    readings = readers.read(reader, pictures)
    judged = [score.judge(scene, reading) for scene, reading in zip(scenes, readings, strict=True)]
    return Run(setting, pictures, readings, judged, negative_of(*found) if found else None, known)


def negative_of(without: Sequence[Reading], with_it: Sequence[Reading]) -> Negative:
    """The experiment with a negative prompt, from what was read."""

    def unwanted(reading: Reading) -> bool:
        return any(thing.colour == UNWANTED for thing in reading.things)

    def wanted(reading: Reading) -> bool:
        scene = Scene((Thing("star", reading.things[0].colour, "large"),), "white")
        return score.judge(scene, reading)["everything"] == 1.0

    return Negative(
        Paired.of(*([unwanted(reading) for reading in found] for found in (without, with_it))),
        Paired.of(*([wanted(reading) for reading in found] for found in (without, with_it))),
    )


@dataclass(frozen=True)
class Compared:
    """Two runs on the same captions and noise.

    ``attributes``: by number of things, then by attribute, how often it was wholly right in both, in one, in none.
    ``alike``: the share of pictures from which the same was read. ``decibels``: PSNR of each pair of pictures.
    """

    attributes: dict[int, dict[str, Paired]]
    alike: Interval
    decibels: list[float]


def compared(base: Run, other: Run, scenes: Sequence[Scene]) -> Compared:
    """``other`` beside ``base``, pair by pair."""
    kinds, others = by_kind(scenes, base.judgements), by_kind(scenes, other.judgements)
    attributes = {
        kind: {
            name: Paired.of([j[name] == 1.0 for j in judgements], [j[name] == 1.0 for j in others[kind]])
            for name in judgements[0]
        }
        for kind, judgements in kinds.items()
    }
    same = sum(a == b for a, b in zip(base.readings, other.readings, strict=True))
    pairs = zip(base.pictures, other.pictures, strict=True)
    decibels = [psnr(np.asarray(a), np.asarray(b), 255.0) for a, b in pairs]
    return Compared(attributes, wilson(same, len(scenes)), decibels)


# -- what is said -----------------------------------------------------------------------------------------------------


def percent(interval: Interval) -> str:
    """``97.2 % [94.3, 98.6]``"""
    return f"{100 * interval.estimate:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def accuracies(own: dict[int, list[score.Judgement]], done: Sequence[Run], scenes: Sequence[Scene]) -> str:
    """One table for captions of one thing, one for those of two."""
    tables = []
    for kind, drawn in own.items():
        columns = [score.shares(drawn)]
        asked = [len(scene.things) for scene in scenes].count(kind)
        if not asked:
            continue
        columns += [score.shares(by_kind(scenes, one.judgements)[kind]) for one in done]
        head = (f"{asked} {KINDS[kind]}", f"reader, {len(drawn)} drawn", *(one.setting.name for one in done))
        rows = [(name, *(percent(column[name]) for column in columns)) for name in columns[0]]
        tables.append(common.table(head, rows))
    return "\n\n".join(tables)


def comparison(base: Run, other: Run, found: Compared) -> str:
    """The paired table of two runs."""
    rows = []
    for kind, attributes in found.attributes.items():
        for name, pairs in attributes.items():
            difference = pairs.difference()
            points = f"{100 * difference.estimate:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
            counts = (pairs.both, pairs.only_a, pairs.only_b, pairs.neither)
            rows.append((KINDS[kind], name, *counts, points, f"{pairs.p_value():.3g}"))
    head = ("", "all right in", "both", "only first", "only second", "neither", "difference, points", "McNemar's p")
    least, median = min(found.decibels), statistics.median(found.decibels)
    return "\n".join((
        f"{base.setting.name} (first) and {other.setting.name} (second), same captions and noise:",
        common.table(head, rows),
        f"read alike: {percent(found.alike)}; PSNR of a pair: median {median:.1f} dB, least {least:.1f} dB,"
        f" {found.decibels.count(math.inf)} of {len(found.decibels)} identical",
    ))  # fmt: skip


def negatives(done: Sequence[Run]) -> str:
    """The table of the experiment with a negative prompt."""
    rows = []
    for one in done:
        if one.negative is not None:
            for what, pairs in ((UNWANTED, one.negative.unwanted), ("one large star on white", one.negative.wanted)):
                without, with_it = (wilson(n, pairs.n) for n in (pairs.both + pairs.only_a, pairs.both + pairs.only_b))
                ratio = pairs.ratio()
                shown = f"{ratio.estimate:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
                rows.append((one.setting.name, what, pairs.n, percent(without), percent(with_it), shown))
    head = (PROMPT, "read", "seeds", "without", f"negative prompt {UNWANTED!r}", "ratio")
    return common.table(head, rows)


def report(
    args: argparse.Namespace, scenes: Sequence[Scene], own: dict[int, list[score.Judgement]], done: Sequence[Run],
    found: Sequence[Compared],
) -> dict[str, Any]:  # fmt: skip
    """Everything, for JSON."""

    def shares(kinds: dict[int, list[score.Judgement]]) -> dict[str, Any]:
        return {
            KINDS[kind]: {name: asdict(share) for name, share in score.shares(judgements).items()}
            for kind, judgements in kinds.items()
        }

    def paired(pairs: Paired) -> dict[str, Any]:
        return asdict(pairs) | {"difference": asdict(pairs.difference()), "p_value": pairs.p_value()}

    names = ("numpy", "pillow", "torch", "safetensors", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt-rtx")
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "environment": asdict(environment.examine()),
        "versions": facts.versions(names),
        "reader": {
            "sha256": hashlib.sha256(args.reader.read_bytes()).hexdigest(),
            "drawn": sum(map(len, own.values())),
            "shares": shares(own),
        },
        "asked": [
            {"caption": caption(scene), "seed": args.seed + i, "words": Reading.of_scene(scene).words}
            for i, scene in enumerate(scenes)
        ],
        "runs": [
            {
                "setting": asdict(one.setting),
                **one.facts,
                "shares": shares(by_kind(scenes, one.judgements)),
                "read": [reading.words for reading in one.readings],
                "right": one.judgements,
                "negative": one.negative
                and {"prompt": PROMPT, "negative_prompt": UNWANTED}
                | {
                    what: paired(pairs) | {"ratio": asdict(pairs.ratio())}
                    for what, pairs in vars(one.negative).items()
                },
            }
            for one in done
        ],
        "comparisons": [
            {
                "first": done[0].setting.name,
                "second": other.setting.name,
                "attributes": {
                    KINDS[kind]: {name: paired(pairs) for name, pairs in attributes.items()}
                    for kind, attributes in beside.attributes.items()
                },
                "read_alike": asdict(beside.alike),
                "psnr": beside.decibels,
            }
            for other, beside in zip(done[1:], found, strict=True)
        ],
    }  # fmt: skip


def write_sheets(file: Path, done: Sequence[Run], scenes: Sequence[Scene]) -> None:
    """One sheet a run: FILE.png, FILE-2.png, …"""
    for number, one in enumerate(done, 1):
        path = file if number == 1 else file.with_stem(f"{file.stem}-{number}")
        cells = [
            Cell(picture, caption(scene), judgement["everything"] == 0.0)
            for picture, scene, judgement in zip(one.pictures, scenes, one.judgements, strict=True)
        ][:SHOWN]
        sheet = contact_sheet([cells[start : start + 8] for start in range(0, len(cells), 8)])
        image.save_png(sheet, path, f"{one.setting.name}: the first {len(cells)} captions, a seed each")


# -- the command ------------------------------------------------------------------------------------------------------


def several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """``10,20`` → [10, 20]."""

    def parse(text: str) -> list[Any]:
        return [kind(word.strip()) for word in text.split(",")]

    return parse


def positive(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def size(text: str) -> tuple[int, int]:
    """``128x128``"""
    width, _, height = text.partition("x")
    return positive(width), positive(height)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("-m", "--model", action="append", required=True, help="a bundle; repeatable")
    made.add_argument("--engine", type=several(str), default=[None], metavar="NAME,...", help="default: each bundle's")
    made.add_argument("--device", action="append", help="as the engine names it; or repeated, one for each model")
    made.add_argument("--scheduler", type=several(str), default=[None], metavar="NAME,...", help="default: the model's")
    made.add_argument("--steps", type=several(positive), default=[20], metavar="N,...", help="default: 20")
    made.add_argument("--guidance", type=several(float), default=[None], metavar="G,...", help="default: the model's")
    made.add_argument("--shape", type=size, metavar="WxH", help="default: the model's")
    made.add_argument("--captions", type=positive, default=500, metavar="N", help="default: %(default)s")
    made.add_argument("--rendered", type=positive, default=2000, metavar="N",
                      help="drawn pictures that the reader is tried on (default: %(default)s)")  # fmt: skip
    made.add_argument("--batch", type=positive, default=8, metavar="N", help="pictures at once (default: %(default)s)")
    made.add_argument("--seed", type=int, default=0, help="of the captions, and of the first picture's noise")
    made.add_argument("--negative", type=positive, nargs="?", const=100, metavar="SEEDS",
                      help=f"also: {PROMPT!r} without and with {UNWANTED!r} forbidden (default: 100)")  # fmt: skip
    made.add_argument("--reader", type=Path, default=readers.WEIGHTS, metavar="FILE", help="the reader's weights")
    made.add_argument("--json", metavar="FILE", help="everything, with each caption's reading")
    made.add_argument("--sheet", metavar="FILE.png", help=f"the first {SHOWN} pictures, wrong ones in red")
    return made


def evaluate(args: argparse.Namespace) -> None:
    """Run what was asked for; print the tables, write the files. Raises what opening and generating raise."""
    common.check_writable("--json", args.json)
    common.check_writable("--sheet", args.sheet)
    if args.sheet and Path(args.sheet).suffix.lower() != ".png":
        raise InputError(f"{args.sheet}: a contact sheet is a PNG", "choose a --sheet that ends with .png")
    reader = readers.load(args.reader)
    scenes = runs.scenes(args.captions, args.seed)
    planned = runs.settings(
        args.model,
        args.engine,
        args.scheduler,
        args.steps,
        args.guidance,
        devices=args.device or [None],
        size=args.shape,
    )
    for setting in planned:  # before minutes of work
        setting.check(args.batch, args.seed)
    if args.json:
        memory.library()  # raises where psutil is not installed
    own = rendered(reader, args.rendered)
    done = [run(setting, scenes, reader, args) for setting in planned]
    found = [compared(done[0], other, scenes) for other in done[1:]]
    parts = [accuracies(own, done, scenes)]
    parts += [comparison(done[0], other, pairs) for other, pairs in zip(done[1:], found, strict=True)]
    parts += [negatives(done)] if args.negative else []
    print("\n\n".join(parts))
    if args.json:
        common.write_json(report(args, scenes, own, done, found), args.json)
    if args.sheet:
        write_sheets(Path(args.sheet), done, scenes)


def main() -> None:
    """The command."""
    try:
        evaluate(parser().parse_args())
    except (SdrtError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
