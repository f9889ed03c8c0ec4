"""Noise schedules: how much signal and how much noise there is at a time between 0 (data) and 1 (noise).

    x_t = alpha(t) * x0 + sigma(t) * eps,     eps ~ N(0, I)

Coefficients are float64 tensors of the shape of `t`; networks never see them. A time is a float in [0, 1]; the number
that a network is fed for it is `model_time(t)`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stepdistill.errors import UserError


class NoiseSchedule(ABC):
    """alpha, sigma and their derivatives as functions of time, and the time that the network is fed.

    Every schedule here is a path (alpha, sigma) = r(t) (cos theta(t), sin theta(t)) with theta growing from 0, so that
    log SNR = -2 log tan theta is invertible.
    """

    num_train_timesteps: int = 1000

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal level at `t`, shape of `t`, float64."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise level at `t`, shape of `t`, float64."""

    @abstractmethod
    def d_alpha(self, t: Tensor) -> Tensor:
        """Derivative of alpha with respect to `t`."""

    @abstractmethod
    def d_sigma(self, t: Tensor) -> Tensor:
        """Derivative of sigma with respect to `t`."""

    @abstractmethod
    def model_time(self, t: Tensor) -> Tensor:
        """What the network is fed at `t`; Diffusers counts timesteps."""

    @abstractmethod
    def d_model_time(self, t: Tensor) -> Tensor:
        """Derivative of `model_time` with respect to `t`."""

    @abstractmethod
    def t_from_model_time(self, model_time: Tensor) -> Tensor:
        """Inverse of `model_time`: exact for every index of the training table."""

    @abstractmethod
    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        """Inverse of `log_snr`."""

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2), infinite at the ends."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())


class VPSchedule(NoiseSchedule):
    """Variance preserving: alpha^2 + sigma^2 = 1, from a table of cumulative alphas as Diffusers keeps it.

    Timestep index i of n lies at t = (i + 1) / n, and t = 0 is clean data. Between the knots the angle
    theta = atan2(sigma, alpha) is interpolated linearly, so alpha = cos theta and sigma = sin theta stay exact.

    Args:
        alphas_cumprod: the table of alpha^2, shape (n,), falling; the last entry may be 0 (zero terminal SNR).
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        table = alphas_cumprod.detach().double().cpu()
        angles = torch.atan2((1 - table).clamp(min=0).sqrt(), table.clamp(min=0).sqrt())
        self._on_device = {"cpu": torch.cat([torch.zeros(1, dtype=torch.float64), angles])}
        if not bool((self._on_device["cpu"].diff() > 0).all()):
            raise UserError("the scheduler's alphas_cumprod must fall strictly; check its betas")
        self.num_train_timesteps = len(table)

    def _angles(self, device: torch.device) -> Tensor:
        """The table on a device, copied there once."""
        if str(device) not in self._on_device:
            self._on_device[str(device)] = self._on_device["cpu"].to(device)
        return self._on_device[str(device)]

    def _theta(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Angle and its slope at `t`, float64, on the device of `t`."""
        angles = self._angles(t.device)
        place = t.double().clamp(0, 1) * self.num_train_timesteps
        # A knot's own index must come back without rounding noise, otherwise i / n * n may fall below i.
        place = torch.where((place - place.round()).abs() < 1e-9, place.round(), place)
        left = place.floor().long().clamp(max=self.num_train_timesteps - 1)
        slope = angles[left + 1] - angles[left]
        return angles[left] + slope * (place - left), slope * self.num_train_timesteps

    def alpha(self, t: Tensor) -> Tensor:
        return self._theta(t)[0].cos()

    def sigma(self, t: Tensor) -> Tensor:
        return self._theta(t)[0].sin()

    def d_alpha(self, t: Tensor) -> Tensor:
        theta, slope = self._theta(t)
        return -theta.sin() * slope

    def d_sigma(self, t: Tensor) -> Tensor:
        theta, slope = self._theta(t)
        return theta.cos() * slope

    def model_time(self, t: Tensor) -> Tensor:
        index = t.double() * self.num_train_timesteps - 1
        index = torch.where((index - index.round()).abs() < 1e-9, index.round(), index)
        return index.clamp(min=0)

    def d_model_time(self, t: Tensor) -> Tensor:
        # No network has learnt times below its first index, where `model_time` stands still.
        inside = self.num_train_timesteps * t.double() > 1 - 1e-9
        return self.num_train_timesteps * inside.double()

    def t_from_model_time(self, model_time: Tensor) -> Tensor:
        return (model_time.double() + 1) / self.num_train_timesteps

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        angles = self._angles(log_snr.device)
        theta = torch.atan(torch.exp(-0.5 * log_snr.double())).clamp(max=float(angles[-1]))
        right = torch.searchsorted(angles, theta.contiguous()).clamp(1, self.num_train_timesteps)
        low, high = angles[right - 1], angles[right]
        return (right - 1 + (theta - low) / (high - low)) / self.num_train_timesteps


class FlowSchedule(NoiseSchedule):
    """Rectified flow: alpha = 1 - s, sigma = s with s = shift t / (1 + (shift - 1) t); the network is fed 1000 s.

    Args:
        shift: Diffusers' `shift` of FlowMatchEulerDiscreteScheduler; uniform t then means the shifted density.
    """

    def __init__(self, shift: float = 1.0, num_train_timesteps: int = 1000) -> None:
        if shift <= 0:
            raise UserError(f"shift must be positive, got {shift}")
        self.shift = shift
        self.num_train_timesteps = num_train_timesteps

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - self.sigma(t)

    def sigma(self, t: Tensor) -> Tensor:
        t = t.double()
        return self.shift * t / (1 + (self.shift - 1) * t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return -self.d_sigma(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return self.shift * (1 + (self.shift - 1) * t.double()).pow(-2)

    def model_time(self, t: Tensor) -> Tensor:
        return self.sigma(t) * self.num_train_timesteps

    def d_model_time(self, t: Tensor) -> Tensor:
        return self.d_sigma(t) * self.num_train_timesteps

    def t_from_model_time(self, model_time: Tensor) -> Tensor:
        return self._t_from_sigma(model_time.double() / self.num_train_timesteps)

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        return self._t_from_sigma(torch.sigmoid(-0.5 * log_snr.double()))

    def _t_from_sigma(self, s: Tensor) -> Tensor:
        return s / (self.shift - (self.shift - 1) * s)


class EDMSchedule(NoiseSchedule):
    """Variance exploding: alpha = 1, sigma on EDM's rho grid (Karras et al. 2022, eq. 5); fed log(sigma) / 4."""

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> None:
        self._low = float(sigma_min ** (1 / rho))
        self._high = float(sigma_max ** (1 / rho))
        self._rho = rho

    def _root(self, t: Tensor) -> Tensor:
        return self._low + t.double() * (self._high - self._low)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)

    def sigma(self, t: Tensor) -> Tensor:
        return self._root(t).pow(self._rho)

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t, dtype=torch.float64)

    def d_sigma(self, t: Tensor) -> Tensor:
        return self._rho * self._root(t).pow(self._rho - 1) * (self._high - self._low)

    def model_time(self, t: Tensor) -> Tensor:
        return self.sigma(t).log() / 4  # Karras et al. 2022, table 1: c_noise

    def d_model_time(self, t: Tensor) -> Tensor:
        return self.d_sigma(t) / self.sigma(t) / 4

    def t_from_model_time(self, model_time: Tensor) -> Tensor:
        return ((4 * model_time.double()).exp() ** (1 / self._rho) - self._low) / (self._high - self._low)

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        return self.t_from_model_time(-log_snr.double() / 8)


class TrigFlowSchedule(NoiseSchedule):
    """TrigFlow: alpha = cos(pi t / 2), sigma = sin(pi t / 2) (Lu and Song 2024, section 3); fed the angle."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(self.model_time(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(self.model_time(t))

    def d_alpha(self, t: Tensor) -> Tensor:
        return -0.5 * math.pi * self.sigma(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return 0.5 * math.pi * self.alpha(t)

    def model_time(self, t: Tensor) -> Tensor:
        return t.double() * (math.pi / 2)

    def d_model_time(self, t: Tensor) -> Tensor:
        return torch.full_like(t, math.pi / 2, dtype=torch.float64)

    def t_from_model_time(self, model_time: Tensor) -> Tensor:
        return model_time.double() / (math.pi / 2)

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        return self.t_from_model_time(torch.atan(torch.exp(-0.5 * log_snr.double())))


def from_scheduler_config(config: Mapping[str, Any]) -> tuple[NoiseSchedule, str]:
    """Reads a Diffusers scheduler config => (schedule, the kind of a network's output).

    Args:
        config: the content of `scheduler_config.json`, of whatever scheduler class.

    Returns:
        The schedule, and "epsilon", "v_prediction", "sample" or "flow".

    Raises:
        UserError: the prediction type is none of these.
    """
    flow = flow_schedule(config)
    if flow is not None:
        return flow, "flow"
    kind = str(config.get("prediction_type", "epsilon"))
    if kind not in ("epsilon", "v_prediction", "sample"):
        raise UserError(f"scheduler/scheduler_config.json: prediction_type {kind!r} is not supported; "
                        "expected epsilon, v_prediction, sample or flow_prediction")  # fmt: skip
    from diffusers import DDPMScheduler

    # DDPMScheduler knows every beta schedule of the other VP schedulers; only the table of alphas is taken from it.
    keys = (
        "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
    )  # fmt: skip
    betas = {key: config[key] for key in keys if config.get(key) is not None}
    return VPSchedule(DDPMScheduler(**betas).alphas_cumprod), kind


def even_sigmas(steps: int) -> list[float]:
    """What FluxPipeline gives its scheduler to shift: 1 to 1 / N in N even steps."""
    return [1 - i / steps for i in range(steps)]


def flow_schedule(config: Mapping[str, Any]) -> FlowSchedule | None:
    """The schedule that a Diffusers scheduler config names, if it is one of flow matching."""
    flow = str(config.get("_class_name", "")).startswith("FlowMatch")
    if not flow and config.get("prediction_type") != "flow_prediction":
        return None
    shift = float(config.get("shift", config.get("flow_shift", 1.0)) or 1.0)
    return FlowSchedule(shift, int(config.get("num_train_timesteps", 1000)))
