"""A recipe for the kind of its teacher: `with_flow_teacher` counts with a flow-matching one, and with no other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stepdistill.families import FAMILIES
from stepdistill.families.loading import load_scheduler_config


if TYPE_CHECKING:
    from stepdistill.recipe import Recipe


def for_teacher(recipe: Recipe) -> Recipe:
    """The recipe for the teacher that it names; of the teacher, at most the scheduler's configuration is read.

    Raises:
        UserError: the recipe depends on its teacher's kind, and there is no such teacher.
    """
    if not recipe.with_flow_teacher:
        return recipe
    from stepdistill.schedule import flow_schedule  # takes torch, which a recipe without such keys needs not

    config = load_scheduler_config(recipe.teacher, FAMILIES, recipe.teacher_config)
    return recipe.for_flow() if flow_schedule(config) else recipe.model_copy(update={"with_flow_teacher": None})


def resolve(recipe: Recipe) -> Recipe:
    """The recipe for its teacher, with the objectives' own defaults written out: what a run does and records."""
    return for_teacher(recipe).resolved()
