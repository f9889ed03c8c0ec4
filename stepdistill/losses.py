"""Losses and distribution-matching directions: free functions, one equation each.

A direction g is a gradient with respect to a generated sample; descending along it moves the student's distribution
towards the teacher's. Shapes: samples and predictions (B, C, H, W).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.prediction import Levels, Prediction, beside, native_target


SidWeighting = Literal[
    "distance", "constant", "alpha", "alpha_squared", "sqrt_snr", "snr", "inverse_sigma", "inverse_variance"
]
VsdWeighting = Literal["sigma_squared", "alpha_sigma_squared"]
DmdWeighting = Literal["distance", "sigma_over_alpha", "sigma_cubed_over_alpha"]
Distance = Literal["mse", "l2", "huber", "sample_huber"]
ProgressiveWeighting = Literal["truncated_snr", "snr_plus_one", "native"]
AddWeighting = Literal["exponential", "sds", "constant"]


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


def taken_early(x: Tensor, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
    """A loss of x whose gradient with respect to x is taken at once, at x detached.

    The graph of what the loss looks through is freed before the backward pass of whatever made x. Under autocast to
    float16 the gradient is taken of a multiple of the loss, see `scaled_gradient`: no loss scale has reached it yet.
    """
    device = x.device.type
    half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    if half:
        x = x.float()  # else the gradient would be rounded to zero after all
    with torch.enable_grad():
        sample = x.detach().requires_grad_(True)
        value = loss_of(sample)
        gradient = scaled_gradient(value, sample) if half else torch.autograd.grad(value, sample)[0]
    return value_with_gradient(x, value, gradient)


def scaled_gradient(value: Tensor, x: Tensor) -> Tensor:
    """The gradient of a scalar with respect to x, float32, through a graph that is partly in float16.

    Taken of 2^15 value and divided out again, so that what is below float16's smallest number is not lost on the way;
    of less where that overflows. Scales are powers of two, which round nothing.
    """
    for power in (15, 10, 5):
        (gradient,) = torch.autograd.grad(value.float() * 2.0**power, x, retain_graph=True)
        if bool(torch.isfinite(gradient).all()):
            return gradient.float() / 2.0**power
    (gradient,) = torch.autograd.grad(value, x)
    return gradient.float()


def dmd_direction(x: Tensor, real_x0: Tensor, fake_x0: Tensor) -> Tensor:
    """(fake - real) / mean_CHW |x - real|, per sample; DMD (arXiv 2311.18828) eq. 7 and 8, in x0 space.

    A sample that the teacher leaves exactly as it is would divide by zero and gets no direction.
    """
    scale = beside(x, (x - real_x0).abs().flatten(1).mean(1))
    return torch.nan_to_num((fake_x0 - real_x0) / scale, nan=0.0, posinf=0.0, neginf=0.0)


def matching_direction(x: Tensor, real: Prediction, fake: Prediction, weighting: DmdWeighting) -> Tensor:
    """w alpha (s_fake - s_real) of x, with one of the three weights w that DMD compares (arXiv 2311.18828, section 4).

    "distance" is DMD's own, `dmd_direction`. sigma / alpha makes it eps_real - eps_fake, and sigma^3 / alpha makes it
    sigma^2 times that, `vsd_direction`.
    """
    if weighting == "distance":
        return dmd_direction(x, real.x0, fake.x0)
    if weighting == "sigma_cubed_over_alpha":
        return vsd_direction(real.eps, fake.eps, real.levels)
    return torch.nan_to_num(real.eps - fake.eps)


def vsd_direction(
    real_eps: Tensor, fake_eps: Tensor, levels: Levels, weighting: VsdWeighting = "sigma_squared"
) -> Tensor:
    """sigma^2 (eps_real - eps_fake): ProlificDreamer (arXiv 2305.16213) eq. 9 with w(t) = sigma^2, as SwiftBrush.

    "alpha_sigma_squared" is the other weight of ProlificDreamer's code, which it does not use.
    """
    weight = levels.sigma**2 if weighting == "sigma_squared" else levels.alpha * levels.sigma**2
    return torch.nan_to_num(weight.to(real_eps.dtype) * (real_eps - fake_eps))


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


def mse_distance(p: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference of each sample, (B,)."""
    return (p - y).square().flatten(1).mean(1)


def norm_distance(p: Tensor, y: Tensor) -> Tensor:
    """Length of each sample's difference, not squared, (B,); where both are equal its gradient is zero."""
    length: Tensor = torch.linalg.vector_norm((p - y).flatten(1), dim=1)
    return length


def huber_distance(p: Tensor, y: Tensor, c: float) -> Tensor:
    """Pseudo-Huber of every element, averaged per sample, (B,): mean(sqrt(d^2 + c^2) - c), as in the code of LCM."""
    return ((p - y).square() + c**2).sqrt().flatten(1).mean(1) - c


def sample_huber_distance(p: Tensor, y: Tensor, c: float) -> Tensor:
    """Pseudo-Huber of every sample's length, (B,): sqrt(|d|^2 + c^2) - c, iCT (arXiv 2310.14189) section 3.3."""
    return ((p - y).square().flatten(1).sum(1) + c**2).sqrt() - c


def distance(kind: Distance, p: Tensor, y: Tensor, c: float = 1e-3) -> Tensor:
    """How far predictions are from their targets, (B,).

    Four different things: a mean over elements for "mse" and "huber", a length of the whole sample, sqrt(CHW) times as
    large, for "l2" and "sample_huber".

    Args:
        kind: which distance.
        p: predictions, (B, C, H, W).
        y: targets, (B, C, H, W).
        c: where both Huber distances turn from square to linear, positive: in units of an element for "huber", of the
            whole sample's length for "sample_huber".
    """
    if kind == "mse":
        return mse_distance(p, y)
    if kind == "l2":
        return norm_distance(p, y)
    if not c > 0:
        raise UserError(f"distance {kind} needs a positive huber constant, got {c}; l2 is the limit at 0")
    return huber_distance(p, y, c) if kind == "huber" else sample_huber_distance(p, y, c)


def min_snr_weight(levels: Levels, kind: str, gamma: float) -> Tensor:
    """Min-SNR-gamma weight of the native squared error (Hang et al. 2023, arXiv 2303.09556, section 3.4), (B,).

    min(SNR, gamma) in x0 space; divided by what one unit of x0 error is in the native output.
    """
    snr = ((levels.alpha / levels.sigma) ** 2).flatten()
    return snr.clamp(max=gamma) / native_per_x0(levels, kind)


def native_per_x0(levels: Levels, kind: str) -> Tensor:
    """How much squared native error one unit of squared x0 error is at a fixed x_t, (B,)."""
    snr = ((levels.alpha / levels.sigma) ** 2).flatten()
    if kind == "flow":  # eps - x0 with x_t fixed: d native / d x0 = -(alpha + sigma) / sigma
        return ((levels.alpha + levels.sigma) / levels.sigma).flatten() ** 2
    return {"sample": torch.ones_like(snr), "epsilon": snr, "v_prediction": snr + 1}[kind]


def line_x0(x_t: Tensor, x_s: Tensor, here: Levels, there: Levels) -> Tensor:
    """The clean sample that a DDIM step has to be given to lead from x_t to x_s, (B, C, H, W).

    (x_s - r x_t) / (alpha_s - r alpha_t) with r = sigma_s / sigma_t: progressive distillation (Salimans and Ho 2022,
    arXiv 2202.00512), algorithm 2. For s = 0 it is x_s itself.
    """
    ratio = there.sigma / here.sigma
    x0 = (x_s.double() - ratio * x_t.double()) / (there.alpha - ratio * here.alpha)
    return x0.to(torch.promote_types(x_t.dtype, torch.float32))


def progressive_weight(levels: Levels, kind: str, weighting: ProgressiveWeighting) -> Tensor:
    """Weight of the squared x0 error in progressive distillation, (B,): arXiv 2202.00512, section 4, or our "native".

    Args:
        levels: of the times at which the student is called.
        kind: what its native output is.
        weighting: max(SNR, 1), SNR + 1, or what turns the error into that of the native output.
    """
    snr = ((levels.alpha / levels.sigma) ** 2).flatten()
    if weighting == "native":
        return native_per_x0(levels, kind)
    return snr.clamp(min=1) if weighting == "truncated_snr" else snr + 1


def native_weight(levels: Levels, kind: str, weighting: ProgressiveWeighting) -> Tensor | None:
    """What the squared native error is to be multiplied by for `progressive_weight` of the x0 error, (B,); None: 1."""
    if weighting == "native":
        return None
    return progressive_weight(levels, kind, weighting) / native_per_x0(levels, kind)


def add_weight(levels: Levels, weighting: AddWeighting) -> Tensor:
    """c(t) of adversarial diffusion distillation (arXiv 2311.17042, section 3.3), (B,).

    "exponential" is alpha. "sds" is alpha sigma / 2, with which the gradient of c |x - x0_teacher|^2 is that of score
    distillation, sigma^2 (eps_teacher - eps).
    """
    alpha, sigma = levels.alpha.flatten(), levels.sigma.flatten()
    return {"exponential": alpha, "sds": alpha * sigma / 2, "constant": torch.ones_like(alpha)}[weighting]
