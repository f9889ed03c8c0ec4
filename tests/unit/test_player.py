"""A player: which of torch's kernels it steps with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from stepdistill.player import Player, PlayerSettings


@pytest.mark.parametrize(
    ("kind", "options", "fused"),
    [
        (torch.optim.AdamW, {"lr": 0.1}, True),
        (torch.optim.Adam, {"lr": 0.1}, True),
        (torch.optim.AdamW, {"lr": 0.1, "foreach": False}, None),
        (torch.optim.AdamW, {"lr": 0.1, "fused": False}, False),
        (torch.optim.SGD, {"lr": 0.1}, None),
    ],
)
def test_adam_steps_by_its_fused_kernel_unless_the_recipe_chooses(kind: Any, options: Any, fused: bool | None) -> None:
    weight = nn.Parameter(torch.ones(3))
    player = Player("student", {"weight": weight}, PlayerSettings(kind, options), Accelerator(cpu=True))
    assert player.optimizer.defaults["fused"] is fused
    weight.grad = torch.tensor([1.0, 2.0, 3.0])
    reference = nn.Parameter(torch.ones(3))
    plain = kind([reference], **{**options, "fused": None, "foreach": False})
    reference.grad = weight.grad / (weight.grad.norm() + 1e-6)  # as clipped
    player.step()
    plain.step()
    assert torch.allclose(weight, reference, atol=1e-7)
