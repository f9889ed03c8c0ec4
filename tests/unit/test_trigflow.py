"""TrigFlow: any schedule and kind of network seen on the circle, against closed forms, formulas and differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from stepdistill.condition import Condition
from stepdistill.denoiser import Denoiser, OwnWeights
from stepdistill.errors import UserError
from stepdistill.prediction import Levels, native_target
from stepdistill.sampling import ddim_step
from stepdistill.schedule import FlowSchedule, NoiseSchedule, TrigFlowSchedule, from_scheduler_config
from stepdistill.trigflow import LogWeight, TrigFlow, consistency_tangent, normalized_tangent
from tests.oracles.oracle import shaped


SD, _ = from_scheduler_config({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
ZERO_SNR, _ = from_scheduler_config({"rescale_betas_zero_snr": True})
VIEWS: dict[str, tuple[NoiseSchedule, str]] = {
    "epsilon": (SD, "epsilon"),
    "v": (SD, "v_prediction"),
    "v to zero SNR": (ZERO_SNR, "v_prediction"),
    "flow": (FlowSchedule(), "flow"),
    "shifted flow": (FlowSchedule(3.0), "flow"),
    "trigflow": (TrigFlowSchedule(), "v_prediction"),
}
EVERY = pytest.mark.parametrize(("schedule", "kind"), VIEWS.values(), ids=VIEWS.keys())
SPREADS = pytest.mark.parametrize("data_std", [1.0, 0.5])
MEAN, STD = 0.4, 0.7
NOTHING = Condition({"label": torch.zeros(64)})


def drawn(count: int = 64, low: float = 0.07, high: float = 1.4) -> tuple[Tensor, Tensor]:
    """x, (count, 3), and angles, (count,), between the first and the last timestep of Stable Diffusion."""
    torch.manual_seed(0)
    return torch.randn(count, 3, dtype=torch.float64), low + (high - low) * torch.rand(count, dtype=torch.float64)


def gaussian_of(schedule: NoiseSchedule, kind: str) -> Denoiser:
    """The exact denoiser of N(MEAN, STD^2), of any kind."""

    def call(network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        levels = Levels.at(schedule, schedule.t_from_model_time(model_time), x_t)
        off = (x_t - levels.alpha * MEAN) / (levels.alpha**2 * STD**2 + levels.sigma**2)
        return native_target(kind, MEAN + levels.alpha * STD**2 * off, levels.sigma * off, levels)

    return Denoiser(call, OwnWeights(nn.Module()), schedule, kind)


def bent(schedule: NoiseSchedule, kind: str) -> Denoiser:
    """A network without any meaning, curved in x_t and in its time."""
    last = schedule.model_time(torch.ones(1, dtype=torch.float64))

    def call(network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        return torch.sin(x_t * shaped(1 + model_time / last, x_t) ** 2) + 0.3 * x_t.roll(1, 1) ** 2

    return Denoiser(call, OwnWeights(nn.Module()), schedule, kind)


def velocity_of_gaussian(x: Tensor, angle: Tensor, data_std: float) -> Tensor:
    """cos E[eps | x] - sin E[x0 | x] for x = cos x0 + sin eps and x0 from N(MEAN, STD^2) / data_std."""
    cos, sin, mean, std = shaped(angle.cos(), x), shaped(angle.sin(), x), MEAN / data_std, STD / data_std
    off = (x - cos * mean) / (cos**2 * std**2 + sin**2)
    return cos * sin * off - sin * (mean + cos * std**2 * off)


# ---- where points lie ----------------------------------------------------------------------------------------------


@EVERY
@SPREADS
def test_angles_and_times_are_inverse_and_grow_together(schedule: NoiseSchedule, kind: str, data_std: float) -> None:
    trig = TrigFlow(schedule, data_std)
    angle = torch.linspace(0.001, 1.4, 200, dtype=torch.float64)
    t = trig.time(angle)
    assert bool((t.diff() > 0).all())
    torch.testing.assert_close(trig.angle(t), angle, rtol=0, atol=1e-12)
    assert trig.time(torch.zeros(1)).item() == 0.0


def test_the_time_of_a_flow_at_an_angle_is_sin_over_sin_plus_cos() -> None:
    angle = torch.linspace(0, math.pi / 2, 101, dtype=torch.float64)
    t = TrigFlow(FlowSchedule()).time(angle)
    torch.testing.assert_close(t, angle.sin() / (angle.sin() + angle.cos()), rtol=0, atol=1e-14)
    assert (t[0].item(), t[-1].item()) == (0.0, 1.0)


@EVERY
@SPREADS
def test_noising_on_the_circle_and_on_the_schedule_is_the_same(
    schedule: NoiseSchedule, kind: str, data_std: float
) -> None:
    trig, (x0, angle), eps = TrigFlow(schedule, data_std), drawn(), torch.randn(64, 3, dtype=torch.float64)
    x_t, t = trig.place(trig.noised(x0, angle, eps), angle)
    levels = Levels.at(schedule, t, x0)
    torch.testing.assert_close(x_t, levels.alpha * x0 + levels.sigma * eps, rtol=0, atol=1e-12)


def test_a_schedule_that_ends_before_pure_noise_limits_the_angles() -> None:
    angle = torch.tensor([0.0, 0.5, math.pi / 2], dtype=torch.float64)
    low, middle, high = TrigFlow(SD).clamp(angle).tolist()
    assert low == pytest.approx(math.acos(0.999575), abs=1e-5)  # alpha at index 0, six digits
    assert middle == 0.5
    assert high == pytest.approx(math.acos(0.068265), abs=1e-6)  # alpha at index 999
    assert TrigFlow(FlowSchedule(3.0)).clamp(angle).tolist() == pytest.approx(angle.tolist(), abs=1e-15)


def test_angles_are_drawn_as_the_papers_draw_them() -> None:
    torch.manual_seed(0)
    options = {"mean": -0.8, "std": 1.6, "sigma_d": 0.5, "device": torch.device("cpu")}
    tau = (0.5 * TrigFlow(FlowSchedule()).draw_angles(40_000, **options).tan()).log()
    assert tau.mean().item() == pytest.approx(-0.8, abs=0.03)
    assert tau.std().item() == pytest.approx(1.6, abs=0.03)
    limited = TrigFlow(SD).draw_angles(4000, **{**options, "mean": 2.0})
    assert limited.max().item() == TrigFlow(SD).angle(torch.ones(1)).item()
    assert limited.dtype == torch.float64


def test_a_spread_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="data_std must be positive"):
        TrigFlow(FlowSchedule(), 0.0)


# ---- what a network says there -------------------------------------------------------------------------------------


@EVERY
@SPREADS
def test_any_teacher_becomes_the_exact_velocity_on_the_circle(
    schedule: NoiseSchedule, kind: str, data_std: float
) -> None:
    trig, (x, angle) = TrigFlow(schedule, data_std), drawn()
    found = trig.output(gaussian_of(schedule, kind)(*trig.place(x, angle), NOTHING))
    torch.testing.assert_close(found, velocity_of_gaussian(x, angle, data_std), rtol=0, atol=1e-12)


def test_a_flow_is_converted_as_sana_sprint_converts_it() -> None:
    x, angle = drawn(high=math.pi / 2)
    t = shaped(angle.sin() / (angle.sin() + angle.cos()), x)
    scale = (t**2 + (1 - t) ** 2).sqrt()
    network, trig = bent(FlowSchedule(), "flow"), TrigFlow(FlowSchedule())
    v = network(x * scale, t.flatten(), NOTHING).native
    expected = ((1 - 2 * t) * x * scale + (1 - 2 * t + 2 * t**2) * v) / scale
    found = trig.output(network(*trig.place(x, angle), NOTHING))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_variance_preserving_network_says_its_v() -> None:
    x, angle = drawn()
    for kind in ("epsilon", "v_prediction"):
        prediction = bent(SD, kind)(*TrigFlow(SD).place(x, angle), NOTHING)
        torch.testing.assert_close(TrigFlow(SD).output(prediction), prediction.v, rtol=0, atol=1e-12)


@EVERY
@SPREADS
def test_a_turn_along_the_circle_is_the_ddim_step(schedule: NoiseSchedule, kind: str, data_std: float) -> None:
    """x_s = cos(t - s) x_t - sin(t - s) F."""
    trig, (x, angle), network = TrigFlow(schedule, data_std), drawn(), bent(schedule, kind)
    lower = 0.6 * angle
    prediction = network(*trig.place(x, angle), NOTHING)
    by = shaped(angle - lower, x)
    turned, s = trig.place(by.cos() * x - by.sin() * trig.output(prediction), lower)
    torch.testing.assert_close(turned, ddim_step(network, prediction, s), rtol=0, atol=1e-11)


def test_the_clean_prediction_is_cos_x_minus_sin_f_and_at_angle_zero_x_itself() -> None:
    x, angle = drawn()
    angle[0] = 0.0
    trig, cos, sin = TrigFlow(FlowSchedule(3.0), 0.5), shaped(angle.cos(), x), shaped(angle.sin(), x)
    prediction = bent(FlowSchedule(3.0), "flow")(*trig.place(x, angle), NOTHING)
    torch.testing.assert_close(prediction.x0 / 0.5, cos * x - sin * trig.output(prediction), rtol=0, atol=1e-12)
    assert torch.equal(prediction.x0[0], 0.5 * x[0])


# ---- derivatives ---------------------------------------------------------------------------------------------------


@EVERY
@SPREADS
def test_the_derivative_is_the_central_difference_of_f_on_the_circle(
    schedule: NoiseSchedule, kind: str, data_std: float
) -> None:
    trig, (x, angle), network = TrigFlow(schedule, data_std), drawn(), bent(schedule, kind)
    along, turn = torch.randn_like(x), torch.randn_like(angle)

    def f(h: float) -> Tensor:
        place = trig.place(x + h * along, angle + h * turn)
        return trig.output(network(*place, NOTHING))

    h = 1e-6
    expected = (f(h) - f(-h)) / (2 * h)
    output, found = trig.derivative(network, x, angle, NOTHING, (along, turn))
    torch.testing.assert_close(output, f(0.0), rtol=0, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    _, rough = trig.derivative(network, x, angle, NOTHING, (along, turn), difference=1e-6)
    torch.testing.assert_close(rough, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_the_derivative_is_finite_from_the_first_to_the_last_angle_in_float32() -> None:
    angle = torch.tensor([1e-4, math.pi / 2], dtype=torch.float64)
    x, turn = torch.randn(2, 3), angle.cos() * angle.sin()
    for data_std in (1.0, 0.5):
        trig, network = TrigFlow(FlowSchedule(3.0), data_std), bent(FlowSchedule(3.0), "flow")
        output, found = trig.derivative(network, x, angle, NOTHING, (shaped(turn, x).float() * x, turn))
        assert output.dtype == found.dtype == torch.float32
        assert bool(torch.isfinite(output).all()) and bool(torch.isfinite(found).all())


# ---- tangents and weights ------------------------------------------------------------------------------------------


def test_without_warm_up_the_tangent_is_that_of_denoising() -> None:
    x, angle = drawn()
    output, velocity, derivative = torch.randn(3, *x.shape, dtype=torch.float64)
    cold = consistency_tangent(x, angle, output, velocity, derivative, warmup=0.0)
    torch.testing.assert_close(cold, -shaped(angle.cos() ** 2, x) * (output - velocity), rtol=0, atol=1e-15)
    half = consistency_tangent(x, angle, output, velocity, derivative, warmup=0.5)
    expected = cold - 0.5 * (shaped(angle.cos() * angle.sin(), x) * x + derivative)
    torch.testing.assert_close(half, expected, rtol=0, atol=1e-15)


def test_normalised_tangents_by_hand() -> None:
    tangent = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-0.3, 0.4]], dtype=torch.float64)
    expected = {
        "l2": [[3 / 5.1, 4 / 5.1], [0, 0], [-0.3 / 0.6, 0.4 / 0.6]],
        "rms": [[3 / (12.5**0.5 + 0.1), 4 / (12.5**0.5 + 0.1)], [0, 0],
                [-0.3 / (0.125**0.5 + 0.1), 0.4 / (0.125**0.5 + 0.1)]],
        "clip": [[1, 1], [0, 0], [-0.3, 0.4]],
        "none": tangent.tolist(),
    }  # fmt: skip
    for kind, rows in expected.items():
        found = normalized_tangent(tangent, kind, 0.1)  # type: ignore[arg-type]
        torch.testing.assert_close(found, torch.tensor(rows, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_weight_begins_at_one_and_learns_the_reciprocal_error_of_every_angle() -> None:
    module, angle = LogWeight(), torch.linspace(0.02, 1.55, 256, dtype=torch.float64)
    error = 0.1 + angle.float() ** 2
    assert module(angle).exp().tolist() == [1.0] * 256
    optimizer = torch.optim.LBFGS(module.parameters(), lr=1.0, max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (module(angle).exp() * error - module(angle)).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(module(angle), -error.log(), rtol=0, atol=0.05)
