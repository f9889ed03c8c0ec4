"""DMD and regression on pairs: exact gradients, fixed points, who is asked what, and the timestep below the last."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stepdistill.condition import Condition
from stepdistill.denoiser import Denoiser, OwnWeights
from stepdistill.errors import UserError
from stepdistill.objectives.base import InferenceSpec, Step
from stepdistill.objectives.dmd import DMD
from stepdistill.objectives.dmd2 import DMD2
from stepdistill.objectives.regression import Regression
from stepdistill.schedule import from_scheduler_config
from tests.oracles.oracle import (
    AT_08,
    SCHEDULE,
    GivenNoise,
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
SD = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
      "beta_schedule": "scaled_linear"}  # fmt: skip
LAST = 2  # the last timestep of the oracles' schedule


def with_pairs(z: Tensor, noise: Tensor, target: Tensor, **labels: float) -> GivenNoise:
    """A batch with z as its fresh noise, and stored pairs."""
    batch = batch_of(z, **labels)
    object.__setattr__(batch, "pair_noise", noise)
    object.__setattr__(batch, "latents", target)
    return batch


def cast_of(network: Linear, critic: Denoiser) -> Roles:
    return Roles({"student": linear_student(network), "teacher": gaussian(constant(M), S), "critic": critic})


def recorded(denoiser: Denoiser) -> tuple[Denoiser, list[tuple[Tensor, Tensor]]]:
    """The denoiser, and what it is going to be given: (x_t, model time)."""
    seen, call = [], denoiser._call

    def recording(network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        seen.append((x_t, model_time))
        return call(network, x_t, model_time, condition)

    denoiser._call = recording
    return denoiser, seen


# ---- regression ----------------------------------------------------------------------------------------------------


def test_regression_gives_the_exact_expected_gradient_of_a_linear_student() -> None:
    """y = s z + m: E (a z + b - y)^2 has the gradients 2 (a - s) and 2 (b - m)."""
    z, _ = four_signs()
    network = Linear(A, B)
    batch = with_pairs(z, z, S * z + M)
    Regression(timestep=LAST).loss(cast_of(network, gaussian(constant(M), S)), batch, Step(0)).total.backward()
    assert network.a.grad.item() == pytest.approx(2 * (A - S), abs=1e-12)
    assert network.b.grad.item() == pytest.approx(2 * (B - M), abs=1e-12)


def test_regression_is_zero_with_zero_gradient_where_student_and_teacher_agree() -> None:
    z = torch.randn(8, 1, dtype=torch.float64)
    network = Linear(S, M)
    loss = Regression(timestep=LAST).loss(cast_of(network, None), with_pairs(z, z, S * z + M), Step(0)).total
    loss.backward()
    assert loss.item() == network.a.grad.item() == network.b.grad.item() == 0.0


@pytest.mark.parametrize(("distance", "expected"), [("l2", (0.01 + 9) / 2), ("huber", (0.005 + 0.5 * (3 - 0.25)) / 2)])
def test_distances_of_two_elements_by_hand(distance: str, expected: float) -> None:
    """Huber: 0.5 d^2 up to delta, delta (d - delta / 2) above; here d = 0.1 and 3, delta = 0.5."""
    x0 = torch.tensor([[0.1, 3.0]], dtype=torch.float64)
    objective = Regression(distance=distance, huber_delta=0.5)
    assert objective.error(None, x0, torch.zeros_like(x0)).item() == pytest.approx(expected, abs=1e-12)


def test_a_student_told_399_converts_its_output_with_the_noise_level_of_399() -> None:
    """With eps = 0: x = z / alpha_399 = z / 0.652753 (DMD2's one-step SDXL)."""
    schedule, kind = from_scheduler_config(SD)
    silent = Denoiser(lambda network, x_t, time, condition: 0 * x_t, OwnWeights(nn.Module()), schedule, kind)
    student, seen = recorded(silent)
    z = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    for timestep, alpha in ((399, 0.652753), (999, 0.068265)):
        x0 = Regression(timestep=timestep).sample(Roles({"student": student}), z, Condition({"label": torch.zeros(3)}))
        torch.testing.assert_close(x0, z / alpha, rtol=1e-5, atol=0)
        assert seen[-1][1].tolist() == [timestep] * 3
        assert torch.equal(seen[-1][0], z), "pure noise, whatever it is told"
    assert Regression(timestep=399).inference() == DMD(timestep=399).inference() == InferenceSpec((399,))


# ---- dmd -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("match_pairs", [True, False])
def test_where_the_critic_is_the_teacher_only_the_weighted_regression_moves_the_student(match_pairs: bool) -> None:
    z, _ = four_signs()
    network, oracle = Linear(A, B), gaussian(constant(M), S)
    objective = DMD(timestep=LAST, guidance=1.0, regression_weight=0.25, match_pairs=match_pairs)
    cast = Roles({"student": linear_student(network), "teacher": oracle, "critic": oracle})
    loss = objective.student_loss(cast, with_pairs(torch.randn_like(z), z, S * z + M), Step(0))
    loss.total.backward()
    assert loss.terms["matching"].item() == 0.0
    assert network.a.grad.item() == pytest.approx(0.25 * 2 * (A - S), abs=1e-12)
    assert network.b.grad.item() == pytest.approx(0.25 * 2 * (B - M), abs=1e-12)


def gradient(objective, network: Linear, batch: GivenNoise) -> tuple[float, float]:
    network.zero_grad()
    torch.manual_seed(1)
    loss = objective.student_loss(cast_of(network, gaussian(constant(B), A)), batch, Step(0))
    loss.terms["matching"].backward()
    return network.a.grad.item(), network.b.grad.item()


def test_the_matching_term_is_dmd2s() -> None:
    z, network = torch.randn(64, 3, dtype=torch.float64), Linear(A, B)
    options = {"guidance": 1.0, "t_min": 0.3, "t_max": 0.7}
    expected = gradient(DMD2(timesteps=(LAST,), **options), network, batch_of(z))
    assert expected[0] != 0
    for objective, batch in (
        (DMD(timestep=LAST, regression_weight=0.0, **options), batch_of(z)),
        (DMD(timestep=LAST, match_pairs=False, **options), with_pairs(z, z + 1, z)),
    ):
        assert gradient(objective, network, batch) == expected


def test_samples_of_stored_noise_are_matched_like_those_of_fresh_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored noise equal to the fresh one, seen through the same noise: the mean over both is the mean over one."""
    z, eps = four_signs()
    monkeypatch.setattr(torch, "randn_like", lambda x: eps.repeat(len(x) // 4, 1))
    network, (t_min, t_max) = Linear(A, B), AT_08
    options = {"timestep": LAST, "guidance": 1.0, "t_min": t_min, "t_max": t_max}
    alone = gradient(DMD(match_pairs=False, **options), network, with_pairs(z, z, z))
    both = gradient(DMD(match_pairs=True, **options), network, with_pairs(z, z, z))
    assert both == pytest.approx(alone, abs=1e-12)
    other = gradient(DMD(match_pairs=True, **options), network, with_pairs(z, 2 * z, z))
    assert other != pytest.approx(alone, abs=1e-3)


@pytest.mark.parametrize(("match_pairs", "rows"), [(True, 8), (False, 4)])
def test_teacher_and_critic_look_at_the_pairs_only_where_they_are_matched(match_pairs: bool, rows: int) -> None:
    z, _ = four_signs()
    teacher, asked = recorded(gaussian(label, S))
    critic, shown = recorded(gaussian(label, S))
    student, called = recorded(linear_student(Linear(A, B)))
    cast = Roles({"student": student, "teacher": teacher, "critic": critic})
    objective = DMD(timestep=LAST, guidance=3.0, match_pairs=match_pairs)
    objective.student_loss(cast, with_pairs(z, z, z, label=1.0, null=-1.0), Step(0))
    assert [len(x) for x, _ in asked] == [2 * rows], "one guided call"
    assert [len(x) for x, _ in shown] == [rows], "the critic is not guided"
    assert sum(len(x) for x, _ in called) == 8, "fresh and stored noise, each once"


def test_neither_teacher_nor_critic_gets_a_gradient_from_the_students_turn_nor_the_student_from_the_critics() -> None:
    z = torch.randn(16, 2, dtype=torch.float64)
    networks = {role: Linear(A, B) for role in ("student", "teacher", "critic")}
    cast, objective = Roles({role: linear_student(n) for role, n in networks.items()}), DMD(timestep=LAST)
    objective.student_loss(cast, with_pairs(z, z, z), Step(0)).total.backward()
    assert networks["student"].a.grad is not None
    assert all(networks[role].a.grad is None for role in ("teacher", "critic"))
    networks["student"].zero_grad()
    _, critic_turn = objective.phases(0)
    critic_turn.loss(cast, batch_of(z), Step(0)).total.backward()
    assert networks["critic"].a.grad is not None
    assert all(networks[role].a.grad is None for role in ("teacher", "student"))


def test_the_generator_comes_before_the_critic_and_only_it_needs_pairs() -> None:
    turns = [(p.name, p.updates, p.stream, p.repeats) for p in DMD(critic_updates=3).phases(0)]
    assert turns == [("student", ("student",), "pairs", 1), ("critic", ("critic",), "prompts", 3)]
    assert {p.stream for p in DMD(regression_weight=0.0).phases(0)} == {"prompts"}
    assert [p.repeats for p in DMD().phases(0)] == [1, 1], "DMD, algorithm 1"


def test_the_times_of_the_matching_loss_are_the_published_ones() -> None:
    schedule, _ = from_scheduler_config(SD)
    teacher, asked = recorded(gaussian(constant(M), S, schedule))
    network = Linear(A, B)
    cast = Roles({"student": linear_student(network, schedule), "teacher": teacher, "critic": teacher})
    z = torch.randn(15_000, 1, dtype=torch.float64)
    for objective, last in ((DMD(guidance=1.0), 980), (DMD(guidance=1.0, t_max=0.5), 500)):
        objective.student_loss(cast, with_pairs(z, z, z), Step(0))
        assert (asked[-1][1].min().item(), asked[-1][1].max().item()) == (20, last)


def fit(objective: DMD, network: Linear, guidance: float, steps: int = 150) -> Linear:
    """Trains with an exact critic, on pairs of a teacher N(1, S^2) with null N(-0.5, S^2), guided."""
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    torch.manual_seed(4)
    z = torch.randn(32, 16, dtype=torch.float64)
    z = torch.cat([z, -z]) / z.square().mean().sqrt()  # mean 0 and variance 1 exactly
    target = S * z - 0.5 + guidance * 1.5
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
        critic = gaussian(constant(network.b.item()), abs(network.a.item()))
        cast = Roles({"student": linear_student(network), "teacher": gaussian(label, S), "critic": critic})
        optimizer.zero_grad()
        batch = with_pairs(z.roll(step, 0), z, target, label=1.0, null=-0.5)
        objective.student_loss(cast, batch, Step(step)).total.backward()
        optimizer.step()
    return network


def test_dmd_ends_at_the_guided_distribution() -> None:
    network = fit(DMD(timestep=LAST, guidance=2.0), Linear(0.9, 0.0), 2.0)
    assert network.b.item() == pytest.approx(2.5, abs=0.03)
    assert network.a.item() == pytest.approx(S, abs=0.03)


def test_regression_decides_which_noise_becomes_which_image() -> None:
    """The distribution of a z + b does not tell a from -a; the pairs do."""
    free = fit(DMD(timestep=LAST, guidance=2.0, regression_weight=0.0), Linear(-0.9, 0.0), 2.0)
    assert free.a.item() == pytest.approx(-S, abs=0.03)
    held = fit(DMD(timestep=LAST, guidance=2.0, regression_weight=1.0), Linear(-0.9, 0.0), 2.0)
    assert held.a.item() == pytest.approx(S, abs=0.03)


@pytest.mark.parametrize("kind", [Regression, DMD])
def test_the_perceptual_distance_without_weights_is_refused_at_once(kind: type) -> None:
    with pytest.raises(UserError, match="set lpips to a safetensors file"):
        kind(distance="lpips")
    assert kind(distance="lpips", lpips="vgg16.safetensors").lpips == "vgg16.safetensors"


def test_the_oracles_schedule_has_the_last_timestep_that_is_used_here() -> None:
    assert SCHEDULE.num_train_timesteps == LAST + 1
