"""Class-conditional DiT (arXiv 2212.09748): a transformer on latents, conditioned on an ImageNet-like class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stepdistill.condition import Condition
from stepdistill.errors import UserError
from stepdistill.families.base import ATTENTION_TARGETS, ModelFamily


class DiT(ModelFamily):
    """`DiTPipeline`; a prompt is a class number or one of the names in the pipeline's `id2label`."""

    name = "dit"
    pipeline_class = "DiTPipeline"
    network_component = "transformer"
    lora_targets = (*ATTENTION_TARGETS, "ff.net.0.proj", "ff.net.2", "norm1.linear")
    supports_lora_loading = False  # the stock pipeline has no LoRA loader: students are exported merged
    takes_latents = False
    scales_noise = False
    takes_eta = False

    @property
    def feature_layers(self) -> tuple[str, ...]:
        return (f"transformer_blocks.{int(self.network_config.num_layers) // 2}",)

    def forward(self, network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        labels = condition.tensors["class_labels"]
        output: Tensor = network(x_t, timestep=model_time, class_labels=labels, return_dict=False)[0]
        return output[:, : x_t.shape[1]]  # the second half is the learnt variance, of no use to one step

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        return Condition({"class_labels": torch.tensor([self._label(p) for p in prompts], device=self.device)})

    def null_condition(self, count: int) -> Condition:
        null = int(self.network_config.num_embeds_ada_norm)
        return Condition({"class_labels": torch.full((count,), null, device=self.device)})

    def text_modules(self) -> dict[str, nn.Module]:
        return {}

    def _label(self, prompt: str) -> int:
        classes = int(self.network_config.num_embeds_ada_norm)
        names: dict[str, int] = self.pipeline.labels
        label = int(prompt) if prompt.strip().isdigit() else names.get(prompt)
        if label is None or not 0 <= label < classes:
            raise UserError(f"prompt {prompt!r} is no class of this DiT: give a number from 0 to {classes - 1}"
                            + (f" or one of its {len(names)} names" if names else ""))  # fmt: skip
        return label
