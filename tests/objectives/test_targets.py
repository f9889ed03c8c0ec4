"""Targets of consistency-like losses: the moving average of a role, its place in a game, the boundary condition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stepdistill.cast import Cast, RoleState
from stepdistill.denoiser import Denoiser, OwnWeights
from stepdistill.errors import UserError
from stepdistill.families.base import ModelFamily
from stepdistill.objectives.base import Recorded, Trained
from stepdistill.objectives.targets import follow, needs_boundary, target_name, target_roles
from stepdistill.schedule import FlowSchedule
from tests.tiny import LORA, scramble


ROLES = {"student": Trained(), "target": Recorded("student")}


def weights(cast: Cast, role: str) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in cast.parameters(role).items()}


@pytest.mark.parametrize("lora", [None, {"student": LORA}])
def test_the_target_is_a_copy_at_first_and_the_moving_average_afterwards(sd: ModelFamily, lora: dict | None) -> None:
    cast = Cast(sd, ROLES, lora=lora)
    scramble(cast.parameters("student"), seed=1)
    follow(cast, 0, decay=0.75)
    first = weights(cast, "student")
    assert all(torch.equal(p, first[name]) for name, p in cast.parameters("target").items())
    scramble(cast.parameters("student"), seed=2)
    follow(cast, 1, decay=0.75)
    second = weights(cast, "student")
    for name, p in cast.parameters("target").items():
        torch.testing.assert_close(p.detach(), 0.75 * first[name] + 0.25 * second[name], rtol=1e-6, atol=1e-7)
    assert all(torch.equal(p, second[name]) for name, p in cast.parameters("student").items()), "it only follows"


def test_a_blend_beside_a_half_precision_teacher_is_one_in_float32(sd: ModelFamily) -> None:
    """An average that moves by a thousandth would stand still where numbers have three digits."""
    sd.network().bfloat16()
    cast = Cast(sd, ROLES)
    scramble(cast.parameters("student"), seed=1)
    scramble(cast.parameters("target"), seed=2)
    before = weights(cast, "target")
    cast.blend("student", "target", 0.9)
    for name, p in cast.parameters("target").items():
        expected = 0.9 * before[name].float() + 0.1 * cast.parameters("student")[name].detach().float()
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-7)
        assert p.dtype == torch.float32


def test_a_target_starts_with_the_weights_that_its_student_starts_with(sd: ModelFamily) -> None:
    """Otherwise the first iteration of a second stage would be compared with the teacher."""
    before = Cast(sd, {"student": Trained()}, lora={"student": LORA})
    scramble(before.parameters("student"))
    start: RoleState = before.state("student")
    before.release()
    cast = Cast(sd, ROLES, lora={"student": LORA}, starts={"student": start})
    assert all(torch.equal(p, start.tensors[name]) for name, p in cast.parameters("target").items())


def test_a_decay_of_zero_needs_no_target_beside_the_student() -> None:
    assert target_roles(0.0) == {} and target_name(0.0) == "student"
    follow(None, 0, decay=0.0)  # type: ignore[arg-type]
    follow(None, 1, decay=0.0)  # type: ignore[arg-type]
    assert target_roles(0.95) == {"target": Recorded("student")} and target_name(0.95) == "target"


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_a_decay_at_which_the_target_would_not_follow_is_refused(decay: float) -> None:
    with pytest.raises(UserError, match="decay"):
        target_roles(decay)


def test_a_network_that_predicts_the_clean_sample_cannot_be_a_consistency_function() -> None:
    def view(kind: str) -> Denoiser:
        return Denoiser(lambda network, x, t, condition: x, OwnWeights(nn.Module()), FlowSchedule(), kind)

    with pytest.raises(UserError, match="lcm needs a network that predicts noise"):
        needs_boundary(view("sample"), "lcm")
    for kind in ("epsilon", "v_prediction", "flow"):
        needs_boundary(view(kind), "lcm")


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_the_other_kinds_return_their_input_at_time_zero_bit_by_bit(kind: str) -> None:
    from tests.unit.test_jvp import NO_CONDITION, SD, drawn

    schedule = FlowSchedule() if kind == "flow" else SD
    view = Denoiser(lambda network, x, t, condition: 3 * x + 1, OwnWeights(nn.Module()), schedule, kind)
    x = drawn(0, torch.float32)
    assert torch.equal(view(x, torch.zeros(2, dtype=torch.float64), NO_CONDITION).x0, x)
