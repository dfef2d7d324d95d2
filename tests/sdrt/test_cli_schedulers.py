"""sdrt schedulers, and steps whose places are given by hand."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

from sdrt import InputError, Pipeline, schedulers
from sdrt.schedulers import CLASSES, NAMES
from tests.conftest import Cli

SMALL: dict[str, Any] = {"width": 64, "height": 64, "seed": 5, "output_type": "np"}


def test_every_scheduler_is_listed(cli: Cli) -> None:
    rows = json.loads(cli("schedulers", "--json", "-").stdout)
    by_name = {row["name"]: row for row in rows}
    assert set(NAMES) <= set(by_name)
    assert {row["diffusers"] for row in rows} == set(CLASSES)
    assert all(row["what"] and row["paper"] for row in rows)
    for row in rows:
        for schedule in row["schedules"]:
            schedulers.make(schedulers.resolve(f"{row['name']} {schedule}", {}), 5)
    assert by_name["Heun"]["calls"] == by_name["DPM++ SDE"]["calls"] == 2
    assert by_name["Euler"]["calls"] == 1
    assert {name for name, row in by_name.items() if row["stochastic"]} >= {"Euler a", "DPM++ 2M SDE", "DDPM", "LCM"}
    assert not any(by_name[name]["stochastic"] for name in ("Euler", "DDIM", "UniPC", "DPM++ 2M"))


def test_the_list_as_a_person_reads_it(cli: Cli) -> None:
    shown = cli("schedulers").stdout
    assert all(name in shown for name in (*NAMES, "arXiv 2211.01095", "each step", "some steps", "with eta"))
    letters = re.findall(r"(?<=[:,] )(\w) [A-Z]", shown[shown.index("(DPM++ 2M Karras)") :].split("\ntakes")[0])
    assert len(letters) == len(set(letters)) == len(schedulers.SUFFIXES)


def test_timesteps_by_hand(pipe: Pipeline) -> None:
    """The scheduler's own, given by hand, are the same picture; others are another, of as many steps as they are."""
    own = pipe("a lighthouse", scheduler="DPM++ 2M", num_inference_steps=4, **SMALL)
    config = schedulers.resolve("DPM++ 2M", pipe.scheduler_config)
    timesteps = [float(t) for t in schedulers.make(config, 4).timesteps]
    same = pipe("a lighthouse", scheduler="DPM++ 2M", timesteps=timesteps, **SMALL)
    np.testing.assert_allclose(own.images, same.images, atol=1e-4)
    other = pipe("a lighthouse", scheduler="DPM++ 2M", timesteps=[999, 500, 100], **SMALL)
    assert len(other.timings.steps) == 3
    assert np.abs(own.images - other.images).max() > 0.01


def test_sigmas_by_hand(pipe: Pipeline) -> None:
    """With and without the 0 at their end."""
    sigmas = [10.0, 3.0, 0.5]
    with_end = pipe("a lighthouse", scheduler="Euler", sigmas=[*sigmas, 0.0], **SMALL)
    assert len(with_end.timings.steps) == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"timesteps": []}, r"timesteps is \[\], expected a list of 1 to"),
        ({"timesteps": "999,1"}, "timesteps is '999,1', expected a list of 1 to"),
        ({"timesteps": [1, 999]}, "timesteps must fall"),
        ({"timesteps": [5000, 1]}, "timestep"),
        ({"sigmas": [1.0, float("nan")]}, "sigmas"),
        ({"timesteps": [999, 1], "sigmas": [3.0, 1.0]}, "both given"),
        ({"scheduler": "DDIM", "sigmas": [3.0, 1.0]}, "DDIMScheduler takes no sigmas"),
        ({"scheduler": "Euler", "eta": 0.5}, "EulerDiscreteScheduler takes no eta"),
    ],
    ids=str,
)
def test_steps_that_are_refused(pipe: Pipeline, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipe("a lighthouse", **{"scheduler": "Euler", **SMALL, **given})


def test_lists_on_the_command_line(cli: Cli, tmp_path: Any) -> None:
    out = tmp_path / "a.png"
    told = cli("generate", "a red star", "--scheduler", "Euler", "--timesteps", "999,600,200", "-o", out, "--json", "-")
    assert len(json.loads(told.stdout)["seconds"]["steps"]) == 3
    refused = cli("generate", "a red star", "--sigmas", "14.6,x", "-o", out)
    assert refused.returncode == 2
    assert "--sigmas '14.6,x': expected numbers" in refused.stderr
