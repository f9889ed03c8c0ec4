"""What looks at a student while it is trained, as the recipe says: pictures, and the monitor of its health."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stepdistill.data.prompts import load_prompts
from stepdistill.health import HealthSettings, Monitor
from stepdistill.objectives.base import Frozen, Trained, critic_scale_of
from stepdistill.previews import Previews


if TYPE_CHECKING:
    from accelerate import Accelerator

    from stepdistill.cast import Cast
    from stepdistill.data.parts import Part
    from stepdistill.denoiser import Denoiser
    from stepdistill.families.base import ModelFamily
    from stepdistill.objectives.base import Objective
    from stepdistill.recipe import Recipe
    from stepdistill.recipe_sections import StageConfig
    from stepdistill.run_folder import RunFolder


def open_previews(
    recipe: Recipe,
    family: ModelFamily,
    objective: Objective,
    folder: RunFolder,
    part: Part | None = None,
    rows: int | None = None,
) -> Previews | None:
    """What draws the preview grids, at most `rows` samples at once, or None."""
    config = recipe.previews
    if config is None:
        return None
    given = config.prompts
    prompts = first_prompts(recipe, given, part) if isinstance(given, int) else given
    return Previews(
        family, prompts, objective.inference(), folder.previews, config.seed, guidance=teacher_guidance(recipe),
        critic_scale=critic_scale_of(objective), size=recipe.data.size, rows=rows,
    )  # fmt: skip


def open_monitor(
    recipe: Recipe,
    stage: StageConfig,
    objective: Objective,
    cast: Cast,
    accelerator: Accelerator,
    part: Part | None = None,
) -> Monitor | None:
    """What measures the student of a stage, or None."""
    if recipe.health is None:
        return None
    settings = HealthSettings(**recipe.health.model_dump(exclude={"skips"}))
    prompts = first_prompts(recipe, settings.prompts, part)
    return Monitor.of(
        cast, objective, prompts, settings, size=recipe.data.size, guidance=teacher_guidance(recipe),
        rows=stage.batch_size, agree=lambda values: accelerator.reduce(values, reduction="mean"),
    )  # fmt: skip


def first_prompts(recipe: Recipe, count: int, part: Part | None) -> tuple[str, ...]:
    """The first prompts of the data, of one of several students the first of its own."""
    if part is None:
        return load_prompts(recipe.data.prompts, count=count).prompts
    return part.prompts(load_prompts(recipe.data.prompts, count=recipe.data.count)).prompts[:count]


def view_of(cast: Cast, objective: Objective, name: str) -> Denoiser | None:
    """The denoiser of a role, or None if the objective has no such role, or another kind of thing by its name."""
    return cast.denoiser(name) if isinstance(objective.roles().get(name), Frozen | Trained) else None


def teacher_guidance(recipe: Recipe) -> float:
    """The guidance scale of the teacher that a student is shown beside."""
    return recipe.bench.teacher_guidance if recipe.bench else 3.0
