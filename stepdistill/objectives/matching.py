"""What the distribution-matching objectives share: making samples, noising them, and training the critic."""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.denoiser import Denoiser
from stepdistill.losses import weighted_mse
from stepdistill.objectives.base import Batch, Step
from stepdistill.prediction import Levels, add_noise, native_target
from stepdistill.sampling import Sampler, approach
from stepdistill.times import LogNoise, drawn_times, grid, uniform_times


Guidance = float | tuple[float, float]


def draw_guidance(guidance: Guidance, step: Step) -> float:
    """A fixed scale as it is; of a range, one scale for the whole micro-batch, the same on every process.

    The range is SNOOPI's PG-SB (arXiv 2412.02687, section 4.1), which draws in every iteration; micro-batches of one
    iteration have scales of their own here.
    """
    if isinstance(guidance, tuple):
        low, high = guidance
        return step.shared("guidance").uniform(low, high)
    return guidance


def rollout(
    student: Denoiser,
    batch: Batch,
    timesteps: tuple[int, ...],
    step: Step,
    sampler: Sampler = "stochastic",
    eta: float = 0.0,
) -> Tensor:
    """A sample of the student as it will be used, (B, C, H, W): backward simulation, DMD2 (2405.14867) section 4.5.

    One of the few steps is drawn (the same on every process, so that all do equal work); the steps before it run
    without a graph, and only the drawn step's clean prediction carries a gradient. Losses that share the batch's
    samples get the same one, graph included.
    """
    if batch.samples is None:
        return _rollout(student, batch, timesteps, step, sampler, eta)
    key = student.weights, timesteps, sampler, eta, torch.is_grad_enabled(), id(batch.condition)
    if key not in batch.samples:  # the condition is kept too, since its id tells it apart only for as long as it lives
        batch.samples[key] = batch.condition, _rollout(student, batch, timesteps, step, sampler, eta)
    sample: Tensor = batch.samples[key][1]
    return sample


def _rollout(
    student: Denoiser, batch: Batch, timesteps: tuple[int, ...], step: Step, sampler: Sampler, eta: float
) -> Tensor:
    times = grid(student.schedule, timesteps, batch.device)
    last = step.shared("rollout").randrange(len(timesteps))
    with torch.no_grad():
        x = approach(student, batch.noise(), times[: last + 1], batch.condition, sampler, eta)
    return student(x, times[last].expand(len(x)), batch.condition).x0


def renoise(
    denoiser: Denoiser, x0: Tensor, low: float, high: float, log_noise: LogNoise | None = None
) -> tuple[Tensor, Tensor]:
    """x0 => (x_t, t) at fresh times with fresh noise, outside of the graph; for the times see `drawn_times`."""
    t = drawn_times(denoiser.schedule, len(x0), low=low, high=high, log_noise=log_noise, device=x0.device)
    x0 = x0.detach()
    return add_noise(denoiser.schedule, x0, t, torch.randn_like(x0)), t


def critic_denoising(
    critic: Denoiser, x0: Tensor, batch: Batch, *, drop: Tensor | None, signal_weight: bool
) -> Tensor:
    """The critic's loss: denoising of the student's samples over the whole range of times, a scalar.

    Args:
        critic: trained on what the student makes.
        x0: the student's samples, (B, C, H, W); detached here.
        batch: their conditions.
        drop: (B,) bool, which rows get the null condition; None: no row.
        signal_weight: weight the native error by alpha_t^2, as SwiftBrush's code that of an epsilon network; of v and
            flow networks alpha_t^2 times the native error is the plain error of the noise. False: the native error,
            as in DMD2's code.
    """
    t = uniform_times(critic.schedule, len(x0), low=0.0, high=1.0, device=x0.device)
    x0, eps = x0.detach(), torch.randn_like(x0)
    condition = batch.condition if drop is None else batch.null.where(drop, batch.condition)
    prediction = critic(add_noise(critic.schedule, x0, t, eps), t, condition)
    levels = Levels.at(critic.schedule, t, x0)
    weight = levels.alpha.flatten() ** 2 if signal_weight else None
    return weighted_mse(prediction.native, native_target(critic.kind, x0, eps, levels), weight)
