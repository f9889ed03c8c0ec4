"""Consistency distillation on teachers that are known exactly: Gaussians, and a mixture in one dimension."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from stepdistill.cast import Cast
from stepdistill.condition import Condition
from stepdistill.denoiser import Denoiser, OwnWeights
from stepdistill.errors import UserError
from stepdistill.families.base import ModelFamily
from stepdistill.objectives.base import Batch, InferenceSpec, Recorded, Step
from stepdistill.objectives.consistency import Consistency
from stepdistill.sampling import Solver, solver_step
from stepdistill.schedule import FlowSchedule, NoiseSchedule, from_scheduler_config
from stepdistill.segments import SolverGrid
from tests.oracles.oracle import Roles, batch_of, constant, gaussian, label, shaped
from tests.tiny import LORA, scramble


SD = from_scheduler_config({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})[0]
FLOW = FlowSchedule(2.0)
S = 0.7
CPU = torch.device("cpu")
STEP = Step(0)


class Slopes(nn.Module):
    """One number for each time of a grid: f(x, t_i) = a_i x."""

    def __init__(self, grid: SolverGrid, start: float = 1.0) -> None:
        super().__init__()
        self.times = grid.times
        self.a = nn.Parameter(torch.full((len(grid.times),), start, dtype=torch.float64))


def sloped(network: Slopes, schedule: NoiseSchedule) -> Denoiser:
    """A student whose clean prediction is a_i x, told as a velocity: also defined where alpha = 0."""

    def call(module: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        t = schedule.t_from_model_time(model_time)
        a = shaped(network.a[(t[:, None] - network.times).abs().argmin(1)], x_t)
        alpha, sigma = shaped(schedule.alpha(t), x_t), shaped(schedule.sigma(t).clamp(min=1e-30), x_t)
        return (x_t - alpha * a * x_t) / sigma - a * x_t  # eps - x0

    view = Denoiser(call, OwnWeights(network), schedule, "flow")
    network.requires_grad_(True)
    return view


def telling_velocity(teacher: Denoiser) -> Denoiser:
    """A Gaussian of mean 0 as a velocity teacher: defined where alpha = 0."""
    schedule = teacher.schedule

    def call(network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        t = schedule.t_from_model_time(model_time)
        alpha, sigma = shaped(schedule.alpha(t), x_t), shaped(schedule.sigma(t), x_t)
        return (sigma - alpha * S**2) * x_t / (alpha**2 * S**2 + sigma**2)

    return Denoiser(call, OwnWeights(nn.Module()), schedule, "flow")


def every_pair(monkeypatch: pytest.MonkeyPatch, per_pair: int) -> None:
    """All pairs of the grid in place of drawn ones, each so many times in a row."""

    def pairs(self: SolverGrid, count: int) -> tuple[Tensor, Tensor, Tensor]:
        i = torch.arange(1, self.steps + 1).repeat_interleave(per_pair)
        assert len(i) == count
        return i, self.times[i], self.times[i - 1]

    monkeypatch.setattr(SolverGrid, "pairs", pairs)


def signs(pairs: int) -> Batch:
    """Data s z and noise eps of four signs for every pair: means of quadratic functions are exact."""
    z = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64).repeat(pairs)[:, None]
    eps = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).repeat(pairs)[:, None]
    batch = batch_of(eps)
    object.__setattr__(batch, "latents", S * z)
    return batch


def known_slopes(schedule: NoiseSchedule, times: Tensor, solver: Solver) -> Tensor:
    """How far each of the grid's times is from data by one solver step after the other: a_i, (N + 1,)."""
    teacher = telling_velocity(gaussian(constant(0.0), S, schedule))
    one, null = torch.ones(len(times) - 1, 1, dtype=torch.float64), Condition({"label": torch.zeros(len(times) - 1)})
    slopes = solver_step(teacher, one, times[1:], times[:-1], null, null, 1.0, solver)
    return torch.cat([torch.ones(1, dtype=torch.float64), slopes.flatten().cumprod(0)])


def variance(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    return schedule.alpha(t) ** 2 * S**2 + schedule.sigma(t) ** 2


def test_the_loss_and_its_gradient_of_a_linear_student_are_those_done_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """v_i (a_i - a_{i-1} m_i)^2 for the pair i, with the DDIM slope m_i; its target is no function of a."""
    objective = Consistency(solver_steps=5, rho=None, solver="ddim", target_decay=0.0)
    every_pair(monkeypatch, 4)
    times = SolverGrid(SD, 5, CPU).times
    network = Slopes(SolverGrid(SD, 5, CPU))
    with torch.no_grad():
        network.a.copy_(torch.tensor([5.0, 0.9, 0.8, 0.75, 0.6, 0.5]))  # the first is never asked for
    roles = Roles({"teacher": gaussian(constant(0.0), S, SD), "student": sloped(network, SD)})
    loss = objective.student_loss(roles, signs(5), STEP)
    loss.total.backward()
    a = network.a.detach().clone()
    a[0] = 1.0  # at the clean end the target is the teacher's step itself
    alpha, sigma, v = SD.alpha(times), SD.sigma(times), variance(SD, times)
    m = (alpha[:-1] * alpha[1:] * S**2 + sigma[:-1] * sigma[1:]) / v[1:]
    error = a[1:] - a[:-1] * m
    assert loss.total.item() == pytest.approx(float((v[1:] * error**2).mean()), rel=1e-12)
    assert network.a.grad is not None and network.a.grad[0] == 0
    torch.testing.assert_close(network.a.grad[1:], 2 * v[1:] * error / 5, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("schedule", "solver", "rho"), [(SD, "heun", 7.0), (SD, "ddim", None), (FLOW, "heun", None), (FLOW, "euler", 7.0)]
)
def test_the_optimum_is_the_product_of_the_slopes_of_the_solver(
    schedule: NoiseSchedule, solver: Solver, rho: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = Consistency(solver_steps=8, rho=rho, solver=solver, target_decay=0.0)
    every_pair(monkeypatch, 4)
    grid = SolverGrid(schedule, 8, CPU, rho=rho)
    network = Slopes(grid)
    teacher = telling_velocity(gaussian(constant(0.0), S, schedule))
    roles = Roles({"teacher": teacher, "student": sloped(network, schedule)})
    known = known_slopes(schedule, grid.times, solver)
    with torch.no_grad():
        network.a.copy_(known)
    objective.student_loss(roles, signs(8), STEP).total.backward()
    assert network.a.grad is not None and float(network.a.grad.abs().max()) < 1e-12, "nothing pulls at the optimum"
    with torch.no_grad():
        network.a[1:] += 0.3
    optimizer = torch.optim.SGD([network.a], lr=4.0)  # an error shrinks by v_i, 0.5 to 1 of it goes in each step
    for _ in range(40):
        optimizer.zero_grad()
        objective.student_loss(roles, signs(8), STEP).total.backward()
        optimizer.step()
    torch.testing.assert_close(network.a.detach()[1:], known[1:], rtol=0, atol=1e-3)


def test_heun_learns_the_exact_map_more_closely_than_ddim() -> None:
    exact = S / variance(SD, torch.ones(1, dtype=torch.float64)).sqrt()
    times = SolverGrid(SD, 39, CPU, rho=7.0).times
    errors = [float((known_slopes(SD, times, solver)[-1] - exact).abs()) for solver in ("ddim", "heun")]
    assert errors[1] < 0.1 * errors[0]


def test_at_the_clean_end_the_target_is_the_step_of_the_teacher_bit_by_bit() -> None:
    """Also for a student that predicts the clean sample, which algebra does not bind."""
    objective = Consistency(solver_steps=5, rho=None, target_decay=0.0)
    for kind in ("epsilon", "sample"):
        student = Denoiser(lambda network, x, t, condition: 7 * x + 3, OwnWeights(nn.Module()), SD, kind)
        teacher = gaussian(label, S, SD)
        batch = signs(1)
        t, s = torch.full((4,), 0.2, dtype=torch.float64), torch.tensor([0.0, 0.1, 0.0, 0.1], dtype=torch.float64)
        x_t = torch.randn(4, 1, generator=torch.Generator().manual_seed(0))
        target = objective.target(Roles({"teacher": teacher, "student": student}), x_t, (t, s), batch)
        assert torch.equal(target[::2], teacher(x_t, t, batch.condition).x0[::2])
        assert not torch.isclose(target[1::2], teacher(x_t, t, batch.condition).x0[1::2]).any()


def test_guidance_moves_the_targets_to_the_guided_gaussian() -> None:
    """Means 1 and -0.5 at scale 3 are the mean 4: the loss of any student is that of the moved teacher."""
    network = Slopes(SolverGrid(SD, 6, CPU), 0.8)
    batch = signs(2)
    conditions = (Condition({"label": torch.full((8,), mean)}) for mean in (1.0, -0.5, 4.0))
    guided = replace(batch, condition=next(conditions), null=next(conditions))
    moved = replace(batch, condition=next(conditions))
    losses = []
    for scale, given in ((3.0, guided), ((3.0, 3.0), guided), (1.0, moved)):
        object.__setattr__(given, "z", batch.z)
        torch.manual_seed(0)
        objective = Consistency(guidance=scale, solver_steps=6, target_decay=0.0)
        roles = Roles({"teacher": gaussian(label, S, SD), "student": sloped(network, SD)})
        losses.append(objective.student_loss(roles, given, STEP).total.item())
    assert losses[0] == pytest.approx(losses[2], rel=1e-10)
    assert losses[1] == pytest.approx(losses[2], rel=1e-10)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_targets_come_from_the_target_if_there_is_one_and_nothing_but_the_student_learns(decay: float) -> None:
    asked: dict[str, list[bool]] = {"teacher": [], "student": [], "target": []}

    def view(role: str) -> Denoiser:
        def call(network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
            asked[role].append(torch.is_grad_enabled())
            return x_t * network.weight

        network = nn.Linear(1, 1, bias=False).double().requires_grad_(True)
        views[role] = network
        return Denoiser(call, OwnWeights(network), SD, "epsilon")

    views: dict[str, nn.Module] = {}
    roles = Roles({role: view(role) for role in asked})
    for network in views.values():
        network.requires_grad_(True)
    objective = Consistency(solver_steps=6, solver="ddim", target_decay=decay)
    objective.student_loss(roles, signs(2), STEP).total.backward()
    assert asked["teacher"] == [False]
    assert asked["student"] == ([True] if decay else [False, True])
    assert asked["target"] == ([False] if decay else [])
    assert [role for role, network in views.items() if network.weight.grad is not None] == ["student"]
    assert ("target" in objective.roles()) == (decay > 0)


MEANS, STD, PLAIN = (-1.0, 0.6), 0.25, FlowSchedule()


def quantile(x: Tensor, t: Tensor) -> Tensor:
    """The exact map to data of a mixture of two equal Gaussians in one dimension, P_0^-1(P_t(x)), by bisection."""

    def share(value: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = PLAIN.alpha(t)[:, None], PLAIN.sigma(t)[:, None]
        spread = (2 * (alpha**2 * STD**2 + sigma**2)).sqrt()
        return 0.25 * sum(1 + torch.erf((value - alpha * m) / spread) for m in MEANS)

    wanted, low, high = share(x, t), torch.full_like(x, -10), torch.full_like(x, 10)
    for _ in range(60):
        middle = (low + high) / 2
        below = share(middle, torch.zeros_like(t)) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low


def velocity_of(clean: Callable[[Tensor, Tensor], Tensor]) -> Denoiser:
    """A flow denoiser whose clean prediction is a function of x_t, (B, 1), and t, (B,)."""

    def call(network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        t = PLAIN.t_from_model_time(model_time)
        return ((x_t - clean(x_t, t)) / t[:, None].clamp(min=1e-9)).to(x_t)

    return Denoiser(call, OwnWeights(nn.Module()), PLAIN, "flow")


def mixture_mean(x_t: Tensor, t: Tensor) -> Tensor:
    """E[x0 | x_t] of the mixture."""
    alpha, sigma = PLAIN.alpha(t)[:, None], PLAIN.sigma(t)[:, None]
    v = alpha**2 * STD**2 + sigma**2
    offsets = torch.cat([x_t - alpha * m for m in MEANS], 1)
    share = (-offsets.square() / (2 * v)).softmax(1)
    return (share * (torch.tensor(MEANS) + alpha * STD**2 / v * offsets)).sum(1, keepdim=True)


def mixture_batch(count: int) -> Batch:
    """Data of the mixture with fresh noise, float64."""
    batch = batch_of(torch.randn(count, 1, dtype=torch.float64))
    picked = torch.tensor(MEANS, dtype=torch.float64)[torch.randint(2, (count, 1))]
    object.__setattr__(batch, "latents", picked + STD * torch.randn(count, 1, dtype=torch.float64))
    return batch


def test_the_loss_vanishes_at_the_quantile_map_of_a_mixture_as_the_steps_of_the_solver_do() -> None:
    """The path in one dimension keeps the order; what is left is the square of Heun's error, far from the mean's."""

    def loss(clean: Callable[[Tensor, Tensor], Tensor], steps: int, solver: Solver) -> float:
        torch.manual_seed(0)
        objective = Consistency(solver_steps=steps, rho=None, solver=solver, target_decay=0.0)
        roles = Roles({"teacher": velocity_of(mixture_mean), "student": velocity_of(clean)})
        return objective.student_loss(roles, mixture_batch(4000), STEP).total.item()

    heun = [loss(quantile, steps, "heun") for steps in (20, 40, 80)]
    ddim = [loss(quantile, steps, "ddim") for steps in (20, 40, 80)]
    assert heun[2] < 1e-7 and heun[2] < 1e-3 * loss(mixture_mean, 80, "heun")
    assert heun[1] < heun[0] / 20 and heun[2] < heun[1] / 20, "third order in a step, squared, but for the last: 32"
    assert ddim[1] < ddim[0] / 10 and ddim[2] < ddim[1] / 10, "second order in a step, squared: 16"


@pytest.mark.slow
def test_a_student_of_a_mixture_learns_its_quantile_map() -> None:
    """A small network, Heun's steps, a moving average as target: noise goes to data in the right order."""
    torch.manual_seed(0)

    def network() -> nn.Module:
        layers = nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1)
        return nn.Sequential(*layers).double()

    def learnt(module: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        return module(torch.cat([x_t, model_time[:, None] / 1000], 1))

    student, target = network(), network()
    target.load_state_dict(student.state_dict())
    views = {role: Denoiser(learnt, OwnWeights(module), PLAIN, "flow")
             for role, module in (("student", student), ("target", target))}  # fmt: skip
    student.requires_grad_(True)
    objective = Consistency(solver_steps=16, rho=None, target_decay=0.5)
    optimizer = torch.optim.Adam(student.parameters(), lr=2e-2)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, 1500)
    for _ in range(1500):
        optimizer.zero_grad()
        roles = Roles({"teacher": velocity_of(mixture_mean), **views})
        objective.student_loss(roles, mixture_batch(256), STEP).total.backward()
        optimizer.step()
        rates.step()
        with torch.no_grad():
            for old, new in zip(target.parameters(), student.parameters(), strict=True):
                old.lerp_(new, 0.5)
    z = torch.special.ndtri((torch.arange(400, dtype=torch.float64) + 0.5) / 400)[:, None]
    last = torch.ones(400, dtype=torch.float64)
    made = views["student"](z, last, Condition({"label": last})).x0.detach()
    # Evenly spaced quantiles: this is the W1 distance, where the order is kept, and no less where it is not.
    assert float((made - quantile(z, last)).abs().mean()) < 0.05


@pytest.mark.parametrize("lora", [None, {"student": LORA}])
def test_a_real_student_learns_and_its_target_follows(sd: ModelFamily, lora: dict | None) -> None:
    objective = Consistency(guidance=2.0, solver_steps=10, target_decay=0.5)
    cast = Cast(sd, objective.roles(), lora=lora)
    condition = sd.encode_prompts(["a", "b"])
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = Batch(condition, sd.null_condition(2), (4, 8, 8), latents.device, latents)
    torch.manual_seed(0)
    with cast.trainable(("student",)):
        objective.student_loss(cast, batch, STEP).total.backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in cast.parameters("student").values())
    assert all(p.grad is None for role in ("teacher", "target") for p in cast.parameters(role).values())
    scramble(cast.parameters("student"))
    objective.after_step(cast, 0)
    first = {name: p.detach().clone() for name, p in cast.parameters("target").items()}
    scramble(cast.parameters("student"), seed=1)
    objective.after_step(cast, 1)
    for name, p in cast.parameters("target").items():
        middle = (first[name] + cast.parameters("student")[name].detach()) / 2
        torch.testing.assert_close(p.detach(), middle, rtol=1e-6, atol=1e-7)


def test_what_cannot_be_is_refused_and_the_rest_is_said_to_whoever_samples() -> None:
    with pytest.raises(UserError, match="decay"):
        Consistency(target_decay=1.0)
    with pytest.raises(UserError, match="rho"):
        Consistency(rho=0.0)
    assert Consistency(timesteps=(999, 499)).inference() == InferenceSpec((999, 499))
    assert Consistency().roles()["target"] == Recorded("student")
    (phase,) = Consistency().phases(3)
    assert (phase.updates, phase.stream) == (("student",), "images")
