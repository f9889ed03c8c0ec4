"""Distances between two sets of feature vectors: Frechet (FID) and kernel (KID).

Letters: N vectors, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

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

    @classmethod
    def of(cls, count: int, mean: Tensor, covariance: Tensor) -> Moments:
        """Those of a file of statistics: number of vectors, (D,), (D, D)."""
        moments = cls(len(mean))
        moments.count, moments.mean = count, mean.double()
        moments._scatter = covariance.double() * (count - 1)
        return moments

    @classmethod
    def mixed(cls, parts: Sequence[Moments], weights: Tensor) -> Moments:
        """Those of a set in which all vectors of part i occur weights[i] times, (G,) whole numbers."""
        counts = weights.double() * torch.tensor([part.count for part in parts], dtype=torch.float64)
        mean = sum((c * part.mean for c, part in zip(counts, parts, strict=True)), torch.zeros(())) / counts.sum()
        moments = cls(len(mean))
        moments.count, moments.mean = int(counts.sum()), mean
        for weight, count, part in zip(weights.double(), counts, parts, strict=True):
            if weight:
                shift = part.mean - mean
                moments._scatter += weight * part._scatter + count * torch.outer(shift, shift)
        return moments

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
    return _distance(mean1, covariance1, _root(covariance1), mean2, covariance2)


def resampled_frechet(groups: Sequence[Moments], reference: Moments, count: int, seed: int = 0) -> Tensor:
    """The distance for `count` draws, with replacement, of as many groups of made images as there are: (count,).

    Args:
        groups: the made images in parts, which is what is drawn: a draw then costs a sum of matrices, not of images.
        reference: stays as it is.
        count: of draws.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    mean, covariance = reference.mean, reference.covariance
    root = _root(covariance)
    distances = []
    for drawn in torch.randint(len(groups), (count, len(groups)), generator=generator):
        mixed = Moments.mixed(groups, torch.bincount(drawn, minlength=len(groups)))
        distances.append(_distance(mean, covariance, root, mixed.mean, mixed.covariance))
    return torch.tensor(distances, dtype=torch.float64)


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def _distance(mean1: Tensor, covariance1: Tensor, root1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    product = root1 @ covariance2 @ root1
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


def kernel_influence(first: Tensor, second: Tensor, *, block: int = 1000) -> Tensor:
    """What each vector of the first set adds to the kernel distance, to first order: (N1,).

    That is the projection of the U-statistic (Hoeffding 1948), 2 (mean k(x_i, x_j) - mean k(x_i, y_j)): its mean over
    resampled vectors varies as the distance does, and needs no kernel between a vector and its own copies.

    Args:
        first, second: features (N1, D), (N2, D), at least two each.
        block: each block of the first set is compared with as many vectors of the second.
    """
    parts, dims = [], first.shape[1]
    for start in range(0, len(first), block):
        x = first[start : start + block].detach().cpu().double()
        others = first[:block].detach().cpu().double() if len(x) < 2 else x
        y = second.roll(-start, 0)[:block].detach().cpu().double()
        inner, outer = ((x @ z.T / dims + 1) ** 3 for z in (others, y))
        own = inner.diagonal() if others is x else torch.zeros(len(x), dtype=torch.float64)
        parts.append(2 * ((inner.sum(1) - own) / max(1, len(others) - 1) - outer.mean(1)))
    return torch.cat(parts)
