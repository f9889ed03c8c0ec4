"""Reports as JSON, Markdown and terminal tables; the two pictures; tables in documents."""

from __future__ import annotations

import importlib.util
import io
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from stepdistill import assets
from stepdistill.bench import plots, report
from stepdistill.errors import UserError


ROOT = Path(__file__).resolve().parents[2]


def make_report(images: int = 512) -> report.Report:
    rows = (
        report.Row("teacher, 25 steps", 50.0, images, 4.123, 0.01, 61.0, 0.97, 0.88, 0.99, 800.0),
        report.Row("teacher, 1 step", 2.0, images, 900.0, 3.5, 20.0, 0.21, 0.0, 0.1, 33.0),
        report.Row("student | 1 step", 1.0, images, 5.5, 0.02, 60.0, 0.93, 0.7, 0.9, 17.0, train_seconds=400.0),
    )
    return report.Report(
        name="shapes", date="2026-01-31", device="cpu", versions={"torch": "2.9"}, seeds={"prompts": 7, "noise": 0},
        recipe_sha256="ab" * 32, protocol={"prompts": 64, "real": {"fid": 2.5, "clip_score": 62.0}}, rows=rows,
    )  # fmt: skip


@pytest.fixture(scope="module")
def render_tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("render_tables", ROOT / "benchmarks/render_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_report_survives_json() -> None:
    assert report.Report.from_json(make_report().to_json()) == make_report()


def test_report_json_has_the_agreed_keys() -> None:
    data = json.loads(make_report().to_json())
    assert {"name", "date", "device", "versions", "seeds", "recipe_sha256", "rows"} <= set(data)
    agreed = {
        "model", "nfe", "images", "fid", "kid", "clip_score", "caption_accuracy", "diversity", "ms_per_image",
        "train_seconds", "peak_gib",
    }  # fmt: skip
    assert agreed <= set(data["rows"][0])
    assert data["rows"][0]["peak_gib"] is None


def test_saving_and_loading_gives_the_same_report(tmp_path: Path) -> None:
    report.save_report(make_report(), tmp_path / "report")
    assert report.load_report(tmp_path / "report") == make_report()
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == ["report.json", "report.md"]


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": []}', '{"rows": [{"no_such": 1}]}'])
def test_a_broken_report_is_a_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(UserError, match="stepdistill bench") as raised:
        report.load_report(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_a_missing_report_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"report\.json"):
        report.load_report(tmp_path)


def test_fid_of_few_images_is_named_with_their_number_and_warned_about() -> None:
    few, many = make_report(512).to_markdown(), make_report(2048).to_markdown()
    assert "| FID-512 |" in few
    assert "Warning" in few
    assert "| FID |" in many
    assert "Warning" not in many


def test_markdown_leaves_out_empty_columns_and_escapes_bars() -> None:
    text = make_report().to_markdown()
    assert "peak GiB" not in text
    assert "training, s" in text
    assert "student \\| 1 step" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1


def test_the_terminal_table_has_a_row_for_each_model() -> None:
    from rich.console import Console

    console = Console(width=200, record=True, file=io.StringIO())
    console.print(replace(make_report(), rows=(*make_report().rows, report.Row("mine [bold]"))).to_table())
    text = console.export_text()
    assert "FID-512" in text
    assert all(row.model in text for row in make_report().rows)
    assert "mine [bold]" in text


def test_the_pareto_picture_is_drawn_even_without_times(tmp_path: Path) -> None:
    plots.pareto(make_report(), tmp_path / "all.png")
    bare = replace(make_report(), rows=(report.Row("only", nfe=1.0, fid=3.0), report.Row("not measured")))
    plots.pareto(bare, tmp_path / "bare.png")
    for name in ("all.png", "bare.png"):
        assert min(Image.open(tmp_path / name).size) >= 400


def test_only_models_that_no_other_beats_are_on_the_front() -> None:
    assert plots.dominates((1, 2), (1, 3))
    assert plots.dominates((1, 2), (2, 2))
    assert not plots.dominates((1, 3), (2, 2))
    assert not plots.dominates((1, 2), (1, 2))


def test_the_sample_grid_shows_every_model_and_prompt(tmp_path: Path) -> None:
    samples = {name: torch.full((3, 2, 3, 64, 64), value) for name, value in (("dark", 0.25), ("bright", 0.75))}
    plots.sample_grid(samples, ["a red circle", "a big blue star on a white background " * 3, "b"], tmp_path / "s.png")
    image = Image.open(tmp_path / "s.png").convert("L")
    counts = image.histogram()
    dark, bright = sum(counts[60:68]), sum(counts[187:195])
    assert dark == pytest.approx(bright, rel=0.05)
    assert dark > 10_000


def test_tables_are_rendered_between_their_markers(tmp_path: Path, render_tables: ModuleType) -> None:
    results, document = tmp_path / "results", tmp_path / "README.md"
    results.mkdir()
    (results / "quick.json").write_text(make_report().to_json())
    document.write_text("before\n<!-- results:quick -->\nold\n<!-- /results -->\nafter\n")
    arguments = ["--results", str(results), str(document)]
    assert render_tables.main([*arguments, "--check"]) == 1
    assert "old" in document.read_text()
    assert render_tables.main(arguments) == 0
    text = document.read_text()
    assert text.startswith("before\n<!-- results:quick -->\n")
    assert text.endswith("<!-- /results -->\nafter\n")
    assert "| teacher, 25 steps |" in text
    assert "old" not in text
    assert render_tables.main([*arguments, "--check"]) == 0


def test_a_marker_without_results_or_without_end_is_an_error(tmp_path: Path, render_tables: ModuleType) -> None:
    document = tmp_path / "README.md"
    start = "<!-- results:none -->\n"
    for text, reason in ((f"{start}<!-- /results -->\n", "none.json"), (start, "no end")):
        document.write_text(text)
        with pytest.raises(SystemExit, match=reason):
            render_tables.main(["--results", str(tmp_path), str(document)])


def test_assets_are_looked_for_in_the_checkout_and_in_the_wheel(tmp_path: Path, monkeypatch) -> None:
    checkout, wheel = tmp_path / "assets", tmp_path / "site/_assets"
    monkeypatch.setattr(assets, "_PLACES", (checkout, wheel))
    with pytest.raises(UserError, match="found neither at") as raised:
        assets.assets_path("shapes", "teacher")
    assert str(checkout) in str(raised.value)
    assert str(wheel) in str(raised.value)
    (wheel / "shapes/teacher").mkdir(parents=True)
    assert assets.assets_path("shapes", "teacher") == wheel / "shapes/teacher"
    monkeypatch.chdir(tmp_path / "site")
    assert assets.resolve_model_path("assets/shapes/teacher") == str(wheel / "shapes/teacher")


def test_model_paths_and_hub_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    assert assets.resolve_model_path(str(tmp_path)) == str(tmp_path)
    assert assets.resolve_model_path("owner/some-model_v1.5") == "owner/some-model_v1.5"
    with pytest.raises(UserError, match="no such file or folder"):
        assets.resolve_model_path("./no/such/folder")


def test_a_marker_can_choose_models_of_a_table(tmp_path: Path, render_tables: ModuleType) -> None:
    names = ["teacher, 25 steps", "vsd", "vsd_lora", "sid, 4 steps"]
    rows = [{"model": name, "nfe": n} for n, name in enumerate(names)]
    (tmp_path / "all.json").write_text(json.dumps({"rows": rows}))
    page = tmp_path / "page.md"
    page.write_text("<!-- results:all rows:sid,teacher,vsd -->\n<!-- /results -->\n")
    arguments = ["--results", str(tmp_path), str(page)]
    assert render_tables.main(arguments) == 0
    shown = [line.split(" | ")[0] for line in page.read_text().splitlines() if line.startswith("| ")]
    assert shown[2:] == ["| teacher, 25 steps", "| vsd", "| sid, 4 steps"]
    assert render_tables.main([*arguments, "--check"]) == 0
    page.write_text("<!-- results:all rows:lcm -->\n<!-- /results -->\n")
    with pytest.raises(SystemExit, match=r"all\.json has no row of lcm"):
        render_tables.main(arguments)
