"""Density ratios of real to generated samples, read from a discriminator, and their normalisation over a batch.

Limits, bins and the small constant are those of f-distill (arXiv 2502.15681) as NVlabs/FastGen has them. Letters:
B batch, L features that have a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed
from torch.nn.functional import one_hot

from stepdistill.discriminator import Discriminator
from stepdistill.objectives.base import FeatureShape


TINY = 1e-6  # in the denominators of both normalisations


class RatioDiscriminator(Discriminator):
    """A discriminator that remembers the mean density ratio at every bin of noise levels.

    Attributes:
        mean_ratios: (bins,), a buffer, so that checkpoints keep it; equal on all processes.
    """

    mean_ratios: Tensor

    def __init__(self, shapes: Sequence[FeatureShape], bins: int) -> None:
        super().__init__(shapes)
        self.register_buffer("mean_ratios", torch.ones(bins))

    @torch.no_grad()
    def normalize(self, ratio: Tensor, place: Tensor, decay: float) -> Tensor:
        """Ratios over the mean ratio at their noise levels, which learns from them first; (B,).

        Args:
            ratio: (B,).
            place: of the noise levels between the lowest, 0, and the highest, 1, (B,).
            decay: how much of its old mean a bin keeps; a bin without samples keeps all of it.
        """
        bins = len(self.mean_ratios)
        index = (place.clamp(0, 1) * bins).long().clamp(max=bins - 1)
        members = one_hot(index, bins).to(ratio.dtype)
        sums, counts = over_processes(torch.stack([(members * ratio[:, None]).sum(0), members.sum(0)]))
        means = decay * self.mean_ratios + (1 - decay) * sums / counts.clamp(min=1)
        self.mean_ratios.copy_(torch.where(counts > 0, means, self.mean_ratios))
        return ratio / (self.mean_ratios[index] + TINY)


def density_ratio(logits: Tensor, limit: float, bounds: tuple[float, float]) -> Tensor:
    """Logits, (B, L) => r = p_real / p_generated, (B,), at least float32.

    An optimal discriminator's logit is log r (Goodfellow et al. 2014, proposition 1). The heads' logits are averaged
    and clamped to plus and minus `limit`, then the ratio is clipped to `bounds`.
    """
    logit = logits.to(torch.promote_types(logits.dtype, torch.float32)).mean(1)
    return logit.clamp(-limit, limit).exp().clamp(*bounds)


def over_mean(weight: Tensor) -> Tensor:
    """Weights, (B,), over their mean over the batches of all processes: their mean becomes 1 whatever made them."""
    sums = over_processes(torch.stack([weight.sum(), torch.ones_like(weight).sum()]))
    return weight / (sums[0] / sums[1] + TINY)


def over_processes(values: Tensor) -> Tensor:
    """The sum of every element over all processes."""
    if distributed.is_available() and distributed.is_initialized():
        values = values.clone()
        distributed.all_reduce(values)
    return values
