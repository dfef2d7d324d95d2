"""sdrt inspect"""

from __future__ import annotations

import json
from typing import Any

import click

from sdrt import bundle as bundles
from sdrt.bundle import Artifact, Bundle, Component
from sdrt.cli import Command, common


@click.command(cls=Command, examples="sdrt inspect sd15\nsdrt inspect sd15 --json -")
@click.argument("bundle", type=click.Path())
@common.json_option
def command(bundle: str, json_file: str | None) -> None:
    """Show a bundle's components, tensors, sizes, precision and parity with its reference vectors.

    BUNDLE may also be a directory of ONNX or OpenVINO models that optimum wrote.
    """
    held = bundles.load(bundle)
    if json_file is not None:
        common.write_json(as_json(held), json_file)
    if json_file != "-":
        click.echo(as_text(held))


def as_json(bundle: Bundle) -> dict[str, Any]:
    """The manifest, and what each component's adds up to: bytes, worst parity, and MACs at ``_sizes``."""
    value: dict[str, Any] = json.loads(bundles.dumps(bundle.manifest))
    value["summary"] = {
        name: {"bytes": _bytes(component), "worst_psnr": _worst(component), "macs": _macs(bundle, component)}
        for name, component in bundle.manifest.components.items()
    }
    return value


def as_text(bundle: Bundle) -> str:
    """The bundle as a person reads it."""
    facts = bundle.manifest
    rows = []
    for name, component in facts.components.items():
        artifact = component.artifact
        worst = _worst(component)
        parity = _told(component) if not artifact.parity else "identical" if worst is None else f"{worst:.1f} dB"
        sizes = " | ".join(" ".join(f"{s}={r}" for s, r in profile.items()) for profile in artifact.profiles) or "any"
        macs = _macs(bundle, component)
        work = "not counted" if macs is None else common.giga(macs)
        weights = common.size(_bytes(component))
        rows.append((name, artifact.engine, _precision(artifact), artifact.target, sizes, weights, work, parity))
    head = ("component", "engine", "precision", "target", "sizes", "weights", "GMAC", "worst parity")
    tensors = [
        (name if i == 0 else "", "in" if spec in component.inputs else "out", str(spec))
        for name, component in facts.components.items()
        for i, spec in enumerate(_shown(component))
    ]
    total = sum(file.bytes for file in facts.all_files())
    space = facts.latents
    lines = [
        f"{bundle.root}: {facts.family}, from {facts.provenance.source}, {common.size(total)}",
        f"pictures {space.default_width}x{space.default_height}, latents {space.channels} x H/{space.downscale} x"
        f" W/{space.downscale}, scaling factor {space.scaling_factor}",
        "",
        common.table(head, rows),
        f"GMAC: one call at {space.default_width}x{space.default_height}, {_sizes(bundle)['T']} tokens, batch 1;"
        " guidance makes it batch 2 for what sees the prompt: text encoders and denoiser",
        "",
        common.table(("component", "", "tensor"), tensors),
    ]
    # What a manifest says must not steer the terminal.
    return "\n".join("".join(c if c.isprintable() else "�" for c in line) for line in "\n".join(lines).split("\n"))


def _shown(component: Component) -> list[bundles.TensorSpec]:
    """Inputs and outputs; a long run of numbered outputs by its first and last."""
    outputs = list(component.outputs)
    numbered = [spec for spec in outputs if spec.name.rpartition(".")[2].isdigit()]
    return [*component.inputs, *(spec for spec in outputs if spec not in numbered[1:-1])]


def _sizes(bundle: Bundle) -> dict[str, int]:
    """One picture of the model's default size, without guidance."""
    space, texts = bundle.manifest.latents, bundle.manifest.text_encoders
    tokens = max((text.max_length for text in texts), default=77)
    return {"B": 1, "H": space.default_height, "W": space.default_width, "T": tokens}


def _macs(bundle: Bundle, component: Component) -> int | None:
    return None if component.work is None else sum(component.work.at(_sizes(bundle)).values())


def _precision(artifact: Artifact) -> str:
    stored = artifact.facts.get("weights")
    return f"{artifact.precision} (weights {stored})" if stored == "fp16" else artifact.precision


def _bytes(component: Component) -> int:
    return sum(file.bytes for file in component.artifact.files)


def _told(component: Component) -> str:
    """What is known without parity figures: those of the graph that was built, where it was built for elsewhere."""
    figures = component.artifact.facts.get("graph_parity")
    told = [f.get("psnr") for f in figures if isinstance(f, dict)] if isinstance(figures, list) else []
    decibels = [float(psnr) for psnr in told if isinstance(psnr, (int, float))]
    return f"not run; its graph {min(decibels):.1f} dB" if decibels else "not measured"


def _worst(component: Component) -> float | None:
    return min((p.psnr for p in component.artifact.parity if p.psnr is not None), default=None)
