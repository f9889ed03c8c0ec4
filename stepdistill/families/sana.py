"""Sana (arXiv 2410.10629): a flow-matching transformer with linear attention on latents of 32 times fewer pixels."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu

from stepdistill.condition import Condition
from stepdistill.errors import UserError
from stepdistill.families.base import ATTENTION_TARGETS, ModelFamily
from stepdistill.families.smaller import Plan, transformer_plan
from stepdistill.network_shape import NetworkShape


FP16_RANGE = (-65504, 65504)


class WideLinearAttention:
    """Sana's linear attention, summed over all tokens in float32 as by Diffusers' own processor, also under autocast.

    Diffusers converts queries, keys and values to float32, but the products of these would be rounded again by an
    autocast around them, and in fp16 the sums over the tokens of a large image leave its range.
    """

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
        """(B, N, D) => (B, N, D); no text has a part in it, so further arguments stay unused."""
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        with torch.autocast(hidden_states.device.type, enabled=False):
            # (B, heads, D / heads, N) each; a row of ones under the values adds up the weights of every query.
            q, k, v = (x.float().transpose(1, 2).unflatten(1, (attn.heads, -1)) for x in (query, key, value))
            v = pad(v, (0, 0, 0, 1), value=1.0)
            sums = v @ relu(k).transpose(2, 3) @ relu(q)
            mixed = sums[:, :, :-1] / (sums[:, :, -1:] + 1e-15)
        output: Tensor = attn.to_out[1](attn.to_out[0](mixed.flatten(1, 2).transpose(1, 2).to(hidden_states.dtype)))
        return output.clip(*FP16_RANGE) if output.dtype == torch.float16 else output


def widen(network: nn.Module) -> nn.Module:
    """The same network, whose linear attention stays in float32 under autocast."""
    from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0

    for layer in network.modules():
        if isinstance(layer, Attention) and type(layer.processor) is SanaLinearAttnProcessor2_0:
            layer.set_processor(WideLinearAttention())
    return network


class Sana(ModelFamily):
    """`SanaPipeline` with Gemma's tokens and the autoencoder DC-AE.

    Prompts come behind the pipeline's instruction to its language model; the null condition, an empty negative prompt,
    comes without it.
    """

    name = "sana"
    pipeline_class = "SanaPipeline"
    network_component = "transformer"
    scales_noise = False
    # Convolutions of one pixel are the outer layers of the feed-forward part; the one between them is depthwise.
    lora_targets = (*ATTENTION_TARGETS, "conv_inverted", "conv_point", "time_embed.linear", "proj_out")

    def __init__(self, pipeline: Any, path: str, *, stored: bool = True) -> None:
        super().__init__(pipeline, path, stored=stored)
        widen(self.network())

    def plain_network(self, *, embeds_guidance: bool = False, shape: NetworkShape | None = None) -> nn.Module:
        return widen(super().plain_network(embeds_guidance=embeds_guidance, shape=shape))

    @property
    def feature_layers(self) -> tuple[str, ...]:
        return (f"transformer_blocks.{int(self.network_config.num_layers) // 2}",)

    @property
    def vae_factor(self) -> int:
        return int(2 ** (len(self.pipeline.vae.config.encoder_block_out_channels) - 1))

    def forward(self, network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        output: Tensor = network(
            x_t, encoder_hidden_states=condition.tensors["prompt_embeds"],
            encoder_attention_mask=condition.tensors["prompt_attention_mask"],
            timestep=model_time * self.network_config.timestep_scale, return_dict=False,
        )[0]  # fmt: skip
        return output[:, : x_t.shape[1]]  # some configurations learn a variance beside the flow

    def smaller(self, shape: NetworkShape) -> Plan:
        widths = ("cross_attention_dim", "cross_attention_head_dim")
        return transformer_plan(self.network_config, shape, widths=widths)

    def guidance_options(self) -> dict[str, Any]:
        # Its class of networks can (`guidance_embeds`); SanaSprintPipeline, of another schedule, is who says a scale.
        raise UserError("SanaPipeline tells its network no guidance scale; only SanaSprintPipeline does, which is no "
                        "family here. Set embed_guidance: false, which trains for one scale")  # fmt: skip

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        tokens, mask, _, _ = self.pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, device=self.device,
            complex_human_instruction=self._instruction,
        )  # fmt: skip
        return Condition({"prompt_embeds": tokens, "prompt_attention_mask": mask})

    @torch.no_grad()
    def null_condition(self, count: int) -> Condition:
        # The pipeline encodes negative prompts otherwise than prompts, so that it has to be asked for one.
        _, _, tokens, mask = self.pipeline.encode_prompt("", do_classifier_free_guidance=True, device=self.device)
        return Condition({"prompt_embeds": tokens.expand(count, -1, -1),
                          "prompt_attention_mask": mask.expand(count, -1)})  # fmt: skip

    def text_modules(self) -> dict[str, nn.Module]:
        return {"text_encoder": self.pipeline.text_encoder}

    @property
    def encoding_facts(self) -> dict[str, Any]:
        return {"instruction": self._instruction}

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] => scaled latents; DC-AE has no posterior to draw from."""
        return self.image_moments(images)[0]

    @torch.no_grad()
    def image_moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] => scaled latents and zeros, (B, C, h, w) each."""
        vae = self.pipeline.vae
        latents: Tensor = vae.encode(images.to(self.device, vae.dtype)).latent * vae.config.scaling_factor
        return latents, torch.zeros_like(latents)

    @property
    def _instruction(self) -> list[str]:
        """What the stock pipeline's call puts before a prompt unless it is told otherwise."""
        default = inspect.signature(self.pipeline.__call__).parameters["complex_human_instruction"].default
        return list(default)
