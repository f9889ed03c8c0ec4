"""f-distill against known densities: DMD2 as a special case, exact ratios, both normalisations, modes, checkpoints."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepdistill.data.latents import LatentBatch
from stepdistill.denoiser import Denoiser
from stepdistill.divergences import DIVERGENCES
from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.losses import dmd_direction
from stepdistill.objectives.base import Step
from stepdistill.objectives.dmd2 import DMD2
from stepdistill.objectives.f_distill import FDistill
from stepdistill.ratios import RatioDiscriminator
from stepdistill.schedule import NoiseSchedule, from_scheduler_config
from stepdistill.trainer import Trainer
from tests.oracles.oracle import AT_08, SCHEDULE, Linear, Roles, batch_of, constant, gaussian, linear_student, mixture
from tests.tiny import LORA, PROMPTS, trainer_of, weights_of


M, S, A, B = 0.7, 0.5, 1.3, -0.4  # the teacher's and the student's mean and standard deviation: N(M, S^2), N(B, A^2)
SD, _ = from_scheduler_config({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
PLAIN = {"guidance": 1.0, "normalize_ratio": False, "normalize_weight": False}
WIDE = {"logit_limit": 1e3, "ratio_range": (1e-30, 1e30)}


def log_normal(x_t: Tensor, t: Tensor, mean: float, std: float, schedule: NoiseSchedule = SCHEDULE) -> Tensor:
    """Log density, (B,), of N(mean, std^2) per element, noised to time t; without the constant of all Gaussians."""
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    v = alpha**2 * std**2 + sigma**2
    return (-((x_t - alpha * mean) ** 2) / (2 * v) - v.log() / 2).sum(1)


class GivenHead:
    """Stands in for a cast's head: a function of (denoiser, x_t, t, condition) => logits, (B, L)."""

    def __init__(self, logits, bins: int = 10) -> None:
        self._logits = logits
        self.module = RatioDiscriminator([], bins).double()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, condition) -> Tensor:
        self.seen.append((x_t, t))
        return self._logits(denoiser, x_t, t, condition)


class RolesWithHead(Roles):
    """Denoisers by role, and the head "discriminator"."""

    def __init__(self, denoisers, head: GivenHead) -> None:
        super().__init__(denoisers)
        self._head = head

    def head(self, role: str) -> GivenHead:
        assert role == "discriminator"
        return self._head


def exact_head(p: tuple[float, float] = (M, S), q: tuple[float, float] = (B, A)) -> GivenHead:
    """log p_t / q_t of two Gaussians, which an optimal discriminator says."""
    return GivenHead(lambda _, x_t, t, c: (log_normal(x_t, t, *p) - log_normal(x_t, t, *q))[:, None])


def cast_of(network: Linear, head: GivenHead) -> RolesWithHead:
    """The student N(b, a^2), a critic that knows it exactly, the teacher N(M, S^2)."""
    critic = gaussian(constant(network.b.item()), abs(network.a.item()))
    return RolesWithHead(
        {"student": linear_student(network), "teacher": gaussian(constant(M), S), "critic": critic}, head
    )


def gradients(objective: DMD2 | FDistill, cast: RolesWithHead, network: Linear, z: Tensor) -> tuple[float, float]:
    torch.manual_seed(1)
    network.zero_grad(set_to_none=True)
    objective.student_loss(cast, batch_of(z), Step(0)).total.backward()
    return network.a.grad.item(), network.b.grad.item()


def noise(count: int, width: int = 4) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(count, width, dtype=torch.float64)


# ---- DMD2 with a weight --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"gan_weight": 0.0},
        {"gan_weight": 0.3},
        {"gan_weight": 0.0, "weighting": "sigma_over_alpha"},
        {"gan_weight": 0.0, "weighting": "sigma_cubed_over_alpha"},
        {"gan_weight": 0.3, "gan_log_noise": (-1.0, 0.5)},
    ],
)
def test_the_reverse_kl_without_normalisation_is_dmd2_to_the_last_bit(options: dict[str, Any]) -> None:
    network = Linear(A, B)
    cast = cast_of(network, exact_head())
    ours = FDistill(divergence="reverse_kl", **options, **PLAIN)
    theirs = DMD2(guidance=1.0, **options)
    assert gradients(ours, cast, network, noise(64)) == gradients(theirs, cast, network, noise(64))


def test_the_reverse_kl_with_normalisation_is_dmd2_to_a_millionth() -> None:
    network = Linear(A, B)
    cast = cast_of(network, exact_head())
    ours = gradients(FDistill(divergence="reverse_kl", guidance=1.0, gan_weight=0.0), cast, network, noise(64))
    theirs = gradients(DMD2(guidance=1.0), cast, network, noise(64))
    assert ours == pytest.approx(theirs, rel=1.01e-6)
    assert ours != theirs


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_direction_is_dmds_times_the_weight_of_the_ratio_at_the_same_noise(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, head = Linear(A, B), exact_head()
    cast, seen, directions = cast_of(network, head), [], []
    teacher = cast.denoiser("teacher")
    call = teacher._call
    teacher._call = lambda net, x_t, time, c: (seen.append(x_t), call(net, x_t, time, c))[1]
    monkeypatch.setattr("stepdistill.objectives.f_distill.pseudo_loss",
                        lambda x0, direction: (directions.append((x0, direction)), x0.mean())[1])  # fmt: skip
    objective = FDistill(divergence=name, gan_weight=0.0, **PLAIN, **WIDE)
    objective.student_loss(cast, batch_of(noise(32)), Step(0))
    ((x_t, t),), (shown,), ((x0, direction),) = head.seen, seen, directions
    assert torch.equal(x_t, shown)
    ratio = (log_normal(x_t, t, M, S) - log_normal(x_t, t, B, A)).exp()
    condition = batch_of(x_t).condition
    plain = dmd_direction(x0, teacher(x_t, t, condition).x0, cast.denoiser("critic")(x_t, t, condition).x0)
    torch.testing.assert_close(direction, DIVERGENCES[name].h(ratio)[:, None] * plain, rtol=1e-10, atol=0)
    assert not direction.requires_grad


@pytest.mark.parametrize("name", DIVERGENCES)
def test_where_student_and_teacher_agree_an_update_changes_nothing(name: str) -> None:
    """With an exact discriminator the adversarial term is flat there too."""
    network = Linear(S, M)
    cast = cast_of(network, exact_head(q=(M, S)))
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    gradients(FDistill(divergence=name, guidance=1.0, gan_weight=1.0), cast, network, noise(64))
    optimizer.step()
    assert (network.a.item(), network.b.item()) == (S, M)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("a", "b"), [(S, -0.4), (S, 2.0), (1.3, M), (0.1, M)])
def test_one_step_moves_the_student_towards_the_teacher(name: str, a: float, b: float) -> None:
    network = Linear(a, b)
    cast = cast_of(network, exact_head(q=(b, a)))
    to_a, to_b = gradients(FDistill(divergence=name, guidance=1.0), cast, network, noise(4096))
    if b != M:
        assert to_b * (b - M) > 0
    if a != S:
        assert to_a * (a - S) > 0


# ---- the ratio -----------------------------------------------------------------------------------------------------


class Quadratic(nn.Module):
    """Logistic regression on 1, x and x^2, with coefficients of its own at each of the schedule's three times."""

    def __init__(self) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.zeros(3, 3, dtype=torch.float64))

    def forward(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, condition) -> Tensor:
        index = (3 * t).round().long() - 1
        return (self.coefficients[index] * torch.cat([torch.ones_like(x_t), x_t, x_t**2], 1)).sum(1, keepdim=True)


def test_a_discriminator_that_is_trained_by_the_critics_phase_gives_the_ratio_of_the_densities() -> None:
    regression, network = Quadratic(), Linear(A, B)
    cast = cast_of(network, GivenHead(regression))
    objective = FDistill(guidance=1.0, discriminator_weight=1.0, **WIDE)
    critic_phase, _ = objective.phases(0)
    count = 60_000
    batch = batch_of(noise(count, 1))
    object.__setattr__(batch, "latents", M + S * torch.randn(count, 1, dtype=torch.float64))
    optimizer = torch.optim.LBFGS(
        regression.parameters(), max_iter=25, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        torch.manual_seed(5)
        optimizer.zero_grad()
        loss = critic_phase.loss(cast, batch, Step(0)).terms["discriminator"]
        loss.backward()
        return loss

    optimizer.step(closure)
    for index in (0, 1):  # at the last of the three times almost no signal is left to tell the two apart by
        t = torch.full((4096,), (index + 1) / 3, dtype=torch.float64)
        alpha, sigma = SCHEDULE.alpha(t)[:, None], SCHEDULE.sigma(t)[:, None]
        x_t = alpha * (B + A * noise(4096, 1)) + sigma * torch.randn(4096, 1, dtype=torch.float64)
        found = objective.ratio(cast, (x_t, t), batch_of(x_t)).log()
        exact = log_normal(x_t, t, M, S) - log_normal(x_t, t, B, A)
        assert (found - exact).square().mean().sqrt() < 0.05 * exact.square().mean().sqrt()


# ---- normalisation -------------------------------------------------------------------------------------------------


def test_bins_divide_the_times_of_the_matching_loss_into_equal_parts() -> None:
    head = exact_head()
    t = SD.t_from_model_time(torch.arange(20, 981))  # what uniform_times draws between 0.02 and 0.98
    FDistill(t_min=0.02, t_max=0.98).weight(
        RolesWithHead({}, head), t, t
    )  # the ratio is t: a bin's mean is its middle
    middles = 0.02 + 0.96 / 10 * (torch.arange(10, dtype=torch.float64) + 0.5)
    torch.testing.assert_close(head.module.mean_ratios, middles, rtol=0, atol=1.1e-3)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_mean_weight_of_a_batch_is_one_whatever_the_divergence(name: str) -> None:
    head = exact_head()
    torch.manual_seed(3)
    ratio, t = torch.randn(256, dtype=torch.float64).exp(), torch.rand(256, dtype=torch.float64)
    weight = FDistill(divergence=name).weight(RolesWithHead({}, head), ratio, t)
    assert weight.mean().item() == pytest.approx(1, abs=1e-5)
    if name != "reverse_kl":
        assert weight.std() > 0.1


def test_weights_of_a_game_at_one_single_time_are_finite() -> None:
    head = exact_head()
    ratio, t = torch.tensor([0.5, 2.0], dtype=torch.float64), torch.tensor([2 / 3, 2 / 3], dtype=torch.float64)
    weight = FDistill(t_min=AT_08[0], t_max=AT_08[1]).weight(RolesWithHead({}, head), ratio, t)
    assert weight.isfinite().all()
    assert (head.module.mean_ratios != 1).sum() == 1


# ---- modes ---------------------------------------------------------------------------------------------------------


MODE, STD = 2.0, 0.4  # two modes of equal weight at (2, 2) and (-2, -2)
MEANS = torch.tensor([[MODE, MODE], [-MODE, -MODE]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.5], dtype=torch.float64)


def mass_at_the_second_mode(divergence: str, steps: int) -> float:
    """Of a Gaussian student that starts on the first mode; critic and ratio are exact all the time."""
    network = Linear(STD, MODE)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    teacher = mixture(WEIGHTS, MEANS, STD, SD)
    objective = FDistill(divergence=divergence, guidance=1.0, gan_weight=0.0)
    torch.manual_seed(6)
    for step in range(steps):
        a, b = network.a.item(), network.b.item()

        def logits(_, x_t: Tensor, t: Tensor, condition, a: float = a, b: float = b) -> Tensor:
            modes = torch.stack([log_normal(x_t, t, mean, STD, SD) for mean in (MODE, -MODE)])
            return (modes.logsumexp(0) - math.log(2) - log_normal(x_t, t, b, a, SD))[:, None]

        roles = {"student": linear_student(network, SD), "teacher": teacher, "critic": gaussian(constant(b), a, SD)}
        optimizer.zero_grad()
        z = torch.randn(512, 2, dtype=torch.float64)
        objective.student_loss(RolesWithHead(roles, GivenHead(logits)), batch_of(z), Step(step)).total.backward()
        optimizer.step()
    # Along the diagonal the student is N(sqrt(2) b, a^2), and what lies below zero is nearer to the second mode.
    return 0.5 * math.erfc(network.b.item() / abs(network.a.item()))


def test_mode_covering_divergences_reach_a_missed_mode_sooner_than_the_reverse_kl() -> None:
    reached = {name: mass_at_the_second_mode(name, 40) for name in ("reverse_kl", "jensen_shannon", "forward_kl")}
    print(reached)
    assert reached["jensen_shannon"] > 3 * reached["reverse_kl"]
    assert reached["forward_kl"] > 3 * reached["reverse_kl"]


# ---- the game ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gan_weight", [0.0, 1e-3])
def test_the_critics_phase_trains_the_discriminator_on_images_also_without_an_adversarial_term(
    gan_weight: float,
) -> None:
    objective = FDistill(gan_weight=gan_weight, critic_updates=7)
    turns = [(phase.updates, phase.stream, phase.repeats) for phase in objective.phases(3)]
    assert turns == [(("critic", "discriminator"), "images", 7), (("student",), "prompts", 1)]
    assert list(objective.roles()) == ["teacher", "critic", "student", "discriminator"]


def test_the_critics_loss_is_dmd2s() -> None:
    network = Linear(A, B)
    cast = cast_of(network, exact_head())
    batch = batch_of(noise(16))
    object.__setattr__(batch, "latents", noise(16) + M)
    values = []
    for objective in (FDistill(r1_weight=3.0), DMD2(gan_weight=1.0, r1_weight=3.0)):
        torch.manual_seed(2)
        terms = objective.phases(0)[0].loss(cast, batch, Step(0)).terms
        values.append({name: term.item() for name, term in terms.items()})
    assert values[0] == values[1]
    assert set(values[0]) == {"critic", "discriminator", "r1"}


def test_each_phase_leaves_gradients_on_its_own_roles_only() -> None:
    """The head looks through the critic, so a leak from the student's phase into either would be seen."""
    networks = {name: Linear(0.9, 0.1) for name in ("teacher", "critic", "student", "discriminator")}
    own = networks["discriminator"]
    head = GivenHead(lambda denoiser, x_t, t, c: own.a * denoiser(x_t, t, c).x0.mean(1, keepdim=True) + own.b)
    roles = RolesWithHead({name: linear_student(networks[name]) for name in ("teacher", "critic", "student")}, head)
    batch = batch_of(noise(16))
    object.__setattr__(batch, "latents", noise(16))
    for phase in FDistill(gan_weight=1.0).phases(0):
        for network in networks.values():
            network.zero_grad(set_to_none=True)
        phase.loss(roles, batch, Step(0)).total.backward()
        assert {name for name, network in networks.items() if network.a.grad is not None} == set(phase.updates)


class Pictures:
    """Stands in for encoded images."""

    def batch(self, seed: int, start: int, count: int, parts: int = 1) -> LatentBatch:
        latents = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(start))
        return LatentBatch(latents, [PROMPTS[i % len(PROMPTS)] for i in range(start, start + count)])


def make(teacher: str, folder: Path, **settings: Any) -> Trainer:
    objective = FDistill(divergence="forward_kl", critic_updates=1, bin_decay=0.9, gan_weight=0.1)
    trainer = trainer_of(load_family(teacher), objective, lora={"student": LORA}, folder=folder, **settings)
    trainer.batches.latents = Pictures()
    return trainer


def test_a_checkpoint_keeps_the_mean_ratios_and_a_run_goes_on_from_it_with_the_same_bits(
    sd_folder: str, tmp_path: Path
) -> None:
    whole = make(sd_folder, tmp_path / "whole", steps=3, checkpoint_every=1)
    whole.run()
    means = whole.cast.tensors("discriminator")["mean_ratios"]
    assert (means != 1).sum() > 1
    saved, state = whole.checkpoints.load(2)
    assert (saved["discriminator"]["mean_ratios"] != means).any()
    resumed = make(sd_folder, tmp_path / "resumed", steps=3)
    resumed.resume(saved, state)
    resumed.run()
    assert torch.equal(resumed.cast.tensors("discriminator")["mean_ratios"], means)
    ends = weights_of(whole), weights_of(resumed)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio_range": (20.0, 0.1)}, r"ratio_range must be two rising positive numbers.*got \[20\.0, 0\.1\]"),
        ({"ratio_range": (0.0, 1.0)}, "ratio_range"),
        ({"bins": 0}, "bins must be at least 1, got 0; .*normalize_ratio: false"),
        ({"gan_weight": -1.0}, "gan_weight must not be negative"),
        ({"bin_decay": 1.0}, "bin_decay must be at least 0 and below 1, got 1.0"),
    ],
)
def test_options_without_a_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(FDistill(), **options)


def test_the_batch_of_a_single_sample_is_not_weighed_at_all() -> None:
    """Documented: normalised over itself every weight is one, so a tiny batch is plain DMD2."""
    for name in DIVERGENCES:
        one = torch.tensor([7.0], dtype=torch.float64)
        weight = FDistill(divergence=name).weight(RolesWithHead({}, exact_head()), one, torch.tensor([0.5]))
        assert weight.item() == pytest.approx(1, abs=1e-5)
