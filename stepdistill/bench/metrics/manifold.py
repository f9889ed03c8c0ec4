"""Precision and recall of generated features: how much of one set lies within the other's neighbourhood.

Kynkaanniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative Models", arXiv 1904.06991.

Letters: N made samples, M real ones, D features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


CHUNK = 1024  # rows of the distance matrix held at a time
EPSILON = torch.finfo(torch.float64).eps


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]: generated samples that look real, and real samples that the generator could have made."""

    precision: float
    recall: float


def precision_recall(made: Tensor, real: Tensor, neighbours: int = 3, *, device: str = "cpu") -> PrecisionRecall:
    """Eq. 1 and 2: a sample is covered if it lies within the ball around any sample of the other set.

    The ball around a sample reaches to its `neighbours`-th nearest neighbour in its own set.

    Args:
        made: features of generated images, (N, D).
        real: features of real images, (M, D).
        neighbours: the paper's k.
        device: where distances are computed.

    Raises:
        ValueError: a set has no more samples than `neighbours`.
    """
    good, met = coverage(made, real, neighbours, device=device)
    return PrecisionRecall(good.double().mean().item(), met.double().mean().item())


def coverage(made: Tensor, real: Tensor, neighbours: int = 3, *, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Which made samples look real, (N,), and which real ones the generator could have made, (M,).

    Squared distances are matrix products in float64 of features around their common mean. Rounding moves one by at
    most (2 D + 4) 2^-52 times the largest squared distance to that mean. Samples within four times that of the edge of
    a ball count as inside, as do twins of its centre where the ball has no extent; all others are where a search by
    differences has them.

    Args and errors are those of `precision_recall`.
    """
    if min(len(made), len(real)) <= neighbours:
        raise ValueError(f"precision and recall need more than {neighbours} samples of each kind, "
                         f"got {len(made)} and {len(real)}")  # fmt: skip
    place = "cpu" if device.startswith("mps") else device  # which has no float64
    made, real = made.detach().to(place, torch.float64), real.detach().to(place, torch.float64)
    mean = (made.mean(0) + real.mean(0)) / 2
    made, real = made - mean, real - mean
    longest = max(float(samples.square().sum(1).max()) for samples in (made, real))
    slack = 2 * (2 * made.shape[1] + 4) * EPSILON * longest  # for a distance and for a radius
    good = _covered(made, real, _squared_radii(real, neighbours) + slack)
    met = _covered(real, made, _squared_radii(made, neighbours) + slack)
    return good.cpu(), met.cpu()


def equally_many(made: Tensor, real: Tensor, images_per_prompt: int) -> tuple[Tensor, Tensor]:
    """The first of both sets, as many of each, by whole prompts: both shares depend on the sizes of both sets.

    Args:
        made: (N, D), prompt by prompt.
        real: (M, D).
        images_per_prompt: K.
    """
    count = min(len(made), len(real)) // images_per_prompt * images_per_prompt
    return made[:count], real[:count]


def _squared_radii(samples: Tensor, neighbours: int) -> Tensor:
    """Squared distance of each sample, (N, D), to its k-th nearest other: (N,)."""
    # The nearest of all is the sample itself.
    chunks = torch.split(samples, CHUNK)
    return torch.cat([_squared(c, samples).kthvalue(neighbours + 1, dim=1).values for c in chunks])


def _covered(samples: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """Which of the samples (N, D) lie within any ball around the centres (M, D) of squared radius (M,): (N,)."""
    inside = [(_squared(chunk, centres) <= radii).any(1) for chunk in torch.split(samples, CHUNK)]
    return torch.cat(inside)


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|^2 of all pairs of (N, D) and (M, D), up to rounding: (N, M)."""
    return torch.addmm(a.square().sum(1)[:, None] + b.square().sum(1), a, b.T, alpha=-2)
