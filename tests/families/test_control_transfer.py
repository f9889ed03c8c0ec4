"""A style learnt on a base model works on its few-step student, and back, without training anything again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from stepdistill.adapters import LoraSettings
from stepdistill.data.latents import LatentBatch
from stepdistill.export.lora import difference_lora, export_lora
from stepdistill.export.pipeline import export_pipeline
from stepdistill.families import load_family
from stepdistill.families.base import ModelFamily
from stepdistill.hybrid import HybridPipeline
from stepdistill.objectives.base import InferenceSpec
from stepdistill.objectives.denoising import Denoising
from tests.families.test_export import noise_levels, student_of
from tests.tiny import PROMPTS, trainer_of


STYLE = 1.2  # every latent of the style lies around this value
SPREAD = 0.1
FOUR = InferenceSpec((999, 749, 499, 249))
LORA = LoraSettings(rank=8, alpha=8.0, targets=("conv_in", "conv_out", "conv1", "conv2", "to_q", "to_v", "to_out.0"))


class StyleLatents:
    """An images stream of one style: nearly constant latents, whatever the caption."""

    def batch(self, seed: int, start: int, count: int, parts: int = 1) -> LatentBatch:
        generator = torch.Generator().manual_seed(1000 * seed + start)
        captions = [PROMPTS[number % len(PROMPTS)] for number in range(start, start + count)]
        return LatentBatch(STYLE + SPREAD * torch.randn(count, 4, 8, 8, generator=generator), captions)


def learn_style(family: ModelFamily, folder: Path) -> Path:
    """A style LoRA by plain denoising, as people train them."""
    trainer = trainer_of(
        family, Denoising(condition_dropout=0.0), lora={"student": LORA}, steps=120, batch_size=8,
        player={"options": {"lr": 1e-2, "weight_decay": 0.0}},
    )  # fmt: skip
    trainer.batches.latents = StyleLatents()
    for _ in range(120):
        trainer._iterate()
    learnt = trainer.cast.state("student")
    trainer.cast.release()
    return export_lora(family, learnt.tensors, rank=LORA.rank, alpha=LORA.alpha, folder=folder)


@pytest.fixture(scope="module")
def models(sd_folder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Base, student, a LoRA that makes the base the student, and the two styles."""
    root = tmp_path_factory.mktemp("styles")
    base = load_family(sd_folder)
    network = student_of(base)
    student = export_pipeline(base, network, FOUR, root / "student", facts={})
    difference = difference_lora(base.network(), network, 16)
    return {
        "base": Path(sd_folder),
        "student": student,
        "step_lora": export_lora(base, difference.state, rank=16, alpha=16, folder=root / "step", spec=FOUR),
        "style_of_base": learn_style(base, root / "of_base"),
        "style_of_student": learn_style(load_family(str(student)), root / "of_student"),
    }


def loaded(folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def style_error(pipeline: Any) -> float:
    """Squared error of the network's noise on data of the style, over all levels: what the style's training lowers."""
    embeds, _ = pipeline.encode_prompt(["a"] * 8, pipeline.device, 1, False)
    generator = torch.Generator().manual_seed(3)
    errors = []
    for timestep in (899, 699, 499, 299, 99):
        alpha, sigma = noise_levels(timestep)
        x0 = STYLE + SPREAD * torch.randn(8, 4, 8, 8, generator=generator)
        eps = torch.randn(8, 4, 8, 8, generator=generator)
        said = pipeline.unet(alpha * x0 + sigma * eps, timestep, encoder_hidden_states=embeds).sample
        errors.append(float((said - eps).square().mean()))
    return sum(errors) / len(errors)


def latents_of(pipeline: Any) -> Tensor:
    made: Tensor = pipeline(
        list("abcdefgh"), num_inference_steps=4, guidance_scale=1, generator=torch.Generator().manual_seed(1),
        output_type="latent",
    ).images  # fmt: skip
    return made


def distance(latents: Tensor) -> float:
    """How far samples are from the style."""
    return float((latents - STYLE).square().mean())


@pytest.mark.parametrize(("style", "used_on"), [("style_of_base", "student"), ("style_of_student", "base")])
def test_a_style_acts_on_the_other_model_as_on_its_own(models: dict[str, Path], style: str, used_on: str) -> None:
    own = loaded(models["base" if used_on == "student" else "student"])
    other = loaded(models[used_on])
    plain, before = style_error(other), latents_of(other)
    for pipeline in (own, other):
        pipeline.load_lora_weights(models[style])
    assert style_error(own) < 0.6 * plain, "it has learnt nothing"
    assert style_error(other) < 0.7 * plain
    assert distance(latents_of(other)) < 0.7 * distance(before)
    other.unload_lora_weights()
    assert torch.equal(latents_of(other), before), "and it leaves without a trace"


def test_a_style_goes_with_a_student_that_is_a_lora_itself(models: dict[str, Path]) -> None:
    both = loaded(models["base"])
    both.scheduler = loaded(models["student"]).scheduler
    both.load_lora_weights(models["step_lora"], adapter_name="step")
    plain, before = style_error(both), latents_of(both)
    both.load_lora_weights(models["style_of_base"], adapter_name="style")
    both.set_adapters(["step", "style"])
    assert style_error(both) < 0.7 * plain
    assert distance(latents_of(both)) < 0.7 * distance(before)
    both.set_adapters(["step"])
    torch.testing.assert_close(latents_of(both), before, rtol=1e-4, atol=1e-4)


def test_hybrid_sampling_takes_the_style_from_both_models(models: dict[str, Path]) -> None:
    base, student = loaded(models["base"]), loaded(models["student"])
    made = {}
    for name, styled in {"none": (), "base": (base,), "both": (base, student)}.items():
        pair = [copy.deepcopy(pipeline) for pipeline in (base, student)]
        for pipeline, original in zip(pair, (base, student), strict=True):
            if original in styled:
                pipeline.load_lora_weights(models["style_of_base"])
        made[name] = latents_of(HybridPipeline(*pair, base_guidance=1.0))
    assert (made["base"] - made["none"]).abs().max() > 1e-2, "the first step hears of it"
    assert distance(made["both"]) < 0.7 * distance(made["none"])
