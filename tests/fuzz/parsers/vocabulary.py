"""A tokenizer's two files: the length of vocab.json in a line, vocab.json, merges.txt."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from sdrt.tokenizer import _BYTE_SYMBOLS, ClipTokenizer
from tests.fuzz import mutate as mutators

SPECIAL = ("<|startoftext|>", "<|endoftext|>")
MERGES = (
    "t h",
    "a n",
    "th e</w>",
    "i n",
    "an d</w>",
    "e r</w>",
    "p h",
    "ph o",
    "o n",
    "i n</w>",
    "Ġ Ġ",
    "ã ģ",
    "ðŁ ¦",
    "1 2</w>",
    "' s</w>",
)
TEXTS = ("the photo and the photographer's 12 birds", "日本 naïve 🦊 <|endoftext|> !!", "")


def files() -> tuple[dict[str, int], list[str]]:
    """A vocabulary as small as CLIP's rules allow, and its merges."""
    merges = [merge for merge in MERGES if all(len(part.removesuffix("</w>")) < 3 for part in merge.split())]
    tokens = [
        *_BYTE_SYMBOLS,
        *(symbol + "</w>" for symbol in _BYTE_SYMBOLS),
        *(merge.replace(" ", "") for merge in merges),
        *SPECIAL,
    ]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges


def _joined(vocabulary: bytes, merges: bytes) -> bytes:
    return b"%d\n%s%s" % (len(vocabulary), vocabulary, merges)


def seeds() -> list[bytes]:
    ids, merges = files()
    text = json.dumps(ids).encode()
    return [
        _joined(text, ("#version: 0.2\n" + "\n".join(merges) + "\n").encode()),
        _joined(json.dumps(ids, ensure_ascii=False).encode(), "\n".join(merges).encode()),
    ]


def monsters() -> list[tuple[str, bytes]]:
    ids, merges = files()
    good, lines = json.dumps(ids).encode(), "\n".join(merges).encode()
    size = 16 * 2**20
    return [
        ("many ids", _joined(json.dumps(ids | {f"x{i}": i for i in range(800_000)}).encode(), lines)),
        ("many lists", _joined(b"[" + b"[]," * (size // 3 - 9) + b"0]", lines)),
        ("many objects", _joined(b"[" + b'{"":0},' * (size // 7 - 9) + b"0]", lines)),
        ("deep", _joined(b"[" * 10**6, lines)),
        ("digits", _joined(b'{"a":' + b"9" * 10**6 + b"}", lines)),
        ("a token of megabytes", _joined(json.dumps(ids | {"x" * (size - 50_000): 1}).encode(), b"x" * (size - 9))),
        ("an empty line each", _joined(good, b"\n" * (size - 1))),
        ("one merge, often", _joined(good, b"t h\n" * (size // 4 - 1))),
        ("spaces", _joined(good, b" " * (size - 1))),
        ("one long line", _joined(good, b"t h" * (size // 3 - 1))),
    ]


def mutate(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    head, _, rest = rng.choice(seeds).partition(b"\n")
    vocabulary, merges = rest[: int(head)], rest[int(head) :]
    if rng.random() < 0.6:
        vocabulary = (
            mutators.json_bytes(rng, [vocabulary]) if rng.random() < 0.7 else mutators.raw_bytes(rng, [vocabulary])
        )
    else:
        merges = mutators.raw_bytes(rng, [merges])
    return _joined(vocabulary, merges)


def feed(data: bytes, folder: Path) -> None:
    head, _, rest = data.partition(b"\n")
    (folder / "vocab.json").write_bytes(rest[: int(head)])
    (folder / "merges.txt").write_bytes(rest[int(head) :])
    tokenizer = ClipTokenizer.load(folder, SPECIAL)
    for text in TEXTS:
        assert all(type(i) is int and 0 <= i < 2**31 for i in tokenizer.encode(text))
