"""Class-conditional DiT (arXiv 2212.09748): a transformer on latents, conditioned on an ImageNet-like class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stepdistill.condition import Condition
from stepdistill.families.base import ATTENTION_TARGETS, ModelFamily
from stepdistill.families.smaller import Plan, transformer_plan
from stepdistill.labels import class_label
from stepdistill.network_shape import NetworkShape


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

    def smaller(self, shape: NetworkShape) -> Plan:
        return transformer_plan(self.network_config, shape)

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        labels = [class_label(self.pipeline, prompt) for prompt in prompts]
        return Condition({"class_labels": torch.tensor(labels, device=self.device)})

    def null_condition(self, count: int) -> Condition:
        null = int(self.network_config.num_embeds_ada_norm)
        return Condition({"class_labels": torch.full((count,), null, device=self.device)})

    def text_modules(self) -> dict[str, nn.Module]:
        return {}
