"""The f-divergences between teacher and student, as data: what each one measures and how it weighs a sample.

With the densities p of the teacher and q of the student at one noise level, and their ratio r = p / q,

    D_f(p || q) = E_q[f(r)]     with f convex and f(1) = 0,
    gradient    = -E_q[h(r) (score_p - score_q) dx_t/dtheta]     with h(r) = f''(r) r^2.

So every divergence is the reverse KL's gradient, which is distribution matching as in DMD, times a weight h(r) >= 0.
Xu, Nie and Vahdat 2025, "One-step Diffusion Models with f-Divergence Distribution Matching", arXiv 2502.15681,
theorem 1 and table 1. Ratios, values and weights have one shape, that of a batch, (B,); ratios are positive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor


DivergenceName = Literal[
    "reverse_kl", "softened_reverse_kl", "jensen_shannon", "squared_hellinger",
    "forward_kl", "jeffreys", "neyman_chi2", "pearson_chi2",
]  # fmt: skip


@dataclass(frozen=True)
class Divergence:
    """One f-divergence.

    Attributes:
        f: ratios => the convex function's values.
        h: ratios => weights of the matching direction, f''(r) r^2 with all its constant factors.
        behaviour: what it makes of modes that the student misses.
    """

    f: Callable[[Tensor], Tensor]
    h: Callable[[Tensor], Tensor]
    behaviour: str


def reverse_kl(r: Tensor) -> Tensor:
    """KL(q || p), the divergence of DMD: every sample counts the same."""
    return -r.log()


def softened_reverse_kl(r: Tensor) -> Tensor:
    """(r + 1) log((r + 1) / 2r): what the non-saturating GAN loss descends with an optimal discriminator."""
    return (r + 1) * (0.5 + 0.5 / r).log()


def jensen_shannon(r: Tensor) -> Tensor:
    """Twice the Jensen-Shannon divergence, whose weight stays between 0 and 1."""
    return r * r.log() - (r + 1) * (0.5 * (r + 1)).log()


def squared_hellinger(r: Tensor) -> Tensor:
    """1 - sqrt(r), between the two KL divergences."""
    return 1 - r.sqrt()


def forward_kl(r: Tensor) -> Tensor:
    """KL(p || q): samples where the teacher is denser count more, in proportion."""
    return r * r.log()


def jeffreys(r: Tensor) -> Tensor:
    """The sum of both KL divergences."""
    return (r - 1) * r.log()


def neyman_chi2(r: Tensor) -> Tensor:
    """(1 - r)^2 / r: samples where the teacher is thin count more."""
    return (1 - r).square() / r


def pearson_chi2(r: Tensor) -> Tensor:
    """(r - 1)^2, for completeness.

    Warning: do not train with it. Its weight 2 r^2 has such heavy tails that a few samples, those with the most wrong
    ratio, make up the whole gradient; clipping the ratio at 20 still leaves weights between 0.02 and 800.
    """
    return (r - 1).square()


DIVERGENCES: Mapping[DivergenceName, Divergence] = MappingProxyType({
    "reverse_kl": Divergence(reverse_kl, torch.ones_like, "mode-seeking"),
    "softened_reverse_kl": Divergence(softened_reverse_kl, lambda r: 1 / (r + 1), "mode-seeking"),
    "jensen_shannon": Divergence(jensen_shannon, lambda r: r / (r + 1), "in between, bounded"),
    "squared_hellinger": Divergence(squared_hellinger, lambda r: 0.25 * r.sqrt(), "in between"),
    "forward_kl": Divergence(forward_kl, lambda r: r, "mode-covering"),
    "jeffreys": Divergence(jeffreys, lambda r: r + 1, "seeks and covers"),
    "neyman_chi2": Divergence(neyman_chi2, lambda r: 2 / r, "mode-seeking, more than the reverse KL"),
    "pearson_chi2": Divergence(pearson_chi2, lambda r: 2 * r.square(), "mode-covering, unstable"),
})  # fmt: skip
