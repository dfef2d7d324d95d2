"""One value, or one by component."""

from __future__ import annotations

import hypothesis
import pytest
from hypothesis import strategies as st

from sdrt import InputError
from sdrt.by_component import parse, resolve, text


def test_grammar() -> None:
    assert parse("int8", "--precision") == parse(" int8 ", "--precision") == "int8"
    assert parse("unet=int8, vae_decoder=fp16", "--precision") == {"unet": "int8", "vae_decoder": "fp16"}
    assert parse("unet=gpu.1", "--device") == {"unet": "gpu.1"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "--precision is empty"),
        ("unet=", "'unet=' is not component=value"),
        ("=int8", "'=int8' is not component=value"),
        ("unet=int8,fp16", "'fp16' is not component=value"),
        ("unet=int8,", "'' is not component=value"),
        ("int8,fp16", "'int8' is not component=value"),
        ("unet=int8,unet=fp16", "unet is named twice"),
    ],
)
def test_refused(given: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(given, "--precision")


def test_resolve() -> None:
    names = ["text_encoder", "unet"]
    assert resolve("int8", names, "fp32", "--precision") == {"text_encoder": "int8", "unet": "int8"}
    assert resolve({"unet": "int8"}, names, "fp32", "--precision") == {"text_encoder": "fp32", "unet": "int8"}
    with pytest.raises(InputError, match="no component 'vae'; the bundle holds text_encoder, unet"):
        resolve({"vae": "int8"}, names, "fp32", "--precision")


@hypothesis.given(st.text())
def test_anything_is_parsed_or_refused(given: str) -> None:
    try:
        value = parse(given, "--precision")
    except InputError:
        return
    assert value == given.strip() or (isinstance(value, dict) and all(name and part for name, part in value.items()))
    assert parse(text(value), "--precision") == value
