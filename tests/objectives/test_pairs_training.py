"""Runs that learn from stored pairs, from the recipe to the student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stepdistill.data.pair_maker import PairSettings, make_pairs
from stepdistill.data.prompts import PromptSet
from stepdistill.errors import UserError
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
