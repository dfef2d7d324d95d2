"""Our tokenizer against transformers' CLIPTokenizer."""

from __future__ import annotations

import sys
import time
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from sdrt.errors import BundleError
from sdrt.tokenizer import ClipTokenizer

SPECIAL = ("<|startoftext|>", "<|endoftext|>")

# Letters and signs that this Python's Unicode tables do not know yet count as signs; see sdrt/tokenizer.py.
KNOWN = st.characters(exclude_categories=("Cs", "Cn"))
WORDS = st.sampled_from(
    ["photo", "it's", "I'LL", "'s", "1984", "日本語", "naïve", "ÉCOLE", "e\u0301", "<|endoftext|>", "🦊", "…", "\u00a0"]
)


@pytest.fixture(scope="module")
def ours(checkpoint: Path) -> ClipTokenizer:
    return ClipTokenizer.load(checkpoint / "tokenizer", SPECIAL)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    return CLIPTokenizer.from_pretrained(checkpoint / "tokenizer").backend_tokenizer


@given(text=st.text(KNOWN, max_size=60))
def test_any_text(text: str, ours: ClipTokenizer, reference: Any) -> None:
    assert ours.encode(text) == reference.encode(text, add_special_tokens=False).ids


@given(
    parts=st.lists(WORDS | st.text(KNOWN, max_size=4), max_size=12), glue=st.sampled_from(["", " ", "  ", "\n", ","])
)
def test_words_and_their_borders(parts: list[str], glue: str, ours: ClipTokenizer, reference: Any) -> None:
    text = glue.join(parts)
    assert ours.encode(text) == reference.encode(text, add_special_tokens=False).ids


def test_every_character(ours: ClipTokenizer, reference: Any) -> None:
    """Each code point that Python knows, between a letter, a digit and a letter: all classes, cases and foldings."""
    texts = [
        f"x{char}1{char}a"
        for char in map(chr, range(0, sys.maxunicode + 1, 1))
        if unicodedata.category(char) not in ("Cs", "Cn", "Co")
    ]
    cjk = [t for t in texts if "\u3400" <= t[1] <= "\ud7ff" or t[1] >= "\U00020000"]  # 100,000 of one kind: a sample
    texts = sorted((set(texts) - set(cjk)) | set(cjk[::50]))
    for text, expected in zip(texts, reference.encode_batch(texts, add_special_tokens=False), strict=True):
        assert ours.encode(text) == expected.ids, f"U+{ord(text[1]):04X}"


def test_a_very_long_word_takes_no_quadratic_time(ours: ClipTokenizer, reference: Any) -> None:
    text = "supercalifragilistic" * 1000
    started = time.perf_counter()
    ids = ours.encode(text)
    assert time.perf_counter() - started < 20, "20,000 letters should take a fraction of a second"
    assert ids == reference.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("vocab.json", "{", "not valid JSON"),
        ("vocab.json", "[]", "not an object of token ids"),
        ("vocab.json", '{"a": -1}', "not an object of token ids"),
        ("vocab.json", '{"a": 1.5}', "not an object of token ids"),
        ("vocab.json", "[" * 100_000, "not valid JSON"),
        ("vocab.json", '{"a": 1}', "not a merge|has no token"),
        ("merges.txt", "#version: 0.2\nno merge at all\n", "line 2"),
        ("merges.txt", "\udcff", "not UTF-8"),
    ],
)
def test_damaged_files(checkpoint: Path, tmp_path: Path, file: str, text: str, message: str) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((checkpoint / "tokenizer" / name).read_bytes())
    (tmp_path / file).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BundleError, match=message):
        ClipTokenizer.load(tmp_path, SPECIAL)
