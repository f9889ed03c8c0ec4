"""Trajectory consistency on Gaussians: gradients and optima in closed form, segments, boundary, guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.objectives.base import Objective, Step
from stepdistill.objectives.tcd import TCD
from stepdistill.objectives.trajectory import Leap, Trajectory, sample_guidance, student_jump
from stepdistill.objectives.tscd import TSCD
from stepdistill.prediction import Levels
from stepdistill.sampling import solver_step
from stepdistill.segments import SolverGrid
from tests.oracles.oracle import Roles, constant, four_signs, gaussian, label
from tests.oracles.trajectories import FLOW, STD, VP, Table, images, point, slope, tabled


STEPS = 5
CPU = torch.device("cpu")
GRID = SolverGrid(VP, STEPS, CPU)
LEVELS = [Levels.at(VP, GRID.times[k : k + 1], torch.zeros(1)) for k in range(STEPS + 1)]
ALPHA, SIGMA = (torch.cat([getattr(levels, name) for levels in LEVELS]) for name in ("alpha", "sigma"))
OPTIONS: dict[str, Any] = {"guidance": 1.0, "solver_steps": STEPS, "distance": "mse", "target_decay": 0.0}
GAMES: dict[int, Objective] = {1: TCD(**OPTIONS), 2: TSCD(segments=2, **OPTIONS), 5: TSCD(segments=5, **OPTIONS)}


def starts(segments: int) -> dict[int, int]:
    """Number of the edge below each number of the grid, counted by hand."""
    return {1: dict.fromkeys(range(1, 6), 0), 2: {1: 0, 2: 0, 3: 2, 4: 2, 5: 2}, 5: {i: i - 1 for i in range(1, 6)}}[
        segments
    ]


@pytest.fixture
def every_leap(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Tensor]:
    """Makes a batch hold every leap of the grid once for each of four signs => how many rows that are."""

    def enumerate_leaps(segments: int) -> int:
        start = starts(segments)
        pairs = [(i, end) for i in range(1, STEPS + 1) for end in range(start[i], i)]
        i, end = (torch.tensor(column).repeat_interleave(4) for column in zip(*pairs, strict=True))

        def draw_end(grid: SolverGrid, numbers: Tensor, told: int = 1) -> Tensor:
            assert told == segments and torch.equal(numbers, i)
            return end

        monkeypatch.setattr(SolverGrid, "pairs", lambda grid, count: (i, grid.times[i], grid.times[i - 1]))
        monkeypatch.setattr(SolverGrid, "draw_end", draw_end)
        return len(pairs)

    return enumerate_leaps


def roles_of(table: Table, target: Table | None = None) -> Roles:
    told = {"teacher": gaussian(constant(0.0), STD, VP), "student": tabled(table)}
    return Roles(told if target is None else {**told, "target": tabled(target)})


def exact_batch(count: int) -> Any:
    """Signs as data and noise: the mean of x_t^2 over them is that over the Gaussian."""
    signs, eps = four_signs()
    return images(STD * signs.repeat(count, 1), eps.repeat(count, 1))


def line(i: int, end: int) -> tuple[Tensor, Tensor]:
    """(a, b): the jump from number i to `end` multiplies x by a + b e_i."""
    a = ALPHA[end] / ALPHA[i]
    return a, SIGMA[end] - a * SIGMA[i]


def wanted(e: Tensor, i: int, end: int) -> Tensor:
    """By what the target's way, the teacher's step to i - 1 and a jump, multiplies x."""
    m = slope(LEVELS[i], LEVELS[i - 1]).squeeze()
    if end == i - 1:
        return m
    a, b = line(i - 1, end)
    return m * (a + b * e[i - 1])


def optimum(segments: int) -> Tensor:
    """The least-squares e_i over the segment's ends, one after the other from clean data on."""
    e = torch.zeros(STEPS + 1, dtype=torch.float64)
    for i in range(1, STEPS + 1):
        rows = [(*line(i, end), wanted(e, i, end)) for end in range(starts(segments)[i], i)]
        e[i] = sum(b * (y - a) for a, b, y in rows) / sum(b * b for _, b, _ in rows)
    return e


def gradient_of(objective: Objective, table: Table, count: int) -> Tensor:
    loss = objective.student_loss(roles_of(table), exact_batch(count), Step(0))
    (gradient,) = torch.autograd.grad(loss.total, table.e)
    return gradient


@pytest.mark.parametrize("segments", GAMES)
def test_the_gradient_has_its_closed_form(segments: int, every_leap: Callable[[int], int]) -> None:
    count, table = every_leap(segments), Table(STEPS)
    torch.manual_seed(0)
    with torch.no_grad():
        table.e.copy_(torch.rand(STEPS + 1, dtype=torch.float64))
    e, expected = table.e.detach(), torch.zeros(STEPS + 1, dtype=torch.float64)
    for i in range(1, STEPS + 1):
        variance = ALPHA[i] ** 2 * STD**2 + SIGMA[i] ** 2
        for end in range(starts(segments)[i], i):
            a, b = line(i, end)
            expected[i] += 2 * variance * b * (a + b * e[i] - wanted(e, i, end)) / count
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(gradient_of(GAMES[segments], table, count), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("segments", GAMES)
def test_training_finds_the_least_squares_optimum(segments: int, every_leap: Callable[[int], int]) -> None:
    """Newton's steps: the target moves with the network, so each of them settles one number of the grid more."""
    count, table, best = every_leap(segments), Table(STEPS), optimum(segments)
    start = starts(segments)
    curvature = torch.ones(STEPS + 1, dtype=torch.float64)
    for i in range(1, STEPS + 1):
        variance = ALPHA[i] ** 2 * STD**2 + SIGMA[i] ** 2
        curvature[i] = 2 * variance / count * sum(line(i, end)[1] ** 2 for end in range(start[i], i))
    for _ in range(STEPS):
        gradient = gradient_of(GAMES[segments], table, count)
        with torch.no_grad():
            table.e -= gradient / curvature
    torch.testing.assert_close(table.e[1:].detach(), best[1:], rtol=0, atol=1e-12)
    assert gradient_of(GAMES[segments], table, count).abs().max() < 1e-14


def test_one_number_for_all_ends_is_a_compromise_unless_there_is_only_one_end() -> None:
    """With a segment per solver step the optimum is the teacher; else the jumps' own optima disagree."""
    teacher = SIGMA / (ALPHA**2 * STD**2 + SIGMA**2)
    torch.testing.assert_close(optimum(5)[1:], teacher[1:], rtol=0, atol=1e-12)
    assert (optimum(1)[1] - teacher[1]).abs() < 1e-12, "from the first number there is one jump only"
    assert (optimum(1)[2:] - teacher[2:]).abs().min() > 1e-3


def test_with_a_segment_per_solver_step_the_teacher_has_no_loss_and_no_gradient(every_leap: Any) -> None:
    count, table = every_leap(5), Table(STEPS)
    with torch.no_grad():
        table.e.copy_(SIGMA / (ALPHA**2 * STD**2 + SIGMA**2))
    loss = GAMES[5].student_loss(roles_of(table), exact_batch(count), Step(0))
    assert loss.total.item() < 1e-28
    assert gradient_of(GAMES[5], table, count).abs().max() < 1e-14


@pytest.mark.parametrize("segments", [1, 2])
def test_the_moving_average_gives_the_targets_and_gets_no_gradient(segments: int, every_leap: Any) -> None:
    count, table, target = every_leap(segments), Table(STEPS, 0.3), Table(STEPS, 0.5)
    objective = replace(GAMES[segments], target_decay=0.9)
    told = objective.student_loss(roles_of(table, target), exact_batch(count), Step(0)).total
    told.backward()
    assert target.e.grad is None
    value = 0.0
    for i in range(1, STEPS + 1):
        variance = ALPHA[i] ** 2 * STD**2 + SIGMA[i] ** 2
        for end in range(starts(segments)[i], i):
            a, b = line(i, end)
            value += (variance * (a + b * 0.3 - wanted(target.e.detach(), i, end)) ** 2 / count).item()
    assert told.item() == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
@pytest.mark.parametrize("game", [TCD, TSCD])
@pytest.mark.parametrize("solver", ["ddim", "heun"])
def test_data_that_are_a_point_have_straight_paths_and_so_no_loss(kind: str, game: type, solver: str) -> None:
    """In both kinds of schedule, for every kind of prediction, although no noise is defined at time 0."""
    torch.manual_seed(1)
    oracle = point(0.6, FLOW if kind == "flow" else VP, kind)
    options = {"guidance": 1.0, "solver_steps": 8, "solver": solver, "distance": "mse"}
    x0 = torch.full((64, 1, 2, 2), 0.6, dtype=torch.float64)
    roles = Roles(dict.fromkeys(("teacher", "target", "student"), oracle))
    loss = game(**options).student_loss(roles, images(x0, torch.randn_like(x0)), Step(0))
    assert loss.total.item() < 1e-24


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_a_leap_that_ends_at_the_solvers_point_ends_there_to_the_bit(kind: str) -> None:
    torch.manual_seed(2)
    schedule = FLOW if kind == "flow" else VP
    oracle, trajectory = point(0.6, schedule, kind), Trajectory(8, 8, guidance=1.0)
    x0 = torch.randn(64, 1, 2, 2)
    batch = images(x0, torch.randn_like(x0))
    leap = trajectory.leap(oracle, batch)
    assert torch.equal(leap.end, leap.s)
    assert 0 in leap.s, "the clean end is among them"

    def never(*_: Any) -> Any:
        return torch.full_like(x0, torch.nan)

    target = trajectory.target(oracle, Denoiser(never, oracle.weights, schedule, kind), leap, batch)
    assert torch.equal(target, solver_step(oracle, leap.x_t, leap.t, leap.s, batch.condition, batch.null, 1.0))


def test_at_the_clean_end_a_network_that_predicts_noise_returns_its_input_to_the_bit() -> None:
    x = torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(3))
    batch, zero = images(x, x), torch.zeros(8, dtype=torch.float64)
    roles = Roles({"student": tabled(Table(8, 0.4))})
    assert torch.equal(student_jump(roles, Leap(x, zero, zero, zero), batch), x)


@pytest.mark.parametrize("segments", [1, 2, 4, 8, 50])
@pytest.mark.parametrize("schedule", [VP, FLOW], ids=["vp", "flow"])
def test_no_jump_leaves_its_segment(segments: int, schedule: Any) -> None:
    torch.manual_seed(4)
    x0 = torch.zeros(4000, 1)
    leap = Trajectory(segments, 50).leap(gaussian(constant(0.0), STD, schedule), images(x0, x0))
    edges = [50 * m // segments / 50 for m in range(segments + 1)]
    below = [max(edge for edge in edges if edge < t - 1e-9) for t in leap.t.tolist()]
    start = torch.tensor(below, dtype=torch.float64)
    assert bool(((start <= leap.end + 1e-12) & (leap.end <= leap.s) & (leap.s < leap.t)).all())
    assert leap.t.max() == 1.0
    assert (leap.t - leap.s).min() == pytest.approx(0.02) and (leap.t - leap.s).max() == pytest.approx(0.02)
    assert len(leap.t.unique()) == 50
    for edge in edges[:-1]:
        assert (leap.end - edge).abs().min() < 1e-12, "every segment's start is an end of some jump"


def test_the_guided_teacher_is_followed() -> None:
    """Equal deviations make the guided teacher exactly the Gaussian with mean null + scale (prompt - null)."""
    torch.manual_seed(5)
    x0 = torch.randn(256, 1, dtype=torch.float64)
    batch = images(x0, torch.randn_like(x0), label=1.0, null=-0.5)
    objective = TSCD(segments=8, solver_steps=8, guidance=3.0, target_decay=0.0)

    def loss(student: Denoiser) -> float:
        roles = Roles({"teacher": gaussian(label, STD, VP), "student": student})
        return objective.student_loss(roles, batch, Step(0)).total.item()

    assert loss(gaussian(constant(-0.5 + 3.0 * 1.5), STD, VP)) < 1e-24
    assert loss(gaussian(constant(1.0), STD, VP)) > 1e-4


def test_of_a_range_of_scales_every_sample_gets_its_own() -> None:
    torch.manual_seed(6)
    scales = sample_guidance((2.0, 5.0), 1000, CPU)
    assert isinstance(scales, Tensor) and scales.shape == (1000,)
    assert 2.0 <= scales.min() < 2.1 and 4.9 < scales.max() <= 5.0
    assert sample_guidance(4.0, 1000, CPU) == 4.0
    # The targets move in a line with the scale: 8 rows that are equal in all else differ.
    x0 = torch.ones(8, 1, dtype=torch.float64)
    batch, teacher = images(x0, x0, label=1.0, null=-0.5), gaussian(label, STD, VP)
    trajectory = Trajectory(8, 8, guidance=(2.0, 5.0))
    leap = Leap(x0, *(torch.full((8,), value, dtype=torch.float64) for value in (1.0, 0.875, 0.875)))
    assert len(trajectory.target(teacher, teacher, leap, batch).unique()) == 8


@pytest.mark.parametrize("objective", [TCD(), TSCD()], ids=["tcd", "tscd"])
def test_single_precision_gives_the_loss_of_double_precision(objective: Objective) -> None:
    generator = torch.Generator().manual_seed(7)
    x0, noise = (torch.randn(64, 4, 2, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    roles = roles_of(Table(50, 0.3), Table(50, 0.5))

    def loss(dtype: torch.dtype) -> float:
        torch.manual_seed(8)
        return objective.student_loss(roles, images(x0.to(dtype), noise.to(dtype)), Step(0)).total.item()

    assert loss(torch.float32) == pytest.approx(loss(torch.float64), rel=1e-5)


def test_the_finished_student_is_called_as_the_options_say() -> None:
    spec = TCD(timesteps=(999, 499), eta=0.2).inference()
    assert (spec.timesteps, spec.sampler, spec.eta, spec.guidance_scale) == ((999, 499), "tcd", 0.2, 1.0)
    assert TSCD(sampler="deterministic").inference().sampler == "deterministic"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TSCD(segments=51), "50 solver steps cannot be cut into 51 segments"),
        (lambda: TSCD(segments=0), "cannot be cut into 0"),
        (lambda: TSCD(distance_weight=0.0), "nor both 0"),
        (lambda: TSCD(gan_weight=-1.0), "must not be negative"),
        (lambda: TSCD(gan_weight=1.0, gan_loss="relativistic"), "relativistic"),
        (lambda: TSCD(discriminator_updates=0), "discriminator_updates must be at least 1"),
        (lambda: TCD(target_decay=1.0), "decay of the target"),
        (lambda: TCD(sampler="stochastic"), "eta is a number"),
    ],
)
def test_options_that_make_no_sense_are_refused_at_once(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
