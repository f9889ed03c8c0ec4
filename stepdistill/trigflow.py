"""TrigFlow: any denoiser, seen along the circle x = cos(angle) x0 + sin(angle) eps, without training.

Lu and Song 2024 (sCM, arXiv 2410.11081), section 3; Chen et al. 2025 (SANA-Sprint, arXiv 2503.09641), section 3.1, for
the conversion of flow models, of which this is the general case. Both papers scale their data to a standard deviation
sigma_d; here x is their x_t / sigma_d, of variance 1 at every angle. On it,

    F = E[cos eps - sin x0 | x],   dx/dangle = F on the probability flow,   x0 = cos x - sin F.

Shapes: B batch; samples (B, ...), angles (B,) in [0, pi/2] and float64, 0 being clean data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from stepdistill.condition import Condition
from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.objectives.base import FeatureShape
from stepdistill.prediction import Levels, Prediction, beside
from stepdistill.schedule import NoiseSchedule, VPSchedule


TangentNorm = Literal["rms", "l2", "clip", "none"]


@dataclass(frozen=True)
class TrigFlow:
    """Where the points of a noise schedule lie on the circle, and what its denoisers say there.

    A point at an angle and the point of the schedule with the same ratio of signal to noise are multiples of each
    other: x_t = radius x.

    Attributes:
        schedule: of the denoisers.
        data_std: standard deviation of the clean samples, which are divided by it; 1 for a VAE's scaled latents.
    """

    schedule: NoiseSchedule
    data_std: float = 1.0

    def __post_init__(self) -> None:
        if self.data_std <= 0:
            raise UserError(
                f"data_std must be positive, got {self.data_std}; it is the spread of the latents, about 1"
            )

    def angle(self, t: Tensor) -> Tensor:
        """Times of the schedule, (B,) => angles: the tangent is the ratio of noise to signal."""
        return torch.atan2(self.schedule.sigma(t), self.data_std * self.schedule.alpha(t))

    def time(self, angle: Tensor) -> Tensor:
        """Inverse of `angle`; angles beyond the schedule's last time give that."""
        return self.schedule.t_from_log_snr(-2 * (self.data_std * angle.double().tan()).log())

    def clamp(self, angle: Tensor) -> Tensor:
        """Angles, limited to where a network of this schedule has learnt something.

        A variance-preserving schedule without zero terminal SNR ends below pi/2, and its network has seen nothing
        between the data and its first timestep.
        """
        first = 1 / self.schedule.num_train_timesteps if isinstance(self.schedule, VPSchedule) else 0.0
        low, high = self.angle(torch.tensor([first, 1.0], dtype=torch.float64, device=angle.device))
        return angle.clamp(low, high)

    def draw_angles(self, count: int, *, mean: float, std: float, sigma_d: float, device: torch.device) -> Tensor:
        """arctan(e^tau / sigma_d) with tau normal, within the limits of `clamp`, (count,): sCM, algorithm 1."""
        tau = mean + std * torch.randn(count, dtype=torch.float64, device=device)
        return self.clamp(torch.atan(tau.exp() / sigma_d))

    def noised(self, x0: Tensor, angle: Tensor, eps: Tensor) -> Tensor:
        """Clean samples and unit-variance noise => x on the circle, in the dtype of x0."""
        cos, sin = (beside(x0, v) for v in (angle.cos(), angle.sin()))
        return (cos * x0 / self.data_std + sin * eps).to(x0.dtype)

    def place(self, x: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
        """x on the circle => (x_t, t), what a denoiser of the schedule is to be called with."""
        t = self.time(angle)
        return (self._radius(Levels.at(self.schedule, t, x)) * x).to(x.dtype), t

    def output(self, prediction: Prediction) -> Tensor:
        """F = cos eps - sin x0 of whatever a network said, in units of unit-variance samples, (B, ...).

        For a flow this is SANA-Sprint's conversion, for a variance-preserving model with data_std 1 its v.
        """
        cos, sin = self._directions(prediction.levels)
        return (cos * prediction.eps - sin * prediction.x0 / self.data_std).to(prediction.eps.dtype)

    def derivative(
        self,
        denoiser: Denoiser,
        x: Tensor,
        angle: Tensor,
        condition: Condition,
        tangent: tuple[Tensor, Tensor],
        *,
        difference: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """F at (x, angle), and its derivative along a tangent, both (B, ...): one pass in forward mode.

        Args:
            denoiser: of this schedule.
            x: on the circle, (B, ...).
            angle: (B,).
            condition: B rows.
            tangent: of x, (B, ...), and of the angle, (B,).
            difference: 0 for forward mode, else the relative size of a central difference; see `Denoiser.jvp`.
        """
        tangent_x, tangent_angle = tangent
        x_t, t = self.place(x, angle)
        levels = Levels.at(self.schedule, t, x)
        dt = beside(x, tangent_angle) * self._time_slope(levels)
        # x_t = radius x
        tangent_x_t = (self._radius(levels) * tangent_x + self._radius_slope(levels) * dt * x).to(x.dtype)
        prediction, moved = denoiser.jvp(x_t, t, condition, tangent_x_t, dt.flatten(), difference=difference)
        change = _change(prediction, moved, tangent_x_t, dt)
        cos, sin = self._directions(levels)
        # d(cos) = -sin and d(sin) = cos: what remains of these is sin eps + cos x0 / data_std = x
        along = cos * change.eps - sin * change.x0 / self.data_std - beside(x, tangent_angle) * x
        return self.output(prediction), along.to(x.dtype)

    def _directions(self, levels: Levels) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the angle at these levels, float64."""
        radius = self._radius(levels)
        return self.data_std * levels.alpha / radius, levels.sigma / radius

    def _radius(self, levels: Levels) -> Tensor:
        return torch.hypot(self.data_std * levels.alpha, levels.sigma)

    def _radius_slope(self, levels: Levels) -> Tensor:
        """d radius / dt."""
        moved = self.data_std**2 * levels.alpha * levels.d_alpha + levels.sigma * levels.d_sigma
        return moved / self._radius(levels)

    def _time_slope(self, levels: Levels) -> Tensor:
        """dt / dangle, from tan(angle) = sigma / (data_std alpha)."""
        turned = levels.alpha * levels.d_sigma - levels.sigma * levels.d_alpha
        return self._radius(levels) ** 2 / (self.data_std * turned)


def _change(prediction: Prediction, moved: Tensor, tangent_x_t: Tensor, dt: Tensor) -> Prediction:
    """The derivative of a prediction is a prediction: its views are the derivatives of the views.

    From native = a x0 + b eps and x_t = alpha x0 + sigma eps, differentiated: the derivatives of x0 and eps solve the
    same two equations, with what the coefficients' own derivatives contribute taken off the left sides.

    Args:
        prediction: at x_t.
        moved: derivative of its native output.
        tangent_x_t: derivative of x_t.
        dt: derivative of the time, (B, 1, ..., 1).
    """
    levels = prediction.levels
    if prediction.kind == "v_prediction":  # the only kind whose coefficients a = -sigma, b = alpha depend on time
        moved = moved - dt * (levels.d_alpha * prediction.eps - levels.d_sigma * prediction.x0)
    return replace(prediction, native=moved, x_t=tangent_x_t - dt * prediction.velocity)


def consistency_tangent(
    x: Tensor, angle: Tensor, output: Tensor, velocity: Tensor, derivative: Tensor, *, warmup: float
) -> Tensor:
    """cos(angle) df/dangle of the consistency function f = cos x - sin F, (B, ...): g of sCM's algorithm 1.

    It vanishes for all x and angles if, and only if, f is constant along the flow.

    Args:
        x: on the circle, (B, ...).
        angle: (B,).
        output: F of the student.
        velocity: dx/dangle on the flow: the teacher's F, or cos eps - sin x0 of the data.
        derivative: of F along (cos sin velocity, cos sin).
        warmup: r in [0, 1], how much the terms count that could be unstable; with 0 the student learns the velocity.
    """
    cos, sin = (beside(x, v).to(x.dtype) for v in (angle.cos(), angle.sin()))
    return -(cos**2) * (output - velocity) - warmup * (cos * sin * x + derivative)


def normalized_tangent(tangent: Tensor, kind: TangentNorm, constant: float) -> Tensor:
    """A tangent of bounded size per sample, (B, ...): sCM, algorithm 1.

    "rms" and "l2" divide by the norm plus a constant, the root of the mean or of the sum of squares (SANA-Sprint's
    code has the latter); "clip" limits every element to [-1, 1].
    """
    if kind == "none":
        return tangent
    if kind == "clip":
        return tangent.clamp(-1, 1)
    squares = tangent.square().flatten(1)
    norm = (squares.mean(1) if kind == "rms" else squares.sum(1)).sqrt()
    return tangent / (beside(tangent, norm) + constant)


class LogWeight(nn.Module):
    """Angles, (B,) => w, (B,): the logarithm of the weight at an angle, a linear function of its cosine series.

    Minimising e^w error - w makes e^w the reciprocal of the mean error at every angle (sCM, algorithm 1). It is 0 at
    first. A head is built for shapes of features; this one takes none.
    """

    def __init__(self, shapes: Sequence[FeatureShape] = (), waves: int = 16) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(waves))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, angle: Tensor) -> Tensor:
        numbers = torch.arange(1, len(self.weight) + 1, device=angle.device)
        waves = torch.cos(2 * numbers * angle[:, None]).to(self.weight.dtype)
        # A sum of products and no matrix product, which mixed precision would round to a few digits.
        return (waves * self.weight).sum(1) + self.bias
