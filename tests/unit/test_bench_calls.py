"""How a benchmark calls its models: LoRAs from elsewhere, timesteps, schedulers, and numbers of network calls."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from safetensors.torch import save_file

from stepdistill.bench.generate import ModelUnderTest, generate_images, load_pipeline
from stepdistill.cli_models import parse_model, parse_models
from stepdistill.errors import UserError


pytestmark = pytest.mark.usefixtures("quiet", "offline")
PROMPTS = ["a red circle", "a blue ring on white", "a shape"]


def under_test(teacher: Path, **changes: object) -> ModelUnderTest:
    return replace(ModelUnderTest("teacher", str(teacher), steps=1, guidance_scale=1.0), **changes)


def lora_file(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"unet.x.lora_A.weight": torch.zeros(2, 2), "unet.x.lora_B.weight": torch.zeros(2, 2)}, file)
    return file


@pytest.mark.parametrize(
    ("name", "steps", "guidance", "scheduler", "more"),
    [
        ("lcm-lora-sdv1-5.safetensors", 4, 1.0, "lcm", {}),
        ("pytorch_lora_weights.safetensors", 4, 1.0, "lcm", {}),  # as the hub has it, in a folder of its name
        ("Hyper-SD15-8steps-lora.safetensors", 8, 1.0, "ddim-trailing", {}),
        ("Hyper-SD15-1step-lora.safetensors", 1, 1.0, "tcd", {"eta": 1.0}),
        ("dmd2_sdxl_4step_lora.safetensors", 4, 1.0, "lcm", {"timesteps": (999, 749, 499, 249)}),
    ],
)
def test_a_published_lora_is_called_as_its_makers_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, steps: int, guidance: float, scheduler: str,
    more: dict[str, Any],
) -> None:  # fmt: skip
    file = lora_file(tmp_path / "lcm-lora-sdv1-5" / name)
    for model in (parse_model(f"mine=some/base+{file}"), parse_model(f"mine=some/base,lora={file}")):
        assert (model.steps, model.guidance_scale, model.scheduler) == (steps, guidance, scheduler)
        assert {key: getattr(model, key) for key in more} == more
    assert "note: mine: " in capsys.readouterr().err
    given = parse_model(f"some/base+{file},guidance_scale=2.0,scheduler=euler,steps=3")
    assert (given.steps, given.guidance_scale, given.scheduler, given.timesteps) == (3, 2.0, "euler", None)
    assert capsys.readouterr().err == "", "who says all of it is told nothing"


def test_a_lora_of_the_hub_is_known_by_its_id_and_open_to_other_numbers_of_calls() -> None:
    cells = parse_models("lcm=some/base+latent-consistency/lcm-lora-sdv1-5", nfe=[1, 4])
    assert [(cell.name, cell.steps, cell.scheduler) for cell in cells] == [
        ("lcm, 1 step", 1, "lcm"), ("lcm, 4 steps", 4, "lcm"),
    ]  # fmt: skip
    (only,) = parse_models("some/base+x/Hyper-SD15-8steps-lora", nfe=[1, 4])
    assert only.steps == 8, "it is for eight steps alone"


def test_the_facts_beside_a_loras_file_are_read_and_an_unknown_one_is_warned_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = lora_file(tmp_path / "run/lora/pytorch_lora_weights.safetensors")
    LCMScheduler().save_pretrained(file.parent / "scheduler")
    (file.parent / "distillation_config.json").write_text(json.dumps({"steps": 2, "guidance_scale": 1.0}))
    (model,) = parse_models(f"mine=some/base+{file}", nfe=[1, 8])
    assert (model.steps, model.guidance_scale, model.scheduler) == (2, 1.0, str(file.parent / "scheduler"))
    assert capsys.readouterr().err == ""
    unknown = lora_file(tmp_path / "other/lora.safetensors")
    assert parse_model(f"lcm=some/base+{unknown}").steps == 25
    assert "warning: lcm: neither a distillation_config.json" in capsys.readouterr().err
    parse_model(f"lcm=some/base+{unknown},guidance_scale=1.0")
    assert capsys.readouterr().err == ""


def test_a_model_is_called_at_its_own_timesteps(teacher: Path) -> None:
    model = under_test(teacher, timesteps=(999, 499, 249), scheduler="lcm")
    pipeline = load_pipeline(model)
    assert generate_images(pipeline, PROMPTS, model=model, images_per_prompt=1).nfe == 3
    assert pipeline.scheduler.timesteps.tolist() == [999, 499, 249]
    trailing = load_pipeline(under_test(teacher, scheduler="ddim-trailing")).scheduler
    assert isinstance(trailing, DDIMScheduler)
    assert trailing.config.timestep_spacing == "trailing"
    with pytest.raises(UserError, match="neither one of"):
        load_pipeline(under_test(teacher, scheduler="best-trailing"))
    assert parse_model(f"{teacher},timesteps=[999,499,249]").steps == 3


@pytest.mark.parametrize(
    ("part", "config", "steps"),
    [
        ("unet", {"time_cond_proj_dim": None}, [1, 4]),
        ("unet", {"time_cond_proj_dim": 256}, [1, 2, 8]),
        ("transformer", {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True}, [1, 2, 8]),
        ("transformer", {"_class_name": "FluxTransformer2DModel", "guidance_embeds": False}, [1, 2, 8]),
        ("transformer", {"_class_name": "SanaTransformer2DModel", "guidance_embeds": True}, [1, 2, 8]),
        ("transformer", {"_class_name": "SanaTransformer2DModel"}, [1, 4]),
    ],
)
def test_guidance_halves_the_steps_only_where_it_doubles_the_calls(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, config: dict[str, Any], steps: list[int]
) -> None:
    (tmp_path / part).mkdir()
    (tmp_path / part / "config.json").write_text(json.dumps(config))
    assert [cell.steps for cell in parse_models(f"big={tmp_path}", nfe=[1, 2, 8])] == steps
    told = capsys.readouterr().err
    assert ("warning: big: not measured at 1 network calls" in told) == (len(steps) == 2)
