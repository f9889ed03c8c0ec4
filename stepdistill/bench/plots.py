"""The two pictures of a report: quality against cost, and samples side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stepdistill.bench.report import Report, Row, fid_name


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

MARKERS = "osD^vP*X<>"
CAPTION_WIDTH = 24  # characters in a line
GUTTER = 1  # white pixels at either side of a sample
DOTS_PER_INCH = 150


def pareto(report: Report, path: Path) -> None:
    """Draws FID against network calls, and against milliseconds per image; below and left is better.

    Costs are on log axes; so is FID where the values differ more than twentyfold. A line joins the models that no
    other beats in both.
    """
    # The figure is made without pyplot, which would keep it in a global list and may want a display.
    from matplotlib.figure import Figure

    rows = [row for row in report.rows if row.fid is not None]
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    quality = fid_name([{"fid": row.fid, "images": row.images} for row in rows])
    _panel(left, rows, [row.nfe for row in rows], "network calls per image (NFE)")
    _panel(right, rows, [row.ms_per_image for row in rows], f"milliseconds per image, {report.device}")
    left.set_ylabel(f"{quality} (lower is better)")
    handles, labels = left.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    figure.suptitle(report.name)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _panel(axes: Axes, rows: Sequence[Row], costs: Sequence[float | None], label: str) -> None:
    """One scatter of quality against a cost; models that lack the figure are left out."""
    points = [(cost, row.fid, row, i) for i, (cost, row) in enumerate(zip(costs, rows, strict=True))
              if cost is not None and cost > 0 and row.fid is not None]  # fmt: skip
    front = [p for p in points if not any(dominates(q[:2], p[:2]) for q in points)]
    front.sort(key=lambda p: p[0])
    axes.plot([p[0] for p in front], [p[1] for p in front], color="0.75", linewidth=1.2, zorder=1)
    for cost, fid, row, i in points:
        color, marker = f"C{i % 10}", MARKERS[i % len(MARKERS)]
        axes.scatter([cost], [fid], color=color, marker=marker, s=55, label=row.model, zorder=2)
        axes.annotate(f"{fid:.3g}", (cost, fid), xytext=(6, 5), textcoords="offset points", fontsize=8, color="0.3")
    axes.set_xscale("log")
    values = [p[1] for p in points]
    if values and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    ticks = sorted({p[0] for p in points})
    if points and len(ticks) <= 6:
        axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
        axes.set_xticks([], minor=True)
    axes.margins(0.18)
    axes.grid(alpha=0.25)
    axes.set_xlabel(label)


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
        text = textwrap.fill(captions[row], CAPTION_WIDTH)
        grid[row][0].text(1.0, 0.5, text, ha="right", va="center", fontsize=7, transform=grid[row][0].transAxes)
        for column, (name, made) in enumerate(samples.items(), start=1):
            padded = pad(made[row].float().clamp(0, 1), (GUTTER, GUTTER), value=1.0)
            strip = padded.permute(2, 0, 3, 1).flatten(1, 2)  # (H, K * (W + 2 GUTTER), 3)
            grid[row][column].imshow(strip.numpy(), interpolation="nearest")
            if row == 0:
                grid[row][column].set_title(name, fontsize=8)
    for axes in figure.axes:
        axes.set_axis_off()
    figure.savefig(path, dpi=DOTS_PER_INCH)
