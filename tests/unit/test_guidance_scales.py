"""The script that measures a guidance adapter: what is compared with what, and when it passes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import guidance_adapter as script
from stepdistill.bench.report import Row
from stepdistill.recipe import Recipe


PAIRS = {"count": 4, "steps": 2, "guidance": [1.0, 4.0], "states": "all", "predictions": True}


def written(folder: Path, **make_pairs: Any) -> Path:
    """A run's folder with nothing in it but the recipe."""
    recipe = Recipe.load("shapes/agd", ["output=" + str(folder)])
    changed = {**recipe.model_dump(mode="json"), "data": {"prompts": "shapes", "count": 4, "make_pairs": make_pairs}}
    folder.mkdir()
    (folder / "recipe.yaml").write_text(Recipe.model_validate(changed).to_yaml())
    return folder


@pytest.mark.parametrize(
    ("fid", "accuracy", "passes"),
    [(4.0, 0.9, True), (4.11, 0.8901, True), (4.13, 0.9, False), (4.0, 0.8899, False), (3.0, 0.95, True)],
)
def test_three_percent_of_fid_and_a_point_of_accuracy_may_be_lost(fid: float, accuracy: float, passes: bool) -> None:
    found = script.compared({"fid": fid, "caption_accuracy": accuracy}, {"fid": 4.0, "caption_accuracy": 0.9})
    assert found["passed"] is passes
    assert found["fid_ratio"] == pytest.approx(fid / 4)
    assert found["accuracy_loss"] == pytest.approx(0.9 - accuracy, abs=1e-9)


def test_every_scale_is_measured_with_guidance_and_with_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[Any] = []

    def benchmark(given: list[Any], **_: Any) -> Any:
        models.extend(given)
        # What the adapter makes at 6 misses by far; all else is equal.
        rows = [
            Row(m.name, fid=9.0 if m.adapter and m.guidance_scale == 6 else 4.0, caption_accuracy=0.9) for m in given
        ]
        return SimpleNamespace(rows=rows)

    monkeypatch.setattr(script, "run_benchmark", benchmark)
    run = written(tmp_path / "run", **PAIRS)
    (tmp_path / "other" / "pipeline").mkdir(parents=True)
    (tmp_path / "other" / "pipeline" / "model_index.json").write_text("{}")
    output = tmp_path / "out.json"
    words = [str(run), "--sibling", str(tmp_path / "other"), "--scales", "2", "6", "--sibling-scales", "2"]
    assert script.main([*words, "--output", str(output)]) == 1
    called = [(Path(m.path).name, m.guidance_scale, m.adapter is not None, m.steps) for m in models]
    teacher = [
        ("teacher", 2.0, False, 25),
        ("teacher", 2.0, True, 25),
        ("teacher", 6.0, False, 25),
        ("teacher", 6.0, True, 25),
    ]
    assert called == [*teacher, ("pipeline", 2.0, False, 25), ("pipeline", 2.0, True, 25)]
    rows = json.loads(output.read_text())["rows"]
    assert [row.get("passed") for row in rows] == [None, True, None, False, None, True]
    assert [row["trained"] for row in rows if "trained" in row] == [True, False, True]
    assert [row["checkpoint"] for row in rows] == ["teacher"] * 4 + ["sibling"] * 2


def test_a_run_whose_scales_are_not_known_is_refused(tmp_path: Path) -> None:
    run = written(tmp_path / "run", count=4, steps=2)
    with pytest.raises(SystemExit, match="guidance is missing"):
        script.trained_range(Recipe.load(run / "recipe.yaml"))
    one = written(tmp_path / "one", **{**PAIRS, "guidance": 3.0})
    assert script.trained_range(Recipe.load(one / "recipe.yaml")) == (3.0, 3.0)
