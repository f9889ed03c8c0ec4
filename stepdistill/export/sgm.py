"""The names that the layers of SDXL's UNet have in its own code (Stability's generative-models, "SGM").

kohya's programs train on that code, so theirs and ComfyUI's LoRA files of SDXL have its names. It numbers blocks
through, downsamplers among them, where Diffusers numbers stages and layers within a stage:

    down_blocks.1.attentions.0 => input_blocks.4.1;  up_blocks.0.upsamplers.0 => output_blocks.2.2
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from torch import Tensor

ENDS = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
          "conv_shortcut": "skip_connection"}  # fmt: skip
SLOTS = {"resnets": 0, "attentions": 1, "upsamplers": 2}  # places within a block
LAYER = re.compile(r"(down|mid|up)_blocks?(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def sgm_names(state: Mapping[str, Tensor], per_block: int) -> dict[str, Tensor]:
    """The same adapters, PEFT's keys of Diffusers' layers => PEFT's keys of SGM's layers.

    Args:
        state: `<layer>.lora_A.weight` and `<layer>.lora_B.weight`.
        per_block: the UNet's `layers_per_block`.
    """
    split = {key: key.partition(".lora_") for key in state}
    return {f"{sgm_name(layer, per_block)}{mark}{side}": state[key] for key, (layer, mark, side) in split.items()}


def sgm_name(layer: str, per_block: int) -> str:
    """Diffusers' name of a layer of SDXL's UNet => SGM's.

    Raises:
        ValueError: there is no such layer in that code.
    """
    if layer in ENDS:
        return ENDS[layer]
    found = LAYER.fullmatch(layer)
    if found is None:
        raise ValueError(f"{layer} is no layer of SDXL's UNet")
    side, stage, kind, number, rest = found.groups()
    if kind == "resnets":
        rest = RESNET.get(rest, rest)
    if side == "mid":  # a resnet, an attention, a resnet
        return f"middle_block.{2 * int(number) + SLOTS[kind]}.{rest}"
    first = int(stage) * (per_block + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + per_block + 1}.0.op"
    if side == "down":  # behind the block that is conv_in
        return f"input_blocks.{first + 1 + int(number)}.{SLOTS[kind]}.{rest}"
    last = per_block if kind == "upsamplers" else int(number)
    return f"output_blocks.{first + last}.{SLOTS[kind]}.{rest}"
