"""The solver grid, its pairs and its segments, against the numbers of the published settings."""

from __future__ import annotations

import pytest
import torch

from stepdistill.errors import UserError
from stepdistill.schedule import FlowSchedule, from_scheduler_config
from stepdistill.segments import SolverGrid
from stepdistill.times import trailing


SD = from_scheduler_config({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})[0]
CPU = torch.device("cpu")
FIFTY = SolverGrid(SD, 50, CPU)


def test_a_grid_of_fifty_steps_has_the_timesteps_of_lcm_and_begins_with_clean_data() -> None:
    assert SD.model_time(FIFTY.times[1:]).tolist() == [20.0 * i - 1 for i in range(1, 51)]
    assert FIFTY.times[0] == 0
    assert SD.alpha(FIFTY.times[:1]) == 1 and SD.sigma(FIFTY.times[:1]) == 0


@pytest.mark.parametrize("steps", [1, 7, 30, 999, 1000])
def test_a_vp_grid_always_reaches_the_last_timestep_over_learnt_ones(steps: int) -> None:
    indices = SD.model_time(SolverGrid(SD, steps, CPU).times[1:])
    assert torch.equal(indices, indices.round())
    assert bool((indices.diff() > 0).all()) and indices[-1] == 999 and len(indices) == steps


def test_a_grid_that_falls_has_the_trailing_timesteps_of_diffusers() -> None:
    for steps in (1, 2, 4, 8, 25):
        times = SolverGrid(SD, steps, CPU).times[1:].flip(0)
        assert tuple(int(i) for i in SD.model_time(times)) == trailing(SD, steps)


def test_a_flow_grid_is_even_in_time_up_to_pure_noise() -> None:
    times = SolverGrid(FlowSchedule(3.0), 30, CPU).times
    torch.testing.assert_close(times, torch.linspace(0, 1, 31, dtype=torch.float64), rtol=0, atol=1e-15)
    assert FlowSchedule(3.0).sigma(times[-1:]) == 1


def test_the_lowest_time_can_be_the_first_timestep_as_in_the_code_of_lcm() -> None:
    grid = SolverGrid(SD, 50, CPU, lowest=1 / 1000)
    assert SD.model_time(grid.times[:2]).tolist() == [0.0, 19.0]


@pytest.mark.parametrize(("steps", "lowest"), [(0, 0.0), (1001, 0.0), (50, 0.02), (50, -0.1)])
def test_a_grid_that_is_none_is_refused(steps: int, lowest: float) -> None:
    with pytest.raises(UserError, match="solver grid"):
        SolverGrid(SD, steps, CPU, lowest=lowest)


def test_pairs_are_neighbours_and_every_pair_is_drawn() -> None:
    torch.manual_seed(0)
    grid = SolverGrid(SD, 5, CPU)
    i, t, s = grid.pairs(400)
    assert set(i.tolist()) == {1, 2, 3, 4, 5}
    assert torch.equal(t, grid.times[i]) and torch.equal(s, grid.times[i - 1])
    assert i.bincount()[1:].min() > 50, "drawn evenly"


def test_the_segment_starts_of_four_phases_are_those_of_pcm() -> None:
    """N = 50, M = 4: phases end at 0, 239, 499 and 739; an edge belongs to the phase below it."""
    i = torch.tensor([1, 12, 13, 25, 26, 37, 38, 50])
    start = FIFTY.segment_start(i, 4)
    assert start.tolist() == [0, 0, 12, 12, 25, 25, 37, 37]
    assert SD.model_time(FIFTY.times[start[[2, 4, 6]]]).tolist() == [239.0, 499.0, 739.0]


def test_one_segment_starts_at_clean_data_and_as_many_as_steps_start_at_the_neighbour() -> None:
    i = torch.arange(1, 51)
    assert FIFTY.segment_start(i, 1).tolist() == [0] * 50
    assert torch.equal(FIFTY.segment_start(i, 50), i - 1)


@pytest.mark.parametrize("segments", [1, 2, 3, 8, 50])
def test_a_jump_ends_in_its_own_segment_at_or_below_the_neighbour(segments: int) -> None:
    torch.manual_seed(0)
    i = torch.arange(1, 51).repeat(1000)
    end, start = FIFTY.draw_end(i, segments), FIFTY.segment_start(i, segments)
    assert bool((start <= end).all()) and bool((end <= i - 1).all())
    top = FIFTY.edges(segments)[1]
    assert set(end[i == top].tolist()) == set(range(int(top))), "every end is possible, both bounds included"


@pytest.mark.parametrize("segments", [0, 51])
def test_more_segments_than_steps_are_refused(segments: int) -> None:
    with pytest.raises(UserError, match="segments"):
        FIFTY.edges(segments)


@pytest.mark.parametrize("steps", [2, 17, 39])
def test_a_spaced_grid_of_a_flow_is_even_in_the_root_of_its_noise_ratio(steps: int) -> None:
    """Karras et al. 2022, eq. 5 up to 80, of which the last is replaced by pure noise."""
    schedule = FlowSchedule(3.0)
    times = SolverGrid(schedule, steps, CPU, rho=7.0).times
    assert times[0] == 0 and times[-1] == 1
    roots = (schedule.sigma(times[1:-1]) / schedule.alpha(times[1:-1])) ** (1 / 7)
    low, high = max(0.002, 3 / 999) ** (1 / 7), 80 ** (1 / 7)  # at t = 1 / 1000 sigma / alpha is 3 / 999
    share = torch.arange(steps - 1, dtype=torch.float64) / (steps - 1)
    torch.testing.assert_close(roots, low + share * (high - low), rtol=1e-9, atol=0)


@pytest.mark.parametrize("steps", [1, 39, 200, 1000])
def test_a_spaced_vp_grid_has_different_learnt_timesteps_and_ends_at_the_last(steps: int) -> None:
    indices = SD.model_time(SolverGrid(SD, steps, CPU, rho=7.0).times[1:])
    assert torch.equal(indices, indices.round()) and bool((indices.diff() > 0).all())
    assert indices[0] >= 0 and indices[-1] == 999
    if steps == 39:
        assert int((indices < 100).sum()) == 12, "of an even grid there are three"
