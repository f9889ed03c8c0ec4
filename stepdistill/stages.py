"""The stages of a recipe: whom they train, and how."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from stepdistill.families.base import ModelFamily
    from stepdistill.objectives.base import Objective
    from stepdistill.recipe_sections import StageConfig


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
