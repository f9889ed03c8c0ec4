"""What every step of a pipeline predicts: in closed form, for pipelines of all kinds, and on the command line."""

from __future__ import annotations

import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLPipeline,
    TCDScheduler,
)
from PIL import Image, ImageChops
from torch import Tensor

from stepdistill import cli
from stepdistill.bench.generate import ModelUnderTest
from stepdistill.draw import draw
from stepdistill.errors import UserError
from stepdistill.export.pipeline import export_pipeline
from stepdistill.export.schedulers import family_scheduler, told_timesteps
from stepdistill.families.base import ModelFamily
from stepdistill.hybrid import HybridPipeline, watched
from stepdistill.objectives.base import InferenceSpec
from stepdistill.sampling import Sampler
from stepdistill.stretch import Stretch, clean_prediction
from stepdistill.times import trailing
from stepdistill.trace import Trace, decoded
from tests.families.test_export import BETAS, noise_levels, student_of
from tests.families.test_hybrid import FOUR, PROMPTS, family_of, images, pipeline_of


VP = {**BETAS, "clip_sample": False}
SCHEDULERS = [
    DDIMScheduler(**VP, timestep_spacing="trailing"),
    DPMSolverMultistepScheduler(**BETAS),
    EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing"),
    LCMScheduler(**BETAS, original_inference_steps=4),
    TCDScheduler(**BETAS, original_inference_steps=4),
    FlowMatchEulerDiscreteScheduler(shift=3.0),
]


def answer(kind: str, x0: Tensor, eps: Tensor, alpha: float, sigma: float) -> Tensor:
    """What a network that knows x0 and eps says."""
    return {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0, "flow": eps - x0}[kind]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda scheduler: type(scheduler).__name__)
def test_an_answer_is_read_as_the_clean_latents_that_it_amounts_to(scheduler: Any, kind: str) -> None:
    flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    if not flow:
        scheduler.register_to_config(prediction_type=kind)
    scheduler.set_timesteps(4)
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, 4, 8, 8, generator=generator)
    for number, t in enumerate(scheduler.timesteps.tolist()):
        alpha, sigma = (1 - t / 1000, t / 1000) if flow else noise_levels(round(t))
        # Euler's own latents are x0 + (sigma / alpha) eps.
        scale = 1 / alpha if isinstance(scheduler, EulerDiscreteScheduler) else 1.0
        said = answer("flow" if flow else kind, x0, eps, alpha, sigma)
        sample = scale * (alpha * x0 + sigma * eps)
        if number:
            scheduler._step_index = number  # as after the steps before
        found = clean_prediction(scheduler, said, scheduler.timesteps[number], sample)
        torch.testing.assert_close(found, x0, rtol=1e-3, atol=1e-3)


def test_timesteps_between_two_levels_are_read_as_well() -> None:
    scheduler = EulerDiscreteScheduler(**BETAS, timestep_spacing="linspace")
    scheduler.set_timesteps(7)
    t = scheduler.timesteps[1]
    assert float(t) % 1, "a timestep that is no integer"
    x0, eps = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = scheduler.sigmas[1]
    scheduler._step_index = 1
    torch.testing.assert_close(clean_prediction(scheduler, eps, t, x0 + sigma * eps), x0, rtol=1e-2, atol=1e-2)


def test_a_scheduler_without_a_table_of_levels_is_refused() -> None:
    from diffusers import EDMEulerScheduler

    scheduler = EDMEulerScheduler()
    scheduler.set_timesteps(2)
    with pytest.raises(UserError, match="EDMEulerScheduler has no table of noise levels"):
        clean_prediction(scheduler, torch.zeros(1, 4, 8, 8), scheduler.timesteps[0], torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize(
    ("name", "sampler", "eta"),
    [("sd", "stochastic", 0.0), ("sd", "deterministic", 0.0), ("sd", "tcd", 0.0), ("dit", "stochastic", 0.0),
     ("dit", "tcd", 0.3), ("sd3", "stochastic", 0.0), ("sd3", "deterministic", 0.0), ("pixart", "stochastic", 0.0),
     ("sana", "stochastic", 0.0), ("flux", "stochastic", 0.0), ("flux", "deterministic", 0.0)],
)  # fmt: skip
def test_watching_changes_nothing_and_the_last_prediction_is_the_image(
    name: str, sampler: Sampler, eta: float, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"{name}_folder")
    family, student = family_of(folder), pipeline_of(folder)
    spec = InferenceSpec(trailing(family.schedule, 4), sampler, eta=eta)
    student.scheduler = family_scheduler(family, spec)
    seen = Trace()
    # Unless it is told a size, Sana's pipeline enlarges its images.
    options = {"num_inference_steps": 4, **({"height": 512, "width": 512} if name == "sana" else {})}
    plain = images(student, PROMPTS[name], **options)
    assert torch.equal(images(watched(student, seen), PROMPTS[name], **options), plain)
    told = told_timesteps(student.scheduler, spec, even=family.even_sigmas)
    assert [call.timestep for call in seen.calls] == told
    steps = seen.images(student, 2)
    torch.testing.assert_close(steps[-1].permute(0, 2, 3, 1), plain, rtol=0, atol=2e-4)
    for first, second in pairwise(steps):
        assert (first - second).abs().max() > 1e-3, "every step says something else"


@pytest.mark.parametrize("force", [True, False])
def test_an_autoencoder_that_overflows_in_half_precision_decodes_in_full(sdxl_folder: str, force: bool) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_folder)
    vae = pipeline.vae.to(torch.float16)
    vae.register_to_config(force_upcast=force)
    seen: list[torch.dtype] = []
    vae.decoder.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    decoded(pipeline, torch.zeros(1, 4, 4, 4, dtype=torch.float16))
    assert seen == [torch.float32 if force else torch.float16]
    assert vae.dtype == torch.float16


def test_packed_latents_of_another_size_are_refused(flux_folder: str) -> None:
    pipeline = pipeline_of(flux_folder)
    assert decoded(pipeline, torch.randn(1, 9, 16)).shape == (1, 3, 12, 12)
    for size in (None, (16, 24)):
        with pytest.raises(UserError, match="FLUX's packed ones of images of a known size: leave it out"):
            decoded(pipeline, torch.randn(1, 8, 16), size)


def test_flux_is_traced_at_any_size(flux_folder: str, tmp_path: Path) -> None:
    seen, pipeline = Trace(), pipeline_of(flux_folder)
    made = watched(pipeline, seen)(
        ["a", "b"], num_inference_steps=2, height=16, width=32, generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images  # fmt: skip
    last = seen.images(pipeline, 2, (32, 16))[-1]
    torch.testing.assert_close(last.permute(0, 2, 3, 1), torch.from_numpy(made), rtol=0, atol=2e-4)
    model = ModelUnderTest("flux", flux_folder, 2, 1.0, height=16, width=32)
    image, trace = (Image.open(file) for file in draw(model, ["a"], tmp_path, trace=True))
    assert image.size == (32, 16)
    assert (trace.width - 76) // 2 == 128 + 4 and trace.height == 48 + 64 + 4, "pictures of the image's proportions"


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_a_guided_call_is_traced_with_its_guidance(name: str, request: pytest.FixtureRequest) -> None:
    """What is seen is what the scheduler steps, not one half of the network's batch."""
    pipeline = pipeline_of(request.getfixturevalue(f"{name}_folder"))
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True)
    seen = Trace()
    made = watched(pipeline, seen)(
        PROMPTS[name], num_inference_steps=3, guidance_scale=5.0, output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    last = seen.images(pipeline, 2)[-1]
    assert last.shape == (2, 3, 16, 16)
    # The last step of leading timesteps, 1, still has a trace of noise.
    torch.testing.assert_close(last.permute(0, 2, 3, 1), torch.from_numpy(made), rtol=0, atol=2e-2)


def test_both_models_of_hybrid_sampling_are_traced_and_told_apart(sd_folder: str) -> None:
    base, student, seen = pipeline_of(sd_folder), pipeline_of(sd_folder), Trace()
    student.scheduler = family_scheduler(family_of(sd_folder), InferenceSpec(FOUR))
    both = HybridPipeline(base, student, base_steps=2)
    plain = images(both, ["a", "b"], num_inference_steps=4)
    assert torch.equal(images(watched(both, seen), ["a", "b"], num_inference_steps=4), plain)
    assert [(call.timestep, call.base) for call in seen.calls] == [
        (999, True), (874, True), (749, False), (499, False), (249, False),
    ]  # fmt: skip
    picture = seen.picture(both, 2)
    assert picture.width > 5 * 128 and picture.height > 2 * 128


def test_a_stretch_shows_a_part_of_the_schedule_and_the_signatures_of_the_whole() -> None:
    import copy
    import inspect

    whole = LCMScheduler(**BETAS, original_inference_steps=4)
    part = Stretch(whole, start=1, stop=3)
    part.set_timesteps(4, device="cpu")
    assert part.timesteps.tolist() == [749, 499]
    assert part.init_noise_sigma == 1.0
    assert part.config is whole.config
    assert inspect.signature(part.step) == inspect.signature(whole.step)
    assert "original_inference_steps" in inspect.signature(part.set_timesteps).parameters
    assert copy.deepcopy(part).timesteps.tolist() == [749, 499]
    with pytest.raises(AttributeError, match="nonsense"):
        _ = part.nonsense


# ---- the command line --------------------------------------------------------------------------------------------


def sample(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["stepdistill", "sample", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0)


@pytest.fixture
def student(sd: ModelFamily, tmp_path: Path) -> Path:
    return export_pipeline(sd, student_of(sd), InferenceSpec(FOUR), tmp_path / "student", facts={})


def test_sample_writes_a_picture_of_the_steps_beside_the_same_images(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample(monkeypatch, student, "a b", "c", "--count", 2, "--output", tmp_path / "plain") == 0
    plain = capsys.readouterr().out.split()
    assert sample(monkeypatch, student, "a b", "c", "--count", 2, "--trace", "--output", tmp_path / "traced") == 0
    traced = capsys.readouterr().out.split()
    pictures = [Path(file) for file in traced if file.endswith("-trace.png")]
    assert [file.name for file in pictures] == ["000-a-b-0-trace.png", "001-c-0-trace.png"]
    others = [file for file in traced if not file.endswith("-trace.png")]
    for first, second in zip(plain, others, strict=True):
        assert Path(first).read_bytes() == Path(second).read_bytes()
    first_picture, second_picture = (Image.open(file).convert("RGB") for file in pictures)
    assert ImageChops.difference(first_picture, second_picture).getbbox() is not None
    # The lower right cell is the last prediction for the second image: the image itself.
    image = Image.open(others[1]).resize((128, 128), Image.Resampling.NEAREST)
    width, height = first_picture.size
    cell = first_picture.crop((width - 132, height - 132, width - 4, height - 4))
    assert max(high for _, high in ImageChops.difference(cell, image).getextrema()) <= 2


def test_sample_begins_with_another_model_where_one_is_named(
    student: Path, sd_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ways: dict[str, tuple[object, ...]] = {
        "alone": (), "both": ("--base", sd_folder), "guided": ("--base", sd_folder, "--base-guidance", 9),
        "finer": ("--base", sd_folder, "--base-steps", 3),
        "longer": ("--base", sd_folder, "--base-replaces", 2),
    }  # fmt: skip
    made = set()
    for name, words in ways.items():
        assert sample(monkeypatch, student, "a", *words, "--output", tmp_path / name) == 0
        made.add(Path(capsys.readouterr().out.strip()).read_bytes())
    assert len(made) == len(ways)


def test_a_student_of_one_step_leaves_nothing_to_a_base(
    sd_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "student"
    shutil.copytree(sd_folder, folder)
    (folder / "distillation_config.json").write_text(json.dumps({"steps": 1, "guidance_scale": 1.0}))
    assert sample(monkeypatch, folder, "a", "--base", sd_folder, "--output", tmp_path / "out") == 2
    assert "would leave it none; the student needs at least one more" in capsys.readouterr().err
