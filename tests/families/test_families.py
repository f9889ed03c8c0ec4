"""Families: each computes what its stock pipeline computes, and trains."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline, StableDiffusionPipeline

from stepdistill.cast import Cast
from stepdistill.discriminator import Discriminator
from stepdistill.errors import UserError
from stepdistill.families import FAMILIES, load_family
from stepdistill.families.base import ModelFamily
from stepdistill.objectives.base import Frozen, Head
from stepdistill.objectives.dmd2 import DMD2
from stepdistill.prediction import add_noise
from tests.tiny import LORA, PROMPTS, trainer_of, weights_of


COUNT = 2
NAMES = ("sd", "dit")


@pytest.fixture(params=NAMES)
def family(request: pytest.FixtureRequest) -> ModelFamily:
    loaded: ModelFamily = request.getfixturevalue(request.param)
    return loaded


def prompts_of(family: ModelFamily) -> list[str]:
    return ["crimson", "7"] if family.name == "dit" else ["red", "a ring"]


def sample(family: ModelFamily) -> torch.Tensor:
    return torch.randn(COUNT, *family.latent_shape(), generator=torch.Generator().manual_seed(0))


def test_a_folder_is_loaded_as_what_its_index_says(sd: ModelFamily, dit: ModelFamily) -> None:
    assert (sd.name, dit.name) == NAMES
    assert isinstance(sd.pipeline, StableDiffusionPipeline)
    assert isinstance(dit.pipeline, DiTPipeline)
    assert {sd.pipeline_class, dit.pipeline_class} <= set(FAMILIES)
    assert (sd.network(), dit.network()) == (sd.pipeline.unet, dit.pipeline.transformer)
    assert sd.latent_shape() == dit.latent_shape() == (4, 8, 8)
    assert sd.latent_shape(32) == (4, 16, 16)
    assert (sd.kind, dit.kind) == ("epsilon", "epsilon")


def test_layers_at_several_depths_are_parts_of_the_network_and_a_head_takes_them(
    sd: ModelFamily, dit: ModelFamily, sd3_folder: str
) -> None:
    assert sd.spread_layers == ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0")
    assert dit.spread_layers == ("transformer_blocks.0",)
    sd3 = load_family(sd3_folder)
    assert sd3.spread_layers == ("transformer_blocks.0.norm1", "transformer_blocks.1.norm1")
    for family in (sd, dit, sd3):
        head = Cast(family, {"teacher": Frozen(), "judge": Head(Discriminator, ("blocks",))}).head("judge")
        x = torch.randn(2, *family.latent_shape())
        logits = head(family.denoiser(), x, torch.full((2,), 0.5, dtype=torch.float64), family.null_condition(2))
        assert logits.shape == (2, len(family.spread_layers))
        assert logits.isfinite().all()


def test_everything_is_frozen_in_eval_mode_and_float32(family: ModelFamily) -> None:
    for component in family.pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            assert not component.training
            assert not any(p.requires_grad for p in component.parameters())
            assert {p.dtype for p in component.parameters()} == {torch.float32}


def test_prompts_are_encoded_as_the_stock_pipeline_does(sd: ModelFamily) -> None:
    with_prompt, null = sd.pipeline.encode_prompt(["red", "a ring"], "cpu", 1, True)
    assert torch.equal(sd.encode_prompts(["red", "a ring"]).tensors["prompt_embeds"], with_prompt)
    assert torch.equal(sd.null_condition(2).tensors["prompt_embeds"], null)
    assert not torch.equal(with_prompt[0], with_prompt[1])


def test_classes_are_meant_by_number_or_name_and_the_null_class_is_the_one_behind_the_last(dit: ModelFamily) -> None:
    assert dit.encode_prompts(["3", "crimson", "ring", "999"]).tensors["class_labels"].tolist() == [3, 3, 7, 999]
    assert dit.null_condition(2).tensors["class_labels"].tolist() == [1000, 1000]
    for wrong in ("1000", "blue", "-1", "3.5"):
        with pytest.raises(UserError, match=rf"prompt '{wrong}' is no class.*from 0 to 999"):
            dit.encode_prompts([wrong])


@torch.no_grad()
def test_the_sd_network_is_called_as_the_stock_pipeline_calls_it(sd: ModelFamily) -> None:
    x, condition = sample(sd), sd.encode_prompts(["red", "a ring"])
    said = sd.denoiser()(x, sd.schedule.t_from_model_time(torch.tensor([749, 20])), condition)
    stock = sd.pipeline.unet(x, torch.tensor([749, 20]), encoder_hidden_states=condition.tensors["prompt_embeds"])
    assert torch.equal(said.native, stock.sample)


@torch.no_grad()
def test_the_learnt_variance_of_dit_is_dropped(dit: ModelFamily) -> None:
    x, condition = sample(dit), dit.encode_prompts(["3", "7"])
    said = dit.denoiser()(x, dit.schedule.t_from_model_time(torch.tensor([749, 20])), condition)
    stock = dit.pipeline.transformer(x, timestep=torch.tensor([749, 20]), class_labels=torch.tensor([3, 7])).sample
    assert stock.shape[1] == 8
    assert torch.equal(said.native, stock[:, :4])


@torch.no_grad()
def test_guidance_is_that_of_two_separate_calls(family: ModelFamily) -> None:
    x, t, view = sample(family), torch.tensor([0.3, 0.9]), family.denoiser()
    condition, null = family.encode_prompts(prompts_of(family)), family.null_condition(COUNT)
    with_prompt, without = view(x, t, condition).eps, view(x, t, null).eps
    assert (with_prompt - without).abs().max() > 1e-4, "a condition that does nothing tests nothing"
    guided = view.guided(x, t, condition, null, 3.0).eps
    torch.testing.assert_close(guided, without + 3.0 * (with_prompt - without), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_one_guided_ddim_step_is_the_stock_schedulers(family: ModelFamily) -> None:
    from diffusers import DDIMScheduler

    from stepdistill.sampling import ddim_step

    scheduler = DDIMScheduler.from_config(family.pipeline.scheduler.config, clip_sample=False, steps_offset=0)
    scheduler.set_timesteps(10)  # 900, 800, ... 0
    times = [family.schedule.t_from_model_time(torch.tensor([t] * COUNT)) for t in (500, 400)]
    x, condition = sample(family), family.encode_prompts(prompts_of(family))
    prediction = family.denoiser().guided(x, times[0], condition, family.null_condition(COUNT), 2.0)
    stock = scheduler.step(prediction.eps, 500, x).prev_sample
    torch.testing.assert_close(ddim_step(family.denoiser(), prediction, times[1]), stock, rtol=0, atol=1e-5)


@torch.no_grad()
def test_images_go_to_scaled_latents_and_back(family: ModelFamily) -> None:
    vae = family.pipeline.vae
    images = torch.rand(COUNT, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.manual_seed(0)
    latents = family.encode_images(images)
    torch.manual_seed(0)
    assert torch.equal(latents, vae.encode(images).latent_dist.sample() * vae.config.scaling_factor)
    assert latents.shape == (COUNT, *family.latent_shape(16))
    decoded = family.decode_latents(latents)
    assert decoded.shape == images.shape
    assert 0 <= decoded.min() <= decoded.max() <= 1
    expected = vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5
    torch.testing.assert_close(decoded, expected.clamp(0, 1))


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_one_step_of_dmd2_trains_both_roles(family: ModelFamily, weights: str) -> None:
    texts = tuple(str(i) for i in range(len(PROMPTS))) if family.name == "dit" else PROMPTS
    lora = LORA if family.name == "sd" else type(LORA)(2, 2.0, family.lora_targets)
    x, t = sample(family), torch.ones(COUNT)
    condition = family.encode_prompts(prompts_of(family))
    before_output = family.denoiser()(x, t, condition).native
    roles = {"student": lora, "critic": lora} if weights == "lora" else {}
    trainer = trainer_of(family, DMD2(critic_updates=1), lora=roles, steps=1, checkpointing=True, texts=texts)
    before = weights_of(trainer)
    trainer.run()
    after = weights_of(trainer)
    for role in ("student", "critic"):
        names = [name for name in before if name.startswith(f"{role}/")]
        changed = [name for name in names if not torch.equal(before[name], after[name])]
        assert len(changed) >= len(names) / 2
        view = trainer.cast.denoiser(role)
        assert (view(x, t, condition).native - before_output).abs().max() > 1e-6
    assert torch.equal(trainer.cast.denoiser("teacher")(x, t, condition).native, before_output)


def test_an_empty_twin_has_the_teachers_shape_device_and_dtype_and_warns_of_nothing(
    family: ModelFamily, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    twin = family.plain_network()
    assert "float32" not in caplog.text + capsys.readouterr().err
    twin.load_state_dict(family.network().state_dict())
    assert not twin.training
    assert not any(p.requires_grad for p in twin.parameters())
    family.network().to(torch.bfloat16)
    assert {p.dtype for p in family.plain_network().parameters()} == {torch.bfloat16}


def test_noise_is_the_stock_schedulers(family: ModelFamily) -> None:
    x0, eps, index = sample(family), torch.randn(COUNT, 4, 8, 8), torch.tensor([20, 980])
    ours = add_noise(family.schedule, x0, family.schedule.t_from_model_time(index), eps)
    stock = family.pipeline.scheduler.add_noise(x0, eps, index)
    torch.testing.assert_close(ours, stock, rtol=0, atol=2e-6)


# ---- what users get wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "component"),
    [("sd", "unet"), ("sd", "vae"), ("sd", "tokenizer"), ("sd", "scheduler"), ("dit", "transformer"), ("dit", "vae")],
)
def test_a_folder_that_lacks_a_component_is_refused_by_its_name(
    name: str, component: str, sd_folder: str, dit_folder: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(sd_folder if name == "sd" else dit_folder, tmp_path / "teacher")
    shutil.rmtree(folder / component)
    with pytest.raises(UserError, match=rf"teacher: .*teacher lacks its component '{component}'"):
        load_family(str(folder))


def test_a_component_without_its_weights_is_refused(sd_folder: str, tmp_path: Path) -> None:
    folder = shutil.copytree(sd_folder, tmp_path / "teacher")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"teacher: .*could not be loaded"):
        load_family(str(folder))


def test_a_component_whose_weights_are_cut_off_is_named_with_the_remedy(sd_folder: str, tmp_path: Path) -> None:
    folder = shutil.copytree(sd_folder, tmp_path / "teacher")
    file = folder / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"teacher: .*text_encoder/model\.safetensors is damaged .*; copy or "):
        load_family(str(folder))


@pytest.mark.parametrize("content", ['{"_class_name": "StableDiff', "[]"])
def test_a_broken_index_is_named_with_the_remedy(content: str, sd_folder: str, tmp_path: Path) -> None:
    folder = shutil.copytree(sd_folder, tmp_path / "teacher")
    (folder / "model_index.json").write_text(content)
    with pytest.raises(UserError, match=r"teacher: .*model_index\.json is damaged .*copy or download it"):
        load_family(str(folder))


def test_a_pipeline_without_a_family_is_refused_with_the_list_of_families(sd_folder: str, tmp_path: Path) -> None:
    folder = shutil.copytree(sd_folder, tmp_path / "teacher")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "KolorsPipeline"}))
    with pytest.raises(UserError, match=r"is a KolorsPipeline; supported pipelines: DiT.*, StableDiffusionPipeline"):
        load_family(str(folder))


def test_what_is_no_pipeline_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no model_index\.json"):
        load_family(str(tmp_path))
    with pytest.raises(UserError, match=r"nowhere.*no such file or folder"):
        load_family(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_images_are_decoded_in_full_where_half_precision_would_overflow(
    sd: ModelFamily, precision: torch.dtype
) -> None:
    vae, seen = sd.pipeline.vae, []
    hook = vae.decoder.conv_in.register_forward_hook(lambda _, given, output: seen.append(output.dtype))
    latents = torch.randn(1, *sd.latent_shape(), generator=torch.Generator().manual_seed(0), requires_grad=True)
    try:
        with torch.autocast("cpu", precision):
            images = sd.decode_latents(latents)
            images.sum().backward()
    finally:
        hook.remove()
    assert seen == [torch.float32 if precision == torch.float16 else precision]
    assert latents.grad is not None and latents.grad.isfinite().all()
    if precision == torch.float16:
        assert torch.equal(images, sd.decode_latents(latents))
