"""The four parts of the checkpoint: the classes of Stable Diffusion 1.x, small; six million parameters at most."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.demo import scenes

WIDTH = 128
"""Of the text encoder's states, and so of the U-Net's cross-attention."""

SCHEDULER: dict[str, Any] = {
    "_class_name": "DPMSolverMultistepScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "lower_order_final": True,
    "trained_betas": None,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
"""scheduler_config.json. Stable Diffusion's noise schedule; trailing timesteps begin where the noise is greatest.

The last three are for DDIM and PNDM, whose defaults are for pixels: latents that are cut off at 1 are no picture.
"""


def new_vae() -> Any:
    """AutoencoderKL with untrained weights: factor 8, 4 latent channels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4,
        block_out_channels=(8, 24, 64, 96), layers_per_block=1, norm_num_groups=4, sample_size=128,
    )  # fmt: skip


def new_text_encoder(vocabulary: int) -> Any:
    """CLIPTextModel with untrained weights; the last two of the ``vocabulary`` are the start and the end token."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(1)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=3,
            num_attention_heads=4, max_position_embeddings=77, hidden_act="quick_gelu", projection_dim=WIDTH,
            bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1,
        )
    )  # fmt: skip


def new_unet() -> Any:
    """UNet2DConditionModel with untrained weights, for latents of 16×16 and any others."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(2)
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(64, 96, 96), layers_per_block=1, norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=2,
    )  # fmt: skip


def write_tokenizer(folder: Path) -> Any:
    """Write CLIP's ``vocab.json`` and ``merges.txt``, each word of the grammar one token; return the tokenizer.

    The layout is CLIP's: 256 byte symbols, the same with ``</w>``, one entry a merge, start and end token. Other
    words fall into letters, as they do there.
    """
    from transformers import CLIPTokenizer

    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    merges: dict[tuple[str, str], None] = {}
    for word in sorted(scenes.words()):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            ranks = list(merges)  # a tokenizer takes the merge that was learnt first
            known = min(range(len(parts) - 1), key=lambda n: _rank(ranks, parts[n], parts[n + 1]))
            merges[parts[known], parts[known + 1]] = None
            parts[known : known + 2] = [parts[known] + parts[known + 1]]
    vocabulary = [*symbols, *(s + "</w>" for s in symbols), *dict.fromkeys(a + b for a, b in merges)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        (folder / "vocab.json").write_text(
            json.dumps({t: i for i, t in enumerate(vocabulary)}), encoding="utf-8", newline="\n"
        )
        lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")

    write()
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    write()  # transformers 5 keeps tokenizer.json alone
    return tokenizer


def _rank(merges: list[tuple[str, str]], *pair: str) -> int:
    return merges.index(pair) if pair in merges else len(merges)
