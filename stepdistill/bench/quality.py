"""Which figures of a report say how good a model is, which way is better, and which rows are one model's.

Rows are mappings here, as in results files, so that figures that this version does not know are still written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from stepdistill.bench.report import COLUMNS, headings


Row = Mapping[str, Any]

# Column => whether less of it is better. Order is that in which pictures offer them; the first that was measured is
# drawn.
LESS_IS_BETTER: Mapping[str, bool] = {
    "fid": True, "fd_dinov2": True, "patch_fid": True, "kid": True, "clip_score": False, "caption_accuracy": False,
    "images_all_correct": False, "hpsv2": False, "pickscore": False, "image_reward": False, "aesthetic": False,
    "diversity": False, "lpips_diversity": False, "feature_diversity": False, "vendi": False, "precision": False,
    "recall": False, "lpips": True, "clip_distance": True,
}  # fmt: skip
COSTS = ("nfe", "ms_per_image", "latency_ms", "peak_gib", "train_seconds")
STEPS = re.compile(r",\s*\d+[\w ]*\bsteps?$")


def measured_qualities(rows: Sequence[Row]) -> list[str]:
    """The columns of quality that some row has a value in."""
    return [column for column in LESS_IS_BETTER if any(row.get(column) is not None for row in rows)]


def less_is_better(column: str) -> bool | None:
    """Of a cost or a quality; None of a figure that is neither, such as the number of images."""
    return True if column in COSTS else LESS_IS_BETTER.get(column)


def interval(row: Row, column: str) -> tuple[float, float] | None:
    """The confidence interval of a figure, if the row has one."""
    found = (row.get("intervals") or {}).get(column)
    return None if found is None or None in found else (float(found[0]), float(found[1]))


def series(model: str) -> str:
    """The model that a row belongs to, for rows that differ only in their steps: "teacher, 25 steps" => "teacher"."""
    return STEPS.sub("", model)


def heading(column: str, rows: Sequence[Row] = ()) -> str:
    """What tables call a column; a Frechet distance of few images in `rows`, with their number."""
    return headings(rows, [column])[0] if column in COLUMNS else column.replace("_", " ")
