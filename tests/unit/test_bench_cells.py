"""A benchmark's numbers depend neither on batches, nor on processes, nor on being stopped; models of all forms."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from stepdistill.bench import benchmark, protocols, report
from stepdistill.bench.benchmark import Options, Progress, run_benchmark
from stepdistill.bench.cells import Cell, Share
from stepdistill.bench.generate import Cost, ModelUnderTest, Painter, image_seed, load_pipeline
from stepdistill.bench.intervals import Resamples
from stepdistill.bench.metrics import shapes_judge
from stepdistill.bench.metrics.base import Seen
from stepdistill.bench.metrics.figures import ImageDistances
from stepdistill.bench.metrics.networks import as_bytes
from stepdistill.bench.metrics.weights import Weights
from stepdistill.bench.models import at_nfe, identity
from stepdistill.bench.prompts import ShapesProtocol, render_scenes
from stepdistill.bench.protocols import PromptProtocol, Standard, prepare
from stepdistill.bench.rows import own_noise
from stepdistill.bench.scorer import Scorer, decoded, read
from stepdistill.cli_models import parse_model, parse_models
from stepdistill.errors import UserError
from tests.benches import tiny_teacher


pytestmark = pytest.mark.usefixtures("quiet", "undrawn")
COUNTED = (
    "nfe", "images", "fid", "kid", "clip_score", "caption_accuracy", "images_all_correct", "diversity", "precision",
    "recall",
)  # fmt: skip
PROMPTS = ["a red circle", "a blue ring on white", "a shape"]


@pytest.fixture(scope="module")
def protocol(evaluator: Path) -> ShapesProtocol:
    return ShapesProtocol(prompts=4, images_per_prompt=3, reference=20, evaluator=str(evaluator))


def under_test(teacher: Path, **changes: object) -> ModelUnderTest:
    # LCM draws noise between the steps, so it is the harder case.
    model = ModelUnderTest("teacher", str(teacher), steps=2, guidance_scale=3.0, scheduler="lcm")
    return replace(model, **changes)


def features_of(images: Tensor, prompts: object) -> Tensor:
    """The function of the user's that protocols without Inception's weights look through: mean colours, (B, 12)."""
    return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


def counted(found: report.Report) -> list[dict[str, object]]:
    """All that does not depend on how fast the machine is."""
    times = ("ms_per_image", "latency_ms", "images_per_second", "times", "peak_gib")
    rows = json.loads(found.to_json())["rows"]
    return [{key: value for key, value in row.items() if key not in times} for row in rows]


def assert_same(one: report.Report, other: report.Report, rel: float) -> None:
    for a, b in zip(one.rows, other.rows, strict=True):
        for name in COUNTED:
            assert getattr(a, name) == pytest.approx(getattr(b, name), rel=rel, abs=rel), name
        for name, bounds in a.intervals.items():
            assert bounds == pytest.approx(b.intervals[name], rel=rel, abs=rel), name


@pytest.mark.parametrize("scheduler", ["ddim", "lcm"])
def test_exact_images_have_the_same_bits_in_every_batch(teacher: Path, scheduler: str) -> None:
    model = under_test(teacher, scheduler=scheduler)
    painter = Painter(load_pipeline(model), model, PROMPTS, seed=3, exact=True)
    jobs = [(p, k) for p in range(3) for k in range(3)]
    whole = painter(jobs)
    for size in (1, 4):
        parts = torch.cat([painter(jobs[i : i + size]) for i in range(0, len(jobs), size)])
        assert torch.equal(parts, whole)
    assert "forward" not in vars(painter.pipeline.unet), "the pipeline must be left as it was"
    loose = replace(painter, exact=False)(jobs)
    torch.testing.assert_close(loose, whole, atol=2e-4, rtol=0)


def pictures_in(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted((folder / "images").rglob("*.png"))}


def test_a_report_is_the_same_at_every_batch_size(teacher: Path, protocol: ShapesProtocol, tmp_path: Path) -> None:
    # One more prompt than 64 images need, since a lone batch is made twice.
    options, protocol = Options(exact=True, save_images=True), replace(protocol, prompts=17, images_per_prompt=4)
    first, *others = (
        run_benchmark([under_test(teacher, steps=1, guidance_scale=1.0)], protocol=protocol,
                      output=tmp_path / str(size), batch_size=size, options=options)
        for size in (1, 16, 64)
    )  # fmt: skip
    assert len(pictures_in(tmp_path / "1")) == 68
    for size, other in zip((16, 64), others, strict=True):
        assert_same(first, other, 1e-6)
        assert pictures_in(tmp_path / str(size)) == pictures_in(tmp_path / "1")


def test_two_processes_share_the_work_and_get_the_same_report(
    teacher: Path, protocol: ShapesProtocol, tmp_path: Path
) -> None:
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(2)
    models = [under_test(teacher), under_test(teacher, name="other", steps=1)]

    def work(index: int) -> None:
        share, done = Share(index, 2, lambda: barrier.wait(100) and None), []
        found = run_benchmark(
            models, protocol=protocol, output=tmp_path / "two", batch_size=2,
            options=Options(exact=True, save_images=True, share=share),
            on_progress=lambda news: done.append(news.done) if news.label == "teacher" else None,
        )  # fmt: skip
        assert done[-1] == 6, "each makes half of twelve images"
        assert len(found.rows) == (2 if index == 0 else 0)

    processes = [fork.Process(target=work, args=(index,)) for index in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    alone = run_benchmark(models, protocol=protocol, output=tmp_path / "one",
                          options=Options(exact=True, save_images=True))  # fmt: skip
    assert_same(report.load_report(tmp_path / "two"), alone, 1e-6)
    assert pictures_in(tmp_path / "two") == pictures_in(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.dist
def test_processes_that_accelerate_starts_get_the_same_report(
    teacher: Path, protocol: ShapesProtocol, tmp_path: Path
) -> None:
    words = ["bench", f"teacher={teacher},steps=2,guidance_scale=3.0,scheduler=lcm", "--prompts", "4",
             "--images-per-prompt", "3", "--evaluator", protocol.evaluator, "--exact", "--batch-size", "2", "--device",
             "cpu", "--offline", "--save-images"]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "stepdistill", *words, "--output", str(tmp_path / "two")]  # fmt: skip
    subprocess.run(command, check=True, timeout=600)
    alone = run_benchmark([under_test(teacher)], protocol=ShapesProtocol(4, 3, evaluator=protocol.evaluator),
                          output=tmp_path / "one", options=Options(exact=True, save_images=True))  # fmt: skip
    assert_same(alone, report.load_report(tmp_path / "two"), 1e-6)
    assert pictures_in(tmp_path / "one") == pictures_in(tmp_path / "two")
    assert len(pictures_in(tmp_path / "two")) == 12


def test_a_run_that_was_stopped_goes_on_and_ends_with_the_same_report(
    teacher: Path, protocol: ShapesProtocol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [under_test(teacher), under_test(teacher, name="other", steps=1)]
    straight = run_benchmark(models, protocol=protocol, output=tmp_path / "straight", batch_size=3)

    def stop(news: Progress) -> None:
        if news.label == "teacher" and news.done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_benchmark(models, protocol=protocol, output=tmp_path / "killed", batch_size=3, on_progress=stop)
    assert not (tmp_path / "killed/report.json").exists()
    made: list[tuple[int, int]] = []
    paint = benchmark.paint

    def watch(painter: Painter, jobs: list[tuple[int, int]], *args: object, **options: object) -> object:
        made.extend(jobs if painter.model.name == "teacher" else [])
        return paint(painter, jobs, *args, **options)

    monkeypatch.setattr(benchmark, "paint", watch)
    resumed = run_benchmark(models, protocol=protocol, output=tmp_path / "killed", batch_size=3)
    assert made == [(2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (3, 2)]
    assert counted(resumed) == counted(straight)
    made.clear()
    again = run_benchmark([*models, under_test(teacher, name="third")], protocol=protocol, output=tmp_path / "killed")
    assert made == [], "a further model costs only itself"
    assert counted(again)[:2] == counted(straight)


def test_a_model_whose_weights_changed_is_measured_anew(
    teacher: Path, protocol: ShapesProtocol, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    other = tiny_teacher(tmp_path / "model")
    first = run_benchmark([under_test(other)], protocol=protocol, output=tmp_path / "report")
    file = other / "vae/diffusion_pytorch_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    second = run_benchmark([under_test(other)], protocol=protocol, output=tmp_path / "report")
    assert first.rows[0].fid != second.rows[0].fid


def test_parts_come_back_in_the_order_of_their_images(tmp_path: Path) -> None:
    cell = Cell(tmp_path, "a model", {"x": 1})
    images = torch.arange(2, dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    cost = Cost(made=2, rows=4, timed=2, seconds=1.0, parts={"denoiser": 0.5})
    cell.save([2, 3], {"v": torch.tensor([2.0, 3.0])}, {}, cost, None)
    assert cell.missing(4) == [0, 1]
    with pytest.raises(UserError, match="2 of 4 images"):
        cell.load(4)
    cell.save([0, 1], {"v": torch.tensor([0.0, 1.0])}, {1: images[1], 0: images[0]}, cost, 1.5)
    found = cell.load(4)
    assert found.values["v"].tolist() == [0, 1, 2, 3]
    assert found.images[:, 0, 0, 0].tolist() == [0, 1]
    assert (found.cost.nfe, found.cost.times, found.peak_gib) == (2, {"denoiser": 250.0}, 1.5)
    assert Cell(tmp_path, "a model", {"x": 2}).missing(4) == [0, 1, 2, 3]


def test_readings_survive_being_kept_as_numbers() -> None:
    scenes = [scene for scenes in ShapesProtocol(prompts=20, images_per_prompt=2).completions() for scene in scenes]
    images = torch.cat([render_scenes(scenes), torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))])
    assert decoded(read(images)) == shapes_judge.read_images(images)


def test_a_folder_of_real_scenes_is_measured_like_a_model(protocol: ShapesProtocol, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    scenes = [scene for scenes in protocol.completions() for scene in scenes]
    for i, image in enumerate(as_bytes(render_scenes(scenes))):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:04d}.png")
    (row,) = run_benchmark([parse_model(f"made={folder}")], protocol=protocol, output=tmp_path / "report").rows
    assert (row.model, row.nfe, row.ms_per_image, row.images) == ("made", None, None, 12)
    assert row.caption_accuracy == 1
    assert row.fid == pytest.approx(Scorer(protocol).real_scores()["fid"], rel=0.05)
    next(folder.iterdir()).unlink()
    with pytest.raises(UserError, match="holds 11 images, the protocol wants 12"):
        run_benchmark([parse_model(f"made={folder}")], protocol=protocol, output=tmp_path / "report")


def test_what_lacks_its_weights_is_reported_and_the_rest_is_measured(
    teacher: Path, protocol: ShapesProtocol, tmp_path: Path
) -> None:
    options = Options(("usual", "vendi", "clip_distance", "lpips", f"{__name__}:brightness"), Weights(offline=True))
    models = [under_test(teacher, steps=1), under_test(teacher, name="other")]
    found = run_benchmark(models, protocol=protocol, output=tmp_path, options=options)
    assert set(found.protocol["missing"]) == {"lpips"}
    assert "STEPDISTILL_WEIGHTS_VGG16" in found.to_markdown()
    first, second = found.rows
    assert first.fid is not None and 1 <= first.vendi <= 3 and first.lpips is None
    assert first.clip_distance is None and second.clip_distance > 0
    assert 0 < first.others[f"{__name__}:brightness"] < 1
    with pytest.raises(UserError, match="fidd"):
        run_benchmark(models, protocol=protocol, output=tmp_path, options=Options(("fidd",)))


def brightness(images: Tensor, prompts: object) -> Tensor:
    return images.mean((1, 2, 3))


def test_a_prepared_protocol_compares_with_the_users_images(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Standard(3, 32, False, "A photo depicts ", "any", 30, 10, "nowhere")
    monkeypatch.setattr(protocols, "STANDARDS", {"small": small})
    (tmp_path / "real/deeper").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for i in range(30):
        pixels = torch.rand(40 + i % 2, 50, 3, generator=generator).mul(255).byte().numpy()
        Image.fromarray(pixels).save(tmp_path / "real/deeper" / f"{i}.png")
    (tmp_path / "p.txt").write_text("\n".join([*PROMPTS, "left out"]))
    folder, features = tmp_path / "small", f"{__name__}:features_of"
    offline = Weights(offline=True)
    missing = prepare("small", tmp_path / "real", tmp_path / "p.txt", folder, weights=offline, features=features)
    assert set(missing) == {"dinov2"}
    facts = json.loads((folder / "protocol.json").read_text())
    assert (facts["images"], facts["side"], len(facts["images_sha256"])) == (30, 32, 64)
    protocol = PromptProtocol.standard("small", folder)
    assert protocol.prompts == tuple(PROMPTS)
    found = run_benchmark([under_test(teacher)], protocol=protocol, output=tmp_path / "report",
                          options=Options(("usual", "fd_dinov2"), offline))  # fmt: skip
    assert found.rows[0].fid > 0 and found.rows[0].images == 3
    assert set(found.protocol["missing"]) == {"clip_score", "fd_dinov2"}
    assert found.protocol["prepared"]["images_sha256"] == facts["images_sha256"]
    assert len(found.protocol["statistics_sha256"]) == 64
    assert "FID-3" in found.to_markdown()


def test_a_protocol_that_was_not_prepared_says_how_to(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stepdistill bench prepare coco30k --images DIR"):
        PromptProtocol.standard("coco30k", tmp_path)
    (tmp_path / "p.txt").write_text("one\n")
    with pytest.raises(UserError, match="wants 30,000"):
        prepare("coco30k", tmp_path, tmp_path / "p.txt", tmp_path / "out")


def test_guided_models_make_half_as_many_steps_at_equal_network_calls(teacher: Path) -> None:
    model = under_test(teacher)
    cells, odd = at_nfe(model, [1, 2, 8])
    assert [(m.name, m.steps) for m in cells] == [("teacher, 1 step", 1), ("teacher, 4 steps", 4)]
    assert odd == [1]
    plain, odd = at_nfe(replace(model, guidance_scale=1.0), [1, 2])
    assert ([m.steps for m in plain], odd) == ([1, 2], [])


def test_words_of_a_model_name_it_and_stand_for_several_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "distillation_config.json").write_text('{"steps": 2, "guidance_scale": 1.0}')
    cells = parse_models("old=some/teacher,scheduler=[dpm++,unipc],guidance_scale=2.0", nfe=[4, 8])
    assert [(m.name, m.scheduler, m.steps) for m in cells] == [
        ("old (dpm++), 2 steps", "dpm++", 2), ("old (dpm++), 4 steps", "dpm++", 4),
        ("old (unipc), 2 steps", "unipc", 2), ("old (unipc), 4 steps", "unipc", 4),
    ]  # fmt: skip
    assert [m.steps for m in parse_models(f"mine={folder}", nfe=[4, 8])] == [2], "a student says what it wants"
    assert [m.steps for m in parse_models(f"mine={folder},nfe=[1,4]", nfe=[8])] == [1, 4]
    assert parse_model("some/base+lora.safetensors").lora == "lora.safetensors"
    (tmp_path / "adapter.safetensors").touch()
    assert parse_model(f"some/base+{tmp_path}").adapter == str(tmp_path)
    with pytest.raises(UserError, match="odd number"):
        parse_models("some/teacher,nfe=[1]")
    with pytest.raises(UserError, match="nfe is a list"):
        parse_models("some/teacher,nfe=[many]")


def test_a_size_reaches_the_stock_call_with_its_noise_and_makes_a_cell_of_its_own(
    teacher: Path, protocol: ShapesProtocol, tmp_path: Path
) -> None:
    plain, wide = under_test(teacher), under_test(teacher, height=48, width=96)
    pipeline = load_pipeline(wide)
    made = Painter(pipeline, wide, PROMPTS)([(0, 0), (1, 0)])
    generators = [torch.Generator().manual_seed(image_seed(0, prompt, 0)) for prompt in (0, 1)]
    with own_noise(pipeline.scheduler, generators):
        expected = pipeline(PROMPTS[:2], generator=generators, num_inference_steps=2, guidance_scale=3.0, height=48,
                            width=96, output_type="pt").images  # fmt: skip
    assert made.shape == (2, 3, 48, 96)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)
    found = [identity(model) for model in (plain, wide, replace(plain, height=48))]
    assert found[0].keys().isdisjoint({"height", "width"}), "cells from before there were sizes stay good"
    assert [{key: facts[key] for key in facts if facts[key] != found[0].get(key)} for facts in found] == [
        {}, {"height": 48, "width": 96}, {"height": 48}
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"judge of shapes reads images .*measure by another protocol"):
        run_benchmark([wide], protocol=protocol, output=tmp_path)


def test_models_of_two_sizes_are_measured_side_by_side(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    protocol = PromptProtocol.of_file(str(tmp_path / "p.txt"), count=None, images_per_prompt=1)
    models = parse_models(f"one={teacher},steps=1", common={"height": 32, "width": 32})
    models += parse_models(f"two={teacher},steps=1,height=48", common={"height": 32, "width": 32})
    assert [(model.height, model.width) for model in models] == [(32, 32), (48, 32)]
    options = Options((f"{__name__}:height_of",), Weights(offline=True))
    found = run_benchmark(models, protocol=protocol, output=tmp_path / "report", options=options)
    assert [row.others[f"{__name__}:height_of"] for row in found.rows] == [32, 48]


def height_of(images: Tensor, prompts: object) -> Tensor:
    return torch.full((len(images),), float(images.shape[2]))


def test_distances_between_images_of_two_sizes_are_left_out() -> None:
    metric = ImageDistances(lambda a, b: (a - b).abs().mean((1, 2, 3)), ("lpips", "lpips_diversity"))
    small, large = (Seen(PROMPTS, 2, {}, torch.zeros(6, 3, side, side, dtype=torch.uint8)) for side in (8, 16))
    draws = Resamples(3)
    found = metric.figures(replace(large, baseline=small), draws)
    assert found["lpips"].value is None
    assert found["lpips_diversity"].value == 0
    assert metric.figures(replace(large, baseline=large), draws)["lpips"].value == 0


@pytest.mark.parametrize(("side", "pixels"), [("height", 44), ("width", 0)])
def test_a_size_that_the_pipeline_cannot_make_is_refused_before_an_image_is(
    teacher: Path, side: str, pixels: int
) -> None:
    with pytest.raises(UserError, match=f"teacher: {side} is {pixels}; .*multiples of 8 pixels"):
        load_pipeline(under_test(teacher, **{side: pixels}))


def test_one_file_of_weights_must_be_safetensors(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").touch()
    with pytest.raises(UserError, match="safetensors"):
        load_pipeline(ModelUnderTest("old", str(tmp_path / "model.ckpt"), 1, 1.0))
