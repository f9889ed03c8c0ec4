"""Every f-divergence: its weight is what its function says, and its gradient is the one of theorem 1."""

from __future__ import annotations

import math
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from stepdistill.divergences import DIVERGENCES, DivergenceName


ROOT = Path(__file__).resolve().parents[2]
# p = N(0.3, 1), q = N(-0.2, 0.85^2)
P, Q = (0.3, 1.0), (-0.2, 0.85)
# derivatives of D_f(p || q) with respect to the mean and the standard deviation of q
GRADIENTS = {
    "reverse_kl": (-0.500000, -0.326471),
    "softened_reverse_kl": (-0.236509, -0.106492),
    "jensen_shannon": (-0.263491, -0.219979),
    "squared_hellinger": (-0.139049, -0.125099),
    "forward_kl": (-0.692042, -0.858946),
    "jeffreys": (-1.192042, -1.185416),
    "neyman_chi2": (-0.990898, -0.317345),
}


def log_density(x: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
    std = torch.as_tensor(std, dtype=torch.float64)
    return -0.5 * ((x - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)


def line() -> tuple[Tensor, float]:
    """Points from -16 to 16 and their distance: the trapezoidal rule is exact here to all digits that matter."""
    return torch.linspace(-16, 16, 20_001, dtype=torch.float64), 32 / 20_000


def gradient_by_theorem_1(name: str) -> tuple[float, float]:
    """-E_q[h(r) (score_p - score_q) dx/dtheta] for x = mean + std z."""
    x, width = line()
    density = log_density(x, *Q).exp()
    ratio = (log_density(x, *P) - log_density(x, *Q)).exp()
    scores = -(x - P[0]) / P[1] ** 2 + (x - Q[0]) / Q[1] ** 2
    weighted = -density * DIVERGENCES[name].h(ratio) * scores * width
    return weighted.sum().item(), (weighted * (x - Q[0]) / Q[1]).sum().item()


def gradient_by_autograd(name: str) -> tuple[float, float]:
    """Of E_q[f(r)] as an integral over a fixed line."""
    x, width = line()
    mean, std = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in Q)
    log_q = log_density(x, mean, std)
    divergence = (log_q.exp() * DIVERGENCES[name].f((log_density(x, *P) - log_q).exp())).sum() * width
    first, second = torch.autograd.grad(divergence, (mean, std))
    return first.item(), second.item()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_weight_is_the_second_derivative_times_the_squared_ratio(name: str) -> None:
    r = torch.logspace(-2, 2, 81, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(DIVERGENCES[name].f(r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    torch.testing.assert_close(DIVERGENCES[name].h(r), second * r**2, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_is_convex_and_zero_where_the_densities_agree(name: str) -> None:
    divergence = DIVERGENCES[name]
    assert divergence.f(torch.ones(1, dtype=torch.float64)).item() == 0
    assert (divergence.h(torch.logspace(-3, 3, 61, dtype=torch.float64)) > 0).all()


@pytest.mark.parametrize("name", GRADIENTS)
def test_the_gradients_between_two_gaussians_have_the_known_values(name: str) -> None:
    assert gradient_by_theorem_1(name) == pytest.approx(GRADIENTS[name], abs=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_weighted_score_difference_is_the_gradient_of_the_divergence(name: str) -> None:
    assert gradient_by_theorem_1(name) == pytest.approx(gradient_by_autograd(name), abs=1e-8)


def test_the_jensen_shannon_weight_is_bounded_and_the_reverse_kl_has_none() -> None:
    r = torch.logspace(-3, 3, 61, dtype=torch.float64)
    assert DIVERGENCES["jensen_shannon"].h(r).max() < 1
    assert torch.equal(DIVERGENCES["reverse_kl"].h(r), torch.ones_like(r))


def test_two_divergences_are_the_sums_of_two_others() -> None:
    """Jeffreys = both KL divergences; reverse KL = its softened form + Jensen-Shannon, in function and weight."""
    r = torch.logspace(-2, 2, 41, dtype=torch.float64)
    halves = {"jeffreys": ("reverse_kl", "forward_kl"), "reverse_kl": ("softened_reverse_kl", "jensen_shannon")}
    for whole, (one, other) in halves.items():
        a, b, both = DIVERGENCES[one], DIVERGENCES[other], DIVERGENCES[whole]
        torch.testing.assert_close(both.h(r), a.h(r) + b.h(r), rtol=1e-12, atol=0)
        torch.testing.assert_close(both.f(r), a.f(r) + b.f(r), rtol=0, atol=1e-11)


def test_the_names_that_recipes_may_use_are_the_keys_of_the_table_and_on_the_page() -> None:
    assert set(get_args(DivergenceName)) == set(DIVERGENCES)
    page = (ROOT / "docs/objectives/f_distill.md").read_text()
    assert [name for name in DIVERGENCES if f"| `{name}` |" not in page] == []
