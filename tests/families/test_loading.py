"""Teachers from one file, with LoRAs merged into them, and what is refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepdistill.bench.generate import ModelUnderTest, load_pipeline
from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.families.tiny import tiny_pipeline
from stepdistill.finish import keep_teacher
from stepdistill.recipe import Recipe
from stepdistill.run import train
from stepdistill.run_folder import RunFolder
from stepdistill.stock_files import load_single_file, reason
from tests.families.single_file import write_single_file
from tests.families.test_unet_families import PROMPTS, folder_of, our_images, stock_images
from tests.tiny import scramble, tiny_recipe


def with_ddim(name: str) -> Any:
    """With a scheduler that counts as it is written in its configuration."""
    pipeline: Any = tiny_pipeline(name)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    return pipeline


def configuration(folder: str) -> str:
    """A pipeline's folder without any weights."""
    for file in Path(folder).rglob("*.safetensors"):
        file.unlink()
    return folder


# ---- one file ------------------------------------------------------------------------------------------------------


def test_one_file_with_a_configuration_is_the_pipeline_that_it_was_made_of(tmp_path: Path) -> None:
    pipeline = with_ddim("sd")
    file = write_single_file(pipeline, tmp_path / "model.safetensors")
    config = configuration(folder_of(pipeline, tmp_path / "config"))
    family = load_family(file, config=config)
    assert not family.stored
    torch.testing.assert_close(our_images(family), stock_images(pipeline), rtol=0, atol=1e-5)


def test_what_a_file_lacks_comes_from_the_configurations_folder_if_it_has_weights(tmp_path: Path) -> None:
    pipeline = with_ddim("sd")
    whole = load_file(write_single_file(pipeline, tmp_path / "whole.safetensors"))
    save_file({k: v for k, v in whole.items() if not k.startswith("cond_stage_model")}, tmp_path / "part.safetensors")
    config = folder_of(pipeline, tmp_path / "config")
    family = load_family(str(tmp_path / "part.safetensors"), config=config)
    torch.testing.assert_close(our_images(family), stock_images(pipeline), rtol=0, atol=1e-5)
    with pytest.raises(UserError, match=r"part\.safetensors could not be loaded as a StableDiffusionPipeline"):
        load_family(str(tmp_path / "part.safetensors"), config=configuration(config))


def test_one_file_without_a_configuration_says_what_it_looks_like_and_what_to_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    file = write_single_file(tiny_pipeline("sd"), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"weights alone.*teacher_config: a Diffusers folder.*stable-diffusion-v1-5"):
        load_family(file)


def test_a_file_with_too_few_weights_is_refused(tmp_path: Path) -> None:
    pipeline = with_ddim("sd")
    whole = load_file(write_single_file(pipeline, tmp_path / "whole.safetensors"))
    lost = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    save_file({k: v for k, v in whole.items() if k != lost}, tmp_path / "part.safetensors")
    config = configuration(folder_of(pipeline, tmp_path / "config"))
    with pytest.raises(UserError, match=r"part\.safetensors lacks weights that a StableDiffusionPipeline built as"):
        load_family(str(tmp_path / "part.safetensors"), config=config)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pth"])
def test_a_pickle_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02")
    with pytest.raises(UserError, match=r"is a pickle.*\.safetensors"):
        load_family(str(tmp_path / name))


def test_a_file_that_is_no_safetensors_and_a_configuration_for_a_folder_are_refused(
    tmp_path: Path, sd_folder: str
) -> None:
    (tmp_path / "model.safetensors").write_text("nothing")
    with pytest.raises(UserError, match=r"no readable \.safetensors"):
        load_family(str(tmp_path / "model.safetensors"))
    with pytest.raises(UserError, match=r"teacher_config: .* is of no use"):
        load_family(sd_folder, config=sd_folder)


def test_a_tiny_teacher_that_there_is_not_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"tiny:sdx is unknown; did you mean.*sdxl"):
        load_family("tiny:sdx")


def test_a_file_is_sampled_with_its_configuration_and_refused_without_its_text_encoder(tmp_path: Path) -> None:
    pipeline = with_ddim("sd")
    whole = write_single_file(pipeline, tmp_path / "whole.safetensors")
    part = {k: v for k, v in load_file(whole).items() if not k.startswith("cond_stage_model")}
    save_file(part, tmp_path / "part.safetensors")
    config = folder_of(pipeline, tmp_path / "config")
    for name in ("whole", "part"):  # what the file lacks has the folder
        model = ModelUnderTest(name, str(tmp_path / f"{name}.safetensors"), 1, 1.0, config=config)
        encoder = load_pipeline(model).components["text_encoder"].state_dict()
        assert all(torch.equal(v, encoder[k]) for k, v in pipeline.text_encoder.state_dict().items())
    configuration(config)
    with pytest.raises(UserError, match=r"^part: .*part\.safetensors (lacks|could not be).* as config, with "):
        load_pipeline(model)
    Path(model.path).write_bytes(Path(whole).read_bytes()[:-100])
    with pytest.raises(UserError, match=r"^part: .*part\.safetensors is no readable \.safetensors file"):
        load_pipeline(model)
    Path(model.path).unlink()
    with pytest.raises(UserError, match=r"^config: owner/nowhere is neither a folder nor a reachable hub id"):
        load_single_file(Path(whole), "owner/nowhere", where="x", key="config")


def test_a_model_with_a_cut_off_file_is_refused_by_the_files_name(sd_folder: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sd_folder, tmp_path / "model"))
    file = folder / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"^mine: .*text_encoder/model\.safetensors is damaged"):
        load_pipeline(ModelUnderTest("mine", str(folder), 1, 1.0))


def test_weights_that_are_pickles_are_refused_with_a_remedy_that_works(dit_folder: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(dit_folder, tmp_path / "model"))
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(UserError, match=r"^teacher: .*/transformer: the weights are pickles.* convert them") as caught:
        load_family(str(folder))
    command = str(caught.value).split('-c "')[1].split('"')[0]
    result = subprocess.run([sys.executable, "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    converted = load_family(str(tmp_path / "converted")).network().state_dict()
    for name, tensor in load_family(dit_folder).network().state_dict().items():
        assert torch.equal(converted[name], tensor)


def test_a_hub_id_without_safetensors_is_refused_with_the_same_remedy() -> None:
    error = OSError("Could not find the necessary `safetensors` weights in {'unet/x.bin'} (variant=None)")
    assert reason("owner/name", error).startswith("owner/name: the weights are pickles")
    assert "P.from_pretrained('owner/name')" in reason("owner/name", error)


# ---- LoRAs ---------------------------------------------------------------------------------------------------------


def lora_of(network: Any, targets: list[str]) -> dict[str, Tensor]:
    network.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets))
    scramble({name: p for name, p in network.named_parameters() if "lora_" in name})
    state: dict[str, Tensor] = get_peft_model_state_dict(network)
    return state


def save_lora(folder: Path) -> str:
    """A LoRA of the tiny SDXL's network and of both text encoders."""
    pipeline: Any = tiny_pipeline("sdxl")
    text = ["q_proj", "v_proj"]
    type(pipeline).save_lora_weights(
        folder,
        unet_lora_layers=lora_of(pipeline.unet, ["to_q", "conv1"]),
        text_encoder_lora_layers=lora_of(pipeline.text_encoder, text),
        text_encoder_2_lora_layers=lora_of(pipeline.text_encoder_2, text),
    )
    return str(folder)


def test_loras_are_merged_with_their_scales_into_network_and_text_encoders(tmp_path: Path) -> None:
    lora, stock = save_lora(tmp_path / "lora"), with_ddim("sdxl")
    teacher = folder_of(stock, tmp_path / "teacher")
    plain = our_images(load_family(teacher))
    stock.load_lora_weights(lora, adapter_name="a")
    stock.set_adapters(["a"], [0.75])
    expected = stock_images(stock)
    family = load_family(teacher, loras=[(lora, 0.5), (str(Path(lora) / "pytorch_lora_weights.safetensors"), 0.25)])
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(our_images(family), expected, rtol=0, atol=1e-4)
    assert not family.stored
    assert family.network().state_dict().keys() == tiny_pipeline("sdxl").unet.state_dict().keys()
    before = load_family(teacher).encode_prompts(PROMPTS).tensors["pooled_prompt_embeds"]
    assert not torch.allclose(family.encode_prompts(PROMPTS).tensors["pooled_prompt_embeds"], before, atol=1e-2)


def test_the_text_encoders_part_of_a_flux_lora_is_merged_too(tmp_path: Path) -> None:
    pipeline: Any = tiny_pipeline("flux")
    type(pipeline).save_lora_weights(
        tmp_path / "lora",
        transformer_lora_layers=lora_of(pipeline.transformer, ["to_q"]),
        text_encoder_lora_layers=lora_of(pipeline.text_encoder, ["q_proj", "v_proj"]),
    )
    plain, merged = load_family("tiny:flux"), load_family("tiny:flux", loras=[(str(tmp_path / "lora"), 1.0)])
    before, after = (family.encode_prompts(PROMPTS).tensors["pooled_prompt_embeds"] for family in (plain, merged))
    assert not torch.allclose(before, after, atol=1e-2)
    name = "transformer_blocks.0.attn.to_q.weight"
    assert not torch.equal(plain.network().get_parameter(name), merged.network().get_parameter(name))


def test_the_merged_teacher_is_kept_where_plain_diffusers_finds_it(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    family = load_family("tiny:sdxl", loras=[(save_lora(tmp_path / "lora"), 1.0)])
    kept = keep_teacher(family, RunFolder(tmp_path / "run"))
    again: Any = DiffusionPipeline.from_pretrained(kept)
    for name, parameter in family.network().named_parameters():
        assert torch.equal(again.unet.get_parameter(name), parameter), name


def test_an_adapter_that_peft_saved_is_merged_where_diffusers_has_no_loader(tmp_path: Path) -> None:
    pipeline: Any = tiny_pipeline("dit")
    changed = get_peft_model(pipeline.transformer, LoraConfig(r=2, lora_alpha=4, target_modules=["to_q"]))
    scramble({name: p for name, p in changed.named_parameters() if "lora_" in name})
    changed.save_pretrained(tmp_path / "adapter")
    name = "transformer_blocks.0.attn1.to_q.weight"
    before = load_family("tiny:dit").network().get_parameter(name)
    family = load_family("tiny:dit", loras=[(str(tmp_path / "adapter"), 0.5)])
    merged: nn.Module = changed.merge_and_unload()
    torch.testing.assert_close(family.network().get_parameter(name), (before + merged.get_parameter(name)) / 2)
    assert not torch.equal(before, merged.get_parameter(name))


@pytest.mark.parametrize(
    ("teacher", "make", "text"),
    [
        ("sdxl", lambda folder: str(folder / "nowhere"), "no such file or folder"),
        ("sdxl", lambda folder: _written(folder / "lora.bin"), r"is no \.safetensors file"),
        ("sdxl", lambda folder: _unrelated(folder / "lora.safetensors"), "holds no layers of a StableDiffusionXL"),
        ("sd", lambda folder: save_lora(folder), "could not be merged into a StableDiffusionPipeline"),
        ("dit", lambda folder: save_lora(folder), "no LoRA loader for DiTPipeline; give a folder that peft saved"),
    ],
)
def test_a_lora_that_is_none_of_this_teachers_is_refused(teacher: str, make: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"teacher_loras: .*{text}"):
        load_family(f"tiny:{teacher}", loras=[(make(tmp_path), 1.0)])


def _written(file: Path) -> str:
    file.write_bytes(b"\x80\x02")
    return str(file)


def _unrelated(file: Path) -> str:
    save_file({f"transformer.x.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"}, file)
    return str(file)


@pytest.mark.slow
def test_a_run_with_a_merged_teacher_trains_and_exports_what_plain_diffusers_draws(tmp_path: Path) -> None:
    content = tiny_recipe("tiny:sdxl", tmp_path / "run", teacher_loras=[{"path": save_lora(tmp_path / "lora")}],
                          export={"pipeline": True, "lora": True, "lora_format": "both"})  # fmt: skip
    content["stages"][0]["steps"] = 1
    result = train(Recipe.from_mapping(content))  # compares both exports with the student in a fresh process
    assert result.pipeline is not None
    assert result.lora is not None
    assert (tmp_path / "run" / "teacher" / "model_index.json").is_file()
    assert str(tmp_path / "run" / "teacher") in (tmp_path / "run" / "README.md").read_text()
