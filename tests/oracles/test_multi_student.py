"""What several students can do that one of the same size cannot: a mixture whose modes are shared out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stepdistill.clusters import fit_clusters
from stepdistill.condition import Condition
from stepdistill.objectives.base import Step
from stepdistill.objectives.vsd import VSD
from tests.oracles.oracle import AT_08, Linear, Roles, batch_of, constant, gaussian, label, linear_student


MODES = torch.tensor([-4.0, -3.5, -3.0, -2.5, 2.5, 3.0, 3.5, 4.0], dtype=torch.float64)
S = 0.25
EACH = 16


def fit(modes: torch.Tensor, steps: int = 150) -> Linear:
    """One linear student of the given modes, whose number is its condition, with an exact critic."""
    torch.manual_seed(0)
    network = Linear(0.6, float(modes.mean()) + 0.5)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    half = torch.randn(EACH // 2, 1, dtype=torch.float64)
    half = half / half.square().mean().sqrt()  # with its mirror image mean 0 and variance 1 exactly
    z = torch.cat([half, -half]).repeat(len(modes), 1)
    objective = VSD(timesteps=(2,), guidance=1.0, guide_critic=False, t_min=AT_08[0], t_max=AT_08[1])
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
        critic = gaussian(constant(network.b.item()), abs(network.a.item()))
        cast = Roles({"student": linear_student(network), "teacher": gaussian(label, S), "critic": critic})
        batch = batch_of(z)
        object.__setattr__(batch, "condition", Condition({"label": modes.repeat_interleave(EACH)}))
        optimizer.zero_grad()
        objective.student_loss(cast, batch, Step(step)).total.backward()
        optimizer.step()
    return network


def divergence(network: Linear, modes: torch.Tensor) -> float:
    """KL(N(b, a^2) || N(m, s^2)), mean over the modes that the student is asked for."""
    a, b = abs(network.a.item()), network.b.item()
    terms = np.log(S / a) + (a**2 + (b - modes.numpy()) ** 2) / (2 * S**2) - 0.5
    return float(terms.mean())


def test_two_linear_students_come_closer_to_a_mixture_than_one_and_keep_to_their_modes() -> None:
    points = MODES[:, None].numpy()
    parts = fit_clusters(points, 2, seed=0).costs(points).argmin(axis=1)
    assert sorted(np.bincount(parts)) == [4, 4]
    shares = [MODES[torch.from_numpy(parts == k)] for k in range(2)]
    students = [fit(share) for share in shares]
    for student, share, other in zip(students, shares, shares[::-1], strict=True):
        # The closed form: the mean of its modes, and their width.
        assert student.b.item() == pytest.approx(float(share.mean()), abs=0.1)
        assert abs(student.a.item()) == pytest.approx(S, abs=0.05)
        samples = student.a.item() * torch.randn(1000, 1, dtype=torch.float64) + student.b.item()
        assert ((samples - share).abs().amin(1) < (samples - other).abs().amin(1)).all()
    one = divergence(fit(MODES), MODES)
    two = float(np.mean([divergence(student, share) for student, share in zip(students, shares, strict=True)]))
    assert one > 10 * two
