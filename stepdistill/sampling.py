"""Samplers: free functions of a denoiser."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from stepdistill.condition import Condition
from stepdistill.denoiser import Denoiser
from stepdistill.prediction import Prediction, add_more_noise, add_noise, beside
from stepdistill.schedule import NoiseSchedule, VPSchedule
from stepdistill.times import grid


if TYPE_CHECKING:
    from stepdistill.objectives.base import InferenceSpec


Sampler = Literal["stochastic", "deterministic", "tcd"]
Solver = Literal["ddim", "euler", "heun"]


def approach(
    denoiser: Denoiser,
    noise: Tensor,
    times: Tensor,
    condition: Condition,
    sampler: Sampler = "stochastic",
    eta: float = 0.0,
) -> Tensor:
    """Unit-variance noise => what the student is given at the last of `times`, (B, C, H, W).

    "stochastic", as Diffusers' LCMScheduler: begins with the noise as it is, and re-noises every clean prediction with
    fresh noise. "deterministic", as EulerDiscreteScheduler: begins with sigma noise, and re-noises with the predicted
    noise. "tcd", as TCDScheduler: begins with the noise as it is; see `tcd_step`.

    Args:
        denoiser: the student.
        noise: unit-variance noise, (B, C, H, W).
        times: falling times, (N,); the student is called once at each but the last.
        condition: B rows.
        sampler: how inputs are made.
        eta: share of fresh noise, 0 to 1, of "tcd"; the others have no use for it.
    """
    first = times[0].expand(len(noise))
    scaled = sampler == "deterministic"
    x = add_noise(denoiser.schedule, torch.zeros_like(noise), first, noise) if scaled else noise
    for here, there in pairwise(times):
        said = denoiser(x, here.expand(len(x)), condition)
        if sampler == "tcd":
            x = tcd_step(denoiser, said, there.expand(len(x)), eta)
        else:
            eps = said.eps if scaled else denoiser.fresh_noise(x)
            x = add_noise(denoiser.schedule, said.x0, there.expand(len(x)), eps)
    return x


def few_steps(
    denoiser: Denoiser,
    noise: Tensor,
    times: Tensor,
    condition: Condition,
    sampler: Sampler = "stochastic",
    eta: float = 0.0,
) -> Tensor:
    """A sample as the exported student makes it: the clean prediction at the last of `times`; see `approach`."""
    x = approach(denoiser, noise, times, condition, sampler, eta)
    return denoiser(x, times[-1].expand(len(x)), condition).x0


def student_samples(student: Denoiser, noise: Tensor, condition: Condition, spec: InferenceSpec) -> Tensor:
    """Unit-variance noise => samples, (B, C, H, W), with the timesteps and the sampler of a finished student."""
    times, told = grid(student.schedule, spec.timesteps, noise.device), spec.told(condition)
    if spec.sampler == "own":
        return ddim(student, noise, times, told, null=told, guidance=1.0)
    return few_steps(student, noise, times, told, spec.sampler, spec.eta)


def tcd_step(denoiser: Denoiser, prediction: Prediction, t: Tensor, eta: float) -> Tensor:
    """Below the next time along the predicted path, and up to it again with fresh noise: => x_t.

    Strategic stochastic sampling of trajectory consistency distillation (Zheng et al. 2024, arXiv 2402.19159, section
    4.3; its gamma is `eta`): 0 is a DDIM step without any fresh noise, 1 re-noises the clean prediction.

    Args:
        denoiser: names the schedule.
        prediction: what the student said at the time before.
        t: the next time, (B,).
        eta: how far below it, 0 to 1.
    """
    s = _below(denoiser.schedule, t, eta)
    x_s = ddim_step(denoiser, prediction, s)
    return x_s if eta == 0 else add_more_noise(denoiser.schedule, x_s, s, t, denoiser.fresh_noise(x_s))


def _below(schedule: NoiseSchedule, t: Tensor, eta: float) -> Tensor:
    """The time (1 - eta) t; on a table of timesteps the index is rounded down, and index 0 means clean data."""
    if not isinstance(schedule, VPSchedule):
        return (1 - eta) * t
    # In float32, as TCDScheduler rounds: in float64 (1 - 0.9) * 500 is just below 50.
    index = torch.floor((1 - eta) * schedule.model_time(t).float())
    return torch.where(index > 0, schedule.t_from_model_time(index), 0.0)


def stochastic(denoiser: Denoiser, noise: Tensor, times: Tensor, condition: Condition) -> Tensor:
    """Few-step sampling that re-noises every clean prediction: Luo et al. 2023 (LCM), algorithm 1; DMD2 section 4.5.

    Args:
        denoiser: the student.
        noise: unit-variance noise, (B, C, H, W).
        times: falling times, (N,); the student is called once at each.
        condition: B rows.

    Returns:
        The last clean prediction, (B, C, H, W).
    """
    return few_steps(denoiser, noise, times, condition, "stochastic")


def ddim(
    denoiser: Denoiser, noise: Tensor, times: Tensor, condition: Condition, *, null: Condition, guidance: float
) -> Tensor:
    """Deterministic DDIM (Song et al. 2020, eq. 12 with zero variance) with classifier-free guidance.

    Args:
        denoiser: the teacher.
        noise: unit-variance noise, (B, C, H, W).
        times: falling times, (N,); data (t = 0) is reached after the last one.
        condition: B rows.
        null: B rows.
        guidance: standard scale, 1 = none.
    """
    x = noise
    for index, t in enumerate(times):
        prediction = denoiser.guided(x, t.expand(len(x)), condition, null, guidance)
        following = times[index + 1] if index + 1 < len(times) else torch.zeros_like(t)
        x = ddim_step(denoiser, prediction, following.expand(len(x)))
    return x


def ddim_step(denoiser: Denoiser, prediction: Prediction, s: Tensor) -> Tensor:
    """x_s = alpha_s x0 + sigma_s eps with both taken from one prediction; exact along straight (x0, eps) paths."""
    return add_noise(denoiser.schedule, prediction.x0, s, prediction.eps)


def solver_step(
    denoiser: Denoiser,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    condition: Condition,
    null: Condition,
    guidance: float | Tensor,
    solver: Solver = "ddim",
) -> Tensor:
    """One step of a denoiser's probability-flow equation between any two times => x_s, (B, C, H, W).

    "ddim" is exact where the clean prediction does not change (Song et al. 2020, eq. 12); "euler" is x + (s - t) dx/dt
    in the schedule's own time, the same for an unshifted flow; "heun" is of second order and calls the denoiser twice.

    Args:
        denoiser: usually the teacher; outside of a graph, or not, as the caller decides.
        x: sample at t, (B, C, H, W).
        t: times, (B,).
        s: times to go to, (B,), usually lower.
        condition: B rows.
        null: B rows.
        guidance: standard scale, 1 = none; one number or (B,).
        solver: which step.
    """
    said = denoiser.guided(x, t, condition, null, guidance)
    if solver == "ddim":
        return ddim_step(denoiser, said, s)
    if solver == "euler":
        return (x + beside(x, s - t) * said.velocity).to(x.dtype)
    x_s = ddim_step(denoiser, said, s)
    # At the clean end there is no second half: what a network says without noise is of no use (Karras et al., alg. 1).
    noisy = denoiser.schedule.sigma(s) > 0
    if not bool(noisy.any()):
        return x_s
    there = denoiser.guided(x_s, s, condition, null, guidance)
    return torch.where(beside(x, noisy), _trapezoid(denoiser, said, there, s), x_s)


def solve(
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    condition: Condition,
    null: Condition,
    guidance: float | Tensor,
    solver: Solver = "ddim",
) -> Tensor:
    """The probability-flow equation from the first to the last of `times` (falling, (N,)), a step between each two.

    Args:
        denoiser: usually the teacher.
        x: sample at the first of `times`, (B, C, H, W).
        times: falling times, (N,).
        condition: B rows.
        null: B rows.
        guidance: standard scale, 1 = none; one number or (B,).
        solver: which step, see `solver_step`.
    """
    for t, s in pairwise(times):
        x = solver_step(denoiser, x, t.expand(len(x)), s.expand(len(x)), condition, null, guidance, solver)
    return x


def _trapezoid(denoiser: Denoiser, first: Prediction, second: Prediction, s: Tensor) -> Tensor:
    """The second half of Heun's step: the jump to s with the mean of the slopes at both ends.

    In x / alpha over sigma / alpha the slope is the noise (Karras et al. 2022, eq. 4). Where alpha is next to nothing,
    as at a flow's last time, that is no scale to go by, and x / sigma over alpha / sigma is taken instead, whose slope
    is the clean sample.
    """
    by_noise = ddim_step(denoiser, replace(first, native=(first.eps + second.eps) / 2, kind="epsilon"), s)
    by_clean = ddim_step(denoiser, replace(first, native=(first.x0 + second.x0) / 2, kind="sample"), s)
    return torch.where(first.levels.alpha > 1e-3 * first.levels.sigma, by_noise, by_clean)
