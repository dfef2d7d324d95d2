"""Pictures and the settings that they carry."""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdrt import InputError, image


def parameters(prompt: str, negative: str = "") -> str:
    return image.parameters_text(
        prompt, negative, steps=20, sampler="DPM++ 2M Karras", guidance_scale=7.0, seed=3, size=(512, 768),
        model="some, model", clip_skip=1, version="0.1.0",
    )  # fmt: skip


def test_text_is_a1111s() -> None:
    assert parameters("a cat", "blurry") == (
        "a cat\nNegative prompt: blurry\nSteps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 3, Size: 512x768, "
        'Model: "some, model", Clip skip: 2, Version: sdrt 0.1.0'
    )
    assert parameters("a cat").count("\n") == 1


@pytest.mark.parametrize(("prompt", "chunk"), [("a cat", b"tEXt"), ("Straße", b"tEXt"), ("猫", b"iTXt")])
def test_png_carries_it(tmp_path: Path, prompt: str, chunk: bytes) -> None:
    path = tmp_path / "x.png"
    image.save_png(Image.new("RGB", (8, 8)), path, parameters(prompt))
    with Image.open(path) as picture:
        assert picture.text["parameters"] == parameters(prompt)  # type: ignore[attr-defined]
    raw = path.read_bytes()
    assert raw[raw.index(b"parameters\0") - 4 :].startswith(chunk)
    assert struct.unpack(">I", raw[8:12]) == (13,)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.png"]


def test_unwritable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        image.save_png(Image.new("RGB", (8, 8)), tmp_path / "file" / "x.png", "")


def test_links_are_followed_and_pipes_written_to(tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
    image.save_png(Image.new("RGB", (8, 8)), tmp_path / "link.png", "")
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "real.png").is_file()
    os.mkfifo(tmp_path / "pipe.png")
    reader = os.open(tmp_path / "pipe.png", os.O_RDONLY | os.O_NONBLOCK)
    image.save_png(Image.new("RGB", (8, 8)), tmp_path / "pipe.png", "")
    assert os.read(reader, 8) == b"\x89PNG\r\n\x1a\n"
    os.close(reader)
    assert stat.S_ISFIFO((tmp_path / "pipe.png").stat().st_mode)


def test_from_sample_clips_and_keeps_float() -> None:
    sample = np.array([-3.0, -1.0, 0.0, 1.0, 3.0], np.float32).reshape(1, 1, 1, 5).repeat(3, axis=1)
    pictures = image.from_sample(sample)
    assert pictures.dtype == np.float32
    assert pictures.shape == (1, 1, 5, 3)
    np.testing.assert_array_equal(pictures[0, 0, :, 0], np.array([0, 0, 0.5, 1, 1], np.float32))
    assert np.asarray(image.to_pil(pictures)[0])[0, :, 0].tolist() == [0, 0, 128, 255, 255]
