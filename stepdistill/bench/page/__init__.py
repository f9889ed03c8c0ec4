"""report.html: one page that needs no network and no server, with the table, the plots and the samples of a report.

Jinja2 fills in page.html and escapes everything that comes from a report or a prompt. The page's own security policy
allows nothing but its own script, its own style and pictures that are part of it.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepdistill.bench.plots import pareto_svg
from stepdistill.bench.quality import heading, less_is_better, measured_qualities, series
from stepdistill.bench.report import Report, flat, headings, used_columns, written, written_interval


if TYPE_CHECKING:
    from torch import Tensor

HERE = Path(__file__).parent
LARGEST = 256  # pixels of a sample's longer side in the page
SMALL = 128  # pixels up to which a sample is stored without loss, and shown with its pixels
JPEG_QUALITY = 90


@dataclass(frozen=True)
class Cell:
    """A figure in the table: its text, its interval's text, and what it is sorted by ("" if it is missing)."""

    text: str
    interval: str
    value: str


@dataclass(frozen=True)
class Picture:
    """A sample as a data URI, with its size in pixels."""

    uri: str
    width: int
    height: int

    @property
    def small(self) -> bool:
        """Whether it is so small that it is shown larger, pixel by pixel."""
        return max(self.width, self.height) <= SMALL


@dataclass(frozen=True)
class Samples:
    """Pictures of one model at one number of network calls: K of them for each prompt."""

    nfe: str
    images: list[list[Picture]]


def save_page(report: Report, samples: Mapping[str, Tensor], captions: Sequence[str], path: Path) -> None:
    """Writes report.html, aside first and then renamed.

    Args:
        report: the table, the notes and the record.
        samples: model's name => images (P, K, 3, H, W) in [0, 1]: K images of each of the first P prompts. A model
            without any is left out of the grid.
        captions: at least P prompts.
        path: file to write.
    """
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(render_page(report, samples, captions), encoding="utf-8")
    fresh.replace(path)


def render_page(report: Report, samples: Mapping[str, Tensor], captions: Sequence[str]) -> str:
    """The page as text; see `save_page`."""
    from jinja2 import Environment, FileSystemLoader

    script = (HERE / "page.js").read_text(encoding="utf-8")
    rows = [flat(asdict(row)) for row in report.rows]
    columns = used_columns(rows)
    models = _sample_groups(report, samples)
    shown = min((len(images) for images in samples.values()), default=0)
    template = Environment(loader=FileSystemLoader(HERE), autoescape=True).get_template("page.html")
    return template.render(
        report=report, policy=policy(script), script=script, notes=report.notes(), models=models,
        style=(HERE / "page.css").read_text(encoding="utf-8"), captions=captions[:shown],
        columns=[{"heading": text, "first": _sorted_first(column)}
                 for column, text in zip(columns, headings(rows, columns), strict=True)],
        rows=[[_cell(row, column) for column in columns] for row in rows],
        figures=[{"column": column, "heading": heading(column, rows),
                  "svg": pareto_svg(report, column)} for column in measured_qualities(rows)],
        limits=sorted({cell.nfe for model in models for cell in model["cells"]}, key=float),
        record=report.to_json(),
    )  # fmt: skip


def policy(script: str) -> str:
    """The page's security policy: no network, and of all scripts this one alone, by its hash."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def _cell(row: Mapping[str, Any], column: str) -> Cell:
    value = row.get(column)
    known = value is not None and not (isinstance(value, float) and not math.isfinite(value))
    return Cell(written(column, value), written_interval(row, column), str(value) if known else "")


def _sorted_first(column: str) -> str:
    """The best comes first at the first click."""
    return "descending" if less_is_better(column) is False else "ascending"


def _sample_groups(report: Report, samples: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Models in the order of the table, each with its rows' pictures from few network calls to many."""
    groups: dict[str, list[Samples]] = {}
    for row in report.rows:
        if row.model in samples:
            cell = Samples(f"{row.nfe or 0:g}", _pictures(samples[row.model]))
            groups.setdefault(series(row.model), []).append(cell)
    return [{"name": name, "cells": sorted(cells, key=lambda cell: float(cell.nfe))} for name, cells in groups.items()]


def _pictures(images: Tensor) -> list[list[Picture]]:
    return [[_picture(image) for image in row] for row in images]


def _picture(image: Tensor) -> Picture:
    """An image (3, H, W) in [0, 1] => PNG if it is small, JPEG of at most `LARGEST` pixels a side otherwise."""
    from PIL import Image

    pixels = image.float().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(pixels)
    written_to = io.BytesIO()
    small = max(picture.size) <= SMALL
    if small:
        picture.save(written_to, "PNG", optimize=True)
    else:
        picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
        picture.save(written_to, "JPEG", quality=JPEG_QUALITY)
    data = base64.b64encode(written_to.getvalue()).decode()
    return Picture(f"data:image/{'png' if small else 'jpeg'};base64,{data}", *picture.size)
