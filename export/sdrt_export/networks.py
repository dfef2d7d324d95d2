"""The torch modules that are traced: diffusers' and transformers' networks behind ``forward(tensors) → tensors``.

Each holds its real network as ``model``; parameter names below it are the checkpoint's.
"""

from __future__ import annotations

from typing import Any


def unet(config: dict[str, Any]) -> Any:
    """(sample, timestep, encoder_hidden_states) → out_sample."""
    import torch

    class UNet(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = _any_size_unet(config)

        def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
            return self.model(sample, timestep, encoder_hidden_states, return_dict=False)[0]

    return UNet()


def unet_text_time(config: dict[str, Any]) -> Any:
    """(sample, timestep, encoder_hidden_states, text_embeds, time_ids) → out_sample."""
    import torch

    class UNetTextTime(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = _any_size_unet(config)

        def forward(
            self, sample: Any, timestep: Any, encoder_hidden_states: Any, text_embeds: Any, time_ids: Any
        ) -> Any:
            added = {"text_embeds": text_embeds, "time_ids": time_ids}
            return self.model(
                sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False
            )[0]  # fmt: skip

    return UNetTextTime()


def _any_size_unet(config: dict[str, Any]) -> Any:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel.from_config(config)
    # forward() asks whether 2 ** num_upsamplers divides the size, to see if upsamplers need exact sizes. With a
    # power that divides no size they always do, and the graph holds for every size.
    model.num_upsamplers = 20
    return model


def vae_encoder(config: dict[str, Any]) -> Any:
    """sample → latent_parameters: mean and log-variance, one after the other along channels."""
    import torch
    from diffusers import AutoencoderKL

    class VaeEncoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoencoderKL.from_config(config)

        def forward(self, sample: Any) -> Any:
            moments = self.model.encoder(sample)
            return moments if self.model.quant_conv is None else self.model.quant_conv(moments)

    return VaeEncoder()


def vae_decoder(config: dict[str, Any]) -> Any:
    """latent_sample → sample."""
    import torch
    from diffusers import AutoencoderKL

    class VaeDecoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoencoderKL.from_config(config)

        def forward(self, latent_sample: Any) -> Any:
            return self.model.decode(latent_sample, return_dict=False)[0]

    return VaeDecoder()


def text_encoder(config: dict[str, Any]) -> Any:
    """input_ids → last_hidden_state, pooler_output, hidden_states.0 … hidden_states.<layers>."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    class TextEncoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = CLIPTextModel(CLIPTextConfig(**config))

        def forward(self, input_ids: Any) -> Any:
            out = self.model(input_ids=input_ids, output_hidden_states=True)
            return (out.last_hidden_state, out.pooler_output, *out.hidden_states)

    return TextEncoder()


def text_encoder_projected(config: dict[str, Any]) -> Any:
    """input_ids → text_embeds, last_hidden_state, hidden_states.0 … hidden_states.<layers>."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    class TextEncoderProjected(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = CLIPTextModelWithProjection(CLIPTextConfig(**config))

        def forward(self, input_ids: Any) -> Any:
            out = self.model(input_ids=input_ids, output_hidden_states=True)
            return (out.text_embeds, out.last_hidden_state, *out.hidden_states)

    return TextEncoderProjected()
