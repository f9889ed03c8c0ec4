"""Derivatives of a network along a direction of (x_t, t), by forward mode and by differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepdistill.cast import Cast
from stepdistill.condition import Condition
from stepdistill.denoiser import Denoiser, OwnWeights
from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.families.base import ModelFamily
from stepdistill.objectives.base import Frozen, Trained
from stepdistill.schedule import EDMSchedule, FlowSchedule, NoiseSchedule, TrigFlowSchedule, from_scheduler_config
from tests.tiny import LORA, scramble


SD = from_scheduler_config({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})[0]
SCHEDULES = [SD, FlowSchedule(), FlowSchedule(3.0), EDMSchedule(), TrigFlowSchedule()]
T = torch.tensor([0.2503, 0.7004], dtype=torch.float64)  # between two knots of the VP table
NO_CONDITION = Condition({"label": torch.zeros(2)})


def drawn(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 4, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def bent(schedule: NoiseSchedule) -> Denoiser:
    """A network that is curved in x_t and in its time."""
    scale = schedule.model_time(torch.ones(1, dtype=torch.float64)).abs()

    def call(network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        return torch.sin(x_t * (1 + (model_time / scale).reshape(-1, 1, 1, 1)) ** 2)

    return Denoiser(call, OwnWeights(nn.Module()), schedule, "flow")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_derivative_of_the_model_time_is_that_of_its_formula(schedule: NoiseSchedule) -> None:
    h = 1e-6
    difference = (schedule.model_time(T + h) - schedule.model_time(T - h)) / (2 * h)
    torch.testing.assert_close(schedule.d_model_time(T), difference, rtol=1e-7, atol=0)


def test_below_the_first_timestep_the_model_time_of_a_vp_schedule_stands_still() -> None:
    assert SD.d_model_time(torch.tensor([0.0, 0.0004, 0.001, 0.5])).tolist() == [0.0, 0.0, 1000.0, 1000.0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_forward_mode_and_differences_give_the_derivative_in_units_of_our_time(schedule: NoiseSchedule) -> None:
    view, x, direction, speed = bent(schedule), drawn(0), drawn(1), torch.tensor([0.3, -0.8], dtype=torch.float64)
    h = 1e-5
    ends = [view(x + sign * h * direction, T + sign * h * speed, NO_CONDITION).native for sign in (1, -1)]
    expected = (ends[0] - ends[1]) / (2 * h)
    for difference, tolerance in ((0.0, 1e-6), (1e-4, 1e-5)):
        said, slope = view.jvp(x, T, NO_CONDITION, direction, speed, difference=difference)
        torch.testing.assert_close(slope, expected, rtol=0, atol=tolerance)
        assert torch.equal(said.native, view(x, T, NO_CONDITION).native)


def test_no_direction_has_no_derivative_and_a_network_may_ignore_what_moves() -> None:
    view, zero = bent(FlowSchedule()), torch.zeros(2, dtype=torch.float64)
    for difference in (0.0, 1e-4):
        _, slope = view.jvp(drawn(0), T, NO_CONDITION, torch.zeros_like(drawn(0)), zero, difference=difference)
        assert torch.equal(slope, torch.zeros_like(slope))
    still = Denoiser(lambda *_: torch.ones(2, 4, 8, 8), OwnWeights(nn.Module()), FlowSchedule(), "flow")
    _, slope = still.jvp(drawn(0), T, NO_CONDITION, drawn(1), T)
    assert torch.equal(slope, torch.zeros_like(slope))


@pytest.mark.parametrize("which", ["sd", "dit", "sd3", "sana"])
def test_forward_mode_through_the_real_classes_agrees_with_differences(
    which: str, request: pytest.FixtureRequest
) -> None:
    family = load_family(request.getfixturevalue(f"{which}_folder"))
    family.network().double()
    condition = family.null_condition(2).to(torch.float64)
    view, speed = family.denoiser(), torch.tensor([0.3, -0.8], dtype=torch.float64)
    still = torch.zeros_like(speed)
    # Diffusers takes sines of times, norms of SD3's queries and Sana's linear attention in float32, which differences
    # see magnified.
    for direction, pace, size, tolerance in (
        (drawn(1), still, 1e-4, 1e-3),
        (torch.zeros_like(drawn(1)), speed, 3e-5, 1e-2),
        (drawn(1), speed, 3e-5, 1e-2),
    ):
        with torch.no_grad():
            said, slope = view.jvp(drawn(0), T, condition, direction, pace)
            _, rough = view.jvp(drawn(0), T, condition, direction, pace, difference=size)
        assert not said.native.requires_grad and not slope.requires_grad
        assert float(slope.abs().max()) > 0
        torch.testing.assert_close(slope, rough, rtol=0, atol=tolerance * float(slope.abs().max()))


def test_a_shared_network_gives_every_role_its_own_derivative(sd: ModelFamily) -> None:
    cast = Cast(sd, {"teacher": Frozen(), "student": Trained()}, lora={"student": LORA})
    scramble(cast.parameters("student"))
    condition = sd.null_condition(2)
    x, direction, still = drawn(0, torch.float32), drawn(1, torch.float32), torch.zeros(2)
    slopes = {}
    for role in ("teacher", "student"):
        view = cast.denoiser(role)
        with torch.no_grad():
            _, slopes[role] = view.jvp(x, T, condition, direction, still)
            _, rough = view.jvp(x, T, condition, direction, still, difference=1e-2)
        torch.testing.assert_close(slopes[role], rough, rtol=0, atol=1e-2 * float(rough.abs().max()))
    assert not torch.allclose(slopes["teacher"], slopes["student"], atol=1e-2)


def test_the_derivative_of_a_half_precision_network_is_kept_in_float32() -> None:
    for difference in (0.0, 1e-2):
        _, slope = bent(FlowSchedule()).jvp(drawn(0).bfloat16(), T, NO_CONDITION, drawn(1), T, difference=difference)
        assert slope.dtype == torch.float32


@pytest.mark.parametrize("name", ["sd", "student"])
def test_differences_are_taken_in_float32_whatever_the_precision_around_them(sd: ModelFamily, name: str) -> None:
    view = sd.denoiser()
    if name == "student":
        cast = Cast(sd, {"teacher": Frozen(), "student": Trained()}, lora={"student": LORA})
        scramble(cast.parameters("student"))
        view = cast.denoiser("student")
    condition, x, direction = sd.null_condition(2), drawn(0, torch.float32), drawn(1, torch.float32)
    still = torch.zeros(2)
    with torch.no_grad():
        said, slope = view.jvp(x, T, condition, direction, still)
        with torch.autocast("cpu", torch.bfloat16):
            inside, found = view.jvp(x, T, condition.to(torch.bfloat16), direction, still, difference=1e-2)
            near = view.jvp(x, T, condition, direction, still, difference=1e-4)
        outside = view.jvp(x, T, condition, direction, still, difference=1e-4)
    assert torch.equal(near[0].native, outside[0].native) and torch.equal(near[1], outside[1])
    assert inside.native.dtype == torch.float32
    for rough in (found, near[1]):
        torch.testing.assert_close(rough, slope, rtol=0, atol=2e-2 * float(slope.abs().max()))
    torch.testing.assert_close(near[0].native, said.native)


def test_differences_of_weights_in_half_precision_are_refused_even_below_an_adapter(sd: ModelFamily) -> None:
    sd.network().bfloat16()
    cast = Cast(sd, {"teacher": Frozen(), "student": Trained()}, lora={"student": LORA})
    assert {p.dtype for p in cast.parameters("student").values()} == {torch.float32}
    x, still = drawn(0, torch.float32), torch.zeros(2)
    for view in (sd.denoiser(), cast.denoiser("student")):
        with pytest.raises(UserError, match=r"weights in bfloat16 .*memory\.base: fp32, or difference: 0"):
            view.jvp(x, T, sd.null_condition(2), x, still, difference=1e-4)


def test_forward_mode_runs_compiled_blocks_as_python() -> None:
    """A compiler need not know of tangents; one that drops them would leave the derivative of the rest alone."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 4, 3, padding=1)).double()
    compiled: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(1)
        return graph.forward

    def call(module: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        found: Tensor = module(x_t)
        return found

    view = Denoiser(call, OwnWeights(network), FlowSchedule(), "flow")
    with torch.no_grad():
        plain = view.jvp(drawn(0), T, NO_CONDITION, drawn(1), T)
        for block in network:
            block.compile(backend=backend)
        said, slope = view.jvp(drawn(0), T, NO_CONDITION, drawn(1), T)
        assert not compiled
        assert torch.equal(said.native, plain[0].native) and torch.equal(slope, plain[1])
        view(drawn(0), T, NO_CONDITION)
    assert compiled, "afterwards they are compiled again"
