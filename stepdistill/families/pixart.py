"""PixArt-alpha (arXiv 2310.00426) and PixArt-Sigma (arXiv 2403.04692): transformers on T5's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.condition import Condition
from stepdistill.families.base import ATTENTION_TARGETS, ModelFamily
from stepdistill.families.smaller import Plan, transformer_plan
from stepdistill.network_shape import NetworkShape


CONDITIONED_SIDE = 128  # latents of the network that is told the image's size, unless its file says otherwise


class PixArt(ModelFamily):
    """`PixArtAlphaPipeline`; the null condition is the empty prompt."""

    name = "pixart"
    pipeline_class = "PixArtAlphaPipeline"
    network_component = "transformer"
    # The time embedding's last layer makes the modulations of all blocks.
    lora_targets = (*ATTENTION_TARGETS, "ff.net.0.proj", "ff.net.2", "adaln_single.linear", "proj_out")
    supports_lora_loading = False  # the stock pipeline has no LoRA loader: students are exported merged

    @property
    def feature_layers(self) -> tuple[str, ...]:
        return (f"transformer_blocks.{int(self.network_config.num_layers) // 2}",)

    @property
    def told_size(self) -> bool:
        """Whether the network takes the size and the aspect ratio of the image, as PixArt-alpha does at 1024 px."""
        told = self.network_config.use_additional_conditions
        return bool(self.network_config.sample_size == CONDITIONED_SIDE if told is None else told)

    def forward(self, network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        tokens = condition.tensors["prompt_embeds"]
        output: Tensor = network(
            x_t, encoder_hidden_states=tokens, encoder_attention_mask=condition.tensors["prompt_attention_mask"],
            timestep=model_time, added_cond_kwargs=self._size_of(x_t, tokens), return_dict=False,
        )[0]  # fmt: skip
        return output[:, : x_t.shape[1]]  # the second half is the learnt variance, of no use to few steps

    def smaller(self, shape: NetworkShape) -> Plan:
        # Embeddings of height, width and aspect ratio lie side by side, if there are any.
        parts = 12 if self.told_size else 4
        return transformer_plan(self.network_config, shape, widths=("cross_attention_dim",), parts=parts)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        tokens, mask, _, _ = self.pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, device=self.device, clean_caption=_can_clean()
        )
        return Condition({"prompt_embeds": tokens, "prompt_attention_mask": mask})

    def null_condition(self, count: int) -> Condition:
        null = self.encode_prompts([""])
        return Condition({name: t.expand(count, *t.shape[1:]) for name, t in null.tensors.items()})

    def text_modules(self) -> dict[str, nn.Module]:
        return {"text_encoder": self.pipeline.text_encoder}

    @property
    def encoding_facts(self) -> dict[str, Any]:
        return {"pipeline": self.pipeline_class, "clean_caption": _can_clean()}

    def _size_of(self, x_t: Tensor, like: Tensor) -> dict[str, Tensor | None]:
        """What the stock pipeline tells the network about its images, of which x_t are the latents."""
        if not self.told_size:
            return {"resolution": None, "aspect_ratio": None}
        height, width = (side * self.vae_factor for side in x_t.shape[-2:])
        rows = len(x_t)
        return {
            "resolution": torch.tensor([[height, width]]).to(like).expand(rows, 2),
            "aspect_ratio": torch.tensor([[height / width]]).to(like).expand(rows, 1),
        }


class PixArtSigma(PixArt):
    """`PixArtSigmaPipeline`: 300 tokens, another autoencoder, and nothing told about the image's size."""

    name = "pixart_sigma"
    pipeline_class = "PixArtSigmaPipeline"

    @property
    def told_size(self) -> bool:
        return False


def _can_clean() -> bool:
    """Whether the stock pipelines, whose default is to clean captions, can do so here; without, they only warn."""
    from diffusers.utils import is_bs4_available, is_ftfy_available

    return bool(is_bs4_available() and is_ftfy_available())
