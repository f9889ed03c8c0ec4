"""Smaller networks of a teacher's class: what their configuration says, and which weights they start from.

A smaller network is described relative to the teacher: which of its parts come from which of the teacher's, and the
share of the channels that is kept. Kept channels are evenly spaced. As the share is the same everywhere and leaves
whole numbers in every group of a norm and in every attention head, what belongs together stays together, also where
channels of two layers lie side by side. Architectures: BK-SDM (arXiv 2305.15798), KOALA (arXiv 2312.04005).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import lcm
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.errors import UserError
from stepdistill.network_shape import NetworkShape
from stepdistill.recipe_text import nearest


WHERE = "student.shape"
FINEST = 1024  # denominator of a share; finer differences are rounding
# a UNet's block with attention to text => the one without
WITHOUT_ATTENTION = {
    "CrossAttnDownBlock2D": "DownBlock2D",
    "CrossAttnUpBlock2D": "UpBlock2D",
    "UNetMidBlock2DCrossAttn": "UNetMidBlock2D",
}


@dataclass(frozen=True)
class Plan:
    """A smaller network in terms of the teacher's.

    Attributes:
        options: what the smaller network's configuration says differently.
        sources: its modules => the teacher's modules that they come from; the longest name that fits counts, and what
            has none is called the same in both.
        share: of the channels that are kept.
        outputs: modules whose output is that of another one in the teacher than the one they come from.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    share: Fraction = Fraction(1)
    outputs: Mapping[str, str] = field(default_factory=dict)

    def source(self, name: str) -> str:
        """A module or parameter of the smaller network => the name of what it comes from."""
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            found = self.sources.get(".".join(parts[:length]))
            if found is not None:
                return ".".join([found, *parts[length:]])
        return name

    def pairs(self, network: nn.Module, pattern: str) -> list[tuple[str, str]]:
        """(module, the teacher's module of the same output) for all modules of the network with such a name."""
        names = [name for name, _ in network.named_modules() if re.fullmatch(pattern, name)]
        return [(name, self.outputs.get(name, self.source(name))) for name in names]

    def cut(self, old: Tensor, shape: Sequence[int]) -> Tensor | None:
        """The kept channels of one of the teacher's tensors; None if that does not give the shape wanted."""
        if old.ndim != len(shape):
            return None
        for dim, (have, want) in enumerate(zip(old.shape, shape, strict=True)):
            if want != have:
                if want != have * self.share:
                    return None
                kept = torch.arange(want, device=old.device) * have // want
                old = old.index_select(dim, kept)
        return old

    @torch.no_grad()
    def fill(self, network: nn.Module, state: Mapping[str, Tensor]) -> int:
        """Writes a teacher's weights into a smaller network wherever they fit => how many of its weights they are.

        The others, such as those of a layer that now follows another one than in the teacher, stay as they are.
        """
        filled = 0
        for name, parameter in network.named_parameters():
            old = state.get(self.source(name))
            part = None if old is None else self.cut(old, parameter.shape)
            if part is not None:
                parameter.copy_(part)
                filled += parameter.numel()
        return filled


def spread(have: int, keep: int) -> tuple[int, ...]:
    """Evenly spaced numbers out of 0 ... have - 1, first and last among them; the first for one."""
    return (0,) if keep == 1 else tuple(round(i * (have - 1) / (keep - 1)) for i in range(keep))


# ---- transformers --------------------------------------------------------------------------------------------------


def transformer_plan(config: Any, shape: NetworkShape, *, widths: Sequence[str] = (), parts: int = 4) -> Plan:
    """The plan of a transformer that is a row of equal blocks.

    Args:
        config: the teacher's configuration.
        shape: what is removed.
        widths: names of options that shrink as the blocks do.
        parts: into how many equal ones the width of the blocks has to divide; the sines and cosines of positions in
            two directions make four.

    Raises:
        UserError: the shape does not fit the teacher.
    """
    row = "transformer_blocks"
    _check_names(shape.remove, [f"{row}.{i}" for i in range(config.num_layers)])
    _check_no_depth(shape)
    kept = _kept(row, config.num_layers, shape, shape.layers)
    share = _share(shape.channels)
    heads, dim = config.num_attention_heads, config.attention_head_dim
    sizes = [getattr(config, name) for name in widths]
    fits = [k for k in range(1, dim + 1) if heads * k % parts == 0 and all(size * k % dim == 0 for size in sizes)]
    _check_share(share, [(dim, fits)], "of each attention head")
    options: dict[str, Any] = {"num_layers": len(kept), "attention_head_dim": int(dim * share)}
    options |= {name: int(getattr(config, name) * share) for name in widths}
    if config.get("dual_attention_layers"):
        options["dual_attention_layers"] = [i for i, k in enumerate(kept) if k in config.dual_attention_layers]
    return Plan(options, _renumbered(row, kept), share)


def two_row_plan(config: Any, shape: NetworkShape) -> Plan:
    """The plan of FLUX's transformer: a row of blocks with two streams, then one of blocks with one.

    Args:
        config: the teacher's configuration.
        shape: what is removed; never channels, whose rotation by their places is made for heads of one width.

    Raises:
        UserError: the shape does not fit the teacher.
    """
    rows = {"transformer_blocks": config.num_layers, "single_transformer_blocks": config.num_single_layers}
    _check_names(shape.remove, [f"{row}.{i}" for row, count in rows.items() for i in range(count)])
    _check_no_depth(shape)
    if shape.channels != 1:
        raise UserError(f"{WHERE}.channels: the heads of FLUX are rotated by the places of tokens and cannot be made "
                        "narrower; remove blocks by layers, or by their names")  # fmt: skip
    wanted = (None, None) if shape.layers is None else shape.layers
    if isinstance(wanted, int) or len(wanted) != len(rows):
        raise UserError(f"{WHERE}.layers: FLUX has {config.num_layers} blocks of two streams and "
                        f"{config.num_single_layers} of one; give how many of each are kept, two numbers")  # fmt: skip
    kept = [_kept(row, count, shape, keep) for (row, count), keep in zip(rows.items(), wanted, strict=True)]
    options = {"num_layers": len(kept[0]), "num_single_layers": len(kept[1])}
    sources = {new: old for row, left in zip(rows, kept, strict=True) for new, old in _renumbered(row, left).items()}
    return Plan(options, sources)


def _kept(row: str, count: int, shape: NetworkShape, keep: int | tuple[int, ...] | None) -> list[int]:
    """Numbers of the blocks of a row that are kept; None: all that are not removed by name."""
    left = [i for i in range(count) if f"{row}.{i}" not in shape.remove]
    wanted = len(left) if keep is None else keep
    if not isinstance(wanted, int) or not 1 <= wanted <= len(left):
        raise UserError(f"{WHERE}.layers: {_listed(keep)} of {len(left)} blocks cannot be kept; give one "
                        f"number from 1 to {len(left)}")  # fmt: skip
    return [left[i] for i in spread(len(left), wanted)]


def _renumbered(row: str, kept: Sequence[int]) -> dict[str, str]:
    return {f"{row}.{i}": f"{row}.{k}" for i, k in enumerate(kept)}


def _check_no_depth(shape: NetworkShape) -> None:
    if shape.depth is not None:
        raise UserError(f"{WHERE}.depth: only UNets have attention layers with layers of their own; remove blocks "
                        "by layers, or by their names")  # fmt: skip


# ---- UNets ---------------------------------------------------------------------------------------------------------


def unet_plan(config: Any, shape: NetworkShape) -> Plan:
    """The plan of a UNet2DConditionModel.

    Args:
        config: the teacher's configuration.
        shape: what is removed.

    Raises:
        UserError: the shape does not fit the teacher.
    """
    _check_names(shape.remove, _unet_parts(config))
    stages = len(config.block_out_channels)
    keep = _stages_kept(shape.remove, stages)
    layers, depth = _each(config.layers_per_block, stages), _each(config.transformer_layers_per_block, stages)
    if config.reverse_transformer_layers_per_block is not None:
        raise UserError(f"{WHERE}: a UNet of another depth on its way up than on its way down cannot be made smaller")
    new_layers = _fewer("layers", shape.layers, layers[:keep])
    new_depth = _fewer("depth", shape.depth, depth[:keep])
    share = _share(shape.channels)
    widths = config.block_out_channels[:keep]
    heads = _each(config.attention_head_dim, stages)[:keep]  # Diffusers' name for how many there are
    units = [lcm(config.norm_num_groups or 1, count) for count in heads]
    sizes = [(width, range(unit, width + 1, unit)) for width, unit in zip(widths, units, strict=True)]
    _check_share(share, sizes, "of its stages")
    options: dict[str, Any] = {
        "block_out_channels": [int(width * share) for width in widths],
        "layers_per_block": _short(new_layers), "transformer_layers_per_block": _short(new_depth),
        **_block_types(config, shape.remove, keep),
        **{name: list(config[name])[:keep] for name in ("attention_head_dim", "cross_attention_dim",
                                                       "only_cross_attention")
           if isinstance(config[name], list | tuple)},
    }  # fmt: skip
    if config.time_embedding_dim is not None:
        options["time_embedding_dim"] = int(config.time_embedding_dim * share)
    sources = dict(_unet_sources(layers, new_layers, depth, new_depth))
    return Plan(options, sources, share, _shortened(config, layers, keep))


def _unet_parts(config: Any) -> list[str]:
    """What can be removed of a UNet, by name."""
    stages = range(len(config.block_out_channels))
    parts = [f"down_blocks.{i}" for i in stages if i > 0]
    parts += ["mid_block"] if config.mid_block_type else []
    types = [("mid_block", config.mid_block_type), *((f"down_blocks.{i}", config.down_block_types[i]) for i in stages),
             *((f"up_blocks.{i}", config.up_block_types[i]) for i in stages)]  # fmt: skip
    return parts + [f"{name}.attentions" for name, kind in types if kind in WITHOUT_ATTENTION]


def _stages_kept(remove: Sequence[str], stages: int) -> int:
    """How many of a UNet's stages are left, which are the outer ones."""
    gone = {int(name.rpartition(".")[2]) for name in remove if re.fullmatch(r"down_blocks\.\d+", name)}
    keep = stages - len(gone)
    if gone != set(range(keep, stages)):
        raise UserError(f"{WHERE}.remove: stages can only be removed from the inside: first "
                        f"down_blocks.{stages - 1}, then the one before it")  # fmt: skip
    return keep


def _block_types(config: Any, remove: Sequence[str], keep: int) -> dict[str, Any]:
    """Classes of the blocks that are left; the way up begins at the innermost stage."""
    gone = len(config.block_out_channels) - keep

    def kind(name: str, teachers: str) -> str:
        return WITHOUT_ATTENTION[teachers] if f"{name}.attentions" in remove else teachers

    middle = config.mid_block_type
    return {
        "down_block_types": [kind(f"down_blocks.{i}", t) for i, t in enumerate(config.down_block_types[:keep])],
        "mid_block_type": None if middle is None or "mid_block" in remove else kind("mid_block", middle),
        "up_block_types": [kind(f"up_blocks.{i}", t) for i, t in enumerate(config.up_block_types) if i >= gone],
    }


def _unet_sources(
    layers: Sequence[int], new_layers: Sequence[int], depth: Sequence[int], new_depth: Sequence[int]
) -> Iterator[tuple[str, str]]:
    """(module of the smaller UNet, module of the teacher's) wherever numbers in names may differ."""
    stages, keep = len(layers), len(new_layers)
    for i in range(keep):
        down, up = f"down_blocks.{i}", f"up_blocks.{keep - 1 - i}"
        ways = ((down, down, 0), (up, f"up_blocks.{stages - 1 - i}", 1))  # up has a layer more
        for own, teachers, more in ways:
            yield own, teachers
            for k, old in enumerate(spread(layers[i] + more, new_layers[i] + more)):
                yield f"{own}.resnets.{k}", f"{teachers}.resnets.{old}"
                attention, before = f"{own}.attentions.{k}", f"{teachers}.attentions.{old}"
                yield attention, before
                yield from _inner(attention, before, depth[i], new_depth[i])
    middle = "mid_block.attentions.0"
    yield from _inner(middle, middle, depth[-1], min(new_depth[-1], depth[-1]))


def _inner(own: str, teachers: str, depth: int, keep: int) -> Iterator[tuple[str, str]]:
    """The transformer layers within an attention layer."""
    for k, old in enumerate(spread(depth, keep)):
        yield f"{own}.transformer_blocks.{k}", f"{teachers}.transformer_blocks.{old}"


def _shortened(config: Any, layers: Sequence[int], keep: int) -> dict[str, str]:
    """Without the stages inside of it, a stage ends before its downsampler: there the teacher's last layer ends."""
    if keep == len(layers):
        return {}
    name = f"down_blocks.{keep - 1}"
    kind = "attentions" if config.down_block_types[keep - 1] in WITHOUT_ATTENTION else "resnets"
    return {name: f"{name}.{kind}.{layers[keep - 1] - 1}"}


# ---- checks --------------------------------------------------------------------------------------------------------


def _share(channels: float) -> Fraction:
    return Fraction(channels).limit_denominator(FINEST)


def _check_names(names: Sequence[str], valid: Sequence[str]) -> None:
    for name in names:
        if name not in valid:
            raise UserError(f"{WHERE}.remove: {name!r} is no part that can be removed; {nearest(name, valid)}")


def _check_share(share: Fraction, widths: Sequence[tuple[int, Sequence[int]]], what: str) -> None:
    """Raises UserError unless the share leaves every width one of the sizes that it may have.

    Args:
        share: of the channels.
        widths: (the teacher's, the sizes allowed).
        what: has these widths.
    """
    if all(width * share in sizes for width, sizes in widths):
        return
    allowed = set.intersection(*({Fraction(size, width) for size in sizes} for width, sizes in widths))
    raise UserError(f"{WHERE}.channels: {float(share):g} does not leave whole groups and heads of the "
                    f"{', '.join(str(width) for width, _ in widths)} channels {what}; these shares do: "
                    f"{', '.join(f'{float(s):g}' for s in sorted(allowed))}")  # fmt: skip


def _fewer(name: str, wanted: int | tuple[int, ...] | None, have: Sequence[int]) -> tuple[int, ...]:
    """How many are kept in each of the stages that are left."""
    if wanted is None:
        return tuple(have)
    if isinstance(wanted, int):
        wanted = tuple(min(wanted, h) for h in have) if wanted <= max(have) else (wanted,) * len(have)
    if len(wanted) != len(have) or any(w > h for w, h in zip(wanted, have, strict=True)):
        raise UserError(f"{WHERE}.{name}: {_listed(wanted)} cannot be kept where the stages that are left have "
                        f"{_listed(have)}; give one number, or at most these")  # fmt: skip
    return wanted


def _each(value: Any, count: int) -> tuple[Any, ...]:
    """An option of a UNet that is one value for all stages, or one for each."""
    return tuple(value) if isinstance(value, list | tuple) else (value,) * count


def _short(values: Sequence[int]) -> int | list[int]:
    """The same the other way round."""
    return values[0] if len(set(values)) == 1 else list(values)


def _listed(values: int | Sequence[int] | None) -> str:
    return ", ".join(map(str, values)) if isinstance(values, Sequence) else str(values)
