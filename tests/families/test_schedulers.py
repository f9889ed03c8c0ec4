"""The stock schedulers of students that are sampled as TCD samples, or that learnt from a flow-matching teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, TCDScheduler

from stepdistill.errors import UserError
from stepdistill.export.schedulers import noise_levels, student_scheduler, told_timesteps
from stepdistill.objectives.base import InferenceSpec
from stepdistill.sampling import Sampler


BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("timesteps", [(999,), (999, 749, 499, 249), (999, 759, 499, 259), (759, 509, 259)])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_a_tcd_schedule_has_the_teachers_noise_levels_and_ends_at_clean_data(
    timesteps: tuple[int, ...], zero_snr: bool, tmp_path: Path
) -> None:
    kind = "v_prediction" if zero_snr else "epsilon"
    teacher = DDIMScheduler(**BETAS, rescale_betas_zero_snr=zero_snr, prediction_type=kind)
    student_scheduler(teacher.config, InferenceSpec(timesteps, "tcd")).save_pretrained(tmp_path)
    scheduler = TCDScheduler.from_pretrained(tmp_path)
    levels = teacher.alphas_cumprod[: timesteps[0] + 1]
    assert scheduler.alphas_cumprod[0] == 1
    torch.testing.assert_close(scheduler.alphas_cumprod[1:], levels[1:], rtol=2e-6, atol=1e-8)
    scheduler.set_timesteps(len(timesteps))
    assert scheduler.timesteps.tolist() == list(timesteps)
    # the last step gives x0, whatever eta is
    x, said = torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4, 4)
    scheduler.set_begin_index(len(timesteps) - 1)
    t = timesteps[-1]
    alpha, sigma = teacher.alphas_cumprod[t].sqrt(), (1 - teacher.alphas_cumprod[t]).sqrt()
    x0 = alpha * x - sigma * said if zero_snr else (x - sigma * said) / alpha
    made = scheduler.step(said, torch.tensor(t), x, eta=0.3).prev_sample
    torch.testing.assert_close(made, x0, rtol=1e-4, atol=1e-4)


def flow_config(shift: float) -> dict[str, Any]:
    return {**FlowMatchEulerDiscreteScheduler(shift=shift).config, "_class_name": "FlowMatchEulerDiscreteScheduler"}


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5, 6.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 8, 10, 20])
@pytest.mark.parametrize("sampler", ["stochastic", "deterministic"])
def test_a_flow_schedule_is_the_shifted_even_one_and_wastes_no_call(
    shift: float, steps: int, sampler: Sampler, tmp_path: Path
) -> None:
    spec = InferenceSpec(tuple(round(1000 * (1 - i / steps)) - 1 for i in range(steps)), sampler)
    made = student_scheduler(flow_config(shift), spec)
    made.save_pretrained(tmp_path)
    kind = FlowMatchLCMScheduler if sampler == "stochastic" else FlowMatchEulerDiscreteScheduler
    assert type(made) is kind
    scheduler = kind.from_pretrained(tmp_path)
    scheduler.set_timesteps(steps)
    t = [(index + 1) / 1000 for index in spec.timesteps]
    expected = [shift * v / (1 + (shift - 1) * v) for v in t]
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([*expected, 0.0]), rtol=0, atol=1e-5)
    assert told_timesteps(made, spec) == pytest.approx([1000 * sigma for sigma in expected], abs=0.01)
    assert noise_levels(made, spec) == pytest.approx(expected, abs=1e-5)
    # One step of the scheduler is one of the formula: to the next sigma, with fresh noise or along the flow.
    x, velocity = torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4, 4)
    following = ([*expected, 0.0])[1]
    torch.manual_seed(0)
    stepped = scheduler.step(velocity, scheduler.timesteps[0], x).prev_sample
    torch.manual_seed(0)
    x0, eps = x - velocity, torch.randn_like(x) if sampler == "stochastic" else x
    torch.testing.assert_close(stepped, (1 - following) * x0 + following * eps, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (InferenceSpec((899, 499)), "begin with pure noise; begin at timestep 999, not at 899"),
        (InferenceSpec((999, 899, 99)), r"no stock .*\[999, 899, 99\].* for example \[999, 499\]"),
        (InferenceSpec((999, 800, 500, 100)), r"no stock .* for example \[999, 749, 499, 249\]"),
        (InferenceSpec((1000,)), "at most 999"),
        (InferenceSpec((999, 499), "tcd", eta=0.3), "mixes predicted and fresh noise"),
    ],
)
def test_a_flow_schedule_without_a_stock_encoding_is_refused_with_a_remedy(spec: InferenceSpec, message: str) -> None:
    with pytest.raises(UserError, match=message):
        student_scheduler(flow_config(3.0), spec)
