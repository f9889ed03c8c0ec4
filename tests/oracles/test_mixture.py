"""The whole game on a two-dimensional mixture: small networks, an analytic teacher, the real trainer's phases."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepdistill.condition import Condition
from stepdistill.denoiser import Denoiser, OwnWeights
from stepdistill.objectives.base import Batch, Step
from stepdistill.objectives.dmd2 import DMD2
from stepdistill.objectives.esd import ESD
from stepdistill.objectives.f_distill import FDistill
from stepdistill.objectives.sid import SiD
from stepdistill.objectives.vsd import VSD
from stepdistill.prediction import add_noise
from stepdistill.ratios import RatioDiscriminator
from stepdistill.sampling import stochastic
from stepdistill.schedule import from_scheduler_config
from stepdistill.times import grid, uniform_times
from tests.oracles.oracle import Roles, mixture


SD = {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULE, _ = from_scheduler_config(SD)
WEIGHTS = torch.tensor([0.4, 0.3, 0.2, 0.1])
MEANS = torch.tensor([[1.5, 1.5], [-1.5, 1.5], [-1.5, -1.5], [1.5, -1.5]])
STD = 0.4


class Network(nn.Module):
    """(x, time) => x0, a small perceptron with Fourier features of the time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 + 8, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 2))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        angles = (time.to(x.dtype) / 1000)[:, None] * torch.tensor([1.0, 3.0, 9.0, 27.0])
        return self.layers(torch.cat([x, angles.sin(), angles.cos()], 1))


def view(network: Network) -> Denoiser:
    return Denoiser(lambda net, x, time, condition: net(x, time), OwnWeights(network), SCHEDULE, "sample")


def draw(count: int) -> Tensor:
    return MEANS[torch.multinomial(WEIGHTS, count, replacement=True)] + STD * torch.randn(count, 2)


def energy_distance(a: Tensor, b: Tensor) -> float:
    return (2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()).item()


def batch(count: int, latents: Tensor | None = None) -> Batch:
    nothing = Condition({"none": torch.zeros(count, 1)})
    return Batch(nothing, nothing, (2,), torch.device("cpu"), latents)


def pretrained() -> Network:
    """A network that denoises the mixture: where student and critic start."""
    network = Network()
    denoiser = view(network)
    network.requires_grad_(True)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(400):
        x0 = draw(256)
        t = uniform_times(SCHEDULE, 256, low=0.0, high=1.0, device=torch.device("cpu"))
        loss = (denoiser(add_noise(SCHEDULE, x0, t, torch.randn_like(x0)), t, batch(256).condition).x0 - x0).square()
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    return network


class Judging(Roles):
    """Denoisers, and a discriminator on the critic's last but one layer."""

    def __init__(self, denoisers: Mapping[str, Denoiser], discriminator: nn.Module) -> None:
        super().__init__(denoisers)
        self.module = discriminator

    def head(self, role: str) -> Judging:
        assert role == "discriminator"
        return self

    def __call__(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        (feature,) = denoiser.features(x_t, t, condition, ("layers.3",))
        logits: Tensor = self.module([feature[:, None]])
        return logits


def play(objective: Any, steps: int) -> tuple[Denoiser, Denoiser]:
    start = pretrained()
    networks: dict[str, nn.Module] = {name: copy.deepcopy(start) for name in ("student", "critic")}
    views = {name: view(network) for name, network in networks.items()}
    with torch.random.fork_rng(devices=[]):  # games without one draw what they would without it
        networks["discriminator"] = RatioDiscriminator([(1, 96)], bins=10)
    roles = Judging({**views, "teacher": mixture(WEIGHTS, MEANS, STD, SCHEDULE)}, networks["discriminator"])
    optimizers = {name: torch.optim.Adam(n.parameters(), lr=1e-3, betas=(0.5, 0.99)) for name, n in networks.items()}
    for step in range(steps):
        for group in (g for o in optimizers.values() for g in o.param_groups):
            group["lr"] = 2e-3 * (1 - 0.95 * step / steps)
        for phase in objective.phases(step):
            for turn in range(phase.repeats):
                for name, network in networks.items():
                    network.requires_grad_(name in phase.updates)
                    optimizers[name].zero_grad()
                given = batch(256, draw(256) if phase.stream == "images" else None)
                phase.loss(roles, given, Step(step, turn=turn)).total.backward()
                for role in phase.updates:
                    optimizers[role].step()
    return roles.denoiser("student"), roles.denoiser("critic")


@torch.no_grad()
def sample(student: Denoiser, timesteps: tuple[int, ...], count: int = 4000) -> Tensor:
    noise = torch.randn(count, 2)
    return stochastic(student, noise, grid(SCHEDULE, timesteps, noise.device), batch(count).condition)


def shares(samples: Tensor) -> Tensor:
    """Share of the samples nearest to each mode."""
    return torch.bincount(torch.cdist(samples, MEANS).argmin(1), minlength=4) / len(samples)


def check(objective: Any, steps: int, limit: float) -> None:
    """The student's samples are at most `limit` times as far from true ones as true ones are from each other."""
    torch.manual_seed(0)
    student, _ = play(objective, steps)
    made, true = sample(student, objective.timesteps), draw(4000)
    start = energy_distance(sample(view(pretrained()), objective.timesteps), true)
    between_true = sum(energy_distance(draw(4000), draw(4000)) for _ in range(6)) / 6  # about 0.0012
    reached = energy_distance(made, true)
    print(f"energy distance: start {start:.4f}, reached {reached:.4f} = {reached / between_true:.1f} of true draws, "
          f"shares {shares(made).tolist()}")  # fmt: skip
    assert reached < limit * between_true
    assert reached < 0.1 * start
    assert (shares(made) - WEIGHTS).abs().max() < 0.05


def test_a_student_learns_all_modes_with_their_weights() -> None:
    check(DMD2(guidance=1.0, critic_updates=3), 500, 25)


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective",
    [
        ESD(guidance=1.0, critic_updates=3),
        FDistill(guidance=1.0, critic_updates=3),
        SiD(guidance=1.0, critic_updates=3, timesteps=(999,), sampler="stochastic"),
    ],
    ids=["esd", "f_distill", "sid"],
)
def test_students_of_other_divergences_learn_them_too(objective: Any) -> None:
    check(objective, 500, 25)


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective",
    [
        DMD2(guidance=1.0, critic_updates=3),
        VSD(guidance=1.0, critic_updates=3),
        DMD2(guidance=1.0, critic_updates=3, timesteps=(999, 499)),
    ],
    ids=["dmd2", "vsd", "dmd2-2-steps"],
)
def test_a_longer_game_comes_closer(objective: Any) -> None:
    check(objective, 2500, 12)
