"""The commands that read what is already there: `stepdistill compare` and `stepdistill inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepdistill.terminal import open_console


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="A report.json, or the folder that it is in.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="The same.")],
    output: Annotated[Path | None, typer.Option(help="Markdown file to write the comparison to as well.")] = None,
) -> None:
    """Compare two reports: what differs, and what is more than chance."""
    from stepdistill.bench.compare import compare as compare_reports
    from stepdistill.bench.report import load_report

    found = compare_reports(load_report(first), load_report(second))
    console = open_console()
    console.print(found.to_table())
    for note in found.notes():
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    if output is not None:
        output.write_text(found.to_markdown(), encoding="utf-8")
        typer.echo(str(output))


def inspect(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH", help="A Diffusers folder, a LoRA, a safetensors file, or a run's folder."),
    ],
) -> None:
    """Explain a distilled model or LoRA, and how to call it."""
    from stepdistill.inspection.findings import explain
    from stepdistill.terminal import hide_loading_bars

    hide_loading_bars()
    typer.echo(explain(paths))
