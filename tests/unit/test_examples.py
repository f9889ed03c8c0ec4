"""The examples run, and do what they say."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from stepdistill import Recipe
from stepdistill.run import train


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def one_file(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("one_file")


def imported(file: Path) -> set[str]:
    """Top-level names of the modules that a file imports."""
    tree = ast.parse(file.read_text())
    names = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def test_the_one_file_example_needs_nothing_but_torch() -> None:
    assert imported(EXAMPLES / "one_file.py") - set(sys.stdlib_module_names) == {"torch"}


def test_the_one_file_example_prints_its_table_and_draws_its_picture(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    arguments = ["--teacher-steps", "20", "--student-steps", "3", "--picture", str(picture)]
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / "one_file.py"), *arguments], capture_output=True, text=True, check=True
    )
    for row in ("data", "teacher", "teacher, 1 call", "student, 1 call"):
        assert f"\n{row:16} " in result.stdout
    with Image.open(picture) as image:
        image.load()  # raises if a checksum is wrong
        assert image.size == (960, 240)
        assert image.getextrema() == (40, 255)


def test_matching_pulls_a_shifted_student_towards_the_teacher(one_file: ModuleType) -> None:
    """Teacher and critic with known answers: the gradient at the student's points is their scaled difference."""
    torch.manual_seed(0)

    class At(torch.nn.Module):
        """A denoiser of a point: E[x0 | x_t] is that point, so v = (alpha x_t - point) / sigma."""

        def __init__(self, point: float) -> None:
            super().__init__()
            self.point = torch.nn.Parameter(torch.full((2,), point))

        def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            alpha, sigma = one_file.levels(t)
            return (alpha * x_t - self.point) / sigma

    student, teacher, critic = At(3.0), At(1.0), At(3.0)
    one_file.matching_loss(student, teacher, critic).backward()
    # (fake - real) / mean |x - real| = 1 for every coordinate, and the mean over two coordinates halves it.
    assert student.point.grad == pytest.approx(torch.full((2,), 0.5), abs=1e-3)
    assert teacher.point.grad is None
    assert critic.point.grad is None


@pytest.mark.slow
def test_the_one_file_student_is_near_the_data_in_one_call_where_its_teacher_is_not(one_file: ModuleType) -> None:
    torch.manual_seed(0)
    teacher = one_file.train_teacher(3000)
    student = one_file.distil(teacher, 600)
    real, noise = one_file.data(2000), torch.randn(2000, 2)
    with torch.no_grad():
        one_call = one_file.generate(student, noise)
    assert one_file.energy_distance(one_call, real) < 0.1 * one_file.energy_distance(
        one_file.sample(teacher, noise, 1), real
    )


def test_an_objective_of_ones_own_trains_from_a_recipe_by_its_python_path(
    monkeypatch: pytest.MonkeyPatch, sd_folder: str, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    (tmp_path / "prompts.txt").write_text("red\n")
    content = {
        "name": "regression", "output": str(tmp_path / "run"), "device": "cpu", "teacher": sd_folder,
        "data": {"prompts": str(tmp_path / "prompts.txt")},
        "stages": [{
            "objective": {"name": "own_objective:Regression", "guidance": 1.0, "teacher_steps": 2},
            "steps": 25, "batch_size": 4, "players": {"default": {"optimizer": {"lr": 5e-3}}},
        }],
        "previews": None, "health": {"prompts": 1, "teacher_steps": 2},
        "export": {"pipeline": False, "lora": False},
    }  # fmt: skip
    train(Recipe.from_mapping(content))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["regression"] for line in lines]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_the_own_objective_stays_short() -> None:
    assert len((EXAMPLES / "own_objective.py").read_text().splitlines()) <= 60
