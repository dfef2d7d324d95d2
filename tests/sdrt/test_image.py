"""Pictures and the settings that they carry."""

from __future__ import annotations

import io
import logging
import os
import stat
import struct
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from numpy.typing import NDArray
from PIL import Image, ImageOps

from sdrt import InputError, image, image_file
from tests.conftest import environment


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
    told = image.parameters_text(
        "a cat", "", steps=20, sampler="DDIM", guidance_scale=7.0, seed=3, size=(64, 64), model="m", eta=0.5, strength=0.6,
        version="0.1.0",
    )  # fmt: skip
    assert "Model: m, Eta: 0.5, Denoising strength: 0.6, Version" in told


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


def test_making_pictures_leaves_its_input_alone_and_rounds_at_every_boundary() -> None:
    """Between each two of 256 levels: the last float below the half, the half itself, the first above; any layout."""
    halves = ((np.arange(255) + 0.5) / 255).astype(np.float32)
    rows = [np.nextafter(halves, np.float32(end)) for end in (0, 1)] + [halves]
    channels_last = np.stack(rows, axis=-1)[None, None]
    for pictures in (channels_last, np.ascontiguousarray(channels_last.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)):
        before = pictures.copy()
        made = np.asarray(image.to_pil(pictures)[0])
        np.testing.assert_array_equal(pictures, before)
        np.testing.assert_array_equal(made, (before[0] * 255).round().astype(np.uint8))
    sample = np.linspace(-2, 2, 48, dtype=np.float32).reshape(1, 3, 4, 4)
    before = sample.copy()
    image.from_sample(sample)
    np.testing.assert_array_equal(sample, before)


# -- reading ----------------------------------------------------------------------------------------------------------


def colours(width: int = 24, height: int = 16) -> Image.Image:
    """A picture that no turn leaves as it was."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (x * y) % 256], -1).astype(np.uint8))


def pixels(picture: Image.Image) -> NDArray[Any]:
    return np.asarray(picture).astype(int)


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def with_chunk(png: bytes, name: bytes, data: bytes, times: int = 1) -> bytes:
    """The PNG with another chunk behind IHDR."""
    return png[:33] + chunk(name, data) * times + png[33:]


def put(folder: Path, raw: bytes, name: str = "x") -> Path:
    path = folder / name
    path.write_bytes(raw)
    return path


class TestFiles:
    @pytest.mark.parametrize(
        ("kind", "options"),
        [("PNG", {}), ("WEBP", {"lossless": True}), ("PNG", {"optimize": True}), ("PNG", {"compress_level": 0})],
    )
    def test_lossless(self, tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
        got = image.rgb(put(tmp_path, encoded(colours(), kind, **options)))
        assert type(got) is Image.Image
        assert got.mode == "RGB"
        assert (pixels(got) == pixels(colours())).all()

    @pytest.mark.parametrize(
        ("kind", "mode", "options"),
        [
            ("JPEG", "RGB", {"quality": 95, "subsampling": 0}),
            ("JPEG", "RGB", {"progressive": True, "restart_marker_rows": 1}),
            ("JPEG", "RGB", {"keep_rgb": True}),
            ("JPEG", "L", {}),
            ("JPEG", "CMYK", {"progressive": True}),
            ("WEBP", "RGB", {"quality": 90}),
            ("WEBP", "RGBA", {"quality": 90, "exact": True}),
        ],
    )
    def test_lossy_is_as_pillow_reads_it(self, tmp_path: Path, kind: str, mode: str, options: dict[str, Any]) -> None:
        """What is left out before decoding (texts, profiles, camera data) is no part of the picture."""
        extra: dict[str, Any] = {} if kind == "WEBP" else {"comment": b"\xff\xda\xff\xd9", "dpi": (72, 72)}
        raw = encoded(colours().convert(mode), kind, icc_profile=b"no profile", xmp=b"<x/>", **extra, **options)
        with Image.open(io.BytesIO(raw)) as plain:
            expected = plain.convert("RGB")
        assert (pixels(image.rgb(put(tmp_path, raw + b"\xff\xda trailing \xff\xda" * 100))) == pixels(expected)).all()

    def test_a_text_is_a_path(self, tmp_path: Path) -> None:
        assert image.rgb(str(put(tmp_path, encoded(colours(), "PNG")))).size == (24, 16)

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
    def test_orientation(self, tmp_path: Path, kind: str, orientation: int) -> None:
        exif = Image.Exif()
        exif[image_file.TAG_ORIENTATION] = orientation
        exif[271] = "a camera"
        raw = encoded(colours(), kind, exif=exif)
        with Image.open(io.BytesIO(raw)) as opened:
            expected = ImageOps.exif_transpose(opened).convert("RGB")
            assert (pixels(image.rgb(opened)) == pixels(expected)).all()
        got = image.rgb(put(tmp_path, raw))
        assert (pixels(got) == pixels(expected)).all()
        assert (pixels(image.rgb(got)) == pixels(expected)).all(), "turned once, not twice"

    @pytest.mark.parametrize(
        "exif",
        [b"x", b"II*\0", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff\x01\x12",
         b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x09\0\0"],
    )  # fmt: skip
    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
    def test_damaged_exif(self, tmp_path: Path, kind: str, exif: bytes, caplog: pytest.LogCaptureFixture) -> None:
        raw = encoded(colours(), kind, exif=b"Exif\0\0" + exif)
        assert image.rgb(put(tmp_path, raw)).size == (24, 16)
        assert "its EXIF data is damaged" in caplog.text

    @pytest.mark.parametrize("kind", ["PNG", "WEBP"])
    def test_animated(self, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
        options = {"lossless": True} if kind == "WEBP" else {}
        raw = encoded(colours(), kind, save_all=True, append_images=[Image.new("RGB", (24, 16))], **options)
        assert (pixels(image.rgb(put(tmp_path, raw))) == pixels(colours())).all()
        assert "is animated; its first frame is used" in caplog.text

    def test_16_bit_grey_is_scaled(self, tmp_path: Path) -> None:
        deep = Image.fromarray(np.arange(65536, dtype=np.uint16).reshape(256, 256))
        got = pixels(image.rgb(put(tmp_path, encoded(deep, "PNG"))))[..., 0].ravel()
        assert (got == np.round(np.arange(65536) / 257)).all()

    @pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "ICO", "JPEG2000", "EPS", "PDF"])
    def test_other_formats(self, tmp_path: Path, kind: str) -> None:
        with pytest.raises(InputError, match="expected PNG, JPEG or WebP"):
            image.rgb(put(tmp_path, encoded(Image.new("RGB", (16, 16)), kind)))

    @pytest.mark.parametrize(
        "raw", [b"", b"\x89PNG", b"GIF", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP"]
    )
    def test_scraps(self, tmp_path: Path, raw: bytes) -> None:
        with pytest.raises(InputError, match=r"damaged|expected PNG, JPEG or WebP"):
            image.rgb(put(tmp_path, raw))

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
    def test_truncated(self, tmp_path: Path, kind: str) -> None:
        raw = encoded(colours(200, 100), kind)
        for part in (20, 33, 100, len(raw) // 2, len(raw) - 100):
            with pytest.raises(InputError, match="damaged"):
                image.rgb(put(tmp_path, raw[:part]))

    def test_what_is_no_file(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        for name in ("", "missing", "x" * 300, "a\0b", "\udcff", "pipe", "/dev/zero", "/proc/self/mem"):
            with pytest.raises(InputError, match=r"cannot be read|is not a file"):
                image.rgb(tmp_path / name)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_no_permission(self, tmp_path: Path) -> None:
        path = put(tmp_path, encoded(colours(), "PNG"))
        path.chmod(0)
        with pytest.raises(InputError, match="Permission denied"):
            image.rgb(path)


class TestLimits:
    """Each is met before anything is decoded, so that a call takes little time and memory."""

    def refused(self, folder: Path, raw: bytes, said: str) -> None:
        path = put(folder, raw)
        started = time.perf_counter()
        with pytest.raises(InputError, match=said):
            image.rgb(path)
        assert time.perf_counter() - started < 2

    def header(self, kind: str, width: int, height: int) -> bytes:
        if kind == "PNG":
            data = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
            return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", data) + encoded(colours(), "PNG")[33:]
        if kind == "JPEG":
            raw = bytearray(encoded(colours(), "JPEG"))
            raw[(at := raw.index(b"\xff\xc0")) + 5 : at + 9] = struct.pack(">HH", height, width)
            return bytes(raw)
        data = b"\0" * 4 + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        rest = b"VP8X" + struct.pack("<I", 10) + data + encoded(colours(), "WEBP", lossless=True)[12:]
        return b"RIFF" + struct.pack("<I", 4 + len(rest)) + b"WEBP" + rest

    @pytest.mark.parametrize(
        ("kind", "width", "height", "said"),
        [
            ("PNG", 31623, 31623, "31623x31623 pixels, at most 16384 a side"),
            ("PNG", 2**31 - 1, 2**31 - 1, "at most 16384 a side"),
            ("PNG", 16384, 16384, "16384x16384, 268435456 pixels, at most 64000000 are read"),
            ("PNG", 0, 5, "0x5 pixels, which is no picture"),
            ("JPEG", 65535, 65535, "65535x65535 pixels, at most 16384 a side"),
            ("JPEG", 16000, 16000, "256000000 pixels, at most 64000000"),
            ("WEBP", 2**24, 2**24, "at most 16384 a side"),
            ("WEBP", 16384, 8192, "134217728 pixels, at most 32000000"),
        ],
    )
    def test_size(self, tmp_path: Path, kind: str, width: int, height: int, said: str) -> None:
        self.refused(tmp_path, self.header(kind, width, height), said)

    @pytest.mark.parametrize("kind", ["PNG", "JPEG"])
    def test_a_second_header(self, tmp_path: Path, kind: str) -> None:
        small, large = self.header(kind, 16, 16), self.header(kind, 16000, 16000)
        if kind == "PNG":
            self.refused(tmp_path, small[:33] + large[8:33] + small[33:], "256000000 pixels")
        else:
            at = small.index(b"\xff\xc0")
            self.refused(tmp_path, small[:at] + large[at : at + 19] + small[at:], "256000000 pixels")

    def test_file_size(self, tmp_path: Path) -> None:
        with (path := tmp_path / "x.png").open("wb") as file:
            file.write(encoded(colours(), "PNG"))
            file.truncate(2**40)
        with pytest.raises(InputError, match="larger than 134217728 bytes"):
            image.rgb(path)

    def test_pillows_warning_does_not_leak(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for kind in ("PNG", "JPEG"):
                assert image.rgb(put(tmp_path, encoded(colours(5, 3), kind))).size == (5, 3)
        assert not caught

    def test_metadata_is_not_inflated(self, tmp_path: Path) -> None:
        """Chunks of 1 KB that hold 1 MB each, by the thousand: Pillow alone takes tens of seconds, or refuses."""
        png, zeros = encoded(colours(), "PNG"), zlib.compress(bytes(2**20), 9)
        for name, head in ((b"iCCP", b"x\0\0"), (b"zTXt", b"x\0\0"), (b"iTXt", b"x\0\x01\0\0\0")):
            started = time.perf_counter()
            assert image.rgb(put(tmp_path, with_chunk(png, name, head + zeros, 20_000))).size == (24, 16)
            assert time.perf_counter() - started < 2

    def test_too_many_chunks(self, tmp_path: Path) -> None:
        self.refused(tmp_path, with_chunk(encoded(colours(), "PNG"), b"teXt", b"", 2**20), "more than 65536 chunks")

    def test_too_many_segments(self, tmp_path: Path) -> None:
        raw = encoded(colours(), "JPEG")
        self.refused(tmp_path, raw[:2] + b"\xff\xe1\0\x08Exif\0\0" * 2**20 + raw[2:], "more than 65536 segments")

    def test_too_many_scans(self, tmp_path: Path) -> None:
        raw = encoded(colours(), "JPEG", progressive=True)
        at = raw.rindex(b"\xff\xda")
        self.refused(tmp_path, raw[:at] + raw[at:-2] * 100, "more than 64 scans")

    def test_a_camera_directory_that_points_to_itself(self, tmp_path: Path) -> None:
        """5,000 entries that each claim the whole 64 KB: 300 MB in Pillow's hands."""
        entries = b"".join(struct.pack("<HHII", 300 + i, 7, 65_000, 8) for i in range(5000))
        exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 5000) + entries
        raw = encoded(colours(), "JPEG", exif=exif + b"\0" * (65_500 - len(exif)))
        assert image.rgb(put(tmp_path, raw)).size == (24, 16)

    @pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read as Linux tells it")
    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
    def test_the_largest_stays_below_a_gigabyte(self, tmp_path: Path, kind: str) -> None:
        size = (8000, 4000) if kind == "WEBP" else (8000, 8000)
        exif = Image.Exif()
        exif[image_file.TAG_ORIENTATION] = 6
        options = {"PNG": {"compress_level": 1}, "JPEG": {"progressive": True}, "WEBP": {"lossless": True, "method": 0}}
        mode = "CMYK" if kind == "JPEG" else "RGBA"
        path = put(tmp_path, encoded(Image.new(mode, size, (1, 2, 3, 4)), kind, exif=exif, **options[kind]))
        # VmHWM and not getrusage, whose figure a process takes over from the one that started it.
        code = (
            "import sys; from sdrt import image; print(image.rgb(sys.argv[1]).size);"
            "print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, path], env=environment(), capture_output=True, text=True, check=True
        )
        shown, peak = done.stdout.splitlines()
        assert shown == str(size[::-1])
        assert int(peak) < 2**20, "KiB"


class TestModes:
    def test_every_mode(self) -> None:
        base = colours()
        for mode in ("RGB", "RGBX", "RGBA", "YCbCr", "CMYK", "HSV", "LAB"):
            got = image.rgb(base.convert(mode))
            assert np.abs(pixels(got) - pixels(base)).mean() < 3, mode
        grey = base.convert("L")
        for mode in ("L", "LA", "F", "P", "PA"):
            assert (pixels(image.rgb(grey.convert(mode)))[..., 0] == pixels(grey)).all(), mode
        assert set(pixels(image.rgb(base.convert("1"))).ravel()) == {0, 255}

    def test_premultiplied(self) -> None:
        for mode, plain in (("RGBa", "RGBA"), ("La", "LA")):
            picture = colours().convert(plain)
            picture.putalpha(128)
            assert np.abs(pixels(image.rgb(picture.convert(mode))) - pixels(picture.convert("RGB"))).max() <= 2

    @pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I"])
    def test_deep_grey(self, mode: str) -> None:
        deep = Image.new(mode, (2, 1))
        deep.putpixel((0, 0), 65535)
        deep.putpixel((1, 0), 32896)
        assert pixels(image.rgb(deep)).tolist() == [[[255] * 3, [128] * 3]]

    @pytest.mark.parametrize(
        ("mode", "value"), [("I", 65536), ("I", -1), ("F", 255.5), ("F", -1.0), ("F", float("nan"))]
    )
    def test_out_of_range(self, mode: str, value: float) -> None:
        with pytest.raises(InputError, match="expected"):
            image.rgb(Image.new(mode, (2, 2), value))

    def transparent(self) -> dict[str, Image.Image]:
        half = colours().convert("RGBA")
        half.putpixel((3, 3), (10, 20, 30, 254))
        palette = colours().convert("P")
        indexed, table = palette.copy(), palette.copy()
        indexed.info["transparency"] = palette.getpixel((0, 0))
        table.info["transparency"] = bytes(range(256))
        solid = colours()
        solid.info["transparency"] = solid.getpixel((0, 0))
        deep = Image.new("I;16", (2, 2), 7)
        deep.info["transparency"] = 7
        pictures = {"RGBA": half, "index": indexed, "table": table, "colour": solid, "16 bits": deep}
        return pictures | {mode: half.convert(mode) for mode in ("RGBa", "LA")}

    def test_transparency_is_dropped_with_a_warning(self, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
        for name, picture in self.transparent().items():
            caplog.clear()
            got = image.rgb(picture)
            assert "transparent in places" in caplog.text, name
            if name not in ("16 bits", "table"):  # which Pillow clips, or warns about
                assert (pixels(got) == pixels(picture.convert("RGB"))).all(), name
            if name != "RGBa" and not name.startswith("16"):
                caplog.clear()
                again = image.rgb(put(tmp_path, encoded(picture, "PNG")))
                assert "transparent in places" in caplog.text, name
                assert (pixels(again) == pixels(got)).all(), name

    def test_an_opaque_alpha_is_not_mentioned(self, caplog: pytest.LogCaptureFixture) -> None:
        for mode in ("RGBA", "LA", "PA", "RGBa"):
            image.rgb(colours().convert("RGBA").convert(mode) if mode != "PA" else colours().convert("P").convert("PA"))
        palette = colours().convert("P")
        palette.info["transparency"] = b"\xff" * 256
        image.rgb(palette)
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    def test_the_picture_given_is_left_alone(self) -> None:
        picture = colours()
        picture.info["comment"] = "kept"
        got = image.rgb(picture)
        got.putpixel((0, 0), (9, 9, 9))
        assert picture.getpixel((0, 0)) == (0, 0, 0)
        assert picture.info == {"comment": "kept"}

    def test_a_picture_that_cannot_be_read(self, tmp_path: Path) -> None:
        truncated = Image.open(put(tmp_path, encoded(colours(200, 200), "JPEG")[:-200]))
        closed = Image.open(put(tmp_path, encoded(colours(), "PNG"), "y"))
        closed.close()
        for picture in (truncated, closed, Image.Image(), Image.new("RGB", (0, 5))):
            with pytest.raises(InputError, match="the picture"):
                image.rgb(picture)
        truncated.close()
        with pytest.raises(InputError, match="at most 16384 a side"):
            image.rgb(Image.new("1", (16385, 1)))


class TestArrays:
    def test_good(self) -> None:
        array = np.asarray(colours())
        assert (pixels(image.rgb(array)) == array).all()
        assert (pixels(image.rgb(array[::-1, ::-2])) == array[::-1, ::-2]).all(), "views too"
        assert (pixels(image.rgb(array[..., 0]))[..., 2] == array[..., 0]).all()
        for kind in (np.float16, np.float32, np.float64):
            assert (pixels(image.rgb((array / 255).astype(kind))) == array).all()
        assert pixels(image.rgb(np.full((1, 1, 3), 0.5))).tolist() == [[[128] * 3]], "half to even, as to_pil does"

    @pytest.mark.parametrize(
        "array",
        [
            np.zeros((0, 4, 3), np.uint8), np.zeros((4, 0), np.uint8), np.zeros(5, np.uint8), np.zeros((), np.uint8),
            np.zeros((1, 4, 4, 3), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((3, 4, 4), np.uint8),
            np.zeros((4, 4, 3), np.int64), np.zeros((4, 4, 3), np.uint16), np.zeros((4, 4, 3), bool),
            np.zeros((4, 4, 3), complex), np.zeros((4, 4, 3), object), np.zeros((4, 4, 3), "U1"), np.zeros((4, 4)),
            np.full((4, 4, 3), np.nan), np.full((4, 4, 3), np.inf), np.full((4, 4, 3), -0.1), np.full((4, 4, 3), 1.1),
            np.full((4, 4, 3), 255.0), np.broadcast_to(np.uint8(0), (10**5, 10**5, 3)),
            np.broadcast_to(0.5, (16384, 16384, 3)),
        ],
        ids=lambda array: f"{array.dtype}{list(array.shape)}",
    )  # fmt: skip
    def test_bad(self, array: NDArray[Any]) -> None:
        with pytest.raises(InputError, match=r"the picture is .*(expected|at most|no picture)"):
            image.rgb(array)

    @pytest.mark.parametrize("source", [None, 5, b"x.png", [colours()], {"image": 1}, np.float32(1)], ids=type)
    def test_no_picture(self, source: Any) -> None:
        with pytest.raises(InputError, match="expected a file's path, a PIL picture or an array"):
            image.rgb(source)


class TestSample:
    @pytest.mark.parametrize("size", [(24, 16), (64, 64), (8, 8), (40, 16), (24, 8)])
    def test_equals_diffusers(self, size: tuple[int, int]) -> None:
        expected = VaeImageProcessor().preprocess(colours(), height=size[1], width=size[0]).numpy()
        got = image.to_sample(colours(), size)
        assert got.dtype == np.float32
        assert got.shape == (1, 3, size[1], size[0])
        assert got.flags.c_contiguous
        np.testing.assert_array_equal(got, expected)

    def test_ends(self) -> None:
        assert image.to_sample(Image.new("RGB", (8, 8), (0, 0, 0)), (8, 8)).max() == -1
        assert image.to_sample(Image.new("RGB", (8, 8), (255, 255, 255)), (8, 8)).min() == 1

    def test_mode(self) -> None:
        with pytest.raises(InputError, match="mode is L, expected RGB"):
            image.to_sample(Image.new("L", (8, 8)), (8, 8))
