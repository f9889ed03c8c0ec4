"""What stands in the place of data and processes while a training is played without values."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stepdistill.objectives.base import Batch, Visited


if TYPE_CHECKING:
    from stepdistill.families.base import ModelFamily


@dataclass
class ShapedBatches:
    """Micro-batches of the right shapes for every stream."""

    family: ModelFamily
    size: int | None
    drawn: dict[str, int] = field(default_factory=dict)

    def next(self, stream: str, count: int, groups: int = 1) -> Batch:
        """As `Batches.next`."""
        rows = torch.zeros(count, dtype=torch.long)
        shape = self.family.latent_shape(self.size)
        # "0" is a prompt like another, and a class of class-conditional teachers.
        condition = self.family.encode_prompts(["0"])[rows]
        null = self.family.null_condition(1)[rows]
        stored = stream in ("images", "pairs")
        visited = None
        if stream == "states":
            x, times = torch.randn(count, *shape), torch.rand(count, dtype=torch.float64)
            visited = Visited(x, times, torch.ones(count, dtype=torch.float64), x.clone())
        latents = torch.randn(count, *shape) if stored else None
        noise = torch.randn(count, *shape) if stream == "pairs" else None
        device, prompts = torch.device("cpu"), ("0",) * count
        return Batch(condition, null, shape, device, latents, prompts, noise, visited=visited)


class ShapedPrecision:
    """What a trainer and its players ask an accelerator for, on the first of so many processes."""

    scaler = None
    process_index, is_main_process = 0, True
    device = torch.device("cpu")

    def __init__(self, precision: str, num_processes: int = 1) -> None:
        self._half = precision != "fp32"
        self.num_processes = num_processes

    def autocast(self, handler: Any = None) -> AbstractContextManager[Any]:
        # Both half types are of the same size, and the CPU's autocast knows bf16 best.
        return torch.autocast("cpu", torch.bfloat16, enabled=self._half, cache_enabled=False)

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def reduce(self, tensor: Tensor, reduction: str = "mean") -> Tensor:
        return tensor.clone()  # as accelerate does
