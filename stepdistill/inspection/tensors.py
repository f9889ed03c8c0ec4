"""What names and shapes of tensors give away: a LoRA's naming, rank and alpha, and the network they belong to.

Only headers are read, and of the values those of `alpha`, which are single numbers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from stepdistill.errors import UserError


PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
DOWN = re.compile(r"[._](?:lora_A|lora_down|lora\.down|lora_linear_layer\.down)(?:\.\w+)?\.weight$")
ALPHA = ".alpha"
# Prefix or infix of a key => what the naming is called; the first that fits counts.
NAMINGS = (
    (re.compile(r"^lora_(?:unet|te\d?|transformer)_"), "kohya (ComfyUI, AUTOMATIC1111 and Diffusers load it)"),
    (re.compile(r"^base_model\.model\."), "PEFT adapter (PeftModel loads it, load_lora_weights does not)"),
    (re.compile(r"^diffusion_model\."), "ComfyUI's own, after the original network"),
    (re.compile(r"^(?:unet|transformer|text_encoder\w*)\..*lora_A"), "Diffusers, PEFT keys"),
    (re.compile(r"^(?:unet|transformer|text_encoder\w*)\."), "Diffusers, older keys (lora.down, lora.up)"),
    (re.compile(r"lora_A"), "PEFT keys without unet. or transformer. before them, as Diffusers wants"),
)  # fmt: skip
OTHER_KINDS = {"hada_w1_a": "LoHa", "lokr_w1": "LoKr", "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA"}
# Width of what a network's cross-attention reads => the models that have it.
TEXT_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
METADATA_ALPHA = "in the file's metadata, which Diffusers reads and other programs do not"
FLUX = re.compile(r"double_blocks|single_transformer_blocks|single_blocks")
SD3 = re.compile(r"joint_blocks|joint_attention|attn[._]add_k_proj")


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file.

    Attributes:
        file: where it is.
        shapes: tensor's name => shape.
        dtypes: how the numbers are stored, such as F16.
        metadata: text that its maker left.
    """

    file: Path
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: frozenset[str]
    metadata: Mapping[str, str]

    @property
    def parameters(self) -> int:
        """How many numbers are in it."""
        return sum(prod(shape) for shape in self.shapes.values())


@dataclass(frozen=True)
class Lora:
    """What a LoRA file says about itself.

    Attributes:
        naming: whose naming its keys follow.
        kind: "LoRA", or a relative of it.
        layers: how many layers it changes.
        ranks: the different ranks, rising.
        scales: the different values of alpha / rank, rising.
        alpha: where alpha comes from, in words.
    """

    naming: str
    kind: str
    layers: int
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    alpha: str


def read_header(file: Path) -> Header:
    """Reads names, shapes and metadata of a safetensors file.

    Raises:
        UserError: it is a pickle, which could run programs, or it is broken.
    """
    from safetensors import SafetensorError, safe_open

    if file.suffix in PICKLES:
        raise UserError(f"{file}: a pickle can run programs when it is read, so it is left alone; convert it to "
                        "safetensors first")  # fmt: skip
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # it is no mapping
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            dtypes = frozenset(part.get_dtype() for part in slices.values())
            return Header(file, shapes, dtypes, opened.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read as a safetensors file ({error})") from error


def lora_in(header: Header) -> Lora | None:
    """The LoRA in a file; None if it holds none."""
    down = {name: shape for name, shape in header.shapes.items() if DOWN.search(name)}
    kind = next((kind for part, kind in OTHER_KINDS.items() if any(part in name for name in header.shapes)), "LoRA")
    if not down and kind == "LoRA":
        return None
    layers = {DOWN.sub("", name): shape[0] for name, shape in down.items()}  # name => rank
    alpha, scales = _alpha(header, layers)
    count = len(layers) or sum(name.endswith(("hada_w1_a", "lokr_w1", "lokr_w1_a")) for name in header.shapes)
    naming = next((text for pattern, text in NAMINGS if any(pattern.search(name) for name in header.shapes)),
                  "unknown")  # fmt: skip
    return Lora(naming, kind, count, tuple(sorted({*layers.values()})), tuple(sorted({*scales})), alpha)


def _alpha(header: Header, ranks: Mapping[str, int]) -> tuple[str, list[float]]:
    """Where alpha is written, and alpha / rank of every layer."""
    layers = {name: name.removesuffix(ALPHA) for name in header.shapes if name.endswith(ALPHA)}
    if layers:
        values = _numbers(header.file, layers)
        return "a number beside every layer", [
            values[n] / ranks[layer] for n, layer in layers.items() if layer in ranks
        ]
    beside = header.file.with_name("adapter_config.json")
    if beside.is_file() and (told := _told_scales(beside.read_text(encoding="utf-8"))):
        return f"in {beside.name}", told
    if told := _told_scales(header.metadata.get("lora_adapter_metadata", "")):
        return METADATA_ALPHA, told
    return "not written down, so it is taken to equal the rank", [1.0] if ranks else []


def _told_scales(text: str) -> list[float]:
    """alpha / rank of every network in a JSON text of PEFT's options, with the networks' names before them or not."""
    try:
        told = json.loads(text)
    except ValueError:
        return []
    if not isinstance(told, dict):
        return []
    alphas = {key: alpha for key, alpha in told.items() if key.rpartition(".")[2] == "lora_alpha"}
    ranks = {key: told.get(key.removesuffix("lora_alpha") + "r") for key in alphas}
    return [alpha / ranks[key] for key, alpha in alphas.items() if ranks[key]]


def _numbers(file: Path, names: Iterable[str]) -> dict[str, float]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return {name: float(opened.get_tensor(name).float().mean()) for name in names}


def base_model(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The model that a network or a LoRA fits, by the width of the text that it reads; "unknown" if nothing tells."""
    names = " ".join(shapes)
    if FLUX.search(names):
        return "Flux"
    if SD3.search(names):
        return "Stable Diffusion 3"
    for name, shape in shapes.items():
        if "to_k" in name and "attn2" in name and (DOWN.search(name) or name.endswith("attn2.to_k.weight")):
            return TEXT_WIDTHS.get(shape[1], f"unknown, with text of {shape[1]} features")
    return "unknown"


def takes_guidance(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the network has the layer with which LCM and its relatives take the guidance scale as an input."""
    return any(name.endswith("time_embedding.cond_proj.weight") for name in shapes)
