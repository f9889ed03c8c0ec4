"""Plain denoising: trains a diffusion model on images. Ho et al. 2020 (DDPM), eq. 14, for any parameterisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.losses import min_snr_weight, weighted_mse
from stepdistill.objectives.base import Batch, InferenceSpec, Loss, Phase, Role, Step, Trained
from stepdistill.objectives.checks import check_share, check_times
from stepdistill.prediction import Levels, add_noise, native_target
from stepdistill.schedule import NoiseSchedule
from stepdistill.times import log_noise_times, uniform_times


if TYPE_CHECKING:
    from stepdistill.cast import Cast


@dataclass(frozen=True)
class Denoising:
    """Squared error of the network's native output at a random time, with prompt dropout.

    Attributes:
        min_snr_gamma: Min-SNR weighting (Hang et al. 2023); None leaves the native error unweighted.
        condition_dropout: share of prompts replaced by the null condition, so that guidance can be used later.
        times: density of the time. "uniform" between t_min and t_max. "logit_normal": log(sigma / alpha) is normal,
            which for a flow is the logit of sigma (Esser et al. 2024, arXiv 2403.03206, section 3.1) and for other
            networks the density of EDM (Karras et al. 2022, table 1).
        t_min: lowest uniform time, as a fraction of the schedule.
        t_max: highest.
        mean: of the logit; above 0 there is more training on noisy samples.
        std: of the logit.
    """

    min_snr_gamma: float | None = None
    condition_dropout: float = 0.1
    times: Literal["uniform", "logit_normal"] = "uniform"
    t_min: float = 0.0
    t_max: float = 1.0
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        check_times(self.t_min, self.t_max)
        check_share("condition_dropout", self.condition_dropout)
        if not self.std > 0:
            raise UserError(f"std is {self.std}; it must be above 0, and 1 is usual")

    def roles(self) -> Mapping[str, Role]:
        return {"student": Trained()}

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("student", ("student",), self.loss, stream="images"),)

    def after_step(self, cast: Cast, step: int) -> None:
        return None

    def inference(self) -> InferenceSpec | None:
        return None

    def loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """|network(x_t) - target|^2 on encoded images."""
        student = cast.denoiser("student")
        x0 = batch.latents
        assert x0 is not None, "the images stream carries latents"
        t = self._draw(student.schedule, len(batch), batch.device)
        eps = torch.randn_like(x0)
        keep = torch.rand(len(batch), device=batch.device) >= self.condition_dropout
        prediction = student(add_noise(student.schedule, x0, t, eps), t, batch.condition.where(keep, batch.null))
        levels = Levels.at(student.schedule, t, x0)
        gamma = self.min_snr_gamma
        weight = None if gamma is None else min_snr_weight(levels, student.kind, gamma)
        target = native_target(student.kind, x0, eps, levels)
        return Loss({"denoising": weighted_mse(prediction.native, target, weight)})

    def _draw(self, schedule: NoiseSchedule, count: int, device: torch.device) -> Tensor:
        """Times of the chosen density, (count,), float64."""
        if self.times == "uniform":
            return uniform_times(schedule, count, low=self.t_min, high=self.t_max, device=device)
        return log_noise_times(schedule, count, mean=self.mean, std=self.std, device=device)
