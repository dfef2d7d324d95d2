"""Each peer's runner, served as the bench serves it, makes sdrt's picture, and tells stages that fit into the whole.

Needs the peers' environment, as test_optimum.py; stable-diffusion.cpp needs its own: python benchmarks/peers/make_env.py
DIR --which sdcpp, then SDRT_SDCPP_ENV=DIR.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.peers import peers, prepare
from sdrt import Pipeline
from sdrt.metrics import psnr
from tests.conftest import ROOT, VOCABULARY

ENVIRONMENTS = {
    name: Path(path)
    for name, variable in (("peers", "SDRT_PEERS_ENV"), ("sdcpp", "SDRT_SDCPP_ENV"))
    if (path := os.environ.get(variable)) is not None
}
PEERS = {peer.name: peer for peer in peers.PEERS}

pytestmark = pytest.mark.skipif(
    "peers" not in ENVIRONMENTS,
    reason="needs the peers: python benchmarks/peers/make_env.py DIR, then SDRT_PEERS_ENV=DIR",
)

REQUEST: dict[str, Any] = {
    "prompt": "a lighthouse at dawn", "negative_prompt": "blurry", "width": 64, "height": 64, "num_inference_steps": 4,
    "guidance_scale": 7.5, "seed": 7, "batch": 2, "scheduler": "DDIM",
}  # fmt: skip

FLOORS_DB = {
    # float32 on both sides from the same noise: seen at 130 dB; guidance 7.0 for 7.5 scores below 60 dB.
    "diffusers fp32": 90.0,
    "optimum onnxruntime": 90.0,
    "optimum-intel": 90.0,
    # 8 bits, cut off and not rounded: an error uniform in [0, 1/255] is 52.9 dB; seen at 53.5 dB.
    "openvino-genai": 50.0,
    # bfloat16 has 8 bits of mantissa: seen at 47 dB.
    "diffusers bf16 channels_last": 40.0,
}


class Served:
    """A peer's process."""

    def __init__(self, peer: peers.Peer) -> None:
        # Only theirs: no path to our sources, no network.
        inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        self.process = subprocess.Popen(
            [str(peer.python(ENVIRONMENTS)), str(peer.script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=inherited | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}, text=True,
        )  # fmt: skip
        self._answer()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The answer's ``ok``, or its ``error``."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        (answer,) = json.loads(self.process.stdout.readline()).values()
        assert isinstance(answer, dict)
        return answer

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def picture(
    peer: peers.Peer, model: Path, out: Path, request: Mapping[str, Any]
) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
    """The peer's pictures f32[B,H,W,3], and its sample."""
    with Served(peer) as served:
        options = peer.options_for(request["width"], request["height"], request["batch"])
        loaded = served.ask("load", model=str(model), engine=None, device="cpu", threads=2, options=options, streams=1)
        assert loaded.get("import", 0) > 0, loaded
        assert loaded["load"] > 0
        assert all(loaded["versions"].values())
        if peer.one_size:
            refused = served.ask("run", **{**request, "width": 128}, save=None)
            assert "compiled for 64x64, batch 2" in refused["message"]
        made = served.ask("run", **request, save=str(out))
        assert "samples" in made, made
        (sample,) = made["samples"]
        assert served.ask("close") == {}
        assert served.process.wait(60) == 0
    return np.load(out), sample


def check_stages(sample: Mapping[str, Any], calls: int) -> None:
    """Every stage that is told is a part of the whole, and apart from the others."""
    assert len(sample["steps"]) == calls
    assert min(sample["steps"]) > 0
    apart = [
        sample[name] for name in ("tokenize", "text_encoder", "vae_decoder", "post") if sample.get(name) is not None
    ]
    assert sum(apart) + sum(sample["steps"]) <= sample["total"]
    network = sample.get("network") or []
    assert all(part <= step for part, step in zip(network, sample["steps"], strict=bool(network)))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """What the peers load, made from the tiny checkpoint."""
    directory = tmp_path_factory.mktemp("peers") / "models"
    command = [sys.executable, prepare.__file__, ENVIRONMENTS["peers"], checkpoint, directory]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    again = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=20, check=False)
    assert again.stdout == done.stdout, "what is there already is left alone, and reported again"
    return directory


@pytest.fixture(scope="module")
def ours(bundle: Path) -> np.ndarray[Any, Any]:
    """sdrt's pictures of the request."""
    arguments = {name: value for name, value in REQUEST.items() if name != "batch"}
    with Pipeline.from_pretrained(bundle) as pipe:
        made = pipe(
            arguments.pop("prompt"), **arguments, num_images_per_prompt=REQUEST["batch"], output_type="np"
        ).images
    assert isinstance(made, np.ndarray)
    return made


@pytest.mark.parametrize("name", FLOORS_DB)
def test_runner(name: str, prepared: Path, ours: np.ndarray[Any, Any], tmp_path: Path) -> None:
    peer = PEERS[name]
    if peer.model == "openvino":  # whose own choice is bfloat16 where the CPU has it
        peer = replace(peer, options={"precision": "f32"})
    theirs, sample = picture(peer, prepared / peer.model, tmp_path / "theirs.npy", REQUEST)
    assert theirs.dtype == np.float32
    assert theirs.shape == ours.shape
    figures = [psnr(one, other, peak=1.0) for one, other in zip(ours, theirs, strict=True)]
    print(f"{name}: {figures[0]:.1f} dB, {figures[1]:.1f} dB, {sample}")
    assert min(figures) >= FLOORS_DB[name]
    check_stages(sample, REQUEST["num_inference_steps"])


def test_genai_runs_what_sdrt_built(bundle: Path, ours: np.ndarray[Any, Any], tmp_path: Path) -> None:
    """OpenVINO GenAI with sdrt's OpenVINO bundle as it is, its tokenizer too."""
    from sdrt_engines.build import build

    build(bundle, tmp_path / "built", "openvino")
    peer = replace(PEERS["openvino-genai"], options={"precision": "f32"})
    theirs, _ = picture(peer, tmp_path / "built", tmp_path / "theirs.npy", REQUEST)
    figures = [psnr(one, other, peak=1.0) for one, other in zip(ours, theirs, strict=True)]
    print(f"GenAI on sdrt's bundle: {figures[0]:.1f} dB, {figures[1]:.1f} dB")
    assert min(figures) >= FLOORS_DB["openvino-genai"]


def test_prepare_names_what_was_made(prepared: Path) -> None:
    for name in prepare.EXPORTS:
        report = json.loads((prepared / name / prepare.REPORT).read_text())
        assert report["wall_s"] > 0
        assert report["peak_rss"] > 100e6, "torch alone takes more: is this bytes?"
    assert sorted(path.name for path in prepared.iterdir()) == ["checkpoint", "onnx", "openvino"]


def test_prepare_refuses_another_checkpoint(prepared: Path, tmp_path: Path) -> None:
    command = [sys.executable, prepare.__file__, str(ENVIRONMENTS["peers"]), str(tmp_path), str(prepared)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 1
    assert "name another DIR" in done.stderr


@pytest.mark.skipif(
    "sdcpp" not in ENVIRONMENTS,
    reason="needs stable-diffusion.cpp: python benchmarks/peers/make_env.py DIR --which sdcpp, then SDRT_SDCPP_ENV=DIR",
)
def test_sd_cpp(tmp_path: Path, full_checkpoint: Path) -> None:
    """It knows only the real size, for which diffusers stands in for sdrt: above they make the same picture."""
    request = REQUEST | {"num_inference_steps": 5}  # with fewer its first latents are too small, see its runner
    theirs, sample = picture(PEERS["stable-diffusion.cpp"], full_checkpoint, tmp_path / "theirs.npy", request)
    reference, _ = picture(PEERS["diffusers fp32"], full_checkpoint, tmp_path / "reference.npy", request)
    figures = [psnr(one, other, peak=1.0) for one, other in zip(reference, theirs, strict=True)]
    print(f"stable-diffusion.cpp: {figures[0]:.1f} dB, {figures[1]:.1f} dB, {sample}")
    # 8 bits, and f16 weights in convolutions: seen at 51 dB. Another seed scores 14 dB; that guidance is 7.5 and not 7.0
    # this checkpoint does not tell (52 dB).
    assert min(figures) >= 45
    check_stages(sample, request["num_inference_steps"] * request["batch"])


@pytest.fixture
def full_checkpoint() -> Iterator[Path]:
    """SD 1.5's real size, random weights, 4 GB: not kept, as pytest keeps its own folders for three sessions."""
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch, "full")
        command = [
            sys.executable,
            "-m",
            "sdrt_export.testing",
            str(made),
            "--size",
            "full",
            "--vocabulary",
            str(VOCABULARY),
        ]
        sources = os.pathsep.join(str(ROOT / part) for part in (".", "export", "engines"))
        subprocess.run(command, env=os.environ | {"PYTHONPATH": sources}, check=True)
        yield made
