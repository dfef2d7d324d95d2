"""Text, or text and a picture → picture: encode, denoise, decode. The loop is visible here, and only here."""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from sdrt import bundle as bundles
from sdrt import by_component, image, schedulers
from sdrt.bundle import Bundle, TensorSpec
from sdrt.engine import (
    NUMPY_DTYPES,
    DeviceMemory,
    OpenOptions,
    Session,
    check_profiles,
    devices_by_component,
    open_session,
    opening_engine,
    threads_by_component,
    widened,
)
from sdrt.errors import BundleError, Cancelled, InputError, NumericsError, SdrtError
from sdrt.noise import GENERATORS, Generator, StepNoise, initial_latents, slerp
from sdrt.prompt import TextConditioner
from sdrt.request import Arguments, GenerationRequest
from sdrt.sessions import Clock, Kept, OneAtATime, Sessions, closed

logger = logging.getLogger("sdrt")

Array = NDArray[np.float32]
Callback = Callable[["Pipeline", int, float, dict[str, Any]], Mapping[str, Any] | None]
"""As diffusers' ``callback_on_step_end``: (pipe, index, timestep, {"latents": …, "predicted_x0": …, "total": steps}) →
None, or a dict whose ``latents`` replace the step's. Raise ``Cancelled``, or call ``pipe.cancel()``, to stop."""

SOURCES = ("latents", "timestep", "text.hidden_states", "text.pooled", "time_ids")
"""What this version can feed a denoiser with."""

TIME_IDS = 6
"""Numbers in ``time_ids``: original size, crop's top left corner and target size."""


@dataclass(frozen=True)
class Step:
    """One step of the loop: latents f32[B,C,h,w] after it, the predicted x0 likewise, and the seconds it took.

    sigma: its noise level (see ``Scheduler.sigmas``). guided: whether the network ran for the
    negative prompt, too.
    """

    index: int
    total: int
    timestep: float
    sigma: float
    guided: bool
    latents: Array
    predicted_x0: Array
    seconds: float


@dataclass(frozen=True)
class Timings:
    """Seconds of one generation, by stage.

    vae_encoder is 0.0 without an initial picture, vae_decoder 0.0 for ``"latent"``. steps holds whole steps, one entry
    a network call; network is what the denoiser's session took of each. post: from the decoder's sample to pictures.
    load: opening components within the generation, compiling them for its sizes, and releasing them (all of it with
    low_memory; else the VAE's encoder at its first use, and what an engine compiles for a size); 0.0 where none was.
    total is more than the sum: waiting for the turn, handing the denoiser its constants, drawing noise, and what the
    caller does between steps (previews, with what they load) belong to no stage.
    """

    tokenize: float
    text_encoder: float
    vae_encoder: float
    steps: tuple[float, ...]
    network: tuple[float, ...]
    vae_decoder: float
    post: float
    load: float
    total: float

    @property
    def host(self) -> tuple[float, ...]:
        """What of each step was not the network: the loop, guidance, the scheduler."""
        return tuple(step - network for step, network in zip(self.steps, self.network, strict=True))


@dataclass(frozen=True)
class Result:
    """images: PIL pictures, or one array (see ``output_type``); seeds: one a picture; timings in seconds.

    scheduler, size (width, height) and guidance_scale: those of the request, or the model's own.
    """

    images: Any
    seeds: list[int]
    timings: Timings
    scheduler: str = ""
    size: tuple[int, int] = (0, 0)
    guidance_scale: float = 0.0


@dataclass(frozen=True)
class Opening:
    """What a pipeline was asked to be opened with (see ``Pipeline.from_pretrained``); devices as one text."""

    engine: str | None = None
    device: str | None = None
    options: OpenOptions = field(default_factory=OpenOptions)
    low_memory: bool = False


@dataclass
class _Run:
    """What one generation holds.

    size: (width, height) in pixels. shape: one picture's latents, (C, H/8, W/8). sampler: the scheduler's name. tokens:
    token ids by text encoder, by text (the negative prompts first; none for them where they are ``zeros``). begin: the
    network call that comes first, not 0 in image to image. ticks, sigmas, guided: of each step to come, the timestep
    as the network takes it, its noise level, and whether it is guided. What comes after is as in Timings, and is
    filled on the way (load: by opening and release).
    """

    request: GenerationRequest
    seeds: list[int]
    size: tuple[int, int]
    shape: tuple[int, int, int]
    scheduler: schedulers.Scheduler
    sampler: str
    tokens: list[list[list[int]]]
    zeros: bool
    begin: int
    ticks: list[Array]
    sigmas: list[float]
    guided: list[bool]
    tokenize: float
    text_encoder: float = 0.0
    vae_encoder: float = 0.0
    steps: list[float] = field(default_factory=list)
    network: list[float] = field(default_factory=list)
    load: list[float] = field(default_factory=list)

    def sizes(self, batch: int) -> dict[str, int]:
        """What a component's symbolic dimensions are, with this batch of its own."""
        return {"B": batch, "T": len(self.tokens[0][0]), "H": self.size[1], "W": self.size[0]}


class Pipeline:
    """A bundle, loaded: one session a component. Threads may share it; their generations take turns.

    sessions: those that are open, by component.

    with Pipeline.from_pretrained("bundle") as pipe:
        pipe("a lighthouse", seed=1).images[0].save("lighthouse.png")
    """

    def __init__(
        self, bundle: Bundle, sessions: dict[str, Session], opener: Callable[[str], Session] | None = None,
        *, low_memory: bool = False,
    ) -> None:  # fmt: skip
        """``opener`` loads, by name, a component when it is first needed; with ``low_memory`` each time."""
        self.bundle = bundle
        self.sessions = sessions
        self.opening = Opening()
        self._loaded: Sessions = (OneAtATime if low_memory else Kept)(sessions, opener or _no_opener)
        facts = bundle.manifest
        self._text = TextConditioner(bundle)
        self.scheduler_config: dict[str, Any] = schedulers.read_config(bundle.path(facts.scheduler))
        self._turn = threading.Lock()
        self._turn_owner: int | None = None
        self._cancelled = threading.Event()
        self._closed = False

    @classmethod
    def from_pretrained(
        cls, path: str | Path, engine: str | None = None, device: str | Mapping[str, str] | None = None,
        *, threads: int | None = None, options: Mapping[str, str] | None = None, cache: str | Path | None = None,
        low_memory: bool = False,
    ) -> Pipeline:  # fmt: skip
        """Load a bundle.

        engine: None for the one it was built for (ONNX Runtime for an ONNX bundle). device: the engine's own name for
        it, None for its default; never another than asked for. Or names by component, ``{"unet": "gpu"}`` or
        ``"unet=gpu,vae_decoder=cpu"``; the others run on the default. threads: compute threads, None for the engine's
        choice; with devices by component, for those on a cpu or on the default. options: the engine's own, ``{"name":
        "value"}``. cache: a folder for what the engine compiles, so that the next opening is faster; not every engine
        has use for one.

        low_memory: load nothing now. Each generation loads, runs and releases the text encoders, the VAE's encoder, the
        denoiser and the VAE's decoder in turn, so that never two networks are in memory; the pictures are the same.
        ``Timings.load`` is what that took. A preview (``decode`` while steps are to come) releases the denoiser, and
        the next step loads it again. What only loading can tell, such as an unknown device or option, is raised by the
        first generation.

        Raises BundleError, EngineUnavailable, DeviceError, InputError.
        """
        if not isinstance(path, (str, Path)):
            raise InputError(f"path is {type(path).__name__}, expected a bundle's directory")
        if threads is not None and (type(threads) is not int or threads < 1):
            raise InputError(f"threads is {threads!r}, expected an integer of at least 1")
        if options is not None and not (
            isinstance(options, Mapping) and all(isinstance(text, str) for item in options.items() for text in item)
        ):
            raise InputError("options must map names to texts, such as {'arena': 'false'}")
        if cache is not None and not isinstance(cache, (str, Path)):
            raise InputError(f"cache is {type(cache).__name__}, expected a folder")
        bundle = bundles.load(path)
        facts = bundle.manifest
        _check_sources(bundle)
        started = time.perf_counter()
        sessions: dict[str, Session] = {}
        opening = OpenOptions(threads, None if cache is None else Path(cache), dict(options or {}))
        devices = devices_by_component(bundle, device)
        by_threads = threads_by_component(threads, devices)

        def opener(name: str) -> Session:
            mine = replace(opening, threads=by_threads.get(name))
            return open_session(bundle, name, engine=engine, device=devices.get(name), options=mine)

        try:
            for name in (*(text.component for text in facts.text_encoders), facts.denoiser.component, "vae_decoder"):
                if low_memory:
                    opening_engine(bundle, name, engine, opening).devices()
                else:
                    sessions[name] = opener(name)
            pipeline = cls(bundle, sessions, opener, low_memory=low_memory)
            pipeline.opening = Opening(
                engine, None if device is None else by_component.text(device), opening, low_memory
            )
        except BaseException:
            for session in sessions.values():
                session.close()
            raise
        logger.info("loaded %s in %.2f s", path, time.perf_counter() - started)
        return pipeline

    # -- generating ---------------------------------------------------------------------------------------------------

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        callback_on_step_end: Callback | None = None,
        progress: bool = False,
        **arguments: Unpack[Arguments],
    ) -> Result:
        """Generate pictures. ``arguments`` are those of GenerationRequest; ``progress`` shows a bar on standard error.

        Raises InputError, NumericsError, and Cancelled with the last completed step.
        """
        request = GenerationRequest.make(prompt, **arguments)
        return self.generate(request, callback_on_step_end=callback_on_step_end, progress=progress)

    def generate(
        self, request: GenerationRequest, *, callback_on_step_end: Callback | None = None, progress: bool = False
    ) -> Result:
        """Generate the pictures of one request; see ``__call__``."""
        started = time.perf_counter()
        run = self._prepare(request)
        step = None
        bar = _progress_bar() if progress else None
        for step in self._steps(run, callback_on_step_end):
            if bar is not None:
                bar(step)
        assert step is not None, "a scheduler makes at least one call"
        images, vae_decoder, post = self._decode(
            step.latents, request.output_type, run.load.append, run.sizes(len(request.prompts))
        )
        timings = Timings(
            run.tokenize, run.text_encoder, run.vae_encoder, tuple(run.steps), tuple(run.network), vae_decoder, post,
            load=math.fsum(run.load), total=time.perf_counter() - started,
        )  # fmt: skip
        guidance_scale = run.request.guidance_scale
        assert guidance_scale is not None, "_prepare gave the model's own"
        return Result(images, run.seeds, timings, run.sampler, run.size, float(guidance_scale))

    def check(self, request: GenerationRequest) -> None:
        """Raise the InputError of a request that ``generate`` would refuse; computes nothing."""
        self._prepare(request)

    def stream(self, prompt: str | Sequence[str], **arguments: Unpack[Arguments]) -> Iterator[Step]:
        """The steps of a generation, one by one; ``decode(step.latents)`` makes the picture.

        Arguments are checked at the call. The pipeline is this stream's until it ends or is closed.
        """
        return self._steps(self._prepare(GenerationRequest.make(prompt, **arguments)), None)

    def decode(self, latents: Array, output_type: str = "pil") -> Any:
        """latents f32[B,C,h,w] → "pil": list of pictures; "np": f32[B,H,W,3] in [0,1]; "latent": the latents.

        Works in callbacks and beside a stream, too. A low_memory pipeline loads its decoder for it, and releases it.
        """
        if output_type not in ("pil", "np", "latent"):
            raise InputError(f"output_type is {output_type!r}, expected 'pil', 'np' or 'latent'")
        if not isinstance(latents, np.ndarray):
            raise InputError(f"latents is {type(latents).__name__}, expected float32[B,C,h,w]")
        return self._decode(latents, output_type, lambda _: None)[0]

    def cancel(self) -> None:
        """Stop the generation that is running, from any thread: it raises Cancelled before its next step."""
        self._cancelled.set()

    def memory(self) -> dict[str, DeviceMemory]:
        """What is held now of devices' own memory, by component that is loaded; empty where all is main memory.

        ``DeviceMemory.together(pipe.memory().values())`` adds up. The driver's account (``sdrt bench``) is larger: it
        has the context, and the code of kernels.
        """
        return {} if self._closed else self._loaded.memory()

    def close(self) -> None:
        """Free the sessions; the pipeline cannot be used any more."""
        self._closed = True
        self._loaded.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- the parts ----------------------------------------------------------------------------------------------------

    def _prepare(self, request: GenerationRequest) -> _Run:
        """Everything about a request that can be refused before anything is computed."""
        if self._closed:
            raise closed()
        request = request.with_guidance(self.bundle.manifest.guidance_scale)
        space = self.bundle.manifest.latents
        size = request.size((space.default_width, space.default_height), space.downscale)
        shape = (space.channels, size[1] // space.downscale, size[0] // space.downscale)
        if request.latents is not None and request.latents.shape[1:] != shape:
            raise InputError(
                f"latents has shape {list(request.latents.shape)}, expected {[len(request.prompts), *shape]}",
                f"give width and height that match it: multiples of {space.downscale}",
            )
        config = schedulers.resolve(request.scheduler, self.scheduler_config)
        scheduler = schedulers.make(
            config, request.num_inference_steps, timesteps=request.timesteps, sigmas=request.sigmas, eta=request.eta
        )
        self._check_time_ids(request)
        begin = _first_call(request, scheduler)
        sigmas = scheduler.sigmas[begin:].tolist()
        guided = [request.guided_at(sigma) for sigma in sigmas]
        self._check_profiles(request, size, set(guided))
        ticks = self._ticks(len(request.prompts), scheduler.timesteps[begin:].tolist(), guided)
        # The negative prompts first, as in diffusers; none without guidance.
        zeros = request.negative_prompt is None and self.bundle.manifest.no_negative_prompt == "zeros"
        negative = request.negative_prompts if request.guided and not zeros else ()
        texts = {"negative_prompt": negative, "prompt": request.prompts}
        started = time.perf_counter()
        tokens = self._text.tokenize(texts, clip_skip=request.clip_skip, truncate=request.truncate)
        tokenize = time.perf_counter() - started
        seeds, sampler = request.seeds(secrets.randbits(32)), schedulers.label(config)
        return _Run(
            request, seeds, size, shape, scheduler, sampler, tokens, zeros, begin, ticks, sigmas, guided, tokenize
        )

    def _ticks(self, pictures: int, timesteps: Sequence[float], guided: Sequence[bool]) -> list[Array]:
        """The timesteps of a generation as the network takes them; InputError for one that it cannot take."""
        facts = self.bundle.manifest.denoiser
        inputs = widened(self.bundle.component(facts.component)).inputs
        clock = next((spec for spec in inputs if facts.inputs[spec.name] == ("timestep",)), None)
        return [
            _timestep(timestep, clock, pictures * (1 + twice))
            for timestep, twice in zip(timesteps, guided, strict=True)
        ]

    def _check_time_ids(self, request: GenerationRequest) -> None:
        """InputError for sizes that the network is not told."""
        if not any("time_ids" in sources for sources in self.bundle.manifest.denoiser.inputs.values()):
            for name, default in (("original_size", None), ("crops_coords_top_left", (0, 0)), ("target_size", None)):
                if getattr(request, name) != default:
                    raise InputError(f"{name} is given, but this model takes no sizes", "leave it out")

    def _check_profiles(self, request: GenerationRequest, size: tuple[int, int], guided: set[bool]) -> None:
        """InputError now, not after minutes of steps, for a size or batch that a component was not built for."""
        facts, pictures = self.bundle.manifest, len(request.prompts)
        sizes = {"B": pictures, "H": size[1], "W": size[0]}
        for twice in sorted(guided):
            batch = {"B": pictures * (1 + twice)}
            check_profiles(facts.denoiser.component, facts.components[facts.denoiser.component], sizes | batch)
        if request.pictures:  # encoded one by one
            check_profiles("vae_encoder", self.bundle.component("vae_encoder"), sizes | {"B": 1})
        if request.output_type != "latent":
            check_profiles("vae_decoder", facts.components["vae_decoder"], sizes | {"B": pictures})

    def _steps(self, run: _Run, callback: Callback | None) -> Iterator[Step]:
        """Wait for this generation's turn, then the loop, then hand over."""
        if self._turn_owner == threading.get_ident():
            raise SdrtError(
                "a stream of this pipeline is still open in this thread", "exhaust it, or close() it, first"
            )
        with self._turn:
            self._turn_owner = threading.get_ident()
            self._cancelled.clear()
            try:
                for step in self._denoise(run, callback):
                    yield step
                    self._turn_owner = threading.get_ident()  # a stream may be driven on by another thread
            finally:
                self._loaded.release(self.bundle.manifest.denoiser.component)  # a stream may end before its last step
                self._turn_owner = None

    def _denoise(self, run: _Run, callback: Callback | None) -> Iterator[Step]:
        request, scheduler, facts = run.request, run.scheduler, self.bundle.manifest.denoiser
        pictures = len(request.prompts)
        sources: dict[str, Any] = self._condition(run)
        if request.guided and run.zeros:
            sources = {name: np.concatenate([np.zeros_like(array), array]) for name, array in sources.items()}
        sources["time_ids"] = np.tile(_time_ids(request, run.size), (pictures * (1 + request.guided), 1))
        changing = {name: s for name, s in facts.inputs.items() if {"latents", "timestep"} & set(s)}
        constant = {name: _join(sources, s) for name, s in facts.inputs.items() if name not in changing}

        alone = {
            name: array[-pictures:] for name, array in constant.items()
        }  # the prompt's, without the negative one's

        generators = [GENERATORS[request.rng](seed) for seed in run.seeds]
        fresh = StepNoise(generators, run.seeds, run.shape, request.rng)
        begin = run.begin
        if request.pictures:  # the encoder draws before the noise is drawn, as in diffusers
            x0 = self._encode(run, generators)
            latents = scheduler.add_noise(x0, self._first_noise(run, generators), begin)
        else:
            noise = request.latents if request.latents is not None else self._first_noise(run, generators)
            latents = noise * np.float32(scheduler.init_sigma)
        scale = np.float32(request.guidance_scale)
        timesteps = [float(timestep) for timestep in scheduler.timesteps[begin:]]
        total = len(timesteps)
        step: Step | None = None
        bound: tuple[Session, bool] | None = None

        for i, timestep in enumerate(timesteps, begin):
            if self._cancelled.is_set():
                raise Cancelled(f"cancelled before step {i - begin + 1} of {total}", step=step)
            last, guided = i + 1 == begin + total, run.guided[i - begin]
            sizes = run.sizes(pictures * (1 + guided))
            with self._loaded.use(facts.component, run.load.append, sizes=sizes, keep=not last) as unet:
                # The first step, one after a preview that took the denoiser's place, or where guidance begins or ends.
                if bound is None or bound[0] is not unet or bound[1] != guided:
                    unet.bind(**(constant if guided else alone))
                    bound = unet, guided
                started = time.perf_counter()
                scaled = scheduler.scale(latents, i)
                sources["latents"] = np.concatenate([scaled, scaled]) if guided else scaled
                sources["timestep"] = run.ticks[i - begin]
                inputs = {name: _join(sources, names) for name, names in changing.items()}
                called = time.perf_counter()
                pred = unet.run(**inputs)[facts.output]
                run.network.append(time.perf_counter() - called)
                if guided:
                    negative, positive = pred[:pictures], pred[pictures:]
                    pred = negative + scale * (positive - negative)
                    if request.guidance_rescale:
                        pred = _rescaled(pred, positive, request.guidance_rescale)
                _check_finite(pred, facts.component, "step %d of %d (timestep %g)", i - begin + 1, total, timestep)
                latents, x0 = scheduler.step(latents, pred, i, fresh)
                # Copies: what the caller does with them is not the solver's history.
                shown, x0 = latents.copy(), x0.copy()
                run.steps.append(time.perf_counter() - started)
            step = Step(i - begin, total, timestep, run.sigmas[i - begin], guided, shown, x0, run.steps[-1])
            if callback is not None:
                step = self._called_back(callback, step)
                latents = step.latents
            yield step

    def _condition(self, run: _Run) -> dict[str, Any]:
        """What the prompts feed the denoiser with, by source."""
        request = run.request
        pictures = len(request.prompts)
        # The negative prompt goes through the text encoder's full depth, as in diffusers.
        skips = [0] * pictures * (request.guided and not run.zeros) + [request.clip_skip] * pictures
        parts = []
        for encoder, tokens in zip(self._text.encoders, run.tokens, strict=True):
            sizes = run.sizes(len(set(map(tuple, tokens))))  # the same text twice is computed once
            with self._loaded.use(encoder.spec.component, run.load.append, sizes=sizes) as session:
                started = time.perf_counter()
                parts.append(encoder.encode(session, tokens, skips))
                run.text_encoder += time.perf_counter() - started
        started = time.perf_counter()
        sources = self._text.join(parts)
        run.text_encoder += time.perf_counter() - started
        return sources

    def _first_noise(self, run: _Run, generators: Sequence[Generator]) -> Array:
        """What the loop starts from, f32[B,C,h,w], variations mixed in."""
        noise = initial_latents(generators, run.shape)
        others = [GENERATORS[run.request.rng](seed) for seed in run.request.variation_seeds()]
        for picture, other in enumerate(others):
            if run.request.pictures and run.request.sample_mode == "sample":
                other.randn(run.shape)  # what the encoder takes of each seed's stream first
            noise[picture] = slerp(noise[picture], other.randn(run.shape), run.request.variation_strength)
        return noise

    def _encode(self, run: _Run, generators: Sequence[Generator]) -> Array:
        """The pictures' latents f32[B,C,h,w]: the mean, or a draw, of the encoder's normal distribution."""
        request, space = run.request, self.bundle.manifest.latents
        with self._loaded.use("vae_encoder", run.load.append, sizes=run.sizes(1)) as session:
            started = time.perf_counter()
            moments: dict[int, Array] = {}  # one picture is encoded once, however many are made from it
            latents = []
            for picture, generator in zip(request.pictures, generators, strict=True):
                if id(picture) not in moments:
                    sample = image.to_sample(picture, run.size)
                    encoded = session.run(**{session.spec.inputs[0].name: sample})[session.spec.outputs[0].name]
                    _check_finite(encoded, "vae_encoder", "the picture's latents")
                    moments[id(picture)] = encoded
                mean, log_variance = np.split(moments[id(picture)], 2, axis=1)
                z = mean
                if request.sample_mode == "sample":
                    deviation = np.exp(np.float32(0.5) * np.clip(log_variance, -30.0, 20.0))
                    z = mean + deviation * generator.randn(mean.shape)
                latents.append((z - np.float32(space.shift_factor)) * np.float32(space.scaling_factor))
            x0 = np.concatenate(latents)
            run.vae_encoder = time.perf_counter() - started
        return x0

    def _decode(
        self, latents: Array, output_type: str, timed: Clock, sizes: Mapping[str, int] | None = None
    ) -> tuple[Any, float, float]:
        """What ``decode`` returns, and the seconds of the decoder and of making pictures of its sample.

        sizes: those of the decoder, where they are known to be right.
        """
        if output_type == "latent":
            return latents, 0.0, 0.0
        space = self.bundle.manifest.latents
        with self._loaded.use("vae_decoder", timed, sizes=sizes) as session:
            started = time.perf_counter()
            z = latents / np.float32(space.scaling_factor) + np.float32(space.shift_factor)
            sample = session.run(**{session.spec.inputs[0].name: z})[session.spec.outputs[0].name]
            vae_decoder = time.perf_counter() - started
        started = time.perf_counter()
        _check_finite(sample, "vae_decoder", "the picture")
        pictures = image.from_sample(sample)
        images = image.to_pil(pictures) if output_type == "pil" else pictures
        return images, vae_decoder, time.perf_counter() - started

    def _called_back(self, callback: Callback, step: Step) -> Step:
        try:
            state = {"latents": step.latents, "predicted_x0": step.predicted_x0, "total": step.total}
            changed = callback(self, step.index, step.timestep, state)
        except Cancelled as error:
            error.step = step
            raise
        if changed is not None and not isinstance(changed, Mapping):
            raise InputError(f"the callback returned {type(changed).__name__}, expected None or a dict")
        latents = step.latents if changed is None else changed.get("latents", step.latents)
        shape = step.latents.shape
        if not isinstance(latents, np.ndarray) or (latents.shape, latents.dtype) != (shape, step.latents.dtype):
            raise InputError(f"the callback's latents are not float32{list(shape)}")
        if not np.isfinite(latents).all():
            raise InputError("the callback's latents hold NaN or infinity")
        return replace(step, latents=latents)


def _no_opener(name: str) -> Session:
    raise InputError(f"this pipeline was made without a session of {name}", "Pipeline.from_pretrained")


def _check_sources(bundle: Bundle) -> None:
    """BundleError unless this version can make all that feeds the denoiser, and what it gives is latents again."""
    facts, denoiser, again = bundle.manifest, bundle.manifest.denoiser, "export the checkpoint again"
    for name, sources in denoiser.inputs.items():
        if unknown := [source for source in sources if source not in SOURCES]:
            raise BundleError(
                f"{denoiser.component}: input {name} is fed by {unknown[0]!r}, which this sdrt cannot make",
                "use a text-to-image model, or a newer sdrt",
            )
    wanted = {source for sources in denoiser.inputs.values() for source in sources}
    if not facts.text_encoders and "text.hidden_states" in wanted:
        raise BundleError(f"{bundle.root}: has no text encoder", "export the whole checkpoint with sdrt export")
    if "text.pooled" in wanted and not any(text.pooled for text in facts.text_encoders):
        raise BundleError(
            f"{denoiser.component}: is fed by 'text.pooled', which no text encoder of the bundle gives", again
        )
    unet = bundle.component(denoiser.component)
    widths = {"text.hidden_states": _text_width(bundle), "time_ids": TIME_IDS}
    for spec in unet.inputs:
        for source in denoiser.inputs[spec.name]:
            wanted_width = spec.shape[-1] if spec.shape and source in widths else None
            if isinstance(wanted_width, int) and widths[source] != wanted_width:
                given_width = widths[source]
                raise BundleError(f"{denoiser.component}: {spec} is fed by {source}, of {given_width} values", again)
    taken = next((spec.shape for spec in unet.inputs if denoiser.inputs[spec.name] == ("latents",)), None)
    given = next(spec.shape for spec in unet.outputs if spec.name == denoiser.output)
    if taken != given:
        shapes = f"output {denoiser.output} has shape {given}, the latents have {taken}"
        raise BundleError(f"{denoiser.component}: {shapes}", again)
    pictures = bundle.component("vae_decoder").outputs[0]
    if len(pictures.shape) != 4 or pictures.shape[1] != 3:
        raise BundleError(f"vae_decoder: output {pictures} is no RGB picture", again)


def _text_width(bundle: Bundle) -> int:
    """Features of all text encoders' hidden states, side by side."""
    total = 0
    for text in bundle.manifest.text_encoders:
        width = next(o.shape[-1] for o in bundle.component(text.component).outputs if o.name == text.hidden_states)
        if not isinstance(width, int):
            raise BundleError(f"{text.component}: {text.hidden_states} has no fixed number of features")
        total += width
    return total


def _time_ids(request: GenerationRequest, size: tuple[int, int]) -> Array:
    """f32[1,6]: original size, crop's top left corner, target size, each height before width, in pixels."""
    made = (size[1], size[0])
    sizes = (request.original_size or made, request.crops_coords_top_left, request.target_size or made)
    return np.array([[value for pair in sizes for value in pair]], np.float32)


def _first_call(request: GenerationRequest, scheduler: schedulers.Scheduler) -> int:
    """Where the loop begins. InputError where the scheduler has no call: it may make fewer steps than it is asked."""
    begin, calls = request.begin() * scheduler.order, len(scheduler.timesteps)
    if begin >= calls:
        raise InputError(
            f"strength {request.strength:g} leaves out {request.begin()} of {request.num_inference_steps} steps,"
            f" and the scheduler's config makes {calls // scheduler.order} of them",
            "raise the strength, or choose another scheduler",
        )
    return begin


def _timestep(timestep: float, spec: TensorSpec | None, batch: int) -> Array:
    """The timestep as the network takes it: a scalar, one value, or one a picture; other exporters' in integers."""
    dtype = NUMPY_DTYPES[spec.dtype] if spec is not None else np.float32
    value = np.array(timestep, dtype)
    if value != timestep:
        raise InputError(
            f"the scheduler asks for timestep {timestep:g}, the network takes whole ones ({spec})",
            "choose a scheduler without fractional timesteps, such as DDIM, or export the checkpoint with sdrt export",
        )
    return np.broadcast_to(value, spec.at({"B": batch}) if spec is not None else (1,))


def _rescaled(pred: Array, positive: Array, part: float) -> Array:
    """The guided prediction with ``part`` of it given the deviation of the prompt's own; each f32[B,C,h,w].

    Lin et al., arXiv 2305.08891, equations 15 and 16; diffusers' ``rescale_noise_cfg``.
    """
    axes = tuple(range(1, pred.ndim))
    ratio = positive.std(axis=axes, keepdims=True) / pred.std(axis=axes, keepdims=True)
    rescaled: Array = pred * (np.float32(part) * ratio + np.float32(1 - part))
    return rescaled


def _join(sources: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return sources[names[0]] if len(names) == 1 else np.concatenate([sources[name] for name in names], axis=1)


def _check_finite(array: Array, component: str, where: str, *values: object) -> None:
    """NumericsError for NaN or infinity; ``where % values`` is made only then, as this is asked at each step."""
    if not np.isfinite(array).all():
        bad = int(array.size - np.isfinite(array).sum())
        raise NumericsError(
            f"{component}: {where % values}: {bad} of {array.size} values are NaN or infinite",
            "sdrt verify tells whether the bundle is damaged; if it is not, build this component in a higher precision",
        )


def _progress_bar() -> Callable[[Step], None]:
    """A bar on standard error that makes itself at the first step, when the number of steps is known."""
    from tqdm import tqdm

    bars: list[Any] = []

    def update(step: Step) -> None:
        if not bars:
            bars.append(tqdm(total=step.total, unit="step", leave=False))
        bars[0].update()
        if step.index + 1 == step.total:
            bars[0].close()

    return update
