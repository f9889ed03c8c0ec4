"""Precision and recall of generated features: how much of one set lies within the other's neighbourhood.

Kynkaanniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative Models", arXiv 1904.06991.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


CHUNK = 1024  # rows of the distance matrix held at a time


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]: generated samples that look real, and real samples that the generator could have made."""

    precision: float
    recall: float


def precision_recall(made: Tensor, real: Tensor, neighbours: int = 3) -> PrecisionRecall:
    """Eq. 1 and 2: a sample is covered if it lies within the ball around any sample of the other set.

    The ball around a sample reaches to its `neighbours`-th nearest neighbour in its own set.

    Args:
        made: features of generated images, (N, D).
        real: features of real images, (M, D).
        neighbours: the paper's k.

    Raises:
        ValueError: a set has no more samples than `neighbours`.
    """
    good, met = coverage(made, real, neighbours)
    return PrecisionRecall(good.double().mean().item(), met.double().mean().item())


def coverage(made: Tensor, real: Tensor, neighbours: int = 3) -> tuple[Tensor, Tensor]:
    """Which made samples look real, (N,), and which real ones the generator could have made, (M,).

    Args and errors are those of `precision_recall`.
    """
    if min(len(made), len(real)) <= neighbours:
        raise ValueError(f"precision and recall need more than {neighbours} samples of each kind, "
                         f"got {len(made)} and {len(real)}")  # fmt: skip
    made, real = made.detach().double().cpu(), real.detach().double().cpu()
    return _covered(made, real, _radii(real, neighbours)), _covered(real, made, _radii(made, neighbours))


def _radii(samples: Tensor, neighbours: int) -> Tensor:
    """Distance of each sample, (N, D), to its k-th nearest other: (N,)."""
    # The nearest of all is the sample itself.
    chunks = torch.split(samples, CHUNK)
    return torch.cat([_distances(c, samples).kthvalue(neighbours + 1, dim=1).values for c in chunks])


def _covered(samples: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """Which of the samples (N, D) lie within any ball around the centres (M, D) of radius (M,): (N,)."""
    inside = [(_distances(chunk, centres) <= radii).any(1) for chunk in torch.split(samples, CHUNK)]
    return torch.cat(inside)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # The matrix-product form loses the zero between equal rows, and with it whether twins cover each other.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
