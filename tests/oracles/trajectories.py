"""What the tests of trajectory consistency share: students that are a number per time, and exact batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepdistill.condition import Condition
from stepdistill.denoiser import Denoiser, OwnWeights
from stepdistill.prediction import Levels, native_target
from stepdistill.schedule import FlowSchedule, NoiseSchedule, VPSchedule
from tests.oracles.oracle import GivenNoise, batch_of


STD = 0.7
VP = VPSchedule(torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0))
FLOW = FlowSchedule(3.0)


class Table(nn.Module):
    """eps = e_k x at the k-th time of the solver's grid."""

    def __init__(self, steps: int, fill: float = 0.0) -> None:
        super().__init__()
        self.e = nn.Parameter(torch.full((steps + 1,), fill, dtype=torch.float64))


def tabled(table: Table, schedule: NoiseSchedule = VP) -> Denoiser:
    """The view of a table as a network that predicts noise."""

    def call(module: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        steps = len(module.e) - 1
        k = (schedule.t_from_model_time(model_time) * steps).round().long()
        return module.e[k].reshape((-1,) + (1,) * (x_t.ndim - 1)) * x_t

    denoiser = Denoiser(call, OwnWeights(table), schedule, "epsilon")
    table.requires_grad_(True)
    return denoiser


def point(mean: float, schedule: NoiseSchedule, kind: str) -> Denoiser:
    """The exact denoiser of data that are one point, whose paths are straight; it is not defined at time 0."""

    def call(network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        levels = Levels.at(schedule, schedule.t_from_model_time(model_time), x_t)
        x0 = torch.full_like(x_t, mean)
        return native_target(kind, x0, (x_t - levels.alpha * x0) / levels.sigma, levels)

    return Denoiser(call, OwnWeights(nn.Module()), schedule, kind)


def images(x0: Tensor, noise: Tensor, label: float = 0.0, null: float = 0.0) -> GivenNoise:
    """A batch of the images stream with given latents and noise, both (B, ...)."""
    batch = batch_of(noise, label, null)
    object.__setattr__(batch, "latents", x0)
    return batch


def slope(start: Levels, end: Levels, std: float = STD) -> Tensor:
    """By what one DDIM step of the exact denoiser of N(0, std^2) multiplies x."""
    variance = start.alpha**2 * std**2 + start.sigma**2
    return (end.alpha * start.alpha * std**2 + end.sigma * start.sigma) / variance
