"""Hybrid sampling over two stock pipelines: what is handed over, what it costs, and that nothing else changes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler, LCMScheduler
from torch import Tensor

from stepdistill.bench.generate import ModelUnderTest, generate_images, load_pipeline
from stepdistill.errors import UserError
from stepdistill.export.pipeline import export_pipeline
from stepdistill.export.schedulers import family_scheduler
from stepdistill.families import load_family
from stepdistill.families.base import ModelFamily
from stepdistill.hybrid import HybridPipeline
from stepdistill.objectives.base import InferenceSpec
from stepdistill.sampling import Sampler
from stepdistill.stretch import levels
from stepdistill.times import trailing
from tests.families.test_export import noise_levels, student_of


TEXTS = ["red", "a ring"]
PROMPTS: Mapping[str, list[Any]] = {
    "sd": TEXTS, "dit": [3, 7], "sd3": TEXTS, "pixart": TEXTS, "sana": TEXTS, "flux": TEXTS,
}  # fmt: skip
FOUR = (999, 749, 499, 249)
SAME = 2e-5  # of images in [0, 1]: float32, with 1 / alpha = 14.6 at the first step
MEAN, STD = 0.3, 0.7  # of the data that the oracle below knows


@functools.cache
def _loaded(folder: str) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pipeline_of(folder: str) -> Any:
    """A stock pipeline that the caller may change; FLUX's makes images of 16 pixels."""
    pipeline = copy.deepcopy(_loaded(folder))
    if type(pipeline).__name__ == "FluxPipeline":
        pipeline.default_sample_size = 8
    return pipeline


@functools.cache
def family_of(folder: str) -> ModelFamily:
    """Not to be changed."""
    family = load_family(folder)
    family.at_size(16 if family.name == "flux" else None)
    return family


def images(pipeline: Any, prompts: list[Any], **options: Any) -> Tensor:
    """Images (2, H, W, 3), each from its own generator."""
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    torch.manual_seed(7)  # for pipelines that draw the noise between steps from torch's own
    made = pipeline(prompts, generator=generators, output_type="np", guidance_scale=1, **options).images
    return torch.from_numpy(made)


class Pair(NamedTuple):
    name: str
    student: Any
    same: Any  # a base with the student's network and the teacher's scheduler
    other: Any  # a base whose network says something else
    noise: dict[str, Tensor]  # what both begin with, for the student and, in its own scale, for the base
    scaled_noise: dict[str, Tensor]


@pytest.fixture(params=["sd", "dit", "sd3", "pixart", "sana", "flux"])
def pair(request: pytest.FixtureRequest) -> Pair:
    """A student that takes deterministic steps, and another network of the same kind."""
    folder = request.getfixturevalue(f"{request.param}_folder")
    family = family_of(folder)
    student, same, other = (pipeline_of(folder) for _ in range(3))
    if family.name == "dit":  # which gives its network unscaled noise, so that Euler's scheduler is not for it
        student.scheduler = DDIMScheduler.from_config(
            student.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True,
        )  # fmt: skip
    else:
        student.scheduler = family_scheduler(family, InferenceSpec(trailing(family.schedule, 4), "deterministic"))
    other.register_modules(**{family.network_component: student_of(family)})
    drawn = torch.randn(2, *family.latent_shape(), generator=torch.Generator().manual_seed(9))
    noise = family.pipeline_latents(drawn)
    given = {} if family.name == "dit" else {"latents": noise}
    # Euler's scheduler begins with sigma times the noise, and the base model with the noise itself.
    table = family.name in ("sd", "pixart")
    scaled = {"latents": float(levels(same.scheduler, 999)[1]) * noise} if table else given
    return Pair(family.name, student, same, other, given, scaled)


# ---- the path ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replaces", [1, 2, 3])
def test_with_one_network_as_both_models_the_path_is_that_of_the_student_alone(pair: Pair, replaces: int) -> None:
    prompts = PROMPTS[pair.name]
    alone = images(pair.student, prompts, num_inference_steps=4, **pair.noise)
    hybrid = HybridPipeline(pair.same, pair.student, replaces, base_guidance=1.0)
    both = images(hybrid, prompts, num_inference_steps=4, **pair.scaled_noise)
    # On PixArt's linear table 1 / alpha = 158 at the first step.
    torch.testing.assert_close(both, alone, rtol=0, atol=SAME * (20 if pair.name == "pixart" else 1))


def test_a_student_whose_noise_levels_follow_from_the_size_is_refused(flux_folder: str) -> None:
    with pytest.raises(UserError, match=r"shifts its noise levels by the size of images.*use_dynamic_shifting: false"):
        HybridPipeline(pipeline_of(flux_folder), pipeline_of(flux_folder))(["a"], num_inference_steps=4)


@pytest.mark.parametrize("replaces", [1, 2])
def test_in_double_precision_both_paths_are_one_to_a_millionth(sd_folder: str, replaces: int) -> None:
    """What is left is the rounding of the schedulers' own float32 tables."""
    student, same = (pipeline_of(sd_folder).to(torch.float64) for _ in range(2))
    student.scheduler = DDIMScheduler.from_config(
        student.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True,
    )  # fmt: skip
    noise = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    call = {"num_inference_steps": 4, "latents": noise, "output_type": "latent", "guidance_scale": 1}
    alone = student(PROMPTS["sd"], **call).images
    both = HybridPipeline(same, student, replaces, base_guidance=1.0)(PROMPTS["sd"], **call).images
    assert alone.dtype == both.dtype == torch.float64
    assert (both - alone).abs().max() <= 1e-6 * alone.abs().max()


def test_another_base_a_guided_one_and_finer_steps_give_other_images(pair: Pair) -> None:
    """Otherwise the comparison above would prove nothing."""
    prompts = PROMPTS[pair.name]
    ways = [
        HybridPipeline(pair.same, pair.student, base_guidance=1.0),
        HybridPipeline(pair.other, pair.student, base_guidance=1.0),
        HybridPipeline(pair.other, pair.student, base_guidance=4.0),
        HybridPipeline(pair.other, pair.student, base_guidance=1.0, base_steps=3),
        HybridPipeline(pair.other, pair.student, 2, base_guidance=1.0),
    ]
    made = [images(way, prompts, num_inference_steps=4) for way in ways]
    for i, first in enumerate(made):
        for second in made[i + 1 :]:
            assert (first - second).abs().max() > 10 * SAME


def test_both_pipelines_stay_what_they_were(pair: Pair) -> None:
    prompts = PROMPTS[pair.name]
    both = (pair.other, pair.student)
    before = [(p.scheduler, dict(p.config), images(p, prompts, num_inference_steps=4)) for p in both]
    images(HybridPipeline(pair.other, pair.student, base_guidance=4.0), prompts, num_inference_steps=4)
    for pipeline, (scheduler, config, made) in zip(both, before, strict=True):
        assert pipeline.scheduler is scheduler
        assert dict(pipeline.config) == config
        assert torch.equal(images(pipeline, prompts, num_inference_steps=4), made)


# ---- what is handed over, with a denoiser that knows its data ----------------------------------------------------


class Oracle:
    """Stands for a network, and is right about data N(MEAN, STD^2); remembers what it was given.

    D = mean + alpha std^2 / v (x - alpha mean), eps = sigma / v (x - alpha mean), with v = alpha^2 std^2 + sigma^2.
    """

    def __init__(self, flow: bool) -> None:
        self.flow, self.told, self.given = flow, [], []

    def levels(self, t: float) -> tuple[float, float]:
        return (1 - t / 1000, t / 1000) if self.flow else noise_levels(round(t))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        time = args[1] if len(args) > 1 else kwargs["timestep"]
        t = float(time.flatten()[0])
        self.told.append(t)
        self.given.append(x)
        alpha, sigma = self.levels(t)
        v = alpha**2 * STD**2 + sigma**2
        eps = sigma / v * (x - alpha * MEAN)
        clean = MEAN + alpha * STD**2 / v * (x - alpha * MEAN)
        return ((eps - clean) if self.flow else eps,)

    def walked(self, noise: Tensor, times: list[float]) -> Tensor:
        """Noise at the first time, through DDIM steps: each multiplies what is not the mean by a number."""
        alpha, _ = self.levels(times[0])
        rest = noise - alpha * MEAN
        for t, r in pairwise(times):
            (alpha, sigma), (alpha_r, sigma_r) = self.levels(t), self.levels(r)
            rest = rest * (alpha_r * alpha * STD**2 + sigma_r * sigma) / (alpha**2 * STD**2 + sigma**2)
        return self.levels(times[-1])[0] * MEAN + rest


@pytest.mark.parametrize(
    ("name", "sampler", "replaces", "steps"),
    [("sd", "stochastic", 1, 1), ("sd", "stochastic", 2, 50), ("sd", "deterministic", 1, 3), ("sd", "tcd", 1, 2),
     ("sd3", "stochastic", 1, 40), ("sd3", "deterministic", 2, 3)],
)  # fmt: skip
def test_the_student_gets_noisy_data_of_its_own_noise_level_in_closed_form(
    name: str, sampler: Sampler, replaces: int, steps: int, request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = request.getfixturevalue(f"{name}_folder")
    family, base, student = family_of(folder), pipeline_of(folder), pipeline_of(folder)
    spec = InferenceSpec(trailing(family.schedule, 4), sampler)
    student.scheduler = family_scheduler(family, spec)
    early, late = Oracle(name == "sd3"), Oracle(name == "sd3")
    for pipeline, oracle in ((base, early), (student, late)):
        monkeypatch.setattr(pipeline.components[family.network_component], "forward", oracle)
    noise = torch.randn(32, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    HybridPipeline(base, student, replaces, steps, base_guidance=1.0)(
        ["a"] * 32, num_inference_steps=4, latents=noise, output_type="latent"
    )
    student.scheduler.set_timesteps(4)
    expected_times = student.scheduler.timesteps.tolist()
    assert late.told == expected_times[replaces:], "the student goes on in its own schedule"
    assert len(early.told) == steps and early.told[0] == expected_times[0]
    assert min(early.told) > expected_times[replaces]
    given = late.given[0]
    torch.testing.assert_close(given, early.walked(noise, [*early.told, late.told[0]]), rtol=1e-4, atol=1e-4)
    if steps >= 40:  # fine enough for the exact path
        alpha, sigma = late.levels(late.told[0])
        assert given.var().item() == pytest.approx(alpha**2 * STD**2 + sigma**2, rel=0.06)
        assert given.mean().item() == pytest.approx(alpha * MEAN, abs=0.05)


def test_the_base_takes_even_steps_down_to_the_handover(sd_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, student = pipeline_of(sd_folder), pipeline_of(sd_folder)
    student.scheduler = family_scheduler(family_of(sd_folder), InferenceSpec(FOUR))
    oracle = Oracle(flow=False)
    monkeypatch.setattr(base.unet, "forward", oracle)
    HybridPipeline(base, student, 2, 5, base_guidance=1.0)(["a"], num_inference_steps=4)
    assert oracle.told == [999, 899, 799, 699, 599]


# ---- what it costs -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student_folder(sd_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A stochastic student of four steps, exported."""
    family, folder = family_of(sd_folder), tmp_path_factory.mktemp("hybrid") / "student"
    return str(export_pipeline(family, student_of(family), InferenceSpec(FOUR), folder, facts={}))


@pytest.mark.parametrize(
    ("replaces", "steps", "guidance", "calls"),
    [(1, None, 3.0, 2 + 3), (1, None, 1.0, 1 + 3), (2, None, 3.0, 4 + 2), (1, 3, 3.0, 6 + 3), (3, 1, 1.0, 1 + 1)],
)
def test_network_calls_of_both_models_are_counted(
    student_folder: str, sd_folder: str, replaces: int, steps: int | None, guidance: float, calls: int
) -> None:
    model = ModelUnderTest("both", student_folder, 4, 1.0, base=sd_folder, base_replaces=replaces, base_steps=steps,
                           base_guidance=guidance)  # fmt: skip
    made = generate_images(load_pipeline(model), ["red", "a ring"], model=model, images_per_prompt=2)
    assert made.nfe == calls
    assert made.images.shape == (4, 3, 16, 16)


def test_a_row_of_the_benchmark_depends_on_the_base_and_not_on_the_batch_size(
    student_folder: str, sd_folder: str
) -> None:
    model = ModelUnderTest("both", student_folder, 4, 1.0, base=sd_folder)

    def made(called: ModelUnderTest, batch_size: int) -> Tensor:
        pipeline = load_pipeline(called)
        return generate_images(
            pipeline, ["red", "a ring"], model=called, images_per_prompt=3, batch_size=batch_size
        ).images

    at_once = made(model, 6)
    torch.testing.assert_close(made(model, 2), at_once, rtol=0, atol=2e-4)
    assert (made(replace(model, base=None), 6) - at_once).abs().max() > 1e-2
    assert (made(replace(model, base_guidance=1.0), 6) - at_once).abs().max() > 1e-3


def test_parts_that_the_two_models_share_are_named_once(sd_folder: str) -> None:
    base, student = pipeline_of(sd_folder), pipeline_of(sd_folder)
    base.text_encoder = student.text_encoder
    parts = HybridPipeline(base, student).components
    assert parts["unet"] is student.unet
    assert parts["unet_of_base"] is base.unet
    assert "text_encoder_of_base" not in parts


# ---- what is refused ---------------------------------------------------------------------------------------------


def other_scale(pipeline: Any) -> None:
    pipeline.vae.register_to_config(scaling_factor=0.25)


def other_betas(pipeline: Any) -> None:
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, beta_end=0.02)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (None, {"replaces": 4}, r"4 of the student's 4 steps and would leave it none"),
        (None, {"replaces": 0}, r"both are at least 1"),
        (None, {"base_steps": 0}, r"both are at least 1"),
        (None, {"base_steps": 300}, r"no 300 timesteps from 999 to 749"),
        (other_scale, {}, r"latents differ.*4, 0.25.*4, 0.5.*teacher"),
        (other_betas, {}, r"at timestep 749 the noise level is .* teacher"),
    ],
)
def test_models_and_numbers_that_do_not_fit_are_refused_with_a_remedy(
    sd_folder: str, change: Callable[[Any], None] | None, options: dict[str, Any], message: str
) -> None:
    base, student = pipeline_of(sd_folder), pipeline_of(sd_folder)
    student.scheduler = EulerDiscreteScheduler.from_config(student.scheduler.config, timestep_spacing="trailing")
    if change is not None:
        change(base)
    with pytest.raises(UserError, match=message):
        HybridPipeline(base, student, **options)(["a"], num_inference_steps=4)


def test_a_flow_model_and_one_on_a_table_of_betas_do_not_go_together(sd_folder: str, sd3_folder: str) -> None:
    with pytest.raises(UserError, match=r"one model is of flow matching and the other is not"):
        HybridPipeline(pipeline_of(sd3_folder), pipeline_of(sd_folder))


def test_a_student_may_bring_a_shorter_table_of_the_same_levels(sd_folder: str) -> None:
    """As a student does that begins below the last timestep."""
    family, base, student = family_of(sd_folder), pipeline_of(sd_folder), pipeline_of(sd_folder)
    student.scheduler = family_scheduler(family, InferenceSpec((799, 399)))
    assert isinstance(student.scheduler, LCMScheduler) and len(student.scheduler.alphas_cumprod) == 800
    assert images(HybridPipeline(base, student), ["a", "b"], num_inference_steps=2).shape == (2, 16, 16, 3)
