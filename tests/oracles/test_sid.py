"""SiD against analytic teachers: closed-form gradients, fixed points, times and turns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from stepdistill.condition import Condition
from stepdistill.denoiser import Denoiser, OwnWeights
from stepdistill.losses import sid_loss, sid_weight
from stepdistill.objectives.base import Step
from stepdistill.objectives.sid import SiD
from stepdistill.prediction import Levels, add_noise, native_target
from stepdistill.schedule import FlowSchedule, NoiseSchedule, from_scheduler_config
from stepdistill.times import log_noise_times
from tests.families.test_export import BETAS
from tests.oracles.oracle import (
    SCHEDULE,
    Linear,
    Roles,
    batch_of,
    constant,
    four_signs,
    gaussian,
    linear_student,
)
from tests.oracles.sid_games import (
    ALPHA,
    CPU,
    SIGMA,
    V_P,
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


def closed_form(
    a: float, b: float, strength: float, alpha: float = ALPHA, sigma: float = SIGMA
) -> tuple[float, float]:
    """(d/db, d/da) of SiD's expected loss for x = a z + b, critic frozen at its optimum, weight 1."""
    v_p, v_q = alpha**2 * S**2 + sigma**2, alpha**2 * a**2 + sigma**2
    d_b = (b - M) * sigma**4 / v_p * ((2 - 2 * strength) / v_p + (2 * strength - 1) / v_q)
    d_a = 2 * a * sigma**4 * (v_q - v_p) / (v_p * v_q) * ((1 - strength) / v_p + strength / v_q)
    return d_b, d_a


# ---- the student's loss --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strength", "b", "a"),
    [(0.5, -0.527219, 0.542007), (1.0, -0.190173, 0.287361), (1.2, -0.055355, 0.185503)],
)
def test_the_gradient_of_a_linear_student_has_the_closed_form_values(exact_noise, strength, b, a) -> None:
    network = Linear(A, B)
    found = gradient(sid(alpha=strength), network, cast_of(network), exact_noise)
    assert found == pytest.approx((b, a), abs=1e-6)
    assert found == pytest.approx(closed_form(A, B, strength), abs=1e-12)


def gaussian_as(kind: str, schedule: NoiseSchedule, mean: float, std: float) -> Denoiser:
    """A Gaussian's exact denoiser that says it in another way."""
    epsilon = gaussian(constant(mean), std, schedule)

    def call(network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        t = schedule.t_from_model_time(model_time)
        said = epsilon(x_t, t, condition)
        return native_target(kind, said.x0, said.eps, said.levels)

    return Denoiser(call, OwnWeights(nn.Module()), schedule, kind)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_teachers_of_every_kind_give_the_closed_form_gradient(exact_noise, kind: str) -> None:
    network = Linear(A, B)
    flow = kind == "flow"
    schedule = FlowSchedule() if flow else SCHEDULE
    roles = Roles({
        "student": linear_student(network, schedule),
        "teacher": gaussian_as(kind, schedule, M, S),
        "critic": gaussian_as(kind, schedule, B, A),
    })  # fmt: skip
    objective = sid(alpha=1.2, timesteps=(1000,), t_min=0.6, t_max=0.6) if flow else sid(alpha=1.2)
    alpha, sigma = (0.4, 0.6) if flow else (ALPHA, SIGMA)
    found = gradient(objective, network, roles, exact_noise)
    assert found == pytest.approx(closed_form(A, B, 1.2, alpha, sigma), abs=1e-9)


def test_a_deterministic_student_begins_with_noise_of_the_level_that_it_is_told(exact_noise) -> None:
    """x = a sigma z + b is the linear student of slope a sigma, whose gradient for a is sigma times as long."""
    network = Linear(A, B)
    critic = (B, SIGMA * A)
    found = gradient(sid(sampler="deterministic", timesteps=(1,)), network, cast_of(network, critic), exact_noise)
    d_b, d_a = closed_form(SIGMA * A, B, 1.0)
    assert found == pytest.approx((d_b, SIGMA * d_a), abs=1e-12)


@pytest.mark.parametrize("strength", [0.5, 1.0, 1.2])
def test_the_value_with_an_optimal_critic_is_no_measure_of_progress(exact_noise, strength: float) -> None:
    """(1 - alpha) E |real - fake|^2: nothing for 1, negative above."""
    network = Linear(A, B)
    value = sid(alpha=strength).student_loss(cast_of(network), batch_of(exact_noise), Step(0)).total.item()
    # real - fake = sigma^2 / alpha (s_p - s_q), both scores linear in x_t = N(alpha b, v_q)
    slope = 1 / V_Q - 1 / V_P
    mean = -ALPHA * (B - M) / V_P
    distance = (SIGMA**2 / ALPHA) ** 2 * (mean**2 + slope**2 * V_Q)
    assert value == pytest.approx((1 - strength) * distance, abs=1e-12)


def width(ratio: float) -> float:
    """The student's slope at which v_q is `ratio` times v_p."""
    return math.sqrt((ratio * V_P - SIGMA**2) / ALPHA**2)


@pytest.mark.parametrize(("ratio", "towards_mean", "narrower"), [(3.4, True, True), (3.6, False, True),
                                                                 (5.9, False, True), (6.1, False, False)])  # fmt: skip
def test_alpha_above_one_pushes_a_student_away_that_is_too_wide(exact_noise, ratio, towards_mean, narrower) -> None:
    """With 1.2 the mean's gradient turns at v_q = 3.5 v_p and the width's at 6 v_p."""
    network = Linear(width(ratio), B)
    d_b, d_a = gradient(sid(alpha=1.2), network, cast_of(network), exact_noise)
    assert (d_b < 0) is towards_mean  # B < M: descending raises b
    assert (d_a > 0) is narrower


def test_the_gradient_goes_through_the_inputs_of_both_networks_and_not_into_them(exact_noise) -> None:
    networks = {name: Linear(0.9, 0.1 * i) for i, name in enumerate(("teacher", "critic"))}
    student = Linear(A, B)
    roles = Roles({name: linear_student(n) for name, n in {**networks, "student": student}.items()})
    d_b, _ = gradient(sid(), student, roles, exact_noise)
    assert all(p.grad is None for network in networks.values() for p in network.parameters())
    # the same with predictions that are taken for constants: -(real - fake)
    x = (student.a * exact_noise + student.b).detach()
    x_t = add_noise(SCHEDULE, x, torch.full((4,), 2 / 3, dtype=torch.float64), four_signs()[1])
    real, fake = (n.a * x_t + n.b for n in networks.values())
    assert abs(d_b - (fake - real).mean().item()) > 1e-2


def test_with_alpha_one_the_loss_is_the_teachers_difference_times_the_critics() -> None:
    torch.manual_seed(0)
    x, real, fake, other = (torch.randn(3, 2, 4, dtype=torch.float64) for _ in range(4))
    weight = torch.tensor([1.0, 2.0, 3.0])
    found = sid_loss(x, real, fake, other, alpha=1.0, weight=weight)
    torch.testing.assert_close(found, weight.double() * ((real - fake) * (other - x)).sum((1, 2)), rtol=0, atol=1e-12)
    half = sid_loss(x, real, fake, fake, alpha=0.5, weight=weight)
    average = (sid_loss(x, real, fake, fake, alpha=0.0, weight=weight)
               + sid_loss(x, real, fake, fake, alpha=1.0, weight=weight)) / 2  # fmt: skip
    torch.testing.assert_close(half, average, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("weighting", "value"),
    [("constant", 1), ("alpha", 0.8), ("alpha_squared", 0.64), ("sqrt_snr", 4 / 3), ("snr", 16 / 9),
     ("inverse_sigma", 5 / 3), ("inverse_variance", 25 / 9)],
)  # fmt: skip
def test_weightings_are_functions_of_the_noise_level(weighting, value: float) -> None:
    x = torch.zeros(2, 1, 3, 3)
    levels = Levels.at(SCHEDULE, torch.full((2,), 2 / 3, dtype=torch.float64), x)
    assert sid_weight(x, x, levels, weighting).tolist() == pytest.approx([value] * 2, rel=1e-12)


def test_the_weighting_by_distance_is_per_sample_bounded_and_without_gradient() -> None:
    x = torch.zeros(3, 1, 2, 2, requires_grad=True)
    real = torch.tensor([0.5, -2.0, 0.0]).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)
    levels = Levels.at(SCHEDULE, torch.full((3,), 2 / 3, dtype=torch.float64), x)
    weight = sid_weight(x, real, levels, "distance")
    assert weight.tolist() == pytest.approx([2.0, 0.5, 1e5])
    assert not weight.requires_grad


def spoilt(denoiser: Denoiser, rows: slice) -> Denoiser:
    def call(network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        native = denoiser._call(network, x_t, model_time, condition).clone()
        native[rows] = math.nan
        return native

    return Denoiser(call, denoiser.weights, denoiser.schedule, denoiser.kind)


def test_samples_with_a_prediction_that_is_not_finite_drop_out(monkeypatch: pytest.MonkeyPatch) -> None:
    z, eps = torch.tensor([[3.0], [1.0], [-1.0]], dtype=torch.float64), torch.tensor([[2.0], [1.0], [0.5]])
    results = []
    for rows in (slice(0, 1), slice(1, None)):
        network = Linear(A, B)
        whole = cast_of(network)
        if rows == slice(0, 1):
            roles, noise, kept = Roles({**whole._denoisers, "critic": spoilt(whole.denoiser("critic"), rows)}), eps, z
        else:
            roles, noise, kept = whole, eps[rows], z[rows]
        monkeypatch.setattr(torch, "randn_like", lambda x, noise=noise: noise.to(x.dtype))
        loss = sid().student_loss(roles, batch_of(kept), Step(0))
        loss.total.backward()
        results.append((loss.total.item(), network.a.grad.item(), network.b.grad.item()))
        assert loss.logged["dropped"].item() == pytest.approx(1 / 3 if rows == slice(0, 1) else 0.0)
    assert results[0] == pytest.approx(results[1], rel=1e-12)


def test_a_batch_of_which_nothing_is_left_is_no_success(exact_noise) -> None:
    network = Linear(A, B)
    roles = cast_of(network)
    roles._denoisers = {**roles._denoisers, "teacher": spoilt(roles.denoiser("teacher"), slice(None))}
    assert sid().student_loss(roles, batch_of(exact_noise), Step(0)).total.isnan()


# ---- fixed points --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.5, 1.0, 1.2])
def test_every_alpha_ends_at_the_teachers_distribution(strength: float) -> None:
    network = fit(sid(alpha=strength, t_min=0.0, t_max=1.0), cast_of)
    assert network.b.item() == pytest.approx(M, abs=0.03)
    assert abs(network.a.item()) == pytest.approx(S, abs=0.03)


# ---- steps, times and turns ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["stochastic", "deterministic"])
def test_one_step_is_drawn_uniformly_and_only_its_call_has_a_graph(sampler) -> None:
    timesteps = (900, 700, 400, 200)
    schedule = from_scheduler_config({**BETAS})[0]
    network = Linear(0.3, 2.0)
    roles = Roles({"student": linear_student(network, schedule), "teacher": gaussian(constant(M), S, schedule),
                   "critic": gaussian(constant(M), S, schedule)})  # fmt: skip
    asked = listening(roles.denoiser("student"))
    objective = SiD(timesteps=timesteps, sampler=sampler, guidance=1.0)
    drawn = [Step(i).shared("rollout").randrange(4) for i in range(4000)]
    for index in range(24):
        asked.clear()
        objective.student_loss(roles, plain_batch(1), Step(index))
        assert [call["time"] for call in asked] == pytest.approx(timesteps[: len(asked)])
        assert [call["grad"] for call in asked] == [False] * (len(asked) - 1) + [True]
        assert len(asked) == drawn[index] + 1
    counts = [drawn.count(last) for last in range(4)]
    assert all(abs(count - 1000) < 4 * math.sqrt(750) for count in counts), "four standard deviations"


def test_times_with_normal_log_noise_have_the_mean_and_deviation_asked_for() -> None:
    torch.manual_seed(2)
    flow = FlowSchedule(3.0)
    sigma = flow.sigma(log_noise_times(flow, 100_000, mean=math.log(2), std=1.6, device=CPU))
    n = torch.logit(sigma)
    assert (n.mean().item(), n.std().item()) == pytest.approx((math.log(2), 1.6), abs=0.02)
    vp = from_scheduler_config({**BETAS})[0]
    t = log_noise_times(vp, 100_000, mean=0.0, std=0.7, device=CPU)
    n = -0.5 * vp.log_snr(t)
    assert (n.mean().item(), n.std().item()) == pytest.approx((0.0, 0.7), abs=0.02)
    assert torch.equal(vp.model_time(t), vp.model_time(t).round()), "only timesteps that the network has learnt"


def test_a_given_density_of_noise_is_used_by_both_losses() -> None:
    schedule = FlowSchedule()
    network = Linear(A, B)
    roles = Roles({"student": linear_student(network, schedule), "teacher": gaussian_as("flow", schedule, M, S),
                   "critic": gaussian_as("flow", schedule, B, A)})  # fmt: skip
    asked = listening(roles.denoiser("critic"))
    objective = SiD(timesteps=(1000,), guidance=1.0, log_noise=(math.log(3), 0.0))
    objective.critic_loss(roles, plain_batch(), Step(0))
    objective.student_loss(roles, plain_batch(), Step(0))
    assert [call["time"] for call in asked] == pytest.approx([750.0, 750.0])


def test_the_critic_moves_first_and_alone_while_it_warms_up() -> None:
    objective = SiD(critic_updates=2, critic_warmup=3)
    turns = [[(p.updates, p.repeats, p.stream) for p in objective.phases(step)] for step in (2, 3)]
    critic = (("critic",), 2, "prompts")
    assert turns == [[critic], [critic, (("student",), 1, "prompts")]]


def test_each_phase_leaves_gradients_on_its_own_role_only() -> None:
    networks = {name: Linear(0.9, 0.1) for name in ("teacher", "critic", "student")}
    roles = Roles({name: linear_student(network) for name, network in networks.items()})
    for phase in sid(t_min=0.0, t_max=1.0).phases(0):
        for network in networks.values():
            network.zero_grad(set_to_none=True)
        phase.loss(roles, batch_of(torch.randn(16, 1, dtype=torch.float64)), Step(0)).total.backward()
        assert {name for name, network in networks.items() if network.a.grad is not None} == set(phase.updates)
