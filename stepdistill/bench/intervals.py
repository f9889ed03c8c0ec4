"""Bootstrap intervals: how much a figure would change with other prompts.

Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapters 6 and 13. What is drawn again is the prompts,
each with all its images, since the images of one prompt are not independent; reference images stay as they are.

Letters: R resamples, P prompts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


RESAMPLES = 200  # a standard error from 200 resamples is itself known to 5 % (ibid., section 6.4)
QUANTILE = 1.96  # of the normal distribution, for 95 %


@dataclass(frozen=True)
class Estimate:
    """A figure, None where it does not apply, and its 95 % interval, where it has one.

    `why`: what was wanted for a figure that was asked for and could not be computed.
    """

    value: float | None
    interval: tuple[float, float] | None = None
    why: str | None = None


@dataclass(frozen=True)
class Resamples:
    """How often each resample has drawn each prompt.

    Args:
        prompts: P.
        count: R.
        seed: of the draw.
    """

    prompts: int
    count: int = RESAMPLES
    seed: int = 0

    @cached_property
    def weights(self) -> Tensor:
        """(R, P), rows that add up to P."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randint(self.prompts, (self.count, self.prompts), generator=generator)
        weights = torch.zeros(self.count, self.prompts, dtype=torch.float64)
        return weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))

    def mean(self, values: Tensor, *, within: tuple[float, float] | None = None) -> Estimate:
        """The mean of values (P, K) or (P,): for each image, or for each prompt.

        Args:
            values: any floating type.
            within: what the figure cannot leave, nor its interval.
        """
        each = values.double().reshape(self.prompts, -1).mean(1)
        return self.spread(float(each.mean()), self.weights @ each / self.prompts, within)

    def ratio(self, above: Tensor, below: Tensor, *, within: tuple[float, float] | None = None) -> Estimate:
        """sum(above) / sum(below) of values (P,); no value where nothing is below."""
        above, below = above.double(), below.double()
        if not below.sum() > 0:
            return Estimate(None)
        drawn = self.weights @ below
        kept = drawn > 0
        return self.spread(float(above.sum() / below.sum()), (self.weights @ above)[kept] / drawn[kept], within)

    def spread(self, value: float, resampled: Tensor, within: tuple[float, float] | None = None) -> Estimate:
        """As the function of this name; no interval of one prompt, which every resample draws."""
        return spread(value, resampled, within) if self.prompts > 1 else Estimate(value)


def spread(value: float, resampled: Tensor, within: tuple[float, float] | None = None) -> Estimate:
    """The value with value +- 1.96 standard deviations of what the resamples gave, (R,).

    Percentiles of the resamples would not do: a Frechet distance is larger on every resample, which has fewer
    different images, and they would leave out the value itself.
    """
    reach = QUANTILE * float(resampled.std()) if len(resampled) > 1 else 0.0
    low, high = value - reach, value + reach
    if within is not None:
        low, high = max(low, within[0]), min(high, within[1])
    return Estimate(value, (low, high))


def groups_of(prompts: int, at_most: int) -> Sequence[range]:
    """Prompts 0..P as up to `at_most` runs of nearly equal length: units that are cheaper to draw than prompts."""
    count = min(prompts, at_most)
    edges = [round(i * prompts / count) for i in range(count + 1)]
    return [range(a, b) for a, b in itertools.pairwise(edges)]
