"""Stable Diffusion XL (arXiv 2307.01952): a UNet told two texts' embeddings, a pooled one, and the image's size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stepdistill.condition import Condition
from stepdistill.families.sd import UNetFamily, embedded_guidance
from stepdistill.framing import Framing


class StableDiffusionXL(UNetFamily):
    """`StableDiffusionXLPipeline` with both text encoders.

    The size conditions of section 2.2 are those that the stock pipeline gives by default: an image that was never
    resized nor cropped. They follow from the latent's size, unless a condition has `time_ids` (B, 6) of its own:
    original height and width, crop from the top and from the left, target height and width, in pixels.
    """

    name = "sdxl"
    pipeline_class = "StableDiffusionXLPipeline"
    sgm_blocks = True

    def forward(self, network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        pooled, ids = condition.tensors["pooled_prompt_embeds"], condition.tensors.get("time_ids")
        added = {"text_embeds": pooled, "time_ids": self.time_ids(x_t) if ids is None else ids.to(pooled.dtype)}
        output: Tensor = network(
            x_t, model_time, encoder_hidden_states=condition.tensors["prompt_embeds"], added_cond_kwargs=added,
            timestep_cond=embedded_guidance(network, condition, x_t.dtype), return_dict=False,
        )[0]  # fmt: skip
        return output

    def time_ids(self, x_t: Tensor) -> Tensor:
        """Latents (B, C, H, W) => (B, 6): original size, crop, target size of whole images, in pixels."""
        size = [side * self.vae_factor for side in x_t.shape[2:]]
        return torch.tensor([*size, 0, 0, *size], dtype=x_t.dtype, device=x_t.device).expand(len(x_t), -1)

    def framed(self, condition: Condition, framings: Sequence[Framing]) -> Condition:
        rows = [[*framing.original, *framing.crop, *framing.target] for framing in framings]
        ids = torch.tensor(rows, dtype=torch.float32, device=self.device)
        return Condition({**condition.tensors, "time_ids": ids})

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        # Without a second text the pipeline gives the first to both encoders.
        tokens, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=False
        )
        return Condition({"prompt_embeds": tokens, "pooled_prompt_embeds": pooled})

    def null_condition(self, count: int) -> Condition:
        """Zeros where the pipeline's `force_zeros_for_empty_prompt` says so, as that of the original SDXL does."""
        null = self.encode_prompts([""]).tensors
        if self.pipeline.config.force_zeros_for_empty_prompt:
            null = {name: torch.zeros_like(tensor) for name, tensor in null.items()}
        return Condition({name: tensor.expand(count, *tensor.shape[1:]) for name, tensor in null.items()})

    def text_modules(self) -> dict[str, nn.Module]:
        return {name: self.pipeline.components[name] for name in ("text_encoder", "text_encoder_2")}
