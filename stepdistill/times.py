"""Where on the noise path a loss is evaluated: densities of t."""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.schedule import NoiseSchedule, VPSchedule


def uniform_times(schedule: NoiseSchedule, count: int, *, low: float, high: float, device: torch.device) -> Tensor:
    """Uniform times between the fractions `low` and `high` of the schedule, (count,), float64.

    A VP network has learnt integer timesteps only, so for it the index is drawn: from round(low T) to round(high T)
    inclusive (0.02, 0.98 => 20 ... 980 as in DMD2's code), never beyond T - 1.
    """
    if isinstance(schedule, VPSchedule):
        total = schedule.num_train_timesteps
        first, last = round(low * total), min(round(high * total), total - 1)
        return schedule.t_from_model_time(torch.randint(first, last + 1, (count,), device=device))
    return low + (high - low) * torch.rand(count, dtype=torch.float64, device=device)


def grid(schedule: NoiseSchedule, timesteps: tuple[int, ...], device: torch.device) -> Tensor:
    """Diffusers timestep indices => times, (N,), float64."""
    return schedule.t_from_model_time(torch.tensor(timesteps, dtype=torch.float64, device=device))
