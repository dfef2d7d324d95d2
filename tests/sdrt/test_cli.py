"""The commands as their user meets them; what they refuse is in test_damage.py."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sdrt
from tests.conftest import Cli, environment


def test_generate(bundle: Path, tmp_path: Path, cli: Cli) -> None:
    """The file holds the library's picture and the settings that made it."""
    arguments = ["-n", "blurry", "-W", 64, "-H", 72, "--steps", 3, "--cfg-scale", 7, "--seed", 5]
    done = cli(
        "generate", "a fox, running", "-m", bundle, "-o", tmp_path / "fox.png", *arguments,
        "--scheduler", "dpm++ 2m karras", "--json", tmp_path / "fox.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    with Image.open(tmp_path / "fox.png") as picture:
        text = picture.text["parameters"]  # type: ignore[attr-defined]
        pixels = np.asarray(picture)
    assert text == (
        "a fox, running\nNegative prompt: blurry\nSteps: 3, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 5, "
        f"Size: 64x72, Model: tiny-sd, Version: sdrt {sdrt.__version__}"
    )
    with sdrt.Pipeline.from_pretrained(bundle) as pipe:
        expected = pipe(
            "a fox, running", negative_prompt="blurry", width=64, height=72, num_inference_steps=3, guidance_scale=7.0,
            seed=5, scheduler="DPM++ 2M Karras",
        )  # fmt: skip
    np.testing.assert_array_equal(pixels, np.asarray(expected.images[0]))
    report = json.loads((tmp_path / "fox.json").read_text())
    assert report["seeds"] == [5]
    assert report["size"] == [64, 72]
    seconds = report["seconds"]
    assert list(seconds) == [field.name for field in dataclasses.fields(sdrt.Timings)]
    assert seconds["load"] > 0
    assert len(seconds["steps"]) == len(seconds["network"]) == 3
    assert seconds["vae_encoder"] == 0
    assert re.search(r"seed 5, load \d+\.\d\d s, text \d+\.\d\d s, 3 steps of \d+\.\d{3} s, VAE ", done.stderr)


def test_generate_with_low_memory_on_devices_by_component(bundle: Path, tmp_path: Path, cli: Cli) -> None:
    """The same picture; what loading took within the generation is told as loading."""
    common = ("generate", "a fox", "-m", bundle, "-W", 64, "-H", 64, "--steps", 2, "--seed", 1)
    assert cli(*common, "-o", tmp_path / "kept.png").returncode == 0
    done = cli(
        *common, "-o", tmp_path / "low.png", "--low-memory", "--device", "unet=cpu,vae_decoder=cpu", "--json", "-"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "low.png").read_bytes() == (tmp_path / "kept.png").read_bytes()
    seconds = json.loads(done.stdout)["seconds"]
    assert seconds["load"] > 0
    assert f"load {seconds['load']:.2f} s" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--timesteps", "999,500", "--steps", 7], "leave --steps out"),
        (["--sigmas", "14,5,0", "--steps", 2], "leave --steps out"),
        (["--preview-by", "linear"], "--preview-by needs --preview"),
        (["--strength", 0.5], "need --init-image"),
        (["--variation-seed", 5], "needs --variation-strength"),
    ],
    ids=str,
)
def test_what_would_have_no_effect_is_refused(arguments: list[object], message: str, tmp_path: Path, cli: Cli) -> None:
    done = cli("generate", "a fox", "-o", tmp_path / "fox.png", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


def test_how_a_bundle_is_opened_is_checked(bundle: Path, tmp_path: Path, cli: Cli) -> None:
    for command in (("generate", "a fox", "-m"), ("verify",)):
        cached = cli(*command, bundle, "--cache", tmp_path / "cache")
        assert cached.returncode == 1
        assert "onnxruntime keeps no compiled models; engines that do: openvino" in cached.stderr
        device = cli(*command, bundle, "--device", "net=cpu")
        assert device.returncode == 1
        assert "no component 'net'; the bundle holds text_encoder, unet" in device.stderr


def test_verify_on_devices_by_component(bundle: Path, cli: Cli) -> None:
    done = cli("verify", bundle, "--device", "unet=tpu")
    assert done.returncode == 1
    assert "onnxruntime has no device 'tpu' here" in done.stderr


def test_generate_a_batch(bundle: Path, tmp_path: Path, cli: Cli) -> None:
    done = cli(
        "generate", "--prompt", "a fox", "-m", bundle, "-o", tmp_path / "x.png", "--batch", 2, "--steps", 1,
        "-W", 64, "-H", 64, "--engine", "null", "--json", "-",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["files"] == [str(tmp_path / "x-0.png"), str(tmp_path / "x-1.png")]
    assert report["seeds"][1] == report["seeds"][0] + 1
    assert all(Path(file).is_file() for file in report["files"])


def test_inspect(bundle: Path, cli: Cli) -> None:
    text = cli("inspect", bundle).stdout
    for fragment in ("sd1, from tiny-sd", "unet", "onnx", "fp32", "sample: f32[B,4,H/8,W/8]", "dB"):
        assert fragment in text
    assert "GMAC: one call at 128x128, 77 tokens, batch 1; guidance makes it batch 2 for what sees the prompt" in text
    assert re.search(r"unet .* 0\.036 ", text)
    value = json.loads(cli("inspect", bundle, "--json", "-").stdout)
    assert value["version"] == 1
    assert value["summary"]["unet"]["worst_psnr"] >= 110
    assert value["summary"]["unet"]["bytes"] > 2_000_000
    assert value["summary"]["unet"]["macs"] == sum(
        sum(
            coefficient * {"B": 1, "B*T": 77, "B*A": 4, "B*A*T": 4 * 77, "B*A^2": 16}[term]
            for term, coefficient in p.items()
        )
        for kind, p in value["components"]["unet"]["work"].items()
        if kind != "elements"
    )
    assert value["summary"]["text_encoder"]["macs"] == 77 * 24576 + 77**2 * 192


def test_inspect_without_work(copied: Path, cli: Cli) -> None:
    """A bundle of an older version."""
    manifest = json.loads((copied / "sdrt.json").read_text())
    manifest["components"]["unet"].pop("work", None)
    (copied / "sdrt.json").write_text(json.dumps(manifest))
    assert re.search(r"unet .* not counted ", cli("inspect", copied).stdout)
    assert json.loads(cli("inspect", copied, "--json", "-").stdout)["summary"]["unet"]["macs"] is None


def test_verify(ort_bundle: Path, tmp_path: Path, cli: Cli) -> None:
    done = cli("verify", ort_bundle, "--json", tmp_path / "verify.json")
    assert done.returncode == 0, done.stderr
    assert "hashes match" in done.stderr
    parity = json.loads((tmp_path / "verify.json").read_text())["parity"]
    assert {row["component"] for row in parity} == {"text_encoder", "unet", "vae_encoder", "vae_decoder"}
    assert {row["passed"] for row in parity} == {True}
    assert all(row["psnr"] >= 110 and row["max_abs"] < 1e-3 for row in parity if row["psnr"] is not None)


def test_verify_finds_an_engine_that_computes_nothing(bundle: Path, cli: Cli) -> None:
    done = cli("verify", bundle, "--engine", "null")
    assert done.returncode == 1
    assert "FAILED" in done.stdout
    assert "error: text_encoder, unet, vae_encoder, vae_decoder: not what the reference vectors say" in done.stderr


def test_doctor(cli: Cli) -> None:
    found = json.loads(cli("doctor", "--json", "-").stdout)
    engines = {engine["name"]: engine for engine in found["engines"]}
    assert engines["onnxruntime"]["devices"][0]["name"] == "cpu"
    assert engines["onnxruntime"]["devices"][0]["memory"] > 0
    assert found["export"]["torch"]
    assert "usable" in cli("doctor").stdout


def test_debug_shows_the_traceback(tmp_path: Path, cli: Cli) -> None:
    assert "Traceback" not in cli("inspect", tmp_path / "none").stderr
    assert "Traceback" in cli("--debug", "inspect", tmp_path / "none").stderr


def test_version(cli: Cli) -> None:
    assert cli("--version").stdout == f"sdrt, version {sdrt.__version__}\n"


def test_output_that_cannot_show_every_sign(bundle: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    """A redirected Windows console: no traceback, a question mark instead."""
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    for command in (["doctor"], ["inspect", bundle]):
        done = cli(*command)
        assert done.returncode == 0, done.stderr
        assert "?" in done.stdout


def test_whoever_reads_may_go(bundle: Path) -> None:
    command = f"{sys.executable} -m sdrt inspect {bundle} --json - | head -c 10"
    done = subprocess.run(command, shell=True, env=environment(), capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
