"""One test kind for all engines: each that is found here must keep the Session and Engine contract."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from sdrt import DeviceError, EngineUnavailable, InputError, bundle
from sdrt.engine import NUMPY_DTYPES, BuildOptions, OpenOptions, Session, engine_names, find_engine, open_session
from sdrt.verify import admitted, measure, passed, reference_cases
from tests.nvidia import stand_in

OF_FIXED_SIZES = {
    "coreml": BuildOptions(shapes=((72, 64), (64, 64), (72, 136), (136, 72)), target="ios18"),
    "tensorrt-rtx": BuildOptions(shapes=((72, 64), (64, 64), (72, 136), (136, 72)), batch=3),
}
"""Engines whose artifacts have no free sizes: those of these tests, and of the reference cases."""


ON_A_STAND_IN = ("tensorrt-rtx",)
"""Engines whose devices are not here, on one of host memory (``tests/nvidia.py``)."""


def usable() -> list[str]:
    found = []
    for name in engine_names():
        try:
            find_engine(name).devices()
        except EngineUnavailable:
            continue
        found.append(name)
    return found


@pytest.fixture(scope="module", params=[*usable(), *ON_A_STAND_IN])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with contextlib.ExitStack() as stack:
        if request.param in ON_A_STAND_IN:
            stack.enter_context(stand_in(tmp_path_factory.mktemp("plans")))
        yield str(request.param)


@pytest.fixture(scope="module")
def built(engine: str, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sdrt_engines.build import build

    out = tmp_path_factory.mktemp("built") / engine
    build(bundle, out, engine, OF_FIXED_SIZES.get(engine))
    return out


def opened(built: Path, name: str, engine: str) -> Session:
    """On the device that builds are checked on."""
    return open_session(bundle.load(built), name, engine=engine, device=find_engine(engine).CHECKS_ON)


@pytest.fixture(scope="module", params=["text_encoder", "unet", "vae_encoder", "vae_decoder"])
def session(engine: str, built: Path, request: pytest.FixtureRequest) -> Iterator[Session]:
    made = opened(built, request.param, engine)
    yield made
    made.close()


def inputs_of(session: Session, **sizes: int) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    sizes = {"B": 2, "H": 64, "W": 72, "T": 77} | sizes
    arrays: dict[str, Any] = {}
    for spec in session.spec.inputs:
        shape = spec.at(sizes)
        if spec.dtype == "i64":
            arrays[spec.name] = generator.integers(0, 1000, shape)
        else:
            arrays[spec.name] = generator.standard_normal(shape).astype(NUMPY_DTYPES[spec.dtype])
    return arrays


def test_both_engines_of_the_foundation_are_here() -> None:
    assert {"null", "onnxruntime"} <= set(usable())


def test_devices(engine: str) -> None:
    devices = find_engine(engine).devices()
    assert devices
    assert all(device.name == device.name.lower() and device.description for device in devices)


def test_precisions(engine: str) -> None:
    """fp32 is what a build is in when nothing else is asked for."""
    precisions = find_engine(engine).PRECISIONS
    assert "fp32" in precisions
    assert set(precisions) <= set(get_args(bundle.Precision))


def test_outputs_have_their_names_types_and_shapes(session: Session) -> None:
    for sizes in ({"B": 1, "H": 64, "W": 64}, {"B": 3, "H": 136, "W": 72}):
        outputs = session.run(**inputs_of(session, **sizes))
        assert list(outputs) == [spec.name for spec in session.spec.outputs]
        for spec in session.spec.outputs:
            assert outputs[spec.name].dtype == NUMPY_DTYPES[spec.dtype]
            assert outputs[spec.name].shape == spec.at({"T": 77} | sizes)


def test_caller_owns_the_result(session: Session) -> None:
    """A later call, of the same or another shape, must not write into an earlier result."""
    first = session.run(**inputs_of(session))
    copy = {name: array.copy() for name, array in first.items()}
    other = inputs_of(session)
    for name, array in other.items():
        other[name] = array[::-1].copy() if array.ndim > 1 else array
    session.run(**other)
    session.run(**inputs_of(session, B=1))
    for name, array in first.items():
        np.testing.assert_array_equal(array, copy[name])
        assert array.flags.writeable


def test_inputs_are_left_alone_and_may_be_strided(session: Session) -> None:
    arrays = inputs_of(session)
    strided = {name: np.asfortranarray(array) for name, array in arrays.items()}
    expected, got = session.run(**arrays), session.run(**strided)
    for name in expected:
        np.testing.assert_array_equal(expected[name], got[name])
    for name, array in inputs_of(session).items():
        np.testing.assert_array_equal(arrays[name], array)


def test_inputs_may_be_read_only(session: Session) -> None:
    arrays = inputs_of(session)
    expected = session.run(**arrays)
    for array in arrays.values():
        array.flags.writeable = False
    got = session.run(**arrays)
    for name in expected:
        np.testing.assert_array_equal(expected[name], got[name])


def test_bound_constants_are_kept(engine: str, built: Path) -> None:
    session = opened(built, "unet", engine)
    arrays = inputs_of(session)
    expected = session.run(**arrays)["out_sample"]
    text = arrays.pop("encoder_hidden_states")
    bound = text.copy()
    session.bind(encoder_hidden_states=bound)
    for _ in range(2):
        np.testing.assert_array_equal(session.run(**arrays)["out_sample"], expected)
    session.bind(encoder_hidden_states=text[:1].copy())
    arrays["sample"] = arrays["sample"][:1]
    np.testing.assert_allclose(session.run(**arrays)["out_sample"], expected[:1], atol=1e-4)
    session.close()


def test_preparing_is_for_the_calls_that_follow(engine: str, built: Path) -> None:
    """Nothing is left to be compiled by them, and they compute the same."""
    session = opened(built, "unet", engine)
    arrays = inputs_of(session)
    expected = session.run(**arrays)["out_sample"]
    session.prepare({"B": 1, "H": 64, "W": 64, "T": 77})
    session.run(**inputs_of(session, B=1, H=64, W=64))
    assert not session.prepare({"B": 1, "H": 64, "W": 64, "T": 77})
    np.testing.assert_allclose(session.run(**arrays)["out_sample"], expected, atol=1e-5)
    session.close()


def test_bad_inputs_are_told(session: Session) -> None:
    arrays = inputs_of(session)
    name = next(iter(arrays))
    with pytest.raises(InputError, match="has no input 'colour'"):
        session.run(**arrays, colour=arrays[name])
    with pytest.raises(InputError, match=f"input {name} is missing"):
        session.run(**{other: array for other, array in arrays.items() if other != name})
    with pytest.raises(InputError, match=rf"input {name} is float64\["):
        session.run(**(arrays | {name: arrays[name].astype(np.float64)}))
    with pytest.raises(InputError, match=f"input {name} is list"):
        session.run(**(arrays | {name: arrays[name].tolist()}))
    with pytest.raises(InputError, match=rf"input {name} is .*\[.*\], engine expects .*\["):
        session.run(**(arrays | {name: arrays[name][..., None]}))


def test_inputs_must_agree(engine: str, built: Path) -> None:
    session = opened(built, "unet", engine)
    arrays = inputs_of(session)
    arrays["encoder_hidden_states"] = arrays["encoder_hidden_states"][:1]
    with pytest.raises(InputError, match=r"encoder_hidden_states has shape \[1, 77, 32\], .* must be \[2, 77, 32\]"):
        session.run(**arrays)
    session.close()


def test_closed_session(engine: str, built: Path) -> None:
    session = opened(built, "vae_decoder", engine)
    session.close()
    session.close()
    with pytest.raises(InputError, match="closed"):
        session.run()


def test_parity_with_torch(engine: str, session: Session, built: Path) -> None:
    """Every reference case, in the precision built; the null engine computes nothing, and must be seen to."""
    held = bundle.load(built)
    name = next(n for n, c in held.manifest.components.items() if c == session.spec)
    figures = list(measure(held, name, session))
    cases = list(admitted(held, name, session.spec.artifact.profiles))
    assert len(cases) == len(reference_cases(held, name)) or (cases and engine in OF_FIXED_SIZES)
    assert len(figures) == len(cases) * len(session.spec.outputs)
    assert all(passed(parity, "fp32") for parity in figures) == (engine != "null")


def test_unknown_option_and_device(engine: str, built: Path) -> None:
    held = bundle.load(built)
    with pytest.raises(DeviceError, match="no device 'nowhere'"):
        open_session(held, "unet", engine=engine, device="nowhere")
    with pytest.raises(InputError, match="no option 'colour'"):
        open_session(held, "unet", engine=engine, options=OpenOptions(extra={"colour": "red"}))
