"""Make the peers' environment: optimum and its like, with the versions of diffusers and transformers that they need.

    python benchmarks/peers/make_env.py DIR

DIR becomes a virtual environment with ``requirements.txt``. Where it is one already, of the same requirements and
Python, nothing is done. Prints the versions. Needs nothing but Python and a package registry.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
MARKER = "sdrt-peers.sha256"
SHOWN = (
    "torch",
    "diffusers",
    "transformers",
    "optimum",
    "optimum-onnx",
    "onnxruntime",
    "optimum-intel",
    "openvino-genai",
)


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the peers' environment in DIR.")
    parser.add_argument("directory", type=Path, metavar="DIR")
    directory = parser.parse_args().directory
    marker, wanted = directory / MARKER, hashlib.sha256(REQUIREMENTS.read_bytes() + sys.version.encode()).hexdigest()
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
        for command in (
            [sys.executable, "-m", "venv", str(directory)],
            [str(python(directory)), "-m", "pip", "install", "-qq", "-r", str(REQUIREMENTS)],
        ):
            if (status := subprocess.run(command, check=False).returncode) != 0:
                print(f"{directory}: not made: {' '.join(command)} ended with status {status}", file=sys.stderr)
                return 1
        marker.write_text(wanted)
        size = sum(path.lstat().st_size for path in directory.rglob("*"))
        print(f"{directory}: {size / 1e9:.1f} GB in {time.monotonic() - started:.0f} s")
    code = f"from importlib.metadata import version\nfor name in {SHOWN}: print(f'{{name}}=={{version(name)}}')"
    return subprocess.run([str(python(directory)), "-c", code], check=False).returncode


def python(directory: Path) -> Path:
    """The environment's interpreter."""
    return directory / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


if __name__ == "__main__":
    sys.exit(main())
