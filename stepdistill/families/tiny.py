"""Tiny random pipelines of the real classes, made in memory: `teacher: tiny:sdxl`.

They draw nothing worth looking at. They have every part, every condition and every name that the real ones have, so
that a recipe can be tried from its beginning to its end in a minute.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from stepdistill.errors import UserError
from stepdistill.recipe_text import nearest


if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTokenizer

# family => the function that makes its pipeline; a module of its own where that takes more than a few lines
TINY_PIPELINES: dict[str, str] = {
    "sd": "stepdistill.families.tiny:tiny_sd",
    "sd21": "stepdistill.families.tiny:tiny_sd21",
    "sdxl": "stepdistill.families.tiny:tiny_sdxl",
    "sd3": "stepdistill.families.tiny:tiny_sd3",
    "dit": "stepdistill.families.tiny:tiny_dit",
    "pixart": "stepdistill.families.tiny_pixart:tiny_pixart",
    "pixart_sigma": "stepdistill.families.tiny_pixart:tiny_pixart_sigma",
    "flux": "stepdistill.families.tiny_flux:tiny_flux",
    "sana": "stepdistill.families.tiny_sana:tiny_sana",
}

SEED = 0
TOKENS = 16
VAE_SCALE = 0.5
# the noise levels of Stable Diffusion's first version (arXiv 2112.10752), which 2.x and XL kept
SD_BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WORDS = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase), "<|startoftext|>",
         "<|endoftext|>"]  # fmt: skip


def tiny_pipeline(name: str) -> DiffusionPipeline:
    """A tiny stock pipeline of a family; the same weights at every call.

    Raises:
        UserError: there is none of this name.
    """
    import torch

    if name not in TINY_PIPELINES:
        raise UserError(f"teacher: tiny:{name} is unknown; {nearest(name, TINY_PIPELINES)}")
    module, _, function = TINY_PIPELINES[name].partition(":")
    build: Callable[[], DiffusionPipeline] = getattr(import_module(module), function)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return build()


# ---- parts ---------------------------------------------------------------------------------------------------------


def tiny_tokenizer() -> CLIPTokenizer:
    """Spells words letter by letter; whatever is no letter is one and the same token."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, merges=[], model_max_length=TOKENS)


def tiny_text_config(width: int, **options: Any) -> CLIPTextConfig:
    """The configuration of a CLIP text encoder of two layers, for the tiny tokenizer."""
    from transformers import CLIPTextConfig

    last = len(WORDS) - 1
    return CLIPTextConfig(
        vocab_size=len(WORDS), hidden_size=width, intermediate_size=width, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=TOKENS, bos_token_id=last - 1, eos_token_id=last, pad_token_id=last, **options,
    )  # fmt: skip


def tiny_vae(channels: int = 4, **options: Any) -> AutoencoderKL:
    """An autoencoder of two pixels per latent pixel in each direction."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=channels,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=32,
        **{"scaling_factor": VAE_SCALE, **options},
    )  # fmt: skip


# ---- pipelines -----------------------------------------------------------------------------------------------------


def tiny_sd() -> DiffusionPipeline:
    """Stable Diffusion 1.5: four stages, attention in all but the innermost, epsilon."""
    from diffusers import PNDMScheduler

    scheduler = PNDMScheduler(**SD_BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    return _stable_diffusion(scheduler, hidden_act="quick_gelu")


def tiny_sd21() -> DiffusionPipeline:
    """Stable Diffusion 2.1 at 768 pixels: linear projections, heads of one width, v-prediction."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**SD_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1,
                              prediction_type="v_prediction")  # fmt: skip
    heads = {"attention_head_dim": (2, 2, 4, 4), "use_linear_projection": True}
    return _stable_diffusion(scheduler, hidden_act="gelu", **heads)


def _stable_diffusion(scheduler: Any, hidden_act: str, **unet: Any) -> DiffusionPipeline:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    network = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(8, 8, 16, 16), layers_per_block=2,
        down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3), cross_attention_dim=16, norm_num_groups=4,
        **{"attention_head_dim": 2, **unet},
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=tiny_vae(), text_encoder=CLIPTextModel(tiny_text_config(16, hidden_act=hidden_act)),
        tokenizer=tiny_tokenizer(), unet=network, scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def tiny_sdxl() -> DiffusionPipeline:
    """Stable Diffusion XL: attention in the inner two of three stages, two text encoders, sizes and pooled text."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    first, second, pooled, size_channels = 8, 16, 16, 4
    network = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(8, 8, 16), layers_per_block=2,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
        up_block_types=(*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"), cross_attention_dim=first + second,
        transformer_layers_per_block=(1, 1, 2), attention_head_dim=(2, 2, 4), use_linear_projection=True,
        norm_num_groups=4, addition_embed_type="text_time", addition_time_embed_dim=size_channels,
        projection_class_embeddings_input_dim=6 * size_channels + pooled,
    )  # fmt: skip
    tokenizer = tiny_tokenizer()
    return StableDiffusionXLPipeline(
        vae=tiny_vae(), text_encoder=CLIPTextModel(tiny_text_config(first, hidden_act="quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(tiny_text_config(second, projection_dim=pooled, hidden_act="gelu")),
        tokenizer=tokenizer, tokenizer_2=tokenizer, unet=network, add_watermarker=False,
        scheduler=EulerDiscreteScheduler(**SD_BETAS, steps_offset=1, timestep_spacing="leading"),
    )  # fmt: skip


def tiny_sd3() -> DiffusionPipeline:
    """Stable Diffusion 3: two streams, three text encoders (T5 among them), flow matching with shift 3.

    The tokenizer of the third encoder spells letters as the others do, where T5 has pieces of words.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

    encoders = [CLIPTextModelWithProjection(tiny_text_config(width, projection_dim=width)) for width in (8, 16)]
    t5 = T5Config(vocab_size=len(WORDS), d_model=24, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    tokenizer = tiny_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=16, pooled_projection_dim=24,
        pos_embed_max_size=8, qk_norm="rms_norm",
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(shift_factor=0.25), text_encoder=encoders[0], tokenizer=tokenizer, text_encoder_2=encoders[1],
        tokenizer_2=tokenizer, text_encoder_3=T5EncoderModel(t5), tokenizer_3=tokenizer,
    )  # fmt: skip


def tiny_dit() -> DiffusionPipeline:
    """DiT: classes 0 to 999, learnt variance, noise levels of its own."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=16,
        patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=4,
    )  # fmt: skip
    scheduler = DDIMScheduler(num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear",
                              clip_sample=False)  # fmt: skip
    return DiTPipeline(transformer, tiny_vae(), scheduler)
