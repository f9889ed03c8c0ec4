"""The four distances of consistency losses, on two pixels by hand."""

from __future__ import annotations

import math

import pytest
import torch

from stepdistill.errors import UserError
from stepdistill.losses import Distance, distance
from tests.unit.test_losses import pixels


P, Y = pixels((3.0, 0.0), (1.0, 1.0)), pixels((0.0, 4.0), (1.0, 1.0))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("mse", (9 + 16) / 2),
        ("l2", 5.0),
        ("huber", (math.sqrt(9 + 0.25) + math.sqrt(16 + 0.25)) / 2 - 0.5),
        ("sample_huber", math.sqrt(25 + 0.25) - 0.5),
    ],
)
def test_the_four_distances_of_two_pixels_are_four_different_numbers(kind: Distance, expected: float) -> None:
    found = distance(kind, P, Y, 0.5)
    assert found.shape == (2,)
    assert found[0].item() == pytest.approx(expected, rel=1e-12)
    assert found[1].item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("kind", "slope"),
    [("mse", (3.0, -4.0)), ("l2", (0.6, -0.8)), ("huber", (3 / 2 / math.sqrt(9.25), -4 / 2 / math.sqrt(16.25)))],
)
def test_the_slope_of_a_distance_is_the_one_done_by_hand(kind: Distance, slope: tuple[float, float]) -> None:
    p = P.clone().requires_grad_(True)
    distance(kind, p, Y, 0.5).sum().backward()
    assert p.grad is not None
    assert p.grad[0].flatten().tolist() == pytest.approx(slope, rel=1e-12)
    assert torch.equal(p.grad[1], torch.zeros_like(p.grad[1])), "equal samples pull nowhere, and are not NaN"


def test_a_huber_of_constant_zero_is_refused_since_its_slope_is_undefined_at_the_target() -> None:
    with pytest.raises(UserError, match="l2 is the limit"):
        distance("sample_huber", P, Y, 0.0)
