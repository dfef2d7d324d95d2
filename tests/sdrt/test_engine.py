"""The door through which every tensor goes: what passed once is compared only, and must hide nothing that differs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdrt import bundle as bundles
from sdrt.engine import CheckedSession, open_session
from sdrt.errors import BundleError, InputError


class Changing:
    """A session whose output at the second call is another than the manifest says."""

    def __init__(self, session: Any, change: Any) -> None:
        self.session, self.spec, self.change, self.calls = session, session.spec, change, 0
        self.bind, self.close = session.bind, session.close

    def run(self, **inputs: Any) -> Any:
        self.calls += 1
        outputs = self.session.run(**inputs)
        return {name: self.change(array) for name, array in outputs.items()} if self.calls == 2 else outputs


@pytest.fixture
def unet(bundle: Path) -> Iterator[Any]:
    """The U-Net on the null engine, with constants for two pictures."""
    session = open_session(bundles.load(bundle), "unet", engine="null")
    session.bind(encoder_hidden_states=np.zeros((2, 77, 32), np.float32))
    yield session
    session.close()


def good(pictures: int = 2) -> dict[str, Any]:
    return {"sample": np.zeros((pictures, 4, 8, 8), np.float32), "timestep": np.ones(1, np.float32)}


class Lookalike:
    """Shape and dtype of an array, and no array."""

    shape, dtype = (2, 4, 8, 8), np.dtype(np.float32)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sample": np.zeros((1, 4, 8, 8), np.float32)}, r"encoder_hidden_states has shape \[2, 77, 32\]"),
        ({"sample": np.zeros((2, 4, 8, 8))}, r"sample is float64"),
        ({"sample": np.zeros((2, 4, 8, 8), ">f4")}, r"sample is >f4"),
        ({"sample": np.zeros((2, 3, 8, 8), np.float32)}, r"sample is f32\[2,3,8,8\]"),
        ({"sample": Lookalike()}, "sample is Lookalike"),
        ({"timestep": np.ones(2, np.float32)}, "timestep is"),
        ({"colour": np.ones(1, np.float32)}, "has no input 'colour'"),
        ({"encoder_hidden_states": np.zeros((1, 77, 32), np.float32)}, r"must be \[2, 77, 32\]"),
    ],
    ids=str,
)
def test_a_good_call_opens_the_door_to_no_other(unet: Any, changed: dict[str, Any], message: str) -> None:
    for _ in range(2):
        assert unet.run(**good())["out_sample"].shape == (2, 4, 8, 8)
        with pytest.raises(InputError, match=message):
            unet.run(**(good() | changed))


def test_an_input_left_out_after_a_good_call(unet: Any) -> None:
    unet.run(**good())
    with pytest.raises(InputError, match="input timestep is missing"):
        unet.run(sample=good()["sample"])


def test_other_constants_are_checked_against_the_same_inputs(unet: Any) -> None:
    unet.run(**good())
    unet.bind(encoder_hidden_states=np.zeros((1, 77, 32), np.float32))
    with pytest.raises(InputError, match=r"must be \[2, 77, 32\]"):
        unet.run(**good())
    assert unet.run(**good(1))["out_sample"].shape == (1, 4, 8, 8)


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda array: array[:1], r"f32\[1, 4, 8, 8\]"),
        (lambda array: array.astype(np.float64), r"float64\[2, 4, 8, 8\]"),
    ],
    ids=["shape", "dtype"],
)
def test_every_output_is_held_against_the_manifest(bundle: Path, change: Any, got: str) -> None:
    held = bundles.load(bundle)
    changing: Any = Changing(open_session(held, "unet", engine="null"), change)
    session = CheckedSession(held, "unet", changing)
    session.bind(encoder_hidden_states=np.zeros((2, 77, 32), np.float32))
    session.run(**good())
    with pytest.raises(BundleError, match=rf"output out_sample is {got}, the manifest says f32\[2, 4, 8, 8\]"):
        session.run(**good())
    assert session.run(**good())["out_sample"].shape == (2, 4, 8, 8)


def test_an_output_that_is_not_there_is_named(bundle: Path) -> None:
    held = bundles.load(bundle)
    inner: Any = open_session(held, "unet", engine="null")
    session = CheckedSession(held, "unet", inner)
    session.bind(encoder_hidden_states=np.zeros((2, 77, 32), np.float32))
    inner.run = lambda **_: {"colour": np.zeros(1, np.float32)}
    with pytest.raises(BundleError, match="unet: gives no output 'out_sample', it gives colour"):
        session.run(**good())
