"""Stable Diffusion 3 (arXiv 2403.03206): a transformer of two streams, image and text, trained by flow matching."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stepdistill.condition import Condition
from stepdistill.families.base import ATTENTION_TARGETS, ModelFamily
from stepdistill.families.smaller import Plan, transformer_plan
from stepdistill.network_shape import NetworkShape


class StableDiffusion3(ModelFamily):
    """`StableDiffusion3Pipeline` with its three text encoders; the null condition is the empty prompt."""

    name = "sd3"
    pipeline_class = "StableDiffusion3Pipeline"
    network_component = "transformer"
    scales_noise = False
    takes_eta = False
    # A block returns text and image; its first norm returns the image tokens as they come from the block before.
    block_pattern = r"transformer_blocks\.\d+\.norm1"
    attention_pattern = r"transformer_blocks\.\d+\.attn"
    # Both streams, and the modulations, which say how strongly each block acts at each time.
    lora_targets = (*ATTENTION_TARGETS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff.net.0.proj",
                    "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "norm1.linear",
                    "norm1_context.linear", "norm_out.linear", "proj_out")  # fmt: skip

    @property
    def feature_layers(self) -> tuple[str, ...]:
        return (f"transformer_blocks.{int(self.network_config.num_layers) // 2}.norm1",)

    @property
    def latent_shift(self) -> float:
        return float(self.pipeline.vae.config.shift_factor or 0.0)

    def forward(self, network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        output: Tensor = network(
            x_t, timestep=model_time, encoder_hidden_states=condition.tensors["prompt_embeds"],
            pooled_projections=condition.tensors["pooled_prompt_embeds"], return_dict=False,
        )[0]  # fmt: skip
        return output

    def smaller(self, shape: NetworkShape) -> Plan:
        return transformer_plan(self.network_config, shape, widths=("caption_projection_dim",))

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        # None for the second and third text: the pipeline then gives the first to all three encoders.
        tokens, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), None, None, device=self.device, do_classifier_free_guidance=False
        )
        return Condition({"prompt_embeds": tokens, "pooled_prompt_embeds": pooled})

    def null_condition(self, count: int) -> Condition:
        null = self.encode_prompts([""])
        return Condition({name: t.expand(count, *t.shape[1:]) for name, t in null.tensors.items()})

    def text_modules(self) -> dict[str, nn.Module]:
        names = ("text_encoder", "text_encoder_2", "text_encoder_3")
        # Many leave T5 out to save memory; the pipeline then puts zeros where its tokens would be.
        return {name: module for name in names if (module := self.pipeline.components[name]) is not None}
