"""Damaged bundles and bad arguments: always one clear error, never a traceback, never a file left behind.

Most calls are made in this process, through the same entry point as the command ``sdrt``; a few as real processes.
"""

from __future__ import annotations

import copy
import functools
import gc
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sdrt.cli
from sdrt import bundle as bundles
from tests.conftest import Cli, environment

Main = Callable[..., "Outcome"]
Damage = Callable[[Path], object]


@dataclass(frozen=True)
class Outcome:
    status: object
    out: str
    err: str


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Main:
    """``main("inspect", path)`` runs the CLI here, in a fresh directory. An exception that is no exit fails the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["sdrt", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            sdrt.cli.main()
        return Outcome(caught.value.code, *capfd.readouterr())

    return run


def check(got: Any, status: int, said: str, fix: bool) -> None:
    """The contract of every error on the command line."""
    code, err = (got.status, got.err) if isinstance(got, Outcome) else (got.returncode, got.stderr)
    assert code == status, err
    assert "Traceback" not in err
    assert "Warning" not in err
    err = re.sub(r"^ *\d+ % .*\n", "", err, flags=re.MULTILINE)  # progress, where there is no terminal
    head, _, rest = err.partition("hashes match\n")  # what verify has found out by then
    assert (rest or head).startswith("error: " if status == 1 else "Usage: ")
    assert said in err
    assert ("\n  fix: " in err) == fix, err
    assert len(err) < 1500, "an error is read by a person"


# -- bad arguments ----------------------------------------------------------------------------------------------------

LONG = " ".join(["lighthouse"] * 75 + ["beyond", "the", "edge"])


@dataclass(frozen=True)
class Bad:
    """One call that is refused. ``{bundle}`` stands for the good ONNX bundle."""

    name: str
    arguments: tuple[str, ...]
    said: str
    fix: bool = True
    status: int = 1


def generate(name: str, *arguments: str, said: str, fix: bool = True, status: int = 1, prompt: str = "x") -> Bad:
    """``sdrt generate`` on the null engine, unless the arguments name another."""
    engine = () if "--engine" in arguments else ("--engine", "null")
    return Bad(name, ("generate", prompt, "-m", "{bundle}", *engine, *arguments), said, fix, status)


BAD = [
    generate("width not a multiple of 8", "-W", "100", said="100x128 pixels: both sides must be multiples of 8"),
    generate("height not a multiple of 8", "-H", "127", said="try 128x128"),
    generate("width 0", "-W", "0", said="width is 0, expected 1 to 16384 pixels", fix=False),
    generate("width negative", "-W", "-8", said="width is -8", fix=False),
    generate("width huge", "-W", "1000000000", said="width is 1000000000, expected 1 to 16384", fix=False),
    generate("width no number", "-W", "wide", said="'wide' is not a valid integer", fix=False, status=2),
    generate("steps 0", "--steps", "0", said="is 0, expected an integer of 1 to", fix=False),
    generate("steps 100000", "--steps", "100000", said="is 100000, expected 1 to 1000", fix=False),
    generate("steps pushed out by the offset", "--steps", "1000", said="timestep 1000 is beyond", fix=True),
    generate("guidance NaN", "--cfg-scale", "nan", said="guidance_scale is nan, expected a finite number", fix=False),
    generate("guidance infinite", "--cfg-scale", "inf", said="guidance_scale is inf", fix=False),
    generate("guidance no number", "--cfg-scale", "x", said="'x' is not a valid float", fix=False, status=2),
    generate("prompt of a million characters", prompt="x" * 10**6, said="prompt has 1000000 characters, at most 20000"),
    generate("negative prompt of a million", "-n", "x" * 10**6, said="negative_prompt has 1000000 characters"),
    generate("prompt of 78 tokens", prompt=LONG, said="78 tokens, text_encoder takes 75; beyond them: 'beyond the edge'"),
    generate("prompt of half a character", prompt="\udcff", said="lone surrogate", fix=False),
    generate("batch 0", "--batch", "0", said="is 0, expected an integer of 1 to", fix=False),
    generate("batch 100000", "--batch", "100000", said="100000 pictures in one batch, at most 1024"),
    generate("seed negative", "--seed", "-1", said="seed is -1, expected an integer from 0 to 2^64 - 1", fix=False),
    generate("seed 2^64", "--seed", str(2**64), said="seed is 18446744073709551616", fix=False),
    generate("clip skip too large", "--clip-skip", "3", said="clip_skip is 3, text_encoder has at most 2", fix=False),
    generate("clip skip negative", "--clip-skip", "-1", said="clip_skip is -1, expected an integer", fix=False),
    generate("scheduler unknown", "--scheduler", "Euler b", said="no scheduler 'Euler b'; known schedulers: DDIM"),
    generate("engine unknown", "--engine", "abacus", said="there is no engine 'abacus'; known engines: "),
    generate("engine that is another module", "--engine", "build", said="there is no engine 'build'"),
    generate("engine with dots", "--engine", "..null", said="there is no engine '..null'"),
    generate("device unknown", "--device", "tpu:0", said="null has no device 'tpu:0' here; it has null"),
    generate("device unknown to ORT", "--engine", "onnxruntime", "--device", "CPU:7", said="has no device 'CPU:7'"),
    generate("option unknown", "-O", "warp=9", said="null has no option 'warp'", fix=False),
    generate(
        "option unknown to ORT", "--engine", "onnxruntime", "-O", "warp=9", fix=False,
        said="onnxruntime has no option 'warp'; known options: provider (default ())",
    ),
    generate(
        "option of a wrong type", "--engine", "onnxruntime", "-O", "arena=maybe", fix=False,
        said="onnxruntime option arena: expected true or false, got 'maybe'",
    ),
    generate("option without =", "-O", "arena", said="'arena' is not name=value", fix=False, status=2),
    generate("option without name", "-O", "=1", said="'=1' is not name=value", fix=False, status=2),
    generate("threads 0", "--threads", "0", said="0 is not in the range", fix=False, status=2),
    generate("output directory missing", "-o", "no/where/x.png", said="no/where/x.png: there is no directory no/where"),
    generate("output is a directory", "-o", "folder.png", said="--output folder.png: is a directory"),
    generate("output is no PNG", "-o", "x.jpg", said="--output x.jpg: pictures are written as PNG"),
    generate("output without ending", "-o", "x", said="fix: -o x.png"),
    generate("output empty", "-o", "", said="pictures are written as PNG"),
    generate("output is the root", "-o", "/", said="pictures are written as PNG"),
    generate("output below a file", "-o", "file/x.png", said="there is no directory file"),
    generate("output in /proc", "-o", "/proc/x.png", said="/proc/x.png: cannot be written"),
    generate("output name too long", "-o", "x" * 300 + ".png", said="cannot be written: File name too long"),
    generate("json cannot be written", "--json", "no/where.json", said="no/where.json: cannot be written"),
    Bad("prompt twice", ("generate", "x", "-p", "y", "-m", "{bundle}"), "give the prompt once", fix=False, status=2),
    Bad("prompt not at all", ("generate", "-m", "{bundle}"), "give the prompt once", fix=False, status=2),
    Bad("command unknown", ("paint",), "No such command 'paint'", fix=False, status=2),
    Bad("option unknown to the command", ("inspect", "{bundle}", "--fast"), "No such option", fix=False, status=2),
    Bad("bundle missing", ("generate", "x", "-m", "nowhere"), "nowhere: no such directory"),
    Bad("bundle is empty", ("generate", "x", "-m", "folder.png"), "is not a bundle: sdrt.json is missing"),
    Bad("bundle is a file", ("inspect", "file"), "file: is a file, expected a bundle's directory"),
    Bad("bundle's name too long", ("verify", "x" * 300), ": no such directory"),
    Bad("bundle without a name", ("inspect", ""), "is not a bundle: sdrt.json is missing"),
    Bad("build for nothing", ("build", "{bundle}", "out"), "Missing option '--engine'", fix=False, status=2),
    Bad("build for an unknown engine", ("build", "{bundle}", "out", "--engine", "abacus"), "no engine 'abacus'"),
    *(
        Bad(f"build {name}", ("build", "{bundle}", "out", "--engine", "onnxruntime", *more), said, fix, status)
        for name, more, said, fix, status in (
            ("shape not a multiple of 8", ("--shape", "100x128"), "both sides must be multiples of 8", False, 1),
            ("shape 0x0", ("--shape", "0x0"), "--shape 0x0: both sides must be multiples of 8, and not 0", False, 1),
            ("shape malformed", ("--shape", "512"), "'512' is not WIDTHxHEIGHT", False, 2),
            ("shape negative", ("--shape", "-8x8"), "'-8x8' is not WIDTHxHEIGHT", False, 2),
            ("shape huge", ("--shape", "99992x8"), "--shape 99992x8", False, 1),
            ("batch 0", ("--batch", "0"), "0 is not in the range", False, 2),
            ("precision unknown", ("--precision", "fp31"), "'fp31' is no precision", True, 1),
            ("precision unsupported", ("--precision", "bf16"), "asked for bf16", True, 1),
            ("target unsupported", ("--target", "gfx1100"), "asked for target gfx1100", True, 1),
            ("option unknown", ("-O", "warp=9"), "onnxruntime has no option 'warp'; known options: winograd (default large)", False, 1),
        )
    ),
    Bad("build into a file", ("build", "{bundle}", "file", "--engine", "null"), "exists and is not a directory"),
    Bad("build into a full folder", ("build", "{bundle}", ".", "--engine", "null", "--force"), "is not a bundle, so"),
    Bad("build below a file", ("build", "{bundle}", "file/out", "--engine", "null"), "cannot be written"),
    Bad("build into /proc", ("build", "{bundle}", "/proc/out", "--engine", "null"), "cannot be written"),
    Bad("build into the root", ("build", "{bundle}", "/", "--engine", "null", "--force"), "/: "),
    Bad("export a missing path", ("export", "./nowhere", "out"), "no such directory, and not a Hub id", fix=False),
    Bad("export a file", ("export", "file", "out"), "file: is a single file, expected a directory"),
    Bad("export an empty directory", ("export", "folder.png", "out"), "has no model_index.json"),
    Bad("export a Hub id offline", ("export", "nobody/nothing", "out"), "nobody/nothing: no such directory here, and"),
    Bad("export an odd Hub id", ("export", "a b/c d", "out"), "a b/c d: ", fix=False),
    Bad("export a name too long", ("export", "x" * 300, "out"), "no such directory", fix=False),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_bad_arguments(main: Main, bundle: Path, tmp_path: Path, bad: Bad) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("kept")
    got = main(*(str(bundle) if argument == "{bundle}" else argument for argument in bad.arguments))
    check(got, bad.status, bad.said, bad.fix)
    # Whatever failed, nothing half-made stays; a picture that was made before --json failed may.
    assert set(os.listdir(tmp_path)) <= {"folder.png", "file", "out.png"}
    assert "out.png" not in os.listdir(tmp_path) or "--json" in bad.arguments
    assert (tmp_path / "file").read_text() == "kept"


class TestProcesses:
    """The same contract as seen from a shell: exit status, streams, and warnings that would be errors."""

    def test_sizes(self, cli: Cli, bundle: Path, tmp_path: Path) -> None:
        got = cli("generate", "x", "-m", bundle, "-W", "100", "-o", tmp_path / "x.png")
        check(got, 1, "100x128 pixels", fix=True)
        assert got.stdout == ""
        assert os.listdir(tmp_path) == []

    def test_usage(self, cli: Cli) -> None:
        check(cli("generate", "-m", "nowhere"), 2, "give the prompt once", fix=False)

    def test_missing_weights(self, cli: Cli, copied: Path) -> None:
        (copied / "unet/model.onnx.data").unlink()
        check(cli("generate", "x", "-m", copied), 1, "unet/model.onnx.data is missing", fix=True)

    def test_damaged_weights(self, cli: Cli, copied: Path) -> None:
        flip(copied / "vae_decoder/model.onnx.data", 12345)
        got = cli("verify", copied)
        check(got, 1, "1 of its files are damaged: vae_decoder/model.onnx.data", fix=True)

    def test_debug_shows_the_traceback(self, cli: Cli) -> None:
        got = cli("--debug", "inspect", "nowhere")
        assert got.returncode == 1
        assert "Traceback" in got.stderr
        assert "sdrt.errors.BundleError: nowhere: no such directory" in got.stderr

    def test_a_prompt_too_long_is_cut_when_asked(self, main: Main, bundle: Path, tmp_path: Path) -> None:
        """With a warning, here without the ``-W error`` that the fixture adds, and as if the rest were not there."""
        settings = ("-m", bundle, "--steps", "1", "--seed", "1", "-W", "64", "-H", "64", "-o")
        command = [sys.executable, "-m", "sdrt", "generate", LONG, "--truncate", *settings, "cut.png"]
        got = subprocess.run(
            [*map(str, command)], env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert got.returncode == 0, got.stderr
        assert "has 78 tokens, text_encoder takes 75; beyond them: 'beyond the edge'" in got.stderr
        assert "Traceback" not in got.stderr
        assert ".py:" not in got.stderr, "a warning tells a user what happened, not where in the source"
        assert main("generate", " ".join(LONG.split()[:75]), *settings, "short.png").status == 0
        with Image.open(tmp_path / "cut.png") as cut, Image.open(tmp_path / "short.png") as short:
            assert cut.tobytes() == short.tobytes()


# -- damaged bundles --------------------------------------------------------------------------------------------------


def flip(path: Path, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[bit // 8 % len(raw)] ^= 1 << bit % 8
    path.write_bytes(raw)


def flipped(relative: str, bit: int) -> Damage:
    """Flip one bit of a file, which sdrt.json goes on to describe as it was."""
    return lambda root: flip(root / relative, bit)


def refresh(root: Path, relative: str) -> None:
    """Record a damaged file as it is now, in size and hash: the damage was there before the bundle was made."""

    def fixed(value: Any) -> Any:
        if isinstance(value, list):
            return [fixed(item) for item in value]
        if not isinstance(value, dict):
            return value
        if value.get("path") == relative and "sha256" in value:
            return {
                "path": relative,
                "bytes": (root / relative).stat().st_size,
                "sha256": bundles.sha256(root / relative),
            }
        return {key: fixed(item) for key, item in value.items()}

    edit(root, fixed)


def edit(root: Path, change: Callable[[Any], Any]) -> None:
    """Change sdrt.json: ``change`` returns the new value, or alters the one it is given and returns None."""
    value = json.loads((root / "sdrt.json").read_text(encoding="utf-8"))
    changed = change(value)
    (root / "sdrt.json").write_text(json.dumps(value if changed is None else changed), encoding="utf-8")


def rewritten(relative: str, content: bytes | str | Callable[[bytes], bytes]) -> Damage:
    """Replace a file's content, and record it in sdrt.json."""

    def damage(root: Path) -> None:
        path = root / relative
        if callable(content):
            path.write_bytes(content(path.read_bytes()))
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        refresh(root, relative)

    return damage


def raw_manifest(content: bytes) -> Damage:
    return lambda root: (root / "sdrt.json").write_bytes(content)


def put(*path_and_value: Any) -> Damage:
    """Set one value of sdrt.json."""
    *path, last, value = path_and_value

    def change(manifest: Any) -> None:
        for key in path:
            manifest = manifest[key]
        manifest[last] = value

    return lambda root: edit(root, change)


def drop(*path: Any) -> Damage:
    """Remove one key of sdrt.json."""
    *above, last = path

    def change(manifest: Any) -> None:
        for key in above:
            manifest = manifest[key]
        del manifest[last]

    return lambda root: edit(root, change)


def arrays(relative: str, **arrays_: Any) -> Damage:
    """Replace arrays of an .npz file; None removes one. ``__`` in a name stands for what no keyword can hold."""

    def content(raw: bytes) -> bytes:
        with np.load(io.BytesIO(raw)) as file:
            held = {name: file[name] for name in file.files}
        for name, array in arrays_.items():
            held[name.replace("__", ".")] = array
        out = io.BytesIO()
        np.savez(out, **{name: array for name, array in held.items() if array is not None})
        return out.getvalue()

    return rewritten(relative, content)


def scheduler(**options: Any) -> Damage:
    def content(raw: bytes) -> bytes:
        return json.dumps({**json.loads(raw), **options}).encode()

    return rewritten("scheduler/scheduler_config.json", content)


def vocabulary(change: Callable[[dict[str, Any]], object]) -> Damage:
    def content(raw: bytes) -> bytes:
        value = json.loads(raw)
        change(value)
        return json.dumps(value).encode()

    return rewritten("tokenizer/vocab.json", content)


def link(relative: str, target: str) -> Damage:
    def damage(root: Path) -> None:
        (root / relative).rename(root.parent / "outside")
        (root / relative).symlink_to(target)

    return damage


def _swap(root: Path) -> None:
    """The decoder's files hold the encoder, as they do when somebody copies by hand."""
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copyfile(root / "vae_encoder" / name, root / "vae_decoder" / name)
        refresh(root, f"vae_decoder/{name}")


def _huge_manifest(root: Path) -> None:
    with (root / "sdrt.json").open("wb") as file:
        file.truncate(2**36)  # sparse


def _pickle_npz() -> bytes:
    out = io.BytesIO()
    np.savez(out, x=np.array([{}], object))
    return out.getvalue()


def _single_array() -> bytes:
    out = io.BytesIO()
    np.save(out, np.zeros(32, np.float32))
    return out.getvalue()


def _empty_zip() -> bytes:
    out = io.BytesIO()
    zipfile.ZipFile(out, "w").close()
    return out.getvalue()


def torchs(change: Callable[[str, Any], tuple[str, Any]]) -> Damage:
    """Change name and value of each of torch's outputs in the U-Net's reference vectors."""

    def content(raw: bytes) -> bytes:
        with np.load(io.BytesIO(raw)) as file:
            held = dict(change(name, file[name]) if "/out/" in name else (name, file[name]) for name in file.files)
        out = io.BytesIO()
        np.savez(out, **held)
        return out.getvalue()

    return rewritten("unet/reference.npz", content)


INSPECT = ("inspect",)
VERIFY = ("verify",)
GENERATE = ("generate", "x", "--steps", "1", "--engine", "null", "--clip-skip", "1", "-m")
ORT = ("generate", "x", "--steps", "1", "-m")

vocab = functools.partial(rewritten, "tokenizer/vocab.json")
merges = functools.partial(rewritten, "tokenizer/merges.txt")
config = functools.partial(rewritten, "scheduler/scheduler_config.json")
reference = functools.partial(rewritten, "unet/reference.npz")
constants = functools.partial(rewritten, "text_encoder/constants.npz")
constant = functools.partial(arrays, "text_encoder/constants.npz")
unet = functools.partial(put, "components", "unet")
text = functools.partial(put, "text_encoders", 0)
denoiser = functools.partial(put, "denoiser")


@dataclass(frozen=True)
class Broken:
    name: str
    damage: Damage
    said: str
    command: tuple[str, ...] = INSPECT
    fix: bool = True
    more: tuple[str, ...] = ()


_ROWS: list[tuple[Any, ...]] = [
    ("weights missing", lambda root: (root / "unet/model.onnx.data").unlink(), "unet/model.onnx.data is missing"),
    ("weights truncated", lambda root: os.truncate(root / "unet/model.onnx.data", 4096), "has 4096 bytes, expected"),
    ("weights flipped", flipped("unet/model.onnx.data", 98765), "damaged: unet/model.onnx.data", VERIFY),
    ("graph flipped", flipped("unet/model.onnx", 4321), "damaged: unet/model.onnx", VERIFY),
    ("weights truncated before", rewritten("unet/model.onnx.data", lambda raw: raw[:4096]), "cannot load", ORT),
    ("weights empty", rewritten("unet/model.onnx.data", b""), "cannot load", ORT),
    ("graph truncated", rewritten("unet/model.onnx", lambda raw: raw[:5000]), "cannot load model.onnx", ORT),
    ("graph empty", rewritten("unet/model.onnx", b""), "onnxruntime", ORT),
    ("graph is text", rewritten("unet/model.onnx", "<html>404</html>"), "cannot load model.onnx", ORT),
    ("graph of another component", _swap, "vae_decoder", ORT),
    ("manifest huge", _huge_manifest, "sdrt.json: larger than 16777216 bytes", INSPECT, False),
    ("manifest binary", raw_manifest(bytes(range(256))), "not valid JSON", INSPECT, False),
    ("manifest empty", raw_manifest(b""), "not valid JSON", INSPECT, False),
    ("manifest deep", raw_manifest(b'{"a":' * 100_000), "nested more than 32 levels deep", INSPECT, False),
    ("manifest truncated", lambda root: os.truncate(root / "sdrt.json", 5000), "not valid JSON", INSPECT, False),
    ("manifest of another program", raw_manifest(b'{"name": "left-pad"}'), "is not an sdrt manifest", INSPECT, False),
    ("manifest of the future", put("version", 2), "has version 2, this sdrt reads version 1"),
    ("manifest of the past", put("version", 0), "has version 0, this sdrt reads version 1"),
    ("key missing", drop("latents", "channels"), "missing key 'channels'", INSPECT, False),
    ("key unknown", put("latents", "colour", 1), "sdrt.json.latents: unknown key 'colour'", INSPECT, False),
    ("type wrong", put("latents", "channels", "4"), "sdrt.json.latents.channels: expected an integer", INSPECT, False),
    *(
        (f"path {path!r}", put("files", 0, "path", path), f"path {path!r} leaves the bundle", INSPECT, False)
        for path in ("../x", "a/../../x", "/etc/passwd", "..\\x", "C:\\x")
    ),
    ("scheduler's path", put("scheduler", "../x"), "leaves the bundle", GENERATE, False),
    ("tokenizer's path", text("tokenizer", "/etc"), "leaves the bundle", GENERATE, False),
    ("link to a file outside", link("unet/model.onnx", "../../outside"), "outside the bundle"),
    ("link to a folder outside", link("unet", "../outside"), "outside the bundle"),
    ("link to nothing", link("unet/model.onnx", "nowhere"), "unet/model.onnx is missing"),
    ("link to itself", link("unet/model.onnx", "model.onnx"), "unet/model.onnx"),
    ("file listed twice", put("files", 0, "path", "unet/model.onnx"), "model.onnx is listed twice", INSPECT, False),
    ("folder as a file", put("files", 0, "path", "unet"), "unet is not a file"),
    ("component missing", drop("components", "vae_decoder"),
           "has no component 'vae_decoder'; it holds text_encoder, unet, vae_encoder", GENERATE),
    ("half a character", put("family", "\ud800"), "lone surrogate", INSPECT, False),
    ("source unknown", denoiser("inputs", "sample", ["sketch"]), "fed by 'sketch', which", GENERATE),
    ("pooled text that no encoder gives", denoiser("inputs", "encoder_hidden_states", ["text.pooled"]),
           "text.pooled", GENERATE),
    ("no source", denoiser("inputs", "sample", []), "denoiser", GENERATE, False),
    ("no text encoder", put("text_encoders", []), "has no text encoder", GENERATE),
    ("denoiser's output unknown", denoiser("output", "noise"), "'noise'", GENERATE, False),
    ("hidden states unknown", text("hidden_states", "hidden"), "'hidden'", GENERATE, False),
    ("a layer too many", text("clip_skip", "layers", 9), "'hidden_states.", GENERATE, False),
    ("norm unknown", text("clip_skip", "weight", "w"), "'w'", GENERATE),
    ("end token unknown", text("eos_token", "<end>"), "has no token '<end>'", GENERATE, False),
    ("special token empty", text("pad_token", ""), "must not be empty", GENERATE, False),
    ("tokens in bf16", put("components", "text_encoder", "inputs", 0, "dtype", "bf16"), "bf16", GENERATE, False),
    ("tokens in f32", put("components", "text_encoder", "inputs", 0, "dtype", "f32"), "input_ids", VERIFY),
    ("denoiser's output of another rank", unet("outputs", 0, "shape", ["B", 4]), "out_sample", GENERATE),
    ("picture of another rank", put("components", "vae_decoder", "outputs", 0, "shape", ["B"]), "sample", GENERATE),
    ("symbol from nowhere", unet("outputs", 0, "shape", ["B", 4, "Y/8", "W/8"]), "Y", GENERATE, False),
    ("channels of another model", put("latents", "channels", 16), "input sample is f32[2,16,16,16]", GENERATE),
    ("size without end", put("latents", "default_width", 2**60), "default_width", GENERATE, False),
    ("downscale 3", put("latents", "downscale", 3), "128x128 pixels: both sides must be multiples of 3", GENERATE),
    ("engine unknown", unet("artifact", "engine", "abacus"), "there is no engine 'abacus'", ORT),
    ("vocabulary not JSON", vocab("{"), "vocab.json: not valid JSON", GENERATE, False),
    ("vocabulary a list", vocab("[]"), "is not an object of token ids", GENERATE, False),
    ("vocabulary empty", vocab("{}"), "is not an object of token ids", GENERATE, False),
    ("vocabulary without a byte", vocabulary(lambda v: v.pop("!")), "vocab.json: has no token '!'", GENERATE, False),
    ("vocabulary without the end", vocabulary(lambda v: v.pop("<|endoftext|>")), "has no token", GENERATE, False),
    ("vocabulary of texts", vocabulary(lambda v: v.update({"!": "0"})), "is not an object of token", GENERATE, False),
    ("token id beyond 64 bits", vocabulary(lambda v: v.update({"x</w>": 10**30})), "vocab.json", GENERATE, False),
    ("token id beyond the table", vocabulary(lambda v: v.update({"x</w>": 10**6})), "text_encoder", ORT, False),
    ("vocabulary binary", vocab(b"\xff\xfe\x00"), "vocab.json: not valid JSON", GENERATE, False),
    ("merges binary", merges(b"\xff\xfe"), "merges.txt: is not UTF-8", GENERATE, False),
    ("merges of another vocabulary", merges("#version: 0.2\ni n\nqqq www\n"),
           "merges.txt: line 3 is not a merge of this vocabulary: 'qqq www'", GENERATE, False),
    ("merges cut off", merges(lambda raw: raw[: raw.index(b" ", 5000)]), "is not a merge", GENERATE, False),
    ("scheduler not JSON", config("beta: 1"), "scheduler_config.json: not valid JSON", GENERATE, False),
    ("scheduler a list", config("[1]"), "scheduler_config.json: expected an object", GENERATE, False),
    ("scheduler missing", put("scheduler", "scheduler/other.json"), "other.json: cannot be read", GENERATE, False),
    ("scheduler without class", config("{}"), "there is no scheduler None", GENERATE),
    ("scheduler of another class", scheduler(_class_name="RePaintScheduler"), "no scheduler 'RePaintScheduler'", GENERATE),
    ("scheduler's class a list", scheduler(_class_name=["DDIM"]), "there is no scheduler ['DDIM']", GENERATE),
    ("scheduler's type wrong", scheduler(beta_start="small"), "PNDMScheduler: beta_start: expected", GENERATE, False),
    ("scheduler's beta out of range", scheduler(beta_end=1.5), "must lie between 0 and 1", GENERATE, False),
    ("scheduler's steps", scheduler(num_train_timesteps=0), "num_train_timesteps is 0", GENERATE, False),
    ("scheduler's betas", scheduler(trained_betas=[0.1]), "trained_betas has 1 values, expected 1000", GENERATE, False),
    ("scheduler's betas out of range", scheduler(trained_betas=[2.0] * 1000), "trained_betas", GENERATE, False),
    ("prediction unknown", scheduler(prediction_type="flow"), "prediction_type: expected 'epsilon'", GENERATE, False),
    ("thresholding", scheduler(_class_name="DPMSolverMultistepScheduler", thresholding=True, sample_max_value=0.0),
           "sample_max_value is 0.0, expected 0.001 to 1e+09", GENERATE, False),
    ("solver without a formula", scheduler(_class_name="DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver", solver_order=3),
           "solver_order=3 is not supported", GENERATE, False),
    ("Runge-Kutta", scheduler(skip_prk_steps=False), "PNDMScheduler: skip_prk_steps=False wants 4 steps or more", GENERATE),
    ("reference flipped", flipped("unet/reference.npz", 9999), "damaged: unet/reference.npz", VERIFY),
    ("reference truncated", reference(lambda raw: raw[:-99]), "reference.npz: cannot be read", VERIFY),
    ("reference no zip", reference(b"x" * 99), "reference.npz: cannot be read", VERIFY),
    ("reference a pickle", reference(_pickle_npz()), "reference.npz: cannot be read", VERIFY),
    ("reference a single array", reference(_single_array()), "cannot be read", VERIFY),
    ("reference empty", reference(_empty_zip()), "unet", VERIFY),
    ("reference misnamed", torchs(lambda name, a: (name.replace("/out/", "/aus/"), a)), "is not <case>/in|out/", VERIFY, False),
    ("reference of another output", torchs(lambda name, a: (name.replace("out_sample", "noise"), a)), "noise", VERIFY),
    ("reference of another shape", torchs(lambda name, a: (name, a[..., :3])), "out_sample", VERIFY),
    ("reference NaN", torchs(lambda name, a: (name, a * np.float32("nan"))), "unet: not what the reference vectors say", VERIFY,
           True, ("--json", "verify.json")),
    ("constants flipped", flipped("text_encoder/constants.npz", 3000), "constants.npz", VERIFY),
    ("constants flipped before", constants(lambda raw: raw[:300] + b"x" + raw[301:]),
           "constants.npz: cannot be read", GENERATE),
    ("constants no zip", constants(b"x"), "constants.npz: cannot be read", GENERATE),
    ("constants a single array", constants(_single_array()), "cannot be read", GENERATE),
    ("constant missing", constant(final_layer_norm__bias=None), "final_layer_norm.bias", GENERATE),
    ("constant of another shape", constant(final_layer_norm__bias=np.zeros(7, np.float32)),
           "final_layer_norm.bias", GENERATE),
    ("constant NaN", constant(final_layer_norm__bias=np.full(32, np.nan, np.float32)),
           "text_encoder: hidden_states is not finite", GENERATE),
]  # fmt: skip
BROKEN = [Broken(*row) for row in _ROWS]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_broken_bundles(main: Main, copied: Path, broken: Broken) -> None:
    broken.damage(copied)
    before = set(os.listdir(copied.parent))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = main(*broken.command, copied, *broken.more)
        gc.collect()  # an unclosed file is an error too
    check(got, 1, broken.said, broken.fix)
    assert set(os.listdir(copied.parent)) - before <= {*broken.more}


@pytest.mark.parametrize("part", ["unet", "vae_decoder", "text_encoder"])
def test_flipped_weights_are_refused_or_harmless(main: Main, copied: Path, part: str) -> None:
    """``generate`` does not read all hashes: what a flipped bit does to the numbers it may do, or it is an error."""
    rng = random.Random(part)
    for name in ("model.onnx", "model.onnx.data"):
        path = copied / part / name
        good = path.read_bytes()
        for _ in range(4):
            flip(path, rng.randrange(8 * len(good)))
            got = main("generate", "x", "-m", copied, "--steps", "1", "-W", "64", "-H", "64", "--seed", "1")
            assert got.status in (0, 1)
            if got.status == 1:
                check(got, 1, "", fix="\n  fix: " in got.err)
            check(main("verify", copied), 1, f"damaged: {part}/{name}", fix=True)
            path.write_bytes(good)


def test_a_flipped_manifest_is_refused_or_harmless(main: Main, copied: Path) -> None:
    path = copied / "sdrt.json"
    good = path.read_bytes()
    rng = random.Random(1)
    refused = 0
    for _ in range(150):
        flip(path, rng.randrange(8 * len(good)))
        got = main("generate", "x", "-m", copied, "--steps", "1", "--engine", "null", "--clip-skip", "1")
        assert got.status in (0, 1)
        if got.status == 1:
            check(got, 1, "", fix="\n  fix: " in got.err)
            refused += 1
        path.write_bytes(good)
    assert refused > 50


def test_a_mutated_manifest_is_refused_or_harmless(main: Main, copied: Path) -> None:
    """As above, but the JSON stays JSON, so that the damage gets deeper."""
    path = copied / "sdrt.json"
    good = json.loads(path.read_text(encoding="utf-8"))
    values: list[Any] = [
        None, True, 0, 1, -1, 3.5, 1e300, 2**63, "", "x", "B", "Z/8", "f32", "bf16", "unet", "a/b", "unet/model.onnx",
        "latents", "text.pooled", "hidden_states", [], {}, ["x"], [[]], {"a": 1}, "x" * 300,
    ]  # fmt: skip
    rng = random.Random(2)
    for _ in range(150):
        mutated = copy.deepcopy(good)
        parent, key = mutated, rng.choice(["components", "text_encoders", "denoiser", "latents", "scheduler", "files"])
        while isinstance(parent[key], (dict, list)) and parent[key] and rng.random() < 0.9:
            parent = parent[key]
            key = rng.choice([*parent]) if isinstance(parent, dict) else rng.randrange(len(parent))
        if rng.random() < 0.25:
            del parent[key]
        else:
            parent[key] = rng.choice(values)
        path.write_text(json.dumps(mutated), encoding="utf-8")
        for command in (GENERATE, INSPECT):
            got = main(*command, copied)
            assert got.status in (0, 1)
            if got.status == 1:
                check(got, 1, "", fix="\n  fix: " in got.err)


# -- built bundles ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory, bundle: Path, cli: Cli) -> Path:
    """Built for one size and one picture."""
    path = tmp_path_factory.mktemp("fixed") / "bundle"
    done = cli("build", bundle, path, "--engine", "onnxruntime", "--shape", "64x64", "--batch", "1")
    assert done.returncode == 0, done.stderr
    return path


def test_a_size_that_was_not_built(main: Main, fixed: Path) -> None:
    got = main("generate", "x", "-m", fixed, "-W", "128", "-H", "64")
    check(got, 1, "unet: this artifact was built for ", fix=True)
    assert "--shape 128x64" in got.err


def test_a_batch_that_was_not_built(main: Main, fixed: Path) -> None:
    got = main("generate", "x", "-m", fixed, "-W", "64", "-H", "64", "--batch", "2")
    check(got, 1, "this artifact was built for B=1..2", fix=True)


def test_what_was_built_runs(main: Main, fixed: Path) -> None:
    assert main("generate", "x", "-m", fixed, "-W", "64", "-H", "64", "--steps", "1").status == 0


def test_another_engines_bundle(main: Main, fixed: Path) -> None:
    got = main("build", fixed, "out", "--engine", "onnxruntime")
    check(got, 1, "text_encoder is built for onnxruntime already; build starts from ONNX", fix=True)
    assert not Path("out").exists()


def test_out_exists(main: Main, bundle: Path, fixed: Path) -> None:
    before = (fixed / "sdrt.json").read_bytes()
    got = main("build", bundle, fixed, "--engine", "onnxruntime")
    check(got, 1, f"{fixed}: exists", fix=True)
    assert "--force" in got.err
    assert (fixed / "sdrt.json").read_bytes() == before


# -- damaged checkpoints ----------------------------------------------------------------------------------------------


def _pickled(root: Path) -> None:
    (root / "unet/diffusion_pytorch_model.safetensors").rename(root / "unet/diffusion_pytorch_model.bin")


def _index(**change: Any) -> Damage:
    def damage(root: Path) -> None:
        value = json.loads((root / "model_index.json").read_text(encoding="utf-8"))
        (root / "model_index.json").write_text(json.dumps({**value, **change}), encoding="utf-8")

    return damage


def _config(folder: str, **change: Any) -> Damage:
    def damage(root: Path) -> None:
        path = root / folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **change}), encoding="utf-8")

    return damage


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        pytest.param(_pickled, "unet has its weights in diffusion_pytorch_model.bin, a pickle", id="pickle"),
        pytest.param(_index(_class_name="FluxPipeline"), "no supported model family fits", id="family"),
        pytest.param(_config("unet", use_linear_projection=True), "no supported model family fits", id="SD 2"),
        pytest.param(_config("unet", in_channels=9), "in_channels is 9, expected 4", id="inpainting"),
        pytest.param(lambda root: (root / "model_index.json").write_text("{"), "not valid JSON", id="index not JSON"),
        pytest.param(
            lambda root: (root / "unet/config.json").unlink(), "unet/config.json: cannot be read", id="no config"
        ),
        pytest.param(lambda root: shutil.rmtree(root / "vae"), "vae/config.json: cannot be read", id="no VAE"),
        pytest.param(
            lambda root: (root / "vae/diffusion_pytorch_model.safetensors").unlink(),
            "vae has no safetensors",
            id="no weights",
        ),
    ],
)
def test_broken_checkpoints(main: Main, checkpoint: Path, tmp_path: Path, damage: Damage, said: str) -> None:
    """Found before anything is traced: the weights are linked, not copied."""
    copy_ = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, copy_)
    damage(copy_)
    check(main("export", copy_, "out"), 1, said, fix=True)
    assert os.listdir(tmp_path) == ["checkpoint"]
