"""The commands below `stepdistill data`: what is made before a training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stepdistill.cli_datasets import cache, check, recipe_of
from stepdistill.errors import UserError
from stepdistill.terminal import device_of, hide_loading_bars, open_console


if TYPE_CHECKING:
    from stepdistill.data.pair_maker import PairSettings
    from stepdistill.data.prompts import PromptSet


PAIRS_FOLDER = "pairs"

data_app = typer.Typer(
    name="data",
    help="Make, check and encode the data that objectives learn from.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
data_app.command()(check)
data_app.command()(cache)


@data_app.command()
def pairs(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE_OR_TEACHER",
            help="A recipe, whose teacher, prompts, seed, precision, folder of pairs and, from its bench block, steps "
            "and guidance are taken; or a Diffusers folder or hub id.",
        ),
    ],
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="How the pairs are made: count, sampler (ddim, dpm++, euler, unipc), steps, guidance, seed, states, "
            "size, precision, storage, batch_size, shard_size. Default: the recipe's data.make_pairs.",
        ),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Prompts of the pairs: shapes, or a file. Default: the recipe's.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the pairs. Default: the recipe's data.pairs, or pairs.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda, cuda:1 ... Default: the recipe's, or auto.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Replace pairs in the folder that were made otherwise.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar; errors only.")] = False,
) -> None:
    """Store noise and what the teacher makes of it; goes on where it was stopped."""
    job = _pair_job(source, options or [], prompts)
    from stepdistill.console import Display
    from stepdistill.data.pair_maker import make_pairs
    from stepdistill.families import load_family

    hide_loading_bars()
    folder = output or job.folder
    display = Display(None if quiet else open_console())
    display.say(job.prompts.summary())
    display.say(f"loading {job.teacher}")
    family = load_family(job.teacher, device=device_of(device or job.device), **job.teacher_options)
    family.at_size(job.settings.size)
    try:
        with display.counting("making pairs") as count:
            made = make_pairs(family, job.prompts, folder, job.settings, fresh=fresh, progress=count)
    except KeyboardInterrupt:
        typer.echo(f"interrupted: whole shards left at {folder}; the same command goes on from them", err=True)
        raise
    display.say(made.summary())
    typer.echo(str(folder))


@dataclass(frozen=True)
class _PairJob:
    """What `stepdistill data pairs` is to do."""

    teacher: str
    prompts: PromptSet
    settings: PairSettings
    folder: Path
    device: str
    teacher_options: dict[str, Any] = field(default_factory=dict)


def _pair_job(source: str, options: Sequence[str], prompts: str | None) -> _PairJob:
    """The job that a recipe describes, or a teacher with its prompts, with the options that change it."""
    from stepdistill.data.pair_maker import PairSettings
    from stepdistill.data.prompts import SHAPES_SOURCE, load_prompts
    from stepdistill.options import build_dataclass
    from stepdistill.resources.apply import loading_types
    from stepdistill.teacher_kind import for_teacher

    given = _read_options(options)
    recipe = recipe_of(source)
    recipe = recipe and for_teacher(recipe)
    known = {} if recipe is None else recipe.pair_options()
    settings: PairSettings = build_dataclass(PairSettings, {**known, **given}, "pairs")
    if prompts is not None:
        # A file is taken whole, so that a larger count goes on with the same prompts; shapes are endless.
        texts = load_prompts(prompts, count=settings.count if prompts == SHAPES_SOURCE else None)
    elif recipe is not None:
        texts = load_prompts(recipe.data.prompts, count=recipe.data.count)
    else:
        raise UserError("--prompts is missing: a teacher alone says nothing about them; give a file, or shapes with "
                        "count=4096")  # fmt: skip
    if recipe is None:
        return _PairJob(source, texts, settings, Path(PAIRS_FOLDER), "auto")
    return _PairJob(recipe.teacher, texts, settings, Path(recipe.data.pairs or PAIRS_FOLDER), recipe.device,
                    # Loaded as by a run, which takes the pairs of its own teacher only.
                    {"dtype": loading_types(recipe.memory), **recipe.teacher_options()})  # fmt: skip


def _read_options(options: Sequence[str]) -> dict[str, Any]:
    from stepdistill.recipe_text import key_and_value, parse_yaml

    given: dict[str, Any] = {}
    for text in options:
        key, value = key_and_value(text, repr(text), "key=value, for example count=4096")
        given[key] = parse_yaml(value, f"pairs.{key}")
    return given
