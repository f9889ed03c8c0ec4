"""Quality against cost: which models are on the front, whichever way is better, and what the marks are called."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
from PIL import Image

from stepdistill.bench import plots, quality
from stepdistill.bench.report import Row
from tests.unit.test_report import make_report


def points(values: dict[str, tuple[float, float]], column: str) -> list[plots.Point]:
    return [plots.Point(i, {"model": name}, cost, value) for i, (name, (cost, value)) in enumerate(values.items())]


@pytest.mark.parametrize(("column", "front"), [("fid", ["a", "c"]), ("clip_score", ["b", "d"])])
def test_the_front_follows_what_is_better(column: str, front: list[str]) -> None:
    given = {"a": (1, 5.0), "b": (1, 9.0), "c": (2, 4.0), "d": (4, 10.0)}
    assert [p.row["model"] for p in plots.frontier(points(given, column), column)] == front


def test_equal_models_are_both_on_the_front() -> None:
    assert len(plots.frontier(points({"a": (1, 5.0), "b": (1, 5.0)}, "fid"), "fid")) == 2


def test_without_fid_another_quality_is_drawn(tmp_path: Path) -> None:
    rows = tuple(replace(row, fid=None) for row in make_report().rows)
    report = replace(make_report(), rows=rows)
    assert plots._drawn_first(report) == "kid"
    plots.pareto(report, tmp_path / "kid.png")
    assert min(Image.open(tmp_path / "kid.png").size) >= 400


def test_dollars_and_underscores_in_names_are_only_text(tmp_path: Path) -> None:
    rows = (Row("$\\frac$", 1.0, fid=3.0), Row("_x", 2.0, fid=2.0), Row("a $b$", 4.0, fid=1.0))
    svg = plots.pareto_svg(replace(make_report(), name="$\\nothing$", rows=rows), "fid")
    for text in ("$\\frac$", "_x", "a $b$", "$\\nothing$"):
        assert text in svg


def test_intervals_are_drawn_and_marks_are_named_by_row() -> None:
    given = make_report()
    plain = replace(given, rows=tuple(replace(row, ms_per_image=10 * row.nfe) for row in given.rows))
    sure = replace(plain, rows=tuple(replace(row, intervals={"fid": [row.fid - 0.5, row.fid]}) for row in plain.rows))
    drawn = [plots.pareto_svg(report, "fid") for report in (plain, sure)]
    assert [svg.count("LineCollection") for svg in drawn] == [0, 6], "three models in two panels"
    for cost in ("nfe", "ms_per_image"):
        assert drawn[0].count(f'id="point-fid-{cost}-2"') == 1


def test_the_rows_of_one_model_belong_together() -> None:
    names = ["teacher, 25 steps", "teacher, 1 step", "t, 25 guided steps", "mine", "two steps"]
    assert [quality.series(name) for name in names] == ["teacher", "teacher", "t", "mine", "two steps"]


def test_every_figure_of_a_row_is_a_quality_a_cost_or_neither_on_purpose() -> None:
    neither = {"model", "images", "images_per_second", "parameters", "times", "intervals", "others"}
    assert set(asdict(Row("x"))) == {*quality.LESS_IS_BETTER, *quality.COSTS} | neither
    assert quality.less_is_better("fid") is quality.less_is_better("nfe") is True
    assert quality.less_is_better("recall") is False
    assert quality.less_is_better("images") is None


def test_tables_show_intervals_and_the_parts_of_time() -> None:
    rows = [{"model": "m", "fid": 9.0, "images": 4096, "intervals": {"fid": (8.0, 10.5)}, "times": {"vae": 2.0},
             "others": {"mine": 0.5}}]  # fmt: skip
    from stepdistill.bench.report import markdown_table

    assert markdown_table(rows).splitlines() == [
        "| model | images | FID | decoder, ms | mine |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| m | 4,096 | 9 [8, 10.5] | 2 | 0.5 |",
    ]
