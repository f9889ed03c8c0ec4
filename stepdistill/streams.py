"""The data of a run, as its recipe says: prompts, images and pairs, encoded and in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stepdistill.assets import resolve_bundled
from stepdistill.console import Display
from stepdistill.data.source import SHAPES_SOURCE, parse_source
from stepdistill.errors import UserError


if TYPE_CHECKING:
    from accelerate import Accelerator

    from stepdistill.data.batches import Batches
    from stepdistill.data.cache import Conditions
    from stepdistill.data.images import ImageSet
    from stepdistill.data.pairs import PairSet, PairStream
    from stepdistill.data.parts import Part
    from stepdistill.data.prompts import PromptSet
    from stepdistill.families.base import ModelFamily
    from stepdistill.objectives.base import Objective, Phase
    from stepdistill.recipe import Recipe
    from stepdistill.recipe_sections import StageConfig
    from stepdistill.run_folder import RunFolder


def all_phases(stage: StageConfig, objective: Objective) -> Iterator[Phase]:
    """The phases of all iterations of a stage; an objective may change them on the way."""
    for step in range(stage.steps):
        yield from objective.phases(step)


def streams_of(recipe: Recipe, objectives: Sequence[Objective]) -> set[str]:
    """The streams that the stages of a recipe play."""
    played = zip(recipe.stages, objectives, strict=True)
    return {phase.stream for stage, objective in played for phase in all_phases(stage, objective)}


def check_sources(recipe: Recipe, objectives: Sequence[Objective]) -> None:
    """Finds out whether the recipe names all data that its stages learn from; opens nothing.

    Raises:
        UserError: a stage needs images or stored pairs, and there are none.
    """
    from stepdistill.data.pairs import REMEDY

    data = recipe.data
    absent: dict[str, tuple[str, str]] = {}  # stream => key of the recipe, and what errors say
    if data.images is None:
        absent["images"] = ("images", 'learns from images; set it to "shapes" or to a folder of captioned images')
    if data.pairs is None and data.make_pairs is None:
        told = f"learns from stored pairs; {REMEDY}; or say in data.make_pairs how the run is to make them"
        absent["pairs"] = absent["states"] = ("pairs", told)
    for index, (stage, objective) in enumerate(zip(recipe.stages, objectives, strict=True)):
        phases = all_phases(stage, objective) if absent else ()
        key, why = next((absent[phase.stream] for phase in phases if phase.stream in absent), ("", ""))
        if key:
            where, name = recipe.where(f"data.{key}"), stage.objective.name
            raise UserError(f"{where}: missing, and stages.{index} ({name}) {why}")


def check_places(recipe: Recipe, objectives: Sequence[Objective]) -> None:
    """Finds out whether the data that a run is to read is there; reads none of it, and asks no hub.

    Raises:
        UserError: a file or folder of prompts or of images does not exist.
    """
    data = recipe.data
    wanted = {"prompts": data.prompts}
    if data.images is not None and "images" in streams_of(recipe, objectives):
        wanted["images"] = data.images
    for key, text in wanted.items():
        source = parse_source(text)
        files = () if source.is_shapes or source.is_hub else source.files()
        absent = next((file for file in files if not file.exists()), None)
        if absent is not None:
            what = "file" if key == "prompts" else "folder or file"
            raise UserError(f"{recipe.where(f'data.{key}')}: {absent}: there is no such {what}; correct the path, or "
                            f'take "{SHAPES_SOURCE}"')  # fmt: skip


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
    from stepdistill.data.cache import EncodedOnTheFly
    from stepdistill.data.prompts import load_prompts

    data = recipe.data
    needs = streams_of(recipe, objectives)
    prompts = load_prompts(data.prompts, count=data.count)
    if part is not None:
        part.check_everyone(prompts)  # before pairs are made
    pairs = open_pairs(recipe, family, folder, display, part) if needs & {"pairs", "states"} else None
    if pairs is not None and "states" in needs:
        _ = pairs.pairs.num_states  # refuses pairs without them now, and not after prompts have been encoded
    prompts = prompts if part is None else part.prompts(prompts)
    display.say(prompts.summary())
    conditions: Conditions = EncodedOnTheFly(family, prompts)
    if "prompts" in needs:
        conditions = encodings(recipe, family, prompts, folder, display, "prompts")
    batches = Batches(family, prompts, conditions, None, recipe.seed, accelerator.process_index,
                      accelerator.num_processes, data.size, pairs=pairs)  # fmt: skip
    if data.images is not None and "images" in needs:
        open_images(batches, recipe, folder, display, part)
    return batches


def open_images(
    batches: Batches, recipe: Recipe, folder: RunFolder, display: Display, part: Part | None = None
) -> None:
    """Gives batches their images stream; with a cache, neither autoencoder nor text encoder works at every step."""
    from stepdistill.data.cache import EncodedTexts
    from stepdistill.data.latents import LatentCache, LatentsOnTheFly
    from stepdistill.data.prepared import open_latents
    from stepdistill.data.prompts import PromptSet

    data, family = recipe.data, batches.family
    everything = open_image_set(recipe, family)
    display.say(everything.summary())
    share = None if part is None else part.images(everything, data.count)
    images = share or everything
    if data.cache_folder is not None:
        # What was prepared is for all students; each of them plays its own share of it.
        latents = open_latents(Path(data.cache_folder), family, everything, _number_of(everything, recipe))
        if share is not None:
            latents.keep(share.numbers)
    elif not data.cache or data.count is None:
        processes = batches.num_processes
        batches.latents = LatentsOnTheFly(family, images, num_processes=processes, workers=data.workers)
        return
    else:
        count = _number_of(images, recipe)
        latents = LatentCache(folder.cache, family, images, count)
        with display.counting("encoding images") as done:
            latents.build(done)
    captions = PromptSet(tuple(dict.fromkeys(latents.captions)))
    conditions = encodings(recipe, family, captions, folder, display, "captions")
    batches.latents, batches.encode = latents, EncodedTexts(conditions, captions)


def open_image_set(recipe: Recipe, family: ModelFamily) -> ImageSet:
    """The images that the recipe names, at the size or in the buckets that it asks for."""
    from stepdistill.data.buckets import parse_buckets
    from stepdistill.data.images import load_images

    data = recipe.data
    assert data.images is not None, "the caller asks only if the recipe does"
    size = data.size or family.image_size
    buckets = () if data.buckets is None else parse_buckets(data.buckets, size, family.pixel_step)
    return load_images(data.images, size=size, buckets=buckets, count=data.count)


def _number_of(images: ImageSet, recipe: Recipe) -> int:
    """How many images are encoded: the recipe's number is that of the prompts, and there may be fewer images."""
    lengths = [n for n in (images.length, recipe.data.count) if n is not None]
    if not lengths:
        raise UserError(f"{recipe.where('data.count')}: missing, and the images have no end; say how many to encode")
    return min(lengths)


def encodings(
    recipe: Recipe, family: ModelFamily, prompts: PromptSet, folder: RunFolder, display: Display, what: str
) -> Conditions:
    """Prompts => their encodings: prepared before, kept by the run, or made anew whenever they are asked for."""
    from stepdistill.data.cache import ConditionCache, EncodedOnTheFly
    from stepdistill.data.prepared import open_conditions

    if recipe.data.cache_folder is not None:
        return open_conditions(Path(recipe.data.cache_folder), family, prompts)
    cache = ConditionCache(folder.cache, family, prompts) if recipe.data.cache else None
    conditions = cache or EncodedOnTheFly(family, prompts)
    with display.counting(f"encoding {what}") as count:
        conditions.build(count)
    return conditions


def prepare(
    recipe: Recipe, objectives: Sequence[Objective], family: ModelFamily, folder: Path, display: Display
) -> None:
    """Encodes all that the stages of a recipe play into a folder that runs can name as their `data.cache_folder`.

    Raises:
        UserError: the data cannot be used, or the folder cannot be written.
    """
    from stepdistill.data.latents import LatentCache
    from stepdistill.data.pairs import load_pairs
    from stepdistill.data.prepared import LATENTS, prepare_conditions
    from stepdistill.data.prompts import load_prompts

    data, needs = recipe.data, streams_of(recipe, objectives)
    texts: list[str] = []
    if needs & {"prompts", "pairs", "states"}:  # pairs that a run makes have the prompts of the data
        prompts = load_prompts(data.prompts, count=data.count)
        display.say(prompts.summary())
        texts += prompts.prompts
    if needs & {"pairs", "states"} and data.pairs is not None:
        texts += load_pairs(resolve_bundled(data.pairs), family, size=data.size).prompts.prompts
    if data.images is not None and "images" in needs:
        images = open_image_set(recipe, family)
        display.say(images.summary())
        latents = LatentCache(folder / LATENTS, family, images, _number_of(images, recipe))
        with display.counting("encoding images") as count:
            latents.build(count)
        texts += latents.captions
    with display.counting("encoding texts") as count:
        prepare_conditions(folder, family, texts, count)


def open_pairs(
    recipe: Recipe, family: ModelFamily, folder: RunFolder, display: Display, part: Part | None = None
) -> PairStream:
    """The pairs that the recipe names or has made, a student's own if there are several, with their prompts encoded.

    Raises:
        UserError: they are not of its teacher, or none is for this student.
    """
    from stepdistill.data.pairs import PairStream

    pairs = find_pairs(recipe, family, folder, display, part)
    pairs = pairs if part is None else part.pairs(pairs)
    display.say(pairs.summary())
    return PairStream(pairs, encodings(recipe, family, pairs.prompts, folder, display, "the prompts of the pairs"))


def find_pairs(
    recipe: Recipe, family: ModelFamily, folder: RunFolder, display: Display, part: Part | None = None
) -> PairSet:
    """The stored pairs; where there are none of this teacher, and the recipe says how, the run makes its own."""
    from stepdistill.data.pair_maker import PairSettings, make_pairs
    from stepdistill.data.pairs import load_pairs
    from stepdistill.data.prompts import load_prompts
    from stepdistill.options import build_dataclass

    data = recipe.data
    assert data.pairs is not None or data.make_pairs is not None, "see `check_sources`"
    if data.pairs is not None:
        try:
            return load_pairs(resolve_bundled(data.pairs), family, size=data.size)
        except UserError as error:
            if data.make_pairs is None:
                raise
            display.say(f"{error}: this run makes its own")
    settings: PairSettings = build_dataclass(PairSettings, recipe.pair_options(), recipe.where("data.make_pairs"))
    prompts, place = load_prompts(data.prompts, count=data.count), folder.cache / "pairs"
    prompts = prompts if part is None else part.prompts(prompts)  # others would be made to be left out
    with display.counting("making pairs") as count:
        return make_pairs(family, prompts, place, settings, progress=count)
