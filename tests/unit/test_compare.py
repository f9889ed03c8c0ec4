"""Two reports side by side: which rows meet, what is more than chance, and what is warned about."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from stepdistill import cli
from stepdistill.bench.compare import Verdict, compare, difference_interval
from stepdistill.bench.report import Report, Row, save_report
from stepdistill.errors import UserError


def make_report(*rows: Row, **changes: object) -> Report:
    report = Report(
        name="shapes", date="2026-01-31", device="cpu", versions={"torch": "2.9"}, seeds={"prompts": 7, "noise": 0},
        recipe_sha256=None, protocol={"prompts": 64, "models": [len(rows)]}, rows=rows,
    )  # fmt: skip
    return replace(report, **changes)


def row(fid: float, width: float | None = None, name: str = "student", **more: object) -> Row:
    intervals = None if width is None else {"fid": [fid - width, fid + width]}
    return Row(name, 1.0, 512, fid, intervals=intervals, **more)


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        (row(10, 1), row(8, 1), Verdict.second),
        (row(8, 1), row(10, 1), Verdict.first),
        (row(10, 2), row(8, 1), Verdict.chance),
        (row(10, 1), row(8), Verdict.unknown),
        (row(10, 1), row(10, 3), Verdict.same),
    ],
)
def test_a_difference_counts_only_beyond_its_interval(first: Row, second: Row, verdict: Verdict) -> None:
    found = {d.column: d for d in compare(make_report(first), make_report(second)).differences}
    assert found["fid"].verdict is verdict
    assert found["nfe"].verdict is Verdict.same


def test_more_is_better_of_scores_and_less_of_calls() -> None:
    a = Row("m", 4.0, 512, clip_score=60.0, intervals={"clip_score": [59.0, 61.0]})
    b = Row("m", 1.0, 512, clip_score=50.0, intervals={"clip_score": [49.0, 51.0]})
    found = {d.column: d.verdict for d in compare(make_report(a), make_report(b)).differences}
    assert found == {"clip_score": Verdict.first, "nfe": Verdict.second}


def test_the_interval_of_a_difference_is_that_of_two_independent_errors() -> None:
    low, high = difference_interval((10.0, 9.0, 12.0), (7.0, 6.5, 7.2))
    assert low == pytest.approx(-3 - math.hypot(0.5, 2.0))
    assert high == pytest.approx(-3 + math.hypot(0.2, 1.0))
    assert difference_interval((1.0, 1.5, 2.0), (3.0, 3.0, 3.0)) == pytest.approx((1.0, 2.0)), "no negative lengths"


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    torch.manual_seed(0)
    means = torch.randn(2000, 2) * torch.tensor([0.3, 0.4]) + torch.tensor([5.0, 5.5])
    hits = 0
    for a, b in means.tolist():
        low, high = difference_interval((a, a - 1.96 * 0.3, a + 1.96 * 0.3), (b, b - 1.96 * 0.4, b + 1.96 * 0.4))
        hits += low <= 0.5 <= high
    assert hits / 2000 == pytest.approx(0.95, abs=0.015)


def test_models_meet_by_name_and_others_are_listed() -> None:
    found = compare(make_report(row(1), row(2, name="old")), make_report(row(3), row(4, name="new")))
    assert {d.model for d in found.differences} == {"student"}
    assert (found.only_first, found.only_second) == (("old",), ("new",))
    assert "Only in B: new." in found.notes()


def test_two_reports_of_one_model_each_are_compared_whatever_it_is_called() -> None:
    found = compare(make_report(row(1, name="x")), make_report(row(3, name="y")))
    assert {d.model for d in found.differences} == {"x | y"}
    assert found.only_first == ()


def test_reports_without_a_common_model_are_refused_with_a_remedy() -> None:
    with pytest.raises(UserError, match=r"A has a, b, B has c; .*name=NAME"):
        compare(make_report(row(1, name="a"), row(1, name="b")), make_report(row(1, name="c")))


def test_what_was_not_measured_alike_is_told() -> None:
    other = make_report(Row("student", images=2048, fid=3.0), protocol={"prompts": 256, "real": {"fid": 1}},
                        device="gpu", seeds={"noise": 1}, versions={"torch": "2.10"})  # fmt: skip
    text = " ".join(compare(make_report(row(3)), other).cautions)
    for told in (
        "prompts is 64 in A and 256 in B",
        "512 images in A and 2048 in B",
        "gpu",
        "seeds",
        "torch 2.9 and 2.10",
    ):
        assert told in text
    assert compare(make_report(row(3)), make_report(row(4), row(1, name="z"))).cautions == ()


def test_the_command_prints_differences_with_intervals_and_writes_them(tmp_path: Path, monkeypatch) -> None:
    save_report(make_report(row(10, 1, name="a [b] | c")), tmp_path / "A")
    save_report(make_report(row(8, 1, name="a [b] | c")), tmp_path / "B")
    monkeypatch.setenv("COLUMNS", "160")
    words = ["compare", str(tmp_path / "A"), str(tmp_path / "B" / "report.json"), "--output", str(tmp_path / "c.md")]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    for told in ("a [b] | c", "10 [9, 11]", "8 [7, 9]", "-2 [-3.41, -0.586]", "B"):
        assert told in result.output
    written = (tmp_path / "c.md").read_text()
    assert "| a [b] \\| c | FID-512 | 10 [9, 11] | 8 [7, 9] | -2 [-3.41, -0.586] | B |" in written
    assert "- Intervals are of 95 %" in written


def test_the_table_names_a_model_once() -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(compare(make_report(row(1, ms_per_image=3.0)), make_report(row(2, ms_per_image=4.0))).to_table())
    assert console.export_text().count("student") == 1
