"""Export: what a good one leaves, and what a bad one does not."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from sdrt import ExportError
from sdrt import bundle as bundles
from sdrt.engine import open_session
from sdrt.metrics import psnr
from sdrt_export import checkpoint as checkpoints
from sdrt_export import exporter, families
from tests.conftest import Cli, environment


@pytest.fixture
def changed(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be changed."""
    return Path(shutil.copytree(checkpoint, tmp_path / "changed"))


# -- what a good export leaves --------------------------------------------------------------------------------------


def test_every_graph_was_checked_at_two_sizes_and_two_batches(bundle: Path) -> None:
    held = bundles.load(bundle)
    assert list(held.manifest.components) == ["text_encoder", "unet", "vae_encoder", "vae_decoder"]
    for name, component in held.manifest.components.items():
        outputs = {spec.name for spec in component.outputs}
        figures = {(p.case, p.output): p for p in component.artifact.parity}
        assert len({case for case, _ in figures}) == 4, name
        assert {output for _, output in figures} == outputs
        # 115 dB and more was seen on all; a wrong epsilon in one norm costs 40.
        assert all(p.psnr is None or p.psnr >= 110 for p in figures.values()), name
    assert bundles.damaged(held) == []


def test_names_are_the_ecosystems(bundle: Path) -> None:
    components = bundles.load(bundle).manifest.components
    names = {n: ([s.name for s in c.inputs], [s.name for s in c.outputs][:1]) for n, c in components.items()}
    assert names == {
        "text_encoder": (["input_ids"], ["last_hidden_state"]),
        "unet": (["sample", "timestep", "encoder_hidden_states"], ["out_sample"]),
        "vae_encoder": (["sample"], ["latent_parameters"]),
        "vae_decoder": (["latent_sample"], ["sample"]),
    }
    assert [s.name for s in components["text_encoder"].outputs][1:3] == ["pooler_output", "hidden_states.0"]


def test_graphs(bundle: Path) -> None:
    """Opset 23 with whole operators, the manifest's symbols, one external file, no trace of torch's source or machine."""
    for name, component in bundles.load(bundle).manifest.components.items():
        model = onnx.load(bundle / name / "model.onnx", load_external_data=False)
        onnx.checker.check_model(str(bundle / name / "model.onnx"))
        assert {o.domain: o.version for o in model.opset_import}[""] == 23
        external = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
        assert external == {"model.onnx.data"}
        for values, specs in ((model.graph.input, component.inputs), (model.graph.output, component.outputs)):
            shapes = {v.name: tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}
            assert shapes == {spec.name: spec.shape for spec in specs}
        text = (bundle / name / "model.onnx").read_bytes()
        assert str(Path(torch.__file__).parent).encode() not in text
        assert b"site-packages" not in text
    kinds = [node.op_type for node in onnx.load(bundle / "unet" / "model.onnx", load_external_data=False).graph.node]
    assert {"Attention", "GroupNormalization", "LayerNormalization", "Gelu"} <= set(kinds)


def test_no_path_of_this_machine_in_the_manifest(bundle: Path, checkpoint: Path) -> None:
    text = (bundle / "sdrt.json").read_text()
    assert str(checkpoint.parent) not in text
    provenance = bundles.load(bundle).manifest.provenance
    assert provenance.source == checkpoint.name
    assert set(provenance.versions) >= {"sdrt", "torch", "diffusers", "transformers", "onnx"}
    weights = {f.path: f for f in provenance.source_files}["unet/diffusion_pytorch_model.safetensors"]
    assert weights.sha256 == bundles.sha256(checkpoint / weights.path)


def test_any_size_and_batch_equals_torch(bundle: Path, checkpoint: Path) -> None:
    """Beyond the reference cases: sizes that halve unevenly at each level, more tokens, more pictures."""
    unet = families.load("sd1").network("unet", checkpoints.Checkpoint(checkpoint, "x").config("unet"))
    unet.model.load_state_dict(load_file(checkpoint / "unet" / "diffusion_pytorch_model.safetensors"))
    session = open_session(bundles.load(bundle), "unet")
    for b, h, w, t in ((1, 8, 8, 77), (5, 9, 15, 77), (2, 33, 65, 231), (3, 17, 11, 1)):
        generator = np.random.default_rng(b)
        sample = generator.standard_normal((b, 4, h, w)).astype(np.float32)
        text = generator.standard_normal((b, t, 32)).astype(np.float32)
        timestep = np.array([generator.uniform(0, 999)], np.float32)
        with torch.no_grad():
            expected = unet.eval()(*map(torch.from_numpy, (sample, timestep, text))).numpy()
        got = session.run(sample=sample, timestep=timestep, encoder_hidden_states=text)["out_sample"]
        assert psnr(expected, got) >= 110


def test_constants_are_the_final_layer_norm(bundle: Path, checkpoint: Path) -> None:
    state = load_file(checkpoint / "text_encoder" / "model.safetensors")
    held = bundles.load(bundle)
    constants = bundles.read_arrays(held, "text_encoder/constants.npz")
    for name in ("final_layer_norm.weight", "final_layer_norm.bias"):
        np.testing.assert_array_equal(constants[name], state[f"text_model.{name}"].numpy())


# -- other checkpoints ----------------------------------------------------------------------------------------------


def _export_decoder(checkpoint: Path, out: Path) -> bundles.Bundle:
    return exporter.export(str(checkpoint), out, components=["vae_decoder"])


def _decoded(bundle: bundles.Bundle) -> np.ndarray:
    latents = np.random.default_rng(0).standard_normal((1, 4, 9, 8)).astype(np.float32)
    return open_session(bundle, "vae_decoder").run(latent_sample=latents)["sample"]


def test_half_precision_shards_and_old_names(changed: Path, bundle: Path, tmp_path: Path) -> None:
    """The weights as fp16, in two shards, with the attention names of old checkpoints: the fp16-rounded picture."""
    folder = changed / "vae"
    state = {name: tensor.half() for name, tensor in load_file(folder / "diffusion_pytorch_model.safetensors").items()}
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        state = {key.replace(new, name) if "attentions" in key else key: tensor for key, tensor in state.items()}
    assert any("proj_attn" in key for key in state)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    names = sorted(state)
    shards = {f"shard-{i}.safetensors": names[i::2] for i in range(2)}
    for shard, keys in shards.items():
        save_file({key: state[key].contiguous() for key in keys}, folder / shard)
    weight_map = {key: shard for shard, keys in shards.items() for key in keys}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    made = _export_decoder(changed, tmp_path / "out")
    figure = psnr(_decoded(bundles.load(bundle)), _decoded(made))
    assert 40 < figure < 100, (
        "as far from the fp32 checkpoint as rounding the weights to fp16 takes it, not equal to it"
    )
    assert list(made.manifest.components) == ["vae_decoder"]
    assert made.manifest.text_encoders == ()


def test_weights_in_other_types_become_float32(tmp_path: Path) -> None:
    from sdrt_export.weights import float32_state

    tensors = {
        "a": torch.randn(3, 5).half(), "b": torch.randn(7).bfloat16(), "c": torch.arange(4), "d": torch.tensor(1.5).double()
    }  # fmt: skip
    save_file(tensors, tmp_path / "x.safetensors")
    state = float32_state([tmp_path / "x.safetensors"], tmp_path)
    assert state["c"].dtype == torch.int64
    for name in "abd":
        assert state[name].dtype == torch.float32
        assert torch.equal(state[name], tensors[name].float())


def test_tokenizer_json_alone(changed: Path, checkpoint: Path) -> None:
    """transformers 5 writes no vocab.json and merges.txt: they are taken out of tokenizer.json."""
    for name in ("vocab.json", "merges.txt"):
        (changed / "tokenizer" / name).unlink()
    vocabulary, merges = exporter._bpe(checkpoints.Checkpoint(changed, "x"), changed / "tokenizer")
    assert json.loads(vocabulary) == json.loads((checkpoint / "tokenizer" / "vocab.json").read_text())
    assert merges == (checkpoint / "tokenizer" / "merges.txt").read_text()


# -- weights stored in float16 --------------------------------------------------------------------------------------


def _round(root: Path) -> None:
    """Save a checkpoint's weights in float16, as many are published."""
    for path in root.glob("*/*.safetensors"):
        save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)


def test_weights_stored_in_float16(changed: Path, tmp_path: Path, cli: Cli) -> None:
    """Half the size, the same numbers to the bit, and checked against torch like any other."""
    _round(changed)
    plain = _export_decoder(changed, tmp_path / "plain")
    done = cli("export", changed, tmp_path / "half", "--component", "vae_decoder", "--weights", "fp16",
               "--guidance-scale", "4")  # fmt: skip
    assert done.returncode == 0, done.stderr
    half = bundles.load(tmp_path / "half")
    assert bundles.damaged(half) == []
    assert [held.manifest.guidance_scale for held in (plain, half)] == [7.5, 4.0]
    np.testing.assert_array_equal(_decoded(half), _decoded(plain))
    artifacts = [held.component("vae_decoder").artifact for held in (plain, half)]
    assert [artifact.precision for artifact in artifacts] == ["fp32", "fp32"]
    assert [artifact.facts for artifact in artifacts] == [{}, {"weights": "fp16"}]
    assert artifacts[0].parity == artifacts[1].parity
    assert half.component("vae_decoder").work == plain.component("vae_decoder").work
    assert artifacts[1].files[1].bytes < 0.6 * artifacts[0].files[1].bytes
    assert sorted(path.name for path in (tmp_path / "half" / "vae_decoder").iterdir()) == [
        "config.json", "model.onnx", "model.onnx.data", "reference.npz"
    ]  # fmt: skip
    assert "fp32 (weights fp16)" in cli("inspect", tmp_path / "half").stdout


def test_weights_that_float16_changes(changed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _round(changed)
    path = changed / "vae" / "diffusion_pytorch_model.safetensors"
    state = {name: tensor.float() for name, tensor in load_file(path).items()}
    state["decoder.conv_in.bias"][3] = 0.1
    save_file(state, path)
    message = f"vae: float16 would change 1 of {len(state)} weight tensors, decoder.conv_in.bias first"
    with pytest.raises(ExportError, match=message) as caught:
        exporter.export(str(changed), tmp_path / "out", components=["vae_decoder"], weights="fp16")
    assert caught.value.fix == "export with --weights fp32, or round the checkpoint to float16"
    monkeypatch.setattr(exporter, "_work", None)
    with pytest.raises(ExportError, match="weights are stored in fp32 or fp16, asked for 'fp8'"):
        exporter.export(str(changed), tmp_path / "out", weights="fp8")  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["changed"]


def test_estimate_of_weights_stored_in_float16(checkpoint: Path) -> None:
    """Half of all, and the largest component in float32 while it is made."""
    weights = {folder: sum(path.stat().st_size for path in (checkpoint / folder).glob("*.safetensors"))
               for folder in ("text_encoder", "unet", "vae")}  # fmt: skip
    needed = exporter.estimate(str(checkpoint), weights="fp16").disk - 20 * 2**20
    assert needed == pytest.approx(sum(weights.values()) / 2 + max(weights.values()), rel=0.05)


# -- what a bad one does not leave ----------------------------------------------------------------------------------


def test_a_graph_that_differs_fails_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between trace and check, one bias of the graph's weights is changed."""
    work = exporter._work

    def tampered(step: str, job: dict[str, Any], stage: Any) -> dict[str, Any]:
        if step == "check":
            weights = Path(job["out"]) / job["part"] / "model.onnx.data"
            raw = np.fromfile(weights, np.float32)
            raw[: raw.size // 100] += 0.1
            raw.tofile(weights)
        return work(step, job, stage)

    monkeypatch.setattr(exporter, "_work", tampered)
    with pytest.raises(ExportError, match="vae_decoder: the graph does not compute what torch computes"):
        _export_decoder(checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def _drop(folder: str, name: str) -> Any:
    def change(root: Path) -> None:
        (root / folder / name).unlink()

    return change


def _weights(folder: str, change: Any) -> Any:
    def apply(root: Path) -> None:
        path = next((root / folder).glob("*.safetensors"))
        state = load_file(path)
        change(state)
        save_file(state, path)

    return apply


def _set(folder: str, key: str, value: Any, file: str = "config.json") -> Any:
    def change(root: Path) -> None:
        path = root / folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    return change


def _truncate(root: Path) -> None:
    path = root / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def _pickle(root: Path) -> None:
    path = root / "vae" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("", "_class_name", "FluxPipeline", "model_index.json"), "no supported model family fits .*FluxPipeline"),
        (_set("unet", "in_channels", 9), "in_channels is 9, expected 4"),
        (_set("unet", "use_linear_projection", True), "use_linear_projection is True"),
        (_set("text_encoder", "hidden_act", "gelu"), "hidden_act is 'gelu'"),
        (_set("vae", "block_out_channels", [8, 16]), "the VAE has 2 levels"),
        (_set("vae", "latent_channels", 8), "latent_channels is 8, expected 4"),
        (_set("vae", "scaling_factor", "x"), "scaling_factor is 'x', expected a number"),
        (_set("unet", "cross_attention_dim", [1, 2]), r"cross_attention_dim is \[1, 2\], expected an integer"),
        (_set("unet", "time_cond_proj_dim", 256), "time_cond_proj_dim is 256"),
        (_set("unet", "sample_size", "x"), "sample_size is 'x'"),
        (_drop("unet", "config.json"), r"unet/config.json: cannot be read"),
        (_drop("vae", "diffusion_pytorch_model.safetensors"), "vae has no safetensors file"),
        (_pickle, "a pickle, which can run code"),
        (_truncate, "its header: not valid JSON"),
        (_weights("vae", lambda s: s.pop("decoder.conv_in.bias")), "lacks decoder.conv_in.bias"),
        (_weights("vae", lambda s: s.update(extra=torch.ones(1))), "holds extra, which the network does not have"),
        (_weights("vae", lambda s: s.update({"decoder.conv_in.bias": torch.ones(3)})), r"is \[3\] in the weights"),
        (_weights("vae", lambda s: s.update({"decoder.conv_in.bias": torch.full((16,), torch.nan)})), "gives NaN"),
    ],
    ids=range(18),
)
def test_damaged_checkpoints(changed: Path, tmp_path: Path, change: Any, message: str) -> None:
    change(changed)
    with pytest.raises(ExportError, match=message):
        _export_decoder(changed, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed"]


def test_unknown_component(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no component 'unit'; it has text_encoder, unet"):
        exporter.export(str(checkpoint), tmp_path / "out", components=["unit"])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no-such-directory", "no such directory, and not a Hub id"),
        ("./a/b", "no such directory, and not a Hub id"),
        ("owner/surely-not-cached", "the Hugging Face Hub cannot be reached, nor is it in its cache"),
    ],
)
def test_where_a_model_is_not(model: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ExportError, match=message):
        checkpoints.locate(model)


def test_a_worker_that_dies_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"part": "unet"}
    with pytest.raises(ExportError, match="unet: the process that ran 'trace' died with exit status 1"):
        exporter._work("trace", job, lambda _: None)


def test_sigkill_leaves_no_bundle_and_a_second_run_succeeds(checkpoint: Path, tmp_path: Path, cli: Cli) -> None:
    """Killed at random moments of an export of the VAE decoder, workers and all."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "sdrt", "export", str(checkpoint), str(out), "--component", "vae_decoder"]
    moments = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(moments.uniform(0.3, 9))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if out.exists():  # a machine so quick that the export was over: then it is whole
            assert bundles.damaged(bundles.load(out)) == []
            shutil.rmtree(out)
    assert cli(*command[3:]).returncode == 0
    assert bundles.damaged(bundles.load(out)) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "what the killed runs left is gone"


def test_estimate_comes_before_the_work(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 sizes from the headers; a disk without room is told before anything is traced."""
    needed = exporter.estimate(str(checkpoint))
    weights = sum(path.stat().st_size for path in checkpoint.glob("*/*.safetensors"))
    assert weights * 0.95 < needed.disk - 20 * 2**20 < weights
    monkeypatch.setattr(exporter.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(ExportError, match=r"0 MiB free, the bundle needs 2\d MiB"):
        exporter.export(str(checkpoint), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_scheduler_with_minus_infinity(changed: Path, tmp_path: Path) -> None:
    from diffusers import DPMSolverMultistepScheduler

    DPMSolverMultistepScheduler().save_pretrained(changed / "scheduler")
    assert "-Infinity" in (changed / "scheduler" / "scheduler_config.json").read_text()
    made = _export_decoder(changed, tmp_path / "out")
    assert "Infinity" not in made.path(made.manifest.scheduler).read_text()


@pytest.mark.parametrize("folder", ["scheduler", "tokenizer"])
def test_what_is_missing_is_told_before_the_work(
    changed: Path, tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "_work", None)
    shutil.rmtree(changed / folder)
    with pytest.raises((ExportError, bundles.BundleError), match=folder):
        _export_decoder(changed, tmp_path / "out")


def test_export_never_replaces_what_it_reads(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(bundle, tmp_path / "out"))
    shutil.copytree(checkpoint, out / "checkpoint")
    with pytest.raises(bundles.BundleError, match="is, or holds, what is read"):
        exporter.export(str(out / "checkpoint"), out, force=True)
    shutil.rmtree(out / "checkpoint")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(bundles.BundleError, match=r"holds notes\.txt, which is not part of the bundle"):
        exporter.export(str(checkpoint), out, force=True)
    assert (out / "notes.txt").read_text() == "mine"


def test_sigterm_cleans_up_and_a_killed_parent_takes_its_worker_along(checkpoint: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "sdrt",
        "export",
        str(checkpoint),
        str(tmp_path / "out"),
        "--component",
        "vae_decoder",
    ]
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
        time.sleep(4)
        workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        assert workers
        process.send_signal(number)
        assert process.wait() == (128 + number if number == signal.SIGTERM else -number)
        deadline = time.monotonic() + 10
        while any(_alive(pid) for pid in workers) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(_alive(pid) for pid in workers)
        assert number == signal.SIGKILL or list(tmp_path.iterdir()) == []


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
