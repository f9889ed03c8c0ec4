"""The adapter itself: what it makes of scale, time and prompt, and what it adds at every attention layer.

Jensen and Sadat 2025, "Efficient Distillation of Classifier-Free Guidance using Adapters", arXiv 2503.07274. It knows
no network: `wiring.py` says where it goes and what it is given. Letters: B batch, N image tokens, L tokens that say
what is wanted, C channels of a layer, D width of an embedding of the network's own, h width of the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from stepdistill.errors import UserError


Form = Literal["attention", "offset"]


@dataclass(frozen=True)
class AdapterSettings:
    """Size and form of an adapter.

    Attributes:
        form: "attention": the layer's tokens attend to scale, time and prompt; "offset": one vector is added to all
            of them.
        width: h.
        frequency: standard deviation of the frequencies by which a scale is embedded, in turns per unit of scale.
        proportional: what is added is multiplied by scale - 1, as the correction of guidance is; then scale 1 is the
            network as it was, whatever has been learnt.
        heads: of the form attention; the paper has one. More of them are free, and each chooses for itself which
            token answers.
    """

    form: Form = "attention"
    width: int = 320
    frequency: float = 1.0
    proportional: bool = False
    heads: int = 1

    def __post_init__(self) -> None:
        if self.width < 2 or self.width % 2:
            raise UserError(f"width is {self.width}; it must be an even number of at least 2")
        if not self.frequency > 0:
            raise UserError(f"frequency is {self.frequency:g}; it must be above 0")
        if self.heads < 1 or self.width % self.heads:
            raise UserError(f"heads is {self.heads}; it must divide the width, which is {self.width}")
        if self.heads > 1 and self.form == "offset":
            raise UserError(f"heads is {self.heads}, but the form offset attends to nothing; leave heads out, or take "
                            "the form attention")  # fmt: skip


@dataclass(frozen=True)
class AttentionShape:
    """What an adapter has to fit.

    Attributes:
        sites: (name, C) of every attention layer that it stands beside, in the network's order.
        embeddings: D of every embedding of time or class that it is given.
        tokens: width of the prompt's tokens; None where there is no prompt.
    """

    sites: tuple[tuple[str, int], ...]
    embeddings: tuple[int, ...]
    tokens: int | None


@dataclass(frozen=True)
class Told:
    """What all sites are told in one network call.

    Attributes:
        wanted: tokens (B, L, h) for the form attention, one vector (B, h) for the form offset.
        strength: factor of what is added, (B, 1, 1); None: 1.
        kept: which of the tokens are no padding, (B, 1, 1, L) for all heads and places; None: all.
    """

    wanted: Tensor
    strength: Tensor | None
    kept: Tensor | None = None


class ScaleEmbedding(nn.Module):
    """Guidance scales (B,) => (B, h): random Fourier features, two layers, a norm.

    Args:
        width: h.
        frequency: standard deviation of the features' frequencies.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, width: int, frequency: float) -> None:
        super().__init__()
        self.register_buffer("frequencies", frequency * torch.randn(width))
        self.register_buffer("phases", torch.rand(width))
        self.layers = nn.Sequential(
            nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width), nn.LayerNorm(width)
        )

    def forward(self, scale: Tensor) -> Tensor:
        turns = self.frequencies * scale.to(self.frequencies)[:, None] + self.phases
        embedded: Tensor = self.layers((2 * math.pi * turns).cos())
        return embedded


class AttentionSite(nn.Module):
    """Tokens of a layer (B, N, C) ask what is wanted (B, L, h) => what is added to them (B, N, C); zero at first."""

    def __init__(self, channels: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(channels, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = _silent(nn.Linear(width, channels))

    def forward(self, x: Tensor, told: Told) -> Tensor:
        # softmax(q k^T / sqrt(h / heads)) v in each head.
        query, key, value = map(self._divided, (self.query(x), self.key(told.wanted), self.value(told.wanted)))
        found = scaled_dot_product_attention(query, key, value, attn_mask=told.kept)
        added: Tensor = self.out(found.transpose(1, 2).flatten(2))
        return added

    def _divided(self, tokens: Tensor) -> Tensor:
        """(B, L, h) => (B, heads, L, h / heads)."""
        return tokens.reshape(*tokens.shape[:2], self.heads, -1).transpose(1, 2)


class OffsetSite(nn.Module):
    """What is wanted (B, h) => the same vector for all tokens of a layer, (B, 1, C); zero at first."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.LayerNorm(width), _silent(nn.Linear(width, channels))
        )

    def forward(self, x: Tensor, told: Told) -> Tensor:
        added: Tensor = self.layers(told.wanted)[:, None]
        return added


class GuidanceAdapter(nn.Module):
    """All sites of one network, and the embeddings that they share.

    Scale, time and prompt are embedded once per network call and not once per site: the same information at a fraction
    of the parameters. It computes in the precision of its own weights.

    Args:
        settings: size and form.
        shape: of the network.
    """

    def __init__(self, settings: AdapterSettings, shape: AttentionShape) -> None:
        super().__init__()
        self.settings, self.shape = settings, shape
        width = settings.width
        self.scale = ScaleEmbedding(width, settings.frequency)
        self.embeddings = nn.ModuleList(nn.Linear(size, width) for size in shape.embeddings)
        self.prompt = None if shape.tokens is None else nn.Linear(shape.tokens, width)
        self.sites = nn.ModuleList(self._site(channels) for _, channels in shape.sites)

    def _site(self, channels: int) -> nn.Module:
        settings = self.settings
        if settings.form == "offset":
            return OffsetSite(channels, settings.width)
        return AttentionSite(channels, settings.width, settings.heads)

    def tell(
        self, scale: Tensor, embeddings: Sequence[Tensor], tokens: Tensor | None, mask: Tensor | None = None
    ) -> Told:
        """What one network call is to be like => what every site is told.

        Args:
            scale: standard guidance scales, (B,).
            embeddings: of time, and of a class where there is one, (B, D) each.
            tokens: of the prompt, (B, L, D), or None.
            mask: 1 for a token and 0 for padding, (B, L); None: there is no padding.
        """
        own = self.scale.phases
        parts = [self.scale(scale)]
        parts += [layer(value.to(own)) for layer, value in zip(self.embeddings, embeddings, strict=True)]
        prompt = None if self.prompt is None or tokens is None else self.prompt(tokens.to(own))
        strength = (scale - 1).to(own)[:, None, None] if self.settings.proportional else None
        if self.settings.form == "offset":
            wanted = torch.stack(parts).sum(0)
            return Told(wanted if prompt is None else wanted + _mean(prompt, mask), strength)
        wanted, kept = torch.stack(parts, dim=1), None
        if prompt is not None:
            wanted = torch.cat([wanted, prompt], dim=1)
            if mask is not None:
                kept = torch.cat([mask.new_ones(len(mask), len(parts)), mask], dim=1).bool()[:, None, None]
        return Told(wanted + positions(wanted.shape[1], wanted.shape[2]).to(wanted), strength, kept)

    def added(self, site: int, x: Tensor, told: Told) -> Tensor:
        """What is added to the output of an attention layer, in the precision of its input.

        Args:
            site: number of the layer.
            x: what the layer was given, (B, N, C).
            told: of this network call.
        """
        found: Tensor = self.sites[site](x.to(self.scale.phases), told)
        return (found if told.strength is None else told.strength * found).to(x.dtype)


def _mean(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L, h), (B, L) => the mean of the tokens that are no padding, (B, h)."""
    if mask is None:
        return tokens.mean(1)
    share = mask.to(tokens) / mask.to(tokens).sum(1, keepdim=True)
    return torch.einsum("blh,bl->bh", tokens, share)


def positions(count: int, width: int) -> Tensor:
    """Sines and cosines of the numbers 0 ... count - 1, (count, width): Vaswani et al. 2017, section 3.5."""
    rates = torch.exp(-math.log(10000.0) * torch.arange(0, width, 2) / width)
    angles = torch.arange(count)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


def _silent(layer: nn.Linear) -> nn.Linear:
    """The layer, saying nothing: an untrained adapter leaves every bit of its network's output as it is."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
