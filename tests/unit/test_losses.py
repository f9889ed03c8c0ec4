"""Losses and directions on cases of two pixels that can be done by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stepdistill.losses import (
    dmd_direction,
    min_snr_weight,
    pseudo_loss,
    scaled_gradient,
    taken_early,
    vsd_direction,
    weighted_mse,
)
from stepdistill.prediction import KINDS, Levels, Prediction, native_target
from stepdistill.schedule import FlowSchedule, from_scheduler_config


def pixels(*rows: tuple[float, float]) -> Tensor:
    """Rows of two pixels => (B, 1, 1, 2)."""
    return torch.tensor(rows, dtype=torch.float64)[:, None, None]


def levels_of(*pairs: tuple[float, float]) -> Levels:
    alpha, sigma = (torch.tensor(v, dtype=torch.float64).reshape(-1, 1, 1, 1) for v in zip(*pairs, strict=True))
    return Levels(alpha, sigma, torch.zeros_like(alpha), torch.zeros_like(alpha))


def test_the_pseudo_loss_of_two_pixels() -> None:
    x = pixels((1.0, -2.0)).requires_grad_(True)
    loss = pseudo_loss(x, pixels((0.5, 3.0)))
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (0.5**2 + 3.0**2) / 2)
    assert x.grad.flatten().tolist() == pytest.approx([0.25, 1.5])


def test_the_dmd_direction_of_two_pixels() -> None:
    x, real, fake = pixels((1.0, 3.0)), pixels((2.0, 0.0)), pixels((0.0, 4.0))
    # mean |x - real| = (1 + 3) / 2 = 2
    assert dmd_direction(x, real, fake).flatten().tolist() == [-1.0, 2.0]


def test_descending_along_the_dmd_direction_leads_from_the_fake_to_the_real() -> None:
    x, real, fake = pixels((0.0, 0.0)), pixels((1.0, -1.0)), pixels((0.5, 0.5))
    step = -dmd_direction(x, real, fake)
    assert step.flatten().tolist() == [0.5, -1.5]  # real - fake


def test_every_sample_has_a_normaliser_of_its_own() -> None:
    x, real, fake = pixels((1.0, 1.0), (10.0, 10.0)), pixels((0.0, 0.0), (0.0, 0.0)), pixels((1.0, 2.0), (1.0, 2.0))
    assert dmd_direction(x, real, fake).flatten(1).tolist() == [[1.0, 2.0], [0.1, 0.2]]


def test_the_vsd_direction_of_two_pixels() -> None:
    direction = vsd_direction(pixels((1.0, 0.0)), pixels((0.5, 2.0)), levels_of((0.8, 0.6)))
    assert direction.flatten().tolist() == pytest.approx([0.36 * 0.5, 0.36 * -2.0])


def test_the_weighted_error_of_two_samples() -> None:
    prediction, target = pixels((1.0, 3.0), (0.0, 2.0)), pixels((0.0, 0.0), (0.0, 0.0))
    assert weighted_mse(prediction, target).item() == pytest.approx((5.0 + 2.0) / 2)
    weight = torch.tensor([0.1, 10.0])
    assert weighted_mse(prediction, target, weight).item() == pytest.approx((0.5 + 20.0) / 2)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_are_the_published_ones(gamma: float) -> None:
    """Hang et al. 2023: min(SNR, g) for x0, min(SNR, g) / SNR for noise, min(SNR, g) / (SNR + 1) for v."""
    pairs = [(0.8, 0.6), (0.6, 0.8), (0.995, 0.0998749), (0.1, 0.9949874)]
    levels, snr = levels_of(*pairs), torch.tensor([(a / s) ** 2 for a, s in pairs], dtype=torch.float64)
    capped = torch.tensor([min(value, gamma) for value in snr.tolist()], dtype=torch.float64)
    torch.testing.assert_close(min_snr_weight(levels, "sample", gamma), capped)
    torch.testing.assert_close(min_snr_weight(levels, "epsilon", gamma), capped / snr)
    torch.testing.assert_close(min_snr_weight(levels, "v_prediction", gamma), capped / (snr + 1))
    assert min_snr_weight(levels, "epsilon", gamma)[3] == pytest.approx(1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_weighs_the_error_in_x0_the_same_for_every_kind_of_network(kind: str) -> None:
    schedule = FlowSchedule() if kind == "flow" else from_scheduler_config({})[0]
    generator = torch.Generator().manual_seed(0)
    x0, eps, error = (torch.randn(4, 1, 2, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    levels = Levels.at(schedule, torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64), x0)
    target = native_target(kind, x0, eps, levels)
    said = Prediction(target + error, kind, levels.alpha * x0 + levels.sigma * eps, levels)
    native = min_snr_weight(levels, kind, 5.0) * error.square().flatten(1).mean(1)
    snr = ((levels.alpha / levels.sigma) ** 2).flatten()
    torch.testing.assert_close(native, snr.clamp(max=5.0) * (said.x0 - x0).square().flatten(1).mean(1))


# ---- gradients that are taken early --------------------------------------------------------------------------------


def judge() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 1)).requires_grad_(False)


def gradient_of(size: float, precision: torch.dtype | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of size times the mean of a judge's logits, as `taken_early` hands it on to whatever made the samples."""
    network = judge()
    made = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)).to(dtype).float().requires_grad_(True)
    with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
        taken_early(made.to(dtype), lambda x: size * network(x).float().mean()).backward()
    return made.grad


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 300.0, 5e4], ids=lambda size: f"{size:g}")
def test_under_float16_a_gradient_that_is_taken_early_neither_vanishes_nor_overflows(size: float) -> None:
    exact, found = gradient_of(size, None), gradient_of(size, torch.float16)
    torch.testing.assert_close(found, exact, rtol=0, atol=5e-3 * float(exact.abs().max()))


def test_without_a_scale_the_same_gradient_would_vanish() -> None:
    network, x = judge(), torch.randn(64, 8, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        (plain,) = torch.autograd.grad(1e-6 * network(x).float().mean(), x, retain_graph=True)
        assert not plain.any()
        assert scaled_gradient(1e-6 * network(x).float().mean(), x).any()


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_in_other_precisions_a_gradient_that_is_taken_early_is_the_plain_one(precision: torch.dtype | None) -> None:
    network, x = judge(), torch.randn(64, 8, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
        (plain,) = torch.autograd.grad(0.3 * network(x).float().mean(), x)
    assert torch.equal(gradient_of(0.3, precision), plain)


def test_a_scale_is_a_power_of_two_and_changes_no_bit_where_nothing_is_rounded_away() -> None:
    x = torch.randn(64, 8, requires_grad=True)
    value = judge()(x).square().mean()
    (plain,) = torch.autograd.grad(value, x, retain_graph=True)
    assert torch.equal(scaled_gradient(value, x), plain)


def test_half_precision_samples_get_the_gradient_before_it_is_rounded() -> None:
    """The loss scale of the backward pass that follows finds it whole."""
    network = judge()
    x = torch.randn(64, 8, dtype=torch.float16, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        loss = taken_early(x, lambda sample: 1e-6 * network(sample).float().mean())
    (loss * 2.0**15).backward()
    assert x.grad.any()
