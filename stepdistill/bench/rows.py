"""Images that do not depend on what else is in their batch: every row computed alone, from its own randomness.

Letters: B rows of a batch.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def one_by_one(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, each module computes the rows of its batch one after the other.

    Libraries choose their kernels by the size of a batch, and sum in another order in each of them; a row that is
    computed alone has the same bits whatever it is called with. On small networks it takes three to four times longer.
    """
    with ExitStack() as undo:
        for module in modules:
            undo.enter_context(_replaced(module, "forward", functools.partial(_by_rows, module.forward)))
        yield


@contextmanager
def own_noise(scheduler: Any, generators: Sequence[torch.Generator]) -> Iterator[None]:
    """Inside, the scheduler draws each row's noise from that row's generator, also for pipelines that give it none."""
    step = scheduler.step
    if "generator" not in inspect.signature(step).parameters:
        yield
        return

    @functools.wraps(step)
    def with_generators(model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("generator") is None and len(model_output) == len(generators):
            kwargs["generator"] = list(generators)
        return step(model_output, *args, **kwargs)

    with _replaced(scheduler, "step", with_generators):
        yield


@contextmanager
def _replaced(thing: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Hides a method of one object behind another for as long as the context lasts."""
    before = vars(thing).get(name)
    setattr(thing, name, function)
    try:
        yield
    finally:
        if before is None:
            delattr(thing, name)
        else:
            setattr(thing, name, before)


def _by_rows(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    batch = next(len(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim)
    if batch == 1:
        return forward(*args, **kwargs)
    rows = [forward(*_row(args, i, batch), **_row(kwargs, i, batch)) for i in range(batch)]
    return _joined(rows)


def _row(value: Any, index: int, batch: int) -> Any:
    """Row `index` of every tensor that has B rows, as a batch of one; everything else as it is."""
    if isinstance(value, Tensor):
        # A copy, since kernels may also go by the alignment of memory.
        return value[index : index + 1].clone() if value.ndim and len(value) == batch else value
    if isinstance(value, Mapping):
        return {key: _row(item, index, batch) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_row(item, index, batch) for item in value)
    return value


def _joined(rows: Sequence[Any]) -> Any:
    """The outputs of B calls as that of one call."""
    first = rows[0]
    if isinstance(first, Tensor):
        return torch.cat(list(rows)) if first.ndim else first
    if isinstance(first, Mapping):  # which the outputs of Diffusers and Transformers are
        return type(first)(**{key: _joined([row[key] for row in rows]) for key in first})
    if isinstance(first, (tuple, list)):
        return type(first)(_joined([row[i] for row in rows]) for i in range(len(first)))
    return first
