"""CLIP's byte-pair encoding, from ``vocab.json`` and ``merges.txt``.

The reference is transformers 5's CLIPTokenizer: Unicode NFC, white space folded, lower case; then letters, single
digits, runs of other signs and English contractions are words; a word's bytes are merged, lowest rank first, leftmost
first. Special tokens that stand in the text are recognised. Every character that this Python's Unicode tables know
gives the reference's tokens (all of them were compared); a letter newer than those tables counts as a sign.
"""

from __future__ import annotations

import heapq
import json
import re
import unicodedata
from functools import lru_cache
from pathlib import Path

from sdrt import strict_json
from sdrt.errors import BundleError

MAX_REMEMBERED = 64
"""Letters of a word whose tokens are kept."""

_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
_WHITE = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | frozenset(
    map(chr, range(0x2000, 0x200B))
)


def _byte_symbols() -> list[str]:
    """CLIP's printable stand-in for each of the 256 bytes."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    symbols, spare = [], 256
    for byte in range(256):
        if byte in printable:
            symbols.append(chr(byte))
        else:
            symbols.append(chr(spare))
            spare += 1
    return symbols


_BYTE_SYMBOLS = _byte_symbols()


def special_tokens(folder: Path) -> tuple[str, str, str]:
    """bos_token, eos_token and pad_token as a tokenizer's own files name them; CLIP's where they are silent.

    As in transformers, ``special_tokens_map.json`` counts where ``tokenizer_config.json`` has no
    ``added_tokens_decoder``: SD 2.x pads with "!", which in older folders only the map says. BundleError for a damaged
    file.
    """
    tokens = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if not (folder / file).is_file():
            continue
        named = strict_json.read(folder / file)
        if not isinstance(named, dict):
            raise BundleError(f"{folder / file}: expected an object")
        contents = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
        tokens |= {name: value for name in tokens if isinstance(value := contents.get(name), str)}
        if "added_tokens_decoder" in named:
            break
    return tokens["bos_token"], tokens["eos_token"], tokens["pad_token"]


class ClipTokenizer:
    """Text → token ids, without start, end or padding (``sdrt.prompt`` adds those)."""

    def __init__(self, vocabulary: dict[str, int], ranks: dict[str, int], special: tuple[str, ...]) -> None:
        """``ranks``: the rank of each merge ``"left right"``, lowest first."""
        self._ids = vocabulary
        self._ranks = ranks
        self._special = re.compile("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")")
        self._known_word = lru_cache(maxsize=4096)(self._merge)

    @classmethod
    def load(cls, folder: Path, special: tuple[str, ...]) -> ClipTokenizer:
        """Read ``vocab.json`` and ``merges.txt``. BundleError when they are damaged or lack a special token."""
        ids = _read_vocabulary(folder / "vocab.json")
        ranks = _read_merges(folder / "merges.txt", ids)
        for token in (*special, *_BYTE_SYMBOLS, *(symbol + "</w>" for symbol in _BYTE_SYMBOLS)):
            if token not in ids:
                raise BundleError(f"{folder / 'vocab.json'}: has no token {token!r}")
        return cls(ids, ranks, special)

    def id(self, token: str) -> int:
        return self._ids[token]

    def vocabulary(self) -> list[str]:
        """Tokens in the order of their ids; "" for an id that is not given."""
        tokens = [""] * (max(self._ids.values()) + 1)
        for token, i in self._ids.items():
            tokens[i] = token
        return tokens

    def merges(self) -> list[str]:
        """``"left right"``, lowest rank first."""
        return sorted(self._ranks, key=self._ranks.__getitem__)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text of any length."""
        ids: list[int] = []
        for part in self._special.split(text):
            if self._special.fullmatch(part):
                ids.append(self._ids[part])
            else:
                for word in _words(_normalize(part)):
                    # A prompt may be one word of 20,000 letters; thousands of those are not to be remembered.
                    ids.extend(self._known_word(word) if len(word) <= MAX_REMEMBERED else self._merge(word))
        return ids

    def _merge(self, word: str) -> tuple[int, ...]:
        """Merge a word's symbols, lowest rank first, leftmost first: a heap of pairs over a linked list, n log n."""
        symbols = [_BYTE_SYMBOLS[byte] for byte in word.encode("utf-8")]
        symbols[-1] += "</w>"
        following = [*range(1, len(symbols)), -1]
        previous = [*range(-1, len(symbols) - 1)]
        heap: list[tuple[int, int, str, str]] = []

        def push(left: int) -> None:
            if left >= 0 and (right := following[left]) >= 0:
                first, second = symbols[left], symbols[right]
                if (rank := self._ranks.get(f"{first} {second}")) is not None:
                    heapq.heappush(heap, (rank, left, first, second))

        for position in range(len(symbols)):
            push(position)
        while heap:
            _, left, first, second = heapq.heappop(heap)
            right = following[left]
            if right < 0 or symbols[left] != first or symbols[right] != second:
                continue  # one of the two was merged with another neighbour meanwhile
            symbols[left] = first + second
            symbols[right] = ""
            following[left] = following[right]
            if following[left] >= 0:
                previous[following[left]] = left
            push(previous[left])
            push(left)
        return tuple(self._ids[symbol] for symbol in symbols if symbol)


def _read_vocabulary(path: Path) -> dict[str, int]:
    try:  # 49,408 entries: plain json.loads, and one check of all values, keep this off the start-up time
        ids = json.loads(strict_json.read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: not valid JSON: {error}") from None
    if (
        not isinstance(ids, dict)
        or set(map(type, ids.values())) != {int}
        or min(ids.values()) < 0
        or max(ids.values()) >= 2**31
    ):
        raise BundleError(f"{path}: is not an object of token ids")
    return ids


def _read_merges(path: Path, ids: dict[str, int]) -> dict[str, int]:
    """Rank of each merge, by its line ``"left right"``. Checked in bulk, as 48,894 lines one by one would be felt."""
    try:
        lines = strict_json.read_bytes(path).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise BundleError(f"{path}: is not UTF-8: {error}") from None
    first = 1 if lines[0].startswith("#version") else 0
    last = len(lines) if lines[-1] else len(lines) - 1
    lines = lines[first:last]
    text = "\n".join(lines)
    if not ids.keys() >= set(text.replace(" ", "").split("\n")) or text.count(" ") != len(lines):
        for number, line in enumerate(lines, first + 1):
            if line.count(" ") != 1 or line.replace(" ", "") not in ids:
                raise BundleError(f"{path}: line {number} is not a merge of this vocabulary: {line[:40]!r}")
    return dict(zip(lines, range(len(lines)), strict=True))


def _normalize(text: str) -> str:
    folded = "".join(" " if char in _WHITE else char for char in unicodedata.normalize("NFC", text))
    return "".join(map(str.lower, folded))


def _words(text: str) -> list[str]:
    """Split into contractions, runs of letters, single digits and runs of anything else but white space."""
    words: list[str] = []
    position = 0
    while position < len(text):
        char = text[position]
        if char in _WHITE:
            position += 1
            continue
        contraction = next((c for c in _CONTRACTIONS if text.startswith(c, position)), None)
        if contraction is not None:
            end = position + len(contraction)
        else:
            kind, end = _kind(char), position + 1
            while kind != "N" and end < len(text) and _kind(text[end]) == kind:
                end += 1
        words.append(text[position:end])
        position = end
    return words


def _kind(char: str) -> str:
    if char in _WHITE:
        return " "
    category = unicodedata.category(char)[0]
    return category if category in "LN" else "P"
