"""Where an adapter goes in each stock network, and what of a network call it is told.

Jensen and Sadat 2025, arXiv 2503.07274: beside every cross-attention of a UNet, every attention of a transformer. The
networks' own embeddings of time and class are used, and the prompt's tokens as the network gets them. Ours: PixArt and
Sana are transformers with cross-attention and are treated as UNets are, FLUX with its joint attention as SD3.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import Tensor, nn

from stepdistill.errors import UserError
from stepdistill.guidance.modules import AttentionShape


LAYERS = (Attention, FluxAttention)  # Diffusers' classes of attention


class Inputs(NamedTuple):
    """What of one network call an adapter is told.

    Attributes:
        rows: B.
        embeddings: of time, and of a class where there is one, (B, D) each.
        tokens: of the prompt, (B, L, D), or None.
        mask: 1 for a token and 0 for padding, (B, L); None where the network gets no mask.
    """

    rows: int
    embeddings: list[Tensor]
    tokens: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True)
class Wiring:
    """How an adapter is attached to one class of networks.

    Attributes:
        stands_beside: (name, layer) of an attention => whether the adapter goes there.
        embed: (network, sample, arguments of the call by name) => embeddings of time and class, (B, D) each.
        widths: network => their D.
        sample: the argument that carries the noisy latents.
        tokens: (network, one of the layers) => width of the prompt's tokens as the network is given them; None: it
            gets no prompt.
    """

    stands_beside: Callable[[str, Any], bool]
    embed: Callable[[Any, Tensor, Mapping[str, Any]], list[Tensor]]
    widths: Callable[[Any], tuple[int, ...]]
    sample: str
    tokens: Callable[[Any, Any], int] | None

    def sites(self, network: nn.Module) -> list[tuple[str, Any]]:
        """(name, layer) of every attention that an adapter stands beside."""
        layers = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, LAYERS)]
        return [(name, layer) for name, layer in layers if self.stands_beside(name, layer)]

    def shape(self, network: nn.Module) -> AttentionShape:
        """What an adapter of this network has to fit.

        Raises:
            UserError: there is no attention to stand beside.
        """
        sites = self.sites(network)
        if not sites:
            raise UserError(f"{type(network).__name__} has no attention that a guidance adapter could stand beside")
        widths = tuple((name, int(layer.query_dim)) for name, layer in sites)
        tokens = None if self.tokens is None else int(self.tokens(network, sites[0][1]))
        return AttentionShape(widths, self.widths(network), tokens)

    def inputs(self, network: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Inputs:
        """What an adapter is told of a call of the network with these arguments."""
        call = inspect.signature(type(network).forward).bind(network, *args, **kwargs).arguments
        sample = call[self.sample]
        embeddings = self.embed(network, sample, call)
        if self.tokens is None:
            return Inputs(len(sample), embeddings, None, None)
        tokens, mask = call["encoder_hidden_states"], call.get("encoder_attention_mask")
        return Inputs(len(sample), embeddings, tokens, mask)


def _beside_cross_attention(name: str, layer: Any) -> bool:
    return name.endswith(".attn2") and bool(layer.is_cross_attention)


def _joint_width(network: Any, layer: Any) -> int:
    return int(network.config.joint_attention_dim)  # the layer gets the prompt projected to its own width


def _caption_width(network: Any, layer: Any) -> int:
    given = network.config.caption_channels  # the same here, unless there is nothing to project
    return int(layer.cross_attention_dim if given is None else given)


def _rows(timestep: Any, sample: Tensor) -> Tensor:
    """A timestep as pipelines give it, a number or a tensor of any length => (B,)."""
    return torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))


def _unet_embeddings(network: Any, sample: Tensor, call: Mapping[str, Any]) -> list[Tensor]:
    return [network.time_embedding(network.get_time_embed(sample, call["timestep"]))]


def _dit_embeddings(network: Any, sample: Tensor, call: Mapping[str, Any]) -> list[Tensor]:
    own = network.transformer_blocks[0].norm1.emb
    time = own.timestep_embedder(own.time_proj(_rows(call["timestep"], sample)).to(sample.dtype))
    return [time, own.class_embedder.embedding_table(call["class_labels"])]


def _joint_embeddings(network: Any, sample: Tensor, call: Mapping[str, Any]) -> list[Tensor]:
    return [network.time_text_embed(_rows(call["timestep"], sample), call["pooled_projections"])]


def _pixart_embeddings(network: Any, sample: Tensor, call: Mapping[str, Any]) -> list[Tensor]:
    told = call.get("added_cond_kwargs")  # size and aspect ratio of the image, of networks that take them
    return [network.adaln_single(_rows(call["timestep"], sample), told, len(sample), sample.dtype)[1]]


def _sana_embeddings(network: Any, sample: Tensor, call: Mapping[str, Any]) -> list[Tensor]:
    guidance = call.get("guidance")  # of SANA-Sprint, whose network is told a scale
    told = {"batch_size": len(sample)} if guidance is None else {"guidance": guidance}
    return [network.time_embed(_rows(call["timestep"], sample), hidden_dtype=sample.dtype, **told)[1]]


def _flux_embeddings(network: Any, sample: Tensor, call: Mapping[str, Any]) -> list[Tensor]:
    time, guidance = _rows(call["timestep"], sample).to(sample.dtype) * 1000, call.get("guidance")
    told = [] if guidance is None else [_rows(guidance, sample).to(sample.dtype) * 1000]
    return [network.time_text_embed(time, *told, call["pooled_projections"])]


def _inner_width(network: Any) -> tuple[int, ...]:
    return (int(network.config.num_attention_heads * network.config.attention_head_dim),)


# class of the network => how; an explicit table, for other networks embed time and prompt in other ways
WIRINGS: dict[str, Wiring] = {
    "UNet2DConditionModel": Wiring(
        stands_beside=_beside_cross_attention,
        embed=_unet_embeddings,
        widths=lambda network: (int(network.time_embedding.linear_2.out_features),),
        sample="sample",
        tokens=lambda network, layer: layer.cross_attention_dim,
    ),
    "DiTTransformer2DModel": Wiring(
        stands_beside=lambda name, layer: name.endswith(".attn1"),
        embed=_dit_embeddings,
        widths=lambda network: (int(network.inner_dim),) * 2,
        sample="hidden_states",
        tokens=None,
    ),
    "SD3Transformer2DModel": Wiring(
        stands_beside=lambda name, layer: name.endswith(".attn"),
        embed=_joint_embeddings,
        widths=_inner_width,
        sample="hidden_states",
        tokens=_joint_width,
    ),
    "PixArtTransformer2DModel": Wiring(
        stands_beside=_beside_cross_attention,
        embed=_pixart_embeddings,
        widths=_inner_width,
        sample="hidden_states",
        tokens=_caption_width,
    ),
    "SanaTransformer2DModel": Wiring(
        stands_beside=_beside_cross_attention,
        embed=_sana_embeddings,
        widths=_inner_width,
        sample="hidden_states",
        tokens=_caption_width,
    ),
    "FluxTransformer2DModel": Wiring(
        stands_beside=lambda name, layer: name.endswith(".attn"),
        embed=_flux_embeddings,
        widths=_inner_width,
        sample="hidden_states",
        tokens=_joint_width,
    ),
}


def wiring_of(network: nn.Module) -> Wiring:
    """How an adapter is attached to this network.

    Raises:
        UserError: not to networks of its class.
    """
    name = type(network).__name__
    if name not in WIRINGS:
        raise UserError(f"guidance adapters are not made for {name}; they are for {', '.join(WIRINGS)}")
    return WIRINGS[name]
