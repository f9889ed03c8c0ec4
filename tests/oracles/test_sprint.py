"""SANA-Sprint's game: which samples its adversary sees, who is moved by what, and that its other half is sCM."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepdistill.adapters import LoraSettings
from stepdistill.condition import Condition
from stepdistill.denoiser import Denoiser, OwnWeights
from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.objectives.base import Batch, Head, InferenceSpec, Step
from stepdistill.objectives.scm import SCM
from stepdistill.objectives.sprint import Sprint
from stepdistill.processes.share import SlicedDraws
from stepdistill.schedule import FlowSchedule
from stepdistill.trigflow import LogWeight
from tests.oracles.oracle import shaped
from tests.tiny import LORA, PaintedLatents, trainer_of, weights_of


FLOW = FlowSchedule(3.0)
WARM = Step(index=10**6)


class TwoTimes(nn.Module):
    """A flow network with one factor for the last time and one for all others."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Parameter(torch.tensor(0.8, dtype=torch.float64))
        self.others = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.inputs: list[tuple[Tensor, Tensor, Condition]] = []

    def view(self) -> Denoiser:
        def call(network: Any, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
            network.inputs.append((x_t.detach(), model_time.detach(), condition))
            factor = torch.where(model_time >= 1000, network.last, network.others)
            return shaped(factor, x_t) * x_t

        denoiser = Denoiser(call, OwnWeights(self), FLOW, "flow")
        self.requires_grad_(True)
        return denoiser


class Cast:
    """Student, teacher, the weighting, and a discriminator that is a linear function of what it sees."""

    def __init__(self) -> None:
        self.student, self.teacher = TwoTimes(), TwoTimes()
        self.views = {"student": self.student.view(), "teacher": self.teacher.view()}
        self.module = LogWeight()
        self.slope = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def denoiser(self, role: str, *, renamed: bool = True) -> Denoiser:
        return self.views[role]

    def head(self, role: str) -> Any:
        return self if role == "weighting" else self.logits

    def logits(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert denoiser is self.views["teacher"], "LADD's features are the frozen teacher's"
        self.seen.append((x_t.detach(), t))
        return self.slope * denoiser(x_t, t, condition).native.mean(1, keepdim=True) + 0.1 * shaped(
            condition.tensors["label"], x_t
        )


def images(count: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(count, 3, dtype=torch.float64, generator=generator)
    rows = Condition({"label": torch.arange(count, dtype=torch.float64)})
    return Batch(rows, Condition({"label": torch.full((count,), -1.0, dtype=torch.float64)}), (3,), x0.device, x0)


def cast() -> Any:
    return Cast()


def turn_of(name: str, objective: Sprint, roles: Any, count: int = 8) -> Any:
    (phase,) = (phase for phase in objective.phases(0) if phase.name == name)
    torch.manual_seed(3)
    return phase.loss(roles, images(count), WARM)


# ---- max-time weighting --------------------------------------------------------------------------------------------


def test_the_share_of_samples_that_begin_with_noise_is_exact_on_average_and_equal_on_all_processes() -> None:
    objective = Sprint(largest_time_share=0.3)
    counts = [objective.at_largest_time(5, Step(index)) for index in range(2000)]
    assert set(counts) == {1, 2}
    assert sum(counts) / len(counts) == pytest.approx(1.5, abs=0.04)
    assert counts == [objective.at_largest_time(5, Step(index)) for index in range(2000)]
    assert {Sprint(largest_time_share=1.0).at_largest_time(4, Step(i)) for i in range(50)} == {4}
    assert {Sprint(largest_time_share=0.0).at_largest_time(4, Step(i)) for i in range(50)} == {0}


@pytest.mark.parametrize("turn", ["discriminator", "student"])
def test_these_samples_begin_with_fresh_noise_at_the_last_time_and_keep_their_conditions(turn: str) -> None:
    roles = cast()
    turn_of(turn, Sprint(), roles)
    inputs = roles.student.inputs
    last = torch.cat([time >= 1000 for _, time, _ in inputs])
    labels = torch.cat([condition.tensors["label"] for _, _, condition in inputs])
    x = torch.cat([x for x, _, _ in inputs])[last]
    assert labels[last].tolist() == [0, 1, 2, 3], "half of eight rows"
    assert len(x.unique(dim=0)) == 4
    assert x.std().item() == pytest.approx(1.0, abs=0.5)
    if turn == "discriminator":
        assert [len(x) for x, _, _ in inputs] == [8], "one pass of the student"
        assert labels[~last].tolist() == [4, 5, 6, 7]
    else:
        assert [len(x) for x, _, _ in inputs] == [8, 8, 4], "derivative, consistency, and the samples of noise"


@pytest.mark.parametrize("turn", ["discriminator", "student"])
def test_processes_that_begin_with_one_sample_of_noise_each_have_noise_of_their_own(turn: str) -> None:
    drawn = []
    for part in range(2):
        roles = cast()
        with SlicedDraws(2, part, 2):
            turn_of(turn, Sprint(largest_time_share=0.5), roles, count=2)
        (noise,) = (x[time >= 1000] for x, time, _ in roles.student.inputs if bool((time >= 1000).any()))
        assert len(noise) == 1
        drawn.append(noise)
    assert not torch.isclose(drawn[0], drawn[1]).any()


@pytest.mark.parametrize(("share", "moved"), [(1.0, "last"), (0.0, "others"), (0.5, "both")])
def test_the_adversary_moves_the_student_at_the_times_of_its_samples(share: float, moved: str) -> None:
    roles = cast()
    loss = turn_of("student", Sprint(largest_time_share=share), roles)
    parameters = (roles.student.last, roles.student.others)
    last, others = torch.autograd.grad(loss.terms["adversarial"], parameters, allow_unused=True, retain_graph=True)
    assert (last is not None and bool(last != 0)) == (moved in ("last", "both"))
    assert (others is not None and bool(others != 0)) == (moved in ("others", "both"))
    last, others = torch.autograd.grad(loss.terms["scm"], parameters, allow_unused=True)
    assert last is None or not bool(last), "no angle of the proposal is the last one"
    assert bool(others)


# ---- both losses ---------------------------------------------------------------------------------------------------


def test_the_students_loss_is_that_of_scm_and_the_weighted_adversary() -> None:
    objective, roles = Sprint(gan_weight=0.5), cast()
    scm = SCM(guidance=4.5, time_mean=0.0, time_std=1.6, warmup_steps=4000, tangent_norm="l2", prior_weight=True)
    assert objective.scm == scm
    loss = turn_of("student", objective, roles)
    assert set(loss.terms) == {"scm", "adversarial"}
    torch.manual_seed(3)
    assert torch.equal(loss.terms["scm"], scm.loss(cast(), images(), WARM).total)
    full = turn_of("student", Sprint(gan_weight=1.0), cast())
    torch.testing.assert_close(loss.terms["adversarial"], 0.5 * full.terms["adversarial"])


def test_the_students_adversarial_term_is_minus_the_mean_logit() -> None:
    roles = cast()
    loss = turn_of("student", Sprint(gan_weight=1.0), roles)
    ((x_t, t),) = roles.seen
    said = roles.logits(roles.views["teacher"], x_t, t, images().condition)
    torch.testing.assert_close(loss.terms["adversarial"], -said.mean(), rtol=1e-12, atol=0)


def test_the_discriminators_hinge_is_the_mean_over_real_and_generated() -> None:
    roles = cast()
    loss = turn_of("discriminator", Sprint(), roles)
    (real, fake) = (
        roles.logits(roles.views["teacher"], x_t, t, images().condition) for x_t, t in list(roles.seen)
    )  # fmt: skip
    expected = 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())
    torch.testing.assert_close(loss.total, expected, rtol=1e-12, atol=0)


def test_a_second_game_has_the_same_real_samples_with_others_prompts() -> None:
    roles = cast()
    loss = turn_of("discriminator", Sprint(misaligned_weight=0.25), roles)
    (x_t, t), _, (seen, at) = roles.seen
    assert torch.equal(x_t, seen) and torch.equal(t, at)
    said = roles.logits(roles.views["teacher"], x_t, t, images().condition)
    others = images().condition[torch.arange(len(x_t)).roll(1)]
    wrong = roles.logits(roles.views["teacher"], x_t, t, others)
    assert not torch.equal(said, wrong)
    expected = 0.5 * 0.25 * ((1 - said).relu().mean() + (1 + wrong).relu().mean())
    torch.testing.assert_close(loss.terms["misaligned"], expected, rtol=1e-12, atol=0)
    assert "misaligned" not in turn_of("discriminator", Sprint(), cast()).terms


def test_the_discriminator_looks_where_the_paper_looks() -> None:
    """arctan(e^tau / sigma_d) of data with the spread sigma_d: log(sigma / alpha) = tau - log sigma_d here."""
    objective, roles = Sprint(gan_time_mean=-0.6, gan_time_std=1.0), cast()
    turn_of("discriminator", objective, roles, count=8000)
    t = torch.cat([t for _, t in roles.seen])
    log_noise = (FLOW.sigma(t) / FLOW.alpha(t)).log()
    assert log_noise.mean().item() == pytest.approx(-0.6 + math.log(2), abs=0.03)
    assert log_noise.std().item() == pytest.approx(1.0, abs=0.03)
    assert Sprint(data_std=0.5).adversary.log_noise == pytest.approx((-0.6, 1.0))


def test_a_turn_leaves_gradients_on_its_own_players_only() -> None:
    roles = cast()
    turn_of("discriminator", Sprint(), roles).total.backward()
    assert roles.slope.grad is not None
    assert all(p.grad is None for p in (*roles.student.parameters(), *roles.module.parameters()))
    roles = cast()
    turn_of("student", Sprint(), roles).total.backward()
    assert all(p.grad is not None for p in (*roles.student.parameters(), *roles.module.parameters()))
    assert all(p.grad is None for p in roles.teacher.parameters())
    assert roles.slope.grad is None


# ---- the game ------------------------------------------------------------------------------------------------------


def test_its_roles_turns_and_way_of_being_called() -> None:
    roles = Sprint(layers=("a", "b")).roles()
    assert set(roles) == {"teacher", "student", "weighting", "discriminator"}
    assert isinstance(roles["discriminator"], Head) and roles["discriminator"].layers == ("a", "b")
    turns = [(p.name, p.updates, p.stream, p.repeats) for p in Sprint().phases(0)]
    assert turns == [("discriminator", ("discriminator",), "images", 1),
                     ("student", ("student", "weighting"), "images", 1)]  # fmt: skip
    assert Sprint(timesteps=(999, 749, 499, 249)).inference() == InferenceSpec((999, 749, 499, 249))
    told = Sprint(guidance=(4.0, 5.0), embed_guidance=True)
    assert told.inference() == InferenceSpec((999,), guidance_scale=4.5, embeds_guidance=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gan_weight": 0.0}, "gan_weight must be positive.*scm"),
        ({"largest_time_share": 1.5}, "largest_time_share is a share from 0 to 1"),
        ({"gan_time_std": -1.0}, "gan_time_std must not be negative"),
        ({"misaligned_weight": -0.5}, "misaligned_weight must not be negative"),
        ({"sigma_d": 0.0}, "sigma_d must be positive"),
    ],
)
def test_impossible_options_are_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sprint(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("which", "lora", "options"),
    [
        ("sd3", False, {}),
        ("sd3", True, {"guidance": (4.0, 5.0), "adaptive": False}),
        ("sd", False, {"guidance": (1.0, 3.0), "embed_guidance": True}),
    ],
    ids=["sd3", "sd3 lora", "sd guidance embedded"],
)
def test_real_networks_learn_in_their_own_turns(
    which: str, lora: bool, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    family = load_family(request.getfixturevalue(f"{which}_folder"))
    targets = LORA if which == "sd" else LoraSettings(rank=2, alpha=4.0, targets=("to_q", "to_k", "ff.net.2"))
    objective = Sprint(warmup_steps=1, **{"guidance": 2.0, **options})
    trainer = trainer_of(family, objective, lora={"student": targets} if lora else {})
    trainer.batches.latents = PaintedLatents()
    trainer.step = 1  # after the warm-up
    for phase in trainer.objective.phases(1):
        before = weights_of(trainer)
        trainer._run_phase(phase, 0)
        after = weights_of(trainer)
        moved = {name.partition("/")[0] for name in before if not torch.equal(before[name], after[name])}
        assert moved == set(phase.updates)
        assert all(torch.isfinite(value).all() for value in after.values())
    assert all(p.grad is None for p in family.network().parameters())
