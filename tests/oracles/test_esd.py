"""Entropic score distillation: x = a z + b with z itself as the condition; both of the critic's scores are known.

Given z, x_t is N(alpha x, sigma^2), so the conditional score is -eps / sigma; over all z it is the Gaussian's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from stepdistill.condition import Condition
from stepdistill.denoiser import Denoiser, OwnWeights
from stepdistill.errors import UserError
from stepdistill.objectives.base import Batch, Step
from stepdistill.objectives.esd import ESD
from stepdistill.objectives.vsd import VSD
from stepdistill.prediction import add_noise
from tests.oracles.oracle import AT_08, SCHEDULE, Linear, Roles, four_signs, gaussian, linear_student, shaped


M, S, A, B = 0.7, 0.5, 1.3, -0.4
ALPHA, SIGMA = 0.8, 0.6
V_P, V_Q = ALPHA**2 * S**2 + SIGMA**2, ALPHA**2 * A**2 + SIGMA**2
AT = torch.full((4,), 2 / 3, dtype=torch.float64)


@dataclass(frozen=True)
class Chosen(Batch):
    """A batch whose noise z is its condition too."""

    def noise(self) -> Tensor:
        return self.condition.tensors["z"][:, None]


def batch_of(z: Tensor) -> Chosen:
    rows, nothing = z.flatten(), torch.zeros(len(z), dtype=z.dtype)
    condition = Condition({"z": rows, "null": nothing})
    return Chosen(condition, Condition({"z": nothing, "null": nothing + 1}), (1,), z.device)


def exact_critic(network: Linear) -> Denoiser:
    """Knows the student's samples of each z, and of all z where the condition is null."""
    a, b = network.a.item(), network.b.item()

    def call(module: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        t = SCHEDULE.t_from_model_time(model_time)
        alpha, sigma = shaped(SCHEDULE.alpha(t), x_t), shaped(SCHEDULE.sigma(t), x_t)
        null = shaped(condition.tensors["null"], x_t)
        mean = b + (1 - null) * a * shaped(condition.tensors["z"], x_t)
        return sigma * (x_t - alpha * mean) / (null * alpha**2 * a**2 + sigma**2)

    return Denoiser(call, OwnWeights(nn.Module()), SCHEDULE, "epsilon")


def cast_of(network: Linear) -> Roles:
    def mean(condition: Condition) -> Tensor:
        return torch.full((len(condition),), M, dtype=torch.float64)

    return Roles({"student": linear_student(network), "teacher": gaussian(mean, S), "critic": exact_critic(network)})


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> Batch:
    """z and eps in {-1, 1}: expectations of what is quadratic in them are exact."""
    z, eps = four_signs()
    monkeypatch.setattr(torch, "randn_like", lambda x: eps.to(x.dtype))
    return batch_of(z)


def gradients(objective: ESD | VSD, network: Linear, batch: Batch) -> tuple[float, float]:
    network.zero_grad()
    objective.student_loss(cast_of(network), batch, Step(0)).total.backward()
    return network.a.grad.item(), network.b.grad.item()


def at_08(entropy: float) -> ESD:
    return ESD(guidance=1.0, entropy=entropy, t_min=AT_08[0], t_max=AT_08[1])


@pytest.mark.parametrize("entropy", [0.0, 0.3, 0.5, 1.0])
def test_the_expected_gradient_has_its_closed_form(four: Batch, entropy: float) -> None:
    """E[(s_q - s_p) dx_t/da] = alpha^2 a (1/v_p - lambda/v_q), here with w = sigma^2, in eps and without dx_t/dx."""
    a, b = gradients(at_08(entropy), Linear(A, B), four)
    unit = SIGMA**3 / ALPHA
    assert a == pytest.approx(unit * ALPHA**2 * A * (1 / V_P - entropy / V_Q), abs=1e-9)
    assert b == pytest.approx(unit * ALPHA**2 * (B - M) / V_P, abs=1e-9)


@pytest.mark.parametrize(("entropy", "square"), [(0.0, 0.0), (0.6, 0.0), (0.9, 0.16875), (1.0, 0.25)])
def test_the_student_ends_as_wide_as_the_entropy_asks(four: Batch, entropy: float, square: float) -> None:
    """a^2 = max(0, lambda s^2 - (1 - lambda) sigma^2 / alpha^2): collapse at 0, the teacher's width at 1."""
    assert square == pytest.approx(max(0.0, entropy * S**2 - (1 - entropy) * SIGMA**2 / ALPHA**2))
    network, objective = Linear(0.7, B), at_08(entropy)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.08)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.08 * (1 - step / 200)
        gradients(objective, network, four)
        optimizer.step()
    assert network.a.item() ** 2 == pytest.approx(square, abs=2e-3)
    assert network.b.item() == pytest.approx(M, abs=1e-3)


@pytest.mark.parametrize("entropy", [0.0, 0.25, 1.0])
def test_guidance_on_the_critic_is_the_mixture_of_its_scores(entropy: float) -> None:
    torch.manual_seed(0)
    batch = batch_of(torch.randn(4, 1, dtype=torch.float64))
    x_t = add_noise(SCHEDULE, batch.noise(), AT, torch.randn(4, 1, dtype=torch.float64))
    critic = exact_critic(Linear(A, B))
    mixture = entropy * critic(x_t, AT, batch.null).score + (1 - entropy) * critic(x_t, AT, batch.condition).score
    guided = critic.guided(x_t, AT, batch.condition, batch.null, 1 - entropy).score
    torch.testing.assert_close(guided, mixture, rtol=0, atol=1e-12)


def test_without_entropy_it_is_vsd_with_an_unguided_critic(four: Batch) -> None:
    vsd = VSD(guidance=1.0, guide_critic=False, t_min=AT_08[0], t_max=AT_08[1])
    assert gradients(at_08(0.0), Linear(A, B), four) == gradients(vsd, Linear(A, B), four)
    assert gradients(at_08(0.1), Linear(A, B), four) != gradients(vsd, Linear(A, B), four)


def test_the_teacher_and_critic_get_no_gradient_and_the_student_none_from_the_critics_turn(four: Batch) -> None:
    network, probe = Linear(A, B), nn.Parameter(torch.ones(1, dtype=torch.float64))
    roles = cast_of(network)
    for role in ("teacher", "critic"):
        roles.denoiser(role)._call = scaled(roles.denoiser(role)._call, probe)
    objective = at_08(0.5)
    objective.student_loss(roles, four, Step(0)).total.backward()
    assert probe.grad is None
    assert network.a.grad is not None
    network.zero_grad()
    (critic_phase,) = (phase for phase in objective.phases(0) if phase.updates == ("critic",))
    critic_phase.loss(roles, four, Step(0)).total.backward()
    assert probe.grad is not None
    assert network.a.grad is None


def scaled(call: Callable[..., Tensor], factor: nn.Parameter) -> Callable[..., Tensor]:
    return lambda *given: factor * call(*given)


def test_the_critics_unconditional_branch_is_trained_as_often_as_asked(four: Batch) -> None:
    nulls, roles = [], cast_of(Linear(A, B))
    critic = roles.denoiser("critic")
    call = critic._call

    def recording(network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        nulls.append(condition.tensors["null"].mean().item())
        return call(network, x_t, model_time, condition)

    critic._call = recording
    phase = ESD(condition_dropout=0.5, critic_updates=3).phases(0)[1]
    for step in range(400):
        phase.loss(roles, four, Step(step))
    assert set(nulls) == {0.0, 1.0}
    assert sum(nulls) / len(nulls) == pytest.approx(0.5, abs=0.06)
    assert phase.repeats == 3


@pytest.mark.parametrize("entropy", [-0.1, 1.1])
def test_an_entropy_that_is_no_share_is_refused(entropy: float) -> None:
    with pytest.raises(UserError, match="from 0 to 1"):
        ESD(entropy=entropy)
