"""Make an environment of the peers: optimum and its like, or stable-diffusion.cpp, which takes minutes to compile.

    python benchmarks/peers/make_env.py DIR
    python benchmarks/peers/make_env.py DIR --which sdcpp

DIR becomes a virtual environment with ``requirements.txt`` or ``requirements_sdcpp.txt``. Where it is one already, of
the same requirements and Python, nothing is done. Prints the versions. Needs nothing but Python and a package registry,
and for ``sdcpp`` a C++ compiler and cmake.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

MARKER = "sdrt-peers.sha256"


@dataclass(frozen=True)
class Environment:
    """What one environment is made of."""

    requirements: Path
    shown: tuple[str, ...]
    """Distributions whose versions are printed."""
    options: tuple[str, ...] = ()
    """pip's."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """For what pip compiles."""

    def digest(self) -> str:
        """Changes with anything that the environment is made of, this Python included."""
        made_of = f"{sys.version}{self.options or ''}{dict(self.variables) or ''}"
        return hashlib.sha256(self.requirements.read_bytes() + made_of.encode()).hexdigest()


ENVIRONMENTS = {
    "peers": Environment(
        Path(__file__).with_name("requirements.txt"),
        (
            "torch",
            "diffusers",
            "transformers",
            "optimum",
            "optimum-onnx",
            "onnxruntime",
            "optimum-intel",
            "openvino-genai",
        ),
    ),
    "sdcpp": Environment(
        Path(__file__).with_name("requirements_sdcpp.txt"),
        ("stable-diffusion-cpp-python",),
        # A build that was kept may be another CPU's, or of other flags.
        ("--no-cache-dir",),
        # -march=native, ggml's small-matrix kernels (off by its own default), OpenMP where found; no video or WebP.
        {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DGGML_LLAMAFILE=ON -DSD_WEBP=OFF -DSD_WEBM=OFF"},
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Make an environment of the peers in DIR.")
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--which", choices=ENVIRONMENTS, default="peers")
    args = parser.parse_args()
    directory, environment = args.directory, ENVIRONMENTS[args.which]
    marker, wanted = directory / MARKER, environment.digest()
    started = time.monotonic()
    if marker.is_file() and marker.read_text() == wanted:
        print(f"{directory}: is there already")
    else:
        if directory.exists() and not marker.is_file() and any(directory.iterdir()):
            print(f"{directory}: exists and is not the peers' environment, so it is not replaced", file=sys.stderr)
            return 1
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        marker.write_text("")  # whatever comes of it, it is ours from now on
        install = [str(python(directory)), "-m", "pip", "install", "-qq", *environment.options]
        for command in (
            [sys.executable, "-m", "venv", str(directory)],
            [*install, "-r", str(environment.requirements)],
        ):
            done = subprocess.run(command, env=os.environ | environment.variables, check=False)
            if done.returncode != 0:
                words = " ".join(command)
                print(f"{directory}: not made: {words} ended with status {done.returncode}", file=sys.stderr)
                return 1
        marker.write_text(wanted)
        size = sum(path.lstat().st_size for path in directory.rglob("*"))
        print(f"{directory}: {size / 1e9:.1f} GB in {time.monotonic() - started:.0f} s")
    code = "import sys, importlib.metadata as m\nfor name in sys.argv[1:]: print(f'{name}=={m.version(name)}')"
    return subprocess.run([str(python(directory)), "-c", code, *environment.shown], check=False).returncode


def python(directory: Path) -> Path:
    """The environment's interpreter."""
    return directory / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


if __name__ == "__main__":
    sys.exit(main())
