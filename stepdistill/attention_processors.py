"""Attention to two texts at once: the rules that mix the outputs, and processors that stand in for Diffusers' own.

NASA: Nguyen et al. 2024 (SNOOPI), arXiv 2412.02687, section 4.2. NAG: Chen et al. 2025, arXiv 2505.21179. Letters: B
batch, H heads, N image tokens, L text tokens, C features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Protocol

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from stepdistill.errors import UserError


class Rule(Protocol):
    """How attention to the prompt and attention to the negative become one output."""

    @property
    def joint(self) -> bool:
        """Whether it is also meant for joint attention of image and text tokens."""

    def mix(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Z+ and Z-, each (B, N, C) before the output projection => what is projected instead of Z+."""


@dataclass(frozen=True)
class NASA:
    """Z = Z+ - alpha Z-, not renormalised (SNOOPI, section 4.2).

    Attributes:
        alpha: strength; the paper has 0.1 for SD1.5, 0.2 for SD2.1, 0.5 for PixArt, and 1 after training with it.
    """

    alpha: float
    joint: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise UserError(f"NASA: alpha is {self.alpha}; it must be at least 0")

    def mix(self, positive: Tensor, negative: Tensor) -> Tensor:
        return positive - self.alpha * negative


@dataclass(frozen=True)
class NAG:
    """Z~ = Z+ + phi (Z+ - Z-), its length limited to tau times that of Z+, blended with Z+.

    Attributes:
        phi: strength; the scale of the authors' code is phi + 1.
        tau: largest ratio of the L1 norms of Z~ and Z+, token by token.
        beta: share of the limited Z~ in the result.
    """

    phi: float
    tau: float = 2.5
    beta: float = 0.5
    joint: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (self.phi >= 0 and self.tau >= 1 and 0 <= self.beta <= 1):
            raise UserError(f"NAG: phi {self.phi}, tau {self.tau}, beta {self.beta}; phi must be at least 0, tau at "
                            "least 1, beta between 0 and 1")  # fmt: skip

    def mix(self, positive: Tensor, negative: Tensor) -> Tensor:
        away = positive + self.phi * (positive - negative)
        wide = torch.promote_types(positive.dtype, torch.float32)  # a sum over features overflows half precision
        length, base = (z.to(wide).abs().sum(-1, keepdim=True) for z in (away, positive))
        # min(R, tau) / R with R = length / base
        factor = (self.tau * base / length.clamp_min(torch.finfo(wide).tiny)).clamp(max=1)
        return torch.lerp(positive, away * factor.to(away.dtype), self.beta)


class TwoTexts:
    """What the processors below share: the rule, and where the negative's tokens begin.

    Args:
        rule: how the two outputs are mixed.
        length: number of negative tokens, the last ones of every text sequence.

    Attributes:
        joint: whether it stands for joint attention, for which not every rule is made.
        texts: number of tokens of both texts in the present call of the network.
    """

    joint: ClassVar[bool] = False

    def __init__(self, rule: Rule, length: int) -> None:
        self._rule, self._length = rule, length
        self.texts = 0

    def _parts(self, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """The prompt's part and the negative's; contiguous, for kernels of the same bits as without steering."""
        prompt = x.shape[dim] - self._length
        return x.narrow(dim, 0, prompt).contiguous(), x.narrow(dim, prompt, self._length).contiguous()


class CrossAttention(TwoTexts):
    """Stands in for `AttnProcessor2_0`: same query, two texts, one output projection."""

    norm_per_head: ClassVar[bool] = True

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """One cross-attention: image tokens (B, N, C), both texts (B, L, C), additive mask (B, 1, L) or None."""
        query = self._heads(attn, attn.to_q(hidden_states), attn.norm_q)
        masks = (None, None) if attention_mask is None else self._parts(attention_mask, -1)
        outputs = [
            self._attend(attn, query, text, mask)
            for text, mask in zip(self._parts(encoder_hidden_states, 1), masks, strict=True)
        ]
        # Before to_out: its bias belongs to the output once, whatever is subtracted.
        output = attn.to_out[1](attn.to_out[0](self._rule.mix(outputs[0], outputs[1])))
        if attn.residual_connection:
            output = output + hidden_states
        result: Tensor = output / attn.rescale_output_factor
        return result

    def _attend(self, attn: Any, query: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        """Queries (B, H, N, C / H) to one text (B, L, C) => (B, N, C)."""
        if attn.norm_cross:
            text = attn.norm_encoder_hidden_states(text)
        key = self._heads(attn, attn.to_k(text), attn.norm_k)
        value = _split_heads(attn, attn.to_v(text))
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, text.shape[1], len(text))
            mask = mask.view(len(text), attn.heads, -1, mask.shape[-1])
        return _merge_heads(scaled_dot_product_attention(query, key, value, attn_mask=mask))

    def _heads(self, attn: Any, x: Tensor, norm: nn.Module | None) -> Tensor:
        if norm is None:
            return _split_heads(attn, x)
        return norm(_split_heads(attn, x)) if self.norm_per_head else _split_heads(attn, norm(x))


class SanaAttention(CrossAttention):
    """Stands in for `SanaAttnProcessor2_0`, which normalises queries and keys across heads."""

    norm_per_head: ClassVar[bool] = False


class JointAttention(TwoTexts):
    """Stands in for `JointAttnProcessor2_0`: the image attends jointly with the prompt, and with the negative.

    Both texts keep streams of their own through the network; only the image's outputs are mixed.
    """

    joint: ClassVar[bool] = True

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One joint attention: image tokens (B, N, C), both texts (B, L, C) => both anew."""
        image = _projected(attn, hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
        count = hidden_states.shape[1]
        images, texts = [], []
        for part in self._parts(encoder_hidden_states, 1):
            layers, norms = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), (attn.norm_added_q, attn.norm_added_k)
            text = _projected(attn, part, layers, norms)
            query, key, value = (torch.cat(pair, dim=2) for pair in zip(image, text, strict=True))
            output = _merge_heads(scaled_dot_product_attention(query, key, value))
            images.append(output[:, :count])
            texts.append(output[:, count:] if attn.context_pre_only else attn.to_add_out(output[:, count:]))
        return attn.to_out[1](attn.to_out[0](self._rule.mix(images[0], images[1]))), torch.cat(texts, dim=1)


class FluxJointAttention(TwoTexts):
    """Stands in for `FluxAttnProcessor`: joint attention as above, with rotated queries and keys.

    In FLUX's blocks of one stream the texts come before the image in one sequence, with one set of projections.
    """

    joint: ClassVar[bool] = True

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """One attention of image tokens (B, N, C) and both texts (B, L, C) => both anew, or one sequence of all."""
        own = (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k)
        if encoder_hidden_states is None:
            texts, image, of_text = hidden_states[:, : self.texts], hidden_states[:, self.texts :], own
        else:
            texts, image = encoder_hidden_states, hidden_states
            of_text = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), (attn.norm_added_q, attn.norm_added_k)
        rotations = [None] * 3 if image_rotary_emb is None else self._rotations(image_rotary_emb)
        seen = _rotated(_projected(attn, image, *own), rotations[2])
        images, streams = [], []
        for part, rotation in zip(self._parts(texts, 1), rotations, strict=False):
            text = _rotated(_projected(attn, part, *of_text), rotation)
            query, key, value = (torch.cat(pair, dim=2) for pair in zip(text, seen, strict=True))
            output = _merge_heads(scaled_dot_product_attention(query, key, value))
            streams.append(output[:, : part.shape[1]])
            images.append(output[:, part.shape[1] :])
        mixed = self._rule.mix(images[0], images[1])
        if encoder_hidden_states is None:
            return torch.cat([*streams, mixed], dim=1)
        return attn.to_out[1](attn.to_out[0](mixed)), attn.to_add_out(torch.cat(streams, dim=1))

    def _rotations(self, whole: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Sines and cosines of all tokens => those of the prompt, of the negative and of the image."""
        ends = (0, self.texts - self._length, self.texts, len(whole[0]))
        return [(whole[0][a:b], whole[1][a:b]) for a, b in pairwise(ends)]


def _rotated(heads: tuple[Tensor, Tensor, Tensor], rotation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
    """Query and key, (B, H, N, C / H), at their places; the value as it is."""
    if rotation is None:
        return heads
    query, key = (apply_rotary_emb(z, rotation, sequence_dim=2) for z in heads[:2])
    return query, key, heads[2]


def _projected(
    attn: Any, x: Tensor, layers: Sequence[nn.Module], norms: Sequence[nn.Module | None]
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, C) => query, key and value by heads, the first two normalised."""
    query, key, value = (_split_heads(attn, layer(x)) for layer in layers)
    query, key = (z if norm is None else norm(z) for z, norm in zip((query, key), norms, strict=True))
    return query, key, value


def _split_heads(attn: Any, x: Tensor) -> Tensor:
    """(B, N, C) => (B, H, N, C / H)."""
    return x.view(len(x), -1, attn.heads, x.shape[-1] // attn.heads).transpose(1, 2)


def _merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, C / H) => (B, N, C)."""
    return x.transpose(1, 2).reshape(len(x), -1, x.shape[1] * x.shape[-1])


# stock processor => ours for the same layer; an explicit table, for a processor that does something else beside
# attention (IP adapters, fused projections, slicing) must not be replaced silently
_REPLACEMENTS: dict[type, type[TwoTexts]] = {
    AttnProcessor2_0: CrossAttention,
    SanaAttnProcessor2_0: SanaAttention,
    JointAttnProcessor2_0: JointAttention,
    FluxAttnProcessor: FluxJointAttention,
}


def attends_to_text(layer: nn.Module) -> bool:
    """Whether a module of a network is an attention in which text has a part."""
    if isinstance(layer, Attention):
        return bool(layer.is_cross_attention or layer.added_kv_proj_dim is not None)
    return isinstance(layer, FluxAttention)  # in all of whose blocks the text is in the sequence, or beside it


def replacement(name: str, layer: Any, rule: Rule) -> type[TwoTexts]:
    """Our processor for a layer of the network.

    Args:
        name: of the layer, for messages.
        layer: a Diffusers `Attention` or `FluxAttention`.
        rule: what it is to mix by.

    Raises:
        UserError: the layer's processor is no stock one, or the rule is not made for this kind of attention.
    """
    kind = type(layer.processor)
    if issubclass(kind, TwoTexts):
        raise UserError(f"{name}: attention is steered already; remove the earlier steering first")
    if kind not in _REPLACEMENTS or _does_more(layer):
        known = ", ".join(k.__name__ for k in _REPLACEMENTS)
        raise UserError(f"{name}: {kind.__name__} cannot be steered; only {known} can. Take off what replaced the "
                        "stock processors: IP adapters, xformers, slicing, fused projections")  # fmt: skip
    found = _REPLACEMENTS[kind]
    if found.joint and not rule.joint:
        raise UserError(f"{name}: {type(rule).__name__} is defined for cross-attention, and this network has joint "
                        "attention; use NAG")  # fmt: skip
    return found


def _does_more(layer: Any) -> bool:
    """Whether the layer has parts that our processors leave out."""
    if isinstance(layer, FluxAttention):
        return bool(layer.fused_projections)
    return layer.group_norm is not None or layer.spatial_norm is not None
