"""Sessions one at a time: pipelines with low_memory, beside ordinary ones."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sdrt
from sdrt import bundle as bundles
from sdrt.engine import open_session
from sdrt.pipeline import Pipeline
from tests.conftest import Model

SMALL: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 3, "seed": 1, "scheduler": "DDIM"}
IN_TURN = ["text_encoder", "unet", "vae_decoder"]


class Watched:
    """Opens sessions of the null engine; ``said`` tells what was opened (+) and closed (-), ``broken`` what cannot."""

    def __init__(self, bundle: Path, broken: str = "") -> None:
        self.bundle, self.broken = bundles.load(bundle), broken
        self.said: list[str] = []

    def __call__(self, name: str) -> Any:
        if name == self.broken:
            raise sdrt.BundleError(f"{name}: is damaged")
        session = open_session(self.bundle, name, engine="null")
        self.said.append(f"+{name}")
        close = session.close

        def closing() -> None:
            self.said.append(f"-{name}")
            close()

        session.close = closing  # type: ignore[method-assign]
        return session

    def pipeline(self) -> Pipeline:
        return Pipeline(self.bundle, {}, self, low_memory=True)

    def check(self) -> None:
        """Whatever was opened was closed before anything else was."""
        assert self.said[::2] == [f"+{name[1:]}" for name in self.said[1::2]]
        assert [name[1:] for name in self.said[::2]] == [name[1:] for name in self.said[1::2]]


@pytest.fixture
def watched(bundle: Path) -> Watched:
    return Watched(bundle)


def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"clip_skip": 1, "num_images_per_prompt": 2},
        {"guidance_scale": 1.0, "scheduler": "PLMS"},
        {"image": photo(), "strength": 0.7},
    ],
    ids=lambda arguments: ",".join(arguments) or "plain",
)
@pytest.mark.parametrize("name", ["tiny-sd", "sdxl"])
def test_pictures_are_the_same(models: Callable[[str], Model], name: str, arguments: dict[str, Any]) -> None:
    arguments = SMALL | {"output_type": "np"} | arguments
    if name == "sdxl":
        arguments.pop("clip_skip", None)
    path = models(name).bundle
    with Pipeline.from_pretrained(path) as kept, Pipeline.from_pretrained(path, low_memory=True) as pipe:
        for prompt in ("a fox", "a cat"):
            np.testing.assert_array_equal(kept(prompt, **arguments).images, pipe(prompt, **arguments).images)
            assert not pipe.sessions


def test_openvino_makes_the_same_pictures(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from sdrt_engines.build import build

    build(bundle, tmp_path / "ov", "openvino")
    with Pipeline.from_pretrained(tmp_path / "ov") as kept:
        expected = kept("a fox", **SMALL, output_type="np").images
    with Pipeline.from_pretrained(tmp_path / "ov", low_memory=True) as pipe:
        for _ in range(2):
            np.testing.assert_array_equal(pipe("a fox", **SMALL, output_type="np").images, expected)


def test_components_come_in_turn(watched: Watched) -> None:
    with watched.pipeline() as pipe:
        for _ in range(2):
            timings = pipe("a fox", **SMALL).timings
            assert watched.said == [sign + name for name in IN_TURN for sign in "+-"]
            assert timings.load > 0
            watched.said.clear()
        pipe("a fox", **SMALL, image=photo(), strength=1.0, output_type="latent")
        assert watched.said == [
            sign + name for name in ("text_encoder", "vae_encoder", "unet") for sign in "+-"
        ]  # fmt: skip


@pytest.mark.parametrize("low_memory", [False, True])
def test_prepared_for_the_sizes_before_the_first_call(bundle: Path, low_memory: bool) -> None:
    """Not again for the same sizes, where the session is the same."""
    said: list[tuple[str, dict[str, int]]] = []
    previewing = False

    def opener(name: str) -> Any:
        session = open_session(held, name, engine="null")
        prepare, run = session.prepare, session.run
        prepared: list[bool] = []

        def preparing(sizes: dict[str, int]) -> bool:
            said.append((name, dict(sizes)))
            prepared.append(True)
            prepare(sizes)
            return True

        def running(**inputs: Any) -> Any:
            assert prepared or previewing
            return run(**inputs)

        session.prepare, session.run = preparing, running  # type: ignore[method-assign, assignment]
        return session

    held = bundles.load(bundle)
    fixed = {"T": 77, "H": 64, "W": 72}
    expected = [("text_encoder", fixed | {"B": 2}), ("unet", fixed | {"B": 4}), ("vae_decoder", fixed | {"B": 2})]
    with Pipeline(held, {}, opener, low_memory=low_memory) as pipe:
        arguments = SMALL | {"width": 72, "num_images_per_prompt": 2}
        assert pipe("a fox", **arguments).timings.load > 0
        assert said == expected
        again = pipe("a fox", **arguments).timings.load
        assert said[3:] == (expected if low_memory else [])
        assert (again > 0) is low_memory
        said.clear()
        pipe("a fox", **arguments | {"guidance_scale": 1.0, "output_type": "latent"})
        assert said == [("text_encoder", fixed | {"B": 1}), ("unet", fixed | {"B": 2})]
        said.clear()
        previewing = True
        pipe.decode(np.zeros((1, 4, 8, 8), np.float32))  # after which the decoder may be compiled for that size only
        previewing = False
        pipe("a fox", **arguments)
        assert said == expected


def test_the_denoiser_is_gone_with_the_last_step(watched: Watched) -> None:
    with watched.pipeline() as pipe:
        open_by_step = [list(pipe.sessions) for _ in pipe.stream("a fox", **SMALL)]
    assert open_by_step == [["unet"], ["unet"], []]


def test_nothing_is_computed_or_loaded_by_a_check(watched: Watched) -> None:
    with watched.pipeline() as pipe:
        pipe.check(sdrt.GenerationRequest("a fox"))
        with pytest.raises(sdrt.InputError, match="clip_skip is 9"):
            pipe("a fox", clip_skip=9)
    assert not watched.said


def test_previews_take_the_denoisers_place(bundle: Path, watched: Watched) -> None:
    """The picture is that of a generation without previews, and the preview that of an ordinary pipeline."""
    previews: list[np.ndarray] = []

    def preview(pipe: Pipeline, index: int, timestep: float, values: dict[str, Any]) -> None:
        if index != 1:
            previews.append(pipe.decode(values["latents"], "np"))

    with Pipeline.from_pretrained(bundle) as kept, Pipeline.from_pretrained(bundle, low_memory=True) as pipe:
        expected = kept("a fox", **SMALL, output_type="np", callback_on_step_end=preview).images
        got = pipe("a fox", **SMALL, output_type="np", callback_on_step_end=preview).images
    np.testing.assert_array_equal(got, expected)
    assert len(previews) == 4
    np.testing.assert_array_equal(previews[:2], previews[2:])
    with watched.pipeline() as pipe:
        pipe("a fox", **SMALL, callback_on_step_end=preview)
    places = ["text_encoder", "unet", "vae_decoder", "unet", "vae_decoder", "vae_decoder"]
    assert watched.said == [sign + name for name in places for sign in "+-"]


def test_a_preview_from_another_thread(bundle: Path) -> None:
    with Pipeline.from_pretrained(bundle, low_memory=True) as pipe, Pipeline.from_pretrained(bundle) as kept:
        previews = []
        for step in pipe.stream("a fox", **SMALL):
            thread = threading.Thread(
                target=lambda latents: previews.append(pipe.decode(latents, "np")), args=(step.latents,)
            )
            thread.start()
            thread.join()
        np.testing.assert_array_equal(step.latents, kept("a fox", **SMALL, output_type="latent").images)
        np.testing.assert_array_equal(previews[-1], kept.decode(step.latents, "np"))


def test_threads_take_turns(bundle: Path) -> None:
    with Pipeline.from_pretrained(bundle, low_memory=True) as pipe:
        arguments = SMALL | {"output_type": "np", "num_inference_steps": 2}
        expected = [pipe("a fox", **(arguments | {"seed": i})).images for i in range(4)]
        got: dict[int, np.ndarray] = {}

        def work(i: int) -> None:
            got[i] = pipe("a fox", **(arguments | {"seed": i})).images

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i in range(4):
        np.testing.assert_array_equal(got[i], expected[i])


@pytest.mark.parametrize("ended", ["closed", "collected", "cancelled", "callback"])
def test_a_generation_that_ends_early_leaves_nothing_open(watched: Watched, ended: str) -> None:
    pipe = watched.pipeline()
    if ended == "callback":
        with pytest.raises(ZeroDivisionError):
            pipe("a fox", **SMALL, callback_on_step_end=lambda *_: 1 / 0)  # type: ignore[arg-type, return-value]
    else:
        stream: Any = pipe.stream("a fox", **SMALL)
        next(stream)
        if ended == "closed":
            stream.close()
        elif ended == "collected":
            del stream
            gc.collect()
        else:
            pipe.cancel()
            with pytest.raises(sdrt.Cancelled):
                next(stream)
    assert not pipe.sessions
    watched.check()
    pipe("a fox", **SMALL)
    watched.check()


@pytest.mark.parametrize("broken", [*IN_TURN, "vae_encoder"])
def test_a_component_that_cannot_be_opened(bundle: Path, broken: str) -> None:
    watched = Watched(bundle, broken)
    pipe = watched.pipeline()
    with pytest.raises(sdrt.BundleError, match=f"{broken}: is damaged"):
        pipe("a fox", **SMALL, image=photo(), strength=1.0)
    assert not pipe.sessions
    watched.check()
    watched.broken = ""
    pipe("a fox", **SMALL, image=photo(), strength=1.0)


def test_closing_from_another_thread(watched: Watched) -> None:
    pipe = watched.pipeline()
    stream = pipe.stream("a fox", **SMALL)
    next(stream)
    thread = threading.Thread(target=pipe.close)
    thread.start()
    thread.join()
    watched.check()
    with pytest.raises(sdrt.InputError, match="the pipeline is closed"):
        next(stream)
    for refused in (lambda: pipe("a fox", **SMALL), lambda: pipe.decode(np.zeros((1, 4, 8, 8), np.float32))):
        with pytest.raises(sdrt.InputError, match="the pipeline is closed"):
            refused()
    watched.check()


def test_what_can_be_told_without_loading_is_told_at_once(bundle: Path) -> None:
    with pytest.raises(sdrt.EngineUnavailable, match="no engine 'warp'"):
        Pipeline.from_pretrained(bundle, "warp", low_memory=True)
    with pytest.raises(sdrt.InputError, match="there is no component 'net'"):
        Pipeline.from_pretrained(bundle, device="net=cpu", low_memory=True)
    with (
        Pipeline.from_pretrained(bundle, device="unet=warp", low_memory=True) as pipe,
        pytest.raises(sdrt.DeviceError, match="no device 'warp'"),
    ):
        pipe("a fox", **SMALL)
    assert not pipe.sessions
