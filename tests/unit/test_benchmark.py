"""The benchmark as a whole on tiny networks of random weights: what it counts, what it writes, what it refuses."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from stepdistill.bench import benchmark, report
from stepdistill.bench.generate import ModelUnderTest, generate_images, image_seed, load_pipeline
from stepdistill.bench.metrics.clip_score import ClipEvaluator
from stepdistill.bench.prompts import ShapesProtocol, render_scenes
from stepdistill.errors import UserError


pytestmark = pytest.mark.usefixtures("quiet")
PROMPTS = ["a red circle", "a blue ring on white", "a shape"]


def under_test(teacher: Path, **changes: object) -> ModelUnderTest:
    return replace(ModelUnderTest("teacher", str(teacher), steps=2, guidance_scale=3.0), **changes)


def made(model: ModelUnderTest, **changes: object):
    options = {"images_per_prompt": 2, "batch_size": 4} | changes
    return generate_images(load_pipeline(model), PROMPTS, model=model, **options)


@pytest.mark.parametrize(("steps", "guidance", "nfe"), [(1, 1.0, 1), (1, 3.0, 2), (3, 1.0, 3), (2, 3.0, 4)])
def test_a_doubled_batch_counts_twice(teacher: Path, steps: int, guidance: float, nfe: int) -> None:
    assert made(under_test(teacher, steps=steps, guidance_scale=guidance)).nfe == nfe


@pytest.mark.parametrize("scheduler", ["ddim", "lcm"])
def test_images_do_not_depend_on_the_batch_size(teacher: Path, scheduler: str) -> None:
    # LCM draws fresh noise at every step, so it is the harder case.
    model = under_test(teacher, scheduler=scheduler, steps=3, guidance_scale=1.0)
    one, many = made(model, batch_size=1), made(model, batch_size=6)
    assert one.images.shape == (6, 3, 64, 64)
    torch.testing.assert_close(one.images, many.images, atol=2e-4, rtol=0)


def test_images_differ_by_prompt_number_image_number_and_seed(teacher: Path) -> None:
    model = under_test(teacher, steps=1)
    images = made(model).images.flatten(1)
    distances = torch.cdist(images, images) + 1e3 * torch.eye(6)
    assert distances.min() > 1e-3
    assert (made(model, seed=1).images.flatten(1) - images).abs().amax() > 1e-3
    assert len({image_seed(s, p, k) for s in range(5) for p in range(5) for k in range(5)}) == 125


def test_images_are_in_range_with_time_and_no_memory_on_the_cpu(teacher: Path) -> None:
    result = made(under_test(teacher))
    assert result.images.dtype == torch.float32
    assert result.images.min() >= 0
    assert result.images.max() <= 1
    assert result.ms_per_image > 0
    assert result.peak_gib is None


def test_a_lora_changes_the_images(teacher: Path, tmp_path: Path) -> None:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet = UNet2DConditionModel.from_pretrained(teacher / "unet", torch_dtype=torch.float32)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(unet))
    plain, tuned = made(under_test(teacher)), made(under_test(teacher, lora=str(tmp_path)))
    assert tuned.nfe == plain.nfe
    assert (plain.images - tuned.images).abs().max() > 1e-4


def test_a_scheduler_may_come_from_a_folder(teacher: Path, tmp_path: Path) -> None:
    LCMScheduler(original_inference_steps=4).save_pretrained(tmp_path)
    scheduler = load_pipeline(under_test(teacher, scheduler=str(tmp_path))).scheduler
    assert isinstance(scheduler, LCMScheduler)
    assert scheduler.config.original_inference_steps == 4


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"path": "./no/such/folder"}, "no such file or folder"),
        ({"scheduler": "best"}, "neither one of"),
        ({"precision": "fp8"}, "fp8"),
        ({"lora": "./no/such/lora"}, "LoRA"),
    ],
)
def test_what_cannot_be_loaded_is_a_clear_error(teacher: Path, changes: dict, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        load_pipeline(under_test(teacher, **changes))


def test_a_folder_without_a_pipeline_is_a_clear_error(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"teacher: .*cannot be loaded as a Diffusers pipeline"):
        load_pipeline(under_test(teacher, path=str(tmp_path)))


def test_a_benchmark_writes_table_numbers_and_pictures(teacher: Path, evaluator: Path, tmp_path: Path, capsys) -> None:
    protocol = ShapesProtocol(prompts=3, images_per_prompt=2, reference=20, evaluator=str(evaluator))
    models = [under_test(teacher), under_test(teacher, name="fast", steps=1, guidance_scale=1.0, train_seconds=9.0)]
    told: list[benchmark.Progress] = []
    result = benchmark.run_benchmark(
        models, protocol=protocol, output=tmp_path / "report", batch_size=4, seed=5, on_progress=told.append,
        provenance=benchmark.Provenance("tiny", "cd" * 32),
    )  # fmt: skip
    assert capsys.readouterr().out == ""
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == [
        "cells", "pareto.png", "report.html", "report.json", "report.md", "samples.png",
    ]  # fmt: skip
    assert report.load_report(tmp_path / "report").rows == result.rows
    first, second = result.rows
    assert (first.model, first.nfe, first.images) == ("teacher", 4.0, 6)
    assert (second.model, second.nfe, second.train_seconds) == ("fast", 1.0, 9.0)
    assert all(row.fid > 0 and row.kid is not None and 0 <= row.caption_accuracy < 0.7 for row in result.rows)
    assert result.seeds == {"prompts": protocol.seed, "noise": 5}
    assert (result.name, result.recipe_sha256) == ("tiny", "cd" * 32)
    assert result.protocol["reference"] == 20
    assert {p.label for p in told} == {"real images", "teacher", "fast"}
    assert told[-1] == benchmark.Progress("fast", 6, 6)
    assert set(first.times) == {"text", "denoiser", "vae"} and min(first.times.values()) > 0
    assert first.times["denoiser"] + first.times["vae"] <= first.ms_per_image
    assert first.latency_ms > 0 and first.images_per_second > 0
    unet = UNet2DConditionModel.from_pretrained(teacher / "unet")
    assert first.parameters == sum(p.numel() for p in unet.parameters())
    for row in result.rows:
        for name in ("fid", "kid", "clip_score", "caption_accuracy", "precision"):
            low, high = row.intervals[name]
            assert low <= getattr(row, name) <= high, name


def test_real_scenes_get_the_best_scores(evaluator: Path) -> None:
    scorer = benchmark.Scorer(ShapesProtocol(prompts=12, images_per_prompt=4, reference=200, evaluator=str(evaluator)))
    real = render_scenes([scene for scenes in scorer.completions for scene in scenes])
    scores = scorer.judge_scores(real)
    assert scores["caption_accuracy"] == 1
    assert scores["images_all_correct"] == 1
    assert scores["diversity"] == pytest.approx(1, abs=0.02)
    noise = torch.rand(real.shape, generator=torch.Generator().manual_seed(0))
    # Noise is one connected thing, which is the right number of objects for half of the prompts.
    assert scorer.judge_scores(noise)["caption_accuracy"] < 0.2
    features = ClipEvaluator(evaluator).image_features(noise)
    assert scorer.feature_scores(features)["fid"] > 5 * scorer.real_scores()["fid"]


def test_a_few_images_have_no_precision_and_no_recall(evaluator: Path) -> None:
    scorer = benchmark.Scorer(ShapesProtocol(prompts=1, images_per_prompt=3, reference=20, evaluator=str(evaluator)))
    assert scorer.real_scores().keys() == {"fid", "kid", "clip_score"}


def test_real_scenes_are_scored_against_their_own_prompts(evaluator: Path) -> None:
    scorer = benchmark.Scorer(ShapesProtocol(prompts=12, images_per_prompt=2, reference=20, evaluator=str(evaluator)))
    real = render_scenes([scene for scenes in scorer.completions for scene in scenes])
    assert scorer.judge_scores(real.roll(2, 0))["caption_accuracy"] < 0.7


@pytest.mark.parametrize(
    ("names", "batch_size", "reason"), [((), 4, "no model"), (("a", "a"), 4, "two models"), (("a",), 0, "batch_size")]
)
def test_impossible_requests_are_refused_before_anything_is_loaded(
    tmp_path: Path, names: tuple[str, ...], batch_size: int, reason: str
) -> None:
    models = [ModelUnderTest(name, "./nowhere", 1, 1.0) for name in names]
    with pytest.raises(UserError, match=reason):
        benchmark.run_benchmark(models, protocol=ShapesProtocol(), output=tmp_path, batch_size=batch_size)


@pytest.mark.parametrize("changes", [{"prompts": 0}, {"images_per_prompt": 0}, {"reference": 1}])
def test_a_protocol_without_images_is_refused(changes: dict) -> None:
    with pytest.raises(UserError, match=next(iter(changes))):
        ShapesProtocol(**changes)


def test_a_model_that_diverged_is_named(evaluator: Path, teacher: Path, tmp_path: Path, monkeypatch) -> None:
    nan = torch.tensor(torch.nan)
    monkeypatch.setattr(benchmark.Painter, "__call__", lambda self, jobs: nan.expand(len(jobs), 3, 64, 64))
    protocol = ShapesProtocol(prompts=3, images_per_prompt=2, reference=20, evaluator=str(evaluator))
    with pytest.raises(UserError, match="broken"):
        benchmark.run_benchmark([under_test(teacher, name="broken")], protocol=protocol, output=tmp_path)


@pytest.mark.parametrize(
    ("step", "place"),
    [
        ("stepdistill.bench.cells.save_file", r"cells/\S+"),
        ("stepdistill.bench.cells.Cell.remember", r"cells/\S+"),
        ("stepdistill.bench.report.save_report", ""),
        ("stepdistill.bench.plots.pareto", ""),
        ("stepdistill.bench.page.save_page", ""),
    ],
)
def test_a_full_disk_is_a_clear_error_wherever_a_benchmark_writes(
    step: str, place: str, evaluator: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some/file")

    monkeypatch.setattr(step, full)
    protocol = ShapesProtocol(prompts=2, images_per_prompt=1, reference=4, evaluator=str(evaluator))
    named = rf"^{re.escape(str(tmp_path))}/?{place} could not be written \(No space left on device\); make room"
    with pytest.raises(UserError, match=named):
        benchmark.run_benchmark([under_test(teacher, steps=1)], protocol=protocol, output=tmp_path)
