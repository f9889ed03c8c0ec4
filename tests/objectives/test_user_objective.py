"""A user's own objective, by its Python path or from an installed package, is as good as a bundled one."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch

from stepdistill.errors import UserError
from stepdistill.objectives import OBJECTIVES, known_objectives, resolve
from stepdistill.objectives.dmd2 import DMD2
from stepdistill.recipe import Recipe
from stepdistill.run import train
from tests.tiny import tiny_recipe


OWN = '''
from __future__ import annotations

from dataclasses import dataclass

import torch

from stepdistill import Batch, Cast, Frozen, InferenceSpec, Loss, Phase, Step, Trained


@dataclass(frozen=True)
class Imitation:
    """The student says at once what the guided teacher says."""

    guidance: float = 2.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError("weight must be positive")

    def roles(self):
        return {"teacher": Frozen(), "student": Trained()}

    def phases(self, step: int):
        return (Phase("imitation", ("student",), self.loss),)

    def after_step(self, cast: Cast, step: int) -> None:
        return None

    def inference(self) -> InferenceSpec:
        return InferenceSpec((999,))

    def loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        z, t = batch.noise(), torch.ones(len(batch))
        with torch.no_grad():
            wanted = cast.denoiser("teacher").guided(z, t, batch.condition, batch.null, self.guidance).x0
        said = cast.denoiser("student")(z, t, batch.condition).x0
        return Loss({"imitation": self.weight * (said - wanted).square().mean()})
'''


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's on the path, => its name."""
    (tmp_path / "my_objectives.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_objectives", raising=False)
    return "my_objectives"


@pytest.fixture
def installed(own_module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package that offers it under a short name."""
    group = "stepdistill.objectives"
    entries = [
        importlib.metadata.EntryPoint("imitation", f"{own_module}:Imitation", group),
        importlib.metadata.EntryPoint("dmd2", f"{own_module}:Imitation", group),
    ]
    monkeypatch.setattr(
        "stepdistill.objectives.entry_points",
        lambda **selected: importlib.metadata.EntryPoints(entries).select(**selected),
    )


def recipe_of(teacher: str, folder: Path, objective: dict[str, object]) -> Recipe:
    content = tiny_recipe(teacher, folder / "run")
    stage = {**content["stages"][0], "objective": objective, "steps": 2, "accumulate": 1}
    return Recipe.from_mapping({**content, "stages": [stage]})


@pytest.mark.parametrize("name", ["my_objectives:Imitation", "imitation"])
def test_an_own_objective_in_a_recipe_trains_the_student(
    sd_folder: str, tmp_path: Path, installed: None, name: str
) -> None:
    recipe = recipe_of(sd_folder, tmp_path, {"name": name, "guidance": 3.0})
    result = train(recipe)
    saved = Recipe.load(result.folder / "recipe.yaml")
    assert saved.stages[0].objective.options == {"guidance": 3.0, "weight": 1.0}, "its defaults are written out"
    log = (result.folder / "metrics.jsonl").read_text()
    assert log.count('"imitation"') == 2
    from stepdistill.run_folder import RunFolder

    student = RunFolder(result.folder).load_roles(0)["student"]
    ups = [tensor for key, tensor in student.tensors.items() if "lora_B" in key]
    assert ups and any(tensor.abs().max() > 0 for tensor in ups)
    assert all(torch.isfinite(tensor).all() for tensor in student.tensors.values())


def test_installed_objectives_are_known_by_name_and_never_hide_ours(installed: None) -> None:
    assert known_objectives()["imitation"] == "my_objectives:Imitation"
    assert resolve("imitation").__name__ == "Imitation"
    assert resolve("dmd2") is DMD2


def test_every_bundled_name_is_found() -> None:
    for name, place in OBJECTIVES.items():
        assert resolve(name).__name__ == place.partition(":")[2]


def test_the_options_of_an_own_objective_are_checked_like_ours(
    sd_folder: str, tmp_path: Path, own_module: str
) -> None:
    name = "my_objectives:Imitation"
    with pytest.raises(UserError, match=r"stages\.0\.objective\.guidence: unknown key.*guidance"):
        train(recipe_of(sd_folder, tmp_path, {"name": name, "guidence": 3.0}))
    with pytest.raises(UserError, match="weight must be positive"):
        train(recipe_of(sd_folder, tmp_path, {"name": name, "weight": -1.0}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dmd22", r"unknown objective 'dmd22'; did you mean 'dmd2'\?.*package\.module:Class"),
        ("nothing_like_it", "unknown objective 'nothing_like_it'; known: .*dmd2.*vsd"),
        ("no_such_module:Thing", "'no_such_module:Thing' could not be imported: No module named 'no_such_module'"),
        ("stepdistill.objectives.dmd2:DMD9", "could not be imported: .*DMD9"),
    ],
)
def test_an_objective_that_is_not_there_is_a_users_error(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(name)


def test_a_player_for_a_role_that_the_objective_lacks_is_refused(
    sd_folder: str, tmp_path: Path, own_module: str
) -> None:
    content = tiny_recipe(sd_folder, tmp_path / "run")
    stage = {**content["stages"][0], "objective": {"name": "my_objectives:Imitation"}, "players": {"critic": {}}}
    with pytest.raises(UserError, match=r"players\.critic: unknown role"):
        train(Recipe.from_mapping({**content, "stages": [stage]}))
