"""Losses and distribution-matching directions: free functions, one equation each.

A direction g is a gradient with respect to a generated sample; descending along it moves the student's distribution
towards the teacher's. Shapes: samples and predictions (B, C, H, W).
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.prediction import Levels


def pseudo_loss(x: Tensor, direction: Tensor) -> Tensor:
    """A scalar whose gradient with respect to x is direction / x.numel(): 0.5 mean (x - sg(x - g))^2.

    Its value is 0.5 mean g^2, not a divergence. Yin et al. 2023 (DMD), section 4; mean over all elements as in the
    released code of DMD2 and SwiftBrush.
    """
    target = (x - direction.to(x.dtype)).detach()
    return 0.5 * (x - target).square().mean()


def dmd_direction(x: Tensor, real_x0: Tensor, fake_x0: Tensor) -> Tensor:
    """(fake - real) / mean_CHW |x - real|, per sample; DMD (arXiv 2311.18828) eq. 7 and 8, in x0 space.

    A sample that the teacher leaves exactly as it is would divide by zero and gets no direction.
    """
    scale = (x - real_x0).abs().flatten(1).mean(1).reshape((-1,) + (1,) * (x.ndim - 1))
    return torch.nan_to_num((fake_x0 - real_x0) / scale, nan=0.0, posinf=0.0, neginf=0.0)


def vsd_direction(real_eps: Tensor, fake_eps: Tensor, levels: Levels) -> Tensor:
    """sigma^2 (eps_real - eps_fake): ProlificDreamer (arXiv 2305.16213) eq. 9 with w(t) = sigma^2, as SwiftBrush."""
    return torch.nan_to_num((levels.sigma**2).to(real_eps.dtype) * (real_eps - fake_eps))


def weighted_mse(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """mean over everything of weight_b (prediction - target)^2, with one weight per sample, (B,)."""
    error = (prediction - target).square().flatten(1).mean(1)
    return (error if weight is None else weight.to(error.dtype) * error).mean()


def min_snr_weight(levels: Levels, kind: str, gamma: float) -> Tensor:
    """Min-SNR-gamma weight of the native squared error (Hang et al. 2023, arXiv 2303.09556, section 3.4), (B,).

    min(SNR, gamma) in x0 space; divided by what one unit of x0 error is in the native output.
    """
    snr = ((levels.alpha / levels.sigma) ** 2).flatten()
    capped = snr.clamp(max=gamma)
    native_per_x0 = {"sample": torch.ones_like(snr), "epsilon": snr, "v_prediction": snr + 1}
    if kind == "flow":  # eps - x0 with x_t fixed: d native / d x0 = -(alpha + sigma) / sigma
        return capped / ((levels.alpha + levels.sigma) / levels.sigma).flatten() ** 2
    return capped / native_per_x0[kind]
