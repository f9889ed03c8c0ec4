"""report.html in a real browser: sorting, pointing, choosing and sliding, and that hostile names stay text.

Needs Chromium; `CHROMIUM` may name it. The page is opened from disk with one more script, which plays the user and
writes down what it sees.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from stepdistill.bench import page
from tests.unit.test_page import CAPTIONS, HOSTILE, make_report, make_samples


NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
EARLY = """
window.problems = [];
addEventListener("error", (event) => window.problems.push(event.message));
addEventListener("securitypolicyviolation", (event) => window.problems.push(event.violatedDirective));
"""
USER = """
const find = (selector) => document.querySelector(selector);
const models = () => [...find("#results").tBodies[0].rows].map((row) => row.cells[0].dataset.value);
const shown = (element) => element.offsetParent !== null;
const visible = () => [...document.querySelectorAll("[data-nfe]")].slice(0, 3).map(shown);
const said = {};
const heading = (text) => [...document.querySelectorAll("th button")].find((b) => b.textContent === text);
heading("FID-512").click(); said.byFid = models();
heading("FID-512").click(); said.byFidDown = models();
heading("CLIP score").click(); said.byClip = models();
said.direction = heading("CLIP score").parentElement.getAttribute("aria-sort");
const point = find("#point-fid-nfe-2");
point.querySelector("use").dispatchEvent(new MouseEvent("mousemove", {bubbles: true, clientX: 50, clientY: 60}));
said.hint = find("#hint").hidden ? "" : find("#hint").textContent;
said.marked = [...document.querySelectorAll("tr.marked")].map((row) => row.dataset.row);
point.dispatchEvent(new MouseEvent("mouseleave"));
said.hintLater = find("#hint").hidden;
said.figures = [...document.querySelectorAll("figure")].map(shown);
find("#quality").value = "clip_score"; find("#quality").dispatchEvent(new Event("input"));
said.figuresLater = [...document.querySelectorAll("figure")].map(shown);
const slide = (value) => { find("#nfe").value = value; find("#nfe").dispatchEvent(new Event("input")); };
said.all = visible();
slide(1); said.two = visible(); said.limit = find("#limit").textContent;
slide(0); said.one = visible(); said.needs = find(".needs").textContent;
said.pictures = [...document.images].every((image) => image.complete && image.naturalWidth === 64);
said.hacked = window.hacked === undefined ? null : window.hacked;
said.problems = window.problems;
const out = document.createElement("pre");
out.id = "said"; out.textContent = JSON.stringify(said);
document.body.append(out);
"""


def chromium() -> str | None:
    """Where a browser of the family is: named, on the path, or in Playwright's cache."""
    cached = sorted(Path.home().glob(".cache/ms-playwright/chromium*/chrome*/*"), reverse=True)
    places = [os.environ.get("CHROMIUM"), *map(shutil.which, NAMES), *(str(p) for p in cached if p.name in NAMES)]
    return next(filter(None, places), None)


def with_scripts(text: str) -> str:
    """The page with the user's scripts, which its policy is told to allow."""
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in (EARLY, USER)]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    # In attributes the quotes of the policy are escaped.
    text = re.sub(r"script-src ", f"script-src {html.escape(allowed)} ", text, count=1)
    text = text.replace("<title>", f"<script>{EARLY}</script>\n<title>", 1)
    return text.replace("</body>", f"<script>{USER}</script>\n</body>", 1)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    browser = chromium()
    if browser is None:
        pytest.skip("no Chromium here; set CHROMIUM to its path")
    folder = tmp_path_factory.mktemp("page")
    file = folder / "report.html"
    file.write_text(with_scripts(page.render_page(make_report(), make_samples(), CAPTIONS)), encoding="utf-8")
    words = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom",
             "--virtual-time-budget=2000", f"--user-data-dir={folder / 'profile'}", file.as_uri()]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    found = re.search(r'<pre id="said">(.*?)</pre>', done.stdout, re.S)
    assert found is not None, f"the script did not come to its end:\n{done.stderr[-2000:]}"
    return json.loads(html.unescape(found[1]))


def test_headings_sort_the_table_best_first(said: dict[str, Any]) -> None:
    by_fid = ["teacher, 25 steps", HOSTILE[0], "images made elsewhere", "teacher, 1 step"]
    assert said["byFid"] == by_fid
    assert said["byFidDown"] == by_fid[::-1]
    assert said["byClip"] == ["teacher, 25 steps", HOSTILE[0], "teacher, 1 step", "images made elsewhere"]
    assert said["direction"] == "descending"


def test_pointing_at_a_mark_tells_its_figures(said: dict[str, Any]) -> None:
    assert said["hint"].splitlines()[0] == HOSTILE[0]
    assert "FID-512: 5.5" in said["hint"].splitlines()
    assert said["marked"] == ["2"]
    assert said["hintLater"] is True


def test_choosing_a_quality_exchanges_the_plots(said: dict[str, Any]) -> None:
    assert said["figures"] == [True, False]
    assert said["figuresLater"] == [False, True]


def test_the_slider_shows_what_so_many_calls_buy(said: dict[str, Any]) -> None:
    # Of the first prompt: the teacher at 2 and 50 calls, the student at 1.
    assert said["all"] == [False, True, True]
    assert said["two"] == [True, False, True]
    assert said["one"] == [False, False, True]
    assert said["limit"] == "at most 2 network calls per image"
    assert said["needs"] == "needs 2 calls"
    assert said["pictures"] is True


def test_nothing_in_the_report_runs_and_nothing_is_blocked(said: dict[str, Any]) -> None:
    assert said["hacked"] is None
    assert said["problems"] == []
