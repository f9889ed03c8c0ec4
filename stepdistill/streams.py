"""The data of a run, as its recipe says: prompts, images and pairs, encoded and in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from stepdistill.assets import resolve_bundled
from stepdistill.console import Display
from stepdistill.errors import UserError
from stepdistill.run_folder import RunFolder


if TYPE_CHECKING:
    from accelerate import Accelerator

    from stepdistill.data.batches import Batches
    from stepdistill.data.pairs import PairSet, PairStream
    from stepdistill.data.parts import Part
    from stepdistill.families.base import ModelFamily
    from stepdistill.objectives.base import Objective, Phase
    from stepdistill.recipe import Recipe, StageConfig


def all_phases(stage: StageConfig, objective: Objective) -> Iterator[Phase]:
    """The phases of all iterations of a stage; an objective may change them on the way."""
    for step in range(stage.steps):
        yield from objective.phases(step)


def open_batches(
    recipe: Recipe,
    objectives: Sequence[Objective],
    family: ModelFamily,
    folder: RunFolder,
    *,
    accelerator: Accelerator,
    display: Display,
    part: Part | None = None,
) -> Batches:
    """Prompts, their encodings, images and pairs, as the recipe says; only the streams that the objectives play."""
    from stepdistill.data.batches import Batches
    from stepdistill.data.cache import ConditionCache, EncodedOnTheFly
    from stepdistill.data.prompts import load_prompts

    data = recipe.data
    played = zip(recipe.stages, objectives, strict=True)
    needs = {phase.stream for stage, objective in played for phase in all_phases(stage, objective)}
    pairs = open_pairs(recipe, family, folder, display) if needs & {"pairs", "states"} else None
    if pairs is not None and "states" in needs:
        _ = pairs.pairs.num_states  # refuses pairs without them now, and not after prompts have been encoded
    prompts = load_prompts(data.prompts, count=data.count)
    prompts = prompts if part is None else part.prompts(prompts)
    display.say(prompts.summary())
    cache = ConditionCache(folder.cache, family, prompts) if data.cache and "prompts" in needs else None
    conditions = cache or EncodedOnTheFly(family, prompts)
    with display.counting("encoding prompts") as count:
        conditions.build(count)
    batches = Batches(family, prompts, conditions, None, recipe.seed, accelerator.process_index,
                      accelerator.num_processes, data.size, pairs=pairs)  # fmt: skip
    if data.images is not None and "images" in needs:
        open_images(batches, recipe, folder, display, part)
    return batches


def open_images(
    batches: Batches, recipe: Recipe, folder: RunFolder, display: Display, part: Part | None = None
) -> None:
    """Gives batches their images stream; with a cache, neither autoencoder nor text encoder works at every step."""
    from stepdistill.data.cache import ConditionCache, EncodedTexts
    from stepdistill.data.images import load_images
    from stepdistill.data.latents import LatentCache, LatentsOnTheFly
    from stepdistill.data.prompts import PromptSet

    data, family = recipe.data, batches.family
    assert data.images is not None, "the caller asks only if the recipe does"
    images = load_images(data.images, size=data.size or family.image_size)
    images = images if part is None else part.images(images, data.count)
    if not data.cache or data.count is None:
        batches.latents = LatentsOnTheFly(family, images)
        return
    # The number is that of the prompts; a folder may have fewer images.
    latents = LatentCache(folder.cache, family, images, min(data.count, images.length or data.count))
    with display.counting("encoding images") as count:
        latents.build(count)
    captions = PromptSet(tuple(dict.fromkeys(latents.captions)))
    conditions = ConditionCache(folder.cache, family, captions)
    with display.counting("encoding captions") as count:
        conditions.build(count)
    batches.latents, batches.encode = latents, EncodedTexts(conditions, captions)


def open_pairs(recipe: Recipe, family: ModelFamily, folder: RunFolder, display: Display) -> PairStream:
    """The pairs that the recipe names or has made, with their prompts encoded.

    Raises:
        UserError: it does neither, or they are not of its teacher.
    """
    from stepdistill.data.cache import ConditionCache, EncodedOnTheFly
    from stepdistill.data.pairs import PairStream

    pairs = find_pairs(recipe, family, folder, display)
    display.say(pairs.summary())
    cache = ConditionCache(folder.cache, family, pairs.prompts) if recipe.data.cache else None
    conditions = cache or EncodedOnTheFly(family, pairs.prompts)
    with display.counting("encoding the prompts of the pairs") as count:
        conditions.build(count)
    return PairStream(pairs, conditions)


def find_pairs(recipe: Recipe, family: ModelFamily, folder: RunFolder, display: Display) -> PairSet:
    """The stored pairs; where there are none of this teacher, and the recipe says how, the run makes them."""
    from stepdistill.data.pair_maker import PairSettings, make_pairs
    from stepdistill.data.pairs import REMEDY, load_pairs
    from stepdistill.data.prompts import load_prompts
    from stepdistill.options import build_dataclass

    data = recipe.data
    if data.pairs is None and data.make_pairs is None:
        raise UserError(f"{recipe.where('data.pairs')}: missing, and an objective learns from stored pairs; {REMEDY}; "
                        "or say in data.make_pairs how the run is to make them")  # fmt: skip
    if data.pairs is not None:
        try:
            return load_pairs(resolve_bundled(data.pairs), family, size=data.size)
        except UserError as error:
            if data.make_pairs is None:
                raise
            display.say(f"{error}: this run makes its own")
    settings: PairSettings = build_dataclass(PairSettings, recipe.pair_options(), recipe.where("data.make_pairs"))
    prompts, place = load_prompts(data.prompts, count=data.count), folder.cache / "pairs"
    with display.counting("making pairs") as count:
        return make_pairs(family, prompts, place, settings, progress=count)
