"""Strict JSON: whatever the bytes, the answer is a value or a BundleError; whatever the value, decoding likewise."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sdrt import strict_json
from sdrt.bundle import Manifest
from sdrt.errors import BundleError


@dataclass(frozen=True)
class Leaf:
    name: str
    size: int
    ratio: float = 1.0


@dataclass(frozen=True)
class Tree:
    """One field for each kind of annotation that ``decode`` knows."""

    leaf: Leaf
    leaves: tuple[Leaf, ...] = ()
    pair: tuple[int, str] = (0, "")
    kind: Literal["a", "b"] = "a"
    dim: int | str = 1
    maybe: Leaf | None = None
    flag: bool = False
    table: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


FULL: dict[str, Any] = {
    "leaf": {"name": "x", "size": 1, "ratio": 2},
    "leaves": [{"name": "y", "size": 2}],
    "pair": [3, "z"],
    "kind": "b",
    "dim": "H/8",
    "maybe": {"name": "w", "size": 4},
    "flag": True,
    "table": {"k": [1, 2]},
    "facts": {"anything": [None, {"at": "all"}]},
}

TEXT = st.text(max_size=8)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


def _outcome(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns, or the BundleError that it raises; anything else that it raises fails the test."""
    try:
        return function(*arguments)
    except BundleError as error:
        return error


@given(st.binary(max_size=200))
@example(b"")
@example(b"\xef\xbb\xbf{}")  # a byte order mark
@example("{}".encode("utf-16"))
@example(b'"\\ud800"')
@example(b"1" * 5000)  # longer than Python's int() takes
def test_any_bytes(raw: bytes) -> None:
    got = _outcome(strict_json.parse, raw, "here")
    assert not isinstance(got, BundleError) or got.message.startswith("here: ")


@given(JSON)
def test_any_json_is_read_back_or_refused(value: Any) -> None:
    text = json.dumps(value)  # allow_nan: NaN and infinities are spelt as Python spells them
    got = _outcome(strict_json.parse, text.encode(), "here")
    assert got == value or (isinstance(got, BundleError) and _holds_a_number_out_of_range(value))


def _holds_a_number_out_of_range(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_a_number_out_of_range, value.values()))
    if isinstance(value, list):
        return any(map(_holds_a_number_out_of_range, value))
    if isinstance(value, float):
        return not math.isfinite(value)
    return isinstance(value, int) and not -(2**63) <= value < 2**64


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("NaN", "NaN"),
        ("[Infinity]", "Infinity"),
        ('{"a": -Infinity}', "-Infinity"),
        ("1e999", "1e999"),
        ("-1e999", "-1e999"),
        (str(2**64), "18446744073709551616"),
        (str(-(2**63) - 1), "-9223372036854775809"),
        ("9" * 5000, "99999"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' stands twice"),
        ('[{"x": {"k": 1, "k": 1}}]', "'k' stands twice"),
        ("[" * 33 + "]" * 33, "nested more than 32"),
        ('{"a":' * 40 + "1" + "}" * 40, "nested more than 32"),
        ("[" * 1_000_000, "nested more than 32"),
        ("[" * 100_000 + "]" * 100_000, "nested more than 32"),
        ("", "not valid JSON"),
        ("{} {}", "not valid JSON"),
        ("{'a': 1}", "not valid JSON"),
        ("[1,]", "not valid JSON"),
        ('"\n"', "not valid JSON"),
        ("01", "not valid JSON"),
        ("+1", "not valid JSON"),
        ("// no comments\n1", "not valid JSON"),
        # No file system, terminal or PNG takes half a character, so it must not get as far as a path or a name.
        (r'["\ud800"]', "lone surrogate"),
        (r'{"\udfff": 1}', "lone surrogate"),
    ],
    ids=lambda value: value[:24],
)
def test_refused(text: str, said: str) -> None:
    with pytest.raises(BundleError) as caught:
        strict_json.parse(text.encode(), "dir/file.json")
    assert caught.value.message.startswith("dir/file.json: ")
    assert said in caught.value.message
    assert len(caught.value.message) < 200, "an error quotes its cause, not the whole file"


@pytest.mark.parametrize(
    "raw", [b'"\xff"', b'"\xc0\x80"', b'"\xed\xa0\x80"', "{}".encode("utf-16"), "{}".encode("utf-32")]
)
def test_what_is_not_utf8_is_refused(raw: bytes) -> None:
    with pytest.raises(BundleError, match="not valid JSON"):
        strict_json.parse(raw, "here")


def test_limits_are_inclusive() -> None:
    assert strict_json.parse(str(2**64 - 1).encode(), "") == 2**64 - 1
    assert strict_json.parse(str(-(2**63)).encode(), "") == -(2**63)
    assert strict_json.parse(rb'"\ud83d\ude00"', "") == "\U0001f600"
    deepest = ("[" * 32 + "]" * 32).encode()
    assert strict_json.parse(deepest, "") == json.loads(deepest)


class TestRead:
    def test_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text('{"ä": [1, 2.5, null]}', encoding="utf-8")
        assert strict_json.read(tmp_path / "a.json") == {"ä": [1, 2.5, None]}

    @pytest.mark.parametrize("name", ["missing.json", ".", "file/below", "x" * 300], ids=ascii)
    def test_what_cannot_be_read(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(BundleError, match="cannot be read"):
            strict_json.read(tmp_path / name)

    def test_too_big(self, tmp_path: Path) -> None:
        """A sparse file: what is refused is not read to its end either."""
        with (tmp_path / "big.json").open("wb") as file:
            file.truncate(2**40)
        with pytest.raises(BundleError, match="larger than 16777216 bytes"):
            strict_json.read(tmp_path / "big.json")

    def test_biggest(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_bytes(b"1".ljust(strict_json.MAX_BYTES))
        assert strict_json.read(tmp_path / "a.json") == 1


class TestDecode:
    def test_every_kind(self) -> None:
        got = strict_json.decode(Tree, FULL, "top")
        assert got == Tree(
            leaf=Leaf("x", 1, 2.0),
            leaves=(Leaf("y", 2),),
            pair=(3, "z"),
            kind="b",
            dim="H/8",
            maybe=Leaf("w", 4),
            flag=True,
            table={"k": (1, 2)},
            facts={"anything": [None, {"at": "all"}]},
        )
        assert type(got.leaf.ratio) is float, "an integer is a number"

    def test_encode_is_the_inverse_and_leaves_defaults_out(self) -> None:
        tree = strict_json.decode(Tree, FULL, "")
        assert strict_json.decode(Tree, strict_json.encode(tree), "") == tree
        assert strict_json.encode(Tree(Leaf("x", 1))) == {"leaf": {"name": "x", "size": 1}}

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"leaf": None}, "top.leaf: expected an object, got null"),
            ({"leaf": {"name": "x"}}, "top.leaf: missing key 'size'"),
            (
                {"leaf": {"name": "x", "size": 1, "sise": 2}},
                "top.leaf: unknown key 'sise'; known keys: name, size",
            ),
            ({"leaf": {"name": "x", "size": True}}, "top.leaf.size: expected an integer, got true or false: true"),
            ({"leaf": {"name": "x", "size": 1.0}}, "top.leaf.size: expected an integer, got a number: 1.0"),
            ({"leaf": {"name": "x", "size": 1, "ratio": "2"}}, 'top.leaf.ratio: expected a number, got a string: "2"'),
            ({"leaves": {}}, "top.leaves: expected a list, got an object"),
            ({"leaves": [{"name": "x", "size": 1}, 7]}, "top.leaves[1]: expected an object, got an integer: 7"),
            ({"pair": [1]}, "top.pair: expected a list of 2"),
            ({"pair": [1, 2]}, "top.pair[1]: expected a string"),
            ({"kind": "c"}, "top.kind: expected one of 'a', 'b', got a string"),
            ({"kind": ["a"]}, "top.kind: expected one of 'a', 'b', got a list"),
            ({"dim": 1.5}, "top.dim: expected an integer or a string, got a number: 1.5"),
            ({"dim": True}, "top.dim: expected an integer or a string, got true or false"),
            ({"dim": None}, "top.dim: expected an integer or a string, got null"),
            ({"maybe": 0}, "top.maybe: expected an object, got an integer"),
            ({"flag": 1}, "top.flag: expected true or false, got an integer"),
            ({"table": {"k": [1, "2"]}}, "top.table.k[1]: expected an integer"),
            ({"facts": []}, "top.facts: expected an object, got a list"),
        ],
        ids=str,
    )
    def test_errors_name_the_path(self, change: dict[str, Any], said: str) -> None:
        with pytest.raises(BundleError) as caught:
            strict_json.decode(Tree, {**FULL, **change}, "top")
        assert caught.value.message.startswith(said)

    def test_a_long_value_is_not_quoted_whole(self) -> None:
        with pytest.raises(BundleError) as caught:
            strict_json.decode(Tree, {"leaf": "x" * 10_000}, "top")
        assert len(caught.value.message) < 200

    @given(JSON)
    def test_any_json(self, value: Any) -> None:
        with pytest.raises(BundleError):
            strict_json.decode(Tree, value, "top")

    @given(st.dictionaries(st.sampled_from(sorted(FULL)), JSON))
    def test_any_json_in_any_place(self, change: dict[str, Any]) -> None:
        got = _outcome(strict_json.decode, Tree, {**FULL, **change}, "top")
        assert isinstance(got, Tree) or got.message.startswith("top.")

    @given(st.dictionaries(st.sampled_from(list(Manifest.__dataclass_fields__)), JSON))
    def test_any_json_as_a_manifest(self, value: dict[str, Any]) -> None:
        with pytest.raises(BundleError):
            strict_json.decode(Manifest, value, "sdrt.json")
