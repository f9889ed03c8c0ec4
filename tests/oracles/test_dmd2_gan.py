"""DMD2 with its GAN and in several steps, against closed forms: who is moved where, by whom, how often, from what."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from stepdistill.condition import Condition
from stepdistill.data.cache import EncodedOnTheFly
from stepdistill.data.prompts import PromptSet
from stepdistill.denoiser import Denoiser, OwnWeights
from stepdistill.export.pipeline import export_pipeline
from stepdistill.export.schedulers import student_scheduler
from stepdistill.families import load_family
from stepdistill.families.base import ModelFamily
from stepdistill.objectives.adversarial import Adversary
from stepdistill.objectives.base import Batch, InferenceSpec, Step
from stepdistill.objectives.dmd2 import DMD2
from stepdistill.objectives.matching import critic_denoising, rollout
from stepdistill.recipe import Recipe, build_objective
from stepdistill.schedule import VPSchedule, from_scheduler_config
from stepdistill.trainer import Trainer
from tests.families.test_export import LATENTS, PROMPTS, student_of
from tests.oracles.oracle import (
    SCHEDULE,
    Linear,
    Roles,
    batch_of,
    constant,
    four_signs,
    gaussian,
    label,
    linear_student,
    mixture,
    shaped,
)
from tests.tiny import LORA, PaintedLatents, trainer_of, weights_of


M, S, A, B = 0.7, 0.5, 1.3, -0.4
FOUR, TWO = (999, 749, 499, 249), (999, 499)
GAN = {"guidance": 2.0, "critic_updates": 2, "gan_weight": 0.1}
ROOT = Path(__file__).resolve().parents[2]


# ---- the adversarial gradient with the best discriminator ----------------------------------------------------------


class BestDiscriminator:
    """log p_t / q_t of the teacher's Gaussian N(M, S^2) and the student's N(b, a^2); remembers what it was shown."""

    def __init__(self, a: float, b: float) -> None:
        self.a, self.b = a, b
        self.x_t = self.t = torch.empty(0)

    def log_ratio(self, x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = shaped(SCHEDULE.alpha(t), x_t), shaped(SCHEDULE.sigma(t), x_t)

        def log_density(mean: float, std: float) -> Tensor:
            v = alpha**2 * std**2 + sigma**2
            return -((x_t - alpha * mean) ** 2) / (2 * v) - 0.5 * v.log()

        return log_density(M, S) - log_density(self.b, self.a)

    def __call__(self, denoiser: Any, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.x_t, self.t = x_t.detach(), t
        return self.log_ratio(x_t, t)


class WithHead(Roles):
    def __init__(self, network: Linear, a: float, b: float) -> None:
        super().__init__({
            "student": linear_student(network),
            "teacher": gaussian(constant(M), S),
            "critic": gaussian(constant(b), a),
        })  # fmt: skip
        self.best = BestDiscriminator(a, b)

    def head(self, role: str) -> BestDiscriminator:
        return self.best


def test_the_best_logit_gives_the_score_difference_softened_by_the_density_ratio() -> None:
    """d softplus(-D*) / dx = -(s_p - s_q) alpha / (1 + p/q): the reverse KL's gradient times h(r) = 1 / (1 + r)."""
    torch.manual_seed(0)
    roles: Any = WithHead(Linear(A, B), A, B)
    z = torch.randn(64, 1, dtype=torch.float64)
    x0 = (A * z + B).requires_grad_(True)
    (gradient,) = torch.autograd.grad(Adversary().student_term(roles, x0, batch_of(z)), x0)
    x_t, t = roles.best.x_t, roles.best.t
    empty = Condition({"label": torch.zeros(64)})
    score_p, score_q = (roles.denoiser(role)(x_t, t, empty).score for role in ("teacher", "critic"))
    ratio = roles.best.log_ratio(x_t, t).exp()
    assert len(t.unique()) == 3
    assert ratio.max() / ratio.min() > 10
    expected = -(score_p - score_q) * shaped(SCHEDULE.alpha(t), x_t) / (1 + ratio) / 64
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("a", "b"), [(S, -0.4), (S, 2.0), (S, 0.6)])
def test_the_adversarial_gradient_moves_the_mean_where_matching_moves_it(a: float, b: float) -> None:
    means = []
    for objective in (DMD2(guidance=1.0), DMD2(guidance=1.0, gan_weight=1.0)):
        torch.manual_seed(1)
        network = Linear(a, b)
        roles: Any = WithHead(network, a, b)
        terms = objective.student_loss(roles, batch_of(torch.randn(4096, 1, dtype=torch.float64)), Step(0)).terms
        (gradient,) = torch.autograd.grad(terms["adversarial" if objective.adversarial else "matching"], network.b)
        means.append(gradient.item())
    assert math.copysign(1, means[0]) == math.copysign(1, means[1]) == math.copysign(1, b - M)
    assert abs(means[1]) > 1e-4


def test_the_adversarial_gradient_vanishes_where_student_and_teacher_agree() -> None:
    network = Linear(S, M)
    roles: Any = WithHead(network, S, M)
    x0 = torch.randn(64, 1, dtype=torch.float64).requires_grad_(True)
    (gradient,) = torch.autograd.grad(Adversary().student_term(roles, x0, batch_of(x0.detach())), x0)
    assert gradient.abs().max() < 1e-12


def test_the_students_loss_is_the_weighted_sum_of_both_terms() -> None:
    losses = []
    for weight in (0.0, 1.0, 0.25):
        torch.manual_seed(2)
        roles: Any = WithHead(Linear(A, B), A, B)
        batch = batch_of(torch.randn(32, 1, dtype=torch.float64))
        losses.append(DMD2(guidance=1.0, gan_weight=weight).student_loss(roles, batch, Step(0)))
    plain, full, quarter = losses
    assert set(plain.terms) == {"matching"}
    assert full.terms["matching"] == quarter.terms["matching"] == plain.terms["matching"]
    assert quarter.terms["adversarial"].item() == pytest.approx(0.25 * full.terms["adversarial"].item(), abs=1e-12)


def test_the_discriminator_looks_where_its_noise_is_asked_for_and_learns_what_prompts_ask_for() -> None:
    objective = DMD2(guidance=1.0, gan_weight=0.1, discriminator_weight=2.0, gan_log_noise=(-1.0, 0.5),
                     misaligned_weight=0.25, gan_loss="hinge")  # fmt: skip
    roles: Any = WithHead(Linear(A, B), A, B)
    z = torch.randn(2000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = batch_of(z)
    object.__setattr__(batch, "latents", S * z + M)
    shown: list[Tensor] = []

    def head(denoiser: Any, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        shown.append(t)
        return torch.full((len(t), 1), [0.5, 0.25, -0.25][len(shown) - 1], dtype=torch.float64)

    roles.head = lambda role: head
    terms = objective.critic_loss(roles, batch, Step(0)).terms
    # real 0.5, generated 0.25, real with others' prompts -0.25
    assert terms["discriminator"].item() == pytest.approx(2.0 * (1.25 + 0.5), abs=1e-12)
    assert terms["misaligned"].item() == pytest.approx(2.0 * 0.25 * (0.75 + 0.5), abs=1e-12)
    ratio = (SCHEDULE.sigma(shown[0]) / SCHEDULE.alpha(shown[0])).log()
    assert ratio.mean().item() < -0.6, "all three times alike would give 0.3"
    assert torch.equal(shown[0], shown[2])


# ---- who is updated, by what, and how often ------------------------------------------------------------------------


def game(family: ModelFamily, objective: DMD2, lora: bool = False, **options: Any) -> Trainer:
    roles = dict.fromkeys(("student", "critic"), LORA) if lora else {}
    trainer = trainer_of(family, objective, lora=roles, **options)
    trainer.batches.latents = PaintedLatents()
    return trainer


@pytest.mark.parametrize(
    ("options", "lora"),
    [
        ({}, False),
        ({}, True),
        ({"features": "teacher", "gan_log_noise": (-1.5, 1.0), "misaligned_weight": 1.0}, False),
        ({"gan_loss": "relativistic", "r1_weight": 1.0}, True),
        ({"gan_loss": "hinge", "layers": ("down_blocks.0", "mid_block")}, False),
    ],
    ids=["full", "lora", "teacher", "relativistic", "two layers"],
)
def test_a_turn_leaves_gradients_and_changes_on_its_own_roles_only(
    sd: ModelFamily, options: dict[str, Any], lora: bool
) -> None:
    trainer = game(sd, DMD2(**GAN, **options), lora)
    for phase in trainer.objective.phases(0):
        before = weights_of(trainer)
        trainer._run_phase(phase, 0)
        after = weights_of(trainer)
        moved = {name.partition("/")[0] for name in before if not torch.equal(before[name], after[name])}
        assert moved == set(phase.updates)
        left = [p for role in trainer.players for p in trainer.cast.parameters(role).values() if p.grad is not None]
        assert left == [], "an update clears its own gradients, and nobody else has got any"
        assert all(p.grad is None for p in sd.network().parameters())


def test_without_weight_the_classification_leaves_the_critic_its_pure_denoising_update(sd_folder: str) -> None:
    ends = []
    for options in ({}, {"gan_weight": 0.1, "discriminator_weight": 0.0}, {"gan_weight": 0.1}):
        trainer = game(load_family(sd_folder), DMD2(guidance=2.0, **options))
        batch = trainer.batches.next("images", 2)
        trainer.batches.next = lambda stream, count, groups, batch=batch: batch  # type: ignore[method-assign]
        torch.manual_seed(3)
        trainer._run_phase(trainer.objective.phases(0)[0], 0)
        ends.append(trainer.cast.state("critic").tensors)
    plain, weightless, classifying = ends
    assert all(torch.equal(plain[name], weightless[name]) for name in plain)
    # "Its features tell real from made": with the weight, the classification shapes the critic up to the bottleneck.
    shaped_by_it = {name.partition(".")[0] for name in plain if not torch.equal(plain[name], classifying[name])}
    assert {"conv_in", "down_blocks", "mid_block"} <= shaped_by_it


def test_features_of_the_frozen_teacher_leave_the_critic_its_pure_denoising_update(sd_folder: str) -> None:
    ends = []
    for options in ({}, {"gan_weight": 0.1, "features": "teacher", "discriminator_weight": 1.0}):
        trainer = game(load_family(sd_folder), DMD2(guidance=2.0, **options))
        batch = trainer.batches.next("images", 2)
        trainer.batches.next = lambda stream, count, groups, batch=batch: batch  # type: ignore[method-assign]
        torch.manual_seed(3)
        trainer._run_phase(trainer.objective.phases(0)[0], 0)
        ends.append(trainer.cast.state("critic").tensors)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_critic_and_discriminator_play_five_turns_for_each_of_the_students(sd: ModelFamily) -> None:
    objective = DMD2(gan_weight=1e-3, critic_updates=5)
    counts = dict.fromkeys(("critic", "discriminator", "student"), 0)
    for step in range(20):
        for phase in objective.phases(step):
            for role in phase.updates:
                counts[role] += phase.repeats
    assert counts == {"critic": 100, "discriminator": 100, "student": 20}
    trainer = game(sd, objective, lora=True, steps=1)
    trainer.run()
    assert {name: player.updates for name, player in trainer.players.items()} == {
        "critic": 5, "discriminator": 5, "student": 1,
    }  # fmt: skip
    assert trainer.batches.drawn == {"images": 5, "prompts": 1}, "the student's turn needs no images"


def test_the_student_of_a_relativistic_game_meets_images_too(sd: ModelFamily) -> None:
    trainer = game(sd, DMD2(**GAN, gan_loss="relativistic"), lora=True, steps=1)
    trainer.run()
    assert trainer.batches.drawn == {"images": 3}


def test_a_critic_that_learns_more_often_knows_the_students_samples_better() -> None:
    """On a mixture in the plane, at a small learning rate, the critic of five turns beats the critic of one."""
    errors = []
    for updates in (1, 5):
        torch.manual_seed(4)
        networks = {role: Small() for role in ("critic", "student")}
        roles: Any = Roles({
            "teacher": mixture(torch.ones(3) / 3, torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, -1.0]]), 0.2),
            **{r: Denoiser(small_call, OwnWeights(n), SCHEDULE, "epsilon") for r, n in networks.items()},
        })  # fmt: skip
        optimizers = {role: torch.optim.Adam(network.parameters(), lr=2e-3) for role, network in networks.items()}
        objective = DMD2(guidance=1.0, timesteps=(2,), critic_updates=updates)
        for step in range(40):
            for phase in objective.phases(step):
                for _ in range(phase.repeats):
                    (role,) = phase.updates
                    networks[role].requires_grad_(True)
                    loss = phase.loss(roles, plane_batch(128), Step(step)).total
                    optimizers[role].zero_grad()
                    loss.backward()
                    optimizers[role].step()
                    networks[role].requires_grad_(False)
        torch.manual_seed(5)
        batch = plane_batch(4096)
        with torch.no_grad():
            x0 = rollout(roles.denoiser("student"), batch, (2,), Step(0))
            errors.append(critic_denoising(roles.denoiser("critic"), x0, batch, drop=None, signal_weight=False).item())
    assert errors[1] < 0.8 * errors[0]


class Small(nn.Module):
    """(x_t, time) => epsilon in the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 2))


def small_call(network: Any, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
    said: Tensor = network.layers(torch.cat([x_t, model_time.to(x_t)[:, None]], dim=1))
    return said


def plane_batch(count: int) -> Batch:
    rows = Condition({"label": torch.zeros(count)})
    return Batch(rows, rows, (2,), torch.device("cpu"))  # type: ignore[arg-type]


# ---- the critic's loss ---------------------------------------------------------------------------------------------


def test_the_critics_epsilon_error_is_its_x0_error_times_the_signal_to_noise_ratio(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    z, eps = four_signs()
    monkeypatch.setattr(torch, "randn_like", lambda x: eps.to(x.dtype))
    monkeypatch.setattr(
        "stepdistill.objectives.matching.uniform_times",
        lambda schedule, count, **_: torch.tensor([1, 2, 3, 2], dtype=torch.float64) / 3,
    )
    network, seen = Linear(0.3, 0.2), []
    critic = linear_student(network)
    critic.kind = "epsilon"
    call = type(critic).__call__
    monkeypatch.setattr(type(critic), "__call__", lambda self, *args: seen.append(call(self, *args)) or seen[-1])
    loss = critic_denoising(critic, z, batch_of(z), drop=None, signal_weight=False)
    (said,) = seen
    snr = (said.levels.alpha / said.levels.sigma) ** 2
    pointwise = snr * (said.x0 - z) ** 2
    torch.testing.assert_close(pointwise, (said.eps - eps) ** 2, rtol=1e-9, atol=1e-12)
    assert loss.item() == pytest.approx(pointwise.mean().item(), abs=1e-12)


# ---- guidance on a mixture -----------------------------------------------------------------------------------------


def test_on_a_real_mixture_guidance_moves_the_mean_outwards_and_narrows_the_student() -> None:
    """Classes N(+-1, 0.3^2) whose union is the null condition; a linear student that learns one of them."""
    ends = []
    for kappa in (1.0, 2.0, 5.0):
        network = Linear(0.3, 1.0)
        optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
        torch.manual_seed(6)
        z = torch.randn(128, 16, dtype=torch.float64)
        z = torch.cat([z, -z]) / z.square().mean().sqrt()
        objective = DMD2(guidance=kappa)
        for step in range(150):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 150)
            b, a = network.b.item(), abs(network.a.item())
            roles: Any = Roles({"student": linear_student(network), "teacher": two_classes(0.3),
                                "critic": gaussian(constant(b), a)})  # fmt: skip
            optimizer.zero_grad()
            objective.student_loss(roles, batch_of(z, label=1.0, null=0.0), Step(step)).total.backward()
            optimizer.step()
        ends.append((network.b.item(), abs(network.a.item())))
    means, stds = zip(*ends, strict=True)
    assert means[0] == pytest.approx(1.0, abs=0.05)
    assert stds[0] == pytest.approx(0.3, abs=0.05)
    assert means[0] < means[1] < means[2]
    assert stds[0] > stds[1] > stds[2]


def two_classes(std: float) -> Denoiser:
    """Per element: the class N(label, std^2) for labels +-1, and the even mixture of both for label 0."""

    def call(network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        t = SCHEDULE.t_from_model_time(model_time)
        alpha, sigma = shaped(SCHEDULE.alpha(t), x_t), shaped(SCHEDULE.sigma(t), x_t)
        v = alpha**2 * std**2 + sigma**2
        # the mixture's expected class mean is tanh of the log odds' half
        mixed = torch.tanh(alpha * x_t / v)
        mean = shaped(label(condition), x_t)
        mean = torch.where(mean == 0, mixed, mean.expand_as(x_t))
        return sigma * (x_t - alpha * mean) / v

    return Denoiser(call, OwnWeights(nn.Module()), SCHEDULE, "epsilon")


# ---- several steps -------------------------------------------------------------------------------------------------


def test_of_a_real_students_calls_only_the_last_is_in_the_graph(sd: ModelFamily) -> None:
    trainer = game(sd, DMD2(timesteps=FOUR), lora=True)
    student, calls = trainer.cast.denoiser("student"), []
    forward = student._call

    def recording(network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        said = forward(network, x_t, model_time, condition)
        calls.append((round(model_time[0].item()), said.requires_grad, x_t))
        return said

    student._call = recording
    drawn = set()
    with trainer.cast.trainable(("student",)):
        for index in (9, 0, 1, 2):  # which draw each of the four steps once
            calls.clear()
            x0 = rollout(student, trainer.batches.next("prompts", 2), FOUR, Step(index))
            assert [call[0] for call in calls] == list(FOUR[: len(calls)])
            assert [call[1] for call in calls] == [False] * (len(calls) - 1) + [True]
            assert not any(call[2].requires_grad for call in calls)
            assert x0.requires_grad
            drawn.add(len(calls))
    assert drawn == {1, 2, 3, 4}


def test_linear_steps_that_each_give_the_teachers_law_are_those_of_the_closed_form() -> None:
    """A_k = s / sqrt(alpha_k^2 s^2 + sigma_k^2) and B_k = m - A_k alpha_k m; A_0 = s, B_0 = m on pure noise."""
    schedule = VPSchedule(torch.tensor([0.9, 0.64, 0.3, 0.01], dtype=torch.float64))
    timesteps = (3, 2, 1)
    coefficients = {3: (S, M)}
    for k in timesteps[1:]:
        t = schedule.t_from_model_time(torch.tensor([float(k)]))
        alpha, sigma = schedule.alpha(t).item(), schedule.sigma(t).item()
        slope = S / math.sqrt(alpha**2 * S**2 + sigma**2)
        coefficients[k] = (slope, M - slope * alpha * M)

    def call(network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        slope, offset = coefficients[round(model_time[0].item())]
        seen.append(round(model_time[0].item()))
        return slope * x_t + offset

    student = Denoiser(call, OwnWeights(nn.Module()), schedule, "sample")
    torch.manual_seed(7)
    z = torch.randn(50_000, 1, dtype=torch.float64)
    last = set()
    for index in range(3):
        seen: list[int] = []
        x0 = rollout(student, batch_of(z), timesteps, Step(index))
        last.add(seen[-1])
        assert x0.mean().item() == pytest.approx(M, abs=0.015)
        assert x0.std().item() == pytest.approx(S, abs=0.015)
    assert last == set(timesteps)
    coefficients[2] = (1.2 * coefficients[2][0], coefficients[2][1])
    stds = [rollout(student, batch_of(z), (3, 2), Step(index)).std().item() for index in range(2)]
    assert max(stds) == pytest.approx(1.2 * S, abs=0.01), "another slope gives another law"


@pytest.mark.parametrize(("count", "timesteps"), [(1, (549,)), (2, TWO), (4, FOUR)])  # one step: ours, see the recipe
def test_the_recipes_step_lists_are_the_published_ones_and_the_stock_scheduler_takes_them(
    count: int, timesteps: tuple[int, ...]
) -> None:
    assert count == 1 or timesteps == tuple(999 - i * 1000 // count for i in range(count))
    recipe = Recipe.load(ROOT / f"recipes/shapes/dmd2_{count}step.yaml")
    spec = build_objective(recipe.stages[-1].objective, "").inference()
    assert spec is not None
    assert (spec.timesteps, spec.sampler, spec.guidance_scale) == (timesteps, "stochastic", 1.0)
    betas = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler: Any = student_scheduler(betas, spec)
    scheduler.set_timesteps(count)
    assert scheduler.timesteps.tolist() == list(timesteps)


# ---- one step below the last ---------------------------------------------------------------------------------------


def test_at_399_pure_noise_is_converted_with_the_levels_of_399() -> None:
    betas = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    schedule, kind = from_scheduler_config({**betas, "_class_name": "DDIMScheduler", "prediction_type": "epsilon"})
    told = []

    def silent(network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        told.append(model_time)
        return torch.zeros_like(x_t)

    z = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    student = Denoiser(silent, OwnWeights(nn.Module()), schedule, kind)
    objective = DMD2(timesteps=(399,))
    x0 = rollout(student, batch_of(z), objective.timesteps, Step(0))
    assert [t.tolist() for t in told] == [[399.0] * 3]
    torch.testing.assert_close(x0, z / 0.652753, rtol=1e-6, atol=0)
    assert objective.inference() == InferenceSpec((399,), "stochastic", 1.0)


def test_the_exported_pipeline_gives_in_one_step_at_399_what_the_student_was_trained_as(
    sd: ModelFamily, tmp_path: Path
) -> None:
    student, objective = student_of(sd), DMD2(timesteps=(399,))
    prompts = PromptSet(tuple(PROMPTS))
    condition = EncodedOnTheFly(sd, prompts).conditions(range(2))
    batch = batch_of(LATENTS)
    object.__setattr__(batch, "condition", condition)
    with torch.no_grad():
        expected = sd.decode_latents(rollout(sd.denoiser(OwnWeights(student)), batch, objective.timesteps, Step(0)))
    folder = export_pipeline(sd, student, objective.inference(), tmp_path / "pipeline", facts={})

    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    told: list[int] = []
    pipeline.unet.register_forward_pre_hook(lambda module, args: told.append(int(args[1])))
    images = pipeline(PROMPTS, num_inference_steps=1, guidance_scale=1, latents=LATENTS, output_type="pt").images
    assert told == [399]
    assert ((expected > 0.01) & (expected < 0.99)).float().mean() > 0.5, "the images must not be all black and white"
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


def test_the_time_range_of_the_matching_loss_is_that_of_the_code() -> None:
    """20 to 980 of 1000, both included."""
    schedule = VPSchedule(torch.linspace(0.999, 0.001, 1000, dtype=torch.float64))
    seen: list[Tensor] = []

    class Watching(DMD2):
        def direction_at(self, cast: Any, x0: Tensor, at: tuple[Tensor, Tensor], batch: Batch, step: Step) -> Tensor:
            seen.append(schedule.model_time(at[1]))
            return torch.zeros_like(x0)

    teacher = gaussian(constant(M), S, schedule)
    roles: Any = Roles({"teacher": teacher, "critic": teacher})
    torch.manual_seed(8)
    z = torch.randn(20_000, 1, dtype=torch.float64)
    Watching().direction(roles, z, batch_of(z), Step(0))
    assert (seen[0].min().item(), seen[0].max().item()) == (20.0, 980.0)
