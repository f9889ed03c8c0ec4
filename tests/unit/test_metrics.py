"""Frechet and kernel distances against closed forms and SciPy; CLIP scores against cosines by hand."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from stepdistill.bench.metrics.clip_score import ClipEvaluator, clip_scores
from stepdistill.bench.metrics.frechet import Moments, frechet_distance, gaussian_distance, kernel_distance
from stepdistill.errors import UserError


DIM = 12


def draw(count: int, *, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    return shift + scale * torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_covariance(seed: int) -> torch.Tensor:
    factor = draw(DIM, seed=seed)
    return factor @ factor.T / DIM + 0.1 * torch.eye(DIM, dtype=torch.float64)


def test_moments_of_batches_are_those_of_the_whole() -> None:
    features = draw(1000, seed=0, shift=1000.0)  # far from zero, where a sum of squares would cancel
    moments = Moments(DIM)
    for part in features.split(137):
        moments.add(part)
    assert moments.count == 1000
    torch.testing.assert_close(moments.mean, features.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.covariance, torch.cov(features.T), rtol=1e-9, atol=1e-11)


def test_a_covariance_of_one_vector_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        _ = Moments(DIM).add(draw(1, seed=0)).covariance


def test_shifted_gaussians_are_apart_by_the_squared_shift() -> None:
    eye, zero = torch.eye(DIM), torch.zeros(DIM)
    assert gaussian_distance(zero, eye, zero + 0.5, eye) == pytest.approx(0.25 * DIM, rel=1e-10)


def test_scaled_gaussians_are_apart_by_the_squared_difference_of_scales() -> None:
    eye, zero = torch.eye(DIM), torch.zeros(DIM)
    assert gaussian_distance(zero, eye, zero, 9 * eye) == pytest.approx(DIM * (1 - 3) ** 2, rel=1e-10)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_distance_agrees_with_the_matrix_root_of_scipy(seed: int) -> None:
    mean1, mean2 = draw(2, seed=seed)
    cov1, cov2 = random_covariance(seed + 10), random_covariance(seed + 20)
    root = np.real(scipy.linalg.sqrtm((cov1 @ cov2).numpy()))
    expected = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * np.trace(root)
    assert gaussian_distance(mean1, cov1, mean2, cov2) == pytest.approx(expected.item(), rel=1e-9)


def test_singular_covariances_give_a_finite_symmetric_distance() -> None:
    few, many = Moments(DIM).add(draw(5, seed=1)), Moments(DIM).add(draw(500, seed=2))
    assert frechet_distance(few, many) == pytest.approx(frechet_distance(many, few), rel=1e-6)
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)


def test_the_distance_grows_with_noise() -> None:
    real = Moments(DIM).add(draw(2000, seed=1))
    distances = [frechet_distance(real, Moments(DIM).add(draw(2000, seed=2, scale=s))) for s in (1.0, 1.2, 1.5, 2.0)]
    assert distances == sorted(distances)
    assert distances[0] < 0.1 < distances[1]


def test_kernel_distance_equals_a_direct_evaluation() -> None:
    x, y = draw(40, seed=1), draw(40, seed=2, shift=0.3)
    kxx, kyy, kxy = ((a @ b.T / DIM + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    off = ~torch.eye(40, dtype=torch.bool)
    expected = kxx[off].mean() + kyy[off].mean() - 2 * kxy.mean()
    assert kernel_distance(x, y) == pytest.approx(expected.item(), rel=1e-9)


def test_kernel_distance_is_unbiased_where_the_frechet_distance_is_not() -> None:
    x, y = draw(64, seed=1), draw(2048, seed=2)
    far = draw(64, seed=3, shift=0.5)
    assert abs(kernel_distance(x, y)) < 0.1 * kernel_distance(far, y)
    with pytest.raises(ValueError, match="at least 2"):
        kernel_distance(x[:1], y)


def test_clip_scores_are_cosines_in_percent_and_never_negative() -> None:
    image = torch.tensor([[2.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    text = torch.tensor([[5.0, 0.0], [3.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(clip_scores(image, text), torch.tensor([100.0, 50 * 2**0.5, 0.0]))


def test_a_missing_evaluator_is_a_clear_error() -> None:
    with pytest.raises(UserError, match="no/such/clip"):
        ClipEvaluator("no/such/clip")


def test_a_folder_that_is_no_clip_model_is_a_clear_error(tmp_path) -> None:
    with pytest.raises(UserError, match="cannot be loaded as a CLIPModel"):
        ClipEvaluator(tmp_path)
