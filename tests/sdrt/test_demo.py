"""The model that sdrt brings, the command that shows it, and the contact sheet."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.demo import ship
from sdrt import Pipeline, demo
from sdrt import bundle as bundles
from sdrt.cli import common
from sdrt.errors import BuildError, BundleError
from sdrt.metrics import psnr
from tests.conftest import Cli

CHECKPOINT = Path(ship.__file__).parent / "checkpoint"
SCHEDULERS = {
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DDIM": ("DDIMScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler Karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "PLMS": ("PNDMScheduler", {"skip_prk_steps": True}),
}  # fmt: skip


# -- the bundle ----------------------------------------------------------------------------------------------------------


def test_it_is_whole_and_made_of_the_checkpoint_in_the_repository() -> None:
    bundle = bundles.load("demo")
    assert bundles.damaged(bundle) == []
    sources = {file.path: file.sha256 for file in bundle.manifest.provenance.source_files}
    weights = sorted(path for path in CHECKPOINT.rglob("*.safetensors"))
    assert len(weights) == 3
    for path in weights:
        assert sources[path.relative_to(CHECKPOINT).as_posix()] == bundles.sha256(path)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_pictures_equal_diffusers(demo_pipe: Pipeline, demo_diffusers: Any, name: str) -> None:
    """20 steps, trained weights rounded to float16, computed in float32. The bar is 80 dB."""
    class_name, options = SCHEDULERS[name]
    config = {**demo_pipe.scheduler_config, **options, "_class_name": class_name}
    demo_diffusers.scheduler = getattr(diffusers, class_name).from_config(config)
    prompts, negative = list(demo.PROMPTS[2:5]), "red"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = demo_diffusers(
            prompts, negative_prompt=[negative] * 3, num_inference_steps=20, guidance_scale=4.0, output_type="np",
            generator=[torch.Generator().manual_seed(5 + i) for i in range(3)],
        ).images  # fmt: skip
    got = demo_pipe(
        prompts, negative_prompt=negative, num_inference_steps=20, guidance_scale=4.0, output_type="np", seed=5,
        scheduler=name,
    ).images  # fmt: skip
    assert psnr(expected, got, 1.0) >= 80


def test_the_pictures_that_engines_are_held_against_are_diffusers() -> None:
    bundle = bundles.load("demo")
    made = ship.showcase(CHECKPOINT, bundle.manifest.guidance_scale)
    assert psnr(made, demo.reference(bundle), 1.0) >= 80


def shows_a_large_red_star(picture: Any) -> bool:
    pixels = np.asarray(picture).astype(int)
    corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
    red = (pixels[..., 0] - pixels[..., 1:].max(axis=2)) > 100
    return pixels.shape == (128, 128, 3) and bool(corners.min() > 200) and 0.08 < red.mean() < 0.4


def test_the_command_line_shows_what_was_asked_for(cli: Cli, tmp_path: Path) -> None:
    done = cli("generate", "a large red star on a white background", "-o", tmp_path / "star.png", "--seed", 0)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "star.png") as picture:
        assert shows_a_large_red_star(picture)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_shows_what_was_asked_for(demo_pipe: Pipeline, name: str) -> None:
    """Equal to diffusers is not enough: both may read a config that leaves a scheduler to defaults made for pixels."""
    made = demo_pipe("a large red star on a white background", num_inference_steps=20, seed=1, scheduler=name)
    assert shows_a_large_red_star(made.images[0])


def test_its_name_can_be_built(cli: Cli, tmp_path: Path) -> None:
    done = cli("build", "demo", tmp_path / "built", "--engine", "null")
    assert done.returncode == 0, done.stderr
    assert bundles.load(tmp_path / "built").manifest.provenance.source == ship.NAME


def test_a_folder_of_that_name_comes_first_where_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert bundles.load("demo").root == bundles.SHIPPED / "demo"
    for name in ("../demo", "models", "", "demo/unet", "./demo", "demo/"):
        assert bundles.shipped(name) is None
    with pytest.raises(BundleError, match="no such directory"):
        bundles.load("./demo")
    (tmp_path / "demo").mkdir()
    with pytest.raises(BundleError, match="is not a bundle") as caught:
        bundles.load("demo")
    assert str(bundles.SHIPPED / "demo") in str(caught.value)


def test_a_folder_of_that_name_is_not_in_the_way_where_none_is_named(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    done = cli("generate", "a star", "--steps", 1)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.png").exists()


def test_without_its_pictures_it_is_another_bundle(bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"no showcase\.npz"):
        demo.reference(bundles.load(bundle))


# -- the command ---------------------------------------------------------------------------------------------------------


def test_the_command(cli: Cli, tmp_path: Path) -> None:
    done = cli("demo", "-o", tmp_path / "sheet.png", "--json", tmp_path / "rows.json", "--keep", tmp_path / "kept")
    assert done.returncode == 0, done.stderr
    assert "onnxruntime  fp32" in done.stdout
    found = json.loads((tmp_path / "rows.json").read_text())
    row = next(row for row in found["rows"] if row["engine"] == "onnxruntime")
    assert row["problem"] == ""
    assert row["psnr"] >= 80
    assert all(row[name] > 0 for name in ("build", "load", "first", "step"))
    assert row["resident"] is None or row["resident"] > 30e6
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 6 * 160
    again = cli("generate", demo.PROMPTS[0], "-m", tmp_path / "kept" / "onnxruntime-fp32-cpu", "-o", tmp_path / "x.png")
    assert again.returncode == 0, again.stderr


def test_an_engine_that_fails_is_told_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    built = demo._built

    def failing(bundle: Any, home: Path, row: demo.Row) -> Any:
        if row.precision == "bf16":
            raise BuildError("bf16: not here", "choose another")
        return built(bundle, home, row)

    monkeypatch.setattr(demo, "_built", failing)
    said: list[str] = []
    shown = list(
        demo.show(bundles.load("demo"), [("onnxruntime", "cpu")], ["bf16", "fp32"], progress=said.append)
    )  # fmt: skip
    assert "not here" in shown[0].row.problem
    assert shown[0].pictures is None
    assert shown[1].row.problem == ""
    assert shown[1].pictures is not None
    assert shown[1].pictures.shape == (6, 128, 128, 3)
    assert len(said) == 3


def test_what_is_kept_replaces_no_other_bundle(bundle: Path, cli: Cli, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "kept" / "onnxruntime-fp32-cpu")
    done = cli("demo", "--engine", "onnxruntime", "-o", tmp_path / "sheet.png", "--keep", tmp_path / "kept")
    assert done.returncode == 1
    assert "is another model's bundle" in done.stderr
    assert bundles.damaged(bundles.load(tmp_path / "kept" / "onnxruntime-fp32-cpu")) == []
    assert not (tmp_path / "sheet.png").exists(), "nothing was made"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--engine", "null"), 1, "makes no pictures"),
        (("-o", "sheet.jpg"), 1, "pictures are written as PNG"),
        (("--engine", "nothing"), 1, "nothing"),
        (("--precision", "fp99"), 2, "fp99"),
        (("--json", "nowhere/x.json"), 1, "cannot be written"),
    ],
)
def test_wrong_usage(cli: Cli, arguments: tuple[str, ...], status: int, message: str) -> None:
    done = cli("demo", *arguments)
    assert done.returncode == status
    assert message in done.stderr


def test_pictures_must_have_a_place_to_go(tmp_path: Path) -> None:
    from sdrt.errors import InputError

    for output in (tmp_path, tmp_path / "nowhere" / "x.png", tmp_path / "x.jpg"):
        with pytest.raises(InputError):
            common.check_picture(output)
    shutil.rmtree(tmp_path)
