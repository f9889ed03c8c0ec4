"""The memory options of a recipe at work: how a teacher is loaded, and what is done to the networks of a stage."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from stepdistill.data.cache import weights_fingerprint
from stepdistill.denoiser import uncompile
from stepdistill.errors import UserError
from stepdistill.guidance.attached import adapters_of
from stepdistill.objectives.base import Role, Trained
from stepdistill.resources.attention import chosen_attention, probe, usable_xformers, use_xformers


if TYPE_CHECKING:
    from stepdistill.adapters import LoraSettings
    from stepdistill.cast import Cast
    from stepdistill.families.base import ModelFamily
    from stepdistill.recipe import Recipe
    from stepdistill.resources.config import MemoryConfig

BASE_TYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    # What the layers that are not quantised are kept in, and what the others compute in.
    "int8": torch.bfloat16,
    "nf4": torch.bfloat16,
}
BLOCKS = re.compile(r"(.*\.)?transformer_blocks\.\d+")


def loading_types(memory: MemoryConfig) -> Any:
    """What a pipeline's `from_pretrained` is told about types: the autoencoder stays float32, where fp16 overflows."""
    dtype = BASE_TYPES[memory.base]
    return dtype if dtype == torch.float32 else {"default": dtype, "vae": torch.float32}


def check_options(recipe: Recipe) -> None:
    """Raises UserError for options that contradict each other or need a package that is not there; loads nothing."""
    from stepdistill.recipe import check_extra

    memory, where = recipe.memory, recipe.where("memory")
    check_precision(recipe)
    package = {"int8": "torchao", "nf4": "bitsandbytes"}.get(memory.base)
    if package is not None:
        check_extra(package, f"{where}.base: {memory.base}")
    if recipe.attention == "xformers":
        check_extra("xformers", recipe.where("attention: xformers"))


def check_precision(recipe: Recipe) -> None:
    """Raises UserError for weights in half precision where nothing turns what goes into them into the same type."""
    base = recipe.memory.base
    if base != "fp32" and recipe.precision == "fp32":
        raise UserError(f"{recipe.where('memory.base')}: weights in {base} cannot be computed with in float32, which "
                        "precision: fp32 asks for; use precision: bf16, or base: fp32")  # fmt: skip


def open_teacher(recipe: Recipe, device: str) -> ModelFamily:
    """Loads a recipe's teacher, at the recipe's size and with as little of the device's memory as its options say."""
    from stepdistill.families import load_family

    family = load_family(recipe.teacher, dtype=loading_types(recipe.memory), **recipe.teacher_options())
    family.at_size(recipe.data.size)
    pairs = recipe.data.pairs is not None or recipe.data.make_pairs is not None
    prepare_teacher(family, recipe.memory, device, pairs=pairs)
    return family


def prepare_teacher(family: ModelFamily, memory: MemoryConfig, device: str = "cpu", *, pairs: bool = False) -> None:
    """What is done to a teacher on the host before there are roles: quantising, and what of it lives where.

    The device never holds more than in training: a network that is quantised arrives there layer by layer, and
    encoders that are parked do not go there first.

    Args:
        family: on the host.
        memory: what to do.
        device: where it will compute.
        pairs: whether pairs are read or made, which are known by the weights that the teacher has before.
    """
    network = family.network()
    if memory.quantised:
        family.quantised = memory.base
        # Only for pairs, since this reads all weights; and now, since quantised ones are not the teacher's any more,
        # depend on the package's version, and some kinds of them cannot be read byte by byte.
        family.plain_fingerprint = weights_fingerprint(network) if pairs else None
        quantise(network, memory.base, device)
    network.to(device)
    for component in family.pipeline.components.values():
        if isinstance(component, nn.Module) and component is not network:
            if memory.park_encoders and torch.device(device).type != "cpu":
                _park(component, device)
            else:
                component.to(device)
    vae = family.pipeline.components.get("vae")
    if vae is not None and memory.vae_slicing:
        vae.enable_slicing()
    if vae is not None and memory.vae_tiling:
        vae.enable_tiling()


def _park(component: nn.Module, device: str) -> None:
    """Diffusers' group offloading: every layer is on the device only while it computes."""
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(component, onload_device=torch.device(device), offload_type="leaf_level")


def quantise(network: nn.Module, base: str, device: str) -> None:
    """Linear layers of a frozen network with fewer bits: int8 by torchao, nf4 by bitsandbytes; adapters go on top.

    Args:
        network: on the host; its linear layers are on the device afterwards.
        base: "int8" or "nf4".
        device: where every layer goes as it is quantised.
    """
    if base == "int8":
        from torchao.quantization import (  # type: ignore[import-not-found, unused-ignore]
            Int8WeightOnlyConfig,
            quantize_,
        )

        quantize_(network, Int8WeightOnlyConfig(), device=device)
        return
    import bitsandbytes as bnb  # type: ignore[import-not-found, unused-ignore]

    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, attribute = name.rpartition(".")
            new = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=layer.weight.dtype,
                quant_type="nf4",
            )  # fmt: skip
            new.weight = bnb.nn.Params4bit(layer.weight.detach(), requires_grad=False, quant_type="nf4")
            new.bias = layer.bias
            # bitsandbytes quantises when the weights arrive on the accelerator.
            setattr(network.get_submodule(parent), attribute, new.to(device))


def check_roles(roles: Mapping[str, Role], lora: Mapping[str, LoraSettings], memory: MemoryConfig, where: str) -> None:
    """Raises UserError for a role with weights of its own beside a quantised teacher, which it cannot start from."""
    if not memory.quantised:
        return
    for name, role in roles.items():
        if isinstance(role, Trained) and role.adapter is None and name not in lora:
            raise UserError(f"{where}: role {name!r} is trained with all its weights, which cannot start from "
                            f"a teacher in {memory.base}; train it as a LoRA, or use base: bf16")  # fmt: skip


def prepare_cast(cast: Cast, recipe: Recipe) -> dict[str, int]:
    """What is done to the networks of a stage, once it has them => attention kernels seen, where one was chosen."""
    memory = recipe.memory
    networks = cast.networks()
    xformers = recipe.attention == "xformers" and usable_xformers(cast.family.device)
    for network in networks.values():
        if memory.channels_last:
            network.to(memory_format=torch.channels_last)
        if xformers:
            use_xformers(network)
    seen = {}
    if recipe.attention != "auto":
        choice = "sdpa" if recipe.attention == "xformers" and not xformers else recipe.attention
        seen = probe(one_pass(cast.family, recipe), choice, type(cast.family.network()).__name__)
    if memory.compile:
        compile_networks(cast, memory.compile)
    return seen


def one_pass(family: ModelFamily, recipe: Recipe) -> Callable[[], object]:
    """One call of the teacher at the recipe's size and precision, for whoever wants to see what it runs."""
    device = family.device
    x = torch.zeros(1, *family.latent_shape(recipe.data.size), device=device)
    null = family.null_condition(1).to(device)
    t = torch.full((1,), 0.5, dtype=torch.float64, device=device)
    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    denoiser = family.denoiser()

    def work() -> object:
        dtype = types.get(recipe.precision)
        with torch.no_grad(), torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            return denoiser(x, t, null)

    return work


def compile_networks(cast: Cast, option: bool | str) -> None:
    """torch.compile of the blocks that a network is made of; with adapters, each adapter has a version of its own.

    Blocks and not whole networks, since a block is what activation checkpointing computes again: the recomputation
    then meets the same compiled code as the first pass.

    Raises:
        UserError: a guidance adapter listens inside of the blocks, or the network's class names no such blocks.
    """
    options: dict[str, Any] = {} if option is True else {"backend": option}
    for network in cast.networks().values():
        if adapters_of(network):
            raise UserError("memory.compile: an adapter beside the network listens inside of its blocks, which "
                            "compiled code does not call; use memory.compile=false")  # fmt: skip
        for block in blocks_of(network):
            block.compile(**options)
    for head in cast.heads():
        for network in cast.networks().values():
            for layer in head.layers:
                uncompile(network, layer)


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a network: those that its Diffusers class names, or else its transformer blocks.

    Raises:
        UserError: it has none.
    """
    model: Any = network
    named = model._repeated_blocks or ()  # of every Diffusers model, but only few fill it in
    found = [block for name, block in network.named_modules()
             if type(block).__name__ in named or (not named and BLOCKS.fullmatch(name))]  # fmt: skip
    if not found:
        raise UserError(f"memory.compile: {type(network).__name__} has no repeated blocks that could be compiled; use "
                        "memory.compile=false")  # fmt: skip
    return found


@contextmanager
def settings_of(recipe: Recipe) -> Iterator[None]:
    """Inside, torch's own switches are as the recipe says, and afterwards as they were."""
    before, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = recipe.memory.tf32  # torch's default allows it for convolutions alone
    if recipe.memory.tf32:
        torch.set_float32_matmul_precision("high")
    try:
        with chosen_attention(recipe.attention, alone=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = convolutions
