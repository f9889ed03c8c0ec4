"""Options that do not go with the teacher's schedule are refused before anything is encoded or trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stepdistill import run
from stepdistill.errors import UserError
from stepdistill.recipe import Recipe
from tests.tiny import tiny_recipe


def recipe_of(teacher: str, output: Path, objective: dict[str, Any]) -> Recipe:
    content = tiny_recipe(teacher, output, stages=[{"objective": objective, "steps": 2, "batch_size": 2}])
    content["data"]["images"] = "shapes"
    return Recipe.from_mapping(content)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"name": "pcm", "timesteps": [999, 700]}, r"timesteps \[999, 700\] are not the beginnings of 2 equal phases"),
        ({"name": "pcm", "solver_steps": 1001}, "a solver grid of 1001 steps is not possible: give 1 to 1000"),
        ({"name": "lcm", "solver_steps": 1001}, "a solver grid of 1001 steps"),
        ({"name": "lcm", "solver_steps": 50, "lowest": 0.5}, "cannot begin at time 0.5"),
        ({"name": "consistency", "solver_steps": 1001}, "a solver grid of 1001 steps"),
        ({"name": "tcd", "solver_steps": 1001}, "a solver grid of 1001 steps"),
        ({"name": "tscd", "solver_steps": 1001}, "a solver grid of 1001 steps"),
        ({"name": "sum", "parts": [{"objective": {"name": "lcm", "solver_steps": 1001}}]}, "a solver grid of 1001"),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_a_grid_that_the_teacher_does_not_have_is_refused_before_the_run(
    objective: dict[str, Any], message: str, sd_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begun(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the run has begun")

    monkeypatch.setattr(run, "open_batches", begun)
    with pytest.raises(UserError, match=message):
        run.train(recipe_of(sd_folder, tmp_path / "run", objective))


def test_a_grid_that_it_has_is_not(sd_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def begun(*args: Any, **kwargs: Any) -> None:
        raise InterruptedError

    monkeypatch.setattr(run, "open_batches", begun)
    with pytest.raises(InterruptedError):
        run.train(recipe_of(sd_folder, tmp_path / "run", {"name": "pcm"}))
