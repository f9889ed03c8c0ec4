"""FLUX.1 (Black Forest Labs): a transformer of two streams and then one, on packed latents, told a guidance scale.

FLUX.1-dev was distilled from a guided model: a scale is an input of the network and costs no second call. Its noise
levels are shifted by the number of tokens, so they follow from the size of the images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from stepdistill.condition import Condition
from stepdistill.denoiser import Denoiser, OwnWeights, Weights
from stepdistill.errors import UserError
from stepdistill.families.base import ATTENTION_TARGETS, ModelFamily
from stepdistill.families.smaller import Plan, two_row_plan
from stepdistill.network_shape import NetworkShape
from stepdistill.prediction import Prediction
from stepdistill.schedule import FlowSchedule


PATCH = 2  # side of the square of latent pixels that is one token
UNGUIDED = 1.0  # the scale that a network is told where nobody names one


class FluxDenoiser(Denoiser):
    """A view of a network on packed latents, told no scale, as FLUX.1-schnell's: guidance takes two calls."""

    even_sigmas = True

    def fresh_noise(self, x: Tensor) -> Tensor:
        """Noise of the shape of x, (B, C, H, W), drawn in the order of packed latents."""
        tokens = torch.randn_like(packed(x).contiguous())  # a tensor's strides would give the order of drawing
        return unpacked(tokens, x.shape[-2] // PATCH, x.shape[-1] // PATCH)


class GuidedFluxDenoiser(FluxDenoiser):
    """The same of a network that is told a scale, as FLUX.1-dev's: guidance takes one call."""

    def guided(
        self, x_t: Tensor, t: Tensor, condition: Condition, null: Condition, scale: float | Tensor
    ) -> Prediction:
        """One call at the scale; the null condition has no part in it.

        Args:
            x_t: noisy sample, (B, C, H, W).
            t: times, (B,).
            condition: B rows.
            null: B rows, unused.
            scale: what FluxPipeline calls `guidance_scale`, one number or (B,).
        """
        return self(x_t, t, condition.with_guidance(scale))


class Flux(ModelFamily):
    """`FluxPipeline` with CLIP's pooled vector and T5's tokens.

    The null condition is the empty prompt, as for the pipeline's `true_cfg_scale` with an empty negative prompt.
    """

    name = "flux"
    pipeline_class = "FluxPipeline"
    network_component = "transformer"
    scales_noise = False
    takes_eta = False
    even_sigmas = True
    shifts_by_size = True
    guidance_weight: ClassVar[str] = "time_text_embed.guidance_embedder.linear_1.weight"
    # A block returns text and image; its first norm returns the image tokens as they come from the block before.
    block_pattern = r"transformer_blocks\.\d+\.norm1"
    attention_pattern = r"transformer_blocks\.\d+\.attn"
    # Both streams, the single one behind them, and the modulations: how strongly each block acts at each time.
    lora_targets = (*ATTENTION_TARGETS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff.net.0.proj",
                    "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "norm1.linear", "norm1_context.linear",
                    "norm.linear", "proj_mlp", "norm_out.linear", "proj_out")  # fmt: skip

    def __init__(self, pipeline: Any, path: str, *, stored: bool = True) -> None:
        super().__init__(pipeline, path, stored=stored)
        self._side = int(pipeline.default_sample_size)
        self.at_size(None)

    def at_size(self, size: int | None) -> None:
        """Sets the size of the family's own images, and the noise levels that the stock pipeline has for it.

        Raises:
            UserError: the size is no multiple of a token's.
        """
        if size is not None:
            self._side = self._side_of(size)
        config = self.pipeline.scheduler.config
        if config.get("use_dynamic_shifting"):
            mu = shift_exponent(config, (self._side // PATCH) ** 2)
            # Diffusers' time_shift: s t / (1 + (s - 1) t) with s = e^mu, or mu itself for the linear kind.
            shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
            self.schedule = FlowSchedule(shift, int(config.num_train_timesteps))

    @property
    def feature_layers(self) -> tuple[str, ...]:
        return (f"transformer_blocks.{int(self.network_config.num_layers) // 2}.norm1",)

    @property
    def pixel_step(self) -> int:
        return self.vae_factor * PATCH  # which the configuration does not name: latents come packed

    @property
    def latent_shift(self) -> float:
        return float(self.pipeline.vae.config.shift_factor or 0.0)

    def latent_shape(self, size: int | None = None) -> tuple[int, int, int]:
        side = self._side if size is None else self._side_of(size)
        return int(self.network_config.in_channels) // PATCH**2, side, side

    def denoiser(self, weights: Weights | None = None) -> Denoiser:
        kind = GuidedFluxDenoiser if self.network_config.guidance_embeds else FluxDenoiser
        return kind(self.forward, weights or OwnWeights(self.network()), self.schedule, self.kind)

    def forward(self, network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        tokens, scale = condition.tensors["prompt_embeds"], None
        if self.network_config.guidance_embeds:
            told = condition.tensors.get("guidance")
            scale = torch.full_like(model_time, UNGUIDED) if told is None else told.to(model_time)
        height, width = x_t.shape[-2] // PATCH, x_t.shape[-1] // PATCH
        output: Tensor = network(
            hidden_states=packed(x_t), timestep=model_time / 1000, guidance=scale,
            pooled_projections=condition.tensors["pooled_prompt_embeds"], encoder_hidden_states=tokens,
            txt_ids=tokens.new_zeros(tokens.shape[1], 3), img_ids=_places(height, width, tokens), return_dict=False,
        )[0]  # fmt: skip
        return unpacked(output, height, width)

    def smaller(self, shape: NetworkShape) -> Plan:
        return two_row_plan(self.network_config, shape)

    def guidance_options(self) -> dict[str, Any]:
        # A copy of FLUX.1-dev takes a scale as it is; FLUX.1-schnell lacks the layers, and the base class refuses.
        return {} if self.network_config.guidance_embeds else super().guidance_options()

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        tokens, pooled, _ = self.pipeline.encode_prompt(list(prompts), device=self.device)
        return Condition({"prompt_embeds": tokens, "pooled_prompt_embeds": pooled})

    def null_condition(self, count: int) -> Condition:
        null = self.encode_prompts([""])
        return Condition({name: t.expand(count, *t.shape[1:]) for name, t in null.tensors.items()})

    def text_modules(self) -> dict[str, nn.Module]:
        return {name: self.pipeline.components[name] for name in ("text_encoder", "text_encoder_2")}

    def pipeline_latents(self, latents: Tensor) -> Tensor:
        return packed(latents)

    def _side_of(self, size: int) -> int:
        step = self.pixel_step
        if size % step:
            raise UserError(f"data.size: {size} pixels are no whole number of FLUX's tokens, which are {step} pixels "
                            f"wide; take {max(size // step, 1) * step}")  # fmt: skip
        return size // self.vae_factor


def shift_exponent(config: Any, tokens: int) -> float:
    """mu of a scheduler's dynamic shift for a number of image tokens, as FluxPipeline computes it."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    return float(
        calculate_shift(
            tokens, config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5), config.get("max_shift", 1.15),
        )
    )  # fmt: skip


def packed(latents: Tensor) -> Tensor:
    """(B, C, H, W) => tokens (B, H/2 W/2, 4 C); within a token, channels first, then rows, then columns."""
    return pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, height width, 4 C) => (B, C, 2 height, 2 width)."""
    return pixel_shuffle(tokens.transpose(1, 2).reshape(len(tokens), -1, height, width), PATCH)


def _places(height: int, width: int, like: Tensor) -> Tensor:
    """(0, row, column) of each image token, (height width, 3)."""
    rows, columns = torch.arange(height), torch.arange(width)
    return torch.cartesian_prod(torch.zeros(1, dtype=torch.long), rows, columns).to(like)
