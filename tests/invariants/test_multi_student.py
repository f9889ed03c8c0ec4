"""Runs of several students: apart or together, each once, and the same as ever where there is only one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from typer.testing import CliRunner

from stepdistill import Recipe, UserError, finish, load_students, train
from stepdistill.cli import app
from stepdistill.objectives.base import Batch
from stepdistill.objectives.dmd2 import DMD2
from stepdistill.partition import ByCluster, load_partition, save_partition
from stepdistill.run import export
from stepdistill.run_folder import RunFolder
from stepdistill.trainer import Trainer
from tests.tiny import PROMPTS, tiny_recipe


def several(teacher: str, output: Path, students: int = 2, **changes: Any) -> Recipe:
    """A short recipe, of as many students."""
    content = tiny_recipe(teacher, output, **{"multi_student": {"students": students}, **changes})
    content["stages"][0] |= {"steps": 3, "accumulate": 1}
    return Recipe.from_mapping(content)


def part_of(recipe: Recipe, number: int, output: Path) -> Recipe:
    """What is trained apart: the same recipe with the number of a student."""
    content = recipe.model_dump(mode="json")
    content["multi_student"]["part"] = number
    return Recipe.from_mapping({**content, "output": str(output)})


def weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(RunFolder(run).load_roles(0)["student"].tensors)


def equal(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The prompts that each stage was trained on."""
    found: list[set[str]] = []
    run, student, critic = Trainer.run, DMD2.student_loss, DMD2.critic_loss

    def recorded_run(self: Trainer) -> None:
        found.append(set())
        run(self)

    def recorded(loss: Any) -> Any:
        def play(self: DMD2, cast: Any, batch: Batch, step: Any) -> Any:
            found[-1].update(batch.prompts)
            return loss(self, cast, batch, step)

        return play

    monkeypatch.setattr(Trainer, "run", recorded_run)
    monkeypatch.setattr(DMD2, "student_loss", recorded(student))
    monkeypatch.setattr(DMD2, "critic_loss", recorded(critic))
    return found


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports are compared in fresh processes by other tests."""
    monkeypatch.setattr(finish, "check", lambda *_: 0.0)


def test_students_see_their_own_prompts_only_and_a_finished_one_is_never_trained_again(
    sd_folder: str, tmp_path: Path, seen: list[set[str]]
) -> None:
    recipe = several(sd_folder, tmp_path / "run")
    train(part_of(recipe, 1, tmp_path / "run" / "student-1"))
    before = (tmp_path / "run" / "student-1" / "metrics.jsonl").read_bytes()
    first = weights(tmp_path / "run" / "student-1")
    train(recipe)
    assert len(seen) == 2, "student 1 was there already"
    assert (tmp_path / "run" / "student-1" / "metrics.jsonl").read_bytes() == before
    assert all(torch.equal(weights(tmp_path / "run" / "student-1")[key], first[key]) for key in first)
    assert seen[0].isdisjoint(seen[1])
    assert seen[0] | seen[1] == set(PROMPTS), "6 updates with 2 prompts each: an epoch of 12"
    train(recipe)
    assert len(seen) == 2, "nothing is left to do"


def test_a_student_that_was_stopped_while_it_was_exported_is_exported_again_and_not_trained(
    sd_folder: str, tmp_path: Path, seen: list[set[str]]
) -> None:
    recipe, run = several(sd_folder, tmp_path / "run", export={"lora": True}), tmp_path / "run" / "student-1"
    train(recipe)
    before, exported = weights(run), sorted(file.name for file in (run / "lora").iterdir())
    shutil.rmtree(run / "lora")
    (run / "README.md").unlink()
    train(recipe)
    assert len(seen) == 2, "no student was trained again"
    assert all(torch.equal(before[key], value) for key, value in weights(run).items())
    assert sorted(file.name for file in (run / "lora").iterdir()) == exported


def test_a_finished_student_that_is_older_than_an_option_is_left_as_it_is(
    sd_folder: str, tmp_path: Path, seen: list[set[str]]
) -> None:
    recipe, run = several(sd_folder, tmp_path / "run"), tmp_path / "run" / "student-0"
    train(recipe)
    record = run / "recipe.yaml"
    lines = record.read_text().splitlines(keepends=True)
    older = [line for line in lines if "critic_lead:" not in line]
    assert len(older) == len(lines) - 1
    record.write_text("".join(older))
    before = (run / "README.md").stat().st_mtime_ns
    train(recipe)
    assert (run / "README.md").stat().st_mtime_ns == before, "it was exported a second time"


def test_students_that_could_not_all_be_trained_are_refused_before_the_first(
    dit_folder: str, tmp_path: Path, seen: list[set[str]]
) -> None:
    (tmp_path / "prompts.txt").write_text("1\n2\n3\n")  # all of the first half of the classes
    recipe = several(
        dit_folder, tmp_path / "run", data={"prompts": str(tmp_path / "prompts.txt")},
        multi_student={"students": 2, "by": "classes"},
    )  # fmt: skip
    with pytest.raises(UserError, match="none of the 3 prompts belongs to student 2 of 2"):
        train(recipe)
    assert seen == []


def test_a_partition_for_another_number_of_students_is_refused(sd_folder: str, tmp_path: Path) -> None:
    rows = torch.eye(3, dtype=torch.float64).numpy()
    (tmp_path / "apart").mkdir()
    save_partition(ByCluster(rows, rows[0]), tmp_path / "apart")
    with pytest.raises(UserError, match=r"among 3 students, the recipe among 2; .*multi_student.students=3"):
        train(part_of(several(sd_folder, tmp_path / "run"), 0, tmp_path / "apart"))


def test_students_trained_apart_are_those_trained_one_after_another(sd_folder: str, tmp_path: Path) -> None:
    recipe = several(sd_folder, tmp_path / "run")
    train(recipe)
    for number in range(2):
        train(part_of(recipe, number, tmp_path / f"machine-{number}"))
        assert equal(tmp_path / f"machine-{number}", tmp_path / "run" / f"student-{number}")
    assert not equal(tmp_path / "machine-0", tmp_path / "machine-1")


def test_one_student_of_one_is_the_ordinary_student(sd_folder: str, tmp_path: Path) -> None:
    train(several(sd_folder, tmp_path / "one", students=1))
    train(several(sd_folder, tmp_path / "plain", multi_student=None))
    assert equal(tmp_path / "one" / "student-0", tmp_path / "plain")


def test_students_of_different_partitions_are_not_put_together(sd_folder: str, tmp_path: Path) -> None:
    recipe = several(sd_folder, tmp_path / "run")
    for number in range(2):
        train(part_of(recipe, number, tmp_path / "run" / f"student-{number}"))
    other = {"format": 1, "students": 2, "kind": "classes", "table": [0, 1]}
    (tmp_path / "run" / "student-0" / "partition.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="student-1: this student was trained for another partition"):
        train(recipe)


def test_a_student_takes_the_partition_that_lies_in_its_folder(
    sd_folder: str, tmp_path: Path, seen: list[set[str]]
) -> None:
    recipe = several(sd_folder, tmp_path / "run")
    train(part_of(recipe, 0, tmp_path / "a"))
    (tmp_path / "b").mkdir()
    found = load_partition(tmp_path / "a")
    assert isinstance(found, ByCluster)
    save_partition(ByCluster(found.centres[::-1].copy(), found.prices[::-1].copy()), tmp_path / "b")
    train(part_of(recipe, 0, tmp_path / "b"))
    assert seen[0] | seen[1] == set(PROMPTS), "the two students have changed places"


def test_the_parts_are_of_one_size_and_stay_so_when_students_are_used(sd_folder: str, tmp_path: Path) -> None:
    result = train(several(sd_folder, tmp_path / "run", export={"pipeline": True, "lora": False}))
    assert result.pipeline == tmp_path / "run"
    pipe = load_students(tmp_path / "run")
    parts = pipe.parts(PROMPTS)
    assert sorted(parts) == [0] * 12 + [1] * 12
    assert [pipe.parts([prompt])[0] for prompt in PROMPTS] == parts
    assert [load_students(tmp_path / "run").parts([prompt])[0] for prompt in reversed(PROMPTS)] == parts[::-1]
    for number in range(2):
        kind = DiffusionPipeline.from_pretrained(tmp_path / "run" / f"student-{number}" / "pipeline")
        assert isinstance(kind, StableDiffusionPipeline)
    facts = json.loads((tmp_path / "run" / "distillation_config.json").read_text())
    assert (facts["students"], facts["steps"], facts["guidance_scale"]) == (2, 1, 1.0)
    assert 'load_students(".")' in (tmp_path / "run" / "README.md").read_text()
    drawn = CliRunner().invoke(app, ["sample", str(tmp_path / "run"), "a", "q", "--output", str(tmp_path / "images")])
    assert drawn.exit_code == 0, drawn.output
    assert len(list((tmp_path / "images").glob("*.png"))) == 2
    with pytest.raises(UserError, match="a run of several students, which are exported one by one"):
        export(tmp_path / "run")


@pytest.mark.parametrize("by", ["classes", "clusters"])
def test_students_share_the_classes_of_a_dit(by: str, dit_folder: str, tmp_path: Path, seen: list[set[str]]) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(map(str, range(0, 1000, 50))) + "\n")
    recipe = several(
        dit_folder, tmp_path / "run", data={"prompts": str(tmp_path / "prompts.txt")},
        multi_student={"students": 2, "by": by}, export={"pipeline": True, "lora": False},
    )  # fmt: skip
    train(recipe)
    assert seen[0].isdisjoint(seen[1])
    pipe = load_students(tmp_path / "run")
    pipe.set_progress_bar_config(disable=True)
    parts = pipe.parts(list(map(str, range(1000))))
    assert sorted(parts) == [0] * 500 + [1] * 500
    assert (parts == sorted(parts)) is (by == "classes")
    assert [pipe.parts([prompt]) for prompt in seen[1]] == [[1]] * len(seen[1])
    assert len(pipe(["0", "999"], num_inference_steps=1, guidance_scale=1).images) == 2


def test_a_number_that_no_student_has_is_told_as_one_line(sd_folder: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"multi_student\.part: there are students 0 to 1"):
        several(sd_folder, tmp_path / "run", multi_student={"students": 2, "part": 2})
    with pytest.raises(UserError, match="'colour' is neither classes nor clusters"):
        train(several(sd_folder, tmp_path / "run", multi_student={"students": 2, "by": "colour"}))
    with pytest.raises(UserError, match="StableDiffusionPipeline has no classes"):
        train(several(sd_folder, tmp_path / "other", multi_student={"students": 2, "by": "classes"}))


def test_resuming_needs_something_to_resume(sd_folder: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        train(several(sd_folder, tmp_path / "run"), resume=True)
