"""The door through which every tensor goes: what passed once is compared only, and must hide nothing that differs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdrt import bundle as bundles
from sdrt.engine import CheckedSession, devices_by_component, open_session
from sdrt.errors import BundleError, InputError
from sdrt.pipeline import Pipeline
from sdrt_engines import null


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
        ({"encoder_hidden_states": np.zeros((2, 77, 32), np.float32)}, "encoder_hidden_states is bound"),
    ],
    ids=["batch", "dtype", "byte order", "channels", "no array", "length", "unknown", "bound"],
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


def test_what_is_bound_is_not_given_again(bundle: Path) -> None:
    """Engines would keep the other one, for the next call, too."""
    session = open_session(bundles.load(bundle), "unet", engine="null")
    states = {"encoder_hidden_states": np.zeros((2, 77, 32), np.float32)}
    session.run(**good(), **states)
    session.bind(**states)
    for _ in range(2):
        with pytest.raises(InputError, match="unet: input encoder_hidden_states is bound"):
            session.run(**good(), **states)
    session.run(**good())


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize(
    ("device", "unet", "others"),
    [(None, None, None), ("cpu", "cpu", "cpu"), ("unet=gpu.1, vae_decoder=npu", "gpu.1", None), ({"unet": "gpu"}, "gpu", None)],
    ids=str,
)  # fmt: skip
def test_each_component_is_opened_on_its_device(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, device: Any, unet: str | None, others: str | None, low_memory: bool
) -> None:
    opened: dict[str, str | None] = {}

    def open_null(held: Any, name: str, device: str | None, options: Any) -> null.NullSession:
        opened[name] = device
        return null.NullSession(held.component(name))

    monkeypatch.setattr(null, "open", open_null)
    with Pipeline.from_pretrained(bundle, "null", device, low_memory=low_memory) as pipe:
        pipe("a fox", num_inference_steps=1)
    decoder = "npu" if "npu" in str(device) else others
    assert opened == {"text_encoder": others, "unet": unet, "vae_decoder": decoder}


@pytest.mark.parametrize(
    ("device", "given"),
    [
        (None, {"text_encoder", "unet", "vae_decoder"}),
        ("gpu", {"text_encoder", "unet", "vae_decoder"}),
        ("unet=gpu", {"text_encoder", "vae_decoder"}),
        ("text_encoder=cpu,unet=gpu,vae_encoder=npu,vae_decoder=npu", {"text_encoder"}),
        ("text_encoder=npu,unet=gpu,vae_encoder=npu,vae_decoder=npu", {"text_encoder", "unet", "vae_decoder"}),
    ],
)
def test_threads_are_for_processors(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, device: str | None, given: set[str]
) -> None:
    """Other devices would refuse them; only where there is no processor at all they are given, to be refused."""
    opened: dict[str, int | None] = {}

    def open_null(held: Any, name: str, device: str | None, options: Any) -> null.NullSession:
        opened[name] = options.threads
        return null.NullSession(held.component(name))

    monkeypatch.setattr(null, "open", open_null)
    with Pipeline.from_pretrained(bundle, "null", device, threads=3):
        pass
    assert {name for name, threads in opened.items() if threads == 3} == given


def test_devices_that_are_refused(bundle: Path) -> None:
    held = bundles.load(bundle)
    with pytest.raises(
        InputError, match="no component 'net'; the bundle holds text_encoder, unet, vae_encoder, vae_decoder"
    ):
        devices_by_component(held, {"net": "cpu"})
    for device in (3, {"unet": 3}, {3: "cpu"}, ["cpu"], "unet=cpu,", ""):
        with pytest.raises(InputError, match="device"):
            devices_by_component(held, device)  # type: ignore[arg-type]
