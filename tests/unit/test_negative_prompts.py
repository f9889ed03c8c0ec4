"""The benchmark of negative prompts, on scenes that are rendered as if a model of known faults had drawn them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import negative_prompts
from benchmarks.negative_prompts import WITHOUT, Maker, leaves_open, measured, reached, shows, summary
from stepdistill.attention import NAG, NASA
from stepdistill.bench.generate import Generated, ModelUnderTest
from stepdistill.bench.metrics.shapes_judge import Reading
from stepdistill.bench.prompts import ShapesProtocol, render_scenes
from stepdistill.data import shapes
from stepdistill.data.shapes import BACKGROUNDS, COLORS, Demand, ObjectDemand


PER_PROMPT = 2
WORDINGS = {"background": "on a {} background", "color": "a {} shape"}


def objects(*colors: str | None) -> tuple[ObjectDemand, ...]:
    return tuple(ObjectDemand("circle", color, None) for color in colors)


class Painter:
    """Draws what is asked for, everything open at random; a strength s leaves out the named value with odds s."""

    def __init__(self, cases: Sequence[shapes.CaptionedScene], *, spoil: float = 0.0) -> None:
        self._demands = {case.caption: case.demand for case in cases}
        self._spoil = spoil
        self.calls: list[tuple[str, Any]] = []

    def __call__(self, captions: Sequence[str], negative: str, rule: Any) -> Generated:
        self.calls.append((negative, rule))
        rng = random.Random(f"{negative}/{rule}")
        scenes = [self._scene(self._demands[c], negative, rule, rng) for c in captions for _ in range(PER_PROMPT)]
        return Generated(render_scenes(scenes), 1.0, 1.0, None)

    def _scene(self, demand: Demand, negative: str, rule: Any, rng: random.Random) -> shapes.Scene:
        avoided = [value for value in (*BACKGROUNDS, *COLORS) if value in negative.split()]
        if rule is not None and rng.random() < self._spoil:
            demand = shapes.open_demand(3 - len(demand.objects))  # a wrong number of objects at least
        strict = rule is not None and rng.random() < rule.alpha
        while True:
            scene = shapes.complete_scene(demand, rng)
            seen = {scene.background, *(o.color for o in scene.objects)}
            if not (strict and seen & set(avoided)):
                return scene


def test_a_prompt_counts_for_what_it_neither_names_nor_excludes() -> None:
    assert leaves_open(Demand(objects("red"), None, None), "background", "white")
    assert not leaves_open(Demand(objects("red"), "black", None), "background", "white")
    assert leaves_open(Demand(objects("red", None), None, None), "color", "blue")
    assert not leaves_open(Demand(objects("red", None), None, None), "color", "red")
    assert not leaves_open(Demand(objects("red"), None, None), "color", "blue")


def test_a_colour_is_one_of_any_object_and_a_background_is_none() -> None:
    scene = shapes.complete_scene(Demand(objects("red", "blue"), "navy", None), random.Random(0))
    reading = Reading.of_scene(scene)
    assert [shows(reading, "color", c) for c in ("red", "blue", "navy")] == [True, True, False]
    assert [shows(reading, "background", b) for b in ("navy", "black")] == [True, False]


def test_what_a_negative_prompt_leaves_out_is_measured_as_less_frequent_at_the_same_accuracy() -> None:
    cases = ShapesProtocol(prompts=32).captions()
    painter = Painter(cases)
    rules = {"NASA 0": NASA(0.0), "NASA 1": NASA(1.0)}
    details = list(measured(painter, cases, rules, WORDINGS))
    assert len(details) == 3 * (len(BACKGROUNDS) + len(COLORS))
    unsteered = [call for call in painter.calls if call[1] is None]
    drawn_once = [negative for negative, _ in unsteered if "background" in negative]
    assert len(drawn_once) == 1, "the prompts that leave the background open are the same for all five"
    assert {"a red shape", "an orange shape"} <= {negative for negative, _ in painter.calls}
    rows = {(row["kind"], row["model"]): row for row in summary(details)}
    assert rows["background", WITHOUT]["frequency"] == pytest.approx(1 / 5), "every image has one of the five"
    for kind in WORDINGS:
        gone, kept = rows[kind, "NASA 1"], rows[kind, "NASA 0"]
        assert (gone["frequency"], gone["ratio"], gone["worst_ratio"], gone["passed"]) == (0, 0, 0, True)
        assert (gone["caption_accuracy"], gone["accuracy_change"], gone["nfe"]) == (1.0, 0.0, 1.0)
        assert 0.4 < kept["ratio"] < 2 and not kept["passed"]
        assert "ratio" not in rows[kind, WITHOUT]
    assert reached(list(rows.values()))
    assert not reached([row for row in rows.values() if row["model"] != "NASA 1" or row["kind"] == "color"])


def test_a_loss_of_caption_accuracy_fails_the_strength_that_causes_it() -> None:
    cases = ShapesProtocol(prompts=16).captions()
    details = list(measured(Painter(cases, spoil=0.3), cases, {"NASA 1": NASA(1.0)}, {"color": "a {} shape"}))
    (row,) = (row for row in summary(details) if row["model"] != WITHOUT)
    assert row["accuracy_change"] < -0.02
    assert row["passed"] is False


def test_what_never_appears_has_no_ratio() -> None:
    row = {"kind": "color", "value": "red", "nfe": 1.0, "images": 4, "frequency": 0.0, "caption_accuracy": 1.0}
    found = summary([{**row, "model": WITHOUT}, {**row, "model": "NASA 1"}])[1]
    assert (found["ratio"], found["worst_ratio"], found["passed"]) == (None, None, False)


def test_the_model_is_called_once_per_image_from_the_same_noise(sd_folder: str) -> None:
    make = Maker(ModelUnderTest("student", sd_folder, steps=1, guidance_scale=1.0), PER_PROMPT, batch=3)
    captions = ["a", "b"]
    plain, steered = make(captions, "c", None), make(captions, "c", NAG(8.0))
    assert (plain.nfe, steered.nfe) == (1.0, 1.0)
    assert torch.equal(make(captions, "c", NASA(0.0)).images, plain.images)
    assert (steered.images - plain.images).abs().max() > 1e-4


def test_the_results_have_the_form_of_the_others_and_no_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run-1"
    (run / "pipeline").mkdir(parents=True)
    (run / "pipeline/model_index.json").write_text("{}")
    facts = {"steps": 1, "guidance_scale": 1.0, "recipe_sha256": "abc"}
    (run / "pipeline/distillation_config.json").write_text(json.dumps(facts))
    called: list[ModelUnderTest] = []

    def maker(model: ModelUnderTest, images_per_prompt: int, **_: Any) -> Painter:
        called.append(model)
        return Painter(ShapesProtocol(prompts=12).captions())

    monkeypatch.setattr(negative_prompts, "Maker", maker)
    output = tmp_path / "results/negative_prompts.json"
    words = [str(run), "--kinds", "background", "--nasa", "1", "--nag", "--prompts", "12", "--output", str(output)]
    assert negative_prompts.main(words) == 0
    assert (called[0].steps, called[0].guidance_scale) == (1, 1.0)
    data = json.loads(output.read_text())
    assert {"name", "date", "device", "versions", "seeds", "recipe_sha256", "rows"} <= set(data)
    assert (data["name"], data["recipe_sha256"], data["protocol"]["student"]) == ("negative_prompts", "abc", "run-1")
    assert [row["model"] for row in data["rows"]] == [WITHOUT, "NASA 1"]
    assert len(data["values"]) == 2 * len(BACKGROUNDS)
    assert str(tmp_path) not in output.read_text()
    assert "| NASA 1 | 1 |" in capsys.readouterr().out
