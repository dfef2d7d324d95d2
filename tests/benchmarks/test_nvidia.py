"""The benchmark of NVIDIA's GPUs, as far as it goes without one: on GPUs that are not there, and rehearsed on the CPU."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.nvidia import __main__ as command
from benchmarks.nvidia import cards, check, findings, measure, prepare, tables
from benchmarks.nvidia.findings import Build, Findings, Row
from sdrt import bundle as bundles
from sdrt.bench.statistics import Ratio, Summary, summarize
from sdrt.bundle import SHIPPED
from sdrt.errors import InputError, SdrtError
from sdrt_engines import onnxruntime as engine
from sdrt_engines import onnxruntime_cuda, onnxruntime_providers
from tests.conftest import ROOT
from tests.cuda_fake import Gpu, Runtime
from tests.nvidia import stand_in


def summary(seconds: float) -> Summary:
    return summarize([seconds] * 3)


def row(name: str, total: float, step: float, batch: int = 1, **more: object) -> Row:
    stages = {"total": summary(total), "step": summary(step), "vae_decoder": summary(0.01), "host": summary(5e-5)}
    made = Row(name, name.startswith("sdrt"), batch, stages, batch / total, 1.0, 3 * 10**9, "NVML", {}, 60.0, 0.002)
    return replace(made, **more)  # type: ignore[arg-type]


def found(*rows: Row, **more: object) -> Findings:
    made = Findings(
        "2030-01-02T03:04:05+00:00", "python -m benchmarks.nvidia c o", "NVIDIA H100 80GB HBM3", "sm90, 80 GB", "0.1.0",
        "abc", 512, 512, 20, "DPM++ 2M", 7.5, 3, 10, True, rows,
    )  # fmt: skip
    return replace(made, **more)  # type: ignore[arg-type]


def ratio(estimate: float, low: float | None, high: float | None) -> Ratio:
    return Ratio(estimate, low, high, 0.95, 30, "slower", None, None)


OVER = {"diffusers eager fp16": ratio(3.0, 2.9, 3.1), "diffusers compiled fp16": ratio(1.2, 1.1, 1.3)}
FAST = row("sdrt, TensorRT", 0.1, 0.003, over=OVER, held={"weights": 1_900_000_000, "activations": 10**9})
ROWS = (
    row("sdrt, ONNX Runtime", 0.2, 0.006, over={name: ratio(1.0, None, None) for name in OVER}),
    FAST,
    Row("sdrt, other", True, 1, failure="no GPU\nat | all"),
    row("diffusers eager fp16", 0.3, 0.01),
    row("diffusers compiled fp16", 0.12, 0.005),
    row("sdrt, TensorRT", 0.5, 0.02, 8, over={"diffusers compiled fp16": ratio(1.25, 1.2, 1.3)}),
    row("diffusers compiled fp16", 0.6, 0.02, 8),
)


# -- what is written --------------------------------------------------------------------------------------------------


def test_findings_and_back(tmp_path: Path) -> None:
    one = found(
        *ROWS, builds=(Build("a", "tensorrt", "fp16", "sm90", 3.0, 10**9, 6 * 10**9, "1"),), loop=summary(6e-5),
        aligned=(findings.Aligned("a", "held out", 0.1, -1.0, 1.2),), warnings=("mind the gap",),
    )  # fmt: skip
    one.save(tmp_path / "report.json")
    assert findings.load(tmp_path / "report.json") == one


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ('{"format": "x"}', "is no report"),
        ('{"format": "sdrt-nvidia", "version": 1}', "missing"),
    ],
)
def test_what_are_no_findings(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(InputError, match=message):
        findings.load(tmp_path / "report.json")


def test_what_was_asked_is_held_against_the_fastest() -> None:
    seen = {what.partition(":")[0]: (value, met) for what, value, met in tables.bars(found(*ROWS))}
    assert seen["times as fast as compiled diffusers, batch 1"] == ("1.20 (1.10–1.30)", "no")
    assert seen["times as fast as eager diffusers, batch 1"] == ("3.00 (2.90–3.10)", "yes")
    assert seen["as many pictures a second as compiled, batch 8"] == ("1.25 (1.20–1.30)", "yes")
    assert seen["a step over its floor"] == ("1.50 (2 ms)", "yes")
    assert seen["host's part of a step"][1] == "yes"
    assert seen["PSNR to diffusers in float32"] == ("60 dB", "yes")
    assert seen["50 steps on an H100"] == ("190 ms (what the stages add up to)", "yes")


def test_nothing_measured_is_no_bar_met() -> None:
    assert {met for _, _, met in tables.bars(found(Row("sdrt", True, 1, failure="broken")))} == {"–"}


def test_the_table() -> None:
    lines = tables.table(found(*ROWS), 1)
    assert len({line.count("|") for line in lines}) == 1
    assert lines[3].startswith(
        "| sdrt, TensorRT | 100 ms ± 0.0% | 10 | 3.00 (2.90–3.10) | 1.20 (1.10–1.30) | 3 ms | 1.50"
    )
    assert lines[4].startswith("| sdrt, other | no figures: no GPU at / all | – |")
    assert lines[5].startswith("| diffusers eager fp16 | 300 ms ± 0.0% | 3.33 | 1 | – |")


def test_readme_and_log_are_filled_from_a_report(tmp_path: Path) -> None:
    """As often as wanted; the log keeps what it had, newest first."""
    readme, log, report = tmp_path / "README.md", tmp_path / "LOG.md", tmp_path / "report.json"
    readme.write_text(f"before\n{tables.BEGIN}\nnothing yet\n{tables.END}\nafter\n")
    log.write_text("# Log\n\nWords.\n\n## 2020-01-01: older\ntext\n")
    found(*ROWS).save(report)
    for _ in range(2):
        assert command.main(["--fill", str(report), "--readme", str(readme), "--log", str(log)]) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{tables.BEGIN}\nOn one NVIDIA H100 80GB HBM3 (sm90, 80 GB), 2030-01-02, 512×512")
    assert text.endswith(f"{tables.END}\nafter\n")
    assert "nothing yet" not in text
    assert text.count("Batch 8:") == 1
    told = log.read_text()
    assert told.startswith("# Log\n\nWords.\n\n## 2030-01-02: NVIDIA H100 80GB HBM3, beside diffusers\n")
    assert told.endswith("\n\n## 2020-01-01: older\ntext\n")
    assert "Of it, sdrt, TensorRT, batch 1: weights 1.90 GB, activations 1.00 GB." in told


def test_the_readme_can_be_filled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables.check_readme(ROOT / "README.md")
    found(*ROWS).save(tmp_path / "report.json")
    (tmp_path / "README.md").write_text(f"{tables.END} {tables.BEGIN}")
    places = ["--readme", str(tmp_path / "README.md"), "--log", str(tmp_path / "LOG.md")]
    assert command.main(["--fill", str(tmp_path / "report.json"), *places]) == 1
    assert f"expected one {tables.BEGIN} and after it one" in capsys.readouterr().err
    assert not (tmp_path / "LOG.md").exists()


def test_cards() -> None:
    assert cards.peak("NVIDIA H100 80GB HBM3") == cards.peak("NVIDIA H200") == 790e12
    assert cards.peak("NVIDIA GeForce RTX 4090") == 165.2e12
    assert cards.peak("NVIDIA GeForce RTX 4090 Laptop GPU") is cards.peak("Anything else") is None
    demo = bundles.load(SHIPPED / "demo")
    one, four = cards.step_flop(demo, 128, 128, 1), cards.step_flop(demo, 128, 128, 4)
    assert one is not None
    assert four is not None
    assert four / one == pytest.approx(4, rel=0.01)
    assert cards.floor(one, 1e12) == one / 1e12
    assert cards.floor(None, 1e12) is cards.floor(one, None) is None


def test_memory_of_the_card_is_what_was_taken_meanwhile() -> None:
    taken = iter([5, 7, *[6] * 10_000])
    watch = measure.CardMemory(lambda: next(taken))
    with watch:
        while watch.peak == 0:
            pass
    assert watch.peak == 2


# -- checks -----------------------------------------------------------------------------------------------------------


def test_checks_of_tensorrt_rtx(tmp_path: Path) -> None:
    (tmp_path / "plans").mkdir()
    with stand_in(tmp_path / "plans"):
        here = check.Here(tmp_path, "cuda:0")
        for name in ("driver", "fingerprints", "tensorrt-rtx", "tensorrt-rtx-graphs", "tensorrt-rtx-cache"):
            outcome = check.run_one(name, here)
            assert outcome.state == "ok", outcome
            assert outcome.seen
        assert check.run_one("onnxruntime", here).state == "skipped"


def test_checks_of_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(Gpu(), asked=True)
    for module in (onnxruntime_cuda, onnxruntime_providers, check):
        monkeypatch.setattr(module, "cuda", runtime.gpu)
    monkeypatch.setattr(engine, "_library", lambda: runtime)
    here = check.Here(tmp_path, "cuda:0")
    for name in ("onnxruntime-fp32", "onnxruntime", "onnxruntime-fallback", "onnxruntime-graphs"):
        outcome = check.run_one(name, here)
        assert outcome.state == "ok", outcome
        assert outcome.seen
    runtime.lacks = ("Conv",)
    assert (
        "unet fp32: unet: CUDAExecutionProvider has no kernels for all of the graph"
        in check.run_one("onnxruntime-fallback", here).why
    )


def test_how_checks_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What was seen before a failure is told; a failure of one leaves the others."""

    def failing(error: Exception) -> check.Check:
        def run(here: check.Here) -> Iterator[str]:
            yield "begun"
            raise error

        return run

    errors = {"a": SdrtError("broken"), "b": check.Skipped("not here"), "c": ValueError("odd")}
    monkeypatch.setattr(check, "CHECKS", {name: failing(error) for name, error in errors.items()})
    assert check.run_all(["c", "a", "b"], "cuda:0", check.run_one) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(" [")[0] for line in lines] == [
        "FAILED  a: begun; broken", "skipped b: begun; not here", "FAILED  c: begun; ValueError: odd",
    ]  # fmt: skip
    assert check.run_all(["b"], "cuda:0", check.run_one) == 0


def test_a_check_is_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = check.run_apart("driver", check.Here(tmp_path, "cuda:999"))  # no machine has so many
    assert (outcome.name, outcome.state) == ("driver", "FAILED")
    assert "process" not in outcome.why
    dead = tmp_path / "python"
    dead.write_text("#!/bin/sh\necho 'the driver is gone' >&2\nkill -SEGV $$\n")
    dead.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dead))
    assert check.run_apart("driver", check.Here(tmp_path, "cuda:0")).why == (
        "its process ended with status -11: the driver is gone"
    )


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "CHECKPOINT and OUT"),
        (["a", "b", "--shape", "10x64"], "no size in multiples of 8"),
        (["a", "b", "--steps", "0"], "not a number"),
    ],
)
def test_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from sdrt_engines import cuda

    monkeypatch.setattr(cuda, "_runtime", lambda: (_ for _ in ()).throw(SdrtError("no driver")))
    assert command.main(["--check"]) == 1
    assert command.main([str(tmp_path / "none"), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.count("error: ") == 2
    assert not (tmp_path / "out").exists()


def test_a_rehearsal_on_the_cpu(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    """Export (here made before), build, pictures, turns, table: the whole chain, with nothing of a GPU."""
    out, readme, log = tmp_path / "out", tmp_path / "README.md", tmp_path / "LOG.md"
    shutil.copytree(bundle, out / "onnx")
    (out / "onnx.json").write_text(json.dumps(str(checkpoint.resolve())))
    readme.write_text(f"{tables.BEGIN}\n{tables.END}\n")
    log.write_text("")
    arguments = [
        str(checkpoint), str(out), "--cpu", "--steps", "2", "--rounds", "1", "--starts", "1", "--batch", "2", "--shape",
        "64x64", "--readme", str(readme), "--log", str(log),
    ]  # fmt: skip
    assert command.main(arguments) == 0
    told = findings.load(out / "report.json")
    ours, peer = told.rows
    assert (ours.ours, peer.ours, ours.batch) == (True, False, 2)
    assert ours.psnr is not None
    assert ours.psnr > 90
    assert peer.psnr == findings.EQUAL
    assert ours.over["diffusers eager fp32"].estimate > 0
    assert told.builds[0].plan > 0
    assert told.loop is not None
    assert "diffusers eager fp32" in readme.read_text()
    assert "Batch 2:" in log.read_text()
    with pytest.raises(SdrtError, match="not from"):
        prepare.exported(tmp_path / "another", out, print)
