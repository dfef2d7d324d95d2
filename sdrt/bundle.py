"""The bundle: the one thing that passes between export, build and generate. docs/bundle.md is the normative text.

A bundle is a directory that ``sdrt.json`` describes. Everything here is a frozen dataclass; what the runtime does with
a model follows from these facts alone, never from the family's name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from numpy.typing import NDArray

from sdrt import npz, strict_json
from sdrt.errors import BundleError, quoted

MANIFEST = "sdrt.json"
FORMAT = "sdrt"
SHIPPED = Path(__file__).parent / "models"
VERSION = 1

DType = Literal["f32", "f16", "bf16", "i64", "i32", "u8", "i8", "bool"]
Precision = Literal["fp32", "fp16", "bf16", "fp8", "int8", "w8", "w6", "w4"]
Dim = int | str
"""A size, or a symbol: ``B`` (batch), ``T`` (tokens), ``H``, ``W`` (picture, in pixels), or ``H/8``: the symbol
divided by a number, rounded up (what a chain of stride-2 convolutions leaves)."""

MAX_DIM = 2**24
MAX_PATH = 1024
"""Characters."""
MAX_FILES = 10_000
MAX_TEXT_ENCODERS = 16
MAX_GUIDANCE = 10_000

_SYMBOL = re.compile(r"([A-Z][A-Z0-9_]*)(?:/([1-9][0-9]{0,3}))?")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def split_dim(dim: str) -> tuple[str, int]:
    """``"H/8"`` → ``("H", 8)``; ``"B"`` → ``("B", 1)``. BundleError when it is neither."""
    match = _SYMBOL.fullmatch(dim)
    if match is None:
        raise BundleError(f"dimension {dim!r} is neither a size nor a symbol such as 'B' or 'H/8'")
    return match[1], int(match[2] or 1)


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type and symbolic shape of one input or output."""

    name: str
    dtype: DType
    shape: tuple[Dim, ...]

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise BundleError(f"tensor name {self.name!r} is not a name")
        for dim in self.shape:
            if isinstance(dim, str):
                split_dim(dim)
            elif not 1 <= dim <= MAX_DIM:
                raise BundleError(f"tensor {self.name}: dimension {dim} is not between 1 and {MAX_DIM}")

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{','.join(map(str, self.shape))}]"

    def at(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape when every symbol has the size given, e.g. ``{"B": 2, "H": 64, "W": 64}``."""
        return tuple(dim if isinstance(dim, int) else _evaluate(dim, sizes) for dim in self.shape)


def _evaluate(dim: str, sizes: Mapping[str, int]) -> int:
    symbol, divisor = split_dim(dim)
    return -(-sizes[symbol] // divisor)


def solve(specs: Iterable[TensorSpec], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Sizes of the symbols that explain ``shapes``: the finest divisor binds, the others are left to be checked.

    ``H/8 = 9`` binds ``H = 72``. Tensors that ``shapes`` does not hold, and those of another rank, are passed over.
    """
    bound: dict[str, tuple[int, int]] = {}
    for spec in specs:
        shape = shapes.get(spec.name)
        if shape is None or len(shape) != len(spec.shape):
            continue
        for dim, size in zip(spec.shape, shape, strict=True):
            if isinstance(dim, str):
                symbol, divisor = split_dim(dim)
                if symbol not in bound or divisor < bound[symbol][0]:
                    bound[symbol] = (divisor, size * divisor)
    return {symbol: size for symbol, (_, size) in bound.items()}


@dataclass(frozen=True)
class DimRange:
    """Sizes that an artifact accepts for one symbol; ``opt`` is what it was tuned for."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise BundleError(f"range {self.min}..{self.opt}..{self.max} is not 1 <= min <= opt <= max")

    def __str__(self) -> str:
        return str(self.min) if self.min == self.max else f"{self.min}..{self.max}"


Profile = Mapping[str, DimRange]
"""One set of ranges, by symbol; a symbol that is not named is free."""


def fits(profile: Profile, sizes: Mapping[str, int]) -> bool:
    """Whether every symbol that both name is in range."""
    return all(range_.min <= sizes[s] <= range_.max for s, range_ in profile.items() if s in sizes)


@dataclass(frozen=True)
class File:
    """A file of the bundle: path relative to the root with ``/``, size in bytes, sha256 in hex.

    ``sha256`` is None only where a manifest was inferred (``sdrt.foreign``), never in ``sdrt.json``.
    """

    path: str
    bytes: int
    sha256: str | None

    def __post_init__(self) -> None:
        check_relative(self.path)
        if self.bytes < 0:
            raise BundleError(f"file {self.path}: {self.bytes} bytes is negative")
        if self.sha256 is not None and not _SHA256.fullmatch(self.sha256):
            raise BundleError(f"file {self.path}: sha256 is not 64 hex digits")


def check_relative(path: str) -> None:
    """BundleError unless ``path`` is relative, in POSIX spelling, not too long, and stays inside the root."""
    if len(path) > MAX_PATH:
        raise BundleError(f"path {quoted(path)} has {len(path)} characters, at most {MAX_PATH}")
    pure = PurePosixPath(path)
    if (
        not pure.parts
        or pure.is_absolute()
        or ".." in pure.parts
        or any(c in path for c in "\\\0")
        or ":" in pure.parts[0]
    ):
        raise BundleError(f"path {path!r} leaves the bundle or is not a relative POSIX path")
    if str(pure) != path:
        raise BundleError(f"path {path!r} is spelt in a roundabout way, expected {str(pure)!r}")


@dataclass(frozen=True)
class Parity:
    """How far one output is from torch's float32 on one reference case.

    ``max_abs`` is in the output's unit; ``psnr`` is in dB with the reference's largest magnitude as peak, None when
    the two are identical.
    """

    case: str
    output: str
    max_abs: float
    psnr: float | None


@dataclass(frozen=True)
class Artifact:
    """What an engine loads for one component. ``files[0]`` is the entry; the others (weights) lie beside it."""

    engine: str
    precision: Precision
    files: tuple[File, ...]
    target: str = "any"
    profiles: tuple[Mapping[str, DimRange], ...] = ()
    built_from: str | None = None
    parity: tuple[Parity, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.files:
            raise BundleError("an artifact needs at least one file")


TILE = 64
"""Pixels. ``A`` in a term of ``Work`` is the picture's area in tiles of 64 × 64: H·W / 4096."""


def term(b: int, a: int, t: int) -> str:
    """How ``Work`` spells Bᵇ·Aᵃ·Tᵗ: ``"B*A^2"``; ``"1"`` when all powers are 0."""
    powers = (("B", b), ("A", a), ("T", t))
    return "*".join(symbol if power == 1 else f"{symbol}^{power}" for symbol, power in powers if power) or "1"


TERMS: Mapping[str, tuple[int, int, int]] = {
    term(b, a, t): (b, a, t) for b in (0, 1) for a in range(3) for t in range(3 - a)
}
"""Every term of ``Work``, and its powers of B, A, T: at most linear in the batch, quadratic in area and tokens."""

Polynomial = Mapping[str, int]
"""Term → coefficient. Exact where H and W are multiples of 64."""


@dataclass(frozen=True)
class Work:
    """What one call computes, counted from the float32 ONNX graph: as polynomials, so that every size is known.

    Multiply-accumulates (a MAC is 2 FLOP) of convolutions, of products with constant weights (``linear``), and of
    products of two computed matrices (``attention``); nothing is left out for a causal mask. ``elements``: numbers, not
    bytes, that these operators read and write, weights not among them.
    """

    convolution: Polynomial = field(default_factory=dict)
    linear: Polynomial = field(default_factory=dict)
    attention: Polynomial = field(default_factory=dict)
    elements: Polynomial = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in self.terms():
            if key not in TERMS:
                raise BundleError(f"{quoted(key)} is not a term; terms: {', '.join(TERMS)}")
        for polynomial in (self.convolution, self.linear, self.attention, self.elements):
            for key, coefficient in polynomial.items():
                if coefficient < 1:
                    raise BundleError(f"the coefficient of {key} is {coefficient}, expected at least 1")

    def terms(self) -> set[str]:
        """All terms of all polynomials."""
        return {*self.convolution, *self.linear, *self.attention, *self.elements}

    def at(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """MACs by kind at concrete sizes, e.g. ``{"B": 2, "H": 512, "W": 512, "T": 77}`` (H, W in pixels).

        Where H or W is no multiple of 64 the rounding of inner sizes is left out: close, not exact.
        """
        kinds = {"convolution": self.convolution, "linear": self.linear, "attention": self.attention}
        return {kind: _value(polynomial, sizes) for kind, polynomial in kinds.items()}

    def elements_at(self, sizes: Mapping[str, int]) -> int:
        """Elements read and written, at sizes as ``at`` takes them."""
        return _value(self.elements, sizes)


def _value(polynomial: Polynomial, sizes: Mapping[str, int]) -> int:
    total, unit = 0, TILE**4  # whole numbers throughout: A² has the largest denominator
    for key, coefficient in polynomial.items():
        b, a, t = TERMS[key]
        area = (sizes["H"] * sizes["W"]) ** a * unit // TILE ** (2 * a) if a else unit
        total += coefficient * area * (sizes["B"] if b else 1) * (sizes["T"] ** t if t else 1)
    return (2 * total + unit) // (2 * unit)


@dataclass(frozen=True)
class Component:
    """One network: its tensors, what runs it, and how much it computes (None: not counted)."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    artifact: Artifact
    config: File | None = None
    reference: File | None = None
    constants: File | None = None
    work: Work | None = None

    def __post_init__(self) -> None:
        for kind, specs in (("input", self.inputs), ("output", self.outputs)):
            names = [spec.name for spec in specs]
            if len(set(names)) != len(names):
                raise BundleError(f"an {kind} name stands twice: {', '.join(names)}")
            if not names:
                raise BundleError(f"a component needs at least one {kind}")
        told = {split_dim(dim)[0] for spec in self.inputs for dim in spec.shape if isinstance(dim, str)}
        for spec in self.outputs:
            for dim in spec.shape:
                if isinstance(dim, str) and (symbol := split_dim(dim)[0]) not in told:
                    raise BundleError(f"output {spec.name}: no input tells {symbol}")
        for key in self.work.terms() if self.work is not None else ():
            for power, symbols in zip(TERMS[key], ("B", "HW", "T"), strict=True):
                if power and not told.issuperset(symbols):
                    raise BundleError(f"work has a term {key}: no input tells {' and '.join(symbols)}")


@dataclass(frozen=True)
class ClipSkip:
    """What clip-skip needs: leaving out s layers takes the output ``hidden_states.<layers - s>``.

    Where the encoder's hidden state goes through a final layer norm (``epsilon`` is given), so does that output, which
    lacks it: ``weight`` and ``bias`` (f32[hidden]) are arrays in the component's ``constants`` file.
    """

    layers: int
    epsilon: float | None = None
    hidden_states: str = "hidden_states"
    weight: str = "final_layer_norm.weight"
    bias: str = "final_layer_norm.bias"

    def __post_init__(self) -> None:
        if not 1 <= self.layers <= 1000 or not (self.epsilon is None or self.epsilon > 0):
            raise BundleError(f"layers {self.layers} and epsilon {self.epsilon} must be positive")


@dataclass(frozen=True)
class TextEncoder:
    """How a prompt becomes hidden states (and a pooled vector) through one component."""

    component: str
    tokenizer: str
    max_length: int
    bos_token: str
    eos_token: str
    pad_token: str
    hidden_states: str = "last_hidden_state"
    pooled: str | None = None
    clip_skip: ClipSkip | None = None

    def __post_init__(self) -> None:
        check_relative(self.tokenizer)
        if not 2 <= self.max_length <= 65536:
            raise BundleError(f"max_length is {self.max_length}, expected 2 (start and end) to 65536")
        if not (self.bos_token and self.eos_token and self.pad_token):
            raise BundleError("bos_token, eos_token and pad_token must not be empty")

    def outputs(self) -> list[str]:
        """Names of the component's outputs that are used."""
        skip = self.clip_skip
        names = [self.hidden_states] + ([self.pooled] if self.pooled is not None else [])
        return names + ([f"{skip.hidden_states}.{i}" for i in range(1, skip.layers)] if skip is not None else [])


@dataclass(frozen=True)
class Denoiser:
    """What feeds each input of the denoising network.

    Sources: ``latents``, ``timestep``, ``text.hidden_states`` (all text encoders, concatenated along features),
    ``text.pooled``, ``time_ids``, ``mask``, ``masked_image_latents``, ``<component>.<output>``. Several sources of one
    input are concatenated along channels, in this order.
    """

    component: str
    output: str
    inputs: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class LatentSpace:
    """latents = (vae_encoder(picture) - shift_factor) * scaling_factor; one latent stands for ``downscale``² pixels."""

    channels: int
    downscale: int
    scaling_factor: float
    default_height: int
    default_width: int
    shift_factor: float = 0.0

    def __post_init__(self) -> None:
        if max(self.default_height, self.default_width, self.channels, self.downscale) > 65536:
            raise BundleError("default_height, default_width, channels and downscale are at most 65536")
        if min(self.channels, self.downscale, self.default_height, self.default_width) < 1 or not self.scaling_factor:
            raise BundleError("channels, downscale, scaling_factor and default sizes must be positive")


@dataclass(frozen=True)
class Provenance:
    """Where the bundle came from: the checkpoint's name, its files' hashes, and the versions that made it."""

    source: str
    source_files: tuple[File, ...]
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Manifest:
    """``sdrt.json``."""

    family: str
    components: Mapping[str, Component]
    text_encoders: tuple[TextEncoder, ...]
    denoiser: Denoiser
    latents: LatentSpace
    scheduler: str
    files: tuple[File, ...]
    provenance: Provenance
    no_negative_prompt: Literal["empty", "zeros"] = "empty"
    """What stands for the negative prompt when none is given: the encoded empty text, or zeros (not encoded)."""
    guidance_scale: float = 7.5
    """The guidance of a request that gives none."""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_relative(self.scheduler)
        if not abs(self.guidance_scale) <= MAX_GUIDANCE:
            raise BundleError(f"guidance_scale is {self.guidance_scale}, expected a number, at most {MAX_GUIDANCE}")
        if len(self.text_encoders) > MAX_TEXT_ENCODERS:
            raise BundleError(f"has {len(self.text_encoders)} text encoders, at most {MAX_TEXT_ENCODERS}")
        for text in self.text_encoders:
            if text.component not in self.components:
                raise BundleError(f"text_encoders names component {text.component!r}, which is not in the bundle")
            normed = text.clip_skip is not None and text.clip_skip.epsilon is not None
            if normed and self.components[text.component].constants is None:
                raise BundleError(
                    f"text_encoders gives {text.component!r} a clip_skip with a norm, but it has no constants file"
                )
            _check_output("text_encoders", text.outputs(), text.component, self.components[text.component])
            shapes = {spec.name: spec.shape for spec in self.components[text.component].outputs}
            if odd := [
                name for name in text.outputs() if name != text.pooled and shapes[name] != shapes[text.hidden_states]
            ]:
                raise BundleError(f"{text.component}: {odd[0]} has another shape than {text.hidden_states}")
        # A bundle may hold some components only (sdrt export --component); the pipeline asks for what it needs.
        if (denoiser := self.components.get(self.denoiser.component)) is not None:
            fed, wanted = set(self.denoiser.inputs), {spec.name for spec in denoiser.inputs}
            if fed != wanted:
                raise BundleError(f"denoiser feeds {sorted(fed)}, but {self.denoiser.component} takes {sorted(wanted)}")
            _check_output("denoiser", [self.denoiser.output], self.denoiser.component, denoiser)
        if nothing := [name for name, sources in self.denoiser.inputs.items() if not sources]:
            raise BundleError(f"denoiser feeds {nothing[0]} from nothing")
        paths = [file.path for file in self.all_files()]
        if len(paths) > MAX_FILES:
            raise BundleError(f"lists {len(paths)} files, at most {MAX_FILES}")
        seen: set[str] = set()
        for path in paths:
            if path in seen:
                raise BundleError(f"file {path} is listed twice")
            seen.add(path)
        if MANIFEST in paths:
            raise BundleError(f"{MANIFEST} cannot list itself")

    def all_files(self) -> Iterator[File]:
        """Every file of the bundle except ``sdrt.json``."""
        for component in self.components.values():
            yield from component.artifact.files
            yield from (f for f in (component.config, component.reference, component.constants) if f is not None)
        yield from self.files

    def unhashed(self) -> list[str]:
        """Paths of the files whose hash is not known."""
        return [file.path for file in (*self.all_files(), *self.provenance.source_files) if file.sha256 is None]


def _check_output(who: str, names: list[str], component: str, spec: Component) -> None:
    held = dict.fromkeys(output.name for output in spec.outputs)
    if unknown := [name for name in names if name not in held]:
        raise BundleError(f"{who} takes output {unknown[0]!r}, but {component} gives {', '.join(held)}")


@dataclass(frozen=True)
class Bundle:
    """A manifest and the directory that it describes."""

    root: Path
    manifest: Manifest

    def path(self, relative: str) -> Path:
        """Absolute path of a file of the bundle; BundleError when it, or the link it is, leaves the root."""
        return inside(self.root, relative)

    def component(self, name: str) -> Component:
        try:
            return self.manifest.components[name]
        except KeyError:
            held = ", ".join(self.manifest.components)
            fix = f"export it again without --component, or with --component {name}"
            if self.manifest.unhashed():
                fix = f"export the checkpoint with sdrt export: this directory has no {name} that sdrt can use"
            raise BundleError(f"{self.root}: has no component {name!r}; it holds {held}", fix) from None


def inside(root: Path, relative: str) -> Path:
    """Absolute path of a file below ``root``; BundleError when it, or the link it is, leaves the root."""
    check_relative(relative)
    path = root / relative
    home, real = root.resolve(), Path(os.path.realpath(path))  # Path.resolve raises at a loop of links
    blobs = home.parent.parent / "blobs"  # the Hub's cache: snapshots/<revision>/x -> ../../blobs/<hash>
    if not (real.is_relative_to(home) or (home.parent.name == "snapshots" and real.is_relative_to(blobs))):
        raise BundleError(f"{path}: links to {real}, outside the bundle", "copy the file itself into the bundle")
    return path


def shipped(name: str) -> Path | None:
    """The directory of a bundle that sdrt brings: ``demo``. None for any other name."""
    path = SHIPPED / name
    return path if name.isidentifier() and os.path.isfile(path / MANIFEST) else None  # is_file raises: too long a name


def _other(own: Path | None) -> str:
    """What helps where something lies in the way of the bundle that sdrt brings."""
    return "" if own is None else f"the model that comes with sdrt is {own}"


def load(root: str | Path) -> Bundle:
    """Read ``sdrt.json`` and check it against the directory: every file there, of the recorded size.

    A name of what sdrt brings (``shipped``) stands for it where there is no such directory.

    A directory without it that optimum wrote is read too (``sdrt.foreign``). Hashes are left to ``damaged``. Raises
    BundleError, which names the file and the key.
    """
    own = shipped(os.fspath(root))
    root = own if own is not None and not os.path.lexists(root) else Path(root)
    path = root / MANIFEST
    if not os.path.isdir(root):  # Path.is_dir raises for a name that is too long, or a folder that may not be entered
        replaced = root.parent / f".{root.name}.replaced"
        hint = f"a replacement was interrupted; the old bundle is {replaced}" if os.path.isdir(replaced) else ""
        problem = "is a file, expected a bundle's directory" if os.path.isfile(root) else "no such directory"
        raise BundleError(f"{root}: {problem}", hint or _other(own) or "sdrt export MODEL OUT makes a bundle")
    if not os.path.lexists(path) and os.path.isfile(root / "model_index.json"):
        from sdrt import foreign  # it is made of what this module defines

        return foreign.load(root)
    if not path.is_file():
        problem = f"{root}: is not a bundle: {MANIFEST} is missing"
        raise BundleError(problem, _other(own) or "sdrt export MODEL OUT makes one")
    bundle = Bundle(root, parse(strict_json.read(path), MANIFEST))
    for file in bundle.manifest.all_files():
        try:
            status = bundle.path(file.path).stat()
        except OSError:
            raise BundleError(f"{root}: {file.path} is missing", _again(bundle)) from None
        if not stat.S_ISREG(status.st_mode):
            raise BundleError(f"{root}: {file.path} is not a file", _again(bundle))
        if status.st_size != file.bytes:
            raise BundleError(f"{root}: {file.path} has {status.st_size} bytes, expected {file.bytes}", _again(bundle))
    return bundle


def _again(bundle: Bundle) -> str:
    return f"copy the bundle again, or make it again from {bundle.manifest.provenance.source}"


def parse(value: strict_json.Json, where: str) -> Manifest:
    """Build the manifest from parsed JSON; BundleError names the first key that does not fit."""
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise BundleError(f'{where}: is not an sdrt manifest: "format" must be "{FORMAT}"')
    version = value.get("version")
    if type(version) is not int:
        raise BundleError(f'{where}: "version" must be an integer, got {version!r}')
    if version != VERSION:
        fix = "pip install --upgrade sdrt" if version > VERSION else "make the bundle again with this sdrt"
        raise BundleError(f"{where}: has version {version}, this sdrt reads version {VERSION}", fix)
    rest = {k: v for k, v in value.items() if k not in ("format", "version")}
    manifest = strict_json.decode(Manifest, rest, where)
    if unhashed := manifest.unhashed():
        raise BundleError(f"{where}: file {unhashed[0]}: sha256 must be 64 hex digits, got null")
    return manifest


def dumps(manifest: Manifest) -> str:
    """The text of ``sdrt.json``."""
    value = {"format": FORMAT, "version": VERSION, **strict_json.encode(manifest)}
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def save(root: Path, manifest: Manifest) -> Bundle:
    """Write ``sdrt.json`` into a directory under construction: it comes last and makes the directory a bundle."""
    if unhashed := manifest.unhashed():
        raise BundleError(f"{root}: the hash of {unhashed[0]} is not known, so {MANIFEST} cannot be written")
    (root / MANIFEST).write_text(dumps(manifest), encoding="utf-8")
    return Bundle(root, manifest)


def record(root: Path, relative: str) -> File:
    """The ``File`` entry of a file as it lies on disk."""
    path = root / relative
    return File(relative, path.stat().st_size, sha256(path))


def sha256(path: Path, progress: Callable[[int], object] = lambda _: None) -> str:
    """Hex digest of a file; ``progress`` is called with the bytes of each block."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def damaged(bundle: Bundle, progress: Callable[[int], object] = lambda _: None) -> list[str]:
    """Paths of the files whose sha256 is not the recorded one; where none is recorded, nothing can be told."""
    return [
        file.path
        for file in bundle.manifest.all_files()
        if file.sha256 is not None and sha256(bundle.path(file.path), progress) != file.sha256
    ]


def with_parity(component: Component, parity: Iterable[Parity]) -> Component:
    """The same component with its artifact's parity figures replaced."""
    return dataclasses.replace(component, artifact=dataclasses.replace(component.artifact, parity=tuple(parity)))


def read_arrays(bundle: Bundle, path: str) -> dict[str, NDArray[Any]]:
    """All arrays of an ``.npz`` file of the bundle. BundleError when it is damaged, or beyond ``sdrt.npz``'s limits."""
    try:
        return npz.read(bundle.path(path))
    except BundleError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise a dozen unrelated ones
        raise BundleError(f"{bundle.root / path}: cannot be read: {error}", f"sdrt verify {bundle.root}") from None
