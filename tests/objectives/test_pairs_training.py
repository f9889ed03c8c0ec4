"""Runs that learn from stored pairs, from the recipe to the student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from stepdistill.cli import app
from stepdistill.data.pair_maker import PairSettings, make_pairs
from stepdistill.data.pairs import load_pairs
from stepdistill.data.prompts import PromptSet
from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.families.base import ModelFamily
from stepdistill.recipe import Recipe
from stepdistill.run import train
from tests.tiny import PROMPTS, tiny_recipe


def stage(steps: int, lr: float, **objective: Any) -> dict[str, Any]:
    players = {"default": {"optimizer": {"lr": lr}, "weights": "full"}}
    return {"objective": objective, "steps": steps, "batch_size": 2, "players": players}


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_student_is_warmed_up_on_pairs_and_goes_on_with_dmd(sd: ModelFamily, sd_folder: str, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs"
    make_pairs(sd, PromptSet(PROMPTS[:2]), pairs, PairSettings(steps=4))
    stages = [
        stage(12, 3e-3, name="regression"),
        stage(2, 1e-9, name="dmd", guidance=3.0),
        stage(1, 1e-9, name="dmd2"),
    ]
    content = tiny_recipe(sd_folder, tmp_path / "run", stages=stages)
    content["data"]["pairs"] = str(pairs)
    train(Recipe.from_mapping(content))
    first, second, third = ([line for line in log_of(tmp_path / "run") if line["stage"] == i] for i in range(3))
    # Both pairs are in every batch, so the loss can be followed from step to step.
    assert first[-1]["regression"] < 0.7 * first[0]["regression"]
    assert second[0]["regression"] == pytest.approx(0.25 * first[-1]["regression"], rel=0.3)
    assert {"matching", "direction", "critic", "critic/gradient_norm"} <= second[-1].keys()
    assert "regression" not in third[0]


@pytest.mark.parametrize("name", ["regression", "dmd"])
def test_a_recipe_without_pairs_is_refused_before_anything_is_encoded(
    sd_folder: str, tmp_path: Path, name: str
) -> None:
    content = tiny_recipe(sd_folder, tmp_path / "run", stages=[stage(1, 1e-3, name=name)])
    with pytest.raises(UserError, match=r"recipe: data\.pairs: missing, .* make them with: stepdistill data pairs"):
        train(Recipe.from_mapping(content))
    assert not (tmp_path / "run" / "cache").exists()


@pytest.mark.parametrize("stored", [None, "absent", "of another teacher"])
def test_a_run_makes_the_pairs_that_are_missing(
    sd_folder: str, dit: ModelFamily, tmp_path: Path, stored: str | None
) -> None:
    content = tiny_recipe(sd_folder, tmp_path / "run", stages=[stage(1, 1e-3, name="regression")])
    if stored == "of another teacher":
        make_pairs(dit, PromptSet(("0", "1")), tmp_path / "pairs", PairSettings(steps=1))
    content["data"] |= {"make_pairs": {"count": 3, "sampler": "dpm++", "steps": 2, "guidance": 1.5}}
    if stored is not None:
        content["data"]["pairs"] = str(tmp_path / "pairs")
    train(Recipe.from_mapping(content))
    made = load_pairs(tmp_path / "run" / "cache" / "pairs")
    assert len(made) == 3 and made.facts["guidance"] == 1.5 and made.facts["steps"] == 2
    assert "DPMSolverMultistep" in made.facts["sampler.class"]


def test_stored_pairs_of_the_teacher_are_taken_as_they_are(sd: ModelFamily, sd_folder: str, tmp_path: Path) -> None:
    make_pairs(sd, PromptSet(PROMPTS[:2]), tmp_path / "pairs", PairSettings(steps=2))
    content = tiny_recipe(sd_folder, tmp_path / "run", stages=[stage(1, 1e-3, name="regression")])
    content["data"] |= {"pairs": str(tmp_path / "pairs"), "make_pairs": {"count": 3}}
    train(Recipe.from_mapping(content))
    assert not (tmp_path / "run" / "cache" / "pairs").exists()


def test_a_wrong_setting_of_the_pairs_to_make_is_named(sd_folder: str, tmp_path: Path) -> None:
    content = tiny_recipe(sd_folder, tmp_path / "run", stages=[stage(1, 1e-3, name="regression")])
    content["data"] |= {"make_pairs": {"sampel": "ddim"}}
    with pytest.raises(UserError, match=r"recipe: data\.make_pairs\.sampel: unknown key; did you mean 'sampler'"):
        train(Recipe.from_mapping(content))


def quantised_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for torchao and bitsandbytes: linear layers rounded to seven bits and a sign."""

    def rounded(network: nn.Module, base: str, device: str) -> None:
        with torch.no_grad():
            for layer in network.modules():
                if isinstance(layer, nn.Linear):
                    step = layer.weight.abs().amax() / 127
                    layer.weight.copy_((layer.weight / step).round() * step)

    monkeypatch.setattr("stepdistill.resources.apply.quantise", rounded)
    monkeypatch.setattr("stepdistill.recipe.check_extra", lambda package, where: None)


def beside_int8(teacher: str, output: Path, name: str, **data: Any) -> dict[str, Any]:
    weights = {} if name == "agd" else {"weights": {"lora": {"rank": 2}}}
    players = {"default": {"optimizer": {"lr": 1e-3}, **weights}}
    stages = [{"objective": {"name": name}, "steps": 1, "batch_size": 2, "players": players}]
    content = tiny_recipe(teacher, output, stages=stages, memory={"base": "int8"}, precision="bf16", device="cpu")
    content["data"] |= data
    return content


@pytest.mark.parametrize("name", ["regression", "agd"])
def test_pairs_of_the_teacher_are_taken_beside_its_quantised_network(
    sd_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    quantised_here(monkeypatch)
    content = beside_int8(sd_folder, tmp_path / "run", name, pairs=str(tmp_path / "pairs"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(content))
    settings = ["count=2", "steps=2", "states=all", "predictions=true"]
    made = CliRunner().invoke(app, ["data", "pairs", str(recipe), *settings, "--quiet"])
    assert made.exit_code == 0, made.output
    train(Recipe.from_mapping(content))
    assert log_of(tmp_path / "run")[-1]["step"] == 1


def test_a_run_makes_pairs_with_a_quantised_network_and_says_so(
    sd_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantised_here(monkeypatch)
    settings = {"count": 2, "steps": 1}
    train(Recipe.from_mapping(beside_int8(sd_folder, tmp_path / "run", "regression", make_pairs=settings)))
    family = load_family(sd_folder, dtype=torch.bfloat16)
    made = load_pairs(tmp_path / "run" / "cache" / "pairs", family)  # of the same teacher, however it is kept
    assert made.facts["network kept as"] == "int8"


def test_pairs_in_fp32_of_a_teacher_in_half_precision_are_refused(sd_folder: str, tmp_path: Path) -> None:
    family = load_family(sd_folder, dtype=torch.bfloat16)
    with pytest.raises(UserError, match=r"precision: the teacher's weights are in bfloat16.*precision=bf16"):
        make_pairs(family, PromptSet(PROMPTS[:2]), tmp_path / "pairs", PairSettings(steps=1))
