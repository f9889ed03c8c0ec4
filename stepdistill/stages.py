"""The stages of a recipe: whom they train, and whether what they ask for can be had.

The latter is found out before anything is loaded or written. A mistake in the last stage would otherwise be met when
that stage is reached, hours later.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepdistill.assets import resolve_bundled
from stepdistill.errors import UserError
from stepdistill.families import FAMILIES
from stepdistill.families.loading import check_place
from stepdistill.recipe import build_objective, optimizer_class
from stepdistill.streams import check_places, check_sources


if TYPE_CHECKING:
    from stepdistill.families.base import ModelFamily
    from stepdistill.objectives.base import Objective
    from stepdistill.recipe import Recipe
    from stepdistill.recipe_sections import OptimizerConfig, StageConfig

STUDENT = "student"
PREVIOUS, TEACHER = "previous", "teacher"  # what `starts` may say instead of a place


def build_objectives(recipe: Recipe) -> list[Objective]:
    """The objectives of all stages, in order."""
    return [
        build_objective(stage.objective, recipe.where(f"stages.{index}.objective"))
        for index, stage in enumerate(recipe.stages)
    ]


def trained_roles(objective: Objective) -> list[str]:
    """The roles that an objective trains."""
    from stepdistill.objectives.base import Head, Trained

    return [name for name, role in objective.roles().items() if isinstance(role, Trained | Head)]


def lora_settings(stage: StageConfig, objective: Objective, family: ModelFamily) -> dict[str, Any]:
    """The adapters' settings of every role that the recipe trains as LoRA; heads have all their weights anyway."""
    from stepdistill.adapters import LoraSettings
    from stepdistill.objectives.base import Trained

    found = {}
    for name, role in objective.roles().items():
        lora = stage.player(name).lora
        if lora is not None and isinstance(role, Trained):
            found[name] = LoraSettings(lora.rank, lora.alpha, tuple(lora.targets or family.lora_targets))
    return found


def optimizer_options(config: OptimizerConfig) -> dict[str, Any]:
    """The keyword arguments of a role's optimiser."""
    return {"lr": config.lr, **config.options}


# ---- before a run --------------------------------------------------------------------------------------------------


def check_recipe(recipe: Recipe, objectives: Sequence[Objective], *, done: int) -> None:
    """Finds out whatever can be known without the teacher of what would stop a run on its way.

    Args:
        recipe: of the run.
        objectives: of its stages.
        done: so many stages lie behind the run; what they started from may be gone.

    Raises:
        UserError: it would not come to its end.
    """
    from stepdistill.resources.apply import check_options

    check_stages(recipe, objectives)
    if done < len(recipe.stages):
        check_places(recipe, objectives)
    check_options(recipe)
    check_starts(recipe, done)
    if recipe.bench is not None:
        check_evaluator(recipe.bench.evaluator, recipe.where("bench.evaluator"))


def check_stages(recipe: Recipe, objectives: Sequence[Objective]) -> None:
    """What the recipe alone can tell: raises UserError for roles, optimisers and data with which no run can be."""
    for index, (stage, objective) in enumerate(zip(recipe.stages, objectives, strict=True)):
        check_stage(stage, objective, recipe.where(f"stages.{index}"))
    check_sources(recipe, objectives)


def check_stage(stage: StageConfig, objective: Objective, where: str) -> None:
    """Raises UserError for a stage without a student, for unknown roles, and for optimisers that cannot be made."""
    from stepdistill.objectives.base import Trained

    if not isinstance(objective.roles().get(STUDENT), Trained):
        named = ", ".join(trained_roles(objective)) or "nobody"
        raise UserError(f"{where}.objective: {stage.objective.name} trains {named}, but no network called "
                        f"{STUDENT!r}, which is what a run is for; give the role this name")  # fmt: skip
    stage.check_roles(trained_roles(objective), where)
    for role, player in stage.players.items():
        check_optimizer(player.optimizer, f"{where}.players.{role}.optimizer")


def check_optimizer(config: OptimizerConfig, where: str) -> None:
    """Raises UserError for an optimiser that does not exist, or does not take its options."""
    import torch

    from stepdistill.player import open_optimizer

    # Two dimensions, since some optimisers are for matrices alone.
    weight = torch.nn.Parameter(torch.zeros(1, 1))
    open_optimizer(optimizer_class(config, where), [weight], optimizer_options(config), where)


def check_starts(recipe: Recipe, done: int) -> None:
    """Raises UserError where a stage that is still to come starts from a model that is not there."""
    for index, stage in enumerate(recipe.stages):
        for role, source in stage.starts.items():
            if index >= done and source not in (PREVIOUS, TEACHER):
                check_place(source, FAMILIES, recipe.where(f"stages.{index}.starts.{role}"))


def check_evaluator(path: str, where: str) -> None:
    """Raises UserError where there is no evaluator; loads nothing."""
    try:
        folder = Path(resolve_bundled(path))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if not (folder / "config.json").is_file():
        raise UserError(f"{where}: {path} is no folder of a CLIPModel, it has no config.json; give one, such as "
                        "assets/shapes/clip, or leave bench away")  # fmt: skip
