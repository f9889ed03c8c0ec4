"""Stable Diffusion 1.x and 2.x: UNet2DConditionModel with one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stepdistill.condition import Condition
from stepdistill.families.base import ATTENTION_TARGETS, ModelFamily
from stepdistill.families.smaller import Plan, unet_plan
from stepdistill.network_shape import NetworkShape


GUIDANCE_CHANNELS = 256  # of the embedded guidance scale, as in the code of LCM (arXiv 2310.04378)
GUIDANCE_WEIGHT = "time_embedding.cond_proj.weight"
# DMD2 (arXiv 2405.14867) adapts these layers in its LoRA runs; attention alone cannot change what is drawn where.
UNET_LORA_TARGETS = (*ATTENTION_TARGETS, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
                     "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")  # fmt: skip


class UNetFamily(ModelFamily):
    """What is common to pipelines whose network is a UNet2DConditionModel."""

    network_component = "unet"
    guidance_weight: ClassVar[str] = GUIDANCE_WEIGHT
    block_pattern = r"(down|up)_blocks\.\d+"
    lora_targets = UNET_LORA_TARGETS
    kohya_naming = True

    @property
    def feature_layers(self) -> tuple[str, ...]:
        return ("mid_block",)  # the bottleneck, as DMD2's code does

    @property
    def spread_layers(self) -> tuple[str, ...]:
        # The encoder's blocks, the bottleneck and the first block behind it: from edges to layouts, and half back.
        encoder = (f"down_blocks.{i}" for i in range(len(self.network_config.down_block_types)))
        return (*encoder, "mid_block", "up_blocks.0")

    def smaller(self, shape: NetworkShape) -> Plan:
        return unet_plan(self.network_config, shape)

    def guidance_options(self) -> dict[str, Any]:
        return {"time_cond_proj_dim": self.network_config.time_cond_proj_dim or GUIDANCE_CHANNELS}


class StableDiffusion(UNetFamily):
    """Text-to-image UNets of the `StableDiffusionPipeline`; the null condition is the empty prompt."""

    name = "sd"
    pipeline_class = "StableDiffusionPipeline"

    def forward(self, network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        output: Tensor = network(
            x_t, model_time, encoder_hidden_states=condition.tensors["prompt_embeds"],
            timestep_cond=embedded_guidance(network, condition, x_t.dtype), return_dict=False,
        )[0]  # fmt: skip
        return output

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        embeds, _ = self.pipeline.encode_prompt(list(prompts), self.device, 1, False)
        return Condition({"prompt_embeds": embeds})

    def null_condition(self, count: int) -> Condition:
        embeds = self.encode_prompts([""]).tensors["prompt_embeds"]
        return Condition({"prompt_embeds": embeds.expand(count, -1, -1)})

    def text_modules(self) -> dict[str, nn.Module]:
        return {"text_encoder": self.pipeline.text_encoder}


def embedded_guidance(network: nn.Module, condition: Condition, dtype: torch.dtype) -> Tensor | None:
    """The guidance scale of a condition as a UNet takes it, (B, channels); None where the condition has none."""
    scale = condition.tensors.get("guidance")
    if scale is None:
        return None
    return guidance_embedding(scale, network.get_parameter(GUIDANCE_WEIGHT).shape[1]).to(dtype)


def guidance_embedding(scale: Tensor, channels: int) -> Tensor:
    """Guidance scales (B,) => (B, channels), float32: sines and cosines of 1000 (scale - 1); arXiv 2210.03142.

    Arithmetic and rounding of StableDiffusionPipeline's `get_guidance_scale_embedding`, which is given scale - 1 and
    computes on the CPU alone; float64 scales come out with the same bits there.
    """
    w = 1000.0 * (scale.double() - 1).float()
    spacing = torch.log(torch.tensor(10000.0)) / (channels // 2 - 1)
    frequencies = torch.exp(torch.arange(channels // 2, dtype=torch.float32, device=w.device) * -spacing)
    angles = w[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)
