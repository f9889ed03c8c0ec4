"""A Stable Diffusion pipeline as one file, with the names that its authors' code gives to layers.

The inverse of what Diffusers does when it reads such files, for networks of two layers per block.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


RESNET = [("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"),
          ("norm2", "out_layers.0"), ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection")]  # fmt: skip
ENDS = [("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"),
        ("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2"),
        ("mid_block.resnets.0", "middle_block.0"), ("mid_block.attentions.0", "middle_block.1"),
        ("mid_block.resnets.1", "middle_block.2")]  # fmt: skip
VAE = [("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut"), ("mid_block.resnets.0", "mid.block_1"),
       ("mid_block.resnets.1", "mid.block_2"), ("mid_block.attentions.0", "mid.attn_1"), ("group_norm", "norm"),
       ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"), ("downsamplers.0", "downsample"),
       ("upsamplers.0", "upsample"), ("resnets", "block"), ("down_blocks", "down")]  # fmt: skip


def write_single_file(pipeline: Any, file: Path) -> str:
    """Unet, autoencoder and text encoder of a pipeline of Stable Diffusion 1 in one file."""
    parts = {
        "model.diffusion_model.": _unet(pipeline.unet.state_dict(), pipeline.unet.config),
        "first_stage_model.": _vae(pipeline.vae.state_dict()),
        "cond_stage_model.transformer.": _text(pipeline.text_encoder.state_dict()),
    }
    state = {prefix + key: tensor.contiguous() for prefix, part in parts.items() for key, tensor in part}
    save_file(state, file)
    return str(file)


def _unet(state: Mapping[str, Tensor], config: Any) -> Iterator[tuple[str, Tensor]]:
    table = list(ENDS)
    for i in range(len(config.block_out_channels)):
        table.append((f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{3 * i + 3}.0.op"))
        above = 2 if "CrossAttn" in config.up_block_types[i] else 1
        table.append((f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{3 * i + 2}.{above}.conv"))
        for number, part in enumerate(("resnets", "attentions")):
            table += [(f"down_blocks.{i}.{part}.{j}", f"input_blocks.{3 * i + 1 + j}.{number}") for j in range(2)]
            table += [(f"up_blocks.{i}.{part}.{j}", f"output_blocks.{3 * i + j}.{number}") for j in range(3)]
    for key, tensor in state.items():
        yield _renamed(key, table + RESNET if "resnets" in key else table), tensor


def _vae(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    blocks = {int(match[1]) for key in state if (match := re.match(r"decoder\.up_blocks\.(\d+)", key))}
    up = [(f"up_blocks.{i}", f"up.{max(blocks) - i}") for i in blocks]
    for key, tensor in state.items():
        matrix = ".attentions." in key and tensor.ndim == 2
        yield _renamed(key, VAE + up), tensor[:, :, None, None] if matrix else tensor


def _text(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in state.items():
        yield f"text_model.{key.removeprefix('text_model.')}", tensor


def _renamed(key: str, table: Sequence[tuple[str, str]]) -> str:
    """The key with every whole name of the table replaced."""
    for old, new in table:
        key = re.sub(rf"(^|\.){re.escape(old)}(?=\.)", rf"\g<1>{new}", key)
    return key
