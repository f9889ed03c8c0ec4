"""Our few-step samplers against stock pipelines with the exported scheduler: image by image, by method and steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from stepdistill.denoiser import OwnWeights
from stepdistill.errors import UserError
from stepdistill.export.pipeline import export_pipeline
from stepdistill.export.schedulers import family_scheduler
from stepdistill.families import load_family
from stepdistill.families.base import ModelFamily
from stepdistill.finish import check
from stepdistill.objectives.base import InferenceSpec
from stepdistill.sampling import Sampler, student_samples
from stepdistill.times import trailing
from tests.families.test_export import student_of


PROMPTS = ["red", "a ring"]
NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
SEED = 11
SAME = 1e-4  # of images in [0, 1], float32
METHODS: list[tuple[Sampler, float]] = [
    ("stochastic", 0.0), ("deterministic", 0.0), ("tcd", 0.0), ("tcd", 0.3), ("tcd", 1.0),
]  # fmt: skip


class Exported(NamedTuple):
    family: ModelFamily
    student: nn.Module
    pipeline: Any


def exported(folder: str, to: Path) -> Exported:
    """A tiny teacher, a student of it, and the student's exported pipeline as plain Diffusers loads it."""
    family = load_family(folder)
    student = student_of(family)
    spec = InferenceSpec((999,), "deterministic" if family.scales_noise else "stochastic")
    pipeline = DiffusionPipeline.from_pretrained(export_pipeline(family, student, spec, to, facts={}))
    pipeline.set_progress_bar_config(disable=True)
    return Exported(family, student, pipeline)


@pytest.fixture(scope="module")
def sd_export(sd_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported(sd_folder, tmp_path_factory.mktemp("sd") / "pipeline")


@pytest.fixture(scope="module")
def sd3_export(sd3_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported(sd3_folder, tmp_path_factory.mktemp("sd3") / "pipeline")


@torch.no_grad()
def ours(export: Exported, spec: InferenceSpec) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] of the student in memory."""
    family = export.family
    condition = family.encode_prompts(PROMPTS)
    torch.manual_seed(SEED)
    return family.decode_latents(student_samples(family.denoiser(OwnWeights(export.student)), NOISE, condition, spec))


def stock(export: Exported, spec: InferenceSpec, folder: Path) -> Tensor:
    """The same by the stock pipeline, with the scheduler that its folder would hold."""
    scheduler: Any = family_scheduler(export.family, spec)
    scheduler.save_pretrained(folder)
    export.pipeline.scheduler = type(scheduler).from_pretrained(folder)
    torch.manual_seed(SEED)  # SD3's pipeline draws the noise between steps from torch's own generator
    call = {"eta": spec.eta} if export.family.name == "sd" else {}
    images: Tensor = export.pipeline(
        PROMPTS, num_inference_steps=spec.num_steps, guidance_scale=1, latents=NOISE, output_type="pt",
        generator=torch.Generator().manual_seed(SEED), **call,
    ).images  # fmt: skip
    return images


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize(("sampler", "eta"), METHODS)
def test_a_vp_students_images_are_those_of_the_stock_pipeline(
    sd_export: Exported, sampler: Sampler, eta: float, steps: int, tmp_path: Path
) -> None:
    spec = InferenceSpec(trailing(sd_export.family.schedule, steps), sampler, eta=eta)
    expected = ours(sd_export, spec)
    assert ((expected > 0.01) & (expected < 0.99)).float().mean() > 0.5, "the images must not be all black and white"
    torch.testing.assert_close(stock(sd_export, spec, tmp_path), expected, rtol=0, atol=SAME)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize(("sampler", "eta"), [method for method in METHODS if method[1] != 0.3])
def test_a_flow_students_images_are_those_of_the_stock_pipeline(
    sd3_export: Exported, sampler: Sampler, eta: float, steps: int, tmp_path: Path
) -> None:
    spec = InferenceSpec(trailing(sd3_export.family.schedule, steps), sampler, eta=eta)
    expected = ours(sd3_export, spec)
    assert ((expected > 0.01) & (expected < 0.99)).float().mean() > 0.5, "the images must not be all black and white"
    torch.testing.assert_close(stock(sd3_export, spec, tmp_path), expected, rtol=0, atol=SAME)


@pytest.mark.parametrize(
    ("timesteps", "sampler", "eta"),
    [
        ((999, 759, 499, 259), "stochastic", 0.0),  # LCM's own grid of 50
        ((999, 759, 499, 259), "tcd", 0.0),
        ((799, 399), "tcd", 0.3),  # begins below the last timestep
        ((799, 399), "deterministic", 0.0),
    ],
)
def test_other_grids_give_the_same_images_too(
    sd_export: Exported, timesteps: tuple[int, ...], sampler: Sampler, eta: float, tmp_path: Path
) -> None:
    spec = InferenceSpec(timesteps, sampler, eta=eta)
    torch.testing.assert_close(stock(sd_export, spec, tmp_path), ours(sd_export, spec), rtol=0, atol=SAME)


def test_two_uneven_steps_of_a_flow_student_give_the_same_images_too(sd3_export: Exported, tmp_path: Path) -> None:
    spec = InferenceSpec((999, 299))
    torch.testing.assert_close(stock(sd3_export, spec, tmp_path), ours(sd3_export, spec), rtol=0, atol=SAME)


def test_methods_that_differ_give_images_that_differ(sd_export: Exported) -> None:
    """Otherwise the comparisons above would prove nothing."""
    images = [ours(sd_export, InferenceSpec((999, 499), sampler, eta=eta)) for sampler, eta in METHODS]
    # With eta 1 all noise is fresh: it is the stochastic sampler.
    torch.testing.assert_close(images[0], images[-1], rtol=0, atol=SAME)
    for a, first in enumerate(images[1:]):
        for second in images[a + 2 :]:
            assert (first - second).abs().max() > 3 * SAME


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("sampler", ["stochastic", "tcd"])
def test_one_scheduler_of_eight_steps_serves_one_two_and_four(
    sd_export: Exported, sampler: Sampler, steps: int
) -> None:
    """A student for several numbers of steps is exported with the largest of them."""
    schedule = sd_export.family.schedule
    scheduler: Any = family_scheduler(sd_export.family, InferenceSpec(trailing(schedule, 8), sampler))
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == list(trailing(schedule, steps))


def test_the_check_of_a_run_passes_eta_to_the_fresh_process(sd: ModelFamily, tmp_path: Path) -> None:
    student, spec = student_of(sd), InferenceSpec((999, 499), "tcd", eta=0.5)
    folder = export_pipeline(sd, student, spec, tmp_path / "pipeline", facts={})
    assert check(sd, student, spec, folder, None) <= SAME


def test_a_pipeline_without_eta_takes_what_its_scheduler_would(dit: ModelFamily, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"DiTPipeline has no argument eta.* takes its own 0\.3; .* eta 0 cannot be"):
        family_scheduler(dit, InferenceSpec((999, 499), "tcd"))
    spec, student = InferenceSpec((999, 499), "tcd", eta=0.3), student_of(dit)
    folder = export_pipeline(dit, student, spec, tmp_path / "pipeline", facts={})
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(SEED)
    images = pipeline([3, 7], num_inference_steps=2, guidance_scale=1, output_type="np",
                      generator=torch.Generator().manual_seed(5)).images  # fmt: skip
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(SEED)
    with torch.no_grad():
        x0 = student_samples(dit.denoiser(OwnWeights(student)), noise, dit.encode_prompts(["3", "7"]), spec)
        expected = dit.decode_latents(x0)
    torch.testing.assert_close(torch.from_numpy(images).permute(0, 3, 1, 2), expected, rtol=0, atol=SAME)
