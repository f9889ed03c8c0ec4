"""Stages: what a later stage starts from, and that its mistakes are found before the first one begins."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from stepdistill import finish
from stepdistill.adapters import copy_into
from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.objectives.base import Frozen, Role, Trained
from stepdistill.recipe import Recipe
from stepdistill.run import export, train
from stepdistill.run_folder import RunFolder
from tests.tiny import Copying, tiny_recipe


HERE = "tests.invariants.test_stages"


@dataclass(frozen=True)
class Nameless(Copying):
    """A game whose student is called otherwise."""

    def roles(self) -> Mapping[str, Role]:
        return {"teacher": Frozen(), "pupil": Trained()}


class Single(torch.optim.SGD):
    """An optimiser that takes one tensor of weights alone."""

    def __init__(self, params: Any, lr: float) -> None:
        if len(params) > 1:
            raise ValueError("one tensor alone")
        super().__init__(params, lr=lr)


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


def test_a_start_that_does_not_fit_says_what_would(sd_folder: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(sd_folder, run / "pipeline")
    with pytest.raises(UserError, match=rf"starts\.student: .* no model_index\.json, .*; give {run / 'pipeline'}$"):
        play(sd_folder, tmp_path / "next", [stage("full", 1e-3, starts={"student": str(run)})])
    parameters = {"weight": torch.zeros(2)}
    with pytest.raises(UserError, match=r"other targets or another student\.shape\?$"):
        copy_into(parameters, {"weight": torch.zeros(1)}, "the start of role 'student'")


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


def method_of(folder: Path | None) -> str:
    assert folder is not None
    return str(json.loads((folder / "distillation_config.json").read_text())["method"])


@pytest.fixture
def exported(sd_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run of two stages by different methods, which has left a pipeline."""
    monkeypatch.setattr(finish, "check", lambda *args: 0.0)  # the fresh process has tests of its own
    stages = [stage("full", 1e-3), stage("full", 1e-3, objective={"name": "vsd"})]
    train(Recipe.from_mapping(tiny_recipe(sd_folder, tmp_path / "run", stages=stages, checkpoints={"every": 1},
                                          export={"pipeline": True, "lora": False})))  # fmt: skip
    return tmp_path / "run"


def test_an_exported_stage_says_by_which_method_it_was_trained(exported: Path, tmp_path: Path) -> None:
    for name, method in [("stage-0", "dmd2"), ("1", "dmd2"), ("2", "vsd"), ("stage-1", "vsd")]:
        assert method_of(export(exported, name, tmp_path / name).pipeline) == method


def test_a_checkpoint_takes_the_place_of_a_finished_student_only_where_that_is_asked_for(
    exported: Path, tmp_path: Path
) -> None:
    own = exported / "pipeline"
    for output in (None, exported):
        with pytest.raises(UserError, match=r"run/pipeline: this run has been exported.*--output .*--replace"):
            export(exported, "1", output)
    assert method_of(own) == "vsd"
    for _ in range(2):
        assert method_of(export(exported, "1", tmp_path / "first").pipeline) == "dmd2", "in a folder that is no run's"
    assert method_of(export(exported, "stage-0", replace=True).pipeline) == method_of(own) == "dmd2"
    assert method_of(export(exported).pipeline) == method_of(own) == "vsd", "the finished student in its own place"
    shutil.rmtree(own)
    assert method_of(export(exported, "1").pipeline) == method_of(own) == "dmd2", "where nothing is replaced"


# ---- mistakes ------------------------------------------------------------------------------------------------------


def optimizer(**options: Any) -> dict[str, Any]:
    return {"players": {"critic": {"optimizer": options}}}


OPTIMIZER = r"recipe: stages\.1\.players\.critic\.optimizer\."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"name": "lcm"}},
         r"recipe: data\.images: missing, and stages\.1 \(lcm\) learns from images; set it to"),
        ({"objective": {"name": "dmd"}},
         r"recipe: data\.pairs: missing, and stages\.1 \(dmd\) learns from stored pairs; make them with: "),
        ({"objective": {"name": f"{HERE}:Nameless"}},
         r"recipe: stages\.1\.objective: .*:Nameless trains pupil, but no network called 'student'"),
        (optimizer(name="AdaW"), rf"{OPTIMIZER}name: unknown optimizer 'AdaW'; did you mean 'AdamW'"),
        (optimizer(name="no_such.package.Adam"), rf"{OPTIMIZER}name: unknown optimizer 'no_such.package.Adam'"),
        (optimizer(weigth_decay=0.1), rf"{OPTIMIZER}weigth_decay: unknown key; did you mean 'weight_decay'"),
        (optimizer(betas=[2.0, 0.9]), rf"{OPTIMIZER}betas: AdamW does not take \[2\.0, 0\.9\] \(Invalid beta"),
        ({"starts": {"student": "/no/such/place"}},
         r"recipe: stages\.1\.starts\.student: model '/no/such/place': no such file or folder; give"),
        ({"starts": {"critic": "FOLDER"}}, r"recipe: stages\.1\.starts\.critic: .* has no model_index\.json"),
        ({"starts": {"critic": "models/none.safetensors"}},
         r"recipe: stages\.1\.starts\.critic: models/none\.safetensors is no \.safetensors file; give one"),
        ({"starts": {"critic": "tiny:sd22"}},
         r"recipe: stages\.1\.starts\.critic: tiny:sd22 is unknown; did you mean 'sd21'"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_later_stage_is_a_line_before_anything_is_loaded_or_written(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepdistill.families.load_family", lambda *args, **options: pytest.fail("has been loaded"))
    last = {**stage("full", 1e-3), **changes}
    last["starts"] = {role: str(tmp_path) if start == "FOLDER" else start
                      for role, start in last.get("starts", {}).items()}  # fmt: skip
    with pytest.raises(UserError, match=f"^{message}") as caught:
        play("some/teacher", tmp_path / "run", [stage("full", 1e-3), last])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"prompts": "HERE/none.txt"}, r"prompts: .*/none\.txt: there is no such file; correct the path, or take"),
        ({"images": "HERE/photos"}, r"images: .*/photos: there is no such folder or file; correct the path, or take"),
        ({"images": "HERE/a-{0..1}.tar"}, r"images: .*/a-1\.tar: there is no such folder or file"),
    ],
)
def test_data_that_is_not_there_is_told_before_anything_is_loaded_or_written(
    data: dict[str, str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "a-0.tar").touch()
    content = tiny_recipe("some/teacher", tmp_path / "run", stages=[stage("full", 1e-3, objective={"name": "lcm"})])
    content["data"] |= {"images": "shapes", **{k: v.replace("HERE", str(tmp_path)) for k, v in data.items()}}
    with pytest.raises(UserError, match=rf"^recipe: data\.{message}"):
        train(Recipe.from_mapping(content), resume=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("evaluator", "message"),
    [
        ("nowhere/clip", "nowhere/clip is no folder of a CLIPModel"),
        ("assets/shapes/clop", "bundled asset assets/shap"),
    ],
)
@pytest.mark.parametrize("students", [1, 2])
def test_an_evaluator_that_is_not_there_costs_nobody_a_run(
    evaluator: str, message: str, students: int, tmp_path: Path
) -> None:
    made = tmp_path / "run" / "student-0" / "metrics.jsonl"
    made.parent.mkdir(parents=True)
    made.write_text("precious")
    changes = {} if students == 1 else {"multi_student": {"students": students}}
    content = tiny_recipe("some/teacher", tmp_path / ("other" if students == 1 else "run"), **changes)
    content["bench"] = {"evaluator": evaluator}
    with pytest.raises(UserError, match=rf"^recipe: bench\.evaluator: {message}"):
        train(Recipe.from_mapping(content), resume=False)
    assert made.read_text() == "precious"
    assert not (tmp_path / "other").exists()


def test_what_a_finished_stage_started_from_may_be_gone(sd_folder: str, tmp_path: Path) -> None:
    start = tmp_path / "start"
    shutil.copytree(sd_folder, start)
    stages = [stage("full", 1e-3, starts={"critic": str(start)})]
    folder = play(sd_folder, tmp_path / "run", stages)
    shutil.rmtree(start)
    play(sd_folder, tmp_path / "run", stages)
    assert folder.stages_done() == 1
    with pytest.raises(UserError, match=r"stages\.0\.starts\.critic: .*no such file or folder"):
        train(Recipe.from_mapping(tiny_recipe(sd_folder, tmp_path / "run", stages=stages)), resume=False)
    assert folder.stages_done() == 1


def test_an_optimiser_that_does_not_take_the_weights_of_a_role_is_told_with_the_place(
    sd_folder: str, tmp_path: Path
) -> None:
    one = {**stage("full", 1e-3), "players": {"critic": {"optimizer": {"name": f"{HERE}.Single"}}}}
    with pytest.raises(
        UserError, match=r"^recipe: stages\.0\.players\.critic\.optimizer: Single does not take .*alone"
    ):
        play(sd_folder, tmp_path / "run", [one])
