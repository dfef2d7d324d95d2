"""CLIP's tokenizer as an OpenVINO model, which OpenVINO GenAI asks for. sdrt itself does not read it.

From ``vocab.json`` and ``merges.txt``, by openvino-tokenizers' own operators; the reference is ``sdrt.tokenizer``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdrt.bundle import TextEncoder
from sdrt.errors import EngineUnavailable
from sdrt.tokenizer import ClipTokenizer

FILES = ("openvino_tokenizer.xml", "openvino_tokenizer.bin")
"""As OpenVINO GenAI calls them."""

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""What sdrt.tokenizer takes for words, as a regular expression."""


def save(folder: Path, text: TextEncoder, out: Path) -> None:
    """Write the tokenizer whose files lie in ``folder`` into ``out``: prompts → input_ids, attention_mask i64[B,T].

    T is the longest prompt's, at most ``text.max_length`` with both ends; shorter ones are padded. Other than CLIP's,
    its letters are folded (ŉ becomes two), more ids follow a special token that stands in a prompt (its operator puts
    the end of a word behind it), and a pad token is read as text: SD 2.x pads with "!". EngineUnavailable, BundleError.
    """
    steps, openvino = _library()
    ends = (text.bos_token, text.eos_token)
    tokenizer = ClipTokenizer.load(folder, (*ends, text.pad_token))
    ids = {token: tokenizer.id(token) for token in (*ends, text.pad_token)}

    def end(token: str) -> Any:
        return steps.AddToken(token=token, _token_id=ids[token], token_type_id=0)

    pipeline = steps.TokenizerPipeline()
    pipeline.add_steps(
        [
            steps.SpecialTokensSplit.from_string_iter(ends),
            steps.NormalizeUnicode("NFC"),
            steps.RegexNormalizationStep(r"\s+", " "),
            steps.CaseFoldStep(),
            steps.RegexSplitStep(_WORDS, invert=True, behaviour="remove"),
            steps.BytesToCharsStep(),
            steps.BPETokenizationStep(
                vocab=tokenizer.vocabulary(),
                merges=[tuple(merge.split(" ")) for merge in tokenizer.merges()],
                unk_token=text.eos_token,
                end_suffix="</w>",
                cache_capacity=20_000,
                added_tokens={token: ids[token] for token in ends},
            ),
            steps.TruncationStep(max_length=text.max_length - 2, truncation=True),
            steps.CombineSegmentsStep([end(text.bos_token), steps.Sequence(token_type_id=0), end(text.eos_token)]),
            steps.PaddingStep(token=text.pad_token, _token_id=ids[text.pad_token], max_length=text.max_length),
        ]
    )
    whole = pipeline.get_tokenizer_ov_subgraph()
    kept = [port for name in ("input_ids", "attention_mask") for port in whole.outputs if name in port.names]
    model = openvino.Model(kept, whole.get_parameters(), "tokenizer")
    model.add_sinks(whole.get_sinks())
    layout = openvino.preprocess.PrePostProcessor(model)
    for port in model.outputs:
        layout.output(port.any_name).tensor().set_element_type(openvino.Type.i64)
    out.mkdir(parents=True, exist_ok=True)
    openvino.save_model(layout.build(), out / FILES[0], compress_to_fp16=False)


def _library() -> tuple[Any, Any]:
    try:
        import openvino
        from openvino_tokenizers import tokenizer_pipeline
    except ImportError as error:
        raise EngineUnavailable(
            f"openvino_tokenizers cannot be imported: {error}", "pip install 'sdrt[openvino]'"
        ) from None
    return tokenizer_pipeline, openvino
