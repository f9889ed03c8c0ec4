"""A tiny random FLUX.1 pipeline of the real classes."""

from __future__ import annotations

from typing import Any

from stepdistill.families.tiny_text import (
    clip_encoder,
    clip_tokenizer,
    kl_autoencoder,
    seeded,
    t5_encoder,
    t5_tokenizer,
)


def tiny_flux(*, guidance_embeds: bool = True) -> Any:
    """A FluxPipeline as FLUX.1-dev; `guidance_embeds=False` with its unshifted noise levels: as FLUX.1-schnell.

    Its images have 256 pixels a side unless a call or a recipe names another multiple of 4.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    with seeded(5):
        transformer = FluxTransformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=24, pooled_projection_dim=16, guidance_embeds=guidance_embeds,
            axes_dims_rope=(2, 2, 4),
        )  # fmt: skip
        shift = 3.0 if guidance_embeds else 1.0
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=guidance_embeds),
            vae=kl_autoencoder(2, shift=0.25).eval(), text_encoder=clip_encoder(16).eval(),
            tokenizer=clip_tokenizer(), text_encoder_2=t5_encoder(24).eval(), tokenizer_2=t5_tokenizer(),
            transformer=transformer.eval(),
        )  # fmt: skip
