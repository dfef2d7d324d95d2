"""Compiled models that are kept: used again, and never to be trusted blindly."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdrt import InputError
from sdrt.engine import BuildOptions, OpenOptions, engine_names, find_engine, open_session
from sdrt.pipeline import Pipeline
from sdrt_engines.build import build
from sdrt_engines.checked_cache import checked

pytest.importorskip("openvino")
ARGUMENTS: dict[str, Any] = {
    "width": 64, "height": 64, "num_inference_steps": 2, "seed": 1, "scheduler": "DDIM", "output_type": "np"
}  # fmt: skip


@pytest.fixture(scope="module")
def built(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "ov"
    build(bundle, out, "openvino")
    return out


def picture(path: Path, cache: Path | None) -> Any:
    with Pipeline.from_pretrained(path, cache=cache) as pipe:
        return pipe("a fox", **ARGUMENTS).images


@pytest.fixture(scope="module")
def expected(built: Path) -> Any:
    return picture(built, None)


@pytest.fixture(scope="module")
def filled(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds what one picture needs."""
    cache = tmp_path_factory.mktemp("cache") / "made" / "by sdrt"
    picture(built, cache)
    return cache


def contents(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(cache.glob("*.blob"))}


def written(cache: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted(cache.glob("*.blob"))}


def test_what_was_compiled_is_used_again(built: Path, filled: Path, expected: Any) -> None:
    before = written(filled)
    assert len(before) == 3
    np.testing.assert_array_equal(picture(built, filled), expected)
    assert written(filled) == before


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(share: float) -> Callable[[bytes], bytes]:
    def flip(data: bytes) -> bytes:
        at = int(share * len(data))
        return data[:at] + bytes(byte ^ 0x41 for byte in data[at : at + 64]) + data[at + 64 :]

    return flip


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", cut, lambda data: np.random.default_rng(0).bytes(len(data)),
     *map(flipped, (0.0005, 0.002, 0.01, 0.5, 0.99))],
    ids=["empty", "cut", "garbage", "header", "constants", "early", "middle", "end"],
)  # fmt: skip
def test_damage_costs_time_alone(
    built: Path, filled: Path, expected: Any, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    cache = Path(shutil.copytree(filled, tmp_path / "cache"))
    damaged = {name: damage(data) for name, data in contents(cache).items()}
    for name, data in damaged.items():
        (cache / name).write_bytes(data)
    np.testing.assert_array_equal(picture(built, cache), expected)
    assert all(contents(cache)[name] != data for name, data in damaged.items()), "compiled anew"
    healed = written(cache)
    np.testing.assert_array_equal(picture(built, cache), expected)
    assert written(cache) == healed


def test_weights_stay_in_the_bundle(built: Path, filled: Path, tmp_path: Path, expected: Any) -> None:
    """Of the same graph with other weights nothing is taken; a bundle that has moved may be used as before."""
    moved = Path(shutil.copytree(built, tmp_path / "moved"))
    np.testing.assert_array_equal(picture(moved, filled), expected)
    weights = moved / "vae_decoder" / "openvino_model.bin"
    values = np.fromfile(weights, np.float32)
    values[len(values) // 8] += 0.5
    values.tofile(weights)
    cached = picture(moved, filled)
    np.testing.assert_array_equal(cached, picture(moved, None))
    assert not np.array_equal(cached, expected)


@pytest.mark.parametrize("precision", ["fp16", "w8"])
def test_other_precisions(bundle: Path, tmp_path: Path, precision: Any) -> None:
    build(bundle, tmp_path / "out", "openvino", BuildOptions(precision))
    without = picture(tmp_path / "out", None)
    for _ in range(2):
        np.testing.assert_array_equal(picture(tmp_path / "out", tmp_path / "cache"), without)


def test_auto(built: Path, tmp_path: Path, expected: Any) -> None:
    for _ in range(2):
        with Pipeline.from_pretrained(built, device="unet=auto,vae_decoder=auto", cache=tmp_path) as pipe:
            np.testing.assert_array_equal(pipe("a fox", **ARGUMENTS).images, expected)


def test_low_memory_compiles_once(built: Path, filled: Path, expected: Any) -> None:
    before = written(filled)
    with Pipeline.from_pretrained(built, cache=filled, low_memory=True) as pipe:
        np.testing.assert_array_equal(pipe("a fox", **ARGUMENTS).images, expected)
    assert written(filled).items() >= before.items()


def test_damage_that_cannot_be_removed_is_not_used(
    built: Path, filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Path(shutil.copytree(filled, tmp_path / "cache"))
    name, data = next(iter(contents(cache).items()))
    (cache / name).write_bytes(flipped(0.5)(data))
    damaged = contents(cache)

    def refused(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(InputError, match=r"is damaged, .* cannot be removed: Operation not permitted"):
        picture(built, cache)
    assert contents(cache) == damaged


@pytest.fixture
def no_room(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("in the way")
    return tmp_path / "file"


def test_a_folder_that_cannot_be_written(built: Path, no_room: Path) -> None:
    for cache in (no_room, no_room / "below"):
        with pytest.raises(InputError, match="cannot be written, as a cache must be"):
            Pipeline.from_pretrained(built, cache=cache)


@pytest.mark.parametrize(
    "engine",
    [name for name in engine_names() if not find_engine(name).CACHES and {"onnx", "*"} & set(find_engine(name).OPENS)],
)
@pytest.mark.parametrize("low_memory", [False, True])
def test_engines_without_a_cache_say_so(bundle: Path, tmp_path: Path, engine: str, low_memory: bool) -> None:
    message = f"{engine} keeps no compiled models; engines that do: openvino"
    with pytest.raises(InputError, match=message):
        Pipeline.from_pretrained(bundle, engine, cache=tmp_path / "cache", low_memory=low_memory)
    assert not (tmp_path / "cache").exists()


def test_a_hash_is_of_the_bytes_it_stands_beside(tmp_path: Path) -> None:
    with checked(str(tmp_path)):
        (tmp_path / "1.blob").write_bytes(b"one")
        (tmp_path / "kept.txt").write_text("not a compiled model")
    with checked(str(tmp_path)):
        assert (tmp_path / "1.blob").read_bytes() == b"one"
        (tmp_path / "1.blob").write_bytes(b"two")  # compiled anew, by another version say
    (tmp_path / "2.blob").write_bytes(b"of unknown origin")
    with checked(str(tmp_path)):
        assert {path.name for path in tmp_path.glob("*.blob")} == {"1.blob"}
    (tmp_path / "1.blob").write_bytes(b"2wo")
    with checked(str(tmp_path)):
        assert {path.name for path in tmp_path.iterdir()} == {"kept.txt"}


def test_one_of_a_folder(tmp_path: Path) -> None:
    """Plans of gigabytes beside the one that is meant are not read."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.blob").write_bytes(b"damaged")
    with checked(str(tmp_path), "a"):
        assert {file.name for file in tmp_path.iterdir()} == {"b.blob"}
        (tmp_path / "a.blob").write_bytes(b"new")
    assert {file.name for file in tmp_path.iterdir()} == {"a.blob", "a.blob.sha256", "b.blob"}


def test_a_session_by_itself(built: Path, filled: Path) -> None:
    from sdrt import bundle as bundles

    session = open_session(bundles.load(built), "vae_decoder", options=OpenOptions(cache=filled))
    assert session.run(latent_sample=np.zeros((1, 4, 8, 8), np.float32))["sample"].shape == (1, 3, 64, 64)
    session.close()
