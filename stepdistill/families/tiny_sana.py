"""A tiny random Sana pipeline of the real classes."""

from __future__ import annotations

from typing import Any

from stepdistill.families.tiny_text import gemma, gemma_tokenizer, seeded


def tiny_sana(*, timestep_scale: float = 1.0) -> Any:
    """A SanaPipeline for images of 512 pixels, the smallest that the stock pipeline knows."""
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    channels, stages = 4, 6
    plain: tuple[tuple[int, ...], ...] = ((),) * stages
    with seeded(6):
        transformer = SanaTransformer2DModel(
            in_channels=channels, out_channels=channels, num_attention_heads=2, attention_head_dim=8, num_layers=2,
            num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=24,
            sample_size=16, patch_size=1, timestep_scale=timestep_scale,
        )  # fmt: skip
        vae = AutoencoderDC(
            latent_channels=channels, attention_head_dim=4, scaling_factor=0.41407,
            encoder_block_out_channels=(4,) * stages, decoder_block_out_channels=(4,) * stages,
            encoder_layers_per_block=(1,) * stages, decoder_layers_per_block=(1,) * stages,
            encoder_qkv_multiscales=plain, decoder_qkv_multiscales=plain,
        )  # fmt: skip
        scheduler = DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2
        )
        return SanaPipeline(
            tokenizer=gemma_tokenizer(), text_encoder=gemma(24).eval(), vae=vae.eval(),
            transformer=transformer.eval(), scheduler=scheduler,
        )  # fmt: skip
