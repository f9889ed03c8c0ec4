"""Losses and distribution-matching directions: free functions, one equation each.

A direction g is a gradient with respect to a generated sample; descending along it moves the student's distribution
towards the teacher's. Shapes: samples and predictions (B, C, H, W).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from stepdistill.prediction import Levels, Prediction, native_target


SidWeighting = Literal[
    "distance", "constant", "alpha", "alpha_squared", "sqrt_snr", "snr", "inverse_sigma", "inverse_variance"
]


def pseudo_loss(x: Tensor, direction: Tensor) -> Tensor:
    """A scalar whose gradient with respect to x is direction / x.numel(): 0.5 mean (x - sg(x - g))^2.

    Its value is 0.5 mean g^2, not a divergence. Yin et al. 2023 (DMD), section 4; mean over all elements as in the
    released code of DMD2 and SwiftBrush.
    """
    target = (x - direction.to(x.dtype)).detach()
    return 0.5 * (x - target).square().mean()


def value_with_gradient(x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """A scalar of the given value whose gradient with respect to x is `gradient`, taken earlier at x detached."""
    return value.detach() + ((x - x.detach()) * gradient.detach().to(x.dtype)).sum()


def dmd_direction(x: Tensor, real_x0: Tensor, fake_x0: Tensor) -> Tensor:
    """(fake - real) / mean_CHW |x - real|, per sample; DMD (arXiv 2311.18828) eq. 7 and 8, in x0 space.

    A sample that the teacher leaves exactly as it is would divide by zero and gets no direction.
    """
    scale = (x - real_x0).abs().flatten(1).mean(1).reshape((-1,) + (1,) * (x.ndim - 1))
    return torch.nan_to_num((fake_x0 - real_x0) / scale, nan=0.0, posinf=0.0, neginf=0.0)


def vsd_direction(real_eps: Tensor, fake_eps: Tensor, levels: Levels) -> Tensor:
    """sigma^2 (eps_real - eps_fake): ProlificDreamer (arXiv 2305.16213) eq. 9 with w(t) = sigma^2, as SwiftBrush."""
    return torch.nan_to_num((levels.sigma**2).to(real_eps.dtype) * (real_eps - fake_eps))


def sid_loss(
    x: Tensor, real_x0: Tensor, fake_x0: Tensor, inner_fake_x0: Tensor, *, alpha: float, weight: Tensor
) -> Tensor:
    """SiD's generator loss per sample, (B,): weight sum (real - fake) ((real - x) - alpha (real - inner_fake)).

    Zhou et al. 2024 (arXiv 2404.04057) and its code; SiD-LSG (arXiv 2406.01561) has alpha = 1 and guides the two fakes
    by kappa_2 and kappa_3. Its gradient goes through x and through the inputs of both networks. Its value is no
    measure of progress: with an optimal fake it is (1 - alpha) E |real - fake|^2 for weight 1.

    Args:
        x: the student's samples, (B, ...).
        real_x0: the teacher's prediction of them from x_t, as a function of x.
        fake_x0: the critic's, in the difference to the teacher.
        inner_fake_x0: the critic's, in the difference to the sample.
        alpha: SiD's alpha, between 0.5 and 1.2.
        weight: omega, (B,).
    """
    pull = (real_x0 - x) - alpha * (real_x0 - inner_fake_x0)
    return weight.to(x.dtype) * ((real_x0 - fake_x0) * pull).flatten(1).sum(1)


def sid_weight(x: Tensor, real_x0: Tensor, levels: Levels, weighting: SidWeighting) -> Tensor:
    """omega of SiD's generator loss, (B,), outside of the graph.

    "distance" is 1 / mean |x - real|, at most 1e5 (SiD's code); the others are functions of the noise level, written
    for a flow in the code of SiD for transformers (arXiv 2509.25127), whose own choice is "alpha", 1 - t.
    """
    if weighting == "distance":
        return 1 / (x - real_x0).detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    alpha, sigma = levels.alpha.flatten(), levels.sigma.flatten()
    weights: dict[str, Callable[[], Tensor]] = {
        "constant": lambda: torch.ones_like(alpha),
        "alpha": lambda: alpha,
        "alpha_squared": lambda: alpha**2,
        "sqrt_snr": lambda: alpha / sigma,
        "snr": lambda: (alpha / sigma) ** 2,
        "inverse_sigma": lambda: 1 / sigma,
        "inverse_variance": lambda: 1 / sigma**2,
    }
    return weights[weighting]()


def sid_critic_loss(prediction: Prediction, x0: Tensor, eps: Tensor) -> Tensor:
    """SiD's denoising loss per sample, (B,): squared error of the noise, of the velocity for a flow; sum of elements.

    SiD-LSG's code weights the error of a v-prediction by snr / (snr + 1) = alpha^2, which makes it that of the noise.
    """
    if prediction.kind == "flow":
        error = prediction.native - native_target("flow", x0, eps, prediction.levels)
    else:
        error = prediction.eps - eps
    return error.square().flatten(1).sum(1)


def clamped_similarity_loss(cosines: Tensor, threshold: float, *, per_sample: bool = True) -> Tensor:
    """max(0, threshold - cosine), averaged, scalar: SwiftBrush v2 (arXiv 2408.14176), section 4.

    Args:
        cosines: of image and prompt, (B,).
        threshold: tau; above it there is no loss.
        per_sample: clamp before averaging; False clamps the mean, so that good samples make up for bad ones.
    """
    return (threshold - cosines).relu().mean() if per_sample else (threshold - cosines.mean()).relu()


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
