"""Distribution matching against analytic teachers: exact gradients, fixed points, signs, isolation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepdistill.condition import Condition
from stepdistill.errors import UserError
from stepdistill.losses import dmd_direction, pseudo_loss, vsd_direction
from stepdistill.objectives.base import Step
from stepdistill.objectives.dmd import DMD
from stepdistill.objectives.dmd2 import DMD2
from stepdistill.objectives.esd import ESD
from stepdistill.objectives.f_distill import FDistill
from stepdistill.objectives.matching import rollout
from stepdistill.objectives.vsd import VSD
from stepdistill.prediction import add_noise
from tests.oracles.oracle import (
    AT_08,
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


M, S, A, B = 0.7, 0.5, 1.3, -0.4
ALPHA, SIGMA = 0.8, 0.6
V_P, V_Q = ALPHA**2 * S**2 + SIGMA**2, ALPHA**2 * A**2 + SIGMA**2


@pytest.fixture
def chosen_noise(monkeypatch: pytest.MonkeyPatch):
    """Makes every fresh noise the given eps."""

    def choose(eps: Tensor) -> None:
        monkeypatch.setattr(torch, "randn_like", lambda x: eps.to(x.dtype))

    return choose


def cast_of(network: Linear, teacher_mean: float = M, fake: tuple[float, float] | None = None) -> Roles:
    mean, std = fake or (network.b.item(), abs(network.a.item()))
    return Roles({
        "student": linear_student(network),
        "teacher": gaussian(constant(teacher_mean), S),
        "critic": gaussian(constant(mean), std),
    })  # fmt: skip


def test_the_kl_gradient_of_a_linear_student_has_the_closed_form_values() -> None:
    z, eps = four_signs()
    network = Linear(A, B)
    x = network.a * z + network.b
    t = torch.full((4,), 2 / 3, dtype=torch.float64)  # index 1: alpha 0.8, sigma 0.6
    x_t = add_noise(SCHEDULE, x.detach(), t, eps)
    empty = Condition({"label": torch.zeros(4)})
    difference = gaussian(constant(B), A)(x_t, t, empty).score - gaussian(constant(M), S)(x_t, t, empty).score
    (difference * ALPHA * x).mean().backward()
    assert network.b.grad.item() == pytest.approx(-1.353846, abs=1e-6)
    assert network.a.grad.item() == pytest.approx(1.022863, abs=1e-6)


def test_vsd_gives_the_exact_expected_gradient_of_a_linear_student(chosen_noise) -> None:
    z, eps = four_signs()
    chosen_noise(eps)
    network = Linear(A, B)
    objective = VSD(guidance=1.0, t_min=AT_08[0], t_max=AT_08[1])
    objective.student_loss(cast_of(network), batch_of(z), Step(0)).total.backward()
    assert network.b.grad.item() == pytest.approx(SIGMA**3 * ALPHA * (B - M) / V_P, abs=1e-9)
    assert network.a.grad.item() == pytest.approx(SIGMA**3 * ALPHA**3 * A * (A**2 - S**2) / (V_P * V_Q), abs=1e-9)


def test_dmd_direction_times_its_normaliser_is_the_score_difference(chosen_noise) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    t = torch.full((5,), 2 / 3, dtype=torch.float64)
    x_t = add_noise(SCHEDULE, x, t, torch.randn_like(x))
    empty = Condition({"label": torch.zeros(5)})
    real, fake = gaussian(constant(M), S)(x_t, t, empty), gaussian(constant(B), A)(x_t, t, empty)
    scale = (x - real.x0).abs().mean((1, 2, 3), keepdim=True)
    direction = dmd_direction(x, real.x0, fake.x0)
    torch.testing.assert_close(direction * scale, SIGMA**2 / ALPHA * (fake.score - real.score), rtol=0, atol=1e-12)


def test_vsd_direction_in_epsilon_equals_the_one_in_x0() -> None:
    torch.manual_seed(1)
    x_t, t = torch.randn(6, 4, dtype=torch.float64), torch.full((6,), 2 / 3, dtype=torch.float64)
    empty = Condition({"label": torch.zeros(6)})
    real, fake = gaussian(constant(M), S)(x_t, t, empty), gaussian(constant(B), A)(x_t, t, empty)
    direction = vsd_direction(real.eps, fake.eps, real.levels)
    torch.testing.assert_close(direction, ALPHA * SIGMA * (fake.x0 - real.x0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("objective", [VSD(guidance=1.0), DMD2(guidance=1.0)], ids=["vsd", "dmd2"])
def test_the_gradient_is_exactly_zero_where_student_and_teacher_agree(objective) -> None:
    torch.manual_seed(2)
    network = Linear(S, M)
    z = torch.randn(64, 1, dtype=torch.float64)
    objective.student_loss(cast_of(network), batch_of(z), Step(0)).total.backward()
    assert network.a.grad.item() == 0.0
    assert network.b.grad.item() == 0.0


@pytest.mark.parametrize("objective", [VSD(guidance=1.0), DMD2(guidance=1.0)], ids=["vsd", "dmd2"])
@pytest.mark.parametrize(("a", "b"), [(S, -0.4), (S, 2.0), (1.3, M), (0.1, M)])
def test_one_step_moves_the_student_towards_the_teacher(objective, a: float, b: float) -> None:
    torch.manual_seed(3)
    network = Linear(a, b)
    z = torch.randn(4096, 1, dtype=torch.float64)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    objective.student_loss(cast_of(network), batch_of(z), Step(0)).total.backward()
    optimizer.step()
    if b != M:
        assert abs(network.b.item() - M) < abs(b - M)
    if a != S:
        assert abs(network.a.item() ** 2 - S**2) < abs(a**2 - S**2)


def test_a_frozen_critic_leaves_exactly_the_guidance_as_direction(chosen_noise) -> None:
    """Critic = unguided teacher: g = (kappa - 1) w (eps_c - eps_null)."""
    z, eps = four_signs()
    chosen_noise(eps)
    network, kappa = Linear(A, B), 3.0
    oracle = gaussian(label, S)
    roles = Roles({"student": linear_student(network), "teacher": oracle, "critic": oracle})
    objective = VSD(guidance=kappa, guide_critic=False, t_min=AT_08[0], t_max=AT_08[1])
    objective.student_loss(roles, batch_of(z, label=1.0, null=-1.0), Step(0)).total.backward()
    # eps_c - eps_null = -sigma alpha (m_c - m_null) / v
    expected = (kappa - 1) * SIGMA**2 * (-SIGMA * ALPHA * 2.0 / V_P)
    assert network.b.grad.item() == pytest.approx(expected, abs=1e-9)


def fit(objective, network: Linear, teacher, steps: int, guided: bool) -> Linear:
    """Trains with an exact critic that is refreshed from the student at every step."""
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    torch.manual_seed(4)
    z = torch.randn(256, 16, dtype=torch.float64)  # 16 elements: DMD's normaliser is a mean over a sample
    z = torch.cat([z, -z]) / z.square().mean().sqrt()  # mean 0 and variance 1 exactly: no sampling bias in b
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
        b, a = network.b.item(), abs(network.a.item())
        critic = gaussian((lambda c, b=b: torch.full((len(c),), b, dtype=torch.float64)), a)
        roles = Roles({"student": linear_student(network), "teacher": teacher, "critic": critic})
        batch = batch_of(z, label=1.0 if guided else 0.0, null=-0.5 if guided else 0.0)
        optimizer.zero_grad()
        objective.student_loss(roles, batch, Step(step)).total.backward()
        optimizer.step()
    return network


@pytest.mark.parametrize("kappa", [1.0, 2.0, 4.0])
def test_dmd2_ends_at_the_guided_distribution(kappa: float) -> None:
    """Equal variances make the guided teacher exactly N(m_null + kappa (m_c - m_null), s^2)."""
    network = fit(DMD2(guidance=kappa), Linear(0.9, 0.0), gaussian(label, S), 400, guided=True)
    assert network.b.item() == pytest.approx(-0.5 + kappa * 1.5, abs=0.03)
    assert abs(network.a.item()) == pytest.approx(S, abs=0.03)


def test_vsd_with_the_critic_unguided_ends_at_the_guided_distribution() -> None:
    objective = VSD(guidance=2.0, guide_critic=False)
    network = fit(objective, Linear(0.9, 0.0), gaussian(label, S), 400, guided=True)
    assert network.b.item() == pytest.approx(2.5, abs=0.03)
    assert abs(network.a.item()) == pytest.approx(S, abs=0.03)


def test_vsd_guided_on_both_sides_has_the_unguided_teacher_as_fixed_point() -> None:
    """Two classes; the critic knows the student's conditional and null distributions, which match the teacher's."""
    network = Linear(S, 1.0)
    oracle = gaussian(label, S)
    z = torch.randn(256, 1, dtype=torch.float64)
    batch = batch_of(z, label=1.0, null=-0.5)
    roles = Roles({"student": linear_student(network), "teacher": oracle, "critic": oracle})
    VSD(guidance=4.5, guide_critic=True).student_loss(roles, batch, Step(0)).total.backward()
    assert network.b.grad.item() == 0.0
    network.zero_grad()
    VSD(guidance=4.5, guide_critic=False).student_loss(roles, batch, Step(0)).total.backward()
    assert abs(network.b.grad.item()) > 1e-3


def test_the_pseudo_loss_has_the_direction_over_the_element_count_as_gradient() -> None:
    torch.manual_seed(5)
    x = torch.randn(3, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(x)
    pseudo_loss(x, direction).backward()
    torch.testing.assert_close(x.grad, direction.detach() / x.numel(), rtol=0, atol=1e-15)


def test_the_normaliser_is_per_sample_and_invariant_to_scale() -> None:
    torch.manual_seed(6)
    x, real, fake = (torch.randn(2, 3, 4, 4, dtype=torch.float64) for _ in range(3))
    direction = dmd_direction(x, real, fake)
    other = torch.cat([x[:1], 10 * x[1:]])
    torch.testing.assert_close(dmd_direction(other, real, fake)[0], direction[0], rtol=0, atol=0)
    # real and fake moved away from x by the same factor: the same direction
    torch.testing.assert_close(dmd_direction(x, x + 7 * (real - x), x + 7 * (fake - x)), direction)


def test_a_sample_that_the_teacher_leaves_alone_gets_no_direction() -> None:
    x = torch.ones(1, 1, 2, 2)
    assert dmd_direction(x, x, x + 1).abs().max() == 0


def test_backward_simulation_feeds_the_drawn_step_with_the_right_distribution() -> None:
    """A linear student at step k sees mean alpha_k b and variance alpha_k^2 a^2 + sigma_k^2; k = 0 sees pure noise."""
    network, seen = Linear(0.3, 2.0), []
    student = linear_student(network)
    call = student._call

    def recording(module, x_t, model_time, condition):
        seen.append((model_time[0].item(), x_t.detach(), torch.is_grad_enabled()))
        return call(module, x_t, model_time, condition)

    student._call = recording
    torch.manual_seed(7)
    z = torch.randn(200_000, 1, dtype=torch.float64)
    drawn = set()
    for index in range(8):
        seen.clear()
        x0 = rollout(student, batch_of(z), (2, 1), Step(index))
        assert x0.requires_grad
        times = [entry[0] for entry in seen]
        assert times in ([2.0], [2.0, 1.0])
        assert [entry[2] for entry in seen] == [False] * (len(seen) - 1) + [True]
        drawn.add(len(seen))
        x = seen[-1][1]
        if len(seen) == 1:
            assert torch.equal(x, z)
        else:
            assert x.mean().item() == pytest.approx(ALPHA * 2.0, abs=0.01)
            assert x.var().item() == pytest.approx(ALPHA**2 * 0.3**2 + SIGMA**2, rel=0.02)
    assert drawn == {1, 2}


def test_the_drawn_step_is_the_same_on_every_process_and_differs_between_turns() -> None:
    draws = [Step(i, seed=3, turn=j).shared("rollout").randrange(4) for i in range(20) for j in range(3)]
    torch.manual_seed(99)  # another process' generator
    again = [Step(i, seed=3, turn=j).shared("rollout").randrange(4) for i in range(20) for j in range(3)]
    assert draws == again
    assert set(draws) == {0, 1, 2, 3}


@pytest.mark.parametrize("objective", [VSD(), DMD2()], ids=["vsd", "dmd2"])
def test_each_phase_leaves_gradients_on_its_own_roles_only(objective) -> None:
    networks = {name: Linear(0.9, 0.1) for name in ("teacher", "critic", "student")}
    roles = Roles({name: linear_student(network) for name, network in networks.items()})
    z = torch.randn(16, 1, dtype=torch.float64)
    for phase in objective.phases(0):
        for network in networks.values():
            network.zero_grad(set_to_none=True)
        phase.loss(roles, batch_of(z), Step(0)).total.backward()
        with_gradient = {name for name, network in networks.items() if network.a.grad is not None}
        assert with_gradient == set(phase.updates)


def test_dmd2_plays_five_critic_turns_for_one_of_the_student() -> None:
    turns = [(phase.updates, phase.repeats) for phase in DMD2(critic_updates=5).phases(17)]
    assert turns == [(("critic",), 5), (("student",), 1)]


@pytest.mark.parametrize("kind", [DMD2, DMD, FDistill, VSD, ESD])
def test_the_critic_plays_alone_as_long_as_it_leads(kind: type[DMD2 | DMD | FDistill | VSD | ESD]) -> None:
    objective, whole = kind(critic_updates=2, critic_lead=3), kind(critic_updates=2, critic_lead=0)
    turns = [[phase.name for phase in objective.phases(step)] for step in range(5)]
    assert turns == [["critic"]] * 3 + [[phase.name for phase in whole.phases(0)]] * 2
    assert sorted(turns[-1]) == ["critic", "student"]
    assert objective.phases(0)[0].repeats == 2
    assert objective.phases(3)[turns[-1].index("student")].loss == objective.student_loss
    with pytest.raises(UserError, match="critic_lead must not be negative, got -1; 0 lets the student play"):
        kind(critic_lead=-1)


def test_the_critic_loss_weight_does_not_move_its_optimum() -> None:
    """A linear critic fitted at one time has the same solution with and without the alpha^2 weight."""
    from stepdistill.objectives.matching import critic_denoising

    torch.manual_seed(8)
    x0 = 0.4 * torch.randn(512, 1, dtype=torch.float64) + 0.2
    solutions = []
    for weighted in (False, True):
        network = Linear(0.0, 0.0)
        critic = linear_student(network)
        critic.kind = "epsilon"
        optimizer = torch.optim.LBFGS(network.parameters(), max_iter=200, tolerance_grad=1e-12)

        def closure():
            torch.manual_seed(9)
            optimizer.zero_grad()  # noqa: B023
            loss = critic_denoising(critic, x0, batch_of(x0), drop=None, signal_weight=weighted)  # noqa: B023
            loss.backward()
            return loss

        import stepdistill.objectives.matching as matching

        original = matching.uniform_times
        matching.uniform_times = lambda schedule, count, **_: torch.full((count,), 2 / 3, dtype=torch.float64)
        try:
            optimizer.step(closure)
        finally:
            matching.uniform_times = original
        solutions.append((network.a.item(), network.b.item()))
    assert solutions[0] == pytest.approx(solutions[1], abs=1e-6)
