"""The tokenizer: loading CLIP's vocabulary, and prompts whose words it has met before or has not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdrt.tokenizer import ClipTokenizer

SPECIAL = ("<|startoftext|>", "<|endoftext|>")
SHORT = "a lighthouse at dawn, oil on canvas"
LONG = ", ".join([SHORT] * 8)
"""About as much as CLIP's 77 tokens hold."""


@pytest.fixture(scope="module")
def tokenizer(bundle: Path) -> ClipTokenizer:
    return ClipTokenizer.load(bundle / "tokenizer", SPECIAL)


def test_load(benchmark: Any, bundle: Path) -> None:
    benchmark(ClipTokenizer.load, bundle / "tokenizer", SPECIAL)


@pytest.mark.parametrize("prompt", [SHORT, LONG], ids=["short", "long"])
def test_words_met_before(benchmark: Any, tokenizer: ClipTokenizer, prompt: str) -> None:
    assert len(benchmark(tokenizer.encode, prompt)) < 76


@pytest.mark.parametrize("words", [8, 40], ids=["short", "long"])
def test_new_words(benchmark: Any, tokenizer: ClipTokenizer, words: int) -> None:
    letters = np.random.default_rng(words)

    def prompt() -> tuple[tuple[str], dict[str, Any]]:
        return (" ".join(letters.integers(97, 123, 6, np.uint8).tobytes().decode() for _ in range(words)),), {}

    benchmark.pedantic(tokenizer.encode, setup=prompt, rounds=300)
