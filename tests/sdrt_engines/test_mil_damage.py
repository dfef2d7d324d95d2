"""Damaged Core ML packages: parity or the hashes tell, and nothing but sdrt's own errors comes out."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdrt import bundle as bundles
from sdrt.engine import BuildOptions, OpenOptions, open_session
from sdrt.errors import BundleError, NumericsError, SdrtError
from sdrt.verify import FLOOR_DB, measure
from sdrt_engines.build import build
from sdrt_engines.mil.evaluate import evaluate
from sdrt_engines.mil.kernels import KERNELS
from sdrt_engines.mil.package import MANIFEST, MODEL, WEIGHTS, read
from tests.conftest import Cli

pytest.importorskip("coremltools")
Model_pb2 = pytest.importorskip("coremltools.proto.Model_pb2")

PACKAGES = {"text_encoder": "TextEncoder", "unet": "Unet", "vae_decoder": "VAEDecoder"}


@pytest.fixture(scope="module")
def built(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "coreml"
    build(bundle, out, "coreml", BuildOptions(shapes=((64, 64),)))
    return out


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "copy"))


def package(root: Path, name: str) -> Path:
    return next(root.rglob(f"{PACKAGES[name]}.mlpackage"))


def worst(root: Path, name: str) -> float:
    """The lowest PSNR of a component's outputs; NaN is the worst."""
    held = bundles.load(root)
    session = open_session(held, name, device="verifier", options=OpenOptions())
    found = [figure.psnr for figure in measure(held, name, session)]
    session.close()
    assert found
    return min(math.inf if psnr is None else -math.inf if math.isnan(psnr) else psnr for psnr in found)


@pytest.mark.parametrize("name", PACKAGES)
def test_whole(built: Path, name: str) -> None:
    assert worst(built, name) >= FLOOR_DB["fp32"]
    assert not bundles.damaged(bundles.load(built), lambda _: None)


# -- values ------------------------------------------------------------------------------------------------------------


def operations(spec: Any) -> Any:
    (function,) = spec.mlProgram.functions.values()
    return function.block_specializations[function.opset].operations


def of_kind(spec: Any, kind: str, last: bool = False) -> Any:
    return [op for op in operations(spec) if op.type == kind][-1 if last else 0]


def parameter(spec: Any, op: Any, name: str) -> Any:
    """The constant that is given to an operation."""
    wanted = op.inputs[name].arguments[0].name
    made = next(op for op in operations(spec) if op.type == "const" and op.outputs[0].name == wanted)
    return made.attributes["val"]


def accepted(root: Path, file: Path) -> None:
    """Let a bundle's manifest say what the file is now, so that its size does not give it away."""
    manifest = root / bundles.MANIFEST
    told = json.loads(manifest.read_bytes())
    relative = file.relative_to(root).as_posix()

    def visit(value: Any) -> None:
        if isinstance(value, dict) and value.get("path") == relative:
            value.update(bytes=file.stat().st_size, sha256=hashlib.sha256(file.read_bytes()).hexdigest())
        for below in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            visit(below)

    visit(told)
    manifest.write_text(json.dumps(told))
    assert not bundles.damaged(bundles.load(root), lambda _: None)


def edited(root: Path, name: str, edit: Callable[[Any], object]) -> None:
    folder = package(root, name)
    spec = Model_pb2.Model()
    spec.ParseFromString((folder / MODEL).read_bytes())
    before = spec.SerializeToString(deterministic=True)
    edit(spec)
    assert spec.SerializeToString(deterministic=True) != before
    (folder / MODEL).write_bytes(spec.SerializeToString())
    accepted(root, folder / MODEL)


def fails(root: Path, name: str) -> bool:
    """Whether a damaged component is noticed without hashes: an error of ours, or parity below the floor."""
    try:
        return worst(root, name) < FLOOR_DB["fp32"]
    except (BundleError, NumericsError):
        return True


@pytest.mark.parametrize(("name", "kind", "given"), [
    ("text_encoder", "linear", "weight"), ("text_encoder", "linear", "bias"), ("text_encoder", "layer_norm", "gamma"),
    ("unet", "conv", "weight"), ("unet", "conv", "bias"), ("unet", "linear", "weight"), ("unet", "layer_norm", "beta"),
    ("vae_decoder", "conv", "weight"), ("vae_decoder", "linear", "weight"),
])  # fmt: skip
def test_one_value(copy: Path, name: str, kind: str, given: str) -> None:
    spec = Model_pb2.Model()
    spec.ParseFromString((package(copy, name) / MODEL).read_bytes())
    value = parameter(spec, of_kind(spec, kind), given)
    assert value.WhichOneof("value") == "blobFileValue"
    path = package(copy, name) / WEIGHTS
    raw = bytearray(path.read_bytes())
    at = value.blobFileValue.offset
    start, size = (int.from_bytes(raw[at + i : at + i + 8], "little") for i in (16, 8))
    middle = start + size // 8 * 4
    held = np.frombuffer(raw[middle : middle + 4], np.float32)
    raw[middle : middle + 4] = (held + np.float32(3)).tobytes()
    path.write_bytes(raw)
    assert fails(copy, name)
    assert bundles.damaged(bundles.load(copy), lambda _: None) == [path.relative_to(copy).as_posix()]


def test_verify_says_which(copy: Path, cli: Cli) -> None:
    path = package(copy, "unet") / WEIGHTS
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x40
    path.write_bytes(raw)
    done = cli("verify", copy, "--device", "verifier")
    assert done.returncode == 1
    assert "Unet.mlpackage/Data/com.apple.CoreML/weights/weight.bin" in done.stderr


def renamed(kind: str, to: str, last: bool = False) -> Callable[[Any], object]:
    def edit(spec: Any) -> None:
        of_kind(spec, kind, last).type = to

    return edit


def changed(kind: str, given: str, values: list[Any], last: bool = False) -> Callable[[Any], object]:
    """Another constant for one parameter: immediate values, as many as there are."""

    def edit(spec: Any) -> None:
        tensor = parameter(spec, of_kind(spec, kind, last), given).immediateValue.tensor
        held = getattr(tensor, tensor.WhichOneof("value"))
        assert len(held.values) == len(values)
        held.values[:] = values

    return edit


def swapped(kind: str, one: str, other: str) -> Callable[[Any], object]:
    def edit(spec: Any) -> None:
        inputs = of_kind(spec, kind).inputs
        name, to = (inputs[given].arguments[0].name for given in (one, other))
        inputs[one].arguments[0].name, inputs[other].arguments[0].name = to, name

    return edit


EDITS: list[tuple[str, Callable[[Any], object]]] = [
    ("unet", renamed("silu", "relu")), ("unet", renamed("silu", "sigmoid", last=True)), ("unet", renamed("add", "sub")),
    ("unet", renamed("add", "maximum", last=True)), ("unet", renamed("sin", "cos")), ("unet", renamed("mul", "add", last=True)),
    ("unet", renamed("conv", "linear")), ("unet", renamed("softmax", "unheard_of")),
    ("unet", changed("instance_norm", "epsilon", [1e-2])), ("unet", changed("layer_norm", "epsilon", [1e-1], last=True)),
    ("unet", changed("softmax", "axis", [1])), ("unet", changed("conv", "strides", [2, 1])), ("unet", changed("conv", "strides", [0, 1])),
    ("unet", changed("conv", "dilations", [1, 2])), ("unet", changed("conv", "pad", [0, 2, 1, 1])), ("unet", changed("conv", "pad", [2**30] * 4)),
    ("unet", changed("conv", "groups", [2])), ("unet", changed("conv", "groups", [0])),
    ("unet", changed("upsample_nearest_neighbor", "scale_factor_height", [2**30])),
    ("unet", changed("matmul", "transpose_y", [False])), ("unet", changed("gelu", "mode", ["SIGMOID_APPROXIMATION"])),
    ("unet", changed("concat", "axis", [0])), ("unet", swapped("matmul", "x", "y")),
    ("vae_decoder", renamed("silu", "tanh")), ("vae_decoder", changed("instance_norm", "epsilon", [1e-2], last=True)),
    ("vae_decoder", changed("softmax", "axis", [0])), ("vae_decoder", changed("transpose", "perm", [0, 1, 2])),
    ("text_encoder", renamed("sigmoid", "tanh")), ("text_encoder", changed("layer_norm", "axes", [1])),
    ("text_encoder", changed("layer_norm", "epsilon", [1e-2])), ("text_encoder", changed("softmax", "axis", [1])),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(EDITS)))
def test_one_operation(copy: Path, case: int) -> None:
    name, edit = EDITS[case]
    edited(copy, name, edit)
    assert fails(copy, name)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def decoder(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(package(built, "vae_decoder"), tmp_path / "x.mlpackage"))


def told(**changes: Any) -> Callable[[Path], object]:
    """Another manifest. path: of the model."""

    def damage(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if "path" in changes:
            manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] = changes["path"]
        manifest |= {name: value for name, value in changes.items() if name != "path"}
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return damage


def written(file: str, make: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(make((folder / file).read_bytes()))


def replaced(file: str, by: Callable[[Path], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        (folder / file).unlink()
        by(folder / file)

    return damage


def respecified(edit: Callable[[Any], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        spec = Model_pb2.Model()
        spec.ParseFromString((folder / MODEL).read_bytes())
        edit(spec)
        (folder / MODEL).write_bytes(spec.SerializeToString())

    return damage


def stored(spec: Any) -> Any:
    """The first constant that lies in the weight file: its place."""
    held = (op.attributes["val"] for op in operations(spec) if op.type == "const")
    return next(value.blobFileValue for value in held if value.WhichOneof("value") == "blobFileValue")


def elsewhere(name: str) -> Callable[[Path], object]:
    return respecified(lambda spec: setattr(stored(spec), "fileName", name))


def offset(value: int) -> Callable[[Path], object]:
    return respecified(lambda spec: setattr(stored(spec), "offset", value))


def function_of(spec: Any) -> Any:
    return next(iter(spec.mlProgram.functions.values()))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "weights cut": written(WEIGHTS, lambda raw: raw[: len(raw) // 2]), "weights empty": written(WEIGHTS, lambda raw: b""),
    "weights missing": replaced(WEIGHTS, lambda file: None), "weights a folder": replaced(WEIGHTS, Path.mkdir),
    "weights a pipe": replaced(WEIGHTS, os.mkfifo), "weights garbage": written(WEIGHTS, lambda raw: bytes(len(raw))),
    "model garbage": written(MODEL, lambda raw: np.random.default_rng(0).bytes(len(raw))), "model empty": written(MODEL, lambda raw: b""),
    "model cut": written(MODEL, lambda raw: raw[: len(raw) // 2]), "model missing": replaced(MODEL, lambda file: None),
    "model a folder": replaced(MODEL, Path.mkdir), "model a pipe": replaced(MODEL, os.mkfifo),
    "manifest missing": replaced(MANIFEST, lambda file: None), "manifest garbage": written(MANIFEST, lambda raw: b"\xff{"),
    "manifest a list": written(MANIFEST, lambda raw: b"[]"), "no root": told(rootModelIdentifier="x"), "no entries": told(itemInfoEntries={}),
    **{f"model at {path!r}": told(path=path) for path in ("../../x", "/etc/passwd", "", ".", "com.apple.CoreML/../../../x", "a\\b", 7, None)},
    **{f"weights at {name!r}": elsewhere(name) for name in (
        "@model_path/../../../x", "/etc/passwd", "@model_path//etc/passwd", "", "@model_path/", "x", "@model_path/weights", "\0")},
    **{f"offset {value}": offset(value) for value in (0, 1, 63, 1 << 20, 2**63, 2**64 - 1)},
    "other type": respecified(lambda spec: spec.neuralNetwork.SetInParent()),
    "no function": respecified(lambda spec: spec.mlProgram.functions.clear()),
    "no operations": respecified(lambda spec: function_of(spec).block_specializations.clear()),
    "other operations": respecified(lambda spec: setattr(function_of(spec), "opset", "CoreML99")),
    "no value": respecified(lambda spec: operations(spec)[0].attributes.pop("val")),
    "no argument": respecified(lambda spec: of_kind(spec, "conv").inputs["x"].ClearField("arguments")),
    "unknown argument": respecified(lambda spec: setattr(of_kind(spec, "conv").inputs["x"].arguments[0], "name", "x")),
    "unknown output": respecified(lambda spec: function_of(spec).block_specializations[function_of(spec).opset].outputs.append("x")),
    "twice": respecified(lambda spec: operations(spec).append(operations(spec)[0])),
    "unknown type": respecified(lambda spec: setattr(of_kind(spec, "conv").outputs[0].type.tensorType, "dataType", 77)),
    "size not fixed": respecified(
        lambda spec: of_kind(spec, "conv").outputs[0].type.tensorType.dimensions[0].unknown.SetInParent()),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_files(decoder: Path, what: str) -> None:
    assert read(decoder).functions
    DAMAGE[what](decoder)
    with pytest.raises(BundleError):
        read(decoder)


def test_other_inputs(decoder: Path) -> None:
    (function,) = read(decoder).functions.values()
    z = np.zeros(function.inputs[0].shape, np.float32)
    for feeds in ({}, {"x": z}, {function.inputs[0].name: z[..., :-1]}):
        with pytest.raises(BundleError):
            evaluate(function, feeds)


# -- anything ----------------------------------------------------------------------------------------------------------


def mutant(raw: bytes, seed: int) -> bytes:
    """A few bytes that are others: any, or one bit away."""
    random = np.random.default_rng(seed)
    data = bytearray(raw)
    for at in random.integers(0, len(raw), random.integers(1, 9)):
        data[at] = random.integers(256) if seed % 2 else data[at] ^ 1 << int(random.integers(8))
    return bytes(data)


NUMBERS = (0, 1, -1, 2, 3, 7, -2, 64, 1 << 16, (1 << 31) - 1, -(1 << 31))


def other(raw: bytes, seed: int) -> bytes:
    """The same program with another constant, operation, argument, type or size."""
    random = np.random.default_rng(seed)

    def one(several: Any) -> Any:
        return several[random.integers(len(several))]

    spec = Model_pb2.Model()
    spec.ParseFromString(raw)
    every = operations(spec)
    op = one([op for op in every if (op.type == "const") == (seed % 2 == 0)])
    tensor = one(op.outputs).type.tensorType
    if op.type != "const":
        what = random.integers(3)
        if what == 0:
            op.type = one([*KERNELS, "const"])
        elif what == 1:
            op.inputs[one(list(op.inputs))].arguments[0].name = one(one(every).outputs).name
        elif tensor.dimensions:
            one(tensor.dimensions).constant.size = abs(one(NUMBERS))
        else:
            tensor.dataType = one((1, 10, 11, 21, 23, 31, 35))
    elif (held := op.attributes["val"]).WhichOneof("value") == "immediateValue":
        values = getattr(held.immediateValue.tensor, held.immediateValue.tensor.WhichOneof("value")).values
        if isinstance(values, bytes):
            return mutant(raw, seed)
        at = random.integers(len(values))
        if isinstance(values[at], bool):
            values[at] = not values[at]
        else:
            values[at] = type(values[at])(one(NUMBERS))
    else:
        held.blobFileValue.offset = 64 * random.integers(4096)
    return spec.SerializeToString()


def survived(folder: Path, mutate: Callable[[bytes, int], bytes], seconds: float) -> tuple[int, int]:
    """(mutants, those that could be evaluated). Whatever is no error of ours comes out."""
    raw, seeds = (folder / MODEL).read_bytes(), itertools.count()
    made = evaluated = 0
    until = time.process_time() + seconds
    while time.process_time() < until:
        (folder / MODEL).write_bytes(mutate(raw, next(seeds)))
        made += 1
        try:
            held = read(folder)
            function = held.functions[held.default]
            feeds = {
                told.name: np.zeros(told.shape, told.dtype) for told in function.inputs if math.prod(told.shape) < 1e6
            }
            evaluate(function, feeds)
            evaluated += 1
        except SdrtError:
            pass
    return made, evaluated


@pytest.mark.parametrize("name", ["vae_decoder", "text_encoder"])
@pytest.mark.parametrize("mutate", [mutant, other])
def test_anything(built: Path, tmp_path: Path, name: str, mutate: Callable[[bytes, int], bytes]) -> None:
    folder = Path(shutil.copytree(package(built, name), tmp_path / "x.mlpackage"))
    made, evaluated = survived(folder, mutate, 1.5)
    assert made > evaluated > 0
