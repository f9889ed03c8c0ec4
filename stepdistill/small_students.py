"""Students with smaller networks than their teachers': who gets one in a game, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stepdistill.denoiser import OwnWeights
from stepdistill.network_shape import NetworkShape
from stepdistill.objectives.base import Objective, Role, Trained


if TYPE_CHECKING:
    from stepdistill.families.base import ModelFamily


STUDENT = "student"


def shaped_roles(objective: Objective, shape: NetworkShape | None) -> dict[str, Role]:
    """An objective's roles, the student of the shape that a recipe gives it; all others stay as their teacher is."""
    roles = dict(objective.roles())
    student = roles.get(STUDENT)
    if shape is not None and isinstance(student, Trained):
        roles[STUDENT] = replace(student, shape=shape)
    return roles


@dataclass(frozen=True)
class Cost:
    """What a network costs.

    Attributes:
        parameters: how many it has.
        flops: floating-point operations of one call for one image, a multiply-add counted as two.
    """

    parameters: int
    flops: int


@torch.no_grad()
def cost_of(family: ModelFamily, network: nn.Module, size: int | None = None) -> Cost:
    """The cost of a network of a family, for images of `size` pixels; None: the teacher's own.

    Counted are matrix products and convolutions, by torch's own counter, which is where nearly all operations are.
    """
    example = next(network.parameters())
    x = torch.zeros(1, *family.latent_shape(size)).to(example)
    t = torch.full((1,), 0.5, dtype=torch.float64, device=x.device)
    null = family.null_condition(1).to(example.device, example.dtype)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the counter knows no fused kernel
        family.denoiser(OwnWeights(network))(x, t, null)
    return Cost(sum(p.numel() for p in network.parameters()), int(counter.get_total_flops()))


def describe(family: ModelFamily, shape: NetworkShape, size: int | None = None) -> str:
    """Parameters and FLOPs of a student beside its teacher's, and how much of it starts as the teacher."""
    network = family.plain_network(shape=shape)
    filled = family.plan(shape).fill(network, family.network().state_dict())
    own, whole = cost_of(family, network, size), cost_of(family, family.network(), size)
    return (f"student: {own.parameters:,} parameters ({own.parameters / whole.parameters:.0%} of the teacher's), "
            f"{own.flops / 1e9:.3g} GFLOPs a network call ({own.flops / whole.flops:.0%}); "
            f"{filled / own.parameters:.0%} of its weights begin as the teacher's")  # fmt: skip
