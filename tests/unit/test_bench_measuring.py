"""What a benchmark measures and what not: checkers, memory, baselines, calls; and what its report says of that."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPVisionConfig

from stepdistill import cli
from stepdistill.bench import benchmark, protocols, report
from stepdistill.bench.benchmark import Options, run_benchmark
from stepdistill.bench.compare import compare
from stepdistill.bench.generate import ModelUnderTest, generate_images, load_pipeline
from stepdistill.bench.intervals import Resamples
from stepdistill.bench.loading import image_files, leave_out_checks
from stepdistill.bench.metrics.weights import Weights
from stepdistill.bench.models import at_nfe
from stepdistill.bench.prompts import ShapesProtocol
from stepdistill.bench.protocols import PromptProtocol, Standard, prepare
from stepdistill.cli_models import parse_model
from stepdistill.errors import UserError
from tests.benches import text_config


pytestmark = pytest.mark.usefixtures("quiet", "undrawn", "offline")
PROMPTS = ["a red circle", "a blue ring on white", "a shape"]
FEATURES = f"{__name__}:features_of"


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "p.txt"
    file.write_text("\n".join(PROMPTS))
    return file


def under_test(teacher: Path, **changes: object) -> ModelUnderTest:
    return replace(ModelUnderTest("teacher", str(teacher), steps=1, guidance_scale=1.0), **changes)


def features_of(images: Tensor, prompts: object) -> Tensor:
    return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


def real_images(folder: Path, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    for i in range(12):
        pixels = torch.rand(40, 50, 3, generator=generator).mul(255).byte().numpy()
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def small_standard(monkeypatch: pytest.MonkeyPatch) -> None:
    standard = Standard(3, 32, False, "A photo depicts ", "any", 12, 10, "nowhere")
    monkeypatch.setattr(protocols, "STANDARDS", {"small": standard})


# ---- what is not the model's work ----------------------------------------------------------------------------------


def with_checker(teacher: Path, folder: Path) -> Path:
    """The teacher with a safety checker that flags every image."""
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                              image_size=64, patch_size=16, projection_dim=8)  # fmt: skip
    config = CLIPConfig(text_config=text_config().to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    checker = StableDiffusionSafetyChecker(config)
    checker.concept_embeds_weights.data.fill_(-2)  # a threshold that every cosine is above
    extractor = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    pipeline = StableDiffusionPipeline.from_pretrained(
        teacher, safety_checker=checker, feature_extractor=extractor, dtype=torch.float32
    )
    pipeline.save_pretrained(folder)
    return folder


def test_images_are_measured_as_the_model_made_them_and_not_blackened(
    teacher: Path, prompts_file: Path, tmp_path: Path
) -> None:
    checked = under_test(with_checker(teacher, tmp_path / "checked"))

    def made(model: ModelUnderTest, bare: bool) -> Tensor:
        return generate_images(load_pipeline(model, bare=bare), PROMPTS, model=model, images_per_prompt=1).images

    assert made(checked, False).max() == 0, "the checker of this test must flag all images"
    torch.testing.assert_close(made(checked, True), made(under_test(teacher), False))
    found = run_benchmark([checked], protocol=PromptProtocol.of_file(str(prompts_file)), output=tmp_path / "report",
                          options=Options((f"{__name__}:brightness",), Weights(offline=True)))  # fmt: skip
    assert found.rows[0].others[f"{__name__}:brightness"] > 0.05
    assert "- Measured without safety checker and watermark." in found.to_markdown()


def brightness(images: Tensor, prompts: object) -> Tensor:
    return images.mean((1, 2, 3))


def test_a_watermark_is_left_out(teacher: Path) -> None:
    pipeline = load_pipeline(under_test(teacher))
    pipeline.watermark = object()  # where StableDiffusionXLPipeline has its own
    leave_out_checks(pipeline)
    assert pipeline.watermark is None


def test_peak_memory_is_that_of_making_images_and_not_of_measuring_them(
    teacher: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An accelerator whose memory grows by 2 with the model and by 3 while it paints, with 10 of metrics before,
    # and by 100 while these compute.
    peak, paint, look = [0.0], benchmark.paint, benchmark.Runner._look

    def uses(function: Any, amount: float) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            peak[0] = max(peak[0], amount)
            return function(*args, **options)

        return call

    monkeypatch.setattr(benchmark, "allocated", lambda device: 10.0)
    monkeypatch.setattr(benchmark, "reset_peak", lambda device: peak.__setitem__(0, 12.0))
    monkeypatch.setattr(benchmark, "peak_gib", lambda device, beyond: peak[0] - beyond)
    monkeypatch.setattr(benchmark, "paint", uses(paint, 15.0))
    monkeypatch.setattr(benchmark.Runner, "_look", uses(look, 115.0))
    (row,) = run_benchmark([under_test(teacher)], protocol=PromptProtocol.of_file(str(prompts_file)), batch_size=1,
                           output=tmp_path, options=Options((FEATURES,), Weights(offline=True))).rows  # fmt: skip
    assert row.peak_gib == 5.0


# ---- what models are compared with ---------------------------------------------------------------------------------


def test_distances_are_to_the_first_models_image_of_the_most_steps(
    teacher: Path, evaluator: Path, prompts_file: Path, tmp_path: Path
) -> None:
    cells, _ = at_nfe(under_test(teacher), [1, 3])
    options = Options(("clip_distance",), Weights({"clip": str(evaluator)}, offline=True))
    found = run_benchmark([*cells, under_test(teacher, name="other", steps=4)], output=tmp_path, options=options,
                          protocol=PromptProtocol.of_file(str(prompts_file)))  # fmt: skip
    few, many, other = (row.clip_distance for row in found.rows)
    assert many is None
    assert few > 0 and other > 0
    assert found.protocol["baseline"] == "teacher, 3 steps"
    assert "are to the images of teacher, 3 steps." in found.to_markdown()


def test_two_real_reports_of_one_protocol_are_told_to_be_measured_alike(
    teacher: Path, evaluator: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_standard(monkeypatch)
    clip = shutil.copytree(evaluator, tmp_path / "other-clip")
    found = {}
    for name, network, seed in (("a", evaluator, 0), ("b", clip, 0), ("c", evaluator, 1)):
        folder, weights = tmp_path / f"small-{name}", Weights({"clip": str(network)}, offline=True)
        prepare("small", real_images(tmp_path / f"real-{name}", seed), prompts_file, folder, weights=weights,
                features=FEATURES)  # fmt: skip
        metrics = ("usual", "vendi") if name == "b" else None
        model = under_test(teacher) if name != "c" else parse_model(f"teacher={tmp_path / 'real-c'}")
        run_benchmark([model], protocol=PromptProtocol.standard("small", folder), output=tmp_path / name,
                      options=Options(metrics, weights))  # fmt: skip
        found[name] = report.load_report(tmp_path / name)
    assert compare(found["a"], found["b"]).cautions == ()
    unlike = " ".join(compare(found["a"], found["c"]).cautions)
    assert "prepared.images_sha256" in unlike and "statistics_sha256" in unlike


def test_reports_of_shapes_are_alike_wherever_the_evaluator_lies(evaluator: Path, tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        protocol = ShapesProtocol(prompts=2, images_per_prompt=2, reference=8,
                                  evaluator=str(shutil.copytree(evaluator, tmp_path / f"clip-{name}")))  # fmt: skip
        folder = tmp_path / f"images-{name}"
        folder.mkdir()
        for i in range(4):
            Image.new("RGB", (64, 64), (80 * i, 0, 0)).save(folder / f"{i}.png")
        found.append(run_benchmark([parse_model(f"m={folder}")], protocol=protocol, output=tmp_path / name))
    assert compare(*found).cautions == ()
    exact = replace(found[1], protocol={**found[1].protocol, "exact": True})
    assert "--exact" in " ".join(compare(found[0], exact).cautions)
    assert "longer" in exact.to_markdown() and "longer" not in found[1].to_markdown()


# ---- what a report says --------------------------------------------------------------------------------------------


def test_a_report_names_the_networks_and_the_prefix_in_words(
    teacher: Path, evaluator: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_standard(monkeypatch)
    monkeypatch.setenv("STEPDISTILL_WEIGHTS_CLIP", str(evaluator))
    prepare("small", real_images(tmp_path / "real"), prompts_file, tmp_path / "small", weights=Weights(offline=True),
            features=FEATURES)  # fmt: skip
    found = run_benchmark([under_test(teacher)], protocol=PromptProtocol.standard("small", tmp_path / "small"),
                          output=tmp_path / "report", options=Options(None, Weights(offline=True)))  # fmt: skip
    text = found.to_markdown()
    assert f"are of features of the function {FEATURES}." in text
    assert f"are of the CLIP model {evaluator}; 'A photo depicts ' stands before the prompts." in text
    assert "Lanczos filter to 32 pixels" in text
    assert Weights().named("clip") == str(evaluator)
    monkeypatch.delenv("STEPDISTILL_WEIGHTS_CLIP")
    assert Weights().named("clip") == "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"


def test_a_report_has_the_versions_of_all_that_measures() -> None:
    versions = report.installed_versions()
    assert {"clean-fid", "torchmetrics", "pillow", "numpy", "accelerate", "cuda"} <= versions.keys()
    assert "not installed" not in {versions["numpy"], versions["pillow"], versions["torchmetrics"]}


def pictures(folder: Path, count: int) -> Path:
    """Pictures 1.png, 2.png ... that grow brighter."""
    folder.mkdir()
    for number in range(1, count + 1):
        Image.new("RGB", (8, 8), (20 * number,) * 3).save(folder / f"{number}.png")
    return folder


def test_a_folder_is_read_in_the_order_of_its_numbers_and_what_is_left_over_is_told(
    prompts_file: Path, tmp_path: Path
) -> None:
    folder = pictures(tmp_path / "images", 11)
    assert [int(file.stem) for file in image_files(str(folder))] == list(range(1, 12))
    name = f"{__name__}:brightness"
    options = Options((name,), Weights(offline=True))
    found = run_benchmark([parse_model(f"made={folder}")], output=tmp_path / "report", options=options,
                          protocol=PromptProtocol.of_file(str(prompts_file)))  # fmt: skip
    assert found.rows[0].others[name] == pytest.approx(20 * 2 / 255, rel=1e-3), "of 1.png, 2.png and 3.png"
    assert "Caution: made has 8 images more in its folder" in found.to_markdown()


def test_what_was_kept_is_made_anew_when_it_is_measured_otherwise(
    prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = parse_model(f"made={pictures(tmp_path / 'images', 3)}")
    options = Options((f"{__name__}:brightness",), Weights(offline=True))
    protocol = PromptProtocol.of_file(str(prompts_file))
    for version, cells in ((7, 1), (7, 1), (8, 2)):
        monkeypatch.setattr(benchmark, "MEASURED_AS", version)
        run_benchmark([model], protocol=protocol, output=tmp_path / "report", options=options)
        assert len(list((tmp_path / "report/cells").iterdir())) == cells


@pytest.mark.parametrize(("column", "name"), [("patch_fid", "patch FID"), ("fd_dinov2", "FD-DINOv2")])
def test_every_frechet_distance_of_few_images_carries_their_number(column: str, name: str) -> None:
    def text(images: int) -> str:
        row = report.Row("m", 1.0, images, **{column: 5.0})
        return report.Report("x", "2026-01-31", "cpu", {}, {}, None, {}, (row,)).to_markdown()

    assert f"| {name}-512 |" in text(512) and "Warning" in text(512)
    assert f"| {name} |" in text(2048) and "Warning" not in text(2048)


def test_one_prompt_alone_has_no_interval() -> None:
    alone, several = Resamples(1), Resamples(3)
    values = torch.tensor([1.0, 2.0, 6.0])
    assert alone.mean(values).interval is None
    assert alone.ratio(values[:1], values[1:2]).interval is None
    low, high = several.mean(values).interval
    assert low < 3 < high


# ---- bench prepare -------------------------------------------------------------------------------------------------


def test_statistics_are_made_without_prompts_which_are_added_later(
    prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_standard(monkeypatch)
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(variable, "1")  # which --offline sets, and nobody would take back
    folder, images = tmp_path / "small", real_images(tmp_path / "real")

    def call(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["stepdistill", "bench", "prepare", "small", *map(str, words)])
        try:
            return int(cli.main() or 0)
        except SystemExit as stop:
            return int(stop.code or 0)

    output = ("--output", folder, "--offline")
    assert call(*output) == 2
    assert call("--prompts", prompts_file, *output) == 2, "there are no statistics to add them to"
    assert "give --images DIR" in capsys.readouterr().err
    assert call("--images", images, "--features", FEATURES, *output) == 0
    told = capsys.readouterr().out
    assert "without prompts; before measuring: stepdistill bench prepare small --prompts FILE" in told
    with pytest.raises(UserError, match="has no prompts; add them with"):
        PromptProtocol.standard("small", folder)
    before = (folder / "statistics.safetensors").read_bytes()
    assert call("--prompts", prompts_file, *output) == 0
    assert (folder / "statistics.safetensors").read_bytes() == before
    protocol = PromptProtocol.standard("small", folder)
    assert (protocol.prompts, protocol.side) == (tuple(PROMPTS), 32)
    whole = tmp_path / "whole"
    prepare("small", images, prompts_file, whole, weights=Weights(offline=True), features=FEATURES)
    assert json.loads((whole / "protocol.json").read_text()) == json.loads((folder / "protocol.json").read_text())
