"""The house: what the wheel holds, what it brings along, what is imported when, and that the documents are true."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import click
import pytest

import sdrt
from sdrt import bundle as bundles
from sdrt.cli import COMMANDS
from tests.conftest import ROOT, Cli, environment

HEAVY = ("torch", "onnx", "diffusers", "transformers", "scipy")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_wheel_content(wheel: Path) -> None:
    """Three packages and their metadata, nothing else; every source file that git tracks, and the demo model."""
    entries = zipfile.ZipFile(wheel).infolist()
    names = [entry.filename for entry in entries]
    assert {name.split("/")[0] for name in names} == {
        "sdrt", "sdrt_export", "sdrt_engines", f"sdrt-{sdrt.__version__}.dist-info"
    }  # fmt: skip
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "sdrt").rglob("*.py")}
    for root in ("export", "engines"):
        sources |= {p.relative_to(ROOT / root).as_posix() for p in (ROOT / root).rglob("*.py")}
    assert sources <= set(names)
    model = [entry for entry in entries if entry.filename.startswith("sdrt/models/")]
    assert {entry.filename.split("/")[2] for entry in model} == {"demo"}
    held = {f"sdrt/models/demo/{file.path}" for file in bundles.load("demo").manifest.all_files()}
    assert {"sdrt/models/demo/sdrt.json", *held} <= set(names)
    packed = sum(entry.compress_size for entry in model)
    assert packed < 15_000_000
    assert wheel.stat().st_size - packed < 460_000


def test_wheel_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """numpy, pillow, click and tqdm come along and nothing else; help and errors work without any engine."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel], check=True)
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=json"], check=True, capture_output=True, text=True
    ).stdout
    installed = {package["name"].lower() for package in json.loads(listed)}
    assert installed - {"pip", "setuptools", "wheel"} == {"sdrt", "numpy", "pillow", "click", "tqdm"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [python, "-m", "sdrt", *arguments], capture_output=True, text=True, check=False, cwd=tmp_path
        )

    assert run("--help").returncode == 0
    for command in COMMANDS:
        assert "Examples:" in run(command, "--help").stdout
    doctor = run("doctor")
    assert doctor.returncode == 0
    assert re.search(r"onnxruntime +no", doctor.stdout)
    assert "pip install 'sdrt[ort]'" in doctor.stdout
    assert "pip install 'sdrt[export,ort]'" in doctor.stdout
    assert "sd1, from sdrt-demo" in run("inspect", "demo").stdout
    export = run("export", "model", "out")
    assert (export.returncode, export.stdout) == (1, "")
    assert "pip install 'sdrt[export,ort]'" in export.stderr


def test_public_names() -> None:
    assert sorted(sdrt.__all__) == sdrt.__all__
    assert sdrt.__all__ == [
        "BuildError", "Bundle", "BundleError", "Cancelled", "DeviceError", "EngineUnavailable", "ExportError",
        "GenerationRequest", "InputError", "NumericsError", "Pipeline", "Result", "SdrtError", "Step", "Timings",
        "__version__",
    ]  # fmt: skip
    for name in sdrt.__all__:
        assert getattr(sdrt, name) is not None


def loaded_modules(code: str) -> set[str]:
    """Top-level names of all modules that are loaded after ``code`` has run in a fresh process."""
    script = f"{code}\nimport sys; print('MODULES', *sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True)
    return set(re.findall(r"MODULES (.*)", done.stdout)[0].split())


def test_import_sdrt_loads_no_engine() -> None:
    assert loaded_modules("import sdrt").isdisjoint({*HEAVY, "onnxruntime", "tqdm", "click"})


@pytest.mark.parametrize("built", [False, True], ids=["onnx bundle", "engine bundle"])
def test_generate_loads_no_heavy_library(bundle: Path, ort_bundle: Path, tmp_path: Path, built: bool) -> None:
    arguments = [
        "sdrt", "generate", "a fox", "-m", str(ort_bundle if built else bundle), "-o", str(tmp_path / "x.png"),
        "--steps", "1", "-W", "64", "-H", "64",
    ]  # fmt: skip
    code = f"import sys; sys.argv = {arguments!r}\nfrom sdrt.cli import main\ntry: main()\nexcept SystemExit as e: assert not e.code"
    loaded = loaded_modules(code)
    assert "onnxruntime" in loaded
    assert loaded.isdisjoint({*HEAVY, "safetensors", "huggingface_hub"})


def test_verify_needs_no_torch(bundle: Path) -> None:
    code = f"import sys; sys.argv = ['sdrt', 'verify', {str(bundle)!r}]\nfrom sdrt.cli import main\ntry: main()\n"
    assert loaded_modules(code + "except SystemExit as e: assert not e.code").isdisjoint(HEAVY)


@pytest.mark.parametrize("engine", ["onnxruntime", "null"])
def test_looking_at_an_engine_does_not_import_its_library(engine: str) -> None:
    assert "onnxruntime" not in loaded_modules(f"from sdrt.engine import find_engine; find_engine({engine!r})")


def test_readme_test_command_is_what_ci_runs() -> None:
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    commands = re.findall(r"```sh\n(.*?)```", readme, re.DOTALL)
    test_command = next(command.strip() for command in commands if "pytest" in command)
    assert "README.md" in ci, ".ci/run takes the command out of the README"
    assert test_command.startswith("python3 -m venv .venv")


def test_documents_name_real_things() -> None:
    """Every ``sdrt …`` command line in the documents uses commands and options that exist."""
    known = importlib.import_module("sdrt.cli").COMMANDS
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for line in re.findall(r"^\s*sdrt ([a-z]+)(.*)$", document.read_text(), re.MULTILINE):
            assert line[0] in known, (document.name, line)
            command = importlib.import_module(f"sdrt.cli.{line[0]}").command
            below = line[1].split()[:1]
            if isinstance(command, click.Group) and below and below[0] in command.commands:
                command = command.commands[below[0]]
            options = {
                option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
            }
            for option in re.findall(r"(?<!\S)(--?[a-zA-Z][a-z-]*)", line[1]):
                assert option in options, (document.name, line)


def test_help_is_quick_and_lists_every_command(cli: Cli) -> None:
    done = cli("--help")
    assert done.returncode == 0
    for name in importlib.import_module("sdrt.cli").COMMANDS:
        assert f"\n  {name}" in done.stdout
