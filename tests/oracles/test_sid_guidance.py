"""SiD's four guidance scales: the critic that is trained under guidance, who is asked what, and where it ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepdistill.condition import Condition
from stepdistill.denoiser import Denoiser, OwnWeights
from stepdistill.errors import UserError
from stepdistill.losses import sid_critic_loss
from stepdistill.objectives.base import Step
from stepdistill.objectives.sid import SiD
from stepdistill.prediction import Levels, Prediction, add_noise
from stepdistill.schedule import FlowSchedule
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
)
from tests.oracles.sid_games import (
    ALPHA,
    SIGMA,
    V_Q,
    A,
    B,
    M,
    S,
    cast_of,
    fit,
    gradient,
    listening,
    plain_batch,
    sid,
)


def guided_critic(b: float, a: float, kappa: float) -> Denoiser:
    """A critic whose *guided* prediction is right about N(b, a^2), beside a null branch that stays as it was."""
    null, true = gaussian(constant(-0.5), S), gaussian(constant(b), a)

    def call(network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        without, right = (d._call(network, x_t, model_time, condition) for d in (null, true))
        asked = (label(condition) == 1.0)[:, None]
        return torch.where(asked, without + (right - without) / kappa, without)

    return Denoiser(call, OwnWeights(nn.Module()), SCHEDULE, "epsilon")


def test_long_and_short_guidance_ends_at_the_guided_teacher() -> None:
    """Equal variances: the teacher guided by kappa is N(m_null + kappa (m_c - m_null), s^2)."""
    kappa = 3.0

    def roles_of(network: Linear) -> Roles:
        critic = guided_critic(network.b.item(), abs(network.a.item()), kappa)
        return Roles({"student": linear_student(network), "teacher": gaussian(label, S), "critic": critic})

    network = fit(sid(guidance=kappa), roles_of, label=1.0, null=-0.5)
    assert network.b.item() == pytest.approx(-0.5 + kappa * 1.5, abs=0.03)
    assert abs(network.a.item()) == pytest.approx(S, abs=0.03)


@pytest.mark.parametrize("kappa", [1.0, 3.0])
def test_a_critic_trained_under_guidance_moves_by_its_share(exact_noise, kappa: float) -> None:
    """The best conditional branch is eps_null + (eps_true - eps_null) / kappa, if the null branch is held fast."""
    critic_network, student = Linear(0.0, 0.0), Linear(A, B)

    def call(network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        return torch.where((label(condition) == 1.0)[:, None], network.a * x_t + network.b, SIGMA * x_t)

    critic = Denoiser(call, OwnWeights(critic_network), SCHEDULE, "epsilon")
    critic_network.requires_grad_(True)
    roles = Roles({"student": linear_student(student), "critic": critic})
    objective = sid(critic_guidance=kappa, condition_dropout=0.0)
    optimizer = torch.optim.LBFGS(
        critic_network.parameters(), max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective.critic_loss(roles, batch_of(exact_noise, label=1.0, null=0.0), Step(0)).total
        loss.backward()
        return loss

    optimizer.step(closure)
    slope, offset = SIGMA / V_Q, -SIGMA * ALPHA * B / V_Q
    assert critic_network.a.item() == pytest.approx(SIGMA + (slope - SIGMA) / kappa, abs=1e-6)
    assert critic_network.b.item() == pytest.approx(offset / kappa, abs=1e-6)
    assert student.a.grad is None


def test_the_critics_loss_is_the_error_of_the_noise_or_of_the_flow_summed_over_elements() -> None:
    torch.manual_seed(1)
    x0, eps, native = (torch.randn(2, 3, 2, 2, dtype=torch.float64) for _ in range(3))
    t = torch.full((2,), 2 / 3, dtype=torch.float64)
    levels, x_t = Levels.at(SCHEDULE, t, x0), add_noise(SCHEDULE, x0, t, eps)
    found = {k: sid_critic_loss(Prediction(native, k, x_t, levels), x0, eps) for k in ("epsilon", "v_prediction")}
    torch.testing.assert_close(found["epsilon"], (native - eps).square().sum((1, 2, 3)), rtol=1e-12, atol=0)
    # snr / (snr + 1) = alpha^2 times the error of v
    v = ALPHA * eps - SIGMA * x0
    torch.testing.assert_close(
        found["v_prediction"], ALPHA**2 * (native - v).square().sum((1, 2, 3)), rtol=1e-9, atol=0
    )
    flow = FlowSchedule()
    said = Prediction(native, "flow", add_noise(flow, x0, t, eps), Levels.at(flow, t, x0))
    expected = (native - (eps - x0)).square().sum((1, 2, 3))
    torch.testing.assert_close(sid_critic_loss(said, x0, eps), expected, rtol=1e-12, atol=0)


def asked_labels(objective: SiD) -> dict[str, list[set[float]]]:
    """Which labels every role is asked for, in the critic's turn and in the student's."""
    network = Linear(A, B)
    roles = Roles({"student": linear_student(network), "teacher": gaussian(label, S), "critic": gaussian(label, A)})
    asked = {name: listening(roles.denoiser(name)) for name in ("student", "teacher", "critic")}
    objective.critic_loss(roles, plain_batch(), Step(0))
    objective.student_loss(roles, plain_batch(), Step(0))
    return {name: [set(call["labels"]) for call in calls] for name, calls in asked.items()}


P, NULL, BOTH = {1.0}, {-1.0}, {1.0, -1.0}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # no guidance: no null branch anywhere, and no prompt is dropped although every one would be
        ({"condition_dropout": 1.0}, {"student": [P, P], "critic": [P, P], "teacher": [P]}),
        # long and short guidance: all scales are the teacher's
        ({"guidance": 2.0, "condition_dropout": 0.0}, {"student": [P, P], "critic": [BOTH, BOTH], "teacher": [BOTH]}),
        # prompts are dropped for the student and for the critic that learns from it, not in the student's turn
        ({"guidance": 2.0, "condition_dropout": 1.0},
         {"student": [NULL, P], "critic": [NULL, BOTH], "teacher": [BOTH]}),
        # the usual guidance: of the teacher alone
        ({"guidance": 2.0, "critic_guidance": 1.0, "condition_dropout": 1.0},
         {"student": [P, P], "critic": [P, P], "teacher": [BOTH]}),
        # PG-SB: what is drawn guides teacher and critic, which is trained without guidance and with dropped prompts
        ({"guidance": (2.0, 2.0), "condition_dropout": 0.0},
         {"student": [P, P], "critic": [P, BOTH], "teacher": [BOTH]}),
        ({"guidance": (2.0, 2.0), "condition_dropout": 1.0},
         {"student": [NULL, P], "critic": [NULL, BOTH], "teacher": [BOTH]}),
        # Zero-CFG: the critic never sees a prompt, the student always does
        ({"critic_guidance": 0.0, "condition_dropout": 1.0},
         {"student": [P, P], "critic": [NULL, NULL], "teacher": [P]}),
        # Anti-CFG: trained without guidance, evaluated with a negative scale
        ({"critic_guidance": (1.0, -1.0, -1.0), "condition_dropout": 0.0},
         {"student": [P, P], "critic": [P, BOTH], "teacher": [P]}),
        # four scales: a second call where the critic's two differ
        ({"guidance": 2.0, "critic_guidance": (1.0, 0.0, 1.0), "condition_dropout": 0.0},
         {"student": [P, P], "critic": [P, NULL, P], "teacher": [BOTH]}),
    ],
    ids=["none", "lsg", "dropout", "teacher", "pg-sb", "pg-sb-dropout", "zero", "anti", "four"],
)  # fmt: skip
def test_guidance_decides_who_is_asked_with_and_without_prompts(options: dict[str, Any], expected: Any) -> None:
    assert asked_labels(sid(**options)) == expected


def test_anti_guidance_reflects_the_critic_at_its_null_branch(exact_noise) -> None:
    """Equal variances: kappa = -1 makes of N(1, a^2) beside N(-1, a^2) the prediction of N(-3, a^2)."""
    network = Linear(A, B)
    oracles = {"student": linear_student(network), "teacher": gaussian(constant(M), S)}
    anti = gradient(sid(critic_guidance=(1.0, -1.0, -1.0)), network, Roles({**oracles, "critic": gaussian(label, A)}),
                    exact_noise, label=1.0, null=-1.0)  # fmt: skip
    mirrored = gradient(sid(), network, cast_of(network, (-3.0, A)), exact_noise)
    assert anti == pytest.approx(mirrored, abs=1e-12)


def test_the_critics_second_scale_is_for_the_teacher_and_its_third_for_the_sample(exact_noise) -> None:
    network = Linear(A, B)
    roles = Roles({"student": linear_student(network), "teacher": gaussian(constant(M), S),
                   "critic": gaussian(label, A)})  # fmt: skip
    batch = batch_of(exact_noise, label=1.0, null=-1.0)
    found = sid(critic_guidance=(1.0, 0.0, 1.0)).student_loss(roles, batch, Step(0)).total.item()
    x = (A * exact_noise + B).detach()
    t = torch.full((4,), 2 / 3, dtype=torch.float64)
    x_t = add_noise(SCHEDULE, x, t, four_signs()[1])
    real, outer, inner = (gaussian(constant(m), s)(x_t, t, batch.condition).x0 for m, s in ((M, S), (-1, A), (1, A)))
    assert found == pytest.approx(((real - outer) * (inner - x)).mean().item(), abs=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"critic_guidance": (0.0, 1.0, 0.0)}, "used at 0 only, not at 1"),
     ({"critic_guidance": (0.0, 0.0, -2.0)}, "used at 0 only, not at -2")],
)  # fmt: skip
def test_scales_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SiD(**options)


def test_a_range_of_guidance_is_drawn_once_an_iteration_for_the_teacher(exact_noise) -> None:
    network = Linear(A, B)
    roles = Roles({"student": linear_student(network), "teacher": gaussian(label, S), "critic": gaussian(label, A)})
    labels = {"label": 1.0, "null": -1.0}
    drawn = Step(0).shared("guidance").uniform(1.0, 4.0)
    ranged = gradient(sid(guidance=(1.0, 4.0), critic_guidance=1.0), network, roles, exact_noise, **labels)
    fixed = gradient(sid(guidance=drawn, critic_guidance=1.0), network, roles, exact_noise, **labels)
    assert ranged == pytest.approx(fixed, abs=1e-12)


def test_a_range_alone_guides_teacher_and_critic_by_one_draw_of_an_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    """PG-SB (SNOOPI, arXiv 2412.02687, section 4.1) for SiD: kappa_1 is 1, the three others are the draw."""
    network = Linear(A, B)
    roles = Roles({"student": linear_student(network), "teacher": gaussian(label, S), "critic": gaussian(label, A)})
    scales: dict[str, list[float]] = {"teacher": [], "critic": []}
    guided = Denoiser.guided

    def listened(self: Denoiser, *given: Any) -> Prediction:
        scales[next(name for name in scales if roles.denoiser(name) is self)].append(given[-1])
        return guided(self, *given)

    monkeypatch.setattr(Denoiser, "guided", listened)
    objective = sid(guidance=(0.5, 4.0))
    for index in range(5):
        objective.critic_loss(roles, plain_batch(), Step(index))
        objective.student_loss(roles, plain_batch(), Step(index))
    assert scales["critic"][::2] == [1.0] * 5
    assert scales["critic"][1::2] == scales["teacher"]
    assert len(set(scales["teacher"])) == 5 and all(0.5 <= scale <= 4.0 for scale in scales["teacher"])


def test_with_one_draw_on_both_sides_the_unguided_teacher_is_a_fixed_point(exact_noise) -> None:
    network = Linear(S, 1.0)
    roles = Roles({"student": linear_student(network), "teacher": gaussian(label, S), "critic": gaussian(label, S)})
    labels = {"label": 1.0, "null": -0.5}
    assert gradient(sid(guidance=(2.0, 4.0)), network, roles, exact_noise, **labels) == (0.0, 0.0)
    assert gradient(sid(guidance=(2.0, 4.0), critic_guidance=1.0), network, roles, exact_noise, **labels) != (0.0, 0.0)
