"""Stages: what a later stage starts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stepdistill import finish
from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.recipe import Recipe
from stepdistill.run import export, train
from stepdistill.run_folder import RunFolder
from tests.tiny import tiny_recipe


def stage(weights: Any, lr: float, **more: Any) -> dict[str, Any]:
    return {
        "objective": {"name": "dmd2", "guidance": 2.0, "critic_updates": 1},
        "steps": 1,
        "batch_size": 2,
        "players": {"default": {"weights": weights, "optimizer": {"lr": lr}}},
        **more,
    }


def play(teacher: str, output: Path, stages: list[dict[str, Any]]) -> RunFolder:
    recipe = Recipe.from_mapping(tiny_recipe(teacher, output, stages=stages))
    train(recipe)
    return RunFolder(output)


@pytest.mark.parametrize("weights", ["full", {"lora": {"rank": 2}}], ids=["full", "lora"])
def test_a_stage_goes_on_from_the_stage_before(sd_folder: str, tmp_path: Path, weights: Any) -> None:
    # Adam moves every weight by about the learning rate, so the second stage hardly moves away from the first's end.
    folder = play(sd_folder, tmp_path / "run", [stage(weights, 1e-2), stage(weights, 1e-9)])
    first, second = (folder.load_roles(i)["student"].tensors for i in (0, 1))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-6)


def test_a_stage_may_start_from_the_teacher_or_from_a_folder(sd_folder: str, tmp_path: Path) -> None:
    teacher = load_family(sd_folder).network().state_dict()
    stages = [stage("full", 1e-2), stage("full", 1e-9, starts={"student": "teacher", "critic": sd_folder})]
    folder = play(sd_folder, tmp_path / "run", stages)
    for role in ("student", "critic"):
        for name, tensor in folder.load_roles(1)[role].tensors.items():
            torch.testing.assert_close(tensor, teacher[name], rtol=0, atol=1e-6)


def test_stages_with_different_weights_are_refused_with_a_remedy(sd_folder: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give both stages the same weights"):
        play(sd_folder, tmp_path / "run", [stage("full", 1e-3), stage({"lora": {"rank": 2}}, 1e-3)])


def test_a_start_of_a_role_that_does_not_exist_is_refused(sd_folder: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stages\.0\.starts\.studnet: unknown role; did you mean 'student'"):
        play(sd_folder, tmp_path / "run", [stage("full", 1e-3, starts={"studnet": "teacher"})])


def test_a_finished_run_is_not_trained_again(sd_folder: str, tmp_path: Path) -> None:
    folder = play(sd_folder, tmp_path / "run", [stage("full", 1e-3)])
    log = folder.log.read_text()
    play(sd_folder, tmp_path / "run", [stage("full", 1e-3)])
    assert folder.log.read_text() == log
    assert folder.train_seconds() > 0


def test_a_run_stopped_between_two_stages_ends_with_the_same_bits(
    sd_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [stage("full", 1e-3, steps=2), stage("full", 1e-3, steps=2)]
    whole = play(sd_folder, tmp_path / "whole", stages).load_roles(1)

    keep = RunFolder.save_roles

    def save(self: RunFolder, *args: Any) -> None:
        keep(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "save_roles", save)
        with pytest.raises(KeyboardInterrupt):
            play(sd_folder, tmp_path / "stopped", stages)
    stopped = play(sd_folder, tmp_path / "stopped", stages).load_roles(1)
    for role, state in whole.items():
        for name, tensor in state.tensors.items():
            assert torch.equal(stopped[role].tensors[name], tensor), (role, name)


def test_an_exported_stage_says_by_which_method_it_was_trained(
    sd_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finish, "check", lambda *args: 0.0)  # the fresh process has tests of its own
    stages = [stage("full", 1e-3), stage("full", 1e-3, objective={"name": "vsd"})]
    train(Recipe.from_mapping(tiny_recipe(sd_folder, tmp_path / "run", stages=stages, checkpoints={"every": 1},
                                          export={"pipeline": True, "lora": False})))  # fmt: skip
    for name, method in [("stage-0", "dmd2"), ("1", "dmd2"), ("2", "vsd"), ("stage-1", "vsd")]:
        pipeline = export(tmp_path / "run", name, tmp_path / name).pipeline
        assert pipeline is not None
        assert json.loads((pipeline / "distillation_config.json").read_text())["method"] == method
