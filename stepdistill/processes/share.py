"""A recipe's batch, divided among processes, so that their number changes the speed and not the result.

Processes form groups. Every group plays micro-batches of its own (gradient accumulation, side by side), and within a
group each process plays a slice of the micro-batch:

    rank => (group, part);  micro-batch m of a phase => group m mod groups;  its samples => parts, in order
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stepdistill.errors import UserError


@dataclass(frozen=True)
class Share:
    """What one of several processes plays of every phase.

    Attributes:
        batch_size: samples per micro-batch of this process.
        accumulate: micro-batches of this process per update.
        groups: how many micro-batches all processes play at the same time.
    """

    batch_size: int
    accumulate: int
    groups: int = 1


def divide(batch_size: int, accumulate: int, num_processes: int, where: str, *, whole: bool = False) -> Share:
    """Divides accumulate micro-batches of batch_size samples evenly: first the micro-batches, then their samples.

    In that order because a micro-batch is what fits into one device.

    Args:
        batch_size: of the recipe.
        accumulate: of the recipe.
        num_processes: of all machines together.
        where: the recipe's stage, for the error.
        whole: all processes play the same micro-batches, as divided networks need: what a micro-batch does may depend
            on its number, and processes that share a network have to call it equally often.

    Raises:
        UserError: it cannot be done evenly.
    """
    groups = 1 if whole else gcd(num_processes, accumulate)
    parts = num_processes // groups
    if batch_size % parts == 0:
        return Share(batch_size // parts, accumulate // groups, groups)
    total = batch_size * accumulate
    fits = max(n for n in range(1, num_processes + 1) if batch_size % (n // (1 if whole else gcd(n, accumulate))) == 0)
    remedy = f"use {fits} processes"
    if total % num_processes == 0:
        remedy += f", or batch_size: {num_processes} with accumulate: {total // num_processes}, which is as much"
    raise UserError(f"{where}: batch_size {batch_size} with accumulate {accumulate} cannot be divided among "
                    f"{num_processes} processes; {remedy}")  # fmt: skip


LIKE = (torch.randn_like, torch.rand_like, torch.randint_like, torch.bernoulli)
IN_PLACE = (
    torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.exponential_, torch.Tensor.log_normal_,
    torch.Tensor.bernoulli_, torch.Tensor.random_,
)  # fmt: skip


class SlicedDraws(TorchFunctionMode):
    """Inside, torch's random numbers are drawn for all parts of a micro-batch, and this process gets its own rows.

    All processes draw the same numbers, from generators of one seed, so together they play exactly what one process
    would. An objective needs not know: a random tensor whose first dimension is the rows of the batch, or a multiple
    of them, is drawn for the whole micro-batch. Another first dimension is enlarged and cut in order, which is as much
    randomness and not the same numbers. Scalars, single rows for a batch of several and numbers of an own
    generator are the same on all processes. Parameters are never touched.

    Args:
        rows: of this process's micro-batch.
        part: which of the parts this process is, from 0.
        parts: how many there are.
    """

    def __init__(self, rows: int, part: int, parts: int) -> None:
        super().__init__()
        self._rows, self._part, self._parts = rows, part, parts

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if options.get("generator") is not None or options.get("out") is not None:
            return func(*args, **options)
        if func in (torch.randn, torch.rand):
            return self._sized(func, args, options)
        if func is torch.randint:
            return self._integers(args, options)
        if func is torch.multinomial and args[0].ndim == 1:
            return self._drawn(args[1], lambda count: func(args[0], count, *args[2:], **options))
        if func in LIKE and args[0].ndim > 0:
            return self._drawn(len(args[0]), lambda count: func(self._enlarged(args[0], count), *args[1:], **options))
        if func in IN_PLACE and args[0].ndim > 0 and not isinstance(args[0], nn.Parameter):
            new = self._drawn(len(args[0]), lambda count: func(self._enlarged(args[0], count), *args[1:], **options))
            return args[0].copy_(new)
        return func(*args, **options)

    def _sized(self, func: Callable[..., Tensor], args: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
        """torch.randn and torch.rand, which take a size as one argument or as several."""
        size = options.pop("size", None) or (args[0] if args and not isinstance(args[0], int) else args)
        if len(size) == 0:
            return func(*args, **options)
        return self._drawn(size[0], lambda count: func((count, *size[1:]), **options))

    def _integers(self, args: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
        """torch.randint, whose size follows one bound or two."""
        size = options.pop("size") if "size" in options else args[-1]
        bounds = args[:-1] if args and size is args[-1] else args
        randint: Callable[..., Tensor] = torch.randint
        if len(size) == 0:
            return randint(*bounds, size=size, **options)
        return self._drawn(size[0], lambda count: randint(*bounds, size=(count, *size[1:]), **options))

    def _enlarged(self, example: Tensor, count: int) -> Tensor:
        """A tensor like the example, of so many rows: of the same values, over and over.

        Its dimensions lie in memory in the same order, in which random numbers are filled in.
        """
        larger = torch.cat([example.detach()] * (count // len(example)))
        order = sorted(range(example.ndim), key=example.stride, reverse=True)
        back = sorted(range(example.ndim), key=order.__getitem__)
        return larger.permute(order).contiguous().permute(back)

    def _drawn(self, lead: int, draw: Callable[[int], Tensor]) -> Tensor:
        """Draws for all parts => this process's rows, (lead, ...)."""
        if lead == 0 or (lead == 1 and self._rows > 1):
            return draw(lead)
        everything = draw(lead * self._parts)
        if lead % self._rows == 0:  # several blocks of the batch's rows, such as for both halves of a guided call
            blocks = everything.reshape(-1, self._parts, self._rows, *everything.shape[1:])
            return blocks[:, self._part].flatten(0, 1)
        return everything[self._part * lead : (self._part + 1) * lead]
