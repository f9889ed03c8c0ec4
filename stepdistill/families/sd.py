"""Stable Diffusion 1.x and 2.x: UNet2DConditionModel with one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stepdistill.condition import Condition
from stepdistill.families.base import ATTENTION_TARGETS, ModelFamily


class StableDiffusion(ModelFamily):
    """Text-to-image UNets of the `StableDiffusionPipeline`; the null condition is the empty prompt."""

    name = "sd"
    pipeline_class = "StableDiffusionPipeline"
    network_component = "unet"
    # DMD2 (arXiv 2405.14867) adapts these layers in its LoRA runs; attention alone cannot change what is drawn where.
    lora_targets = (*ATTENTION_TARGETS, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
                    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")  # fmt: skip

    @property
    def feature_layers(self) -> tuple[str, ...]:
        return ("mid_block",)  # the bottleneck, as DMD2's code does

    def forward(self, network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        output: Tensor = network(
            x_t, model_time, encoder_hidden_states=condition.tensors["prompt_embeds"], return_dict=False
        )[0]
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
