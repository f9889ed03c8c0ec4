"""Where on the noise path losses are evaluated."""

from __future__ import annotations

import pytest
import torch

from stepdistill.errors import UserError
from stepdistill.schedule import FlowSchedule, from_scheduler_config
from stepdistill.times import check_timesteps, grid, uniform_times


SD = from_scheduler_config({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})[0]
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("low", "high", "first", "last"), [(0.02, 0.98, 20, 980), (0.0, 1.0, 0, 999), (1 / 3, 1 / 3, 333, 333)]
)
def test_drawn_indices_fill_the_range_and_reach_both_ends(low: float, high: float, first: int, last: int) -> None:
    torch.manual_seed(0)
    t = uniform_times(SD, 100_000, low=low, high=high, device=CPU)
    index = SD.model_time(t)
    assert torch.equal(index, index.round())
    assert (index.min().item(), index.max().item()) == (first, last)
    counts = torch.bincount(index.long(), minlength=1000)[first : last + 1]
    assert counts.min() > 0
    mean = 100_000 / len(counts)
    assert (counts - mean).abs().max() <= 6 * mean**0.5  # every index is as likely as the others


def test_a_short_table_has_the_same_share() -> None:
    schedule = from_scheduler_config({"num_train_timesteps": 100})[0]
    index = schedule.model_time(uniform_times(schedule, 10_000, low=0.02, high=0.98, device=CPU))
    assert (index.min().item(), index.max().item()) == (2, 98)


def test_a_continuous_schedule_gets_continuous_times() -> None:
    torch.manual_seed(0)
    t = uniform_times(FlowSchedule(3.0), 100_000, low=0.02, high=0.98, device=CPU)
    assert t.dtype == torch.float64
    assert 0.02 <= t.min() < 0.0202
    assert 0.9798 < t.max() <= 0.98
    assert t.mean().item() == pytest.approx(0.5, abs=0.005)


def test_a_grid_is_the_times_of_diffusers_indices() -> None:
    times = grid(SD, (999, 749, 499, 249), CPU)
    assert times.tolist() == [1.0, 0.75, 0.5, 0.25]
    assert SD.model_time(times).tolist() == [999, 749, 499, 249]


def test_the_last_index_is_pure_noise_of_a_flow_too() -> None:
    times = grid(FlowSchedule(3.0), (999, 749, 499, 249), CPU)
    assert times.tolist() == [1.0, 0.75, 0.5, 0.25]
    assert FlowSchedule(3.0).model_time(times).tolist() == [1000, 900, 750, 500]  # 1000 * 3 t / (1 + 2 t)


@pytest.mark.parametrize("index", [1000, -1])
def test_an_index_that_is_not_in_the_table_is_refused(index: int) -> None:
    with pytest.raises(UserError, match=f"timestep {index} is none of this teacher's: they go from 0 to 999"):
        check_timesteps(FlowSchedule(), (999, index))
