"""What a denoiser is conditioned on, as one value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """Named batch-first tensors: prompt embeddings, masks, pooled embeddings, class labels, guidance scales.

    Attributes:
        tensors: by name; every tensor has the batch as its first dimension.
    """

    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        sizes = {name: len(tensor) for name, tensor in self.tensors.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"a condition's tensors must agree in batch size, got {sizes}")

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: Tensor | slice) -> Condition:
        """The rows that an integer tensor or a slice selects."""
        return self._map(lambda tensor: tensor[index])

    def to(self, *args: Any, **kwargs: Any) -> Condition:
        """Moves all tensors; a dtype applies to floating ones only, labels stay integers."""

        def move(tensor: Tensor) -> Tensor:
            if tensor.is_floating_point():
                return tensor.to(*args, **kwargs)
            device = kwargs.get("device", next((a for a in args if isinstance(a, str | torch.device)), None))
            return tensor if device is None else tensor.to(device)

        return self._map(move)

    def where(self, mask: Tensor, other: Condition) -> Condition:
        """This condition where `mask` of shape (B,) is True, `other` elsewhere: prompt dropout."""

        def pick(name: str, mine: Tensor) -> Tensor:
            return torch.where(mask.reshape((-1,) + (1,) * (mine.ndim - 1)), mine, other.tensors[name])

        return Condition({name: pick(name, tensor) for name, tensor in self.tensors.items()})

    def with_guidance(self, scale: float | Tensor) -> Condition:
        """The same with a guidance scale, for networks that take it as an input.

        In float64: networks see 1000 times the scale through sines, where the rounding of float32 would show.

        Args:
            scale: standard scale (1 = no guidance), one for all rows or (B,).
        """
        device = next(iter(self.tensors.values())).device
        rows = torch.as_tensor(scale, dtype=torch.float64, device=device).expand(len(self))
        return Condition({**self.tensors, "guidance": rows})

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """Stacks conditions along the batch, for example for one guided call."""
        return Condition({name: torch.cat([p.tensors[name] for p in parts]) for name in parts[0].tensors})

    def _map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        return Condition({name: function(tensor) for name, tensor in self.tensors.items()})
