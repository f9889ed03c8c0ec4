"""Stable Diffusion 1.5, 2.1 and XL: our calls make the stock pipeline's images, in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler, StableDiffusionXLPipeline
from torch import Tensor, nn

from stepdistill.adapters import LoraSettings
from stepdistill.cast import Cast
from stepdistill.data.sampler import StockSampler
from stepdistill.errors import UserError
from stepdistill.export.lora import KOHYA_FILE, LORA_FILE, export_lora
from stepdistill.export.pipeline import export_pipeline
from stepdistill.families import load_family
from stepdistill.families.base import ModelFamily
from stepdistill.families.tiny import SD_BETAS, tiny_pipeline
from stepdistill.finish import in_memory, merged_network
from stepdistill.objectives.base import Frozen, Trained
from stepdistill.objectives.dmd2 import DMD2
from stepdistill.recipe_sections import StageConfig
from stepdistill.run import resolve_starts
from tests.tiny import scramble, trainer_of


PROMPTS = ["red", "a ring"]
X = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def stock_images(pipeline: Any, **call: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "latents": X, **call}
    images: Tensor = pipeline(PROMPTS, output_type="pt", **options).images
    return images


@torch.no_grad()
def our_images(family: ModelFamily) -> Tensor:
    scheduler = family.pipeline.scheduler
    sampler = StockSampler(family.denoiser(), scheduler.config, name=scheduler, steps=4, guidance=3.0)
    made = sampler(X, family.encode_prompts(PROMPTS), family.null_condition(len(PROMPTS)))
    return family.decode_latents(made.sample)


def folder_of(pipeline: DiffusionPipeline, folder: Path) -> str:
    pipeline.save_pretrained(folder)
    return str(folder)


def variant(name: str) -> DiffusionPipeline:
    """A tiny pipeline as it is, or with another option that checkpoints of its kind are published with."""
    pipeline: Any = tiny_pipeline(name.partition(" ")[0])
    if name == "sd21 zero snr":
        config = {**pipeline.scheduler.config, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        pipeline.scheduler = DDIMScheduler.from_config(config)
    if name == "sdxl empty":
        pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    return pipeline


@pytest.mark.parametrize("name", ["sd", "sd21", "sd21 zero snr", "sdxl", "sdxl empty"])
def test_our_denoiser_in_the_stock_scheduler_makes_the_stock_pipelines_images(name: str, tmp_path: Path) -> None:
    pipeline = variant(name)
    family = load_family(folder_of(pipeline, tmp_path / "teacher"))
    assert family.kind == ("v_prediction" if "sd21" in name else "epsilon")
    expected = stock_images(pipeline)
    assert (expected - stock_images(pipeline, guidance_scale=1.0)).abs().max() > 1e-3, "guidance that does nothing"
    torch.testing.assert_close(our_images(family), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_an_image_of_another_shape_is_told_its_own_size() -> None:
    pipeline: Any = tiny_pipeline("sdxl")
    family = load_family("tiny:sdxl")
    given: list[dict[str, Any]] = []
    for network in (pipeline.unet, family.network()):
        network.register_forward_pre_hook(lambda m, args, kwargs: given.append(kwargs), with_kwargs=True)
    wide = torch.randn(2, 4, 8, 24, generator=torch.Generator().manual_seed(0))
    stock_images(pipeline, latents=wide, height=16, width=48, num_inference_steps=1, guidance_scale=1.0)
    t = family.schedule.t_from_model_time(torch.tensor([1.0, 1.0]))
    family.denoiser()(wide, t, family.encode_prompts(PROMPTS))
    stock, ours = (call["added_cond_kwargs"] for call in given)
    assert ours["time_ids"].tolist() == [[16, 48, 0, 0, 16, 48]] * 2
    assert torch.equal(stock["time_ids"], ours["time_ids"])
    assert torch.equal(stock["text_embeds"], ours["text_embeds"])
    assert torch.equal(given[0]["encoder_hidden_states"], given[1]["encoder_hidden_states"])


@torch.no_grad()
def test_sizes_of_ones_own_in_a_condition_take_the_place_of_the_images() -> None:
    from stepdistill.condition import Condition

    family, t = load_family("tiny:sdxl"), torch.ones(2)
    told = family.encode_prompts(PROMPTS)
    small = Condition({**told.tensors, "time_ids": torch.tensor([[8, 8, 4, 0, 32, 32]] * 2)})
    same = Condition({**told.tensors, "time_ids": torch.tensor([[32, 32, 0, 0, 32, 32]] * 2)})
    plain = family.denoiser()(X, t, told).native
    assert torch.equal(family.denoiser()(X, t, same).native, plain)
    assert not torch.equal(family.denoiser()(X, t, small).native, plain)


def test_the_unconditional_half_is_zero_where_the_pipeline_says_so() -> None:
    family = load_family("tiny:sdxl")
    assert all(not tensor.any() for tensor in family.null_condition(3).tensors.values())
    assert family.encode_prompts([""]).tensors["prompt_embeds"].any(), "an empty prompt of a user's is encoded"
    family.pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    _, null, _, pooled = family.pipeline.encode_prompt(PROMPTS)
    torch.testing.assert_close(family.null_condition(2).tensors["prompt_embeds"], null)
    torch.testing.assert_close(family.null_condition(2).tensors["pooled_prompt_embeds"], pooled)
    assert null.any()


# ---- training and export -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd21", "sdxl"])
def test_a_student_of_dmd2_with_a_gan_leaves_a_folder_and_loras_of_both_namings_with_its_images(
    name: str, tmp_path: Path
) -> None:
    family = load_family(f"tiny:{name}")
    lora = LoraSettings(4, 8.0, family.lora_targets)
    trainer = trainer_of(family, DMD2(critic_updates=1), lora={"student": lora, "critic": lora}, steps=1,
                         checkpointing=True)  # fmt: skip
    trainer.run()
    scramble(trainer.cast.parameters("student"), scale=0.1)
    student, spec = trainer.cast.state("student"), DMD2().inference()
    trainer.cast.release()
    network = merged_network(family, student)
    expected = in_memory(family, network, spec, X, PROMPTS)
    assert (expected - in_memory(family, family.network(), spec, X, PROMPTS)).abs().max() > 1e-3
    folder = export_pipeline(family, network, spec, tmp_path / "pipeline", facts={})
    call = {"num_inference_steps": 1, "guidance_scale": 1.0}
    torch.testing.assert_close(stock_images(DiffusionPipeline.from_pretrained(folder), **call), expected,
                               rtol=0, atol=1e-4)  # fmt: skip
    place = export_lora(family, student.tensors, rank=4, alpha=8.0, folder=tmp_path / "lora", spec=spec, naming="both")
    for file in (LORA_FILE, KOHYA_FILE):
        stock: Any = tiny_pipeline(name)
        stock.scheduler = DiffusionPipeline.from_pretrained(folder).scheduler
        stock.load_lora_weights(place / file)
        torch.testing.assert_close(stock_images(stock, **call), expected, rtol=0, atol=1e-4)


def test_kohyas_names_are_flat_and_every_alpha_is_the_rank(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    family = load_family("tiny:sdxl")
    cast = Cast(family, {"teacher": Frozen(), "student": Trained()}, lora={"student": LoraSettings(2, 4.0, ("to_q",))})
    scramble(cast.parameters("student"))
    state = cast.state("student").tensors
    place = export_lora(family, state, rank=2, alpha=4.0, folder=tmp_path / "lora", naming="kohya")
    assert not (place / LORA_FILE).exists()
    saved = load_file(place / KOHYA_FILE)
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    flat = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    assert torch.equal(saved[f"{flat}.lora_down.weight"], state[f"{layer}.lora_A.weight"])
    assert torch.equal(saved[f"{flat}.lora_up.weight"], 2 * state[f"{layer}.lora_B.weight"]), "alpha / rank is folded"
    assert {float(tensor) for key, tensor in saved.items() if key.endswith(".alpha")} == {2.0}
    assert len(saved) == 3 * len(state) / 2


# as kohya's programs write them for SDXL, whose UNet has this many blocks with this many layers each
SGM_LAYERS = {
    "conv_in": "input_blocks_0_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "down_blocks.0.resnets.1.conv1": "input_blocks_2_0_in_layers_2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
    "down_blocks.2.resnets.0.conv_shortcut": "input_blocks_7_0_skip_connection",
    "down_blocks.2.attentions.1.transformer_blocks.1.ff.net.0.proj":
        "input_blocks_8_1_transformer_blocks_1_ff_net_0_proj",
    "mid_block.resnets.0.conv2": "middle_block_0_out_layers_3",
    "mid_block.attentions.0.proj_in": "middle_block_1_proj_in",
    "mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
    "up_blocks.0.attentions.2.transformer_blocks.0.attn2.to_out.0":
        "output_blocks_2_1_transformer_blocks_0_attn2_to_out_0",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
    "up_blocks.1.resnets.2.conv1": "output_blocks_5_0_in_layers_2",
    "up_blocks.2.resnets.2.conv_shortcut": "output_blocks_8_0_skip_connection",
    "conv_out": "out_2",
}  # fmt: skip


def test_every_layer_of_sdxl_goes_to_kohyas_name_and_diffusers_reads_it_back(tmp_path: Path) -> None:
    from safetensors import safe_open

    family = load_family("tiny:sdxl")
    every = [name for name, module in family.network().named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    cast = Cast(family, {"teacher": Frozen(), "student": Trained()},
                lora={"student": LoraSettings(2, 2.0, tuple(every))})  # fmt: skip
    scramble(cast.parameters("student"))
    state = cast.state("student").tensors
    cast.release()
    assert {key.partition(".lora_")[0] for key in state} == set(every) > SGM_LAYERS.keys()
    place = export_lora(family, state, rank=2, alpha=2.0, folder=tmp_path / "lora", naming="both")
    with safe_open(place / KOHYA_FILE, framework="pt") as file:
        layers = {key.partition(".")[0].removeprefix("lora_unet_") for key in file.keys()}  # noqa: SIM118
        for layer, flat in SGM_LAYERS.items():
            assert torch.equal(file.get_tensor(f"lora_unet_{flat}.lora_down.weight"), state[f"{layer}.lora_A.weight"])
    assert len(layers) == len(every)
    loaded = []
    for name in (KOHYA_FILE, LORA_FILE):
        stock: Any = tiny_pipeline("sdxl")
        stock.load_lora_weights(place / name, adapter_name="one")
        loaded.append({key: value for key, value in stock.unet.state_dict().items() if ".lora_" in key})
    assert len(loaded[0]) == len(state)
    assert all(torch.equal(loaded[0][key], value) for key, value in loaded[1].items())


def test_a_naming_that_nothing_converts_to_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"kohya is for UNets.*StableDiffusion3Pipeline.*lora_format=diffusers"):
        export_lora(load_family("tiny:sd3"), {}, rank=2, alpha=2.0, folder=tmp_path / "lora", naming="kohya")


# ---- another model as the student's start --------------------------------------------------------------------------


def turbo(folder: Path) -> str:
    """What SD-Turbo is to Stable Diffusion 2.1 base: the same network, epsilon, with a schedule for few steps."""
    pipeline: Any = tiny_pipeline("sd21")
    scramble(dict(pipeline.unet.named_parameters()), seed=7, scale=0.1)
    pipeline.scheduler = EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="trailing", steps_offset=1)
    return folder_of(pipeline, folder)


def base(folder: Path) -> str:
    pipeline: Any = tiny_pipeline("sd21")
    pipeline.scheduler = DDIMScheduler.from_config({**pipeline.scheduler.config, "prediction_type": "epsilon"})
    return folder_of(pipeline, folder)


@torch.no_grad()
def test_a_student_starts_as_sd_turbo_beside_a_teacher_that_predicts_the_same(tmp_path: Path) -> None:
    start, family = load_family(turbo(tmp_path / "turbo")), load_family(base(tmp_path / "base"))
    stage = StageConfig.model_validate(
        {"objective": {"name": "vsd"}, "steps": 1, "starts": {"student": str(tmp_path / "turbo")}}
    )
    cast = Cast(family, {"teacher": Frozen(), "student": Trained()}, starts=resolve_starts(stage, {}, family))
    condition, t = family.encode_prompts(PROMPTS), torch.ones(2)
    said = cast.denoiser("student")(X, t, condition).x0
    assert torch.equal(said, start.denoiser()(X, t, condition).x0)
    assert not torch.equal(said, cast.denoiser("teacher")(X, t, condition).x0)


def test_a_start_that_predicts_another_quantity_than_the_teacher_is_refused(tmp_path: Path) -> None:
    stage = StageConfig.model_validate(
        {"objective": {"name": "vsd"}, "steps": 1, "starts": {"student": turbo(tmp_path / "turbo")}}
    )
    with pytest.raises(UserError, match=r"starts\.student: .*turbo predicts epsilon, the teacher tiny:sd21 v_pred"):
        resolve_starts(stage, {}, load_family("tiny:sd21"))


def test_a_tiny_teacher_has_the_same_weights_every_time() -> None:
    torch.manual_seed(3)
    first = tiny_pipeline("sdxl")
    before = torch.rand(1)
    torch.manual_seed(4)
    second: Any = tiny_pipeline("sdxl")
    assert not torch.equal(torch.rand(1), before), "the caller's generator is left alone"
    assert isinstance(first, StableDiffusionXLPipeline)
    for name, parameter in first.unet.named_parameters():
        assert torch.equal(parameter, second.unet.get_parameter(name)), name
