"""What making images costs, seen from hooks: network calls, and seconds of text encoders, denoiser and decoder."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stepdistill.errors import UserError


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PARTS = ("text", "denoiser", "vae")


class Meter:
    """Counts rows that go through a denoiser, and the seconds of each part of a pipeline.

    On an accelerator the clock is read from events, which do not make the host wait between the calls.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.rows = 0
        self._open: list[Any] = []
        self._spans: list[tuple[str, Any, Any]] = []

    def now(self) -> float:
        """Seconds, with all work on the device done."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def take(self) -> dict[str, float]:
        """Seconds of each of `PARTS` since the last time."""
        self.now()
        spent = dict.fromkeys(PARTS, 0.0)
        for part, begin, end in self._spans:
            spent[part] += end - begin if isinstance(end, float) else begin.elapsed_time(end) / 1000
        self._spans.clear()
        return spent

    def count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook of a denoiser: a batch of 2B counts 2B calls, which is what guidance costs."""
        sample = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        if not isinstance(sample, Tensor):
            raise TypeError(f"cannot count calls of {type(module).__name__}: no argument sample or hidden_states")
        self.rows += len(sample)

    def begins(self, *_: Any) -> None:
        """Forward pre-hook of a part."""
        self._open.append(self._mark())

    def ends(self, part: str, *_: Any) -> None:
        """Forward hook of a part."""
        self._spans.append((part, self._open.pop(), self._mark()))

    def _mark(self) -> Any:
        if not self.device.startswith("cuda"):
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event


def denoisers(pipeline: DiffusionPipeline) -> list[nn.Module]:
    """The networks whose calls are the cost of sampling.

    Raises:
        UserError: there is none.
    """
    parts = pipeline.components.items()
    found = [part for name, part in parts if name.startswith(("unet", "transformer")) and isinstance(part, nn.Module)]
    if not found:
        raise UserError(f"{type(pipeline).__name__} has neither unet nor transformer, so its calls cannot be counted")
    return found


def timed_parts(pipeline: DiffusionPipeline) -> list[tuple[str, nn.Module]]:
    """(one of `PARTS`, module) of everything in a pipeline that computes while it is called."""
    parts = [("denoiser", part) for part in denoisers(pipeline)]
    for name, part in pipeline.components.items():
        if name.startswith("text_encoder") and isinstance(part, nn.Module):
            parts.append(("text", part))
        if name == "vae" and isinstance(part, nn.Module):
            parts.append(("vae", part.get_submodule("decoder")))  # pipelines call decode(), which no hook sees
    return parts


@contextmanager
def metered(pipeline: DiffusionPipeline) -> Iterator[Meter]:
    """Hooks a meter into a pipeline for as long as the context lasts."""
    meter = Meter(str(pipeline.device))
    handles = [part.register_forward_hook(meter.count, with_kwargs=True) for part in denoisers(pipeline)]
    for name, part in timed_parts(pipeline):
        handles.append(part.register_forward_pre_hook(meter.begins))
        handles.append(part.register_forward_hook(functools.partial(meter.ends, name)))
    try:
        yield meter
    finally:
        for handle in handles:
            handle.remove()
