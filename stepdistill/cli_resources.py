"""The commands that say what a run needs and what a machine has: `stepdistill plan` and `stepdistill doctor`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stepdistill.errors import UserError
from stepdistill.terminal import device_of, hide_loading_bars, open_console


if TYPE_CHECKING:
    from rich.table import Table

    from stepdistill.resources.downloads import Download
    from stepdistill.resources.plan import MemoryPlan, StagePlan

DOES_NOT_FIT = 3  # exit code


def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a bundled one.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE", help="Changes, such as stages.0.batch_size=1.")
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(min=0, help="GiB of the device to plan for. Default: what the recipe's device here has."),
    ] = None,
    num_processes: Annotated[
        int, typer.Option(min=1, help="Processes that share every batch, each with such a device; what one needs.")
    ] = 1,
    shard: Annotated[
        bool, typer.Option("--shard", help="They divide networks with full weights among themselves (FSDP2).")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file to write the plan to as well.")] = None,
) -> None:
    """Say what a recipe needs, without loading weights; exit code 3 if it does not fit."""
    from stepdistill.recipe import Recipe
    from stepdistill.resources.downloads import downloads
    from stepdistill.resources.plan import plan as make_plan

    if shard and num_processes == 1:
        raise UserError("--shard: there is nobody to divide a network with; add --num-processes")
    loaded = Recipe.load(recipe, overrides or [])
    hide_loading_bars()
    device, capacity = _device_for(loaded.device) if memory is None else ("the device", int(memory * 2**30))
    made = make_plan(loaded, device=device, capacity_bytes=capacity, num_processes=num_processes, shard=shard)
    wanted = downloads(loaded)
    _show(made, wanted)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(made.as_json(), indent=2) + "\n")
    if made.fits is False:
        raise typer.Exit(DOES_NOT_FIT)


def _device_for(name: str) -> tuple[str, int | None]:
    """The name and the bytes of what a recipe would run on here."""
    import os

    import torch

    device = device_of(name)
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        return properties.name, int(properties.total_memory)
    try:
        return "this machine's memory", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on every system
        return "this machine's memory", None


def _show(made: MemoryPlan, wanted: list[Download]) -> None:
    console = open_console()
    for number, stage in enumerate(made.stages, 1):
        for table in (_roles(number, stage), _bytes(stage), _passes(stage)):
            console.print(table)
        for note in stage.notes:
            console.print(note, markup=False, highlight=False)
    for entry in wanted:
        size = "size unknown" if entry.missing_bytes is None else f"{entry.missing_bytes / 2**30:.2f} GiB"
        console.print(f"to download: {entry.name}, {size}; {entry.note}", markup=False, highlight=False)
    if not wanted:
        console.print("to download: nothing")
    each = f" in each of {made.num_processes} processes" if made.num_processes > 1 else ""
    peak = f"peak {made.peak_bytes / 2**30:.2f} GiB{each}"
    if made.capacity_bytes is None:
        console.print(f"{peak}; what {made.device} has is unknown", highlight=False)
        return
    verdict = "fits" if made.fits else "does not fit"
    console.print(f"{peak}; {verdict} into {made.device}, {made.capacity_bytes / 2**30:.2f} GiB", highlight=False)


def _roles(number: int, stage: StagePlan) -> Table:
    from rich.table import Table

    table = Table(title=f"stage {number}: {stage.objective}", title_justify="left")
    for column in ("role", "weights", "trained", "parameters"):
        table.add_column(column, justify="left" if column in ("role", "weights") else "right")
    for role in stage.roles:
        table.add_row(role.role, role.weights, f"{role.trained:,}", f"{role.parameters:,}")
    return table


def _bytes(stage: StagePlan) -> Table:
    from rich.table import Table

    table = Table(title="memory at the peak, GiB", title_justify="left")
    parts = {
        "weights": stage.weights_bytes,
        "gradients": stage.gradient_bytes,
        "optimiser": stage.optimizer_bytes,
        "averages": stage.average_bytes,
        "activations": stage.activation_bytes,
        "all": stage.peak_bytes,
    }
    for name in parts:
        table.add_column(name, justify="right")
    table.add_row(*(f"{value / 2**30:.3f}" for value in parts.values()))
    return table


def _passes(stage: StagePlan) -> Table:
    from rich.table import Table

    table = Table(title="network passes of an iteration", title_justify="left")
    for column in ("phase", "peak GiB", "role", "for a gradient", "calls", "samples"):
        table.add_column(column, justify="left" if column in ("phase", "role", "for a gradient") else "right")
    for phase in stage.phases:
        repeats = f" x {phase.repeats}" if phase.repeats > 1 else ""
        for index, called in enumerate(phase.passes):
            first = (phase.name + repeats, f"{phase.peak_bytes / 2**30:.3f}") if index == 0 else ("", "")
            table.add_row(*first, called.role, "yes" if called.graph else "no", str(called.calls), str(called.rows))
    return table


def doctor(
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="Also look at a pass of this recipe's teacher.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE", help="Changes, such as attention=flash.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    precision: Annotated[str, typer.Option(help="In which attention is tried: fp32, bf16 or fp16.")] = "bf16",
) -> None:
    """Say what is installed, and which attention kernels really run here."""
    from stepdistill.resources.doctor import TYPES, examine, kernels_of_recipe

    if precision not in TYPES:
        raise UserError(f"--precision {precision}: use {', '.join(TYPES)}")
    hide_loading_bars()
    place = device_of(device)
    marks = {True: "ok", False: "no", None: "  "}
    for finding in examine(place, precision):
        typer.echo(f"{marks[finding.good]} {finding.what}: {finding.found}")
    if recipe is not None:
        for finding in kernels_of_recipe(recipe, overrides or [], place):
            typer.echo(f"{marks[finding.good]} {finding.what}: {finding.found}")
