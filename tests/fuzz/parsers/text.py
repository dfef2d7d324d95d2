"""Prompts: ``GenerationRequest``'s checks, then ``ClipTokenizer.encode``. An input is UTF-8, or half characters."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from sdrt.request import MAX_PROMPT, GenerationRequest
from sdrt.tokenizer import _BYTE_SYMBOLS, ClipTokenizer, _normalize
from tests.fuzz import mutate as mutators
from tests.fuzz.parsers import vocabulary

PIECES = ("photo", "it's", "I'LL", "'", "''s", "1984", "日本語", "ÉCOLE", "e\u0301", "\u0323\u0301", "<|endoftext|>", "<|startoftext|>", "<|end", "oftext|>",
          "🦊", "👩\u200d👩\u200d👧", "…", "\u00a0", "\u2028", "\x85", "\x1c", "\0", "\ufdfa", "İ", "ẞ", "ﬃ", "ΐ", "\U000e0041", "\uffff", "\U0010ffff", "Ⅷ",
          "٣", "½", "\t", "\n", "  ", "(a:1.5)", "[b|c]", "\u0344", "각", "ᄀ\u1161\u11a8", "\u0f71\u0f72\u0f74")  # fmt: skip
_made: list[ClipTokenizer] = []


def seeds() -> list[bytes]:
    return [piece.encode() for piece in (*PIECES, "a photo of a cat, it's 1984", "".join(PIECES))]


def monsters() -> list[tuple[str, bytes]]:
    n = MAX_PROMPT
    texts = {
        "one word": "supercalifragilistic" * (n // 20), "one letter": "a" * n, "merges": "th" * (n // 2), "quotes": "'" * n,
        "contractions": "'s" * (n // 2), "special": "<|endoftext|>" * (n // 13), "nearly special": "<|endoftext|" * (n // 12),
        "white": " " * n, "combining": "a" + "\u0301" * (n - 1), "combining, in the wrong order": "a" + "\u0301\u0323" * (n // 2 - 1),
        "decreasing classes": "a" + "".join("\u0345\u0301\u0323\u05b0"[i % 4] for i in range(n - 1)), "foxes": "🦊" * n, "hangul": "ᄀ\u1161\u11a8" * (n // 3),
        "long when folded": "\ufdfa" * n, "long in lower case": "İ" * n, "too long": "a" * (n + 1), "megabytes": "a" * 10**7,
        "many words": " ".join(f"w{i}" for i in range(3000)), "zalgo": "".join("e" + "\u0301\u0323\u0345" * 30 for _ in range(n // 91)),
    }  # fmt: skip
    return [(name, text.encode()) for name, text in texts.items()]


def mutate(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    choice = rng.randrange(4)
    if choice == 0:
        return mutators.raw_bytes(rng, seeds)
    if choice == 1:
        return "".join(rng.choice(PIECES) for _ in range(rng.choice((1, 3, 10, 60)))).encode()
    if choice == 2:
        top = rng.choice((0x80, 0x300, 0x3000, 0xD800, 0x110000))
        return "".join(chr(rng.randrange(top)) for _ in range(rng.randrange(60))).encode("utf-8", "surrogatepass")
    return (rng.choice(PIECES) * rng.choice((1, 10, 100)) + rng.choice(PIECES)).encode()


def feed(data: bytes, folder: Path) -> None:
    if not _made:
        ids, merges = vocabulary.files()
        _made.append(ClipTokenizer(ids, {merge: rank for rank, merge in enumerate(merges)}, vocabulary.SPECIAL))
    text = data.decode("utf-8", "surrogateescape")
    (prompt,) = GenerationRequest(text).prompts
    ids = _made[0].encode(prompt)
    names = {i: token for token, i in _made[0]._ids.items()}
    # Back to the text: nothing is lost but case, white space and spelling.
    back = "".join(names[i].removesuffix("</w>") if names[i] not in vocabulary.SPECIAL else names[i] for i in ids)
    raw = b"".join(bytes([_BYTE_SYMBOLS.index(c)]) for c in back)
    folded = "".join(_normalize(part) for part in [unicodedata.normalize("NFC", prompt)])
    assert "".join(raw.decode("utf-8").split()) == "".join(folded.split())
