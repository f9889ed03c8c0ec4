"""The command line: a thin layer of words over functions that Python code can call as well.

Everything heavy is imported inside the commands, so that help, version and a mistyped key answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import stepdistill
from stepdistill.cli_data import data_app
from stepdistill.errors import UserError
from stepdistill.terminal import device_of as _device
from stepdistill.terminal import hide_loading_bars as _hide_loading_bars
from stepdistill.terminal import open_console as _console


if TYPE_CHECKING:
    from rich.console import Console

    from stepdistill.bench.benchmark import Progress
    from stepdistill.bench.generate import ModelUnderTest


PLAIN_STEPS, PLAIN_GUIDANCE = 25, 3.0  # for models that do not say how they want to be called, such as teachers

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
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar and no tables; errors only.")] = False,
) -> None:
    """Run a recipe: train, export, and measure."""
    from stepdistill.recipe import Recipe

    _check_overrides(recipe, overrides or [])
    loaded = Recipe.load(recipe, overrides or [])
    if dry_run:
        typer.echo(loaded.resolved().to_yaml(), nl=False)
        return
    from stepdistill.run import train as run_training
    from stepdistill.trainer import Interrupted

    _hide_loading_bars()

    try:
        run_training(loaded, resume=resume, console=_console(quiet=quiet))
    except Interrupted as stop:
        left = "no checkpoint was written, the run was in doubt; the same command goes on from the last good one"
        if stop.checkpoint is not None:
            left = f"checkpoint left at {stop.checkpoint}; the same command goes on from it"
        typer.echo(f"interrupted: {left}", err=True)
        raise


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
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Images per prompt.")] = 1,
    lora: Annotated[str | None, typer.Option(help="LoRA folder or file to load on top of MODEL.")] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What not to draw; without guidance it needs --nasa or --nag.")
    ] = None,
    nasa: Annotated[float | None, typer.Option(min=0, help="Strength of the negative prompt, such as 0.3.")] = None,
    nag: Annotated[float | None, typer.Option(min=0, help="The same, normalised; such as 2.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("samples"),
) -> None:
    """Draw images with plain Diffusers."""
    from stepdistill.draw import Avoid, draw

    called = _model_under_test(model, {"steps": steps, "guidance_scale": guidance_scale, "lora": lora})
    avoid = Avoid.of(negative_prompt, nasa, nag)
    _hide_loading_bars()
    for file in draw(called, prompts, output, avoid=avoid, seed=seed, count=count, device=_device("auto")):
        typer.echo(str(file))


@app.command()
def bench(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL[,KEY=VALUE]",
            help="Folders or hub ids, each with what differs from how the model wants to be called: name, steps, "
            "guidance_scale, lora, scheduler, precision. Example: runs/quickstart assets/shapes/teacher,steps=8",
        ),
    ],
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of the protocol.")] = 64,
    images_per_prompt: Annotated[int, typer.Option(min=1, help="Diversity needs at least 2.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per call; does not change them.")] = 64,
    evaluator: Annotated[str, typer.Option(help="Folder of the CLIPModel that measures.")] = "assets/shapes/clip",
    output: Annotated[Path, typer.Option(help="Folder for report.json, report.md and pictures.")] = Path("report"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
) -> None:
    """Measure exported models: quality against network calls."""
    tested = [_parse_model(text) for text in models]
    from stepdistill.bench.benchmark import run_benchmark
    from stepdistill.bench.prompts import ShapesProtocol

    _hide_loading_bars()
    protocol = ShapesProtocol(prompts=prompts, images_per_prompt=images_per_prompt, evaluator=evaluator)
    console = _console()
    with _progress(console) as tell:
        report = run_benchmark(
            tested, protocol=protocol, output=output, device=_device(device), batch_size=batch_size, seed=seed,
            on_progress=tell,
        )  # fmt: skip
    console.print(report.to_table())
    typer.echo(str(output / "report.md"))


def _parse_model(text: str) -> ModelUnderTest:
    """``path,key=value,...`` => how that model is called; defaults come from its folder."""
    from stepdistill.recipe_text import parse_yaml

    path, *pairs = text.split(",")
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"model {text!r}: {pair!r} is not key=value, for example {path},steps=4")
        options[key] = parse_yaml(value, f"model {text!r}: {key}")
    return _model_under_test(path, options)


def _model_under_test(model: str, given: dict[str, Any]) -> ModelUnderTest:
    """How a model is called: as given, else as its distillation_config.json says, else like a teacher."""
    from stepdistill.bench.generate import ModelUnderTest
    from stepdistill.options import build_dataclass

    folder = Path(model)
    path = folder / "pipeline" if (folder / "pipeline" / "model_index.json").is_file() else folder
    options: dict[str, Any] = {
        "name": folder.name, "path": str(path) if folder.exists() else model, "steps": PLAIN_STEPS,
        "guidance_scale": PLAIN_GUIDANCE,
    }  # fmt: skip
    lora = Path(str(given.get("lora") or ""))
    facts = _facts(lora) if given.get("lora") else _facts(path)
    options |= {key: facts[key] for key in ("steps", "guidance_scale", "eta") if key in facts}
    if given.get("lora") and (lora / "scheduler").is_dir():
        options["scheduler"] = str(lora / "scheduler")
    options |= {key: value for key, value in given.items() if value is not None}
    tested: ModelUnderTest = build_dataclass(ModelUnderTest, options, f"model {model}")
    return tested


def _facts(folder: Path) -> dict[str, Any]:
    import json

    from stepdistill.export.pipeline import FACTS_FILE

    file = folder / FACTS_FILE
    if not file.is_file():
        return {}
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); export the model again") from error
    return facts if isinstance(facts, dict) else {}


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    checkpoint: Annotated[
        str | None, typer.Option(help="Such as step-0000200, or 200. Default: the finished student.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write to. Default: RUN itself.")] = None,
) -> None:
    """Write a checkpoint as a Diffusers pipeline and a LoRA."""
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run}: no run in this folder, it has no recipe.yaml; give the output folder of a training")
    from stepdistill.run import export as export_run

    _hide_loading_bars()
    result = export_run(run, checkpoint, output)
    for folder in (result.pipeline, result.lora):
        if folder is not None:
            typer.echo(str(folder))


app.add_typer(data_app)


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
    row = ("shapes", "FID, KID, CLIP score, caption accuracy and diversity on captioned scenes with known contents")
    return ("name", "measures"), [row]


LISTINGS: dict[Topic, Callable[[], Listing]] = {
    Topic.objectives: _list_objectives,
    Topic.recipes: _list_recipes,
    Topic.families: _list_families,
    Topic.protocols: _list_protocols,
}


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[Progress], None]]:
    """A bar for every part of a benchmark, and the function that moves them."""
    from rich import progress as bars

    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn(),
               bars.TimeRemainingColumn())  # fmt: skip
    tasks: dict[str, bars.TaskID] = {}
    with bars.Progress(*columns, console=console) as shown:

        def tell(news: Progress) -> None:
            if news.label not in tasks:
                tasks[news.label] = shown.add_task(news.label, total=news.total)
            shown.update(tasks[news.label], completed=news.done)

        yield tell
