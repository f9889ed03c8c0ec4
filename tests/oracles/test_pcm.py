"""Phased consistency on Gaussians: optima in closed form, edges of phases, limits; the adversarial part by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepdistill.condition import Condition
from stepdistill.denoiser import Denoiser, OwnWeights
from stepdistill.discriminator import Discriminator
from stepdistill.errors import UserError
from stepdistill.families.base import ModelFamily
from stepdistill.objectives import pcm
from stepdistill.objectives.base import Batch, Frozen, Head, InferenceSpec, Recorded, Step, Trained
from stepdistill.objectives.lcm import LCM
from stepdistill.objectives.pcm import PCM
from stepdistill.objectives.trajectory import Trajectory
from stepdistill.prediction import Levels, add_more_noise, native_target
from stepdistill.recipe import Recipe
from stepdistill.schedule import NoiseSchedule
from stepdistill.segments import SolverGrid
from tests.oracles.oracle import GivenNoise, Roles, constant, four_signs, gaussian, label
from tests.oracles.trajectories import FLOW, STD, VP, images, slope
from tests.tiny import PaintedLatents, trainer_of, weights_of


CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
STEPS = 8
TWO = (999, 499)
PLAIN: dict[str, Any] = {"solver_steps": STEPS, "guidance": 1.0, "distance": "mse", "gan_weight": 0.0}
KINDS = [(VP, "epsilon"), (VP, "v_prediction"), (VP, "sample"), (FLOW, "flow")]


def gaussian_of(schedule: NoiseSchedule, kind: str) -> Denoiser:
    """The exact denoiser of N(0, STD^2), as a network of a kind."""

    def call(network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        levels = Levels.at(schedule, schedule.t_from_model_time(model_time), x_t)
        variance = (levels.alpha * STD) ** 2 + levels.sigma**2
        return native_target(kind, levels.alpha * STD**2 / variance * x_t, levels.sigma / variance * x_t, levels)

    return Denoiser(call, OwnWeights(nn.Module()), schedule, kind)


class Jumps(nn.Module):
    """The jump from the i-th time of the grid to the end of its phase multiplies x by j_i."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.j = nn.Parameter(values.double())


def jumping(network: Jumps, phases: int, schedule: NoiseSchedule, kind: str) -> Denoiser:
    """The view of jumps as a network: with x0 = a x, j = alpha_e a + sigma_e (1 - alpha_i a) / sigma_i gives a."""
    grid = SolverGrid(schedule, len(network.j) - 1, CPU)

    def call(module: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        t = schedule.t_from_model_time(model_time)
        i = (t * grid.steps).round().long().clamp(min=1)
        here = Levels.at(schedule, t, x_t)
        end = Levels.at(schedule, grid.times[grid.segment_start(i, phases)], x_t)
        ratio = end.sigma / here.sigma
        a = (module.j[i].reshape(here.alpha.shape) - ratio) / (end.alpha - ratio * here.alpha)
        return native_target(kind, a * x_t, (1 - here.alpha * a) / here.sigma * x_t, here)

    denoiser = Denoiser(call, OwnWeights(network), schedule, kind)
    network.requires_grad_(True)
    return denoiser


def phase_products(schedule: NoiseSchedule, phases: int) -> Tensor:
    """Products of the teacher's DDIM slopes from the end of the phase up to each number."""
    levels = [Levels.at(schedule, t.reshape(1), torch.zeros(1)) for t in SolverGrid(schedule, STEPS, CPU).times]
    products = [1.0]
    for i in range(1, STEPS + 1):
        first = (i - 1) * phases % STEPS == 0
        products.append(float(slope(levels[i], levels[i - 1])) * (1.0 if first else products[-1]))
    return torch.tensor(products, dtype=torch.float64)


@pytest.fixture
def batch(monkeypatch: pytest.MonkeyPatch) -> GivenNoise:
    """Every number of the grid, for every one of four signs: exact means of squares."""
    i = torch.arange(1, STEPS + 1).repeat_interleave(4)
    monkeypatch.setattr(SolverGrid, "pairs", lambda grid, count: (i, grid.times[i], grid.times[i - 1]))
    signs, eps = four_signs()
    return images(STD * signs.repeat(STEPS, 1), eps.repeat(STEPS, 1))


@pytest.mark.parametrize(("schedule", "kind"), KINDS, ids=[kind for _, kind in KINDS])
@pytest.mark.parametrize("timesteps", [(999,), TWO, (999, 749, 499, 249)])
def test_the_optimum_is_the_product_of_the_teachers_slopes_inside_the_phase_only(
    timesteps: tuple[int, ...], schedule: NoiseSchedule, kind: str, batch: GivenNoise
) -> None:
    best, phases = phase_products(schedule, len(timesteps)), len(timesteps)
    assert phases == 1 or abs(best[5] - phase_products(schedule, 1)[5]) > 0.01, "other phases would show"
    objective = PCM(timesteps=timesteps, **PLAIN)
    times = SolverGrid(schedule, STEPS, CPU).times
    variances = (schedule.alpha(times) * STD) ** 2 + schedule.sigma(times) ** 2
    for offset in (0.0, 0.1):
        network = Jumps(best + offset)
        cast = Roles({"teacher": gaussian_of(schedule, kind), "student": jumping(network, phases, schedule, kind)})
        loss = objective.student_loss(cast, batch, Step(0)).total
        loss.backward()
        first = torch.tensor([(i - 1) * phases % STEPS == 0 for i in range(1, STEPS + 1)])
        m = best[1:] / torch.where(first, 1.0, best[:-1])
        gap = offset * torch.where(first, torch.ones_like(m), 1 - m)
        expected = 2 * variances[1:] * gap / STEPS
        torch.testing.assert_close(network.j.grad[1:], expected, rtol=0, atol=1e-10)
        assert loss.item() == pytest.approx(float((variances[1:] * gap**2).mean()), abs=1e-12)


def test_where_a_phase_ends_the_target_is_the_solvers_sample_to_the_bit(
    batch: GivenNoise, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def measuring(kind: str, found: Tensor, target: Tensor, c: float) -> Tensor:
        seen["target"] = target
        return found.flatten(1).mean(1)

    monkeypatch.setattr(pcm, "distance", measuring)
    teacher, objective = gaussian(constant(0.0), STD, VP), PCM(timesteps=TWO, **PLAIN)
    network = Jumps(torch.linspace(0.9, 0.2, STEPS + 1))
    cast = Roles({"teacher": teacher, "student": jumping(network, 2, VP, "epsilon")})
    objective.student_loss(cast, batch, Step(0))
    leap = objective.leap(VP, batch)
    x_s = Trajectory(STEPS, STEPS, "ddim", 1.0).target(teacher, teacher, replace(leap, end=leap.s), batch)
    edges = leap.s == leap.end
    assert edges.nonzero().flatten().tolist() == [0, 1, 2, 3, 16, 17, 18, 19]
    assert torch.equal(seen["target"][edges], x_s[edges])
    assert not torch.isclose(seen["target"][~edges], x_s[~edges]).any()


@pytest.mark.parametrize("guidance", [1.0, (3.0, 15.0)])
def test_a_single_phase_is_lcm(guidance: Any, batch: GivenNoise) -> None:
    options: dict[str, Any] = {"solver_steps": STEPS, "guidance": guidance, "target_decay": 0.0, "huber_c": 1.0}
    labelled, gradients = images(batch.latents, batch.z, label=1.0, null=-1.0), []
    for objective in (PCM(timesteps=(999,), gan_weight=0.0, **options), LCM(embed_guidance=False, **options)):
        network = Jumps(torch.linspace(1, 0.5, STEPS + 1))
        cast = Roles({"teacher": gaussian(label, STD, VP), "student": jumping(network, 1, VP, "epsilon")})
        torch.manual_seed(5)
        (phase,) = objective.phases(0)
        phase.loss(cast, labelled, Step(0)).total.backward()
        gradients.append(network.j.grad)
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("schedule", "kind"), KINDS, ids=[kind for _, kind in KINDS])
def test_with_a_phase_for_every_solver_step_the_teacher_is_its_own_student(
    schedule: NoiseSchedule, kind: str, batch: GivenNoise
) -> None:
    timesteps = tuple(range(999, -1, -125))
    teacher = gaussian_of(schedule, kind)
    cast = Roles({"teacher": teacher, "student": teacher})
    assert PCM(timesteps=timesteps, **PLAIN).student_loss(cast, batch, Step(0)).total.item() == 0.0
    assert PCM(timesteps=TWO, **PLAIN).student_loss(cast, batch, Step(0)).total.item() > 1e-6


@pytest.mark.parametrize("which", ["sd3", "flux"])
def test_on_a_shifted_flow_the_recipes_solver_is_the_students_jump_and_euler_in_the_schedules_time_is_not(
    which: str, batch: GivenNoise
) -> None:
    assert FLOW.shift == 3.0
    timesteps = tuple(range(999, -1, -125))
    teacher = gaussian_of(FLOW, "flow")
    cast = Roles({"teacher": teacher, "student": teacher})
    solver = Recipe.load(ROOT / f"recipes/{which}/pcm_4step_lora.yaml").stages[0].objective.options["solver"]
    losses = [
        PCM(timesteps=timesteps, solver=name, **PLAIN).student_loss(cast, batch, Step(0)).total.item()
        for name in (solver, "euler")
    ]
    assert losses[0] == 0.0
    assert losses[1] > 1e-6


def test_dropped_prompts_are_dropped_for_teacher_and_student_alike(
    batch: GivenNoise, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GivenNoise, "noise", lambda _: batch.z)  # also of a batch that was made from this one
    seen: dict[str, list[Tensor]] = {"teacher": [], "student": []}

    def recording(role: str) -> Denoiser:
        exact = gaussian(constant(0.0), STD, VP)
        call = exact._call

        def spying(network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
            seen[role].append(condition.tensors["label"])
            return call(network, x_t, model_time, condition)

        exact._call = spying
        return exact

    labelled = images(batch.latents, batch.z, label=1.0, null=-1.0)
    cast = Roles({role: recording(role) for role in seen})
    PCM(timesteps=TWO, condition_dropout=0.3, **PLAIN).student_loss(cast, labelled, Step(0))
    labels = [*seen["teacher"], *seen["student"]]
    assert len(labels) == 3
    assert all(torch.equal(found, labels[0]) for found in labels)
    assert set(labels[0].tolist()) == {1.0, -1.0}


# ---- the adversarial part ------------------------------------------------------------------------------------------


def test_a_sample_that_is_noised_again_is_a_sample_of_the_later_time() -> None:
    """Variance of x_t, from samples of exactly the variance at s."""
    for schedule in (VP, FLOW):
        s, t = (torch.full((400_000,), time, dtype=torch.float64) for time in (0.25, 0.45))
        levels = Levels.at(schedule, s[:1], torch.zeros(1)), Levels.at(schedule, t[:1], torch.zeros(1))
        here, there = (float((x.alpha * STD) ** 2 + x.sigma**2) for x in levels)
        torch.manual_seed(0)
        x_s = here**0.5 * torch.randn(400_000, dtype=torch.float64)
        x_t = add_more_noise(schedule, x_s, s, t, torch.randn_like(x_s))
        assert x_t.var().item() == pytest.approx(there, rel=0.01)
        assert abs(there - here) > 0.05


class Judging(Roles):
    """A discriminator that looks at the noised sample alone: its logit is `gain` times the mean of x."""

    def __init__(self, denoisers: dict[str, Denoiser], gain: float = 0.5) -> None:
        super().__init__(denoisers)
        self.gain, self.shown = gain, []

    def head(self, role: str) -> Any:
        assert role == "discriminator"

        def judge(denoiser: Denoiser, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            assert denoiser is self.denoiser("teacher")
            self.shown.append((x_t, t))
            return self.gain * x_t.mean(1, keepdim=True)

        return judge


def judged(values: Tensor | None = None) -> tuple[Judging, Jumps]:
    network = Jumps(phase_products(VP, 2) + 0.1 if values is None else values)
    denoisers = {"teacher": gaussian(constant(0.0), STD, VP), "student": jumping(network, 2, VP, "epsilon")}
    return Judging(denoisers), network


def test_the_discriminator_calls_targets_real_and_jumps_false_at_the_same_times_within_a_phase(
    batch: GivenNoise,
) -> None:
    cast, _ = judged()
    objective = PCM(timesteps=TWO, **{**PLAIN, "gan_weight": 0.1})
    torch.manual_seed(1)
    loss = objective.discriminator_loss(cast, batch, Step(0)).total
    (real, t_real), (fake, t_fake) = cast.shown
    expected = (1 + 0.5 * fake.mean(1)).relu().mean() + (1 - 0.5 * real.mean(1)).relu().mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert torch.equal(t_real, t_fake)
    assert not real.requires_grad and not fake.requires_grad, "the student has no part in it"
    end = objective.leap(VP, batch).end
    assert bool(((t_real >= end) & (t_real < end + 0.5)).all())
    indices = VP.model_time(t_real)
    assert torch.equal(indices, indices.round()), "the teacher has learnt no other times"


def test_the_student_feels_the_discriminator_through_its_jump_alone(
    batch: GivenNoise, monkeypatch: pytest.MonkeyPatch
) -> None:
    """d/dx of relu(1 - gain r x) is - gain r, r = alpha_seen / alpha_end, where the logit is below 1."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    weight, best = 0.25, phase_products(VP, 2)
    cast, network = judged(best)  # where the consistency term has no gradient
    loss = PCM(timesteps=TWO, **{**PLAIN, "gan_weight": weight}).student_loss(cast, batch, Step(0))
    loss.total.backward()
    ((shown, seen),) = cast.shown
    leap = PCM(timesteps=TWO, **PLAIN).leap(VP, batch)
    ratio = (VP.alpha(seen) / VP.alpha(leap.end))[:, None]
    pull = torch.where(0.5 * shown < 1, -0.5 * ratio, 0.0) * leap.x_t / len(batch)
    expected = weight * pull.reshape(STEPS, 4).sum(1)
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(network.j.grad[1:], expected, rtol=0, atol=1e-10)
    assert loss.terms["adversarial"].item() == pytest.approx(
        weight * (1 - 0.5 * shown).relu().mean().item(), abs=1e-12
    )


def test_a_run_trains_the_discriminator_and_then_the_student(sd: ModelFamily) -> None:
    objective = PCM(guidance=3.0, layers=("down_blocks.1", "mid_block", "up_blocks.0"))
    trainer = trainer_of(sd, objective, steps=1)
    trainer.batches.latents = PaintedLatents()
    before = weights_of(trainer)
    trainer.run()
    after = weights_of(trainer)
    changed = {name.partition("/")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"student", "discriminator"}
    assert len(trainer.cast.head("discriminator").module.heads) == 3


def test_a_flow_matching_teacher_is_distilled_as_well(sd3: ModelFamily) -> None:
    for objective in (
        PCM(guidance=(3.0, 5.0), gan_weight=0.1),
        LCM(timesteps=(999, 749, 499, 249), embed_guidance=False, target_decay=0.5),
    ):
        trainer = trainer_of(sd3, objective, steps=1)
        trainer.batches.latents = PaintedLatents()
        before = weights_of(trainer)
        trainer.run()
        assert any(not torch.equal(value, before[name]) for name, value in weights_of(trainer).items())


# ---- options -------------------------------------------------------------------------------------------------------


def test_the_roles_and_turns_are_those_of_the_paper() -> None:
    assert PCM().roles() == {"teacher": Frozen(), "student": Trained(), "discriminator": Head(Discriminator)}
    assert PCM(gan_weight=0.0, target_decay=0.9).roles() == {
        "teacher": Frozen(), "student": Trained(), "target": Recorded("student"),
    }  # fmt: skip
    assert [(p.name, p.updates, p.stream) for p in PCM().phases(0)] == [
        ("discriminator", ("discriminator",), "images"), ("student", ("student",), "images"),
    ]  # fmt: skip
    assert [p.name for p in PCM(gan_weight=0.0).phases(0)] == ["student"]
    assert PCM().inference() == InferenceSpec((999, 749, 499, 249), sampler="deterministic")


@pytest.mark.parametrize(
    ("steps", "timesteps", "remedy"),
    [
        (50, (999, 749, 499, 249), r"\[999, 739, 499, 239\]"),
        (40, (999, 759, 499, 259), r"\[999, 749, 499, 249\]"),
        (40, (749, 499, 249), "3 equal phases"),
    ],
)
def test_timesteps_that_do_not_begin_the_phases_are_refused(
    steps: int, timesteps: tuple[int, ...], remedy: str, batch: Batch
) -> None:
    with pytest.raises(UserError, match=remedy):
        PCM(solver_steps=steps, timesteps=timesteps).leap(VP, batch)
    assert pcm.check_phases(VP, 50, (999, 739, 499, 239)) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [({"gan_weight": -1.0}, "gan_weight"), ({"solver_steps": 3}, "segments"), ({"target_decay": 1.0}, "decay")],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PCM(**options)
