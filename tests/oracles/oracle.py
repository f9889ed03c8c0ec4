"""Analytic teachers: exact denoisers of Gaussians and mixtures, and linear students whose score is known.

Formulas: for data N(m, s^2) and x_t = alpha x0 + sigma eps, v = alpha^2 s^2 + sigma^2,
    score = -(x_t - alpha m) / v,   eps = sigma (x_t - alpha m) / v,   x0 = m + alpha s^2 (x_t - alpha m) / v.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from stepdistill.condition import Condition
from stepdistill.denoiser import Denoiser, OwnWeights
from stepdistill.objectives.base import Batch
from stepdistill.schedule import NoiseSchedule, VPSchedule


# alpha = 0.8 and sigma = 0.6 at index 1 of three
SCHEDULE = VPSchedule(torch.tensor([0.9, 0.64, 0.01], dtype=torch.float64))
AT_08 = (1 / 3, 1 / 3)  # t_min, t_max that pick index 1 only


def shaped(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape((-1,) + (1,) * (like.ndim - 1))


def gaussian(mean: Callable[[Condition], Tensor], std: float, schedule: NoiseSchedule = SCHEDULE) -> Denoiser:
    """The exact epsilon-denoiser of N(mean(condition), std^2) per element."""

    def call(network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        t = schedule.t_from_model_time(model_time)
        alpha, sigma = shaped(schedule.alpha(t), x_t), shaped(schedule.sigma(t), x_t)
        m = shaped(mean(condition), x_t)
        return sigma * (x_t - alpha * m) / (alpha**2 * std**2 + sigma**2)

    return Denoiser(call, OwnWeights(nn.Module()), schedule, "epsilon")


def mixture(weights: Tensor, means: Tensor, std: float, schedule: NoiseSchedule = SCHEDULE) -> Denoiser:
    """The exact epsilon-denoiser of a mixture of isotropic Gaussians; weights (K,), means (K, D), x_t (B, D)."""

    def call(network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        t = schedule.t_from_model_time(model_time)
        alpha, sigma = schedule.alpha(t).to(x_t)[:, None], schedule.sigma(t).to(x_t)[:, None]
        v = alpha**2 * std**2 + sigma**2
        offsets = x_t[:, None] - alpha[:, None] * means.to(x_t)  # (B, K, D)
        logits = weights.to(x_t).log() - offsets.square().sum(-1) / (2 * v)
        responsibility = logits.softmax(-1)
        return sigma * (responsibility[..., None] * offsets).sum(1) / v

    return Denoiser(call, OwnWeights(nn.Module()), schedule, "epsilon")


class Linear(nn.Module):
    """x = a z + b."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor(b, dtype=torch.float64))


def linear_student(network: Linear, schedule: NoiseSchedule = SCHEDULE) -> Denoiser:
    """A one-step student that maps its input z to a z + b, whatever the time."""

    def call(module: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        return module.a * x_t + module.b

    view = Denoiser(call, OwnWeights(network), schedule, "sample")
    network.requires_grad_(True)
    return view


class Roles:
    """Stands in for a Cast: denoisers by role."""

    def __init__(self, denoisers: Mapping[str, Denoiser]) -> None:
        self._denoisers = denoisers

    def denoiser(self, role: str, *, renamed: bool = True) -> Denoiser:
        return self._denoisers[role]


class GivenNoise(Batch):
    """A batch whose noise is chosen by the test."""

    z: Tensor

    def noise(self) -> Tensor:
        return self.z


def batch_of(z: Tensor, label: float = 0.0, null: float = 0.0) -> GivenNoise:
    """A batch with z as its noise and one label for all rows."""
    rows = torch.full((len(z),), label, dtype=z.dtype)
    nulls = torch.full((len(z),), null, dtype=z.dtype)
    batch = GivenNoise(Condition({"label": rows}), Condition({"label": nulls}), tuple(z.shape[1:]), z.device)
    object.__setattr__(batch, "z", z)
    return batch


def constant(value: float) -> Callable[[Condition], Tensor]:
    """A mean that is the same for all conditions."""
    return lambda condition: torch.full((len(condition),), value, dtype=torch.float64)


def label(condition: Condition) -> Tensor:
    return condition.tensors["label"]


def four_signs() -> tuple[Tensor, Tensor]:
    """(z, eps) in {-1, 1}^2, each (4, 1): a quadratic function has the same mean over them as over N(0, 1)."""
    z = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)[:, None]
    eps = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)[:, None]
    return z, eps
