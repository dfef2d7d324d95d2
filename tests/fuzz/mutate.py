"""Mutators: bytes without structure, and JSON trees with it. All take the generator, so that a seed tells the input."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Sequence
from typing import Any

NUMBERS = (0, 1, -1, 2, 7, 8, 255, 256, 999, 1000, 1001, 65_535, 65_536, 10**5, 10**5 + 1, 2**24, 2**31 - 1, 2**31, 2**32,
           2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**18, -(2**31), -(2**63), 10**30, 0.0, -0.0, 0.5, 0.1, 1.0, 1e-45, 5e-324,
           1e-8, 0.999999, 0.9999999999, 1.0000001, 1e38, 3.5e38, 1e308, -1e308, 1.5)  # fmt: skip
TEXTS = ("", " ", "a", "A" * 300, "x" * 5000, "\0", "..", "../x", "/etc/passwd", "a/../b", "a//b", "./a", "C:\\x", "a\\b", "a:b", "B",
         "H/8", "H/0", "H/10000", "H/9999", "T", "B/1", "é", "e\u0301", "日本", "\u202e", "\ufeff", "\U0001f98a", "true", "null", "1", "NaN",
         "<|endoftext|>", "%s%n", "{0}", "epsilon", "sample", "v_prediction", "leading", "linspace", "trailing", "f32", "onnx",
         "unet", "text.hidden_states", "latents", "a" * 64, "0" * 64)  # fmt: skip
TOKENS = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-999", "9" * 30, "9" * 5000, "0." + "1" * 3000, "-0", "01", "1.",
          "0x1", "--1", '"\\ud800"', '"\\udfff\\ud800"', '"\\u0000"', "tru", "nul", "''", '"', "[" * 40 + "]" * 40,
          '{"a":' * 40 + "1" + "}" * 40, "[" * 3000, '{"a":' * 3000)  # fmt: skip


class Token(str):
    """A piece of text that is written as it stands, well formed or not."""

    __slots__ = ()


class Pairs(list[tuple[str, Any]]):
    """An object that may hold a key twice."""


def written(value: Any) -> str:
    """JSON with Tokens and Pairs; NaN and infinities as Python spells them."""
    if isinstance(value, Token):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(key)}:{written(item)}" for key, item in value) + "}"
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    return json.dumps(value)


def odd_value(rng: random.Random, tree: Any = None) -> Any:
    """A value that a reader may not expect; sometimes a part of ``tree``."""
    choice = rng.randrange(12)
    if choice < 4:
        return rng.choice(NUMBERS)
    if choice < 6:
        return rng.choice(TEXTS)
    if choice == 6:
        return rng.choice((None, True, False, [], {}, [[]], {"": None}, [0], ["a"], {"a": 1}))
    if choice == 7:
        return Token(rng.choice(TOKENS))
    if choice == 8:
        return [rng.choice((0, 0.5, None, "a", True, [], {}))] * rng.choice((1, 2, 3, 10, 1000, 1001))
    if choice == 9:
        return {f"{rng.choice('abcBHT')}{i}": rng.choice((0, "a", None, [])) for i in range(rng.choice((1, 3, 100)))}
    if choice == 10:
        return "".join(
            chr(rng.choice((rng.randrange(128), rng.randrange(0xD800), rng.randrange(0x10000, 0x11000))))
            for _ in range(rng.randrange(40))
        )
    nodes = _nodes(tree)
    return copy.deepcopy(rng.choice(nodes)[2]) if nodes else rng.random()


def _nodes(tree: Any) -> list[tuple[Any, Any, Any]]:
    """(container, key, value) of every place below ``tree``."""
    found: list[tuple[Any, Any, Any]] = []
    stack = [tree]
    while stack:
        node = stack.pop()
        items = list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if type(node) is list else []
        for key, value in items:
            found.append((node, key, value))
            stack.append(value)
    return found


def _mutate_once(rng: random.Random, tree: Any) -> Any:
    nodes = _nodes(tree)
    if not nodes or rng.random() < 0.01:
        return odd_value(rng, tree)
    container, key, value = rng.choice(nodes)
    choice = rng.randrange(10)
    if choice < 4:
        container[key] = odd_value(rng, tree)
    elif choice == 4:
        del container[key]
    elif choice == 5:
        if isinstance(container, dict):
            container[rng.choice((*TEXTS, *container))] = value
        else:
            container.insert(rng.randrange(len(container) + 1), value)
    elif choice == 6:
        container[key] = {"list": [value], "text": str(value), "object": {str(key): value}, "twice": [value, value]}[
            rng.choice(("list", "text", "object", "twice"))
        ]
    elif choice == 7 and isinstance(value, (int, float)) and not isinstance(value, bool):
        container[key] = rng.choice((value + 1, value - 1, -value, value * 2, value * 0.5, float(value), value * 10**9))
    elif choice == 8 and isinstance(value, dict):
        container[key] = Pairs([*value.items(), *([rng.choice(list(value.items()))] if value else [])])
    else:
        container[key] = copy.deepcopy(rng.choice(nodes)[2])  # a copy, or the tree would hold itself
    return tree


def json_bytes(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """A seed with one to four changes in its tree; one in ten is damaged as bytes besides."""
    tree = json.loads(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        tree = _mutate_once(rng, tree)
    raw = written(tree).encode("utf-8", "surrogatepass")
    return raw_bytes(rng, [raw]) if rng.random() < 0.1 else raw


def raw_bytes(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """A seed with one to eight changes: bits, bytes, numbers of any width, cuts, repeats, pieces of another seed."""
    raw = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 2, 2, 3, 5, 8))):
        at = rng.randrange(len(raw) + 1)
        choice = rng.randrange(12)
        if choice < 3 and raw:
            raw[at % len(raw)] ^= 1 << rng.randrange(8)
        elif choice == 3 and raw:
            raw[at % len(raw)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif choice == 4:
            raw[at:at] = rng.randbytes(rng.choice((1, 2, 4, 16, 200)))
        elif choice == 5:
            del raw[at : at + rng.choice((1, 2, 4, 16, 200))]
        elif choice == 6:
            del raw[at:]
        elif choice == 7:
            form = rng.choice(("<H", ">H", "<I", ">I", "<Q", ">Q"))
            number = rng.choice(
                (0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1, rng.randrange(2**20))
            )
            packed = struct.pack(form, number % 2 ** (8 * struct.calcsize(form)))
            raw[at : at + len(packed)] = packed
        elif choice == 8:
            piece = raw[at : at + rng.choice((4, 16, 64, 300))]
            raw[at:at] = piece * rng.choice((1, 2, 10))
        elif choice == 9:
            other = rng.choice(seeds)
            start = rng.randrange(len(other) + 1)
            piece_of = other[start : start + rng.choice((4, 16, 64, 300))]
            raw[at : at + rng.choice((0, len(piece_of)))] = piece_of
        elif choice == 10:
            other_at = rng.randrange(len(raw) + 1)
            piece = raw[other_at : other_at + rng.choice((1, 4, 16, 64))]
            raw[at : at + len(piece)] = piece
        else:
            raw[at:at] = rng.choice(TEXTS).encode()
    return bytes(raw[: 2**20])
