"""Tiny random PixArt pipelines of the real classes."""

from __future__ import annotations

from typing import Any

from stepdistill.families.tiny_text import kl_autoencoder, seeded, t5_encoder, t5_tokenizer


# A side that the stock pipelines know; smaller ones they refuse.
SIDE = 32


def tiny_pixart(side: int = SIDE, stages: int = 4) -> Any:
    """A PixArtAlphaPipeline; with 128 for the side, as at 1024 px, its network is told the size of its images.

    Args:
        side: of the latents: 32, 64 or 128.
        stages: of the autoencoder; 4 as the real one, images of eight times the side.
    """
    import diffusers

    return _tiny(diffusers.PixArtAlphaPipeline, side, stages, seed=3)


def tiny_pixart_sigma() -> Any:
    """A PixArtSigmaPipeline for images of 256 pixels."""
    import diffusers

    return _tiny(diffusers.PixArtSigmaPipeline, SIDE, 4, seed=4)


def _tiny(pipeline: Any, side: int, stages: int, seed: int) -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

    width = 24  # a multiple of three: the embeddings of height, width and aspect ratio lie side by side
    with seeded(seed):
        transformer = PixArtTransformer2DModel(
            num_attention_heads=3, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
            cross_attention_dim=width, sample_size=side, patch_size=side // 8, caption_channels=24,
        )  # fmt: skip
        return pipeline(
            tokenizer=t5_tokenizer(), text_encoder=t5_encoder(24).eval(), vae=kl_autoencoder(stages).eval(),
            transformer=transformer.eval(),
            scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
        )  # fmt: skip
