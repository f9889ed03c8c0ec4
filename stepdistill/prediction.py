"""One network output, seen as the clean sample, the noise, the velocity or the score.

This is the only place that divides by alpha or sigma.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.schedule import NoiseSchedule


KINDS = ("epsilon", "v_prediction", "sample", "flow")


def beside(x: Tensor, values: Tensor) -> Tensor:
    """One value per sample, (B,), shaped to go with x, (B, ...)."""
    return values.reshape((-1,) + (1,) * (x.ndim - 1))


@dataclass(frozen=True)
class Levels:
    """Coefficients of one batch of times, each of shape (B, 1, ..., 1) and float64."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    @classmethod
    def at(cls, schedule: NoiseSchedule, t: Tensor, like: Tensor) -> Levels:
        """The levels at times `t` of shape (B,), shaped to multiply `like` of shape (B, ...)."""
        functions = (schedule.alpha, schedule.sigma, schedule.d_alpha, schedule.d_sigma)
        return cls(*(beside(like, function(t)) for function in functions))


@dataclass(frozen=True)
class Prediction:
    """What a network said about x_t; keeps the native output and shows every view of it exactly.

    A native output is a x0 + b eps with known (a, b), and x_t = alpha x0 + sigma eps; every view solves these two
    equations in float64, because 1/alpha is 14.6 at Stable Diffusion's last timestep. Views have the dtype of x_t, at
    least float32.

    Attributes:
        native: the network's output, shape (B, ...).
        kind: what it is: "epsilon", "v_prediction", "sample" or "flow" (eps - x0).
        x_t: the noisy sample it was given, shape (B, ...).
        levels: alpha, sigma and derivatives at its time.
    """

    native: Tensor
    kind: str
    x_t: Tensor
    levels: Levels

    @property
    def x0(self) -> Tensor:
        """Predicted clean sample, E[x0 | x_t]."""
        return self._cast(self._x0())

    @property
    def eps(self) -> Tensor:
        """Predicted noise, E[eps | x_t]."""
        return self._cast(self._eps())

    @property
    def v(self) -> Tensor:
        """Salimans and Ho's v = alpha eps - sigma x0."""
        return self._cast(self.levels.alpha * self._eps() - self.levels.sigma * self._x0())

    @property
    def velocity(self) -> Tensor:
        """dx_t/dt of the probability-flow equation: alpha' x0 + sigma' eps."""
        return self._cast(self.levels.d_alpha * self._x0() + self.levels.d_sigma * self._eps())

    @property
    def score(self) -> Tensor:
        """Gradient of log p_t at x_t: -eps / sigma."""
        return self._cast(-self._eps() / self.levels.sigma)

    def detach(self) -> Prediction:
        """The same prediction outside of the graph."""
        return replace(self, native=self.native.detach(), x_t=self.x_t.detach())

    def guide(self, null: Prediction, scale: float | Tensor) -> Prediction:
        """Classifier-free guidance (Ho and Salimans): null + scale (self - null), at equal x_t."""
        return replace(self, native=null.native + scale * (self.native - null.native))

    def _mixture(self) -> tuple[Tensor, Tensor]:
        """(a, b) with native = a x0 + b eps."""
        one = torch.ones_like(self.levels.alpha)
        if self.kind == "epsilon":
            return 0 * one, one
        if self.kind == "sample":
            return one, 0 * one
        if self.kind == "v_prediction":
            return -self.levels.sigma, self.levels.alpha
        if self.kind == "flow":
            return -one, one
        raise UserError(f"unknown prediction kind {self.kind!r}; expected one of {', '.join(KINDS)}")

    def _x0(self) -> Tensor:
        if self.kind == "sample":
            return self.native.double()  # also where sigma = 0 makes the general formula 0/0
        a, b = self._mixture()
        return (self.levels.sigma * self.native.double() - b * self.x_t.double()) / self._determinant(a, b)

    def _eps(self) -> Tensor:
        if self.kind == "epsilon":
            return self.native.double()  # also where alpha = 0 makes the general formula 0/0
        a, b = self._mixture()
        return (a * self.x_t.double() - self.levels.alpha * self.native.double()) / self._determinant(a, b)

    def _determinant(self, a: Tensor, b: Tensor) -> Tensor:
        return a * self.levels.sigma - b * self.levels.alpha

    def _cast(self, view: Tensor) -> Tensor:
        return view.to(torch.promote_types(self.x_t.dtype, torch.float32))


def native_target(kind: str, x0: Tensor, eps: Tensor, levels: Levels) -> Tensor:
    """What a network of this kind should have said for x_t = alpha x0 + sigma eps, in the dtype of x0."""
    if kind == "epsilon":
        return eps
    if kind == "sample":
        return x0
    if kind == "flow":
        return eps - x0
    if kind == "v_prediction":
        return (levels.alpha * eps - levels.sigma * x0).to(x0.dtype)
    raise UserError(f"unknown prediction kind {kind!r}; expected one of {', '.join(KINDS)}")


def add_noise(schedule: NoiseSchedule, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_t = alpha x0 + sigma eps at times `t` of shape (B,), in the dtype of x0."""
    levels = Levels.at(schedule, t, x0)
    return (levels.alpha * x0 + levels.sigma * eps).to(x0.dtype)


def add_more_noise(schedule: NoiseSchedule, x_s: Tensor, s: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_s => x_t at a noisier time, in the dtype of x_s: what diffusion does between two times.

    x_t = r x_s + sqrt(sigma_t^2 - r^2 sigma_s^2) eps with r = alpha_t / alpha_s.

    Args:
        schedule: names the levels.
        x_s: sample at s, (B, ...).
        s: times, (B,).
        t: times, (B,), nowhere before s.
        eps: fresh noise, (B, ...).
    """
    here, there = Levels.at(schedule, s, x_s), Levels.at(schedule, t, x_s)
    ratio = there.alpha / here.alpha
    fresh = (there.sigma**2 - (ratio * here.sigma) ** 2).clamp(min=0).sqrt()
    return (ratio * x_s + fresh * eps).to(x_s.dtype)
