"""The leaderboard script: what it counts, what it runs, and in which order it shows what it found."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from benchmarks import objectives
from stepdistill.bench.generate import ModelUnderTest
from stepdistill.recipe import Recipe, build_objective


def test_a_pass_costs_by_what_it_carries() -> None:
    network, x = nn.Linear(2, 2), torch.zeros(5, 2)
    with objectives.counting(nn.Linear) as counter, torch.no_grad():
        network(x)
    assert counter.passes == 5
    with objectives.counting(nn.Linear) as counter:
        network(x)
    assert counter.passes == 3 * 5, "its parameters ask for a gradient"
    with objectives.counting(nn.Linear) as counter, torch.no_grad(), forward_ad.dual_level():
        network(forward_ad.make_dual(x, x))
    assert counter.passes == 2 * 5
    with objectives.counting(nn.Conv2d) as counter:
        network(x)
    assert counter.passes == 0


@pytest.mark.parametrize("name", objectives.CELLS)
def test_every_cell_is_a_recipe_of_a_few_step_student(name: str) -> None:
    recipe = objectives.recipe_of(name, (), objectives.parsed([]))
    spec = build_objective(recipe.stages[-1].objective, recipe.source).inference()
    assert recipe.export.pipeline
    assert spec is not None
    assert max(objectives.STEPS.get(name, (0,))) <= spec.num_steps


@pytest.mark.parametrize(("name", "stage"), [(name, n) for name, stages in objectives.EARLIER.items() for n in stages])
def test_an_earlier_stages_student_is_called_as_that_stage_says(name: str, stage: int) -> None:
    recipe = objectives.recipe_of(name, (), objectives.parsed([]))
    last = ModelUnderTest(name, "last", 4, 1.0, train_seconds=1.0)
    found = objectives.stage_student(last, recipe, stage, Path("folder"))
    assert (found.name, found.path) == (f"{name}, stage {stage + 1}", "folder")
    assert found.steps == len(recipe.stages[stage].objective.model_dump()["timesteps"])
    assert found.steps > len(recipe.stages[-1].objective.model_dump()["timesteps"])


def test_the_command_can_name_one_teacher_for_all() -> None:
    args = objectives.parsed(["--teacher", "elsewhere"])
    assert objectives.recipe_of("vsd_1step", (), args).teacher == "elsewhere"
    assert objectives.recipe_of("vsd_1step", (), objectives.parsed([])).teacher == "assets/shapes/teacher"


def test_teachers_come_first_and_then_students_by_calls_and_fid(tmp_path: Path) -> None:
    cells = {
        "b": [{"model": "b, 1 step", "nfe": 1, "fid": 4.0}, {"model": "b, 2 steps", "nfe": 2, "fid": 1.0}],
        "a": [{"model": "a", "nfe": 1, "fid": 5.0}],
    }
    for name, rows in cells.items():
        (tmp_path / name).mkdir()
        facts = {"seed": 0, "teacher": "t", "passes": 7}
        (tmp_path / name / "rows.json").write_text(json.dumps([{**row, **facts} for row in rows]))
    (tmp_path / "z").mkdir()
    teacher = {"model": "t, 25 guided steps", "nfe": 50, "fid": 2.0, "seed": 0, "teacher": "t"}
    (tmp_path / "z" / "rows.json").write_text(json.dumps([teacher]))
    output = tmp_path / "out.json"
    objectives.collect(argparse.Namespace(work=tmp_path, output=output, device="cpu", passes=7, prompts=1))
    result = json.loads(output.read_text())
    assert [row["model"] for row in result["rows"]] == ["t, 25 guided steps", "b, 1 step", "a", "b, 2 steps"]
    assert result["protocol"]["teacher"] == "t"


def test_a_cell_and_a_teacher_have_folders_of_their_own(tmp_path: Path) -> None:
    args = argparse.Namespace(work=tmp_path)
    folders = [objectives.folder_of(name, 0, args) for name in ("vsd_1step", "teacher:assets/shapes/flow")]
    assert [folder.name for folder in folders] == ["vsd_1step-seed0", "teacher-assets-shapes-flow"]
    assert all(folder.parent == tmp_path for folder in folders)


def test_everything_counted_in_iterations_is_scaled() -> None:
    recipe = objectives.recipe_of("disback_1step", (), objectives.parsed([]))
    short = objectives.scaled(recipe, [10], recipe.stages[0].steps * 10 // 4)
    options = short.stages[0].objective.options
    assert (short.stages[0].steps, options["node_steps"], options["interval"]) == (300, 10, 12)
    assert options["nodes"] == recipe.stages[0].objective.options["nodes"]
    assert options["base"] == recipe.stages[0].objective.options["base"]
    assert short.stages[0].player("critic").warmup_steps == 5
    assert short.stages[0].player("student").ema == 0.99
    assert (short.health, short.checkpoints.every, short.seed) == (None, 50, recipe.seed)


def test_network_calls_of_a_student_are_not_scaled() -> None:
    recipe = objectives.recipe_of("agd", (), objectives.parsed([]))
    whole, counts = recipe.stages[0], [1] * len(recipe.stages)
    short = objectives.scaled(recipe, counts, sum(stage.steps for stage in recipe.stages) // 100).stages[0]
    assert short.steps == whole.steps / 100
    assert short.objective.options["steps"] == whole.objective.options["steps"] == 25
    assert short.players["student"].warmup_steps == round(whole.players["student"].warmup_steps / 100) > 1


def test_a_cell_makes_no_more_pairs_than_it_has_time_for() -> None:
    recipe = objectives.recipe_of("agd", (), objectives.parsed([]))
    short = objectives.with_fewer_pairs(recipe, 100)
    assert recipe.data.make_pairs["count"] > 100
    assert (short.data.count, short.data.make_pairs["count"]) == (100, 100)
    assert short.data.make_pairs == {**recipe.data.make_pairs, "count": 100}
    assert objectives.with_fewer_pairs(short, 200).data == short.data, "never more than the recipe makes"
    stored = objectives.recipe_of("dmd_1step", (), objectives.parsed([]))
    assert objectives.with_fewer_pairs(stored, 100) == stored, "pairs that are there already cost nothing"


@pytest.mark.parametrize("name", objectives.CELLS)
def test_every_cell_can_be_scaled(name: str) -> None:
    recipe = objectives.recipe_of(name, (), objectives.parsed([]))
    short = objectives.scaled(recipe, [7] * len(recipe.stages), sum(stage.steps for stage in recipe.stages))
    assert sum(stage.steps for stage in short.stages) <= sum(stage.steps for stage in recipe.stages) / 5
    build_objective(short.stages[-1].objective, recipe.source)


class Net(nn.Module):
    def forward(self, rows: Tensor) -> Tensor:
        return rows


@pytest.mark.parametrize(("name", "rows"), [("disback_1step", 4), ("dmd2_plain_1step", 5)])
def test_iterations_that_are_not_alike_count_in_their_true_proportion(
    name: str, rows: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def train(recipe: Recipe, *, resume: bool) -> None:
        assert not resume
        Net()(torch.zeros(7, 1))  # whatever a run does besides
        for stage in recipe.stages:
            objective = build_objective(stage.objective, recipe.source)
            for step in range(stage.steps):
                alone = [phase.name for phase in objective.phases(step)] == ["recording"]
                Net()(torch.zeros(1 if alone else 5, 1))

    monkeypatch.setattr(objectives, "train", train)
    monkeypatch.setattr("stepdistill.families.load_family", lambda path: argparse.Namespace(network=Net))
    recipe = Recipe.load(objectives.ROOT / f"recipes/shapes/{name}.yaml")
    counts = objectives.passes_per_iteration(recipe, tmp_path)
    assert set(counts) == {rows}, "disback: 200 iterations of one row and 1,000 of five"
