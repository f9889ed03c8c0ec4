"""Distances between two sets of feature vectors: Frechet (FID) and kernel (KID).

Letters: N vectors, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Mean and covariance of feature vectors that come in batches, accumulated in float64.

    Batches are merged by the pairwise update of Chan, Golub and LeVeque (1979), which does not cancel as the textbook
    sum of squares does where the mean is large against the spread.
    """

    def __init__(self, num_features: int) -> None:
        self.count = 0
        self.mean = torch.zeros(num_features, dtype=torch.float64)
        self._scatter = torch.zeros(num_features, num_features, dtype=torch.float64)

    def add(self, features: Tensor) -> Moments:
        """Takes in features (N, D) and returns itself."""
        features = features.detach().to("cpu", torch.float64)
        added = len(features)
        if not added:
            return self
        mean = features.mean(0)
        centred, shift, total = features - mean, mean - self.mean, self.count + added
        self._scatter += centred.T @ centred + torch.outer(shift, shift) * (self.count * added / total)
        self.mean += shift * (added / total)
        self.count = total
        return self

    @property
    def covariance(self) -> Tensor:
        """(D, D), divided by N - 1.

        Raises:
            ValueError: with fewer than two vectors.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors, got {self.count}")
        return self._scatter / (self.count - 1)


def frechet_distance(first: Moments, second: Moments) -> float:
    """Squared Wasserstein-2 distance between the Gaussians of two sets: the "FID" of their features."""
    return gaussian_distance(first.mean, first.covariance, second.mean, second.covariance)


def gaussian_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), by symmetric eigenvalue problems in float64.

    tr (S1 S2)^(1/2) is the sum of the roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), which is symmetric and has the
    same eigenvalues as S1 S2: no general matrix root, and so no imaginary parts to discard.

    Args:
        mean1, mean2: (D,).
        covariance1, covariance2: (D, D), symmetric and positive semidefinite up to rounding.
    """
    mean1, covariance1, mean2, covariance2 = (x.double() for x in (mean1, covariance1, mean2, covariance2))
    values, vectors = torch.linalg.eigh(covariance1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ covariance2 @ root
    roots = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt()
    distance = (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * roots.sum()
    return max(0.0, float(distance))  # rounding alone makes it negative


def kernel_distance(first: Tensor, second: Tensor, *, block: int = 1000) -> float:
    """KID: the unbiased squared maximum mean discrepancy under the kernel (x.y / D + 1)^3.

    The sets are cut into disjoint blocks of equal size, and the mean over all pairs of blocks is returned: unbiased
    like the mean over random subsets that is usual, and without a draw of its own. Unlike FID it does not grow when
    there are few images; it may be slightly negative.

    Args:
        first, second: features (N1, D), (N2, D), at least two each.
        block: vectors per block, at most.
    """
    # Deferred: torchmetrics takes seconds to import.
    from torchmetrics.image.kid import poly_mmd

    size = min(block, len(first), len(second))
    if size < 2:
        raise ValueError(f"a kernel distance needs at least 2 vectors in each set, got {len(first)} and {len(second)}")
    blocks1, blocks2 = (
        [features[i : i + size].detach().cpu().double() for i in range(0, len(features) - size + 1, size)]
        for features in (first, second)
    )
    values = [float(poly_mmd(a, b)) for a in blocks1 for b in blocks2]
    return sum(values) / len(values)
