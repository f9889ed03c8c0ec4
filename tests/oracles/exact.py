"""Gaussians whose denoisers are exact at both ends of time too, in whatever way they say it; levels as numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from stepdistill.condition import Condition
from stepdistill.denoiser import Denoiser, OwnWeights
from stepdistill.prediction import Levels, native_target
from stepdistill.schedule import NoiseSchedule
from tests.oracles.oracle import shaped
from tests.oracles.trajectories import FLOW, VP


TEACHERS: list[tuple[NoiseSchedule, str]] = [(VP, "epsilon"), (VP, "v_prediction"), (FLOW, "flow")]


def exact(schedule: NoiseSchedule, kind: str, mean: Callable[[Condition], Tensor], std: float) -> Denoiser:
    """The exact denoiser of N(mean(condition), std^2) per element."""

    def call(network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        levels = Levels.at(schedule, schedule.t_from_model_time(model_time), x_t)
        m = shaped(mean(condition), x_t)
        off = (x_t - levels.alpha * m) / (levels.alpha**2 * std**2 + levels.sigma**2)
        return native_target(kind, m + levels.alpha * std**2 * off, levels.sigma * off, levels)

    return Denoiser(call, OwnWeights(nn.Module()), schedule, kind)


def level(schedule: NoiseSchedule, t: float) -> Levels:
    """The levels at one time, as (1, 1)."""
    return Levels.at(schedule, torch.tensor([t], dtype=torch.float64), torch.zeros(1, 1))


def times_of(*values: float) -> Tensor:
    """Times as a tensor."""
    return torch.tensor(values, dtype=torch.float64)
