"""The probe: FLOP are counted right, and every engine that computes has rates. Never how fast."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sdrt.engine import OpenOptions, engine_names, find_engine
from sdrt.errors import BuildError, DeviceError, EngineUnavailable, InputError
from sdrt_engines import probe
from sdrt_engines.probe import Size, rates

SMALL = Size(image=(1, 8), channels=16, tokens=(1, 32), narrow=32, wide=64, depth=2)


def _usable() -> list[str]:
    names = []
    for name in engine_names():
        try:
            if [d.name for d in find_engine(name).devices()] != [find_engine(name).CHECKS_ON]:
                names.append(name)
        except EngineUnavailable:
            continue
    return names


@pytest.mark.parametrize(
    ("engine", "precision"), [(name, p) for name in _usable() for p in find_engine(name).PRECISIONS]
)  # fmt: skip
def test_rates(engine: str, precision: Any) -> None:
    """Of every engine in every precision: built where it must be, opened on its first device, run."""
    try:
        found = rates(engine, precision=precision, threads=1, seconds=0, size=SMALL)
    except BuildError as error:
        if "nothing here computes in bfloat16" not in str(error):
            raise
        pytest.skip(str(error))  # the engine's own words: a build in bf16 wants a processor that can check it
    assert set(found) == (set() if engine == "null" else {"convolution", "matmul"})
    assert all(0 < rate < math.inf for rate in found.values())


def test_flop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chain's work by hand, over a second."""
    monkeypatch.setattr(probe, "_best_time", lambda *_: 1.0)
    convolution = 8 * 8 * 9 * (8 * 16 + 16 * 16 + 16 * 16 + 16 * 8)
    matmul = 32 * (8 * 32 + 32 * 64 + 64 * 32 + 32 * 8)
    assert rates("onnxruntime", size=SMALL) == {"convolution": 2 * convolution, "matmul": 2 * matmul}


def test_the_best_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock goes 9 seconds in the warm-up, then 4, 2, 3 in the runs."""
    now = [0.0]
    durations = iter([9.0, 4.0, 2.0, 3.0] * 2)
    opened: list[Any] = []

    class Session:
        def __init__(self, spec: Any) -> None:
            self.spec = spec

        def bind(self, **inputs: Any) -> None:
            assert {name: array.shape for name, array in inputs.items()} in ({"x": (1, 8, 8, 8)}, {"x": (1, 32, 8)})

        def run(self) -> None:
            now[0] += next(durations)

        def close(self) -> None:
            opened.append("closed")

    def open_session(bundle: Any, name: str, **how: Any) -> Session:
        opened.append(how)
        return Session(bundle.component(name))

    monkeypatch.setattr(probe, "open_session", open_session)
    monkeypatch.setattr(probe.time, "perf_counter", lambda: now[0])
    found = rates("onnxruntime", "cpu", threads=3, extra={"spin": "false"}, seconds=8, size=SMALL)
    assert found["convolution"] == 8 * 8 * 9 * (8 * 16 + 16 * 16) * 2  # twice each, over 2 seconds, 2 FLOP a MAC
    how = {"engine": "onnxruntime", "device": "cpu", "options": OpenOptions(threads=3, extra={"spin": "false"})}
    assert opened == [how, "closed"] * 2


def test_the_engines_errors_are_told() -> None:
    with pytest.raises(DeviceError, match="has no device 'tpu'"):
        rates("onnxruntime", "tpu", seconds=0, size=SMALL)
    with pytest.raises(InputError, match="has no option 'warp'"):
        rates("onnxruntime", extra={"warp": "9"}, seconds=0, size=SMALL)
    with pytest.raises(BuildError, match="precision fp8"):
        rates("onnxruntime", precision="fp8", seconds=0, size=SMALL)


def test_it_is_no_engine() -> None:
    assert "probe" not in engine_names()
    with pytest.raises(EngineUnavailable, match="there is no engine 'probe'"):
        find_engine("probe")
