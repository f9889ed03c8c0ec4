"""Precision and recall against sets whose balls can be drawn by hand."""

from __future__ import annotations

import pytest
import torch

from stepdistill.bench.metrics.manifold import precision_recall


def line(*places: float) -> torch.Tensor:
    return torch.tensor(places)[:, None]


def test_equal_sets_cover_each_other() -> None:
    points = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert precision_recall(points, points) == (1.0, 1.0)


def test_sets_that_lie_far_apart_do_not_cover_each_other() -> None:
    points = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert precision_recall(points, points + 100) == (0.0, 0.0)


def test_balls_reach_to_the_kth_neighbour_of_the_own_set() -> None:
    real = line(0, 1, 2, 10)  # radii with one neighbour: 1, 1, 1, 8
    made = line(2.9, 3.1, -1.5)  # covered by the ball of 2 or of 10, by that of 10, by none
    # radii of the made ones: 0.2, 0.2, 4.4; so 0, 1, 2 are covered by -1.5's ball and 10 by none
    found = precision_recall(made, real, neighbours=1)
    assert found.precision == pytest.approx(2 / 3)
    assert found.recall == pytest.approx(3 / 4)


def test_a_collapsed_generator_is_precise_and_recalls_little() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(400, 2, generator=generator)
    made = 0.01 * torch.randn(400, 2, generator=generator)
    found = precision_recall(made, real)
    assert found.precision > 0.95
    assert found.recall < 0.05


def test_the_result_does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    real, made = torch.randn(40, 3, generator=generator), 1.3 * torch.randn(30, 3, generator=generator)
    whole = precision_recall(made, real)
    monkeypatch.setattr("stepdistill.bench.metrics.manifold.CHUNK", 7)
    assert precision_recall(made, real) == whole


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 3 samples"):
        precision_recall(torch.randn(3, 2), torch.randn(10, 2))
