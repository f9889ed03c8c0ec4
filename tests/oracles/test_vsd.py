"""SwiftBrush beyond the gradients: where its student starts, and what the weight of its critic's loss changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stepdistill.condition import Condition
from stepdistill.denoiser import Denoiser, OwnWeights
from stepdistill.objectives.base import Batch, Step
from stepdistill.objectives.matching import critic_denoising, rollout
from stepdistill.objectives.vsd import VSD
from stepdistill.prediction import Levels
from stepdistill.schedule import from_scheduler_config
from tests.oracles.oracle import SCHEDULE, Linear, Roles, batch_of, gaussian, label, mixture


SD = from_scheduler_config({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})[0]
ALPHA_T, SIGMA_T = 0.068265, 0.997667  # of timestep 999
M, S = 0.7, 0.5


def student(answer: float) -> Denoiser:
    """Says that the noise is so many times its input."""
    return Denoiser(lambda network, x, t, c: answer * x, OwnWeights(nn.Module()), SD, "epsilon")


def test_the_student_is_its_networks_noise_turned_into_a_clean_sample() -> None:
    z = torch.randn(64, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for answer, expected in ((0.0, z / ALPHA_T), (1.0, z * (1 - SIGMA_T) / ALPHA_T)):
        made = rollout(student(answer), batch_of(z), (999,), Step(0))
        torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-5)


def test_a_student_that_is_still_the_teacher_makes_the_mean_with_almost_no_spread() -> None:
    """Why one call to a teacher is a blur: std alpha_T s^2 / v, 0.068 s^2."""
    z = torch.randn(4096, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z = (z - z.mean()) / z.std()
    teacher = gaussian(lambda c: torch.full((len(c),), M, dtype=torch.float64), S, SD)
    made = rollout(teacher, batch_of(z), (999,), Step(0))
    v = ALPHA_T**2 * S**2 + SIGMA_T**2
    assert made.mean().item() == pytest.approx(M - ALPHA_T**2 * S**2 * M / v, abs=1e-5)
    assert made.std().item() == pytest.approx(ALPHA_T * S**2 / v, abs=1e-5)
    assert made.std().item() == pytest.approx(0.068 * S**2, rel=0.01)


class Slope(nn.Module):
    """eps = k x_t, a critic of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.zeros((), dtype=torch.float64))


def fitted(signal_weight: bool, monkeypatch: pytest.MonkeyPatch) -> float:
    """The critic's k at timestep 499 alone: one Newton step on a loss that is quadratic in it."""
    network = Slope()
    critic = Denoiser(lambda net, x, t, c: net.k * x, OwnWeights(network), SD, "epsilon")
    network.requires_grad_(True)
    monkeypatch.setattr("stepdistill.objectives.matching.uniform_times", at(499))
    batch = batch_of(torch.zeros(2048, 1, dtype=torch.float64))

    def slope_of_the_loss(k: float) -> float:
        with torch.no_grad():
            network.k.fill_(k)
        network.zero_grad()
        torch.manual_seed(2)
        x0 = 1.3 * torch.randn(2048, 1, dtype=torch.float64)
        critic_denoising(critic, x0, batch, drop=None, signal_weight=signal_weight).backward()
        return network.k.grad.item()

    at_0, at_1 = slope_of_the_loss(0.0), slope_of_the_loss(1.0)
    return at_0 / (at_0 - at_1)


def at(index: int):
    return lambda schedule, count, **_: schedule.t_from_model_time(torch.full((count,), index))


def test_the_weight_of_the_critics_loss_does_not_move_its_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    weighted, plain = (fitted(weight, monkeypatch) for weight in (True, False))
    assert weighted == pytest.approx(plain, rel=1e-9)
    alpha, sigma = 0.526944, 0.849900
    assert plain == pytest.approx(sigma / (alpha**2 * 1.3**2 + sigma**2), rel=0.1)


@pytest.mark.parametrize(("index", "weight"), [(999, 0.0047), (0, 1.0)])
def test_the_critics_loss_hardly_sees_the_noisiest_timestep(
    monkeypatch: pytest.MonkeyPatch, index: int, weight: float
) -> None:
    """mean (alpha eps_hat - alpha eps)^2, as the released code writes it."""
    monkeypatch.setattr("stepdistill.objectives.matching.uniform_times", at(index))
    batch: Batch = batch_of(torch.zeros(512, 1, dtype=torch.float64))
    critic = student(0.0)

    def loss(signal_weight: bool) -> Tensor:
        torch.manual_seed(3)
        return critic_denoising(critic, batch.noise(), batch, drop=None, signal_weight=signal_weight)

    ratio = (loss(True) / loss(False)).item()
    assert ratio == pytest.approx(weight, rel=0.01)
    levels = Levels.at(SD, SD.t_from_model_time(torch.tensor([index])), torch.zeros(1, 1))
    assert ratio == pytest.approx(levels.alpha.item() ** 2, rel=1e-9)


def test_a_dropped_batch_trains_the_unconditional_branch_and_nothing_else() -> None:
    seen = []

    def call(network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        seen.append(condition.tensors["label"])
        return 0 * x

    critic = Denoiser(call, OwnWeights(nn.Module()), SD, "epsilon")
    batch = batch_of(torch.zeros(3, 1, dtype=torch.float64), label=1.0, null=-0.5)
    for drop in (None, torch.ones(3, dtype=torch.bool), torch.tensor([True, False, True])):
        critic_denoising(critic, batch.noise(), batch, drop=drop, signal_weight=True)
    assert [rows.tolist() for rows in seen] == [[1, 1, 1], [-0.5, -0.5, -0.5], [-0.5, 1, -0.5]]


CLASSES = torch.tensor([-1.0, 1.0], dtype=torch.float64)
NULL = 9.0  # no class


def of_two_classes(shift: float, std: float) -> Denoiser:
    """N(class + shift, std^2), and the mixture of both where the condition names no class."""
    each = gaussian(lambda condition: label(condition) + shift, std)
    both = mixture(torch.full((2,), 0.5, dtype=torch.float64), (CLASSES + shift)[:, None], std, SCHEDULE)

    def call(network: nn.Module, x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        null = (label(condition) == NULL)[:, None]
        return torch.where(null, both._call(network, x_t, time, condition), each._call(network, x_t, time, condition))

    return Denoiser(call, OwnWeights(nn.Module()), SCHEDULE, "epsilon")


def two_class_gradient(objective: VSD, a: float, b: float) -> tuple[float, float]:
    """Of the student x = a z + b + class, asked for the second class; the critic, both branches, is built from it."""
    network = Linear(a, b)
    view = Denoiser(
        lambda net, x, t, condition: net.a * x + net.b + label(condition)[:, None], OwnWeights(network), SCHEDULE,
        "sample",
    )  # fmt: skip
    network.requires_grad_(True)
    roles = Roles({"student": view, "teacher": of_two_classes(0.0, S), "critic": of_two_classes(b, abs(a))})
    z = torch.randn(64, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    torch.manual_seed(5)
    objective.student_loss(roles, batch_of(z, label=1.0, null=NULL), Step(0)).total.backward()
    return network.a.grad.item(), network.b.grad.item()


@pytest.mark.parametrize("guidance", [0.5, 1.0, 4.5])
def test_guidance_on_both_sides_keeps_the_classes_where_they_are_beside_a_null_that_is_their_mixture(
    guidance: float,
) -> None:
    """SwiftBrush's guidance cancels at q(x | y) = p(x | y), for any scale; on the teacher alone it moves the class."""
    assert two_class_gradient(VSD(timesteps=(2,), guidance=guidance), S, 0.0) == (0.0, 0.0)
    alone = two_class_gradient(VSD(timesteps=(2,), guidance=guidance, guide_critic=False), S, 0.0)
    assert (abs(alone[1]) > 1e-3) is (guidance != 1.0)
    assert (alone[1] < 0) is (guidance > 1.0), "away from the other class, and towards it below 1"
    assert two_class_gradient(VSD(timesteps=(2,), guidance=guidance), S, 0.4)[1] > 1e-3, "off the match it works"
