"""The bundle format: round trips, a precise error for every kind of damage, and models to come."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sdrt import Pipeline, strict_json
from sdrt import bundle as bundles
from sdrt.bundle import (
    Artifact,
    Bundle,
    ClipSkip,
    Component,
    Denoiser,
    Dim,
    DimRange,
    File,
    LatentSpace,
    Manifest,
    Parity,
    Provenance,
    TensorSpec,
    TextEncoder,
    Work,
)  # fmt: skip
from sdrt.errors import BundleError

SHA256 = "0123456789abcdef" * 4

# -- strategies -------------------------------------------------------------------------------------------------------

WORDS = st.from_regex(r"[a-z][a-z0-9_]{0,7}", fullmatch=True)
TEXTS = st.text(max_size=12)
COUNTS = st.integers(1, 4096)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
SYMBOLS = st.from_regex(r"([BHWT]|[A-Z][A-Z0-9_]{0,3})(/[1-9][0-9]{0,3})?", fullmatch=True)
SHA256S = st.text("0123456789abcdef", min_size=64, max_size=64)
FACTS = st.dictionaries(TEXTS, TEXTS | st.integers(-(2**63), 2**64 - 1) | FINITE | st.none() | st.lists(st.booleans()))


@st.composite
def _files(draw: st.DrawFn, paths: Iterator[str]) -> File:
    """A file under the next of ``paths``: no two files of one manifest share a path."""
    return File(next(paths), draw(st.integers(0, 2**63)), draw(SHA256S))


@st.composite
def _tensors(draw: st.DrawFn, symbols: st.SearchStrategy[Dim]) -> tuple[TensorSpec, ...]:
    names = draw(st.lists(WORDS, min_size=1, max_size=3, unique=True))
    dtypes = st.sampled_from(get_args(bundles.DType))
    return tuple(TensorSpec(name, draw(dtypes), tuple(draw(st.lists(symbols, max_size=4)))) for name in names)


@st.composite
def _ranges(draw: st.DrawFn) -> DimRange:
    return DimRange(*sorted(draw(st.tuples(COUNTS, COUNTS, COUNTS))))


@st.composite
def _artifacts(draw: st.DrawFn, paths: Iterator[str]) -> Artifact:
    return Artifact(
        engine=draw(WORDS),
        precision=draw(st.sampled_from(get_args(bundles.Precision))),
        files=tuple(draw(st.lists(_files(paths), min_size=1, max_size=2))),
        target=draw(TEXTS),
        profiles=tuple(draw(st.lists(st.dictionaries(WORDS, _ranges(), max_size=2), max_size=2))),
        built_from=draw(st.none() | SHA256S),
        parity=tuple(draw(st.lists(st.builds(Parity, WORDS, WORDS, FINITE, st.none() | FINITE), max_size=2))),
        facts=draw(FACTS),
    )


def _works(known: set[str]) -> st.SearchStrategy[Work]:
    """Work in the symbols that inputs tell."""
    told = [(symbols <= known) for symbols in ({"B"}, {"H", "W"}, {"T"})]
    fit = [term for term, powers in bundles.TERMS.items() if all(t or not p for t, p in zip(told, powers, strict=True))]
    polynomials = st.dictionaries(st.sampled_from(fit), st.integers(1, 2**64 - 1), max_size=3)
    return st.builds(Work, polynomials, polynomials, polynomials, polynomials)


@st.composite
def _components(draw: st.DrawFn, paths: Iterator[str]) -> Component:
    inputs = draw(_tensors(COUNTS | SYMBOLS))
    known = sorted({bundles.split_dim(d)[0] for spec in inputs for d in spec.shape if isinstance(d, str)})
    outputs = draw(_tensors(COUNTS | st.sampled_from(known) if known else COUNTS))
    side_file = st.none() | _files(paths)
    files = [draw(side_file) for _ in range(3)]
    return Component(inputs, outputs, draw(_artifacts(paths)), *files, draw(st.none() | _works(set(known))))


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Manifests of any shape that hold together: what one part names, another holds."""
    paths = (f"{draw(WORDS)}/{i}" for i in range(1000))
    components = draw(st.dictionaries(WORDS, _components(paths), min_size=1, max_size=3))
    encoder = draw(st.sampled_from(sorted(components)))
    outputs = st.sampled_from([spec.name for spec in components[encoder].outputs])
    # One layer is left out of nothing, so that no output named hidden_states.<i> is needed.
    skip = st.builds(ClipSkip, st.just(1), st.floats(1e-9, 1), TEXTS, TEXTS, TEXTS)
    skip = st.none() if components[encoder].constants is None else st.none() | skip
    text = TextEncoder(
        encoder, draw(WORDS), draw(st.integers(2, 512)), draw(WORDS), draw(WORDS), draw(WORDS),
        draw(outputs), draw(st.none() | outputs), draw(skip),
    )  # fmt: skip
    denoiser = draw(st.sampled_from(sorted(components)))
    return Manifest(
        family=draw(TEXTS),
        components=components,
        text_encoders=tuple(draw(st.sampled_from([(), (text,)]))),
        denoiser=Denoiser(
            denoiser,
            components[denoiser].outputs[0].name,
            {spec.name: tuple(draw(st.lists(WORDS, min_size=1, max_size=3))) for spec in components[denoiser].inputs},
        ),
        latents=draw(st.builds(LatentSpace, COUNTS, COUNTS, FINITE.filter(bool), COUNTS, COUNTS, FINITE)),
        scheduler=draw(WORDS),
        files=tuple(draw(st.lists(_files(paths), max_size=2))),
        provenance=Provenance(
            draw(TEXTS), tuple(draw(st.lists(_files(paths), max_size=2))), draw(st.dictionaries(TEXTS, TEXTS))
        ),
        facts=draw(FACTS),
    )


def read_back(manifest: Manifest) -> Manifest:
    """Through the reader that ``load`` uses, which refuses what ``json.loads`` takes."""
    return bundles.parse(strict_json.parse(bundles.dumps(manifest).encode(), ""), bundles.MANIFEST)


# -- round trip -------------------------------------------------------------------------------------------------------


@given(manifests())
def test_round_trip(manifest: Manifest) -> None:
    assert read_back(manifest) == manifest


def test_the_real_bundle(bundle: Path) -> None:
    held = bundles.load(bundle)
    assert bundles.dumps(held.manifest) == (bundle / "sdrt.json").read_text(encoding="utf-8")
    assert bundles.damaged(held) == []


def test_a_manifest_without_work_is_read(bundle: Path) -> None:
    """As all were before there was any."""
    value = json.loads((bundle / "sdrt.json").read_text(encoding="utf-8"))
    for component in value["components"].values():
        component.pop("work", None)
    assert all(c.work is None for c in bundles.parse(value, "sdrt.json").components.values())


# -- work -------------------------------------------------------------------------------------------------------------


def test_terms() -> None:
    expected = ["1", "T", "T^2", "A", "A*T", "A^2", "B", "B*T", "B*T^2", "B*A", "B*A*T", "B*A^2"]
    assert list(bundles.TERMS) == expected


def test_work_at_sizes() -> None:
    """A is the area in tiles of 64 × 64 pixels; where that is no whole number, the value is rounded."""
    work = Work(
        convolution={"B*A": 100},
        linear={"1": 7, "B": 20, "B*T": 3},
        attention={"B*A^2": 5, "A*T": 2},
        elements={"A": 64},
    )
    sizes = {"B": 2, "H": 128, "W": 192, "T": 77}
    assert work.at(sizes) == {
        "convolution": 2 * 6 * 100,
        "linear": 7 + 2 * 20 + 2 * 77 * 3,
        "attention": 2 * 36 * 5 + 6 * 77 * 2,
    }
    assert work.elements_at(sizes) == 6 * 64
    assert work.at({"B": 1, "H": 72, "W": 40, "T": 1})["convolution"] == round(100 * 72 * 40 / 4096)
    assert Work(linear={"B*T": 2}).at({"B": 3, "T": 5}) == {"convolution": 0, "linear": 30, "attention": 0}


# -- mutations --------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | FINITE
    | TEXTS
    | st.sampled_from(["B", "H/8", "../x", "f32"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything below ``value``."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


@pytest.fixture(scope="module")
def real(bundle: Path) -> Any:
    return json.loads((bundle / "sdrt.json").read_text(encoding="utf-8"))


@given(data=st.data())
def test_a_mutated_manifest_is_read_or_refused(real: Any, data: st.DataObject) -> None:
    """Delete, retype or replace anything, up to three times: parse returns a manifest or raises a BundleError."""
    mutated = copy.deepcopy(real)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(list(places(mutated))))
        parent = mutated
        for key in path[:-1]:
            parent = parent[key]
        kind = data.draw(st.sampled_from(["delete", "replace", "retype", "insert"]))
        if kind == "delete":
            del parent[path[-1]]
        elif kind == "replace":
            parent[path[-1]] = data.draw(JSON)
        elif kind == "retype":
            parent[path[-1]] = data.draw(st.sampled_from([str, lambda old: [old], lambda old: {"x": old}]))(
                parent[path[-1]]
            )
        elif isinstance(parent, dict):
            parent[data.draw(TEXTS)] = data.draw(JSON)
        else:
            parent.append(data.draw(JSON))
        assume(list(places(mutated)))
    _read_or_refused(mutated)


def _read_or_refused(value: Any) -> None:
    try:
        manifest = bundles.parse(value, "sdrt.json")
    except BundleError as error:
        said = error.message
    else:
        said = ""
        assert read_back(manifest) == manifest
    assert not said or said.startswith("sdrt.json")


def test_every_key_is_required_or_has_a_default(real: Any) -> None:
    """Each place of the real manifest, deleted and then replaced by a value of no type used anywhere."""
    for path in places(real):
        if "facts" in path:
            continue
        *above, last = path
        for mutate in (
            lambda parent, last: parent.pop(last),
            lambda parent, last: parent.__setitem__(last, {"": [None]}),
        ):
            mutated = copy.deepcopy(real)
            parent = mutated
            for key in above:
                parent = parent[key]
            mutate(parent, last)
            _read_or_refused(mutated)
        with pytest.raises(BundleError) as caught:
            bundles.parse(mutated, "sdrt.json")
        # The error names the place itself, or one below or (where a part's own check finds it) above it.
        named = caught.value.message.split(": ")[0].removeprefix("sdrt.json").replace("[", ".").replace("]", "")
        steps, expected = named.split(".")[1:], [str(key) for key in path]
        common = min(len(steps), len(expected))
        assert steps[:common] == expected[:common], caught.value.message
        assert steps or last in ("format", "version"), caught.value.message


# -- precise errors ---------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], object]
UNET = "components", "unet"


def put(*path_and_value: Any) -> Change:
    *path, last, value = path_and_value

    def change(manifest: dict[str, Any]) -> None:
        parent: Any = manifest
        for key in path:
            parent = parent[key]
        parent[last] = value

    return change


def drop(*path: Any) -> Change:
    *above, last = path

    def change(manifest: dict[str, Any]) -> None:
        parent: Any = manifest
        for key in above:
            parent = parent[key]
        del parent[last]

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put("guidance_scale", 1e9), "sdrt.json: guidance_scale is 1000000000.0, expected a number, at most 10000"),
        (put("guidance_scale", "7"), 'sdrt.json.guidance_scale: expected a number, got a string: "7"'),
        (put("format", "zip"), 'sdrt.json: is not an sdrt manifest: "format" must be "sdrt"'),
        (drop("format"), 'sdrt.json: is not an sdrt manifest: "format" must be "sdrt"'),
        (put("version", 2), "sdrt.json: has version 2, this sdrt reads version 1\n  fix: pip install --upgrade sdrt"),
        (put("version", 0), "sdrt.json: has version 0, this sdrt reads version 1\n  fix: make the bundle again"),
        (put("version", "1"), "sdrt.json: \"version\" must be an integer, got '1'"),
        (put("version", True), 'sdrt.json: "version" must be an integer, got True'),
        (drop("version"), 'sdrt.json: "version" must be an integer, got None'),
        (drop("latents"), "sdrt.json: missing key 'latents'"),
        (drop("latents", "channels"), "sdrt.json.latents: missing key 'channels'"),
        (
            drop(*UNET, "artifact", "files", 0, "sha256"),
            "sdrt.json.components.unet.artifact.files[0]: missing key 'sha256'",
        ),
        (put("latents", "channels", "4"), 'sdrt.json.latents.channels: expected an integer, got a string: "4"'),
        (put("latents", "channels", 0), "sdrt.json.latents: channels, downscale"),
        (put("latents", "scaling_factor", 0), "sdrt.json.latents: channels, downscale, scaling_factor"),
        (put("latents", "chanels", 4), "sdrt.json.latents: unknown key 'chanels'; known keys: channels, downscale"),
        (put("extra", {}), "sdrt.json: unknown key 'extra'; known keys: family, components"),
        (put(*UNET, "inputs", 0, "dtype", "f33"), "sdrt.json.components.unet.inputs[0].dtype: expected one of 'f32'"),
        (put(*UNET, "inputs", 0, "shape", 2, "h/8"), "sdrt.json.components.unet.inputs[0]: dimension 'h/8' is neither"),
        (put(*UNET, "inputs", 0, "shape", 2, "H/0"), "sdrt.json.components.unet.inputs[0]: dimension 'H/0' is neither"),
        (
            put(*UNET, "inputs", 0, "shape", 2, "H//8"),
            "sdrt.json.components.unet.inputs[0]: dimension 'H//8' is neither",
        ),
        (
            put(*UNET, "inputs", 0, "shape", 2, 0),
            "sdrt.json.components.unet.inputs[0]: tensor sample: dimension 0 is not",
        ),
        (
            put(*UNET, "inputs", 0, "shape", 2, 8.0),
            "sdrt.json.components.unet.inputs[0].shape[2]: expected an integer or a",
        ),
        (
            put(*UNET, "inputs", 0, "name", "a b"),
            "sdrt.json.components.unet.inputs[0]: tensor name 'a b' is not a name",
        ),
        (
            put(*UNET, "inputs", 1, "name", "sample"),
            "sdrt.json.components.unet: an input name stands twice: sample, sample",
        ),
        (
            put(*UNET, "work", {"linear": {"HW": 1}}),
            "sdrt.json.components.unet.work: 'HW' is not a term; terms: 1, T, T^2",
        ),
        (put(*UNET, "work", {"linear": {"B^2": 1}}), "sdrt.json.components.unet.work: 'B^2' is not a term"),
        (put(*UNET, "work", {"linear": {"A*B": 1}}), "sdrt.json.components.unet.work: 'A*B' is not a term"),
        (
            put(*UNET, "work", {"linear": {"B": 0}}),
            "sdrt.json.components.unet.work: the coefficient of B is 0, expected",
        ),
        (
            put(*UNET, "work", {"linear": {"B": 1.5}}),
            "sdrt.json.components.unet.work.linear.B: expected an integer, got",
        ),
        (
            put(*UNET, "work", {"linear": 5}),
            "sdrt.json.components.unet.work.linear: expected an object, got an integer",
        ),
        (
            put(*UNET, "work", {"linea": {}}),
            "sdrt.json.components.unet.work: unknown key 'linea'; known keys: convolution",
        ),
        (
            put("components", "text_encoder", "work", {"linear": {"B*A": 1}}),
            "sdrt.json.components.text_encoder: work has a term B*A: no input tells H and W",
        ),
        (
            put("components", "vae_decoder", "work", {"elements": {"T": 1}}),
            "sdrt.json.components.vae_decoder: work has a term T: no input tells T",
        ),
        (put(*UNET, "outputs", []), "sdrt.json.components.unet: a component needs at least one output"),
        (
            put(*UNET, "artifact", "files", []),
            "sdrt.json.components.unet.artifact: an artifact needs at least one file",
        ),
        (put(*UNET, "artifact", "precision", "fp31"), "sdrt.json.components.unet.artifact.precision: expected one of"),
        (
            put(*UNET, "artifact", "profiles", [{"H": {"min": 9, "opt": 8, "max": 9}}]),
            "sdrt.json.components.unet.artifact.profiles[0].H: range 9..8..9 is not 1 <= min <= opt <= max",
        ),
        (put("files", 0, "bytes", -1), "sdrt.json.files[0]: file model_index.json: -1 bytes is negative"),
        (put("files", 0, "bytes", 1.5), "sdrt.json.files[0].bytes: expected an integer, got a number: 1.5"),
        (put("files", 0, "sha256", "A" * 64), "sdrt.json.files[0]: file model_index.json: sha256 is not 64 hex digits"),
        (put("files", 0, "path", "tokenizer/merges.txt"), "sdrt.json: file tokenizer/merges.txt is listed twice"),
        (put("files", 0, "path", "unet/model.onnx"), "sdrt.json: file unet/model.onnx is listed twice"),
        (put("files", 0, "path", "sdrt.json"), "sdrt.json: sdrt.json cannot list itself"),
        (put("text_encoders", 0, "component", "clip"), "sdrt.json: text_encoders names component 'clip', which is not"),
        (
            drop("components", "text_encoder", "constants"),
            "sdrt.json: text_encoders gives 'text_encoder' a clip_skip with a norm, but",
        ),
        (
            drop("denoiser", "inputs", "sample"),
            "sdrt.json: denoiser feeds ['encoder_hidden_states', 'timestep'], but unet",
        ),
        (put("denoiser", "inputs", "mask", ["mask"]), "sdrt.json: denoiser feeds ['encoder_hidden_states', 'mask', "),
        # What the runtime would look up in vain, or could not feed, while it generates.
        (put("denoiser", "output", "noise"), "sdrt.json: denoiser takes output 'noise', but unet gives out_sample"),
        (put("denoiser", "inputs", "sample", []), "sdrt.json: denoiser feeds sample from nothing"),
        (put("text_encoders", 0, "hidden_states", "hidden"), "sdrt.json: text_encoders takes output 'hidden', but"),
        (put("text_encoders", 0, "pooled", "pool"), "sdrt.json: text_encoders takes output 'pool', but"),
        (put("text_encoders", 0, "clip_skip", "layers", 9), "sdrt.json: text_encoders takes output 'hidden_states."),
        (put("text_encoders", 0, "max_length", 1), "sdrt.json.text_encoders[0]: max_length"),
        (put(*UNET, "outputs", 0, "shape", 2, "Z/8"), "sdrt.json.components.unet: output out_sample: no input tells Z"),
    ],
    ids=lambda value: value.removeprefix("sdrt.json")[:60] if isinstance(value, str) else "",
)
def test_errors_say_where(real: Any, change: Change, said: str) -> None:
    mutated = copy.deepcopy(real)
    change(mutated)
    with pytest.raises(BundleError) as caught:
        bundles.parse(mutated, "sdrt.json")
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize("value", [None, [], 1, "sdrt", True, {}, {"format": ["sdrt"]}], ids=str)
def test_no_manifest_at_all(value: Any) -> None:
    with pytest.raises(BundleError, match=r'x\.json: is not an sdrt manifest: "format" must be "sdrt"'):
        bundles.parse(value, "x.json")


ESCAPING = [
    "../x", "a/../../x", "a/..", "..", "/etc/passwd", "//server/share", "C:/x", "C:x", "..\\x", "a\\..\\..\\x", "\\x",
    "x\0y", "", ".", "./",
]  # fmt: skip


@pytest.mark.parametrize("path", ESCAPING, ids=ascii)
def test_paths_that_leave_the_root(real: Any, path: str) -> None:
    for place in (("files", 0, "path"), ("scheduler",), ("text_encoders", 0, "tokenizer")):
        mutated = copy.deepcopy(real)
        put(*place, path)(mutated)
        with pytest.raises(BundleError, match="leaves the bundle or is not a relative POSIX path"):
            bundles.parse(mutated, "sdrt.json")


@pytest.mark.parametrize("path", ["./sdrt.json", "unet//model.onnx", "unet/./model.onnx", "unet/"])
def test_one_spelling_a_path(real: Any, path: str) -> None:
    """Otherwise one file could be listed twice, or sdrt.json list itself."""
    mutated = copy.deepcopy(real)
    put("files", 0, "path", path)(mutated)
    with pytest.raises(BundleError, match="path"):
        bundles.parse(mutated, "sdrt.json")


@given(st.text(st.sampled_from("a.b/\\:\0~ -ä"), max_size=12) | TEXTS)
def test_a_path_that_is_accepted_stays_inside(path: str) -> None:
    root = Path("bundle")
    try:
        bundles.check_relative(path)
    except BundleError:
        return
    assert (root / path).is_relative_to(root)
    assert ".." not in (root / path).parts


# -- on disk ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A bundle of three tiny files."""
    root = tmp_path / "small"
    for name in ("net/model.onnx", "scheduler.json", "tokenizer/vocab.json"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    bundles.save(root, small_manifest(root))
    return root


def small_manifest(root: Path) -> Manifest:
    x = TensorSpec("x", "f32", ("B", 4))
    return Manifest(
        family="none",
        components={"net": Component((x,), (x,), Artifact("onnx", "fp32", (bundles.record(root, "net/model.onnx"),)))},
        text_encoders=(),
        denoiser=Denoiser("net", "x", {"x": ("latents",)}),
        latents=LatentSpace(4, 8, 1.0, 64, 64),
        scheduler="scheduler.json",
        files=(bundles.record(root, "scheduler.json"), bundles.record(root, "tokenizer/vocab.json")),
        provenance=Provenance("hand-made", (), {}),
    )


def _missing(root: Path) -> None:
    (root / "net/model.onnx").unlink()


def _too_short(root: Path) -> None:
    (root / "net/model.onnx").write_text("x")


def _a_directory(root: Path) -> None:
    _missing(root)
    (root / "net/model.onnx").mkdir()


def _dangling(root: Path) -> None:
    _missing(root)
    (root / "net/model.onnx").symlink_to("nowhere")


def _loop(root: Path) -> None:
    _missing(root)
    (root / "net/model.onnx").symlink_to("model.onnx")


def _link_outside(root: Path) -> None:
    (root / "net/model.onnx").rename(root.parent / "model.onnx")
    (root / "net/model.onnx").symlink_to("../../model.onnx")


def _absolute_link_outside(root: Path) -> None:
    _missing(root)
    (root / "net/model.onnx").symlink_to("/etc/hostname")


def _linked_folder_outside(root: Path) -> None:
    (root / "net").rename(root.parent / "net")
    (root / "net").symlink_to(root.parent / "net")


def _no_manifest(root: Path) -> None:
    (root / "sdrt.json").unlink()


def _gone(root: Path) -> None:
    shutil.rmtree(root)


def _a_file(root: Path) -> None:
    _gone(root)
    root.touch()


@pytest.mark.parametrize(
    ("damage", "said", "fix"),
    [
        (_missing, "net/model.onnx is missing", "make it again from hand-made"),
        (_too_short, "net/model.onnx has 1 bytes, expected 14", "make it again from hand-made"),
        (_a_directory, "net/model.onnx is not a file", ""),
        (_dangling, "net/model.onnx is missing", ""),
        (_loop, "net/model.onnx", ""),
        (_link_outside, "outside the bundle", "copy the file itself into the bundle"),
        (_absolute_link_outside, "net/model.onnx: links to /etc/hostname, outside the bundle", ""),
        (_linked_folder_outside, "outside the bundle", ""),
        (_no_manifest, "is not a bundle: sdrt.json is missing", "sdrt export MODEL"),
        (_gone, "no such directory", "sdrt export MODEL"),
        (_a_file, "is a file, expected a bundle's directory", ""),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_load_finds(small: Path, damage: Callable[[Path], None], said: str, fix: str) -> None:
    damage(small)
    with pytest.raises(BundleError) as caught:
        bundles.load(small)
    assert said in caught.value.message
    assert fix in caught.value.fix
    assert str(small) in caught.value.message


@pytest.mark.parametrize("name", ["x" * 300, "x\0y", "\ud800"], ids=ascii)
def test_a_name_that_no_file_has(tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError, match="no such directory"):
        bundles.load(tmp_path / name)


def test_load_points_to_what_an_interrupted_replacement_left(small: Path) -> None:
    small.rename(small.with_name(".small.replaced"))
    with pytest.raises(BundleError, match="no such directory") as caught:
        bundles.load(small)
    assert ".small.replaced" in caught.value.fix


def test_damaged_names_the_files_whose_content_changed(small: Path) -> None:
    """Of the recorded size, so that ``load`` is content."""
    assert bundles.damaged(bundles.load(small)) == []
    (small / "tokenizer/vocab.json").write_text("tokenizer/vocab.jsoN")
    read: list[int] = []
    assert bundles.damaged(bundles.load(small), read.append) == ["tokenizer/vocab.json"]
    assert sum(read) == sum(file.bytes for file in bundles.load(small).manifest.all_files())


def test_links_inside_the_root_are_followed(small: Path) -> None:
    (small / "net/model.onnx").rename(small / "kept")
    (small / "net/model.onnx").symlink_to("../kept")
    assert bundles.damaged(bundles.load(small)) == []


def test_links_into_the_hubs_cache_are_followed(small: Path) -> None:
    """models--a--b/snapshots/<revision>/x → ../../blobs/<hash>; no other folder may be linked to."""
    cache = small.parent / "models--a--b"
    snapshot = cache / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    small.rename(snapshot)
    (cache / "blobs").mkdir()
    (snapshot / "net/model.onnx").rename(cache / "blobs/cafe")
    (snapshot / "net/model.onnx").symlink_to("../../../blobs/cafe")
    assert bundles.damaged(bundles.load(snapshot)) == []
    (cache / "blobs").rename(cache / "other")
    (snapshot / "net/model.onnx").unlink()
    (snapshot / "net/model.onnx").symlink_to("../../../other/cafe")
    with pytest.raises(BundleError, match="outside the bundle"):
        bundles.load(snapshot)


class TestReadArrays:
    @pytest.fixture
    def held(self, small: Path) -> Bundle:
        np.savez_compressed(small / "a.npz", x=np.arange(6.0).reshape(2, 3))
        return bundles.load(small)

    def test_good(self, held: Bundle) -> None:
        arrays = bundles.read_arrays(held, "a.npz")
        assert arrays.keys() == {"x"}
        np.testing.assert_array_equal(arrays["x"], [[0, 1, 2], [3, 4, 5]])

    def test_every_bit_flipped(self, held: Bundle) -> None:
        """zipfile, zlib and numpy raise half a dozen unrelated exceptions, and leave the file open in some of them."""
        good = (held.root / "a.npz").read_bytes()
        for bit in range(8 * len(good)):
            flipped = bytearray(good)
            flipped[bit // 8] ^= 1 << bit % 8
            (held.root / "a.npz").write_bytes(flipped)
            try:
                bundles.read_arrays(held, "a.npz")
            except BundleError as error:
                said = str(error)
            else:
                said = "a.npz: cannot be read"  # a field that nobody reads, such as a date
            assert "a.npz: cannot be read" in said

    @pytest.mark.parametrize("size", [0, 1, 10, 100, -1, -30])
    def test_truncated(self, held: Bundle, size: int) -> None:
        good = (held.root / "a.npz").read_bytes()
        (held.root / "a.npz").write_bytes(good[:size])
        with pytest.raises(BundleError, match="cannot be read") as caught:
            bundles.read_arrays(held, "a.npz")
        assert caught.value.fix == f"sdrt verify {held.root}"

    def test_pickles_are_not_loaded(self, held: Bundle) -> None:
        np.savez(held.root / "a.npz", x=np.array([{"an": "object"}], object))
        with pytest.raises(BundleError, match="cannot be read"):
            bundles.read_arrays(held, "a.npz")

    def test_a_single_array_is_no_npz(self, held: Bundle) -> None:
        with (held.root / "a.npz").open("wb") as file:
            np.save(file, np.zeros(3))
        with pytest.raises(BundleError, match="cannot be read"):
            bundles.read_arrays(held, "a.npz")

    def test_missing(self, held: Bundle) -> None:
        with pytest.raises(BundleError, match="cannot be read"):
            bundles.read_arrays(held, "b.npz")


# -- sizes ------------------------------------------------------------------------------------------------------------

SIZES = st.fixed_dictionaries({"B": st.integers(1, 64), "H": st.integers(1, 4096), "W": st.integers(1, 4096)})


@given(SIZES, st.integers(1, 9999))
def test_at_divides_and_rounds_up(sizes: dict[str, int], divisor: int) -> None:
    spec = TensorSpec("x", "f32", ("B", 4, f"H/{divisor}", "W"))
    assert spec.at(sizes) == (sizes["B"], 4, math.ceil(sizes["H"] / divisor), sizes["W"])


@given(st.integers(1, 100_000), st.integers(0, 12))
def test_ceil_is_what_stride_2_leaves(size: int, levels: int) -> None:
    """n convolutions of stride 2, kernel 3 and padding 1 leave ceil(size / 2^n), one at a time or all at once."""
    left = size
    for _ in range(levels):
        left = (left + 2 - 3) // 2 + 1
    assert TensorSpec("x", "f32", (f"H/{2**levels}",)).at({"H": size}) == (left,)


@given(SIZES, st.sampled_from([1, 2, 8, 64]))
def test_solve_inverts_at(sizes: dict[str, int], divisor: int) -> None:
    """Sizes that the divisor divides come back; others come back rounded up, and explain the same shapes."""
    specs = [
        TensorSpec("x", "f32", ("B", 4, f"H/{divisor}", f"W/{divisor}")),
        TensorSpec("y", "f32", ("B", f"H/{8 * divisor}")),
        TensorSpec("t", "f32", (1,)),
    ]
    shapes = {spec.name: spec.at(sizes) for spec in specs}
    solved = bundles.solve(specs, shapes)
    rounded = {s: -(-sizes[s] // divisor) * divisor for s in "HW"}
    assert solved == {"B": sizes["B"], **rounded}
    assert {spec.name: spec.at(solved) for spec in specs} == shapes


def test_solve_takes_the_finest_divisor_in_any_order() -> None:
    fine, coarse = TensorSpec("fine", "f32", ("H/8",)), TensorSpec("coarse", "f32", ("H/64",))
    shapes = {"fine": (9,), "coarse": (2,)}
    assert bundles.solve([fine, coarse], shapes) == bundles.solve([coarse, fine], shapes) == {"H": 72}


def test_solve_passes_over_what_it_cannot_use() -> None:
    specs = [TensorSpec("x", "f32", ("B", 4)), TensorSpec("absent", "f32", ("H",))]
    assert bundles.solve(specs, {"x": (2, 4), "other": (3,)}) == {"B": 2}
    assert bundles.solve(specs, {"x": (2, 4, 1)}) == {}


@given(COUNTS, COUNTS, COUNTS, COUNTS)
def test_fits(a: int, b: int, c: int, size: int) -> None:
    low, middle, high = sorted((a, b, c))
    profile = {"H": DimRange(low, middle, high)}
    assert bundles.fits(profile, {"H": size, "W": 1}) == (low <= size <= high)
    assert bundles.fits(profile, {"W": size}), "a size that is not asked for does not matter"


# -- models to come ---------------------------------------------------------------------------------------------------
# The format must tell these without a change, so that bundles of version 1 stay readable when the runtime learns them.


def spec(name: str, *shape: Dim, dtype: bundles.DType = "f32") -> TensorSpec:
    return TensorSpec(name, dtype, shape)


def component(name: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], **rest: Any) -> Component:
    files = (File(f"{name}/model.onnx", 1000, SHA256), File(f"{name}/model.onnx.data", 5 * 2**30, SHA256))
    return Component(inputs, outputs, Artifact("onnx", "fp16", files), **rest)


def clip(name: str, width: int, layers: int, pooled: str) -> Component:
    hidden = tuple(spec(f"hidden_states.{i}", "B", "T", width) for i in range(layers + 1))
    outputs = (spec("last_hidden_state", "B", "T", width), spec(pooled, "B", width), *hidden)
    return component(name, (spec("input_ids", "B", "T", dtype="i64"),), outputs)


def vae() -> dict[str, Component]:
    latent, picture = spec("latent_sample", "B", 4, "H/8", "W/8"), spec("sample", "B", 3, "H", "W")
    return {
        "vae_encoder": component("vae_encoder", (picture,), (spec("latent_parameters", "B", 8, "H/8", "W/8"),)),
        "vae_decoder": component("vae_decoder", (latent,), (picture,)),
    }


def unet(name: str, channels: int, width: int, *more: TensorSpec) -> Component:
    return component(
        name,
        (
            spec("sample", "B", channels, "H/8", "W/8"),
            spec("timestep", 1),
            spec("encoder_hidden_states", "B", "T", width),
            *more,
        ),
        (spec("out_sample", "B", 4, "H/8", "W/8"),),
    )


FED = {"sample": ("latents",), "timestep": ("timestep",), "encoder_hidden_states": ("text.hidden_states",)}
CLIP_TOKENS = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}


def manifest(
    family: str, components: dict[str, Component], texts: tuple[TextEncoder, ...], denoiser: Denoiser, size: int = 512
) -> Manifest:
    return Manifest(
        family=family,
        components=components | vae(),
        text_encoders=texts,
        denoiser=denoiser,
        latents=LatentSpace(4, 8, 0.13025, size, size),
        scheduler="scheduler/scheduler_config.json",
        files=(File("scheduler/scheduler_config.json", 10, SHA256),),
        provenance=Provenance("somebody/model", (File("unet/model.safetensors", 2**33, SHA256),), {"torch": "2.9"}),
        facts={"note": "facts are free"},
    )


def sdxl() -> Manifest:
    """Two text encoders, whose penultimate hidden states stand side by side; pooled text and sizes beside them."""
    return manifest(
        "sdxl",
        {
            "text_encoder": clip("text_encoder", 768, 12, "pooler_output"),
            "text_encoder_2": clip("text_encoder_2", 1280, 32, "text_embeds"),
            "unet": unet("unet", 4, 2048, spec("text_embeds", "B", 1280), spec("time_ids", "B", 6)),
        },
        (
            TextEncoder(
                "text_encoder", "tokenizer", 77, pad_token="<|endoftext|>", hidden_states="hidden_states.11", **CLIP_TOKENS
            ),
            TextEncoder(
                "text_encoder_2", "tokenizer_2", 77, pad_token="!", hidden_states="hidden_states.31", pooled="text_embeds",
                **CLIP_TOKENS,
            ),
        ),
        Denoiser("unet", "out_sample", {**FED, "text_embeds": ("text.pooled",), "time_ids": ("time_ids",)}),
        size=1024,
    )  # fmt: skip


TEXT = TextEncoder("text_encoder", "tokenizer", 77, pad_token="<|endoftext|>", **CLIP_TOKENS)


def inpainting() -> Manifest:
    """Nine channels: latents, mask and the latents of the masked picture, concatenated in this order."""
    return manifest(
        "sd1-inpainting",
        {"text_encoder": clip("text_encoder", 768, 12, "pooler_output"), "unet": unet("unet", 9, 768)},
        (TEXT,),
        Denoiser("unet", "out_sample", {**FED, "sample": ("latents", "mask", "masked_image_latents")}),
    )


def control_net() -> Manifest:
    """A U-Net that takes a ControlNet's thirteen residuals, and the plain U-Net beside it."""
    widths = [(320, 8)] * 3 + [(320, 16)] + [(640, 16)] * 2 + [(640, 32)] + [(1280, 32)] * 2 + [(1280, 64)] * 3
    residuals = (
        *(
            spec(f"down_block_additional_residual_{i}", "B", channels, f"H/{scale}", f"W/{scale}")
            for i, (channels, scale) in enumerate(widths)
        ),
        spec("mid_block_additional_residual", "B", 1280, "H/64", "W/64"),
    )
    plain = unet("unet", 4, 768)
    control = component(
        "controlnet",
        (*plain.inputs, spec("controlnet_cond", "B", 3, "H", "W"), spec("conditioning_scale", 1)),
        residuals,
    )
    return manifest(
        "sd1-controlnet",
        {
            "text_encoder": clip("text_encoder", 768, 12, "pooler_output"),
            "unet": plain,
            "controlnet": control,
            "unet_control": unet("unet_control", 4, 768, *residuals),
        },
        (TEXT,),
        Denoiser("unet_control", "out_sample", FED | {r.name: (f"controlnet.{r.name}",) for r in residuals}),
    )


@pytest.mark.parametrize("model", [sdxl, inpainting, control_net])
def test_models_to_come_fit_version_1(model: Callable[[], Manifest]) -> None:
    assert bundles.VERSION == 1
    made = model()
    assert read_back(made) == made


def test_a_control_nets_residuals_have_the_sizes_of_stride_2_convolutions() -> None:
    made = control_net()
    sizes = {"B": 2, "T": 77, "H": 72, "W": 136}
    shapes = {s.name: s.at(sizes) for s in made.components["unet_control"].inputs}
    assert shapes["down_block_additional_residual_0"] == (2, 320, 9, 17)
    assert shapes["down_block_additional_residual_3"] == (2, 320, 5, 9)
    assert shapes["down_block_additional_residual_6"] == (2, 640, 3, 5)
    assert shapes["mid_block_additional_residual"] == (2, 1280, 2, 3)
    assert bundles.solve(made.components["unet_control"].inputs, shapes) == sizes
    assert shapes.items() >= {s.name: s.at(sizes) for s in made.components["controlnet"].outputs}.items()


def test_sdxls_text_is_told_by_facts() -> None:
    made = sdxl()
    widths = [
        next(s for s in made.components[text.component].outputs if s.name == text.hidden_states).shape[-1]
        for text in made.text_encoders
    ]
    fed = next(s for s in made.components["unet"].inputs if s.name == "encoder_hidden_states")
    assert sum(widths) == fed.shape[-1], "the hidden states are concatenated along features"


@pytest.mark.parametrize(
    ("name", "sources", "said"),
    [
        ("sample", ["latents", "mask", "masked_image_latents"], "unet: input sample is fed by 'mask'"),
        ("encoder_hidden_states", ["image_embeds"], "unet: input encoder_hidden_states is fed by 'image_embeds'"),
        ("sample", ["controlnet.out"], "unet: input sample is fed by 'controlnet.out'"),
    ],
)
def test_a_runtime_that_cannot_feed_a_model_says_so(copied: Path, name: str, sources: list[str], said: str) -> None:
    held = bundles.load(copied)
    facts = held.manifest.denoiser
    denoiser = dataclasses.replace(facts, inputs={**facts.inputs, name: tuple(sources)})
    bundles.save(copied, dataclasses.replace(held.manifest, denoiser=denoiser))
    assert bundles.load(copied).manifest.denoiser == denoiser
    with pytest.raises(BundleError) as caught:
        Pipeline.from_pretrained(copied)
    assert caught.value.message.startswith(f"{said}, which this sdrt cannot ")
    assert "newer sdrt" in caught.value.fix


@pytest.mark.parametrize("model", [inpainting, control_net])
def test_a_pipeline_refuses_a_model_to_come(tmp_path: Path, model: Callable[[], Manifest]) -> None:
    """From the manifest alone, before any file is loaded: the files here are empty."""
    made = model()

    def emptied(file: File) -> File:
        (tmp_path / file.path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file.path).touch()
        return dataclasses.replace(file, bytes=0)

    components = {
        name: dataclasses.replace(
            c, artifact=dataclasses.replace(c.artifact, files=tuple(map(emptied, c.artifact.files)))
        )
        for name, c in made.components.items()
    }
    bundles.save(tmp_path, dataclasses.replace(made, components=components, files=tuple(map(emptied, made.files))))
    with pytest.raises(BundleError, match="which this sdrt cannot"):
        Pipeline.from_pretrained(tmp_path)
