"""What this machine has and what really runs on it: versions, devices, and the attention kernels that were seen."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import get_args

import torch
from torch.nn.functional import scaled_dot_product_attention

from stepdistill.errors import UserError, first_line
from stepdistill.resources.attention import probe, usable_xformers
from stepdistill.resources.config import Attention


PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "xformers", "bitsandbytes",
            "torchao")  # fmt: skip
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, and what was found.

    Attributes:
        good: whether it is as one would wish; None: a mere fact.
    """

    what: str
    found: str
    good: bool | None = None


def examine(device: str, precision: str = "bf16") -> Iterator[Finding]:
    """Looks at one device.

    Args:
        device: of torch.
        precision: in which attention is tried: fp32, bf16 or fp16.
    """
    yield Finding("python", platform.python_version())
    for package in PACKAGES:
        yield Finding(package, _version(package))
    yield from _device(device)
    yield from attention_findings(device, precision)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _device(device: str) -> Iterator[Finding]:
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        free, _ = torch.cuda.mem_get_info(device)
        size = f"{properties.total_memory / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free"
        yield Finding("device", f"{properties.name}, {size}")
        yield Finding("bf16", "yes" if torch.cuda.is_bf16_supported() else "no", torch.cuda.is_bf16_supported())
    else:
        yield Finding("device", f"{device}, {torch.get_num_threads()} threads", None)
    built = torch.version.cuda is not None
    if built and not torch.cuda.is_available():
        yield Finding("cuda", f"torch is built for CUDA {torch.version.cuda} but sees no device", False)


def attention_findings(device: str, precision: str) -> Iterator[Finding]:
    """Every choice of the recipe key `attention`, tried on a small attention with a gradient: what really ran."""
    small = _small_attention(device, TYPES[precision])
    for choice in get_args(Attention):
        name = f"attention: {choice}"
        if choice == "xformers":
            yield _xformers(device, name)
            continue
        try:
            seen = probe(small, choice, "a small attention")
        except UserError as error:
            yield Finding(name, first_line(error), False)
        else:
            yield Finding(name, ", ".join(seen) + " ran", True)


def _small_attention(device: str, dtype: torch.dtype) -> Callable[[], object]:
    q = torch.randn(1, 2, 64, 64, device=device, dtype=dtype, requires_grad=True)

    def work() -> object:
        return scaled_dot_product_attention(q, q, q).float().sum().backward()  # type: ignore[no-untyped-call]

    return work


def _xformers(device: str, name: str) -> Finding:
    if find_spec("xformers") is None:
        return Finding(name, "not installed")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        usable = usable_xformers(device)
    return Finding(name, "works" if usable else str(told[-1].message), usable)


def kernels_of_recipe(path: str, overrides: list[str], device: str) -> Iterator[Finding]:
    """Loads a recipe's teacher and looks at one of its passes under the recipe's choice.

    Raises:
        UserError: the recipe is wrong, or its choice is not what ran.
    """
    from stepdistill.recipe import Recipe
    from stepdistill.resources.apply import check_options, one_pass, open_teacher
    from stepdistill.resources.attention import use_xformers

    recipe = Recipe.load(path, overrides)
    check_options(recipe)
    family = open_teacher(recipe, device)
    choice = recipe.attention
    if choice == "xformers" and not usable_xformers(device):
        choice = "sdpa"
    elif choice == "xformers":
        use_xformers(family.network())
    name = type(family.network()).__name__
    seen = probe(one_pass(family, recipe), choice, name)
    told = ", ".join(f"{kind} {number} times" for kind, number in seen.items()) or "no attention kernel"
    yield Finding(f"{name}, attention: {recipe.attention}", f"{told} in a pass", True)
