"""Optimiser states that wait in the host's memory while their role is not stepping."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def offload_states(optimizer: torch.optim.Optimizer, device: torch.device | str = "cpu") -> None:
    """From now on the optimiser's states are beside its parameters during a step only; the updates are the same bits.

    By torch's own hooks, so that it works with any optimiser class that keeps its states in `state`.

    Args:
        optimizer: may have states already.
        device: where they wait.
    """

    def fetch(optimizer: Any, args: Any, kwargs: Any) -> None:
        _move(optimizer, None)

    def put_away(optimizer: Any, *_: Any) -> None:
        _move(optimizer, torch.device(device))

    optimizer.register_step_pre_hook(fetch)
    optimizer.register_step_post_hook(put_away)
    optimizer.register_load_state_dict_post_hook(put_away)
    put_away(optimizer)


def _move(optimizer: torch.optim.Optimizer, device: torch.device | None) -> None:
    """Moves states to a device, or to their parameters for None."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            # Counters of steps are single numbers that torch keeps where it wants to read them.
            if isinstance(value, Tensor) and value.ndim > 0:
                state[name] = value.to(parameter.device if device is None else device)
