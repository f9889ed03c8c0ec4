"""Heads on a frozen image network's features, conditioned by projection: the discriminator of ADD.

Letters: B images, K heads, N tokens, C their width, E length of what the heads are conditioned on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from stepdistill.clip_model import ImageTextModel, tower_sizes
from stepdistill.errors import UserError
from stepdistill.objectives.base import FeatureShape


HEADS = 5  # of StyleGAN-T (arXiv 2301.09515), whose discriminator ADD takes; evenly spaced over the layers


class ProjectionHead(nn.Module):
    """Tokens (B, N, C) and a condition (B, E) => one logit, (B, 1).

    Miyato and Koyama 2018 (arXiv 1802.05637), eq. 4: a part that asks whether the image is real, and an inner product
    with the condition that asks whether it is the right one.
    """

    def __init__(self, width: int, condition: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU())
        self.real = nn.Linear(width, 1)
        self.project = nn.Linear(condition, width, bias=False)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        seen = self.layers(tokens).mean(1)  # (B, C)
        fits = (seen * self.project(condition)).sum(1, keepdim=True) / math.sqrt(seen.shape[1])
        logit: Tensor = self.real(seen) + fits
        return logit


class VisionDiscriminator(nn.Module):
    """One head per layer of the image network: K tokens (B, N, C) and a condition (B, E) => logits, (B, K)."""

    def __init__(self, heads: int, width: int, condition: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(ProjectionHead(width, condition) for _ in range(heads))

    def forward(self, tokens: Sequence[Tensor], condition: Tensor) -> Tensor:
        return torch.cat([head(seen, condition) for head, seen in zip(self.heads, tokens, strict=True)], dim=1)


def tower_layers(model: str, layers: Sequence[int]) -> tuple[int, ...]:
    """Behind which layers of a CLIP folder's image tower the heads sit: the given ones, or up to five evenly spaced.

    Raises:
        UserError: the tower has no such layer.
    """
    count = tower_sizes(model).layers
    wrong = [layer for layer in layers if not 1 <= layer <= count]
    if wrong:
        raise UserError(f"layers: the image tower of {model} has the layers 1 to {count}, and not {wrong[0]}")
    heads = min(HEADS, count)
    return tuple(layers) or tuple(round(count * (k + 1) / heads) for k in range(heads))


def vision_discriminator(
    shapes: Sequence[FeatureShape], *, model: str, layers: Sequence[int] = (), conditions: int
) -> VisionDiscriminator:
    """The discriminator for a CLIP folder; made for a `Head`, whose shapes of the denoiser's features it ignores.

    Args:
        shapes: not used.
        model: folder of a `CLIPModel`.
        layers: see `tower_layers`.
        conditions: how many projected features the heads are conditioned on, side by side.
    """
    sizes = tower_sizes(model)
    return VisionDiscriminator(len(tower_layers(model, layers)), sizes.width, conditions * sizes.features)


@torch.no_grad()
def condition_of(
    network: ImageTextModel, prompts: Sequence[str], images: Tensor | None = None, shown: Tensor | None = None
) -> Tensor:
    """What the heads are conditioned on, (B, E): unit features of the prompts, and of the images that a sample is of.

    Args:
        network: gives both.
        prompts: B.
        images: (B, 3, H, W) in [0, 1]; None: prompts only.
        shown: (B,), which of the images the student could see; those of others say nothing about its sample.
    """
    texts = normalize(network.text_features(prompts), dim=-1)
    if images is None or shown is None:
        return texts
    return torch.cat([texts, shown[:, None] * normalize(network.image_features(images), dim=-1)], dim=1)


def input_penalty(logits: Tensor, tokens: Sequence[Tensor]) -> Tensor:
    """R1 on the inputs of the heads, a scalar: mean over images of the sum over heads of |d logit_k / d tokens_k|^2.

    ADD (arXiv 2311.17042), section 3.2; Mescheder et al. 2018 (arXiv 1801.04406). It can be differentiated.
    """
    gradients = torch.autograd.grad(logits.sum(), list(tokens), create_graph=True)
    return torch.stack([gradient.square().flatten(1).sum(1) for gradient in gradients]).sum(0).mean()
