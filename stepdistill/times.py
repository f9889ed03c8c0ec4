"""Where on the noise path a loss is evaluated: densities of t."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.schedule import NoiseSchedule, VPSchedule


LogNoise = tuple[float, float]  # mean and deviation of a normal density of log(sigma / alpha)


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


def times_between(schedule: NoiseSchedule, low: Tensor, high: Tensor) -> Tensor:
    """Uniform times in [low, high), both (B,) and float64; for a VP network, timesteps that it has learnt."""
    t = low + (high - low) * torch.rand_like(low)
    if isinstance(schedule, VPSchedule):
        return schedule.t_from_model_time(schedule.model_time(t).floor())
    return t


def log_noise_times(schedule: NoiseSchedule, count: int, *, mean: float, std: float, device: torch.device) -> Tensor:
    """Times at which log(sigma / alpha) is normal, (count,), float64: EDM's density (Karras et al. 2022, table 1).

    For a flow, sigma = sigmoid(n) with n normal. For a VP network, the nearest of the timesteps that it has learnt.
    """
    n = mean + std * torch.randn(count, dtype=torch.float64, device=device)
    t = schedule.t_from_log_snr(-2 * n)
    if isinstance(schedule, VPSchedule):
        return schedule.t_from_model_time(schedule.model_time(t).round())
    return t


def drawn_times(
    schedule: NoiseSchedule, count: int, *, low: float, high: float, log_noise: LogNoise | None, device: torch.device
) -> Tensor:
    """Times of a loss, (count,), float64: uniform between two fractions, or of a normal density in their place."""
    if log_noise is None:
        return uniform_times(schedule, count, low=low, high=high, device=device)
    mean, std = log_noise
    return log_noise_times(schedule, count, mean=mean, std=std, device=device)


def trailing(schedule: NoiseSchedule, steps: int) -> tuple[int, ...]:
    """Evenly spaced Diffusers indices that begin at the last one: 25 of 1000 => 999, 959 ... 39."""
    total = schedule.num_train_timesteps
    return tuple(round(total * (1 - i / steps)) - 1 for i in range(steps))


def grid(schedule: NoiseSchedule, timesteps: tuple[int, ...], device: torch.device) -> Tensor:
    """Indices of training timesteps => times, (N,), float64: index i of n lies at t = (i + 1) / n.

    The last index is pure noise, for flow-matching teachers too: 749 of 1000 is t = 0.75 for all, which a flow with
    shift 1 is told as 1000 sigma = 750.
    A later index than the last means the last; `check_timesteps` refuses it before a run begins.
    """
    at = (torch.tensor(timesteps, dtype=torch.float64, device=device) + 1) / schedule.num_train_timesteps
    return at.clamp(max=1.0)


def check_timesteps(schedule: NoiseSchedule, timesteps: Sequence[int]) -> None:
    """Raises UserError for an index that is not in a teacher's table of timesteps."""
    total = schedule.num_train_timesteps
    outside = [index for index in timesteps if not 0 <= index < total]
    if outside:
        raise UserError(f"timestep {outside[0]} is none of this teacher's: they go from 0 to {total - 1}, which is "
                        "pure noise (for flow-matching teachers too)")  # fmt: skip
