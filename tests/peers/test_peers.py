"""The table of peers names what is there. Needs no peers' environment."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers import make_env, prepare
from benchmarks.peers.peers import HERE, PEERS


def test_names_and_files() -> None:
    assert [peer.name for peer in PEERS] == [
        "diffusers fp32",
        "diffusers bf16 channels_last",
        "optimum onnxruntime",
        "optimum-intel",
        "openvino-genai",
        "stable-diffusion.cpp",
    ]
    assert {peer.script for peer in PEERS} == set(HERE.glob("runner_*.py")), "each runner is somebody's"
    assert {peer.environment for peer in PEERS} == set(make_env.ENVIRONMENTS)
    assert {peer.model for peer in PEERS} == {"checkpoint", *prepare.EXPORTS}


def test_only_what_is_compiled_for_one_size_is_told_it() -> None:
    told = {peer.name: peer.options_for(512, 256, 2) for peer in PEERS}
    assert told["optimum-intel"] == told["openvino-genai"] == {"width": 512, "height": 256, "batch": 2}
    assert told["diffusers bf16 channels_last"] == {"bf16": True}
    assert told["optimum onnxruntime"] == {}


def test_the_environments_python_is_its_own(tmp_path: Path) -> None:
    """A virtual environment's interpreter is a link, by whose place Python finds its packages."""
    directory = tmp_path / "made"
    directory.mkdir()
    link = make_env.python(directory)
    link.parent.mkdir()
    link.symlink_to("/nowhere/python")
    assert PEERS[0].python({"peers": directory}) == link


def test_environments_differ_by_what_they_are_made_of() -> None:
    digests = {environment.digest() for environment in make_env.ENVIRONMENTS.values()}
    assert len(digests) == len(make_env.ENVIRONMENTS)
