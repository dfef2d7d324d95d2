"""Prompts → hidden states (and pooled vectors) through the bundle's text encoders."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdrt.bundle import Bundle, TextEncoder, read_arrays
from sdrt.engine import NUMPY_DTYPES, Session
from sdrt.errors import BundleError, InputError, NumericsError
from sdrt.tokenizer import ClipTokenizer

logger = logging.getLogger("sdrt")


class PromptTruncated(UserWarning):
    """A prompt was longer than its text encoder and was cut, because ``truncate`` was asked for."""


class PromptEncoder:
    """One text encoder of the bundle: its tokenizer and its facts."""

    def __init__(self, bundle: Bundle, spec: TextEncoder) -> None:
        self.spec = spec
        component = bundle.component(spec.component)
        special = tuple(dict.fromkeys((spec.bos_token, spec.eos_token, spec.pad_token)))
        self.tokenizer = ClipTokenizer.load(bundle.path(spec.tokenizer), special)
        self._constants: dict[str, NDArray[np.float32]] = {}
        constants = component.constants
        if spec.clip_skip is not None and spec.clip_skip.epsilon is not None and constants is not None:
            self._constants = read_arrays(bundle, constants.path)
            if lacking := {spec.clip_skip.weight, spec.clip_skip.bias} - set(self._constants):
                raise BundleError(f"{constants.path}: has no array {min(lacking)!r}", f"sdrt verify {bundle.root}")
            width = next(o for o in component.outputs if o.name == spec.hidden_states).shape[-1]
            for name, array in self._constants.items():
                if array.shape != (width,):
                    raise BundleError(
                        f"{constants.path}: {name} has shape {array.shape}, expected ({width},)",
                        f"sdrt verify {bundle.root}",
                    )
        self._dtype = NUMPY_DTYPES[component.inputs[0].dtype]
        self._input = component.inputs[0].name

    def tokenize(self, text: str, *, truncate: bool = False, name: str = "prompt") -> list[int]:
        """Start, the text's tokens, end, padding: ``max_length`` ids.

        A text that does not fit is an InputError; with ``truncate`` it is cut, with a PromptTruncated warning and one
        in the log (Python shows a repeated warning once only). ``name``: what the text is called.
        """
        ids, room = self.tokenizer.encode(text), self.spec.max_length - 2
        if len(ids) > room:
            lost = self._beyond(text, room)
            message = f"the {name} has {len(ids)} tokens, {self.spec.component} takes {room}; beyond them: {lost!r}"
            if not truncate:
                raise InputError(message, f"shorten the {name}, or cut it there with truncate=True (--truncate)")
            logger.warning("cut: %s", message)
            warnings.warn(f"cut: {message}", PromptTruncated, stacklevel=2)
            ids = ids[:room]
        token = self.tokenizer.id
        ids = [token(self.spec.bos_token), *ids, token(self.spec.eos_token)]
        return ids + [token(self.spec.pad_token)] * (self.spec.max_length - len(ids))

    def _beyond(self, text: str, room: int) -> str:
        """What follows the last word that fits into ``room`` tokens (by bisection over the words)."""
        words = text.split(" ")
        low, high = 0, len(words)
        while low < high:
            middle = (low + high + 1) // 2
            if len(self.tokenizer.encode(" ".join(words[:middle]))) <= room:
                low = middle
            else:
                high = middle - 1
        lost = " ".join(words[low:])
        return lost if len(lost) <= 80 else lost[:77] + "..."

    def encode(
        self, session: Session, tokens: Sequence[Sequence[int]], clip_skips: Sequence[int]
    ) -> dict[str, NDArray[Any]]:
        """``hidden_states`` f32[B,T,C] and, where the bundle names one, ``pooled`` f32[B,D]; one clip-skip a text.

        session: this text encoder's. NumericsError for NaN.
        """
        texts = [tuple(ids) for ids in tokens]
        unique = list(dict.fromkeys(texts))  # the same text twice is computed once
        outputs = session.run(**{self._input: np.array(unique, self._dtype)})
        rows = [unique.index(text) for text in texts]
        hidden = outputs[self.spec.hidden_states][rows]
        for i, (row, skip) in enumerate(zip(rows, clip_skips, strict=True)):
            if skip:
                hidden[i] = self._skipped(outputs, row, skip)
        result = {"hidden_states": hidden}
        if self.spec.pooled is not None:
            result["pooled"] = outputs[self.spec.pooled][rows]
        for name, array in result.items():
            if not np.isfinite(array).all():
                raise NumericsError(
                    f"{self.spec.component}: {name} is not finite", "sdrt verify tells whether the bundle is damaged"
                )
        return result

    def check_clip_skip(self, skip: int) -> None:
        """InputError unless the text encoder can leave out that many layers."""
        if skip and self.spec.clip_skip is None:
            raise InputError(
                f"clip_skip is {skip}, but {self.spec.component} was exported without it",
                "leave it out, or export the checkpoint with sdrt export",
            )
        if self.spec.clip_skip is not None and skip >= self.spec.clip_skip.layers:
            raise InputError(f"clip_skip is {skip}, {self.spec.component} has at most {self.spec.clip_skip.layers - 1}")

    def _skipped(self, outputs: dict[str, NDArray[Any]], row: int, skip: int) -> NDArray[Any]:
        """The hidden state before the last ``skip`` layers, as in diffusers: normed where the last one is."""
        facts = self.spec.clip_skip
        assert facts is not None, "check_clip_skip has been asked"
        x: NDArray[Any] = outputs[f"{facts.hidden_states}.{facts.layers - skip}"][row]
        if facts.epsilon is None:
            return x
        mean = x.mean(-1, keepdims=True)
        variance = np.square(x - mean).mean(-1, keepdims=True)
        weight, bias = self._constants[facts.weight], self._constants[facts.bias]
        normed: NDArray[Any] = (x - mean) / np.sqrt(variance + np.float32(facts.epsilon)) * weight + bias
        return normed


class TextConditioner:
    """All text encoders of a bundle as one: hidden states side by side along features, the last pooled vector."""

    def __init__(self, bundle: Bundle) -> None:
        self.encoders = [PromptEncoder(bundle, spec) for spec in bundle.manifest.text_encoders]

    def tokenize(self, texts: Mapping[str, Sequence[str]], *, clip_skip: int, truncate: bool) -> list[list[list[int]]]:
        """Token ids by text encoder, by text; ``texts`` are given by what they are called.

        InputError for a text that is too long, or a clip-skip that an encoder cannot do.
        """
        for encoder in self.encoders:
            encoder.check_clip_skip(clip_skip)
        return [
            [
                encoder.tokenize(text, truncate=truncate, name=name)
                for name, several in texts.items()
                for text in several
            ]
            for encoder in self.encoders
        ]

    def join(self, parts: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
        """What each encoder gave, one after another, as sources of the denoiser: ``text.hidden_states`` f32[B,T,C],
        ``text.pooled`` f32[B,D]."""
        arrays = {"text.hidden_states": np.concatenate([part["hidden_states"] for part in parts], axis=-1)}
        pooled = [part["pooled"] for part in parts if "pooled" in part]
        if pooled:
            arrays["text.pooled"] = pooled[-1]
        return arrays
