"""The table and the figures of schedulers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import sigmas
from benchmarks.alignment import steps


def test_table_and_figure(tmp_path: Path) -> None:
    """Best first, two calls a step marked, what was not made left open."""

    def run(name: str, count: int, right: list[float]) -> dict[str, object]:
        setting = {"scheduler": name, "steps": count}
        return {"setting": setting, "sampler": name, "right": [{"everything": value} for value in right]}

    first, second = tmp_path / "1.json", tmp_path / "2.json"
    first.write_text(json.dumps({"runs": [run("Euler", 4, [1.0, 0.0]), run("Euler", 8, [1.0, 0.0])]}))
    second.write_text(json.dumps({"runs": [run("Heun", 4, [1.0, 1.0])]}))
    shares = steps.read([first, second])
    assert steps.table(shares).splitlines() == [
        "| | 4 steps | 8 steps |", "|---|---|---|", "| Heun (two calls a step) | 100 % | – |", "| Euler | 50 % | 50 % |",
    ]  # fmt: skip
    texts = [node.text for node in ElementTree.fromstring(steps.figure(shares)).iter() if node.tag.endswith("text")]
    assert texts[1:] == ["4", "8", "Heun ×2", "100", "Euler", "50", "50"]


def test_the_figure_of_sigmas_is_the_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sigmas", str(tmp_path / "sigmas.svg")])
    sigmas.main()
    docs = Path(__file__).resolve().parents[2] / "docs" / "sigmas.svg"
    made = (tmp_path / "sigmas.svg").read_text(encoding="utf-8")
    assert made.count("<circle") == docs.read_text(encoding="utf-8").count("<circle") > 300
