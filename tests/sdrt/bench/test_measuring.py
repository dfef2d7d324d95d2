"""Measuring pipelines: here, and in processes of their own. No time is asserted: what is checked is the bookkeeping."""

from __future__ import annotations

import csv
import io
import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdrt import GenerationRequest, InputError, Pipeline
from sdrt.bench import alternate, load, measure, report, roof, rounds, sweep
from sdrt.bench.measuring import steps
from sdrt.bench.process import Process
from sdrt.bench.report import STAGES, Sample, Settings, Variant
from sdrt.bench.rounds import Plan
from sdrt.errors import SdrtError
from tests.conftest import Cli

REQUEST = GenerationRequest("a fox", negative_prompt="blurry", width=64, height=64, num_inference_steps=3, seed=1, scheduler="DDIM")  # fmt: skip
KNOWN = [stage for stage in STAGES if stage not in ("vae_encoder", "load")]


def adds_up(variant: Variant) -> None:
    for sample in variant.samples:
        found = sample.stages
        rest = [found.get(stage, 0.0) for stage in ("tokenize", "text_encoder", "vae_decoder", "post", "load", "other")]
        assert sum(rest) + sum(sample.steps) == pytest.approx(sample.total)
        assert found["other"] >= 0
        assert all(0 < network < step for network, step in zip(sample.network, sample.steps, strict=True))
        assert sample.total <= sample.wall


def test_a_loaded_pipeline(pipe: Pipeline) -> None:
    said: list[str] = []
    report = measure(pipe, REQUEST, warmups=1, iterations=3, progress=said.append)
    (variant,) = report.variants
    assert [stage for stage in STAGES if stage in variant.stages] == KNOWN
    assert all(summary.n == 3 for summary in variant.stages.values())
    assert [len(sample.steps) for sample in variant.samples] == [3, 3, 3]
    adds_up(variant)
    assert variant.settings == Settings(
        model=str(pipe.bundle.root), width=64, height=64, steps=3, scheduler="DDIM", prompt="a fox",
        negative_prompt="blurry", seed=1,
    )  # fmt: skip
    assert set(variant.versions) == {"numpy", "onnxruntime"}
    assert report.environment.devices["onnxruntime"]["cpu"]
    assert variant.memory is not None
    assert variant.memory.peak.rss >= variant.memory.steady.rss > 0
    assert set(variant.precision.values()) == {"fp32"}
    assert variant.disk == sum(
        file.bytes for name in ("text_encoder", "unet", "vae_decoder") for file in pipe.bundle.component(name).artifact.files
    )  # fmt: skip
    assert said == ["warm-up", "batch 1 of 3", "batch 2 of 3", "batch 3 of 3", "memory", "what the machine can do"]


def test_how_much_of_what_the_chip_can_do(pipe: Pipeline) -> None:
    """Floor over time, each component by the calls that its stage holds."""
    (variant,) = measure(pipe, REQUEST, warmups=1, iterations=1, memory=False).variants
    assert variant.rates is not None
    assert {"sgemm", "matmul", "convolution"} <= set(variant.rates.flops)
    assert set(variant.roof) == {"text_encoder", "unet", "vae_decoder"}
    work = pipe.bundle.component("unet").work
    assert work is not None
    assert variant.roof["unet"].macs == work.at({"B": 2, "H": 64, "W": 64, "T": 77})
    for name, stage in (("unet", "network"), ("vae_decoder", "vae_decoder"), ("text_encoder", "text_encoder")):
        roof = variant.roof[name]
        best = max(variant.rates.flops.values())
        assert roof.floor == max(2 * sum(roof.macs.values()) / best, roof.bytes / variant.rates.bandwidth)
        assert roof.share == roof.floor / variant.stages[stage].median


@pytest.mark.parametrize("counts", [{"warmups": -1}, {"iterations": 0}, {"iterations": True}])
def test_counts_out_of_range(null: Pipeline, counts: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected an integer"):
        measure(null, REQUEST, **counts)


def plan(bundle: Path, name: str, **changes: Any) -> Plan:
    settings = Settings(str(bundle), 64, 64, steps=2, scheduler="DDIM", prompt="a fox", engine="null")
    return Plan(name, replace(settings, **changes), files=(bundle / "unet" / "model.onnx.data",))


@pytest.mark.parametrize("warmups", [0, 2])
@pytest.mark.parametrize("together", [True, False])
def test_taking_turns(bundle: Path, monkeypatch: pytest.MonkeyPatch, warmups: int, together: bool) -> None:
    """Every plan has as many turns in every start, whether all stay loaded or not; a stream more is a sample more."""
    monkeypatch.setattr(rounds, "ROOM", 1.0 if together else 0.0)
    monkeypatch.setattr(rounds, "forget", lambda files: together)
    plans = {"a": plan(bundle, "a"), "b": plan(bundle, "b", streams=2)}
    said: list[str] = []
    report = alternate(plans, warmups=warmups, iterations=3, processes=2, machine=False, progress=said.append)
    a, b = report.variants
    assert [(s.process, s.turn) for s in a.samples] == [(p, t) for p in range(2) for t in range(3)]
    assert len(b.samples) == 12
    assert [len(process) for process in b.values("total")] == [3, 3]
    assert len(said) == steps(2, warmups=warmups, iterations=3, processes=2, memory=True, machine=False)
    assert a.load is not None
    assert len(a.load.load) == len(a.load.first) == 2
    assert (a.load.cold_load is not None) == (a.load.cold_first is not None) == together
    assert any("do not fit into memory" in warning for warning in report.warnings) == (not together)
    assert not report.comparisons, "two streams do other work than one"
    assert all(each.seconds > 0.1 for each in report.interference), "every counted batch was watched, the first, too"


@pytest.mark.parametrize("memory", [True, False])
def test_a_failure_costs_the_others_nothing(bundle: Path, memory: bool) -> None:
    plans = {"a": plan(bundle, "a"), "b": plan(bundle, "b", device="tpu"), "c": plan(bundle, "c")}
    report = alternate(plans, iterations=2, processes=2, machine=False, memory=memory)
    assert [(variant.name, len(variant.samples)) for variant in report.variants] == [("a", 4), ("c", 4)]
    assert list(report.failures) == ["b"]
    assert "b: null has no device 'tpu' here" in report.failures["b"]
    with pytest.raises(SdrtError, match=r"b: .*no device 'tpu'"):
        alternate({"b": plans["b"]}, iterations=1, machine=False, memory=memory)


def test_memory_peaks_as_the_system_says(bundle: Path, tmp_path: Path) -> None:
    """The worker's peak beside wait4's account of the same process, within three percent."""
    (variant,) = alternate({"a": plan(bundle, "a", engine=None)}, iterations=1, machine=False).variants
    lines = tmp_path / "lines"
    asked = plan(bundle, "a", engine=None)
    lines.write_text("\n".join(json.dumps(line) for line in (asked.loading(), asked.running(), asked.running())) + "\n")
    # A small parent: what wait4 says of a process begins with the peak of the one that it was forked from.
    parent = "import os, subprocess, sys; p = subprocess.Popen([sys.executable, '-m', 'sdrt.bench.worker'], stdout=2); print(os.wait4(p.pid, 0)[2].ru_maxrss)"
    with lines.open() as stdin:
        done = subprocess.run([sys.executable, "-c", parent], stdin=stdin, capture_output=True, text=True, check=True)
    assert '"error"' not in done.stderr
    assert variant.memory is not None
    if sys.platform == "linux":
        assert variant.memory.peak.rss == pytest.approx(int(done.stdout) * 1024, rel=0.03)


def test_how_a_bundle_is_opened_is_carried_to_the_process(bundle: Path, tmp_path: Path) -> None:
    """Low memory shows in the stages; a device by component and a cache in what is refused."""
    ort = {"engine": None, "device": "unet=cpu"}
    plans = {
        "low": plan(bundle, "low", **ort, low_memory=True), "kept": plan(bundle, "kept", **ort),
        "device": plan(bundle, "device", **ort | {"device": "unet=cpu,vae_decoder=tpu"}),
        "cache": plan(bundle, "cache", **ort, cache=str(tmp_path)),
    }  # fmt: skip
    report = alternate(plans, iterations=1, machine=False, memory=False)
    low, kept = report.variants
    assert "load" in low.stages
    assert "load" not in kept.stages
    adds_up(low)
    assert "no device 'tpu'" in report.failures["device"]
    assert "onnxruntime keeps no compiled models" in report.failures["cache"]


def test_a_peer_is_asked_for_nothing_that_nobody_asks_for(bundle: Path) -> None:
    usual = {"do", "model", "engine", "device", "threads", "options", "streams"}
    assert set(plan(bundle, "a").loading()) == usual
    asked = plan(bundle, "a", low_memory=True, cache="there").loading()
    assert (asked["low_memory"], asked["cache"]) == (True, "there")


def test_how_a_pipeline_was_opened_is_told(bundle: Path) -> None:
    opened = {"device": {"unet": "cpu", "vae_decoder": "null"}, "low_memory": True, "threads": 2}
    with Pipeline.from_pretrained(bundle, "null", **opened) as pipe:
        (variant,) = measure(pipe, REQUEST, iterations=1, memory=False, machine=False).variants
    adds_up(variant)
    s = variant.settings
    assert (s.engine, s.device, s.threads, s.low_memory) == ("null", "unet=cpu,vae_decoder=null", 2, True)
    line = sweep.command_line(replace(s, cache="there"), 1, 1)
    assert line.endswith(" --engine null --device unet=cpu,vae_decoder=null --threads 2 --cache there --low-memory")


def test_the_first_batch_is_a_turn_without_warm_ups(bundle: Path) -> None:
    """One batch in all is watched for interference, and is the first."""
    report = alternate({"a": plan(bundle, "a")}, warmups=0, iterations=1, machine=False, memory=False)
    (variant,) = report.variants
    assert variant.load is not None
    assert variant.load.first == (variant.samples[0].wall,)
    assert [each.seconds > variant.samples[0].wall for each in report.interference] == [True]


def test_what_the_machine_cannot_tell_costs_no_figures(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(threads: int | None) -> None:
        raise SdrtError("no rates today")

    monkeypatch.setattr(roof, "measure", fails)
    (variant,) = alternate({"a": plan(bundle, "a")}, iterations=1, memory=False).variants
    assert (variant.rates, variant.warnings) == (None, ("no rates today",))


def test_one_that_cannot_load_is_ended_at_once(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are not measured beside what it holds."""
    ended: list[str] = []
    close = Process.close
    alive: list[bool] = []

    def closing(process: Process) -> None:
        ended.append(process.name)
        close(process)

    def progress(what: str) -> None:
        if "turn" in what:
            alive.append("b" not in ended)

    monkeypatch.setattr(Process, "close", closing)
    plans = {"a": plan(bundle, "a"), "b": plan(bundle, "b", device="tpu")}
    alternate(plans, iterations=1, machine=False, memory=False, progress=progress)
    assert alive == [False]


# -- sweeps ------------------------------------------------------------------------------------------------------------


def test_sweep_names_what_differs(bundle: Path) -> None:
    base = Settings("", 0, 0, steps=2)
    made = sweep.plans([str(bundle)], base, shapes=[(64, 64), (128, 64)], batches=[1, 2], threads=[None, 1])
    assert list(made) == [
        f"{bundle.name}, {shape}, batch {b}, threads {t}"
        for shape in ("64x64", "128x64") for b in (1, 2) for t in ("default", 1)
    ]  # fmt: skip
    last = made[f"{bundle.name}, 128x64, batch 2, threads 1"].settings
    assert (last.width, last.height, last.batch, last.threads, last.scheduler) == (128, 64, 2, 1, "PLMS")


def test_sweep_guides_by_what_is_asked_or_by_the_models_own(copied: Path) -> None:
    manifest = copied / "sdrt.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"guidance_scale": 3.0}))
    base = Settings("", 0, 0, steps=2)
    assert [p.settings.guidance_scale for p in sweep.plans([str(copied)], base).values()] == [3.0]
    assert [p.settings.guidance_scale for p in sweep.plans([str(copied)], base, guidance_scale=2.0).values()] == [2.0]


def test_one_bundle_twice(bundle: Path) -> None:
    assert list(sweep.plans([str(bundle)] * 2, Settings("", 0, 0))) == [bundle.name, f"{bundle.name} (2)"]


def test_a_peer_is_not_reproduced_by_sdrt_bench() -> None:
    def made(name: str, wall: float, **settings: Any) -> Variant:
        sample = Sample(0, 0, wall, wall)
        return report.variant(name, Settings(name, 64, 64, **settings), [sample], versions={})

    fast, slow, peer = made("fast", 1.0), made("slow", 2.0), made("peer", 0.5, runner="peer")
    (line,) = sweep.best([fast, slow, peer], 1, 1)
    assert "-m fast " in line
    assert sweep.best([fast, peer], 1, 1) == ()


def test_a_combination_that_cannot_run_is_refused_before_all(bundle: Path) -> None:
    with pytest.raises(InputError, match="65x64 pixels: both sides must be multiples of 8"):
        sweep.plans([str(bundle)], Settings("", 0, 0), shapes=[(64, 64), (65, 64)])
    with pytest.raises(InputError, match="no component 'net'"):
        sweep.plans([str(bundle)], Settings("", 0, 0, device="net=cpu"))


def test_a_cold_start_reads_the_cache_anew(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "1.blob").write_bytes(b"compiled")
    (made,) = sweep.plans([str(bundle)], Settings("", 0, 0, cache=str(tmp_path))).values()
    assert tmp_path / "1.blob" in made.files


# -- the command -------------------------------------------------------------------------------------------------------


def test_command(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    """A sweep: report and CSV hold every variant; the line it prints runs, and measures the same."""
    out, csv_file = tmp_path / "report.json", tmp_path / "report.csv"
    arguments = ["-m", bundle, "--engine", "null", "--shape", "64x64", "--steps", 2, "-i", 3, "--no-machine"]
    done = cli("bench", *arguments, "--batch", "1,2", "-p", "a fox: red", "--json", out, "--csv", csv_file)
    assert done.returncode == 0, done.stderr
    report = load(out)
    assert [variant.settings.batch for variant in report.variants] == [1, 2]
    rows = list(csv.DictReader(io.StringIO(csv_file.read_text())))
    assert {row["variant"] for row in rows} == {variant.name for variant in report.variants}
    assert {row["stage"] for row in rows} == set(KNOWN)
    for shown in ("text encoder", "host loop", "images/s", "anonymous", "most pictures a second"):
        assert shown in done.stdout
    (best,) = report.best
    line = shlex.split(best.split(": ", 2)[-1])
    assert line[:2] == ["sdrt", "bench"]
    assert line[line.index("-p") + 1] == "a fox: red"
    again = cli(*line[1:], "--no-machine", "--no-memory", "--json", "-")
    assert again.returncode == 0, again.stderr
    (variant,) = json.loads(again.stdout)["variants"]
    winner = max(report.variants, key=lambda v: v.images_per_second)
    assert variant["settings"].get("batch", 1) == winner.settings.batch


def test_a_file_that_cannot_be_written_costs_no_figures(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    arguments = ["-m", bundle, "--engine", "null", "--steps", 1, "-i", 1, "--no-machine", "--no-memory"]
    done = cli("bench", *arguments, "--json", tmp_path / ("x" * 300))
    assert done.returncode == 1
    assert "cannot be written" in done.stderr
    assert "images/s" in done.stdout


def test_compare_command(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    """A report beside a copy of itself whose VAE decoder takes a tenth longer."""
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    made = cli("bench", "-m", bundle, "--shape", "64x64", "--steps", 2, "-i", 8, "--no-machine", "--json", before)
    assert made.returncode == 0, made.stderr
    value = json.loads(before.read_text())
    steady = value["variants"][0]["samples"][0]
    value["variants"][0]["samples"] = [{**steady, "turn": turn} for turn in range(8)]
    before.write_text(json.dumps(value))
    for sample in value["variants"][0]["samples"]:
        sample["vae_decoder"] *= 1.5
    after.write_text(json.dumps(value))
    same = cli("bench", "compare", before, before, "--fail-above", 10)
    assert same.returncode == 0, same.stderr
    done = cli("bench", "compare", before, after, "--fail-above", 10, "--json", tmp_path / "c.json")
    assert done.returncode == 1
    assert "slower by more than 10 %" in done.stderr
    assert "vae_decoder: +50.0%" in done.stderr
    assert "slower" in done.stdout
    assert "not measured in turn" in done.stdout
    assert json.loads((tmp_path / "c.json").read_text())["comparisons"][0]["paired"] is False


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("-m", "x", "--batch", "1,zwei"), 2, "is not a list of numbers"),
        (("-m", "x", "--json", "-", "--csv", "-"), 2, "cannot both go to standard output"),
        (("-m", "nowhere"), 1, "no such directory"),
        (("-m", "x", "--json", "nowhere/x.json"), 1, "cannot be written"),
        (("-m", "x", "compare", "a", "b"), 2, "mean nothing to compare"),
        (("compare", "a.json", "b.json"), 1, "a.json"),
        (("compare", "a.json", "b.json", "--fail-above", "nan"), 2, "nan is not a percentage"),
    ],
)
def test_wrong_usage(cli: Cli, arguments: tuple[str, ...], status: int, message: str) -> None:
    done = cli("bench", *arguments)
    assert (done.returncode, done.stdout) == (status, "")
    assert message in done.stderr
