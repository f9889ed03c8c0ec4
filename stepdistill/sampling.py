"""Samplers: free functions of a denoiser."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from stepdistill.condition import Condition
from stepdistill.denoiser import Denoiser
from stepdistill.prediction import Prediction, add_noise


Sampler = Literal["stochastic", "deterministic"]


def approach(
    denoiser: Denoiser, noise: Tensor, times: Tensor, condition: Condition, sampler: Sampler = "stochastic"
) -> Tensor:
    """Unit-variance noise => what the student is given at the last of `times`, (B, C, H, W).

    "stochastic", as Diffusers' LCMScheduler: begins with the noise as it is, and re-noises every clean prediction with
    fresh noise. "deterministic", as EulerDiscreteScheduler: begins with sigma noise, and re-noises with the predicted
    noise.

    Args:
        denoiser: the student.
        noise: unit-variance noise, (B, C, H, W).
        times: falling times, (N,); the student is called once at each but the last.
        condition: B rows.
        sampler: how inputs are made.
    """
    fresh = sampler == "stochastic"
    first = times[0].expand(len(noise))
    x = noise if fresh else add_noise(denoiser.schedule, torch.zeros_like(noise), first, noise)
    for here, there in pairwise(times):
        said = denoiser(x, here.expand(len(x)), condition)
        x = add_noise(denoiser.schedule, said.x0, there.expand(len(x)), torch.randn_like(x) if fresh else said.eps)
    return x


def few_steps(
    denoiser: Denoiser, noise: Tensor, times: Tensor, condition: Condition, sampler: Sampler = "stochastic"
) -> Tensor:
    """A sample as the exported student makes it: the clean prediction at the last of `times`; see `approach`."""
    x = approach(denoiser, noise, times, condition, sampler)
    return denoiser(x, times[-1].expand(len(x)), condition).x0


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
