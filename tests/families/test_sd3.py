"""The family of Stable Diffusion 3: it computes what its stock pipeline computes, and trains."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from stepdistill.adapters import LoraSettings, SharedNetwork
from stepdistill.bench.generate import ModelUnderTest, load_pipeline
from stepdistill.cast import Cast
from stepdistill.condition import Condition
from stepdistill.data.images import ImageBatch
from stepdistill.data.latents import LatentCache
from stepdistill.data.sampler import StockSampler
from stepdistill.denoiser import AdapterWeights, OwnWeights
from stepdistill.discriminator import Discriminator
from stepdistill.export.lora import difference_lora, export_lora
from stepdistill.export.pipeline import export_pipeline
from stepdistill.families import load_family
from stepdistill.families.base import ModelFamily
from stepdistill.families.sd3 import StableDiffusion3
from stepdistill.finish import merged_network
from stepdistill.framing import Framing, Size, framing_of
from stepdistill.objectives.base import Frozen, Head, Trained
from stepdistill.objectives.dmd2 import DMD2
from stepdistill.prediction import add_noise
from stepdistill.schedule import FlowSchedule
from tests.tiny import scramble, trainer_of, weights_of


PROMPTS = ["red", "a ring"]
TIMES = torch.tensor([0.3, 0.9], dtype=torch.float64)
X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_folder_is_loaded_as_a_flow_matching_teacher(sd3: ModelFamily) -> None:
    assert (sd3.name, sd3.kind) == ("sd3", "flow")
    assert isinstance(sd3.schedule, FlowSchedule)
    assert sd3.schedule.shift == 3.0
    assert sd3.network() is sd3.pipeline.transformer
    assert sd3.latent_shape() == (4, 8, 8)
    assert sd3.latent_shape(32) == (4, 16, 16)
    assert set(sd3.text_modules()) == {"text_encoder", "text_encoder_2", "text_encoder_3"}


def test_prompts_are_encoded_as_the_stock_pipeline_does(sd3: ModelFamily) -> None:
    tokens, null, pooled, null_pooled = sd3.pipeline.encode_prompt(PROMPTS, None, None)
    ours, none = sd3.encode_prompts(PROMPTS).tensors, sd3.null_condition(2).tensors
    assert torch.equal(ours["prompt_embeds"], tokens)
    assert torch.equal(ours["pooled_prompt_embeds"], pooled)
    torch.testing.assert_close(none["prompt_embeds"], null)
    torch.testing.assert_close(none["pooled_prompt_embeds"], null_pooled)
    for tensor in (tokens, pooled):
        assert (tensor[0] - tensor[1]).abs().max() > 0.1
    assert tokens.shape == (2, 8 + 8, 24)
    assert pooled.shape == (2, 24)


@torch.no_grad()
@pytest.mark.parametrize("third", ["funnel", "t5"])
def test_the_network_is_called_as_the_stock_pipeline_calls_it(sd3: ModelFamily, third: str) -> None:
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(sd3.path)
    if third == "t5":
        t5 = T5EncoderModel(T5Config(vocab_size=60, d_model=24, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
        pipeline.register_modules(text_encoder_3=t5.eval())
    family = StableDiffusion3(pipeline, sd3.path)
    given: list[dict[str, Any]] = []
    pipeline.transformer.register_forward_pre_hook(lambda m, args, kwargs: given.append(kwargs), with_kwargs=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(PROMPTS, num_inference_steps=1, guidance_scale=1.0, latents=X, output_type="latent")
    family.denoiser()(X, torch.ones(2, dtype=torch.float64), family.encode_prompts(PROMPTS))
    stock, ours = given
    assert ours["encoder_hidden_states"].shape == (2, 8 + (256 if third == "t5" else 8), 24)
    assert ours["timestep"].tolist() == [1000, 1000]
    for name, value in ours.items():
        assert torch.equal(torch.as_tensor(stock[name]), torch.as_tensor(value)), name


@torch.no_grad()
def test_guidance_is_that_of_two_separate_calls(sd3: ModelFamily) -> None:
    condition, null, view = sd3.encode_prompts(PROMPTS), sd3.null_condition(2), sd3.denoiser()
    with_prompt, without = view(X, TIMES, condition).native, view(X, TIMES, null).native
    assert (with_prompt - without).abs().max() > 1e-4, "a condition that does nothing tests nothing"
    guided = view.guided(X, TIMES, condition, null, 3.0).native
    torch.testing.assert_close(guided, without + 3.0 * (with_prompt - without), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_teachers_sampler_makes_the_stock_pipelines_images(sd3: ModelFamily) -> None:
    stock = StableDiffusion3Pipeline.from_pretrained(sd3.path)
    stock.set_progress_bar_config(disable=True)
    images = stock(PROMPTS, num_inference_steps=4, guidance_scale=2.0, latents=X, output_type="pt").images
    sampler = StockSampler(sd3.denoiser(), sd3.pipeline.scheduler.config, name="euler", steps=4, guidance=2.0)
    made = sampler(X, sd3.encode_prompts(PROMPTS), sd3.null_condition(2))
    torch.testing.assert_close(sd3.decode_latents(made.sample), images, rtol=0, atol=1e-5)


def test_noise_is_the_stock_schedulers(sd3: ModelFamily) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(sd3.pipeline.scheduler.config)
    at = scheduler.timesteps[[3, 700]]
    eps = torch.randn(2, 4, 8, 8)
    ours = add_noise(sd3.schedule, X, sd3.schedule.t_from_model_time(at.double()), eps)
    torch.testing.assert_close(ours, scheduler.scale_noise(X, at, eps), rtol=0, atol=2e-6)


@torch.no_grad()
def test_latents_are_shifted_and_scaled_wherever_they_come_from(sd3: ModelFamily, tmp_path: Path) -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae = sd3.pipeline.vae
    torch.manual_seed(0)
    latents = sd3.encode_images(images)
    torch.manual_seed(0)
    torch.testing.assert_close(latents, (vae.encode(images).latent_dist.sample() - 0.25) * 0.5)
    expected = vae.decode(latents / 0.5 + 0.25).sample / 2 + 0.5
    torch.testing.assert_close(sd3.decode_latents(latents), expected.clamp(0, 1))

    cache = LatentCache(tmp_path, sd3, TwoPictures(images), 2)
    cache.build()
    posterior = vae.encode(images).latent_dist
    drawn = torch.stack([cache.batch(0, 2 * i, 2).latents.mean(0) for i in range(200)])
    expected = (posterior.mean.mean(0) - 0.25) * 0.5
    error = (posterior.std.mean() * 0.5 / math.sqrt(400)).item()
    torch.testing.assert_close(drawn.mean(0), expected, rtol=0, atol=6 * error)


class TwoPictures:
    """An image source of two images."""

    fingerprint, size, length, buckets = "two pictures", 16, 2, ()

    def __init__(self, images: Tensor) -> None:
        self._images = images

    def batch(self, indices: Any) -> ImageBatch:
        return ImageBatch(self._images[list(indices)], [PROMPTS[i] for i in indices])

    def framing(self, index: int) -> Framing:
        return framing_of(Size(16, 16), Size(16, 16))


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_one_step_of_dmd2_trains_both_roles(sd3: ModelFamily, weights: str) -> None:
    before_output = sd3.denoiser()(X, TIMES, sd3.encode_prompts(PROMPTS)).native
    lora = LoraSettings(2, 4.0, sd3.lora_targets)
    roles = {"student": lora, "critic": lora} if weights == "lora" else {}
    trainer = trainer_of(sd3, DMD2(critic_updates=1), lora=roles, steps=1, checkpointing=True)
    before = weights_of(trainer)
    trainer.run()
    after = weights_of(trainer)
    for role in ("student", "critic"):
        names = [name for name in before if name.startswith(f"{role}/")]
        changed = [name for name in names if not torch.equal(before[name], after[name])]
        assert len(changed) >= len(names) / 2
        view = trainer.cast.denoiser(role)
        assert (view(X, TIMES, sd3.encode_prompts(PROMPTS)).native - before_output).abs().max() > 1e-6
    teacher = trainer.cast.denoiser("teacher")(X, TIMES, sd3.encode_prompts(PROMPTS)).native
    assert torch.equal(teacher, before_output)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_head_gets_image_tokens_and_gives_gradients(sd3: ModelFamily, checkpointing: bool) -> None:
    roles = {"teacher": Frozen(), "critic": Trained(), "discriminator": Head(Discriminator)}
    cast = Cast(sd3, roles, checkpointing=checkpointing)
    condition = sd3.encode_prompts(PROMPTS)
    with torch.no_grad():
        (features,) = cast.denoiser("critic").features(X, TIMES, condition, sd3.feature_layers)
    assert features.shape == (2, 16, 16)
    with torch.no_grad():
        (moved,) = cast.denoiser("critic").features(X + 1, TIMES, condition, ("transformer_blocks.0.norm1",))
        (before,) = cast.denoiser("critic").features(X, TIMES, condition, ("transformer_blocks.0.norm1",))
    assert not torch.equal(moved, before), "before the first attention only the image's own tokens know of it"
    with cast.trainable(["critic"]):
        cast.head("discriminator")(cast.denoiser("critic"), X, TIMES, condition).sum().backward()
        given = [name for name, p in cast.parameters("critic").items() if p.grad is not None and p.grad.any()]
    assert any(name.startswith("transformer_blocks.0.attn.to_q") for name in given)
    assert not any(name.startswith("transformer_blocks.1.attn") for name in given)


def test_an_adapter_acts_on_both_streams_and_loads_in_the_stock_pipeline(sd3: ModelFamily, tmp_path: Path) -> None:
    shared = SharedNetwork(sd3.network())
    shared.add("student", LoraSettings(2, 6.0, sd3.lora_targets))
    state = shared.parameters("student")
    for part in ("to_q", "add_q_proj", "to_add_out", "ff.net.2", "ff_context.net.2", "norm1.linear", "proj_out"):
        assert any(f"{part}.lora_A" in name for name in state), part
    scramble(state)
    condition = sd3.encode_prompts(PROMPTS)
    with torch.no_grad():
        expected = sd3.denoiser(AdapterWeights(shared, "student"))(X, TIMES, condition).native
        plain = sd3.denoiser(AdapterWeights(shared, None))(X, TIMES, condition).native
    folder = export_lora(sd3, {k: v.detach() for k, v in state.items()}, rank=2, alpha=6.0, folder=tmp_path / "lora")
    stock = StableDiffusion3Pipeline.from_pretrained(sd3.path)
    stock.load_lora_weights(folder)
    tokens, _, pooled, _ = stock.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
    with torch.no_grad():
        loaded = stock.transformer(X, tokens, pooled, sd3.schedule.model_time(TIMES).float()).sample
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(loaded, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_lora_of_a_full_student_loads_in_the_stock_pipeline(sd3: ModelFamily, tmp_path: Path) -> None:
    student = sd3.plain_network()
    student.load_state_dict(sd3.network().state_dict())
    for name, parameter in student.named_parameters():
        if name.endswith("weight") and parameter.ndim > 1:  # biases and gains are no part of a LoRA
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    found = difference_lora(sd3.network(), student, 96)
    assert found.residual < 1e-5
    folder = export_lora(sd3, found.state, rank=96, alpha=96, folder=tmp_path / "lora")
    stock = StableDiffusion3Pipeline.from_pretrained(sd3.path)
    stock.load_lora_weights(folder)
    tokens, _, pooled, _ = stock.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
    loaded = stock.transformer(X, tokens, pooled, sd3.schedule.model_time(TIMES).float()).sample
    expected = sd3.denoiser(OwnWeights(student))(X, TIMES, sd3.encode_prompts(PROMPTS)).native
    assert (expected - sd3.denoiser()(X, TIMES, sd3.encode_prompts(PROMPTS)).native).abs().max() > 1e-2
    torch.testing.assert_close(loaded, expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_many_step_student_is_exported_as_a_stock_pipeline_with_the_teachers_scheduler(
    sd3: ModelFamily, tmp_path: Path
) -> None:
    network = sd3.plain_network()
    network.load_state_dict(sd3.network().state_dict())
    scramble({"proj_out": network.proj_out.weight})  # type: ignore[union-attr, dict-item]
    folder = export_pipeline(sd3, network, None, tmp_path / "student", facts={"method": "denoising"})
    loaded = DiffusionPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is StableDiffusion3Pipeline
    assert loaded.scheduler.config.shift == 3.0
    images = loaded(PROMPTS, num_inference_steps=3, guidance_scale=2.0, latents=X, output_type="pt").images
    sampler = StockSampler(sd3.denoiser(OwnWeights(network)), sd3.pipeline.scheduler.config, name="euler", steps=3,
                           guidance=2.0)  # fmt: skip
    made = sampler(X, sd3.encode_prompts(PROMPTS), sd3.null_condition(2))
    torch.testing.assert_close(sd3.decode_latents(made.sample), images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_a_plain_network_computes_what_the_student_does(sd3: ModelFamily, weights: str) -> None:
    sd3.network().get_buffer("pos_embed.pos_embed").add_(0.3)  # a table of the teacher's own, which nobody trains
    lora = {"student": LoraSettings(2, 4.0, sd3.lora_targets)} if weights == "lora" else {}
    cast = Cast(sd3, {"teacher": Frozen(), "student": Trained()}, lora=lora)
    scramble(cast.parameters("student"), scale=0.1)
    condition: Condition = sd3.encode_prompts(PROMPTS)
    with torch.no_grad():
        expected = cast.denoiser("student")(X, TIMES, condition).native
    state = cast.state("student")
    cast.release()
    network = merged_network(sd3, state)
    with torch.no_grad():
        merged = sd3.denoiser(OwnWeights(network))(X, TIMES, condition).native
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stand_in_for_t5_is_loaded_without_surprise(
    sd3_folder: str, caplog: pytest.LogCaptureFixture, tmp_path: Path, dtype: torch.dtype
) -> None:
    types = {"default": dtype, "vae": torch.float32}
    family = load_family(sd3_folder, dtype=types)
    routed = load_pipeline(ModelUnderTest("flow", sd3_folder, 1, 1.0))
    assert not [record for record in caplog.records if "Expected types" in record.message]
    plain = StableDiffusion3Pipeline.from_pretrained(sd3_folder, dtype=types)
    assert "Expected types for text_encoder_3" in caplog.text, "what is not to be seen"
    for pipeline in (family.pipeline, routed):
        assert {name: type(part) for name, part in pipeline.components.items()} == (
            {name: type(part) for name, part in plain.components.items()}
        )
    stand_in = family.pipeline.text_encoder_3
    assert stand_in.dtype == dtype and not stand_in.training
    for name, tensor in plain.text_encoder_3.state_dict().items():
        assert torch.equal(stand_in.state_dict()[name], tensor)
    family.pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["text_encoder_3"][1] == "FunnelBaseModel"
