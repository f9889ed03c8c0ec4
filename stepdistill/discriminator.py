"""Discriminators on a denoiser's features: small heads, the games they play, and their regulariser.

Letters: B batch, C channels, H height, W width, N tokens, L layers that give features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from stepdistill.objectives.base import FeatureShape


Game = Literal["non_saturating", "hinge", "least_squares", "relativistic"]


class MapHead(nn.Module):
    """(B, C, H, W) => one logit, (B, 1): halves the map until 4 x 4 are left, then one convolution over all of them.

    At 8 x 8 and 32 x 32 these are the heads of DMD2's code (arXiv 2405.14867) for SD1.5 and SDXL. On a larger map than
    it was built for, the head looks at every place and averages.
    """

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        while side > 4:
            layers += [nn.Conv2d(channels, channels, 4, 2, 1), nn.GroupNorm(groups(channels), channels), nn.SiLU()]
            side = (side - 2) // 2 + 1
        layers += [nn.Conv2d(channels, channels, side), nn.GroupNorm(groups(channels), channels), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))

    def forward(self, feature: Tensor) -> Tensor:
        logits: Tensor = self.layers(feature)
        return logits.flatten(1).mean(1, keepdim=True)


class TokenHead(nn.Module):
    """(B, N, C) => one logit, (B, 1): a layer on every token, mean and deviation over the tokens, then a perceptron.

    The deviation sees what differs between places, and what follows it sees the sample as a whole. A perceptron on
    every token with averaged logits, which judges places one by one, is next to blind where tokens are few: of the 16
    of the bundled flow teacher's last block it told real latents from a student's in 68 % of cases, this one in 96 %.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.token = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, channels))
        self.sample = nn.Sequential(nn.SiLU(), nn.Linear(2 * channels, channels), nn.SiLU(), nn.Linear(channels, 1))

    def forward(self, feature: Tensor) -> Tensor:
        said = self.token(feature)
        # The deviation of a single token is 0, where a root has no slope.
        deviation = (said.var(1, correction=0) + 1e-5).sqrt()
        logit: Tensor = self.sample(torch.cat([said.mean(1), deviation], dim=1))
        return logit


class Discriminator(nn.Module):
    """One head per feature: list of L features => logits, (B, L)."""

    def __init__(self, shapes: Sequence[FeatureShape]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            MapHead(shape[0], min(shape[1:])) if len(shape) == 3 else TokenHead(shape[-1]) for shape in shapes
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return torch.cat([head(feature) for head, feature in zip(self.heads, features, strict=True)], dim=1)


class ChannelMean(nn.Module):
    """List of L features => the mean over the channels of each place, one logit per place, (B, places); no parameters.

    SiDa (arXiv 2505.12674) and the code of SiD for transformers (arXiv 2509.25127), which limits the logits to 10.
    """

    def __init__(self, shapes: Sequence[FeatureShape]) -> None:
        super().__init__()
        # (C, H, W) of a map, (N, C) of tokens: where the channels are in a batch of them
        self._channels = tuple(1 if len(shape) == 3 else 2 for shape in shapes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        logits = [f.mean(axis).flatten(1) for f, axis in zip(features, self._channels, strict=True)]
        return torch.cat(logits, dim=1).clamp(-10, 10)


def groups(channels: int, wanted: int = 32, smallest: int = 4) -> int:
    """How many groups a normalisation of few channels can have: a part of `wanted`, each with `smallest` channels.

    Behind the last convolution a group holds one number per channel, and a number that is normalised by itself is 0
    whatever the network saw: with a channel a group, the logit would be a constant.
    """
    count = math.gcd(channels, wanted)
    while count > 1 and channels // count < smallest:
        count //= 2
    return count


def discriminator_loss(real: Tensor, fake: Tensor, game: Game) -> Tensor:
    """What the discriminator minimises: logits on real and on generated samples => scalar.

    Non-saturating logistic: Goodfellow et al. 2014, section 3; hinge: Miyato et al. 2018 (arXiv 1802.05957), eq. 16
    and 17; least squares: Mao et al. 2017 (arXiv 1611.04076), eq. 2 with the labels -1 and 1, the generator aiming at
    1; relativistic: Jolicoeur-Martineau 2019 (arXiv 1807.00734), with each real sample paired with the generated one
    of its row.
    """
    if game == "relativistic":
        return softplus(fake - real).mean()
    losses: dict[str, Callable[[], Tensor]] = {
        "non_saturating": lambda: softplus(fake).mean() + softplus(-real).mean(),
        "hinge": lambda: (1 + fake).relu().mean() + (1 - real).relu().mean(),
        "least_squares": lambda: 0.5 * (fake + 1).square().mean() + 0.5 * (real - 1).square().mean(),
    }
    return losses[game]()


def generator_loss(fake: Tensor, game: Game, real: Tensor | None = None) -> Tensor:
    """What the generator minimises: its samples' logits (and the real ones', for the relativistic game) => scalar."""
    if game == "relativistic":
        if real is None:
            raise ValueError("the relativistic game compares with real samples")
        return softplus(real - fake).mean()
    losses: dict[str, Callable[[], Tensor]] = {
        "non_saturating": lambda: softplus(-fake).mean(),
        "hinge": lambda: -fake.mean(),
        "least_squares": lambda: 0.5 * (fake - 1).square().mean(),
    }
    return losses[game]()
