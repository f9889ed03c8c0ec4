"""The command line: a thin layer of words over functions that Python code can call as well.

Everything heavy is imported inside the commands, so that help, version and a mistyped key answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import stepdistill
from stepdistill.cli_bench import bench_app
from stepdistill.cli_data import data_app
from stepdistill.cli_models import PLAIN_GUIDANCE, PLAIN_STEPS, HeightOption, WidthOption
from stepdistill.cli_models import facts_of as _facts
from stepdistill.cli_models import model_under_test as _model_under_test
from stepdistill.cli_models import parse_model as _parse_model
from stepdistill.cli_reports import compare, inspect
from stepdistill.cli_resources import doctor, plan
from stepdistill.errors import UserError
from stepdistill.terminal import device_of as _device
from stepdistill.terminal import hide_loading_bars as _hide_loading_bars
from stepdistill.terminal import open_console as _console


if TYPE_CHECKING:
    from stepdistill.recipe import Recipe


__all__ = ["PLAIN_GUIDANCE", "PLAIN_STEPS", "_facts", "app", "main"]

app = typer.Typer(
    name="stepdistill",
    help="Distils a diffusion model into a stock Diffusers pipeline of one to four steps.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class Topic(StrEnum):
    """What `stepdistill list` can list."""

    objectives = "objectives"
    recipes = "recipes"
    families = "families"
    protocols = "protocols"


def main() -> None:
    """Runs a command; a user's mistake is one line on the error stream and exit code 2, Ctrl-C is exit code 130."""
    try:
        app()
    except UserError as error:
        for line in str(error).splitlines():
            typer.echo(f"error: {line}", err=True)
        sys.exit(2)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"stepdistill {stepdistill.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a bundled one, such as quickstart.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE", help="Changes, such as stages.0.steps=100.")
    ] = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--fresh",
            show_default=False,
            help="Go on from the last checkpoint in the output folder, or begin anew and replace what it holds. "
            "Without either: go on if it holds this same run, refuse if it holds another.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the recipe and print all of it; do nothing.")
    ] = False,
    smoke: Annotated[
        bool,
        typer.Option("--smoke", help="Try the recipe for two steps on a tiny random teacher; leave nothing behind."),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar and no tables; errors only.")] = False,
    num_processes: Annotated[
        int, typer.Option(min=1, help="Processes on this machine, each with a GPU of its own; they share every batch.")
    ] = 1,
    shard: Annotated[
        bool, typer.Option("--shard", help="Divide networks with full weights among the processes (FSDP2).")
    ] = False,
) -> None:
    """Run a recipe: train, export, and measure."""
    from stepdistill.recipe import Recipe

    _check_overrides(recipe, overrides or [])
    loaded = Recipe.load(recipe, overrides or [])
    if dry_run:
        typer.echo(_checked(loaded).to_yaml(), nl=False)
        return
    if smoke:
        _check_smoke(resume, num_processes, shard=shard)
        from stepdistill.smoke import run_smoke

        _hide_loading_bars()
        run_smoke(loaded, console=_console(quiet=quiet))
        return
    if num_processes > 1 or shard:
        words = [recipe, *(overrides or []), *_options(resume, quiet=quiet)]
        raise typer.Exit(_in_processes(loaded, words, num_processes, shard=shard))
    _train_here(loaded, resume, quiet=quiet)


def _checked(recipe: Recipe) -> Recipe:
    """The recipe with all defaults; raises UserError for what it asks for and cannot have, wherever it is run."""
    from stepdistill.stages import build_objectives, check_stages
    from stepdistill.teacher_kind import resolve

    resolved = resolve(recipe)
    check_stages(resolved, build_objectives(resolved))
    return resolved


def _options(resume: bool | None, *, quiet: bool) -> list[str]:
    """The words that say the same to the processes."""
    again = [] if resume is None else ["--resume" if resume else "--fresh"]
    return [*again, *(["--quiet"] if quiet else [])]


def _check_smoke(resume: bool | None, num_processes: int, *, shard: bool) -> None:
    """Refuses what would have no effect."""
    again = _options(resume, quiet=False)
    for option in [*again, *(["--num-processes"] if num_processes > 1 else []), *(["--shard"] if shard else [])]:
        raise UserError(f"{option} does nothing with --smoke, which begins in a temporary folder and in one process; "
                        "leave one of them out")  # fmt: skip


def _train_here(recipe: Recipe, resume: bool | None, *, quiet: bool) -> None:
    """Trains in this process, which may be one of several; the first of them says what an interruption has left."""
    from stepdistill.processes.launch import rank
    from stepdistill.run import train as run_training
    from stepdistill.trainer import Interrupted

    _hide_loading_bars()
    try:
        run_training(recipe, resume=resume, console=_console(quiet=quiet or rank() > 0))
    except Interrupted as stop:
        left = "no checkpoint was written, the run was in doubt; the same command goes on from the last good one"
        if stop.checkpoint is not None:
            left = f"checkpoint left at {stop.checkpoint}; the same command goes on from it"
        if rank() == 0:
            typer.echo(f"interrupted: {left}", err=True)
        raise


def _in_processes(recipe: Recipe, words: Sequence[str], count: int, *, shard: bool) -> int:
    """Trains in several processes => exit code."""
    from stepdistill.processes.launch import check_launch, launch, launched

    if launched():
        raise UserError("accelerate has started several processes already; leave out --num-processes and --shard")
    if count == 1:
        raise UserError("--shard: there is nobody to divide a network with; add --num-processes")
    check_launch(recipe, count, shard=shard)
    return launch(["train", *words], count, shard=shard)


def _check_overrides(recipe: str, overrides: Sequence[str]) -> None:
    """Whatever follows the recipe has an ``=`` in it; of anything else, says what was probably meant."""
    if "=" in recipe and not Path(recipe).exists():
        raise UserError(f"{recipe!r} is an override; the recipe comes first: stepdistill train RECIPE {recipe}")
    for index, text in enumerate(overrides):
        if "=" in text:
            continue
        if text.endswith((".yaml", ".yml")):
            raise UserError(f"{text!r} is a second recipe; train one after the other")
        if text in ("resume", "fresh", "dry-run", "quiet"):
            raise UserError(f"{text!r} is not key.path=value; did you mean --{text}?")
        value = next((other for other in overrides[index + 1 : index + 2] if "=" not in other), "VALUE")
        raise UserError(f"{text!r} is not key.path=value; did you mean {text}={value}?")


@app.command()
def sample(  # noqa: PLR0913  # an argument is an option of the command
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run's folder, a Diffusers folder, or a hub id.")],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="What to draw; quote each prompt.")],
    steps: Annotated[int | None, typer.Option(min=1, help="Default: what the model was distilled for.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(min=0, help="1 is no guidance. Default: what the model was distilled for.")
    ] = None,
    height: HeightOption = None,
    width: WidthOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Images per prompt.")] = 1,
    lora: Annotated[str | None, typer.Option(help="LoRA folder or file to load on top of MODEL.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Guidance adapter, told the scale, to put beside MODEL.")] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What not to draw; without guidance it needs --nasa or --nag.")
    ] = None,
    nasa: Annotated[float | None, typer.Option(min=0, help="Strength of the negative prompt, such as 0.3.")] = None,
    nag: Annotated[float | None, typer.Option(min=0, help="The same, normalised; such as 2.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Model that makes the first steps, such as MODEL's teacher: hybrid sampling.")
    ] = None,
    base_replaces: Annotated[
        int | None, typer.Option(min=1, help="How many of MODEL's steps the base does. Default: 1.")
    ] = None,
    base_steps: Annotated[int | None, typer.Option(min=1, help="Steps of the base. Default: as many.")] = None,
    base_guidance: Annotated[float | None, typer.Option(min=0, help="The base's guidance scale. Default: 3.")] = None,
    trace: Annotated[bool, typer.Option("--trace", help="Also draw what every step predicts.")] = False,
    rule: Annotated[str | None, typer.Option(help="Function that divides prompts among several students.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("samples"),
) -> None:
    """Draw images with plain Diffusers."""
    from stepdistill.draw import Avoid, draw

    hybrid = {"base": base, "base_replaces": base_replaces, "base_steps": base_steps, "base_guidance": base_guidance}
    given = {"steps": steps, "guidance_scale": guidance_scale, "lora": lora, "adapter": adapter, "rule": rule}
    given |= {"height": height, "width": width, **hybrid}
    called = _model_under_test(model, given)
    avoid = Avoid.of(negative_prompt, nasa, nag)
    _hide_loading_bars()
    device = _device("auto")
    for file in draw(called, prompts, output, avoid=avoid, seed=seed, count=count, device=device, trace=trace):
        typer.echo(str(file))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Such as step-0000200, or 200; stage-0 is the end of the first stage. Default: the finished student."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write to. Default: RUN itself.")] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Put a checkpoint where the export of a run's finished student is.")
    ] = False,
) -> None:
    """Write a checkpoint as a Diffusers pipeline and a LoRA."""
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run}: no run in this folder, it has no recipe.yaml; give the output folder of a training")
    from stepdistill.run import export as export_run

    _hide_loading_bars()
    result = export_run(run, checkpoint, output, replace=replace)
    for folder in (result.pipeline, result.lora, result.adapter):
        if folder is not None:
            typer.echo(str(folder))


app.add_typer(bench_app)
app.add_typer(data_app)
app.command()(plan)
app.command()(doctor)
app.command()(compare)
app.command()(inspect)


@app.command()
def merge(
    first: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="A run's folder, a Diffusers folder, or a hub id; of a LoRA: its base and the LoRA's folder, "
            "as base,lora=folder.",
        ),
    ],
    second: Annotated[str, typer.Argument(metavar="B", help="The same; a student of the same base.")],
    weight: Annotated[float, typer.Option(min=0, max=1, help="Of A; B has the rest.")] = 0.5,
    output: Annotated[Path, typer.Option(help="Folder for the pipeline.")] = Path("merged"),
) -> None:
    """Write the weighted mean of two students as a Diffusers pipeline."""
    students = [_parse_model(text) for text in (first, second)]
    from stepdistill.merge import Student
    from stepdistill.merge import merge as merge_students

    _hide_loading_bars()
    a, b = (Student(model.path, model.lora) for model in students)
    typer.echo(str(merge_students(a, b, weight, output)))


@app.command(name="list")
def list_(topic: Annotated[Topic | None, typer.Argument(help="Default: all of them.")] = None) -> None:
    """Show objectives, recipes, families, and protocols."""
    from rich.table import Table

    console = _console()
    for wanted in [topic] if topic else list(Topic):
        columns, rows = LISTINGS[wanted]()
        table = Table(title=wanted.value, title_justify="left", show_lines=False)
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)


Listing = tuple[tuple[str, ...], Sequence[tuple[str, ...]]]  # headings, rows


def _list_objectives() -> Listing:
    import dataclasses

    from stepdistill.objectives import known_objectives, resolve

    rows = []
    for name in sorted(known_objectives()):
        try:
            kind: Any = resolve(name)
        except UserError as error:
            rows.append((name, str(error), ""))
            continue
        fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
        rows.append((name, (kind.__doc__ or "").strip().partition("\n")[0], ", ".join(field.name for field in fields)))
    return ("name", "idea", "options"), rows


def _list_recipes() -> Listing:
    from stepdistill.recipe import Recipe, bundled_recipes

    rows = []
    for name, file in bundled_recipes().items():
        recipe = Recipe.load(file)
        played = ", ".join(f"{stage.objective.name} {stage.steps:,}" for stage in recipe.stages)
        rows.append((name, recipe.teacher, played))
    return ("name", "teacher", "objective and steps of each stage"), rows


def _list_families() -> Listing:
    from stepdistill.families import FAMILIES

    return ("pipeline", "class"), sorted(FAMILIES.items())


def _list_protocols() -> Listing:
    from stepdistill.bench.protocols import STANDARDS

    shapes = ("shapes", "FID, KID, CLIP score, caption accuracy and diversity on captioned scenes with known contents")
    own = ("prompts:FILE", "CLIP score and further metrics on prompts of one's own")
    rows = [(name, f"{standard.reference}; {standard.source}") for name, standard in STANDARDS.items()]
    return ("name", "measures"), [shapes, *rows, own]


LISTINGS: dict[Topic, Callable[[], Listing]] = {
    Topic.objectives: _list_objectives,
    Topic.recipes: _list_recipes,
    Topic.families: _list_families,
    Topic.protocols: _list_protocols,
}
