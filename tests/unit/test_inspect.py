"""What `stepdistill inspect` reads off files of every naming, and which calls it recommends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
)
from safetensors.torch import save_file
from typer.testing import CliRunner

from stepdistill import cli
from stepdistill.errors import UserError
from stepdistill.inspection.findings import Findings, inspect_path
from stepdistill.inspection.published import MODELS, recognise
from stepdistill.inspection.schedule import read_schedule
from stepdistill.inspection.tensors import lora_in, read_header


LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
FLAT = LAYER.replace(".", "_")
LAYOUTS = {
    "kohya": (f"lora_unet_{FLAT}.lora_down.weight", f"lora_unet_{FLAT}.lora_up.weight"),
    "Diffusers, PEFT keys": (f"unet.{LAYER}.lora_A.weight", f"unet.{LAYER}.lora_B.weight"),
    "Diffusers, older keys": (f"unet.{LAYER}.lora.down.weight", f"unet.{LAYER}.lora.up.weight"),
    "PEFT adapter": (f"base_model.model.{LAYER}.lora_A.weight", f"base_model.model.{LAYER}.lora_B.weight"),
    "ComfyUI": (f"diffusion_model.{LAYER}.lora_A.weight", f"diffusion_model.{LAYER}.lora_B.weight"),
    "PEFT keys without": (f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"),
}


def save_lora(file: Path, naming: str = "kohya", *, rank: int = 4, alpha: float | None = None, width: int = 2048,
              metadata: dict[str, str] | None = None) -> Path:  # fmt: skip
    down, up = LAYOUTS[naming]
    tensors = {down: torch.zeros(rank, width), up: torch.zeros(16, rank)}
    if alpha is not None:
        tensors[down.replace(".lora_down.weight", ".alpha")] = torch.tensor(alpha)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.half() for name, tensor in tensors.items()}, file, metadata=metadata)
    return file


def fact(findings: Findings, label: str) -> str:
    return dict(findings.facts)[label]


@pytest.mark.parametrize("naming", LAYOUTS)
def test_every_naming_is_told_with_rank_layers_and_base(tmp_path: Path, naming: str) -> None:
    found = lora_in(read_header(save_lora(tmp_path / "x.safetensors", naming)))
    assert found is not None
    assert found.naming.startswith(naming)
    assert (found.layers, found.ranks, found.scales) == (1, (4,), (1.0,))
    assert fact(inspect_path(tmp_path / "x.safetensors"), "fits") == "Stable Diffusion XL"


def test_alpha_is_found_where_it_is_written(tmp_path: Path) -> None:
    beside = inspect_path(save_lora(tmp_path / "a.safetensors", alpha=2.0))
    assert (fact(beside, "alpha"), fact(beside, "alpha / rank")) == ("a number beside every layer", "0.5")
    told = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 8})}
    inside = inspect_path(save_lora(tmp_path / "b.safetensors", "Diffusers, PEFT keys", metadata=told))
    assert fact(inside, "alpha / rank") == "2"
    assert any("fold alpha" in doubt for doubt in inside.doubts)
    plain = inspect_path(save_lora(tmp_path / "c.safetensors", "Diffusers, PEFT keys"))
    assert "equal the rank" in fact(plain, "alpha")
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 12}))
    save_lora(tmp_path / "peft" / "adapter_model.safetensors", "PEFT adapter")
    assert fact(inspect_path(tmp_path / "peft"), "alpha / rank") == "3"


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("Hyper-SDXL-4steps-lora", ('DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")',
                                    "num_inference_steps=4, guidance_scale=1")),
        ("Hyper-SDXL-1step-lora", ("TCDScheduler", "num_inference_steps=1, guidance_scale=1, eta=1.0")),
        ("sdxl_lightning_8step_lora", ("EulerDiscreteScheduler", "num_inference_steps=8")),
        ("dmd2_sdxl_4step_lora_fp16", ("LCMScheduler", "timesteps=[999, 749, 499, 249]")),
        ("lcm-lora-sdxl", ("LCMScheduler", "num_inference_steps=4, guidance_scale=1")),
    ],
)  # fmt: skip
def test_known_models_are_called_as_their_makers_do(tmp_path: Path, name: str, code: tuple[str, str]) -> None:
    found = inspect_path(save_lora(tmp_path / f"{name}.safetensors"))
    assert found.code is not None
    compile(found.code, name, "exec")
    assert all(part in found.code for part in code)
    assert 'from_pretrained("stabilityai/stable-diffusion-xl-base-1.0")' in found.code
    assert any("By its name" in doubt for doubt in found.doubts)


def test_an_unknown_lora_gets_no_call_made_up(tmp_path: Path) -> None:
    found = inspect_path(save_lora(tmp_path / "style.safetensors", width=768))
    assert found.code is None
    assert fact(found, "fits") == "Stable Diffusion 1.x"
    assert "ask its maker" in found.doubts[-1]


def test_a_files_metadata_may_name_the_model(tmp_path: Path) -> None:
    found = inspect_path(save_lora(tmp_path / "x.safetensors", metadata={"ss_output_name": "my_tcd_4step"}))
    assert found.code is not None
    assert "TCDScheduler" in found.code


def test_every_known_model_is_found_by_a_name_of_its_own_and_no_other_name() -> None:
    names = ("pytorch_lora_weights lcm-lora-sdv1-5", "LCM_Dreamshaper_v7", "dmd2_sdxl_1step_unet",
             "dmd2_sdxl_4step_lora", "Hyper-SDXL-1step-Unet", "Hyper-SD15-1step-lora", "Hyper-FLUX.1-dev-8steps-lora",
             "Hyper-SD15-8steps-CFG-lora", "Hyper-SDXL-2steps-lora", "sdxl_lightning_1step_x0", "sdxl_lightning_4step",
             "sdxl-turbo", "sd-turbo", "TCD-SDXL-LoRA", "pcm_sdxl_smallcfg_4step", "Sana_Sprint_1.6B", "swiftbrush",
             "FLUX.1-schnell")  # fmt: skip
    found = [recognise(name) for name in names]
    assert [r.model.name for r in found if r is not None] == [model.name for model in MODELS]
    assert recognise("a red circle") is None
    assert recognise("realistic-film-style") is None


def test_the_schedule_of_a_plain_call_is_the_schedulers_own(tmp_path: Path) -> None:
    told = read_schedule({**LCMScheduler(original_inference_steps=4).config, "_class_name": "LCMScheduler"})
    assert told is not None
    assert told.visited[4] == (999, 749, 499, 249)
    assert 8 not in told.visited, "this scheduler refuses more steps than it was made for"
    assert any("ignores timestep_spacing" in doubt for doubt in told.doubts())
    leading = read_schedule({**EulerDiscreteScheduler(timestep_spacing="leading").config,
                             "_class_name": "EulerDiscreteScheduler"})  # fmt: skip
    assert leading is not None
    assert leading.first is not None
    assert leading.first < 2
    assert any("begins at t = " in doubt and "trailing" in doubt for doubt in leading.doubts())
    flow = read_schedule({**FlowMatchEulerDiscreteScheduler(shift=3.0).config,
                          "_class_name": "FlowMatchEulerDiscreteScheduler"})  # fmt: skip
    assert flow is not None
    assert (flow.prediction, flow.spacing, flow.first) == ("flow (velocity)", "shifted by 3", 1000)
    assert read_schedule({"_class_name": "SomeonesScheduler"}) is None


def copy_with(sd_folder: str, folder: Path, scheduler: object, facts: dict | None = None) -> Path:
    pipeline = StableDiffusionPipeline.from_pretrained(sd_folder)
    pipeline.scheduler = scheduler
    pipeline.save_pretrained(folder)
    if facts is not None:
        (folder / "distillation_config.json").write_text(json.dumps(facts))
    return folder


def test_a_student_of_ours_is_called_as_it_says(sd_folder: str, tmp_path: Path) -> None:
    facts = {"steps": 1, "guidance_scale": 1.0, "method": "dmd2", "teacher": "some/teacher", "timesteps": [549]}
    scheduler = LCMScheduler(num_train_timesteps=550, original_inference_steps=1, prediction_type="v_prediction")
    copy_with(sd_folder, tmp_path / "run" / "pipeline", scheduler, facts)
    found = inspect_path(tmp_path / "run")
    assert found.code is not None
    assert "num_inference_steps=1, guidance_scale=1)" in found.code
    assert (fact(found, "first"), fact(found, "predicts")) == ("t = 549 of 550", "v_prediction")
    assert (fact(found, "method"), fact(found, "pipeline")) == ("dmd2", "StableDiffusionPipeline")
    assert "parameters, F32" in fact(found, "network")
    assert found.doubts == ()


def test_a_strangers_pipeline_is_judged_by_its_scheduler(sd_folder: str, tmp_path: Path) -> None:
    distilled = inspect_path(copy_with(sd_folder, tmp_path / "fast", LCMScheduler(original_inference_steps=2)))
    assert distilled.code is not None
    assert "num_inference_steps=2, guidance_scale=1" in distilled.code
    assert "a guess" in distilled.doubts[0]
    teacher = inspect_path(copy_with(sd_folder, tmp_path / "slow", DDIMScheduler()))
    assert teacher.code is None
    assert "Nothing says that it is distilled" in teacher.doubts[0]


def test_weights_alone_say_what_they_fit_and_whether_guidance_is_an_input(tmp_path: Path) -> None:
    tensors = {f"{LAYER}.weight": torch.zeros(8, 768), "time_embedding.cond_proj.weight": torch.zeros(8, 4)}
    save_file(tensors, tmp_path / "lcm_unet.safetensors")
    found = inspect_path(tmp_path / "lcm_unet.safetensors")
    assert (fact(found, "fits"), fact(found, "guidance")) == ("Stable Diffusion 1.x", "an input of the network")
    assert found.code is not None
    assert "guidance_scale=8" in found.code
    save_file({f"model.diffusion_model.{LAYER}.weight": torch.zeros(8, 2048)}, tmp_path / "sdxl-turbo.safetensors")
    whole = inspect_path(tmp_path / "sdxl-turbo.safetensors")
    assert whole.kind == "whole model in one file"
    assert whole.code is not None
    assert "StableDiffusionXLPipeline.from_single_file" in whole.code
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert "unknown kind" in inspect_path(tmp_path / "other.safetensors").kind


def test_a_guidance_adapter_is_told_with_its_network_and_scale(tmp_path: Path) -> None:
    for name, told in (("a", json.dumps({"network": "UNet2DConditionModel", "guidance": 3.0})), ("b", "[")):
        save_file({"x": torch.zeros(4)}, tmp_path / f"{name}.safetensors", metadata={"guidance_adapter": told})
    found = inspect_path(tmp_path / "a.safetensors")
    assert (fact(found, "made for"), fact(found, "guidance")) == ("UNet2DConditionModel", "3.0, unless told otherwise")
    assert found.code is not None
    assert "stepdistill.load_adapter(pipe, " in found.code
    with pytest.raises(UserError, match="header of this guidance adapter"):
        inspect_path(tmp_path / "b.safetensors")


def test_relatives_of_lora_are_named(tmp_path: Path) -> None:
    save_file({"lora_unet_a.hada_w1_a": torch.zeros(2, 2)}, tmp_path / "loha.safetensors")
    assert inspect_path(tmp_path / "loha.safetensors").kind == "LoHa"


@pytest.mark.parametrize(
    ("name", "reason"),
    [("missing", "nothing is there"), ("model.ckpt", "a pickle can run programs"),
     ("broken.safetensors", "cannot be read"), ("empty", "no model_index.json"),
     ("pickled", "a pickle can run programs")],
)  # fmt: skip
def test_what_cannot_be_explained_is_a_clear_error(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"x")
    (tmp_path / "broken.safetensors").write_bytes(b"x" * 20)
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_lora_weights.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=reason) as raised:
        inspect_path(tmp_path / name)
    assert str(tmp_path) in str(raised.value)


def test_the_command_prints_the_findings(tmp_path: Path) -> None:
    file = save_lora(tmp_path / "lcm-lora.safetensors")
    result = CliRunner().invoke(cli.app, ["inspect", str(file)])
    assert result.exit_code == 0, result.output
    assert f"{file}: LoRA\n" in result.output
    assert "    from diffusers import DiffusionPipeline, LCMScheduler\n" in result.output
