"""A run's folder: whose it is, and that nothing of anybody's is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stepdistill.adapters import LoraSettings
from stepdistill.cast import RoleState
from stepdistill.checkpoint import load_tree, tensors_equal
from stepdistill.errors import UserError
from stepdistill.recipe import Recipe
from stepdistill.run import train
from stepdistill.run_folder import RunFolder
from stepdistill.trainer import Trainer
from tests.tiny import tiny_recipe


def recipe(folder: Path, teacher: str = "some/teacher", **changes: Any) -> Recipe:
    content = tiny_recipe(teacher, folder, **changes)
    content["stages"][0].update(steps=2, accumulate=1)
    return Recipe.from_mapping(content).resolved()


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_new_folder_gets_the_whole_recipe_and_the_environment(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "deep" / "run")
    (tmp_path / "deep").mkdir()
    folder.claim(recipe(folder.path), None)
    text = (folder.path / "recipe.yaml").read_text()
    assert text.startswith("#!/usr/bin/env -S stepdistill train\n")
    assert Recipe.load(folder.path / "recipe.yaml").sha256 == recipe(folder.path).sha256
    assert "torch" in (folder.path / "environment.json").read_text()


def test_an_empty_folder_and_ones_own_folder_are_welcome(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    RunFolder(run).claim(recipe(run), None)
    (run / "metrics.jsonl").write_text("kept")
    RunFolder(run).claim(recipe(run), None)
    assert (run / "metrics.jsonl").read_text() == "kept"


def test_another_recipes_run_is_left_alone_and_the_difference_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    RunFolder(run).claim(recipe(run), None)
    (run / "metrics.jsonl").write_text("precious")
    before = listing(run)
    with pytest.raises(UserError, match=r"run of another recipe \(different: seed\).*output=.*--fresh"):
        RunFolder(run).claim(recipe(run, seed=7), None)
    with pytest.raises(UserError, match=r"another recipe"):
        RunFolder(run).claim(recipe(run, seed=7), True)
    assert listing(run) == before


def test_a_run_that_is_older_than_an_option_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    RunFolder(run).claim(recipe(run), None)
    (run / "metrics.jsonl").write_text("kept")
    record = run / "recipe.yaml"
    lines = record.read_text().splitlines(keepends=True)
    older = [line for line in lines if "critic_lead:" not in line]
    assert len(older) == len(lines) - 1
    record.write_text("".join(older))
    RunFolder(run).claim(recipe(run), None)
    assert (run / "metrics.jsonl").read_text() == "kept"
    record.write_text("".join(older).replace("critic_updates: 1", "critic_updates: 2"))
    with pytest.raises(UserError, match=r"different: stages.0.objective.critic_updates"):
        RunFolder(run).claim(recipe(run), None)


def test_the_device_and_the_place_do_not_make_another_recipe(tmp_path: Path) -> None:
    run, data = tmp_path / "run", {"prompts": "shapes", "count": 8}
    RunFolder(run).claim(recipe(run, data=data), None)
    (run / "metrics.jsonl").write_text("kept")
    moved = run.rename(tmp_path / "moved")
    RunFolder(moved).claim(recipe(moved, data=data, device="auto"), None)
    assert (moved / "metrics.jsonl").read_text() == "kept"


@pytest.mark.parametrize("resume", [None, True, False])
def test_a_folder_of_something_else_is_never_touched(tmp_path: Path, resume: bool | None) -> None:
    run = tmp_path / "thesis"
    run.mkdir()
    (run / "chapter.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis is not empty and holds no run; choose another folder with output="):
        RunFolder(run).claim(recipe(run), resume)
    assert listing(run) == {"chapter.tex": b"years of work"}


@pytest.mark.parametrize("resume", [None, False])
def test_a_recipe_of_the_users_own_does_not_make_a_folder_a_run(tmp_path: Path, resume: bool | None) -> None:
    run = tmp_path / "project"
    run.mkdir()
    (run / "recipe.yaml").write_text("name: mine\n")
    (run / "chapter.tex").write_text("years of work")
    before = listing(run)
    with pytest.raises(UserError, match="is not empty and holds no run"):
        RunFolder(run).claim(recipe(run), resume)
    assert listing(run) == before


def test_a_run_that_failed_before_it_began_holds_nobody_up(tmp_path: Path) -> None:
    run = tmp_path / "run"
    RunFolder(run).claim(recipe(run), None)
    RunFolder(run).claim(recipe(run, seed=7), None)
    assert Recipe.load(run / "recipe.yaml").seed == 7


@pytest.mark.parametrize("resume", [None, False])
def test_a_mistake_in_the_recipe_leaves_the_folder_as_it_was(tmp_path: Path, resume: bool | None) -> None:
    run = tmp_path / "run"
    with pytest.raises(UserError):
        train(recipe(run, teacher=str(tmp_path / "nowhere")), resume=resume)
    assert not run.exists()
    RunFolder(run).claim(recipe(run), None)
    (run / "metrics.jsonl").write_text("precious")
    before = listing(run)
    with pytest.raises(UserError):
        train(recipe(run, teacher=str(tmp_path / "nowhere")), resume=resume)
    assert listing(run) == before


def test_a_full_disk_leaves_the_record_of_a_run_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    RunFolder(run).claim(recipe(run), None)
    before = listing(run)
    assert (run / "recipe.yaml").stat().st_mode & 0o111, "recipes are executable files"

    def full(path: Path, *args: object, **options: object) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    other = recipe(run, seed=7)
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="No space left on device"):
        RunFolder(run).claim(other, None)
    assert listing(run) == before


def test_fresh_replaces_a_run_of_whatever_recipe(tmp_path: Path) -> None:
    run = tmp_path / "run"
    RunFolder(run).claim(recipe(run), None)
    (run / "metrics.jsonl").write_text("old")
    RunFolder(run).claim(recipe(run, seed=7), False)
    assert not (run / "metrics.jsonl").exists()
    assert Recipe.load(run / "recipe.yaml").seed == 7


def test_resume_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for _ in range(2):
        with pytest.raises(UserError, match="holds no checkpoint to resume from; start without --resume"):
            RunFolder(run).claim(recipe(run), True)
        RunFolder(run).claim(recipe(run), None)
    RunFolder(run).checkpoints.save(1, {}, {"stage": 0, "step": 1})
    RunFolder(run).claim(recipe(run), True)


def test_a_record_that_cannot_be_read_is_a_users_error(tmp_path: Path) -> None:
    run = tmp_path / "run"
    RunFolder(run).claim(recipe(run), None)
    (run / "metrics.jsonl").write_text("begun")
    (run / "recipe.yaml").write_text("name: [")
    with pytest.raises(UserError, match=r"recipe\.yaml cannot be read any more.*--fresh"):
        RunFolder(run).claim(recipe(run), None)


def test_the_weights_of_a_stage_come_back_with_their_settings(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    states = {
        "student": RoleState(LoraSettings(2, 4.0, ("to_q", "conv1")), {"a": torch.randn(3)}),
        "critic": RoleState(None, {"b": torch.randn(2)}),
    }
    assert folder.stages_done() == 0
    folder.save_roles(0, states, {"prompts": 3})
    assert (folder.drawn(0), folder.drawn(1)) == ({"prompts": 3}, {})
    back = folder.load_roles(0)
    assert back["student"].lora == states["student"].lora
    assert back["critic"].lora is None
    assert torch.equal(back["student"].tensors["a"], states["student"].tensors["a"])
    assert folder.stages_done() == 1


def test_training_time_is_summed_over_sessions_from_the_log(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.train_seconds() == 0.0
    folder.log.write_text('{"stage": 0, "step": 1, "seconds": 1.5}\n{"stage": 0, "step": 2, "seconds": 2.0}\n{"sta')
    assert folder.train_seconds() == 3.5


def test_a_checkpoint_of_another_stage_is_not_gone_on_from(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.newest_checkpoint(0) == ({}, None)
    folder.checkpoints.save(2, {}, {"stage": 0, "step": 2})
    assert folder.newest_checkpoint(0)[1] == {"stage": 0, "step": 2}
    assert folder.newest_checkpoint(1) == ({}, None)


def test_running_a_finished_run_again_does_not_train_again_and_fresh_does(
    sd_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = recipe(tmp_path / "run", sd_folder)
    trained = []
    original = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: (trained.append(1), original(self))[1])
    train(content)
    assert trained == [1]
    roles = tmp_path / "run" / "checkpoints" / "stage-0" / "roles"
    log, weights = (tmp_path / "run" / "metrics.jsonl").read_bytes(), load_tree(roles)
    train(content)
    train(content, resume=True)
    assert trained == [1]
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == log
    train(content, resume=False)
    assert trained == [1, 1]
    again = load_tree(roles)
    for role, entry in weights.items():
        assert tensors_equal(entry["tensors"], again[role]["tensors"])
