"""Each parser over some 1,500 mutants in a process of its own, and by name what fuzzing has found.

The long run, monsters included, is ``python -m tests.fuzz -n 100000``.
"""

from __future__ import annotations

import json
import math
import os
import random
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdrt import bundle, image, npz, schedulers, strict_json
from sdrt.errors import MAX_MESSAGE, BundleError, ExportError, InputError, SdrtError, quoted
from sdrt.schedulers import tables
from sdrt.tokenizer import MAX_REMEMBERED, ClipTokenizer
from sdrt_export import parts
from sdrt_export.checkpoint import Checkpoint
from sdrt_export.weights import float32_bytes
from tests.conftest import ROOT, environment
from tests.fuzz import harness, mutate
from tests.fuzz.parsers import checkpoint, manifest, scheduler, vocabulary
from tests.fuzz.parsers import npz as archives

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="limits of time and memory are set as POSIX has them")


COUNTS = {"checkpoint": 500, "foreign": 500}  # which read a dozen files for each input


@pytest.mark.parametrize("name", harness.names())
def test_parser(name: str, tmp_path: Path) -> None:
    count, table = COUNTS.get(name, 1500), tmp_path / "table.json"
    command = [sys.executable, "-m", "tests.fuzz", name, "-n", str(count), "--no-monsters", "--json", str(table)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (tally,) = json.loads(table.read_text())
    assert tally["inputs"] == count
    assert tally["accepted"] > 20, "mutants that are all refused early test little"
    assert tally["refused"] > 20
    assert tally["rss_peak"] < 1024


class TestHarness:
    """That it would see a fault."""

    class Faulty:
        def seeds(self) -> list[bytes]:
            return [b"x"]

        def mutate(self, rng: random.Random, seeds: Any) -> bytes:
            return b"x"

        def feed(self, data: bytes, folder: Path) -> None:
            if data == b"hang":
                while True:
                    pass
            if data == b"crash":
                raise KeyError("x")
            if data == b"long":
                raise ValueError("x" * 10_000)
            if data == b"refused":
                raise InputError("no")

    @pytest.mark.parametrize(
        ("data", "outcome"), [(b"hang", "hang"), (b"crash", "crash"), (b"refused", "refused"), (b"x", "accepted")]
    )
    def test_outcomes(self, tmp_path: Path, data: bytes, outcome: str) -> None:
        assert harness.feed(self.Faulty(), data, tmp_path, 0.2)[0] == outcome

    def test_inputs_follow_from_the_seed(self) -> None:
        one, two, other = (harness.Inputs("options", seed, 10) for seed in (1, 1, 2))
        assert [one[i] for i in range(10, 60)] == [two[i] for i in range(10, 60)]
        assert [one[i] for i in range(10, 60)] != [other[i] for i in range(10, 60)]

    def test_json_mutants_are_mostly_json(self) -> None:
        seeds = manifest.seeds()
        good = 0
        for i in range(200):
            try:
                json.loads(mutate.json_bytes(random.Random(i), seeds))
                good += 1
            except ValueError:
                pass
        assert good > 100


class TestFound:
    """One case for each fault that was found."""

    def within(self, seconds: float, started: float) -> None:
        assert time.process_time() - started < seconds

    def test_an_error_quotes_in_short(self) -> None:
        for kind in (SdrtError, BundleError, InputError):
            message = kind("x" * 10**6 + " is wrong", "fix").message
            assert len(message) < MAX_MESSAGE + 10
            assert message.endswith(" is wrong")
        assert quoted(10**5000) == "a value of type int that is too long to show"
        with pytest.raises(BundleError) as caught:
            strict_json.parse(b'{"' + b"x" * 10**6 + b'":0,"' + b"x" * 10**6 + b'":0}', "here")
        assert len(str(caught.value)) < 500
        assert "stands twice" in str(caught.value)

    def test_a_pipe_is_not_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "vocab.json")
        with pytest.raises(BundleError, match="it is not a file"):
            ClipTokenizer.load(tmp_path, vocabulary.SPECIAL)

    def changed(self, **changes: Any) -> bundle.Manifest:
        raw = json.dumps({**json.loads(manifest.seeds()[0]), **changes}).encode()
        return bundle.parse(strict_json.parse(raw, "sdrt.json"), "sdrt.json")

    def test_a_file_listed_twice_among_many(self) -> None:
        """Was quadratic: minutes."""
        file = {"bytes": 0, "sha256": manifest.HASH}
        files = [{**file, "path": f"f{i}"} for i in range(9000)]
        started = time.process_time()
        with pytest.raises(BundleError, match="f8999 is listed twice"):
            self.changed(files=[*files, files[-1]])
        with pytest.raises(BundleError, match="lists 10009 files, at most 10000"):
            self.changed(files=[*files, *({**file, "path": f"g{i}"} for i in range(1000))])
        self.within(5, started)

    def test_a_long_key_above_many_values(self) -> None:
        """Each value's path held the whole key: terabytes copied."""
        good = json.loads(manifest.seeds()[0])
        component = good["components"]["unet"]
        started = time.process_time()
        with pytest.raises(BundleError, match="an input name stands twice"):
            self.changed(components={"x" * 10**7: {**component, "inputs": component["inputs"] * 5000}})
        self.within(10, started)

    def test_a_path_of_megabytes(self) -> None:
        with pytest.raises(BundleError, match="characters, at most 1024"):
            self.changed(scheduler="a/" * 10**6 + "a")

    def test_many_text_encoders(self) -> None:
        text = json.loads(manifest.seeds()[0])["text_encoders"]
        with pytest.raises(BundleError, match="has 17 text encoders, at most 16"):
            self.changed(text_encoders=text * 17)

    @pytest.mark.parametrize("name", ["bos_token", "eos_token", "pad_token"])
    def test_a_special_token_that_is_empty(self, name: str) -> None:
        """Stood between all letters of a prompt."""
        (text,) = json.loads(manifest.seeds()[0])["text_encoders"]
        with pytest.raises(BundleError, match="must not be empty"):
            self.changed(text_encoders=[{**text, name: ""}])

    def test_long_words_are_not_remembered(self) -> None:
        ids, merges = vocabulary.files()
        tokenizer = ClipTokenizer(ids, {merge: rank for rank, merge in enumerate(merges)}, vocabulary.SPECIAL)
        tokenizer.encode("a" * MAX_REMEMBERED + " " + "b" * (MAX_REMEMBERED + 1))
        assert tokenizer._known_word.cache_info().currsize == 1

    # -- arrays --------------------------------------------------------------------------------------------------------

    def test_arrays_are_read_as_numpy_wrote_them(self, tmp_path: Path) -> None:
        shapes = ((), (0,), (1,), (3, 2), (2, 0, 3), (1, 2, 3, 4))
        kinds = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")
        arrays = {f"{kind}/{i}": np.ones(shape, kind) for kind in kinds for i, shape in enumerate(shapes)}
        arrays["fortran"] = np.asfortranarray(np.arange(6.0).reshape(2, 3))
        for save in (np.savez, np.savez_compressed):
            save(tmp_path / "x.npz", **arrays)  # type: ignore[arg-type]
            got = npz.read(tmp_path / "x.npz")
            assert list(got) == list(arrays)
            for name, array in arrays.items():
                assert got[name].dtype == array.dtype
                assert got[name].shape == array.shape
                assert (got[name] == array).all()
                assert got[name].flags.writeable

    def test_hostile_arrays(self, tmp_path: Path) -> None:
        for _, raw in archives.monsters():
            (tmp_path / "x.npz").write_bytes(raw)
            started = time.process_time()
            with pytest.raises(BundleError, match=r"x\.npz: cannot be read: "):
                bundle.read_arrays(bundle.Bundle(tmp_path, manifest.manifest()), "x.npz")
            self.within(2, started)

    def test_an_array_that_inflates_beyond_its_size(self, tmp_path: Path) -> None:
        """The directory says 200 bytes; the packed data go on to a gigabyte."""
        raw = bytearray(archives._bomb(2**28))
        at = raw.rindex(b"PK\1\2")
        struct.pack_into("<I", raw, at + 24, 200)
        (tmp_path / "x.npz").write_bytes(raw)
        with pytest.raises((ValueError, zipfile.BadZipFile)):
            npz.read(tmp_path / "x.npz")

    # -- schedulers ----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("name", list(scheduler.FULL))
    @pytest.mark.parametrize(
        "change",
        [
            {"beta_start": 1e-12, "beta_end": 1e-12},  # ᾱ stays 1: no noise at all
            {"beta_start": 0.999, "beta_end": 0.999},  # ᾱ underflows to 0
            {"trained_betas": [0.5] * 999 + [1e-30]},
            {"num_train_timesteps": 1},
            {"num_train_timesteps": 10**18},
            {"trained_betas": [0.5] * 200_000},
            {"beta_start": 10**400},
            {"num_train_timesteps": 10**5000},
            {"beta_start": math.nan},
            {"x" * 10**6: 1},
        ],
        ids=lambda change: next(iter(change))[:20],
    )
    def test_degenerate_schedules(self, name: str, change: dict[str, Any]) -> None:
        config = {**scheduler.BASE, **scheduler.FULL[name], "_class_name": name, **change}
        with pytest.raises(InputError) as caught:
            schedulers.make(schedulers.resolve(config, scheduler.BASE), 20)
        assert len(str(caught.value)) < 2000

    @pytest.mark.parametrize(
        ("name", "change", "steps", "said"),
        [
            ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "sigma_min": -1.0}, 20, "sigma_min is -1.0"),
            ("EulerDiscreteScheduler", {"sigma_max": 1e300}, 20, "sigma_max is 1e"),
            ("EulerDiscreteScheduler", {"sigma_min": 9.0, "sigma_max": 1.0}, 20, "more than sigma_max"),
            ("DPMSolverMultistepScheduler", {}, 1000, "two would have the same noise"),
            ("DPMSolverMultistepScheduler", {"lambda_min_clipped": 30}, 20, "leaves no timestep|beyond"),
            (
                "DPMSolverMultistepScheduler",
                {"lambda_min_clipped": 30, "timestep_spacing": "trailing"},
                20,
                "leaves no timestep",
            ),
            ("DDIMScheduler", {"clip_sample_range": -1.0}, 20, "clip_sample_range is -1.0"),
            ("DDIMScheduler", {"clip_sample_range": 1e308}, 20, "clip_sample_range is 1e"),
            (
                "DDIMScheduler",
                {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
                20,
                "nothing but noise",
            ),
        ],
    )
    def test_what_would_divide_by_zero(self, name: str, change: dict[str, Any], steps: int, said: str) -> None:
        config = {**scheduler.BASE, "_class_name": name, "timestep_spacing": "linspace", **change}
        with pytest.raises(InputError, match=said):
            schedulers.make(schedulers.resolve(config, scheduler.BASE), steps)

    def test_a_million_unknown_options_are_one_line(self, caplog: pytest.LogCaptureFixture) -> None:
        schedulers.resolve(None, {**scheduler.BASE, **{f"x{i}": 0 for i in range(10**5)}})
        assert len(caplog.records) == 1
        assert "'x0', 'x1', 'x2', 'x3', 'x4' and 99995 more" in caplog.text

    def test_usual_schedules_are_not_refused(self) -> None:
        for kind in ("linear", "scaled_linear", "squaredcos_cap_v2"):
            for start, end in ((0.00085, 0.012), (0.0001, 0.02), (0.0015, 0.0195)):
                for zero in (False, True):
                    o = tables.TrainingSchedule(
                        beta_start=start, beta_end=end, beta_schedule=kind, rescale_betas_zero_snr=zero
                    )  # type: ignore[arg-type]
                    assert tables.alphas_cumprod(o)[-1] >= (0 if zero else 1e-10)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        "header",
        [b'{"a":{"shape":[1000000000,"aaaaaaaaaa"]}}', b"[" * 10**5, b'{"a":{"shape":[-4]}}', b'{"a":{"shape":[1e3]}}', b'{"a":5}', b"[]",
         b'{"a":{"shape":[9999999999,9999999999]}}', b'{"a":{}}'],
        ids=lambda header: header[:30].decode(),
    )  # fmt: skip
    def test_hostile_headers(self, tmp_path: Path, header: bytes) -> None:
        (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header)
        with pytest.raises(ExportError):
            float32_bytes([tmp_path / "x"])

    def test_a_header_of_gigabytes(self, tmp_path: Path) -> None:
        (tmp_path / "x").write_bytes(struct.pack("<Q", 2**31) + b"{}")
        with pytest.raises(ExportError, match="at most 16777216"):
            float32_bytes([tmp_path / "x"])

    def config(self, folder: Path, path: str, **changes: Any) -> Checkpoint:
        for name, content in checkpoint.GOOD.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps({**content, **(changes if name == path else {})}))
        return Checkpoint(folder, "model")

    def test_layers_without_end(self, tmp_path: Path) -> None:
        for layers in (0, 10**18):
            with pytest.raises(ExportError, match="expected 1 to 1000"):
                parts.text_encoder(
                    self.config(tmp_path, "text_encoder/config.json", num_hidden_layers=layers), "text_encoder"
                )

    def test_a_shard_of_a_name_too_long(self, tmp_path: Path) -> None:
        index = "unet/diffusion_pytorch_model.safetensors.index.json"
        with pytest.raises(ExportError, match="is missing"):
            self.config(tmp_path, index, weight_map={"a": "x" * 300}).weights("unet")

    @pytest.mark.parametrize("shift", ["null", [], {}, True])
    def test_a_shift_factor_that_is_no_number(self, tmp_path: Path, shift: Any) -> None:
        with pytest.raises(ExportError, match=r"shift_factor is .*, expected a number"):
            parts.latent_space(self.config(tmp_path, "vae/config.json", shift_factor=shift))

    # -- pictures ------------------------------------------------------------------------------------------------------

    def test_threads_leave_the_warning_filters_as_they_were(self, tmp_path: Path) -> None:
        import warnings
        from concurrent.futures import ThreadPoolExecutor

        Image.new("P", (9, 9)).save(tmp_path / "x.png", transparency=b"\1\2\3")
        before = list(warnings.filters)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(image.rgb, [tmp_path / "x.png"] * 200))
        assert list(warnings.filters) == before
