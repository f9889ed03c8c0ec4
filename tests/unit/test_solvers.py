"""Steps of the probability-flow equation between any two times, against slopes and exact maps of Gaussians."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stepdistill.condition import Condition
from stepdistill.denoiser import Denoiser, OwnWeights
from stepdistill.sampling import Solver, ddim, solve, solver_step
from stepdistill.schedule import FlowSchedule, NoiseSchedule, TrigFlowSchedule
from stepdistill.segments import SolverGrid
from stepdistill.times import grid
from tests.oracles.oracle import gaussian, label
from tests.unit.test_sampling import COUNT, SD, M, S, conditions, noise, recording


def exact(schedule: NoiseSchedule, x: Tensor, t: float, s: float) -> Tensor:
    """alpha_s m + sqrt(v_s / v_t) (x - alpha_t m): the flow of N(m, S^2)."""
    alpha, sigma = (f(torch.tensor([t, s], dtype=torch.float64)) for f in (schedule.alpha, schedule.sigma))
    v = (alpha * S) ** 2 + sigma**2
    return alpha[1] * M + (v[1] / v[0]).sqrt() * (x - alpha[0] * M)


def times(value: float) -> Tensor:
    return torch.full((COUNT,), value, dtype=torch.float64)


def as_flow(schedule: NoiseSchedule) -> Denoiser:
    """The same Gaussian teacher, telling the velocity eps - x0: defined at alpha = 0 too."""

    def call(network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        t = schedule.t_from_model_time(model_time)
        alpha, sigma = (f(t).reshape(-1, 1, 1, 1) for f in (schedule.alpha, schedule.sigma))
        m = label(condition).reshape(-1, 1, 1, 1)
        return -m + (sigma - alpha * S**2) * (x_t - alpha * m) / (alpha**2 * S**2 + sigma**2)

    return Denoiser(call, OwnWeights(nn.Module()), schedule, "flow")


@pytest.mark.parametrize(("t", "s"), [(1.0, 0.5), (0.5, 0.25), (0.6, 0.0), (0.2, 0.7)])
def test_a_ddim_step_on_a_gaussian_has_the_known_slope(t: float, s: float) -> None:
    alpha, sigma = (f(torch.tensor([t, s], dtype=torch.float64)) for f in (SD.alpha, SD.sigma))
    slope = (alpha[1] * alpha[0] * S**2 + sigma[1] * sigma[0]) / (alpha[0] ** 2 * S**2 + sigma[0] ** 2)
    found = solver_step(gaussian(label, S, SD), noise(), times(t), times(s), conditions(M), conditions(0.0), 1.0)
    torch.testing.assert_close(found, alpha[1] * M + slope * (noise() - alpha[0] * M), rtol=0, atol=1e-11)


def test_an_euler_step_of_an_unshifted_flow_is_a_ddim_step() -> None:
    for t, s in ((1.0, 0.4), (0.4, 0.0)):
        steps = [
            solver_step(
                as_flow(FlowSchedule()), noise(), times(t), times(s), conditions(M), conditions(0.0), 1.0, name
            )
            for name in ("euler", "ddim")
        ]
        torch.testing.assert_close(steps[0], steps[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("shift", [1.0, 3.0, None])
def test_halving_the_steps_shrinks_the_error_by_the_order_of_the_solver(
    solver: Solver, order: int, shift: float | None
) -> None:
    """From pure noise, where sigma / alpha is infinite, down to little noise."""
    schedule = TrigFlowSchedule() if shift is None else FlowSchedule(shift)
    errors = []
    for steps in (40, 80, 160):
        path = torch.linspace(1.0, 0.1, steps + 1, dtype=torch.float64)
        x = solve(as_flow(schedule), noise(), path, conditions(M), conditions(0.0), 1.0, solver)
        errors.append((x - exact(schedule, noise(), 1.0, 0.1)).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(2**order, rel=0.1)


def test_heun_is_the_trapezoid_in_x_over_alpha_against_sigma_over_alpha() -> None:
    t, s = 0.8, 0.3
    teacher = gaussian(label, S, SD)
    found = solver_step(teacher, noise(), times(t), times(s), conditions(M), conditions(0.0), 1.0, "heun")
    (a_t, s_t), (a_s, s_s) = ((SD.alpha(times(v))[0], SD.sigma(times(v))[0]) for v in (t, s))
    x, h = noise() / a_t, s_s / a_s - s_t / a_t
    d = (x - teacher(noise(), times(t), conditions(M)).x0) / (s_t / a_t)
    x_s = x + h * d
    d_s = (x_s - teacher(a_s * x_s, times(s), conditions(M)).x0) / (s_s / a_s)
    torch.testing.assert_close(found, a_s * (x + h * (d + d_s) / 2), rtol=0, atol=1e-11)


def test_heun_asks_once_where_it_ends_clean_and_never_uses_what_is_said_there() -> None:
    view, recorder = recording()
    solver_step(view, noise(), times(0.5), times(0.0), conditions(M), conditions(0.0), 1.0, "heun")
    assert len(recorder.calls) == 1
    mixed = torch.tensor([0.0, 0.2, 0.0, 0.2, 0.2], dtype=torch.float64)
    teacher = gaussian(label, S, SD)
    heun, once = (
        solver_step(teacher, noise(), times(0.5), mixed, conditions(M), conditions(0.0), 1.0, name)
        for name in ("heun", "ddim")
    )
    torch.testing.assert_close(heun[[0, 2]], once[[0, 2]], rtol=0, atol=0)
    assert not torch.isclose(heun[1], once[1]).any()


@pytest.mark.parametrize("solver", ["ddim", "euler", "heun"])
def test_a_guided_step_is_the_step_of_the_guided_gaussian(solver: Solver) -> None:
    teacher = gaussian(label, S, SD)
    args = noise(), times(0.7), times(0.3)
    guided = solver_step(teacher, *args, conditions(1.0), conditions(-0.5), 3.0, solver)
    moved = solver_step(teacher, *args, conditions(-0.5 + 3.0 * 1.5), conditions(0.0), 1.0, solver)
    torch.testing.assert_close(guided, moved, rtol=0, atol=1e-10)


def test_every_row_may_have_times_and_guidance_of_its_own() -> None:
    teacher = gaussian(label, S, SD)
    t = torch.linspace(0.9, 0.5, COUNT, dtype=torch.float64)
    scale = torch.linspace(1.0, 5.0, COUNT, dtype=torch.float64)
    together = solver_step(teacher, noise(), t, t / 2, conditions(1.0), conditions(0.0), scale, "heun")
    for row in range(COUNT):
        one = slice(row, row + 1)
        alone = solver_step(teacher, noise()[one], t[one], t[one] / 2, conditions(1.0)[one], conditions(0.0)[one],
                            float(scale[row]), "heun")  # fmt: skip
        torch.testing.assert_close(together[one], alone, rtol=0, atol=1e-11)


def test_solving_down_to_clean_data_by_ddim_is_the_ddim_sampler() -> None:
    path = grid(SD, (999, 749, 499, 249), torch.device("cpu"))
    teacher = gaussian(label, S, SD)
    solved = solve(teacher, noise(), torch.cat([path, torch.zeros(1)]), conditions(M), conditions(0.0), 2.0)
    torch.testing.assert_close(
        solved, ddim(teacher, noise(), path, conditions(M), null=conditions(0.0), guidance=2.0), rtol=0, atol=0
    )


def test_fifty_steps_have_the_slope_that_lcm_learns_and_heun_is_nearer_to_the_exact_one() -> None:
    """Standard deviation 0.7, Stable Diffusion's table, down to its first timestep: 0.676324, exactly 0.701143."""
    path = SolverGrid(SD, 50, torch.device("cpu"), lowest=1 / 1000).times.flip(0)
    teacher, nothing = gaussian(label, 0.7, SD), conditions(0.0)
    by_ddim, by_heun = (
        (solve(teacher, noise(), path, nothing, nothing, 1.0, solver) / noise()).mean().item()
        for solver in ("ddim", "heun")
    )
    assert by_ddim == pytest.approx(0.676324, abs=5e-7)
    assert by_heun == pytest.approx(0.701143, abs=2e-3)
