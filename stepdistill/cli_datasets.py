"""`stepdistill data check` and `data cache`: what a run would play, looked through or encoded before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stepdistill.errors import UserError
from stepdistill.terminal import device_of, hide_loading_bars, open_console


if TYPE_CHECKING:
    from stepdistill.data.check import Checked
    from stepdistill.families.base import ModelFamily
    from stepdistill.recipe import Recipe


CACHE_FOLDER = "cache"
KINDS = ("prompts", "images")


def check(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE_OR_SOURCE",
            help="A recipe, whose prompts and images are checked; or what a recipe may name as either: a file, a "
            "folder, shards, hf:owner/name.",
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides of the recipe.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--as", metavar="KIND", help="What a source is: prompts or images. Default: by its name; folders, shards "
            "and hf: are images.",
        ),
    ] = None,
    size: Annotated[int, typer.Option(min=1, help="Pixels that images of a source are to have.")] = 512,
    count: Annotated[int | None, typer.Option(min=1, help="So many entries of a source; default: all.")] = None,
    pixels: Annotated[bool, typer.Option("--pixels", help="Decode every image too, not its header alone.")] = False,
) -> None:  # fmt: skip
    """Count what each rule leaves out of prompts and images; exit code 1 if a training would stop at it."""
    recipe = recipe_of(source, overrides or [])
    if recipe is None and overrides:
        raise UserError(f"{overrides[0]}: only recipes have keys to override, and {source} is none; use the options")
    found = list(_check_recipe(recipe, pixels) if recipe else _check_source(source, _kind(source, kind), size, count,
                                                                            pixels))  # fmt: skip
    for checked in found:
        typer.echo("\n".join(checked.lines()))
    if not all(checked.is_fine for checked in found):
        raise typer.Exit(1)


def cache(
    source: Annotated[str, typer.Argument(metavar="RECIPE", help="Whose prompts, captions and images are encoded.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides of the recipe.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the cache. Default: the recipe's data.cache_folder, or cache.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda, cuda:1 ... Default: the recipe's, or auto.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar; errors only.")] = False,
) -> None:
    """Encode prompts and images once, for data.cache_folder of many runs; goes on where it was stopped."""
    from stepdistill.console import Display
    from stepdistill.families import load_family
    from stepdistill.recipe import Recipe
    from stepdistill.resources.apply import loading_types
    from stepdistill.stages import build_objectives
    from stepdistill.streams import prepare
    from stepdistill.teacher_kind import resolve

    hide_loading_bars()
    recipe = resolve(Recipe.load(source, overrides or []))
    objectives = build_objectives(recipe)
    folder = output or Path(recipe.data.cache_folder or CACHE_FOLDER)
    display = Display(None if quiet else open_console())
    display.say(f"loading {recipe.teacher}")
    family = load_family(
        recipe.teacher, dtype=loading_types(recipe.memory),  # as a run does, whose encoders have to be the same
        device=device_of(device or recipe.device), **recipe.teacher_options(),
    )  # fmt: skip
    family.at_size(recipe.data.size)
    try:
        prepare(recipe, objectives, family, folder, display)
    except KeyboardInterrupt:
        typer.echo(f"interrupted: whole shards left at {folder}; the same command goes on from them", err=True)
        raise
    typer.echo(str(folder))


def recipe_of(source: str, overrides: Sequence[str] = ()) -> Recipe | None:
    """The recipe that is meant, if it is one: by its suffix, or by the name of a bundled one."""
    from stepdistill.recipe import Recipe, bundled_recipes

    if Path(source).suffix in (".yaml", ".yml") or (source in bundled_recipes() and not Path(source).exists()):
        return Recipe.load(source, overrides)
    return None


def _kind(source: str, kind: str | None) -> str:
    from stepdistill.data.entries import SUFFIXES
    from stepdistill.data.source import parse_source

    if kind is not None:
        if kind not in KINDS:
            raise UserError(f"--as {kind}: expected {' or '.join(KINDS)}")
        return kind
    parsed = parse_source(source)
    suffix = Path(parsed.place).suffix.lower()
    return "prompts" if parsed.is_shapes or (suffix in SUFFIXES and suffix != ".tar") else "images"


def _check_source(source: str, kind: str, size: int, count: int | None, pixels: bool) -> Iterator[Checked]:
    from stepdistill.data.check import check_images, check_prompts

    if kind == "prompts":
        yield check_prompts(source, count=count)
    else:
        yield check_images(source, size, count=count, pixels=pixels)


def _check_recipe(recipe: Recipe, pixels: bool) -> Iterator[Checked]:
    from stepdistill.data.buckets import parse_buckets
    from stepdistill.data.check import check_images, check_prompts

    data = recipe.data
    yield check_prompts(data.prompts, count=data.count)
    if data.images is None:
        return
    size, step = data.size, 1
    if size is None or data.buckets is not None:  # only the teacher knows its size and its tokens'
        family = _teacher_of_shapes(recipe)
        size, step = size or family.image_size, family.pixel_step
    buckets = () if data.buckets is None else parse_buckets(data.buckets, size, step)
    yield check_images(data.images, size, buckets=buckets, count=data.count, pixels=pixels)


def _teacher_of_shapes(recipe: Recipe) -> ModelFamily:
    """What knows the sizes of a teacher's images: its configuration files are read, and no weights."""
    from stepdistill.families import load_family
    from stepdistill.resources.meter import fake_mode
    from stepdistill.resources.skeleton import family_without_weights

    hide_loading_bars()
    place = recipe.teacher_config or recipe.teacher
    if place.endswith(".safetensors"):  # one file, of which the weights alone say what it is
        return load_family(recipe.teacher, **recipe.teacher_options())
    return family_without_weights(place, fake_mode())
