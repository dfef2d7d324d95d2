"""sdrt doctor"""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import click

import sdrt
from sdrt.cli import Command, common
from sdrt.engine import engine_names, find_engine
from sdrt.errors import EngineUnavailable

EXPORT = ("torch", "diffusers", "transformers", "onnx", "onnxscript")


@click.command(cls=Command, examples="sdrt doctor\nsdrt doctor --json -")
@common.json_option
def command(json_file: str | None) -> None:
    """Show which engines and devices are usable here, and for the others why not and what to do."""
    found = examine()
    if json_file is not None:
        common.write_json(found, json_file)
    if json_file == "-":
        return
    click.echo(f"sdrt {found['sdrt']}, Python {found['python']}, {found['system']}\n")
    rows = []
    for engine in found["engines"]:
        if engine["problem"]:
            rows.append((engine["name"], "no", "-", "-", f"{engine['problem']} → {engine['fix']}"))
        for device in engine["devices"]:
            memory = common.size(device["memory"]) if device["memory"] else "-"
            rows.append((engine["name"], "yes", device["name"], memory, device["description"]))
    click.echo(common.table(("engine", "usable", "device", "memory", ""), rows))
    export = found["export"]
    missing = [name for name, version in export.items() if version is None]
    if missing:
        click.echo(f"\nexport: not usable: {', '.join(missing)} not installed → pip install 'sdrt[export,ort]'")
    else:
        click.echo("\nexport: usable, " + ", ".join(f"{name} {version}" for name, version in export.items()))


def examine() -> dict[str, Any]:
    """What is usable here. Imports no torch: versions come from the installed packages' metadata."""
    return {
        "sdrt": sdrt.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "engines": [_engine(name) for name in engine_names()],
        "export": {name: _version(name) for name in EXPORT},
    }


def _engine(name: str) -> dict[str, Any]:
    engine = find_engine(name)
    try:
        devices, problem, fix = engine.devices(), "", ""
    except EngineUnavailable as error:
        devices, problem, fix = [], error.message, error.fix or engine.INSTALL
    return {
        "name": name,
        "devices": [{"name": d.name, "description": d.description, "memory": d.memory} for d in devices],
        "problem": problem,
        "fix": fix,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
