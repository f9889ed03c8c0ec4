"""Noise schedules: against Diffusers, against a table, against their own inverses and differences."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.prediction import add_noise
from stepdistill.schedule import (
    EDMSchedule,
    FlowSchedule,
    NoiseSchedule,
    TrigFlowSchedule,
    VPSchedule,
    from_scheduler_config,
)


SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
BETAS: dict[str, dict[str, Any]] = {
    "scaled_linear": SD,
    "linear": {"beta_schedule": "linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero terminal SNR": {**SD, "rescale_betas_zero_snr": True},
    "own betas": {"trained_betas": [1e-4 + 2e-5 * i for i in range(400)], "num_train_timesteps": 400},
}
# Indices of Stable Diffusion's schedule => alpha_bar, alpha, sigma.
TABLE = {
    0: (0.999150, 0.999575, 0.029155),
    20: (0.981314, 0.990613, 0.136695),
    249: (0.675432, 0.821847, 0.569708),
    399: (0.426086, 0.652753, 0.757571),
    499: (0.277670, 0.526944, 0.849900),
    625: (0.137769, 0.371173, 0.928564),
    749: (0.056623, 0.237957, 0.971276),
    980: (0.005844, 0.076445, 0.997074),
    999: (0.004660, 0.068265, 0.997667),
}


def vp(name: str = "scaled_linear") -> VPSchedule:
    schedule, _ = from_scheduler_config({"_class_name": "DDIMScheduler", **BETAS[name]})
    assert isinstance(schedule, VPSchedule)
    return schedule


SCHEDULES: dict[str, NoiseSchedule] = {
    **{name: vp(name) for name in BETAS},
    "flow": FlowSchedule(),
    "shifted flow": FlowSchedule(3.0),
    "edm": EDMSchedule(),
    "trigflow": TrigFlowSchedule(),
}
EVERY = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def times(count: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    return torch.linspace(low, high, count, dtype=torch.float64)


@pytest.mark.parametrize("index", TABLE)
def test_stable_diffusions_levels_are_those_of_the_table(index: int) -> None:
    t = vp().t_from_model_time(torch.tensor([index]))
    alpha, sigma = vp().alpha(t).item(), vp().sigma(t).item()
    assert (alpha**2, alpha, sigma) == pytest.approx(TABLE[index], abs=1e-6)  # the table has six digits


@pytest.mark.parametrize("name", BETAS)
def test_noising_is_what_diffusers_does_at_every_index(name: str) -> None:
    stock = DDPMScheduler(**BETAS[name])
    schedule = vp(name)
    index = torch.arange(schedule.num_train_timesteps)
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(len(index), 3, generator=generator) for _ in range(2))
    ours = add_noise(schedule, x0, schedule.t_from_model_time(index), eps)
    torch.testing.assert_close(ours, stock.add_noise(x0, eps, index), rtol=0, atol=3e-6)
    assert ours.dtype == torch.float32


@pytest.mark.parametrize("name", BETAS)
def test_an_index_comes_back_exactly_from_its_time(name: str) -> None:
    schedule = vp(name)
    index = torch.arange(schedule.num_train_timesteps)
    for given in (index, index.float(), index.double()):
        t = schedule.t_from_model_time(given)
        assert torch.equal(schedule.model_time(t), index.double())
        # what is fed to a network in float32 must come back as well
        assert torch.equal(schedule.t_from_model_time(schedule.model_time(t).float()), t)
    assert (t[0].item(), t[-1].item()) == (1 / schedule.num_train_timesteps, 1.0)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_flow_has_the_sigmas_of_diffusers_and_feeds_its_timesteps(shift: float, tmp_path: Path) -> None:
    stock = FlowMatchEulerDiscreteScheduler(shift=shift)
    stock.save_pretrained(tmp_path)
    schedule, kind = from_scheduler_config(json.loads((tmp_path / "scheduler_config.json").read_text()))
    assert kind == "flow"
    t = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000  # Diffusers' grid before the shift
    torch.testing.assert_close(schedule.sigma(t).float(), stock.sigmas, rtol=0, atol=1e-6)
    torch.testing.assert_close(schedule.model_time(t).float(), stock.timesteps, rtol=0, atol=1e-3)
    x0, eps = torch.randn(1000, 3), torch.randn(1000, 3)
    ours = add_noise(schedule, x0, t, eps)
    torch.testing.assert_close(ours, stock.scale_noise(x0, stock.timesteps, eps), rtol=0, atol=3e-6)


@EVERY
def test_model_time_and_log_snr_are_invertible(schedule: NoiseSchedule) -> None:
    # Below a table's first index there is no other number to feed than 0.
    low = 1 / schedule.num_train_timesteps if isinstance(schedule, VPSchedule) else 0.0
    t = times(997, low, 1.0)
    torch.testing.assert_close(schedule.t_from_model_time(schedule.model_time(t)), t, rtol=0, atol=1e-10)
    t = times(997, 0.001, 0.99)
    torch.testing.assert_close(schedule.t_from_log_snr(schedule.log_snr(t)), t, rtol=0, atol=1e-10)
    assert (schedule.log_snr(t).diff() < 0).all()


@EVERY
def test_derivatives_are_central_differences(schedule: NoiseSchedule) -> None:
    h = 1e-6
    # between the knots: at a knot of a table the slope jumps
    t = times(400, 0.0013, 0.9987)
    if isinstance(schedule, VPSchedule):
        n = schedule.num_train_timesteps
        t = (torch.arange(1, n - 1, dtype=torch.float64) + 0.37) / n
    for value, derivative in ((schedule.alpha, schedule.d_alpha), (schedule.sigma, schedule.d_sigma)):
        difference = (value(t + h) - value(t - h)) / (2 * h)
        torch.testing.assert_close(derivative(t), difference, rtol=1e-6, atol=1e-6)


@EVERY
def test_time_zero_is_data_and_levels_are_float64_of_the_shape_of_t(schedule: NoiseSchedule) -> None:
    zero = torch.zeros(2, 3)
    assert schedule.alpha(zero).tolist() == [[1.0] * 3] * 2
    floor = 0.002 if isinstance(schedule, EDMSchedule) else 0.0
    assert schedule.sigma(zero).flatten().tolist() == pytest.approx([floor] * 6, abs=1e-15)
    for function in (schedule.alpha, schedule.sigma, schedule.d_alpha, schedule.d_sigma, schedule.model_time):
        assert function(zero).shape == (2, 3)
        assert function(zero).dtype == torch.float64


@pytest.mark.parametrize("name", BETAS)
def test_a_table_schedule_preserves_variance_between_its_knots_too(name: str) -> None:
    t = times(3333)
    torch.testing.assert_close(vp(name).alpha(t) ** 2 + vp(name).sigma(t) ** 2, torch.ones_like(t), rtol=0, atol=1e-14)


def test_zero_terminal_snr_ends_without_signal() -> None:
    one = torch.ones(1)
    assert vp("zero terminal SNR").alpha(one).abs().item() < 1e-15
    assert vp("zero terminal SNR").sigma(one).item() == 1.0
    assert vp().alpha(one).item() == pytest.approx(0.068265, abs=6e-7)


def test_flow_and_trigflow_end_at_pure_noise() -> None:
    one = torch.ones(1)
    for schedule in (FlowSchedule(), FlowSchedule(3.0), TrigFlowSchedule()):
        assert schedule.alpha(one).abs().item() < 1e-15
        assert schedule.sigma(one).item() == pytest.approx(1.0, abs=1e-15)
    assert TrigFlowSchedule().model_time(one).item() == pytest.approx(math.pi / 2)


@pytest.mark.parametrize(("index", "sigma"), [(0, 0.0020), (20, 0.00323), (500, 2.527), (979, 71.655), (999, 80.0)])
def test_edm_has_the_grid_of_karras(index: int, sigma: float) -> None:
    assert EDMSchedule().sigma(torch.tensor([index / 999])).item() == pytest.approx(sigma, rel=2e-3)


def test_edm_feeds_a_quarter_of_the_log_of_sigma() -> None:
    t = times(5)
    torch.testing.assert_close(EDMSchedule().model_time(t), EDMSchedule().sigma(t).log() / 4)


@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler(**SD), DDPMScheduler(**SD), EulerDiscreteScheduler(**SD), LCMScheduler(**SD),
     DPMSolverMultistepScheduler(**SD)],
    ids=lambda scheduler: type(scheduler).__name__,
)  # fmt: skip
def test_any_scheduler_class_of_one_model_gives_one_schedule(scheduler: Any) -> None:
    schedule, kind = from_scheduler_config(scheduler.config)
    assert kind == "epsilon"
    assert torch.equal(schedule.alpha(times(50)), vp().alpha(times(50)))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_prediction_type_is_read(kind: str) -> None:
    assert from_scheduler_config(DDIMScheduler(**SD, prediction_type=kind).config)[1] == kind


def test_a_flow_model_behind_a_multistep_scheduler_is_recognised() -> None:
    config = {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction", "flow_shift": 3.0}
    schedule, kind = from_scheduler_config(config)
    assert (kind, schedule.sigma(torch.tensor([0.5])).item()) == ("flow", pytest.approx(0.75))


def test_what_cannot_be_read_is_a_users_error() -> None:
    with pytest.raises(UserError, match=r"scheduler_config\.json.*'score'.*epsilon"):
        from_scheduler_config({"_class_name": "DDIMScheduler", "prediction_type": "score"})
    with pytest.raises(UserError, match="shift must be positive"):
        FlowSchedule(0.0)
    with pytest.raises(UserError, match="fall strictly"):
        VPSchedule(torch.tensor([0.9, 0.9, 0.1]))
