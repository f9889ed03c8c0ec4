"""The two pictures of a report: quality against cost, and samples side by side."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepdistill.bench.quality import LESS_IS_BETTER, heading, interval, measured_qualities, series
from stepdistill.bench.report import Report


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

MARKERS = "osD^vP*X<>"
CAPTION_WIDTH = 24  # characters in a line
GUTTER = 1  # white pixels at either side of a sample
DOTS_PER_INCH = 150


@dataclass(frozen=True)
class Point:
    """A row of the report with both figures: what a model costs and how good it is; `number` is the row's."""

    number: int
    row: Mapping[str, Any]
    cost: float
    value: float


def pareto(report: Report, path: Path) -> None:
    """Draws quality against network calls, and against milliseconds per image; see `pareto_figure`.

    The quality is FID, or the first of `quality.LESS_IS_BETTER` that was measured.
    """
    pareto_figure(report, _drawn_first(report)).savefig(path, dpi=DOTS_PER_INCH)


def pareto_svg(report: Report, column: str) -> str:
    """The same picture for a page, as an <svg> element in which the mark of row n has an id that ends in -n."""
    import matplotlib

    # Text stays text, and ids that elements share within one picture differ between pictures.
    settings = {"svg.fonttype": "none", "svg.hashsalt": f"stepdistill/{column}"}
    written = io.StringIO()
    with matplotlib.rc_context(settings):
        pareto_figure(report, column).savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    return text[text.index("<svg") :]


def pareto_figure(report: Report, column: str) -> Figure:
    """Quality against network calls, and against milliseconds per image; below is better, or above, as the axis says.

    Costs are on log axes; so is quality where the values differ more than twentyfold. A grey line joins the models
    that no other beats in both, a dotted one the rows of one model; bars are confidence intervals.
    """
    # The figure is made without pyplot, which would keep it in a global list and may want a display.
    from matplotlib.figure import Figure

    rows = [asdict(row) for row in report.rows]
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _panel(left, rows, column, "nfe")
    left.set_xlabel("network calls per image (NFE)")
    _panel(right, rows, column, "ms_per_image")
    right.set_xlabel(plain_text(f"milliseconds per image, {report.device}"))
    name = heading(column, rows)
    left.set_ylabel(f"{name} ({'lower' if LESS_IS_BETTER[column] else 'higher'} is better)")
    handles, labels = left.get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))  # one entry for each label
    if shown:
        figure.legend(shown.values(), shown, loc="outside lower center", ncols=min(4, len(shown)), frameon=False)
    figure.suptitle(plain_text(report.name))
    return figure


def _drawn_first(report: Report) -> str:
    return next(iter(measured_qualities([asdict(row) for row in report.rows])), "fid")


def _points(rows: Sequence[Mapping[str, Any]], cost: str, column: str) -> list[Point]:
    """Rows with both figures; a log axis has no place for a cost of zero."""
    return [Point(number, row, row[cost], row[column]) for number, row in enumerate(rows)
            if row.get(column) is not None and (row.get(cost) or 0) > 0]  # fmt: skip


def frontier(points: Sequence[Point], column: str) -> list[Point]:
    """The points that no other beats in cost and quality, by cost."""
    sign = 1 if LESS_IS_BETTER[column] else -1
    pairs = {p.number: (p.cost, sign * p.value) for p in points}
    front = [p for p in points if not any(dominates(other, pairs[p.number]) for other in pairs.values())]
    return sorted(front, key=lambda p: p.cost)


def _panel(axes: Axes, rows: Sequence[Mapping[str, Any]], column: str, cost: str) -> None:
    """One scatter of quality against a cost; a model looks the same in all of them."""
    points = _points(rows, cost, column)
    front = frontier(points, column)
    axes.plot([p.cost for p in front], [p.value for p in front], color="0.75", linewidth=1.2, zorder=1)
    for place, name in enumerate(dict.fromkeys(series(row["model"]) for row in rows)):
        cells = sorted((p for p in points if series(p.row["model"]) == name), key=lambda p: p.cost)
        color, marker = f"C{place % 10}", MARKERS[place % len(MARKERS)]
        label = plain_text(cells[0].row["model"] if len(cells) == 1 else name)
        axes.plot([p.cost for p in cells], [p.value for p in cells], ":", color=color, linewidth=1.0, zorder=1)
        for point in cells:
            _error_bar(axes, point, column, color)
            mark = axes.scatter([point.cost], [point.value], color=color, marker=marker, s=55, label=label, zorder=2)
            mark.set_gid(f"point-{column}-{cost}-{point.number}")
            axes.annotate(f"{point.value:.3g}", (point.cost, point.value), xytext=(6, 5), textcoords="offset points",
                          fontsize=8, color="0.3")  # fmt: skip
    _scale(axes, points)


def _error_bar(axes: Axes, point: Point, column: str, color: str) -> None:
    found = interval(point.row, column)
    if found is not None:
        # A bootstrap interval need not contain the value itself, and a bar cannot have a negative length.
        lengths = [[max(0.0, point.value - found[0])], [max(0.0, found[1] - point.value)]]
        axes.errorbar([point.cost], [point.value], yerr=lengths, fmt="none", ecolor=color, elinewidth=1, capsize=2)


def _scale(axes: Axes, points: Sequence[Point]) -> None:
    """Log axes, and ticks at the costs themselves if they are few."""
    axes.set_xscale("log")
    values = [p.value for p in points]
    if values and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    ticks = sorted({p.cost for p in points})
    if points and len(ticks) <= 6:
        axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
        axes.set_xticks([], minor=True)
    axes.margins(0.18)
    axes.grid(alpha=0.25)


def plain_text(text: str) -> str:
    """Text that matplotlib shows as it is: dollars are no mathematics, and a label may begin with an underscore."""
    return text.replace("$", r"\$") if not text.startswith("_") else " " + text.replace("$", r"\$")


def dominates(first: tuple[float, float], second: tuple[float, float]) -> bool:
    """Whether `first` is no worse in (cost, distance) than `second` and better in one of them."""
    return first[0] <= second[0] and first[1] <= second[1] and first != second


def sample_grid(samples: Mapping[str, Tensor], captions: Sequence[str], path: Path) -> None:
    """Draws a row for each prompt, with its text, and a column for each model; the noise is the same along a row.

    Args:
        samples: model's name => images (P, K, 3, H, W) in [0, 1]: K images of each of the first P prompts.
        captions: at least P prompts.
        path: PNG to write.
    """
    from matplotlib.figure import Figure
    from torch.nn.functional import pad

    prompts, images = next(iter(samples.values())).shape[:2]
    width = 1.6 + len(samples) * (0.75 * images + 0.15)
    figure = Figure(figsize=(width, 0.35 + 0.8 * prompts), layout="constrained")
    grid = figure.subplots(
        prompts, 1 + len(samples), squeeze=False, width_ratios=[1.6, *([0.75 * images] * len(samples))]
    )
    for row in range(prompts):
        text = plain_text(textwrap.fill(captions[row], CAPTION_WIDTH))
        grid[row][0].text(1.0, 0.5, text, ha="right", va="center", fontsize=7, transform=grid[row][0].transAxes)
        for column, (name, made) in enumerate(samples.items(), start=1):
            padded = pad(made[row].float().clamp(0, 1), (GUTTER, GUTTER), value=1.0)
            strip = padded.permute(2, 0, 3, 1).flatten(1, 2)  # (H, K * (W + 2 GUTTER), 3)
            grid[row][column].imshow(strip.numpy(), interpolation="nearest")
            if row == 0:
                grid[row][column].set_title(plain_text(name), fontsize=8)
    for axes in figure.axes:
        axes.set_axis_off()
    figure.savefig(path, dpi=DOTS_PER_INCH)
