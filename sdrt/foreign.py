"""Directories without ``sdrt.json`` that Hugging Face optimum wrote: the manifest is inferred, nothing is written.

What is inferred from what is said in docs/bundle.md. Everything follows from ``model_index.json``, the networks'
``config.json``, and what the ONNX graphs, or the files of OpenVINO IR, say of their inputs and outputs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from sdrt import ir_header, onnx_header, strict_json
from sdrt.bundle import (
    Artifact,
    Bundle,
    ClipSkip,
    Component,
    Denoiser,
    Dim,
    DimRange,
    DType,
    File,
    LatentSpace,
    Manifest,
    Profile,
    Provenance,
    TensorSpec,
    TextEncoder,
    inside,
    split_dim,
)
from sdrt.errors import BundleError
from sdrt.header import Header, Value
from sdrt.tokenizer import special_tokens

T = TypeVar("T")

INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"

SOURCES: dict[str, str] = {
    "timestep": "timestep", "encoder_hidden_states": "text.hidden_states", "text_embeds": "text.pooled",
    "time_ids": "time_ids",
}  # fmt: skip
"""What feeds the inputs of a U-Net, beside ``sample``, by the names that optimum gives them."""

_ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
_NETWORKS = (*_ENCODERS, "unet", "vae_encoder", "vae_decoder")
_TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")
_OTHER_TOKENIZERS = ("tokenizer.json", "openvino_tokenizer.xml")
"""Forms of a tokenizer that this sdrt cannot do with alone."""

_KINDS: dict[type, str] = {
    int: "an integer", float: "a number", str: "a text", list: "a list", bool: "true or false"
}  # fmt: skip


@dataclass(frozen=True)
class Format:
    """How networks are kept: ``graph`` is the file's name in each network's folder, ``engine`` what opens it.

    ``dtypes``: inputs that the engine gives another element type when it opens the graph.
    """

    what: str
    engine: str
    graph: str
    read: Callable[[Path], Header]
    dtypes: Mapping[str, DType] = field(default_factory=dict)


FORMATS = (
    Format("ONNX graphs", "onnx", "model.onnx", onnx_header.read),
    # Timesteps are int64 there, which would round those of many schedulers.
    Format("OpenVINO IR", "openvino", "openvino_model.xml", ir_header.read, {"timestep": "f32"}),
)
"""The first of which the U-Net is there is taken, for all networks."""

Shapes = Mapping[str, tuple[Dim, ...]]
"""Shapes as configs and our symbols say them, by tensor name."""


@dataclass(frozen=True)
class Config:
    """A JSON object of the directory; ``where``: its path relative to the root."""

    root: Path
    where: str
    values: Mapping[str, Any]

    @classmethod
    def read(cls, root: Path, where: str) -> Config:
        """BundleError when it is missing, damaged or no object."""
        values = strict_json.read(inside(root, where))
        if not isinstance(values, dict):
            raise BundleError(f"{root / where}: expected an object")
        return cls(root, where, values)

    def need(self, key: str, kind: type[T], default: T | None = None) -> T:
        """One value; BundleError when it is missing (or null) without a default, or of another type."""
        value = default if self.values.get(key) is None else self.values[key]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            expected = _KINDS.get(kind, kind.__name__)
            raise BundleError(f"{self.root / self.where}: {key} is {value!r}, expected {expected}")
        return value


def load(root: Path) -> Bundle:
    """The bundle that a directory amounts to; hashes are not known. BundleError tells what it is, or lacks."""
    index = Config.read(root, INDEX)
    kept = next((form for form in FORMATS if os.path.isfile(root / "unet" / form.graph)), None)
    if kept is None:
        raise _no_graph(root)
    try:
        return Bundle(root, _manifest(root, index, kept))
    except BundleError as error:
        if str(root) in error.message:
            raise
        raise BundleError(f"{root}: {error.message}", error.fix) from None  # a dataclass's own checks know no path


def _no_graph(root: Path) -> BundleError:
    if any(list((root / "unet").glob(ending)) for ending in ("*.safetensors", "*pytorch_model*.bin", "*.ckpt")):
        return BundleError(f"{root}: is a checkpoint, not a bundle", f"sdrt export {root} OUT")
    if (root / "transformer").is_dir():
        return BundleError(f"{root}: its denoiser is a transformer; this sdrt runs U-Nets", "use another model")
    graphs = " and ".join(f"unet/{form.graph}" for form in FORMATS)
    return BundleError(f"{root}: is not a bundle: {graphs} are missing", "sdrt export MODEL OUT makes one")


def _manifest(root: Path, index: Config, kept: Format) -> Manifest:
    held = [name for name in _NETWORKS if os.path.isfile(root / name / kept.graph)]
    configs = {name: Config.read(root, f"{name}/config.json") for name in held}
    if "vae_decoder" not in configs:
        fix = "export it again with optimum, or with sdrt"
        raise BundleError(f"{root}: vae_decoder/{kept.graph} is missing", fix)
    latents = latent_space(configs["vae_decoder"], configs["unet"])
    components = {name: _component(configs[name], _shapes(name, configs[name], latents), kept) for name in held}
    if "vae_encoder" in components and components["vae_encoder"].outputs[0].name != "latent_parameters":
        del components["vae_encoder"]  # older exports draw the sample in the graph, by a generator that is not ours
    denoiser = _denoiser(root, components["unet"], latents)
    pooled = ("text.pooled",) in denoiser.inputs.values()
    encoders = tuple(
        _text_encoder(root, components[name], configs[name], name, last_but_one=pooled)
        for name in _ENCODERS
        if name in components
    )
    files = [INDEX, SCHEDULER] + [
        f"{text.tokenizer}/{file}"
        for text in encoders
        for file in _TOKENIZER_FILES
        if file in _TOKENIZER_FILES[:2] or os.path.isfile(root / text.tokenizer / file)
    ]
    versions = {"diffusers": version} if isinstance(version := index.values.get("_diffusers_version"), str) else {}
    return Manifest(
        family=index.need("_class_name", str),
        components=components,
        text_encoders=encoders,
        denoiser=denoiser,
        latents=latents,
        scheduler=SCHEDULER,
        files=tuple(_file(root, file) for file in files),
        provenance=Provenance(_name(root), (), versions),
        # As in diffusers, where SDXL's pipelines alone know the key; it defaults to true.
        no_negative_prompt="zeros" if pooled and index.need("force_zeros_for_empty_prompt", bool, True) else "empty",
        guidance_scale=5.0 if pooled else 7.5,  # the defaults of diffusers' pipelines
        facts={"inferred_from": f"{INDEX}, config.json files, {kept.what}"},
    )


def _name(root: Path) -> str:
    """The directory's name; in the Hub's cache (``models--owner--name/snapshots/<revision>``) the model's."""
    home = root.resolve()
    repository = home.parent.parent.name
    if home.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return home.name


def _file(root: Path, relative: str) -> File:
    path = inside(root, relative)
    if not os.path.isfile(path):
        fix = "copy the directory again, or export it again"
        others = [name for name in _OTHER_TOKENIZERS if (path.parent / name).is_file()]
        if path.name in _TOKENIZER_FILES[:2] and others:
            fix = f"put vocab.json and merges.txt of the model's original tokenizer beside {others[0]}"
        raise BundleError(f"{root}: {relative} is missing", fix)
    return File(relative, path.stat().st_size, None)


# -- facts from configs -----------------------------------------------------------------------------------------------


def latent_space(vae: Config, unet: Config) -> LatentSpace:
    """Scaling, and the default size: the U-Net's ``sample_size`` in latents, one number or height and width."""
    for key in ("latents_mean", "latents_std"):
        if vae.values.get(key) is not None:
            raise BundleError(f"{vae.root / vae.where}: {key} is set: a latent space that this sdrt cannot scale")
    levels = len(vae.need("block_out_channels", list))
    downscale = 2 ** (min(levels, 16) - 1) if levels else 1
    size = unet.values.get("sample_size") or 64
    height, width = size if isinstance(size, list) and len(size) == 2 else [size] * 2
    if not (type(height) is int and type(width) is int):
        raise BundleError(f"{unet.root / unet.where}: sample_size is {size!r}, expected an integer")
    return LatentSpace(
        channels=vae.need("latent_channels", int, 4),
        downscale=downscale,
        scaling_factor=vae.need("scaling_factor", float, 0.18215),
        shift_factor=vae.need("shift_factor", float, 0.0),
        default_height=downscale * height,
        default_width=downscale * width,
    )


def _shapes(name: str, config: Config, latents: LatentSpace) -> Shapes:
    """What the tensors of a network called ``name`` look like; a U-Net's added inputs are known by their rank only."""
    small: tuple[Dim, ...] = (f"H/{latents.downscale}", f"W/{latents.downscale}")
    if name in _ENCODERS:
        width, layers = config.need("hidden_size", int), config.need("num_hidden_layers", int)
        hidden: dict[str, tuple[Dim, ...]] = {
            name: ("B", "T", width)
            for name in ("last_hidden_state", *(f"hidden_states.{i}" for i in range(min(layers, 1000) + 1)))
        }
        pooled = {"pooler_output": ("B", width), "text_embeds": ("B", config.need("projection_dim", int, 512))}
        return {"input_ids": ("B", "T"), **hidden, **pooled}
    if name == "unet":
        return {
            "sample": ("B", config.need("in_channels", int, 4), *small),
            "timestep": ("B",),
            "encoder_hidden_states": ("B", "T", config.need("cross_attention_dim", int)),
            "text_embeds": ("B", "P"),
            "time_ids": ("B", "S"),
            "out_sample": ("B", config.need("out_channels", int, 4), *small),
        }
    return {
        "sample": ("B", 3, "H", "W"),
        "latent_sample": ("B", latents.channels, *small),
        "latent_parameters": ("B", 2 * latents.channels, *small),
    }


def _text_encoder(root: Path, component: Component, config: Config, name: str, *, last_but_one: bool) -> TextEncoder:
    """``last_but_one``: as in SDXL, whose U-Net also takes a pooled text, the last hidden state but one conditions."""
    outputs = [spec.name for spec in component.outputs]
    layers = config.need("num_hidden_layers", int)
    state = f"hidden_states.{layers - 1}" if last_but_one else "last_hidden_state"
    if state not in outputs:
        raise BundleError(
            f"{root}: {name} gives {', '.join(outputs[:4])}, but not {state}, which conditions this model's U-Net",
            "export it again with a newer optimum, or with sdrt export",
        )
    bos, eos, pad = special_tokens(inside(root, _ENCODERS[name]))
    return TextEncoder(
        component=name,
        tokenizer=_ENCODERS[name],
        max_length=config.need("max_position_embeddings", int, 77),
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        hidden_states=state,
        pooled="text_embeds" if last_but_one and "text_embeds" in outputs else None,
        # The last hidden state goes through a norm whose weights are somewhere in the graph; the others do not.
        clip_skip=ClipSkip(layers - 1) if last_but_one and 2 <= layers <= 1000 else None,
    )


def _denoiser(root: Path, unet: Component, latents: LatentSpace) -> Denoiser:
    channels = next((spec.shape[1] for spec in unet.inputs if spec.name == "sample"), None)
    # Inpainting models see a mask and the masked picture's latents beside the latents.
    known = {latents.channels: ("latents",), 2 * latents.channels + 1: ("latents", "mask", "masked_image_latents")}
    if not isinstance(channels, int) or channels not in known:
        raise BundleError(
            f"{root}: unet takes {channels} channels, expected {latents.channels}", "use a text-to-image model"
        )
    return Denoiser(
        "unet",
        "out_sample",
        {spec.name: known[channels] if spec.name == "sample" else (SOURCES[spec.name],) for spec in unet.inputs},
    )


# -- facts from graphs ------------------------------------------------------------------------------------------------


def _component(config: Config, shapes: Shapes, kept: Format) -> Component:
    """The network beside ``config``."""
    root, folder = config.root, PurePosixPath(config.where).parent
    graph = f"{folder}/{kept.graph}"
    header = kept.read(inside(root, graph))
    files = [graph]
    for location in header.weights:
        try:
            files.append(_file(root, str(folder / location)).path)
        except BundleError as error:
            raise BundleError(f"{root / graph}: its weights: {error.message}", error.fix) from None
    inputs = tuple(_tensor(root / graph, value, shapes, kept) for value in header.inputs)
    ranges = _ranges(header.inputs, inputs)
    return Component(
        inputs=inputs,
        outputs=tuple(_tensor(root / graph, value, shapes, kept) for value in header.outputs),
        artifact=Artifact(
            kept.engine,
            header.precision,
            tuple(_file(root, file) for file in files),
            profiles=(ranges,) if ranges else (),
        ),
        config=_file(root, config.where),
    )


def _ranges(inputs: tuple[Value, ...], specs: tuple[TensorSpec, ...]) -> Profile:
    """What the graph's least and largest sizes allow, by symbol."""
    found: dict[str, DimRange] = {}
    for value, spec in zip(inputs, specs, strict=True):
        for size, dim in zip(value.dims, spec.shape, strict=True):
            if isinstance(size, tuple) and isinstance(dim, str):
                symbol, divisor = split_dim(dim)
                low, high = size[0] * divisor, size[1] * divisor
                if symbol in found:
                    low, high = max(low, found[symbol].min), min(high, found[symbol].max)
                found[symbol] = DimRange(low, high, high)
    return found


def _tensor(graph: Path, value: Value, shapes: Shapes, kept: Format) -> TensorSpec:
    """Name and dtype as the graph says; a size where the graph has one, else what configs and symbols say."""
    name = next((name for name in (value.name, *value.aliases) if name in shapes), None)
    if name is None:
        raise BundleError(
            f"{graph}: has a tensor {value.name!r}, which this sdrt cannot feed or read",
            f"known ones are {', '.join(name for name in shapes if not name.startswith('hidden_states.'))}",
        )
    dtype, expected = kept.dtypes.get(name, value.dtype), shapes[name]
    if name == "timestep" and not value.dims:  # a scalar, or one a picture
        return TensorSpec(name, dtype, ())
    if len(value.dims) != len(expected):
        raise BundleError(f"{graph}: {name} has {len(value.dims)} dimensions, expected [{_listed(expected)}]")
    dims = tuple(size if isinstance(size, int) else dim for size, dim in zip(value.dims, expected, strict=True))
    if any(isinstance(dim, int) and dim != size for dim, size in zip(expected, dims, strict=True)):
        raise BundleError(
            f"{graph}: {name} is [{_listed(dims)}], expected [{_listed(expected)}] by its config.json",
            "the graph and its config are of different models",
        )
    return TensorSpec(name, dtype, dims)


def _listed(dims: tuple[Dim, ...]) -> str:
    return ",".join(map(str, dims))
