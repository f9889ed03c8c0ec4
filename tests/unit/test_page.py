"""report.html: what is on the page, that it needs nothing else, and that nothing in a report is taken for HTML."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from stepdistill.bench import page
from stepdistill.bench.report import Report, Row


HOSTILE = [
    "<script>window.hacked = 1</script>",
    '"><img src=x onerror="window.hacked = 1">',
    "</style></script>{{ 7 * 7 }}",
]
CAPTIONS = ["a red circle", HOSTILE[1], "costs $5 or $\\frac"]
ROWS = (
    Row("teacher, 25 steps", 50.0, 512, 4.0, clip_score=61.0, ms_per_image=800.0,
        intervals={"fid": [3.5, 4.5]}, times={"text": 1.0, "denoiser": 790.0, "vae": 9.0}),
    Row("teacher, 1 step", 2.0, 512, 900.0, clip_score=20.0, ms_per_image=33.0),
    Row(HOSTILE[0], 1.0, 512, 5.5, clip_score=60.0, ms_per_image=17.0),
    Row("images made elsewhere", None, 512, 7.0),
)  # fmt: skip


def make_report() -> Report:
    return Report(
        name=HOSTILE[2], date="2026-01-31", device="cpu", versions={"torch": "2.9"}, seeds={"noise": 0},
        recipe_sha256=None, protocol={"kind": HOSTILE[0]}, rows=ROWS,
    )  # fmt: skip


def make_samples(size: int = 64) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {row.model: torch.rand(3, 2, 3, size, size) for row in ROWS[:3]}


@pytest.fixture(scope="module")
def text() -> str:
    return page.render_page(make_report(), make_samples(), CAPTIONS)


class Elements(HTMLParser):
    """All elements with their attributes and the text directly in them."""

    VOID = ("meta", "img", "input", "br", "hr", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str], list[str]]] = []
        self._open: list[tuple[str, dict[str, str], list[str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = (tag, {name: value or "" for name, value in attrs}, [])
        self.found.append(element)
        if tag not in self.VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}, []))

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1][0] == tag, f"</{tag}> closes <{self._open[-1][0]}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open:
            self._open[-1][2].append(data)

    def of(self, tag: str) -> list[tuple[dict[str, str], str]]:
        return [(attributes, "".join(texts).strip()) for name, attributes, texts in self.found if name == tag]


def test_every_figure_is_in_the_table_with_what_it_is_sorted_by(text: str) -> None:
    cells = Elements(text).of("td")
    assert ({"data-value": "4.0"}, "4") in cells
    assert ({"data-value": HOSTILE[0]}, HOSTILE[0]) in cells
    assert ({"data-value": "790.0"}, "790") in cells
    assert ({"data-value": ""}, "-") in cells, "a missing figure has nothing to be sorted by"
    assert ({}, "[3.5, 4.5]") in Elements(text).of("small")
    headings = [(attributes["data-first"], name) for (attributes, _), (_, name)
                in zip(Elements(text).of("th"), Elements(text).of("button"), strict=False)]  # fmt: skip
    assert ("ascending", "FID-512") in headings
    assert ("descending", "CLIP score") in headings, "the best comes first at the first click"


def test_a_report_that_was_made_to_break_the_page_is_shown_as_text(text: str) -> None:
    elements = Elements(text)
    assert len(elements.of("script")) == 1
    assert [name for _, attributes, _ in elements.found for name in attributes if name.startswith("on")] == []
    assert all(attributes["src"].startswith("data:image/") for attributes, _ in elements.of("img"))
    assert elements.of("h1") == [({}, HOSTILE[2])]
    assert "49" not in elements.of("title")[0][1], "the template's language is not read in names"
    assert HOSTILE[0] in elements.of("pre")[0][1].encode().decode("unicode_escape")


def test_the_page_asks_for_nothing_from_outside(text: str) -> None:
    for _, attributes, _ in Elements(text).found:
        for name in ("src", "href", "xlink:href", "action", "data", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:")), attributes
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_the_policy_lets_only_the_pages_own_script_run(text: str) -> None:
    elements = Elements(text)
    ((_, script),) = elements.of("script")
    raw = text.partition("<script>")[2].partition("</script>")[0]
    assert raw.strip() == script
    digest = base64.b64encode(hashlib.sha256(raw.encode()).digest()).decode()
    (policy,) = [attributes["content"] for attributes, _ in elements.of("meta") if "http-equiv" in attributes]
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_every_row_with_both_figures_has_a_mark_in_every_plot(text: str) -> None:
    marks = [
        attributes["id"] for attributes, _ in Elements(text).of("g") if attributes.get("id", "").startswith("point")
    ]
    wanted = {f"point-{quality}-{cost}-{row}" for quality in ("fid", "clip_score")
              for cost in ("nfe", "ms_per_image") for row in (0, 1, 2)}  # fmt: skip
    assert set(marks) == wanted
    assert len(marks) == len(wanted), "an id names one element"
    assert [a["data-quality"] for a, _ in Elements(text).of("figure")] == ["fid", "clip_score"]


def test_samples_of_one_model_share_a_column_with_a_slider_over_their_network_calls(text: str) -> None:
    elements = Elements(text)
    assert ({"scope": "col"}, "teacher") in elements.of("th")
    (slider,) = [a for a, _ in elements.of("input")]
    assert (slider["data-limits"], slider["max"], slider["value"]) == ("1 2 50", "2", "2")
    assert [a["data-nfe"] for a, _ in elements.of("div") if "data-nfe" in a] == ["2", "50", "1"] * 3
    assert len(elements.of("img")) == 3 * 3 * 2
    assert {a["alt"] for a, _ in elements.of("img")} == set(CAPTIONS)


def test_small_samples_keep_every_pixel(text: str) -> None:
    uri = Elements(text).of("img")[2 * 2][0]["src"]  # after the teacher's two images at either number of calls
    stored = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    pixels = make_samples()[ROWS[2].model][0, 0].mul(255).round().byte().permute(1, 2, 0).numpy()
    assert stored.format == "PNG"
    assert (torch.tensor(list(stored.tobytes())) == torch.from_numpy(pixels).flatten()).all()


def test_large_samples_are_made_smaller() -> None:
    samples = {ROWS[0].model: torch.rand(1, 1, 3, 300, 600)}
    ((attributes, _),) = Elements(page.render_page(make_report(), samples, CAPTIONS)).of("img")
    assert (attributes["width"], attributes["height"]) == ("256", "128")
    assert attributes["src"].startswith("data:image/jpeg;base64,")


def test_a_report_without_samples_costs_or_names_still_makes_a_page(tmp_path: Path) -> None:
    bare = replace(make_report(), rows=(Row("only"),))
    page.save_page(bare, {}, [], tmp_path / "report.html")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    elements = Elements((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert elements.of("figure") == elements.of("img") == []


def test_the_order_of_rows_and_the_choice_of_calls_are_right() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no Node.js here")
    calls = """
    console.log(JSON.stringify([
      order(["10", "9", "", "1e-3"], false), order(["10", "9", "", "1e-3"], true),
      order(["b", "a", "c"], false), order(["1", "1", "0"], true),
      affordable([1, 2, 50], 8), affordable([2, 50], 1), affordable([4], 4),
    ]));"""
    script = (page.HERE / "page.js").read_text(encoding="utf-8") + calls
    done = subprocess.run([node, "-e", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[3, 1, 0, 2], [0, 1, 3, 2], [1, 0, 2], [0, 1, 2], 2, None, 4]
