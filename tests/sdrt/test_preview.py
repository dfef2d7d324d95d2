"""Pictures while they are made, and the strip of all steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdrt import Cancelled, InputError, Pipeline
from sdrt.metrics import psnr
from sdrt.preview import Linear, Previews
from tests.conftest import Cli

PROMPT = "a large red star on a white background"


@pytest.fixture(scope="module")
def demo() -> Any:
    with Pipeline.from_pretrained("demo") as pipe:
        yield pipe


def test_previews_are_the_predicted_pictures(demo: Pipeline, tmp_path: Path) -> None:
    seen: dict[int, np.ndarray] = {}
    previews = Previews(tmp_path / "p.png", every=3)

    def watch(pipe: Pipeline, index: int, timestep: float, state: Any) -> None:
        previews(pipe, index, timestep, state)
        if previews.path.exists():
            with Image.open(previews.path) as picture:
                seen[index] = np.asarray(picture)
                expected = np.asarray(pipe.decode(state["predicted_x0"])[0])
                assert (index + 1) % 3 or np.array_equal(seen[index], expected)

    result = demo(PROMPT, num_inference_steps=8, seed=3, callback_on_step_end=watch)
    assert previews.written == 2
    assert sorted(seen) == [2, 3, 4, 5, 6, 7]
    assert psnr(np.asarray(result.images[0]), seen[5], 255.0) > psnr(np.asarray(result.images[0]), seen[2], 255.0)
    previews.remove()
    assert not previews.path.exists()


def test_the_linear_map_is_near_the_vae(demo: Pipeline, tmp_path: Path) -> None:
    """Fitted at the fourth step, right before the last: nearer than any picture of one colour."""
    previews = Previews(tmp_path / "p.png", every=1, how="linear")
    result = demo(PROMPT, num_inference_steps=8, seed=3, callback_on_step_end=previews)
    assert previews.written == 7
    final = np.asarray(result.images[0], np.float64)
    with Image.open(previews.path) as picture:
        got = np.asarray(picture, np.float64)
    assert got.shape == final.shape
    flat = np.broadcast_to(final.mean(axis=(0, 1)), final.shape)
    assert psnr(final, got, 255.0) > psnr(final, flat, 255.0) + 3


def test_a_map_that_is_linear_is_found() -> None:
    generator = np.random.default_rng(0)
    latents = generator.standard_normal((2, 4, 6, 5)).astype(np.float32)
    colours = np.clip(np.einsum("bchw,ck->bhwk", latents, generator.standard_normal((4, 3)) * 0.05) + 0.5, 0, 1)
    pictures = colours.repeat(8, axis=1).repeat(8, axis=2).astype(np.float32)
    np.testing.assert_allclose(Linear(latents, pictures)(latents), colours, atol=1e-5)


def test_a_batch_is_one_sheet(demo: Pipeline, tmp_path: Path) -> None:
    previews = Previews(tmp_path / "p.png", every=2)
    demo(PROMPT, num_inference_steps=3, num_images_per_prompt=2, seed=1, callback_on_step_end=previews)
    with Image.open(previews.path) as sheet:
        assert sheet.width > 2 * 128


def test_the_last_step_has_no_preview(demo: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a solver that calls the network twice a step, the last call; the VAE decodes once a preview, and once more."""
    decoder, calls = demo.sessions["vae_decoder"], []
    run = decoder.run
    monkeypatch.setattr(decoder, "run", lambda **inputs: calls.append(1) or run(**inputs))
    previews = Previews(tmp_path / "p.png", every=1)
    result = demo(PROMPT, num_inference_steps=2, scheduler="Heun", seed=1, callback_on_step_end=previews)
    assert (len(result.timings.steps), previews.written, len(calls)) == (3, 2, 3)


def test_a_preview_that_cannot_be_written_stops_nothing(
    demo: Pipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    previews = Previews(tmp_path / "none" / "p.png", every=1)
    result = demo(PROMPT, num_inference_steps=3, seed=1, callback_on_step_end=previews)
    assert len(result.images) == 1
    assert caplog.text.count("no previews: ") == 1
    previews.remove()


def test_cancelling_still_works(demo: Pipeline, tmp_path: Path) -> None:
    previews = Previews(tmp_path / "p.png", every=1)

    def stop(pipe: Pipeline, index: int, timestep: float, state: Any) -> None:
        previews(pipe, index, timestep, state)
        raise Cancelled("enough")

    with pytest.raises(Cancelled):
        demo(PROMPT, num_inference_steps=3, seed=1, callback_on_step_end=stop)
    assert previews.written == 1


@pytest.mark.parametrize("by", ["vae", "linear"])
def test_generate_leaves_no_preview(by: str, cli: Cli, tmp_path: Path) -> None:
    done = cli("generate", PROMPT, "--steps", "3", "--preview", "1", "--preview-by", by, "-o", tmp_path / "a.png")
    assert done.returncode == 0, done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_explain(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "strip.png"
    done = cli("explain", PROMPT, "--steps", "6", "--every", "2", "--scheduler", "Euler a", "-o", out, "--json", "-")
    assert done.returncode == 0, done.stderr
    steps = json.loads(done.stdout)["steps"]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row["sigma"] for row in steps] == sorted((row["sigma"] for row in steps), reverse=True)
    with Image.open(out) as strip:
        assert strip.width == 3 * (128 + 8) + 8
    table = cli("explain", PROMPT, "--steps", "4", "--guidance-interval", "1", "3", "-o", out).stdout
    assert "yes" in table
    assert "no" in table


def test_explain_refuses(cli: Cli, tmp_path: Path) -> None:
    done = cli("explain", PROMPT, "--scheduler", "nonsense", "-o", tmp_path / "a.png")
    assert done.returncode == 1
    assert "there is no scheduler 'nonsense'" in done.stderr
    assert not (tmp_path / "a.png").exists()


def test_no_file_of_anybodys_is_lost(cli: Cli, tmp_path: Path) -> None:
    mine = tmp_path / "a-preview.png"
    mine.write_bytes(b"mine")
    done = cli("generate", PROMPT, "--steps", "2", "--preview", "1", "-o", tmp_path / "a.png")
    assert done.returncode == 1
    assert "a-preview.png is there already, and would be lost" in done.stderr
    assert mine.read_bytes() == b"mine"


@pytest.mark.parametrize("bad", [{"every": 0}, {"every": 1, "how": "magic"}])
def test_previews_that_are_refused(bad: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError):
        Previews(tmp_path / "p.png", **bad)
