"""Every view of a network's output, for every kind of network, against known x0 and eps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.prediction import KINDS, Levels, Prediction, add_noise, native_target
from stepdistill.schedule import EDMSchedule, FlowSchedule, NoiseSchedule, TrigFlowSchedule, from_scheduler_config


SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULES: dict[str, NoiseSchedule] = {
    "sd": from_scheduler_config(SD)[0],
    "flow": FlowSchedule(),
    "shifted flow": FlowSchedule(3.0),
    "trigflow": TrigFlowSchedule(),
    "edm": EDMSchedule(),
}
COUNT = 6


def known(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0, eps = (torch.randn(COUNT, 2, 3, 3, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return x0, eps


def predicted(kind: str, schedule: NoiseSchedule, t: Tensor, x0: Tensor, eps: Tensor) -> Prediction:
    """What a perfect network says about x_t."""
    levels = Levels.at(schedule, t, x0)
    return Prediction(native_target(kind, x0, eps, levels), kind, add_noise(schedule, x0, t, eps), levels)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_view_is_exact_for_every_kind_of_network(name: str, kind: str) -> None:
    schedule = SCHEDULES[name]
    t = torch.tensor([0.01, 0.2, 0.4, 0.6, 0.8, 0.97], dtype=torch.float64)
    x0, eps = known()
    prediction = predicted(kind, schedule, t, x0, eps)
    alpha, sigma, d_alpha, d_sigma = (
        f(t).reshape(-1, 1, 1, 1) for f in (schedule.alpha, schedule.sigma, schedule.d_alpha, schedule.d_sigma)
    )
    tolerance = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(prediction.x0, x0, **tolerance)
    torch.testing.assert_close(prediction.eps, eps, **tolerance)
    torch.testing.assert_close(prediction.v, alpha * eps - sigma * x0, **tolerance)
    torch.testing.assert_close(prediction.velocity, d_alpha * x0 + d_sigma * eps, **tolerance)
    torch.testing.assert_close(prediction.score, -eps / sigma, **tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_velocity_is_the_slope_of_the_noise_path(kind: str) -> None:
    h, (x0, eps) = 1e-6, known()
    for schedule in (FlowSchedule(3.0), TrigFlowSchedule(), EDMSchedule()):
        t = torch.full((COUNT,), 0.6, dtype=torch.float64)
        slope = (add_noise(schedule, x0, t + h, eps) - add_noise(schedule, x0, t - h, eps)) / (2 * h)
        torch.testing.assert_close(predicted(kind, schedule, t, x0, eps).velocity, slope, rtol=1e-6, atol=1e-6)


def test_the_velocity_of_rectified_flow_is_its_native_output() -> None:
    x0, eps = known()
    prediction = predicted("flow", FlowSchedule(), torch.full((COUNT,), 0.3), x0, eps)
    torch.testing.assert_close(prediction.velocity, eps - x0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_views_are_as_good_as_float32_inputs_at_the_last_timestep(kind: str) -> None:
    """1 / alpha is 14.6 there; the views must add nothing to that amplification of the inputs' own rounding."""
    schedule = SCHEDULES["sd"]
    t = torch.ones(COUNT, dtype=torch.float64)  # index 999
    x0, eps = known(dtype=torch.float32)
    prediction = predicted(kind, schedule, t, x0, eps)
    assert {v.dtype for v in (prediction.x0, prediction.eps, prediction.v, prediction.score)} == {torch.float32}
    rounding = 2.0**-23 * max(1.0, prediction.x_t.abs().max().item())
    amplified = rounding / schedule.alpha(t)[0].item()
    assert (prediction.x0 - x0).abs().max().item() <= (1 if kind == "sample" else 1.5) * amplified
    assert (prediction.eps - eps).abs().max().item() <= 2 * rounding
    x0_64 = (prediction.x_t.double() - prediction.levels.sigma * prediction.eps.double()) / prediction.levels.alpha
    if kind == "epsilon":  # exact in float64 but for the last rounding to float32
        assert (prediction.x0.double() - x0_64).abs().max().item() <= 2.0**-22 * x0_64.abs().max().item()


def test_half_precision_samples_get_float32_views() -> None:
    x0, eps = known(dtype=torch.bfloat16)
    prediction = predicted("epsilon", SCHEDULES["sd"], torch.full((COUNT,), 0.5), x0, eps)
    assert prediction.x0.dtype == torch.float32


@pytest.mark.parametrize("name", SCHEDULES)
def test_differences_of_two_predictions_are_one_thing_in_five_units(name: str) -> None:
    """x0_f - x0_r = s^2/a (score_f - score_r) = s/a (eps_r - eps_f), and so on, at equal x_t."""
    schedule = SCHEDULES[name]
    t = torch.linspace(0.1, 0.9, COUNT, dtype=torch.float64)
    x0, eps = known()
    real = predicted("epsilon", schedule, t, x0, eps)
    fake = Prediction(known(1)[1], "epsilon", real.x_t, real.levels)
    alpha, sigma = real.levels.alpha, real.levels.sigma
    gap = fake.x0 - real.x0
    tolerance = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(gap, sigma**2 / alpha * (fake.score - real.score), **tolerance)
    torch.testing.assert_close(gap, sigma / alpha * (real.eps - fake.eps), **tolerance)
    torch.testing.assert_close(real.eps - fake.eps, alpha / sigma * gap, **tolerance)
    if name == "flow":
        torch.testing.assert_close(gap, sigma * (real.velocity - fake.velocity), **tolerance)
    if name in ("sd", "trigflow"):
        torch.testing.assert_close(gap, sigma * (real.v - fake.v), **tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_the_native_target_of_a_views_own_x0_and_eps_is_the_native_output(kind: str) -> None:
    schedule, t = SCHEDULES["sd"], torch.linspace(0.1, 0.9, COUNT, dtype=torch.float64)
    levels = Levels.at(schedule, t, known()[0])
    said = Prediction(known(2)[0], kind, known(3)[0], levels)  # any output at any x_t
    torch.testing.assert_close(native_target(kind, said.x0, said.eps, levels), said.native, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(levels.alpha * said.x0 + levels.sigma * said.eps, said.x_t, rtol=1e-10, atol=1e-10)


def test_zero_terminal_snr_is_exact_for_v_and_sample_prediction() -> None:
    schedule, _ = from_scheduler_config({**SD, "rescale_betas_zero_snr": True})
    x0, eps = known()
    t = torch.ones(COUNT, dtype=torch.float64)
    for kind in ("v_prediction", "sample"):
        prediction = predicted(kind, schedule, t, x0, eps)
        torch.testing.assert_close(prediction.x0, x0, rtol=0, atol=1e-12)
        torch.testing.assert_close(prediction.eps, eps, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.0, 3.5])
def test_guidance_is_the_same_in_every_view(scale: float) -> None:
    schedule, t = SCHEDULES["sd"], torch.linspace(0.1, 0.9, COUNT, dtype=torch.float64)
    x0, eps = known()
    with_prompt = predicted("v_prediction", schedule, t, x0, eps)
    null = Prediction(known(4)[0], "v_prediction", with_prompt.x_t, with_prompt.levels)
    guided = with_prompt.guide(null, scale)
    for view in ("x0", "eps", "v", "velocity", "score"):
        expected = getattr(null, view) + scale * (getattr(with_prompt, view) - getattr(null, view))
        torch.testing.assert_close(getattr(guided, view), expected, rtol=1e-9, atol=1e-9)


def test_a_scale_per_sample_guides_each_by_its_own() -> None:
    schedule, t = SCHEDULES["sd"], torch.full((COUNT,), 0.5, dtype=torch.float64)
    a = predicted("epsilon", schedule, t, *known())
    b = Prediction(known(5)[0], "epsilon", a.x_t, a.levels)
    scales = torch.arange(COUNT, dtype=torch.float64).reshape(-1, 1, 1, 1)
    for index in range(COUNT):
        torch.testing.assert_close(a.guide(b, scales).x0[index], a.guide(b, float(index)).x0[index])


def test_gradients_flow_through_views_and_stop_at_detach() -> None:
    native = known()[0].requires_grad_(True)
    levels = Levels.at(SCHEDULES["sd"], torch.full((COUNT,), 0.5), native)
    prediction = Prediction(native, "epsilon", known(1)[0], levels)
    prediction.x0.sum().backward()
    torch.testing.assert_close(native.grad, (-levels.sigma / levels.alpha).expand_as(native))
    assert not prediction.detach().x0.requires_grad


def test_an_unknown_kind_is_a_users_error() -> None:
    x0, eps = known()
    levels = Levels.at(SCHEDULES["sd"], torch.full((COUNT,), 0.5), x0)
    with pytest.raises(UserError, match="unknown prediction kind 'noise'; expected one of epsilon"):
        native_target("noise", x0, eps, levels)
    with pytest.raises(UserError, match="unknown prediction kind 'noise'"):
        _ = Prediction(x0, "noise", x0, levels).x0
