"""Which kernel computes attention: chosen by one word, and checked by what a profiled pass really ran.

Diffusers' own switch, `set_attention_backend`, says nothing and does nothing on classes whose processors call torch's
scaled_dot_product_attention themselves (UNets, DiT, SD3, PixArt, Sana). So torch's kernels are chosen by torch's own
context, xformers by the processors, and neither is believed before a pass has been looked at.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from stepdistill.errors import UserError, first_line
from stepdistill.resources.config import Attention


# What torch's dispatcher calls the kernels => our word; the profiler sees these names on every device.
OPERATORS: Mapping[str, str] = {
    "aten::_scaled_dot_product_flash_attention": "flash",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "flash",
    "aten::_scaled_dot_product_efficient_attention": "efficient",
    "aten::_scaled_dot_product_cudnn_attention": "cudnn",
    "aten::_scaled_dot_product_attention_math": "math",
    "aten::_scaled_dot_product_attention_math_for_mps": "math",
}
# Kernels that xformers calls by torch's own names => what else calls them, in torch.
WITHIN: Mapping[str, str] = {
    "aten::_efficient_attention_forward": "aten::_scaled_dot_product_efficient_attention",
    "aten::_flash_attention_forward": "aten::_scaled_dot_product_flash_attention",
}
BACKENDS: Mapping[str, SDPBackend] = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# What stands in for a kernel where it cannot compute, in torch's own order.
NEXT: Mapping[str, tuple[str, ...]] = {"flash": ("efficient", "math"), "efficient": ("math",), "math": ()}
ALLOWED: Mapping[str, tuple[str, ...]] = {
    "sdpa": ("flash", "efficient", "cudnn", "math"),
    "flash": ("flash",),
    "efficient": ("efficient",),
    "xformers": ("xformers",),
    "math": ("math",),
}


def kernels_of(work: Callable[[], object]) -> dict[str, int]:
    """Runs something under the profiler => how often each kind of attention kernel ran, by our words.

    "plain" counts softmaxes outside of any of them: attention written out, or sliced.
    """
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, acc_events=True) as seen:
        work()
    counts: Counter[str] = Counter()
    ran = {event.key: event.count for event in seen.key_averages()}
    for key, number in ran.items():
        if key in OPERATORS:
            counts[OPERATORS[key]] += number
        elif key.startswith("xformers") and ("forward" in key or "fwd" in key):
            counts["xformers"] += number
    direct = sum(max(ran.get(kernel, 0) - ran.get(caller, 0), 0) for kernel, caller in WITHIN.items())
    counts["xformers"] = max(counts["xformers"], direct)  # its own operators may call these in turn
    plain = ran.get("aten::_softmax", 0) - counts["math"]  # each of these has one within
    if plain > 0:
        counts["plain"] = plain
    return {kind: number for kind, number in sorted(counts.items()) if number}


@contextmanager
def chosen_attention(choice: Attention, *, alone: bool = True) -> Iterator[None]:
    """Inside, torch's attention takes the chosen kernel; auto, sdpa and xformers leave it to torch.

    Args:
        choice: of the recipe.
        alone: nothing stands in for it. Not while training: text encoders in float32 and autoencoders with wide heads,
            which the choice is not about, may need another.
    """
    if choice not in BACKENDS:
        yield
        return
    others = () if alone else NEXT[choice]
    with sdpa_kernel([BACKENDS[name] for name in (choice, *others)]):
        yield


def check_kernels(seen: Mapping[str, int], choice: Attention, network: str) -> None:
    """Raises UserError if anything but the choice ran, or nothing at all; auto allows everything."""
    if choice == "auto":
        return
    others = {kind: number for kind, number in seen.items() if kind not in ALLOWED[choice]}
    if not seen:
        raise UserError(f"attention: {choice} was asked for, but a pass of {network} came by no attention kernel; "
                        "use attention: auto")  # fmt: skip
    if others:
        told = ", ".join(f"{kind} {number} times" for kind, number in seen.items())
        raise UserError(f"attention: {choice} was asked for, but a pass of {network} ran {told}; use attention: auto")


def probe(work: Callable[[], object], choice: Attention, network: str) -> dict[str, int]:
    """A pass under the choice => the kernels that ran.

    Args:
        work: one network pass.
        choice: of the recipe.
        network: how errors call it.

    Raises:
        UserError: the kernel cannot compute this pass here, or another one did.
    """
    try:
        with chosen_attention(choice):
            seen = kernels_of(work)
    except RuntimeError as error:
        if choice not in BACKENDS:
            raise
        raise UserError(f"attention: {choice} cannot compute {network} on this device in this precision "
                        f"({first_line(error)}); use attention: auto or sdpa") from error  # fmt: skip
    check_kernels(seen, choice, network)
    return seen


def usable_xformers(device: torch.device | str, attempt: Callable[[], object] | None = None) -> bool:
    """Whether xformers can do what it is installed for; if not, says so in one warning.

    Args:
        device: where it is to compute.
        attempt: computes a small attention with it; None: xformers' own function in half precision.

    Raises:
        UserError: it is not installed at all.
    """
    if attempt is None and find_spec("xformers") is None:
        raise UserError("attention: xformers is not installed; pip install 'stepdistill[xformers]', or use "
                        "attention: auto")  # fmt: skip
    try:
        (attempt or (lambda: _try_xformers(device)))()
    except Exception as error:  # whatever a broken build of it raises, training goes on without it
        text = (
            f"xformers is installed but cannot compute attention here ({first_line(error)}); torch's attention is used"
        )
        warnings.warn(text, RuntimeWarning, stacklevel=2)
        return False
    return True


def _try_xformers(device: torch.device | str) -> None:
    from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found, unused-ignore]

    x = torch.zeros(1, 64, 1, 64, dtype=torch.float16, device=device)
    memory_efficient_attention(x, x, x)


def use_xformers(network: nn.Module) -> None:
    """Puts xformers' processors into a Diffusers network."""
    model: Any = network
    model.enable_xformers_memory_efficient_attention()
