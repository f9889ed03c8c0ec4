"""The speed script: what its ratios are of, and what it says of one that is above its limit."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import speed
from stepdistill.bench.generate import ModelUnderTest


def options(*words: object) -> argparse.Namespace:
    return speed.parsed(["--rounds", "1", *map(str, words)])


def test_a_ratio_is_the_median_of_the_rounds_own() -> None:
    found = speed.row("m", "x", [3.0, 10.0, 5.0], [1.0, 5.0, 5.0], 2.0)
    assert (found["ratio"], found["passed"], found["seconds"]) == (2.0, True, 5.0)
    assert found["rounds"] == [(3.0, 1.0), (10.0, 5.0), (5.0, 5.0)]
    assert speed.row("m", "x", [3.0], [1.0], 2.0)["passed"] is False
    assert speed.row("m", "x", [3.0], [1.0], None)["passed"] is None


def test_both_sides_take_turns_after_the_warm_up() -> None:
    played: list[str] = []
    args = argparse.Namespace(device="cpu", rounds=2)
    ours, bare = speed.in_turns(lambda: played.append("a"), lambda: played.append("b"), args, warmup=1)
    assert played == ["a", "b"] * 3
    assert (len(ours), len(bare)) == (2, 2)


def test_one_image_needs_the_denoiser_and_the_decoder_once_on_both_sides(
    sd_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    load = speed.load_pipeline

    def watched(model: ModelUnderTest, *, device: str) -> Any:
        pipeline: Any = load(model, device=device)
        for name, part in (
            ("unet", pipeline.unet),
            ("decoder", pipeline.vae.decoder),
            ("text", pipeline.text_encoder),
        ):
            part.register_forward_hook(lambda *_, name=name: calls.append(name))
        return pipeline

    monkeypatch.setattr(speed, "load_pipeline", watched)
    (found,) = speed.latency(options("--model", sd_folder))
    assert calls == ["text"] + ["unet", "decoder"] * 2 * 4, "three rounds to warm up and one that counts, two sides"
    assert found["limit"] == 1.05
    assert found["ratio"] > 0.3


def test_a_benchmarks_cell_makes_the_images_that_bare_sampling_makes(
    teacher: Path, evaluator: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[list[torch.Tensor]] = [[], []]
    call = speed.Painter.__call__

    def watched(self: Any, jobs: Sequence[tuple[int, int]]) -> torch.Tensor:
        images = call(self, jobs)
        if len(jobs) > 1:  # not those that latency is measured with
            made[self.model.steps - 1].append(images)
        return images

    monkeypatch.setattr(speed.Painter, "__call__", watched)
    args = options("--model", teacher, "--evaluator", evaluator, "--prompts", 2, "--batch-size", 16, "--steps", 1, 2)
    found = list(speed.throughput(args))
    assert [row["model"] for row in found] == [f"{teacher.name}, {steps} steps" for steps in (1, 2)]
    for images in made:
        ours, *again, bare = images
        torch.testing.assert_close(ours, bare)
        assert len(again) <= 1, "a first batch alone is made twice, to warm up"


def test_the_command_keeps_other_rows_and_counts_what_is_too_slow(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "speed.json"
    file.write_text(json.dumps({"rows": [{"model": "m", "measure": "x", "ratio": 9}, {"model": "n", "measure": "x"}]}))
    monkeypatch.setattr(speed, "latency", lambda args: iter([speed.row("m", "x", [2.0], [1.0], 1.05)]))
    monkeypatch.setattr(speed, "throughput", lambda args: iter([speed.row("k", "y", [1.0], [1.0], 1.1)]))
    assert speed.main(["--parts", "latency", "throughput", "--output", str(file)]) == 1
    rows = json.loads(file.read_text())["rows"]
    assert [(row["model"], row.get("ratio")) for row in rows] == [("n", None), ("m", 2.0), ("k", 1.0)]


def test_iterations_are_measured_as_the_overhead_script_does(sd_folder: str) -> None:
    args = options("--teacher", sd_folder, "--objectives", "vsd", "--batch-size", 2)
    (found,) = speed.training(args)
    assert (found["model"], found["limit"]) == ("vsd, full", None)
    assert found["ratio"] == pytest.approx(found["seconds"] / found["seconds_bare"])


def test_a_network_of_published_shape_is_made_for_the_measurement_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def write(name: str, folder: Path, side: int) -> str:
        assert (name, side) == ("sd15", 32)
        folder.mkdir()
        made.append(folder)
        return str(folder)

    def latency(args: argparse.Namespace) -> list[dict[str, Any]]:
        assert Path(args.model).is_dir()
        return [speed.row(Path(args.model).name, "latency", [2.0], [1.0], speed.LATENCY_LIMIT)]

    monkeypatch.setattr(speed, "write_teacher", write)
    monkeypatch.setattr(speed, "latency", latency)
    output = tmp_path / "speed.json"
    assert speed.main(["--parts", "latency", "--random", "sd15", "--side", "32", "--output", str(output)]) == 1
    assert json.loads(output.read_text())["rows"][0]["model"] == "sd15, random weights, 32 px"
    assert not made[0].exists()
