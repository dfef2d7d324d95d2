"""The roof: what each component's calls are, and what is known where something could not be measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sdrt.bench import roof
from sdrt.bench.report import Settings
from sdrt.bundle import Bundle
from sdrt.errors import SdrtError
from sdrt.pipeline import Pipeline

SETTINGS = Settings(model="m", width=512, height=256, batch=3, prompt="a fox")


@pytest.mark.parametrize(
    ("changes", "zeros", "texts", "pictures"),
    [
        ({}, False, 2, 6),
        ({}, True, 1, 6),
        ({"negative_prompt": "blurry"}, True, 2, 6),
        ({"negative_prompt": "a fox"}, False, 1, 6),
        ({"guidance_scale": 1.0}, False, 1, 3),
    ],
)
def test_calls(null: Pipeline, changes: dict[str, Any], zeros: bool, texts: int, pictures: int) -> None:
    """A text is encoded once for all pictures; guidance shows the denoiser each twice; the decoder has its own."""
    manifest = replace(null.bundle.manifest, no_negative_prompt="zeros" if zeros else "empty")
    assert roof._calls(Bundle(null.bundle.root, manifest), replace(SETTINGS, **changes)) == {
        "text_encoder": ("text_encoder", {"B": texts, "T": 77}),
        "unet": ("network", {"B": pictures, "H": 256, "W": 512, "T": 77}),
        "vae_decoder": ("vae_decoder", {"B": 3, "H": 256, "W": 512}),
    }


def test_rates_are_those_of_the_denoisers_device(null: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roof, "_rates", lambda engine, device, precision, settings: (None, [f"asked for {device}"]))
    for device, asked in (("unet=gpu,vae_decoder=cpu", "gpu"), ("vae_decoder=cpu", "None"), ("npu", "npu")):
        assert roof.rates(null.bundle, replace(SETTINGS, device=device), {})[1] == [f"asked for {asked}"]


def test_a_machine_that_cannot_be_measured_costs_the_roof_alone(
    null: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(threads: int | None) -> dict[str, float]:
        raise SdrtError("no room")

    monkeypatch.setattr(roof, "measure", fail)
    assert roof.rates(null.bundle, SETTINGS, {}) == (None, ["no room"])
    assert roof.roof(null.bundle, SETTINGS, None, {}) == {}
