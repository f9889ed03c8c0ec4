"""What the tests of SiD share: its objective on analytic teachers, and a linear student that is trained with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.condition import Condition
from stepdistill.denoiser import Denoiser
from stepdistill.objectives.base import Batch, Step
from stepdistill.objectives.sid import SiD
from tests.oracles.oracle import AT_08, Linear, Roles, batch_of, constant, gaussian, label, linear_student


CPU = torch.device("cpu")
M, S, A, B = 0.7, 0.5, 1.3, -0.4
ALPHA, SIGMA = 0.8, 0.6
V_P, V_Q = ALPHA**2 * S**2 + SIGMA**2, ALPHA**2 * A**2 + SIGMA**2


def sid(**options: Any) -> SiD:
    """One step from unit noise, no guidance and no weighting, at the time where alpha is 0.8."""
    plain: dict[str, Any] = {"timesteps": (2,), "sampler": "stochastic", "guidance": 1.0, "weighting": "constant",
                             "t_min": AT_08[0], "t_max": AT_08[1]}  # fmt: skip
    return SiD(**{**plain, **options})


def cast_of(network: Linear, fake: tuple[float, float] | None = None) -> Roles:
    """A Gaussian teacher, and a critic that is right about the student unless told otherwise."""
    mean, std = fake or (network.b.item(), abs(network.a.item()))
    return Roles({
        "student": linear_student(network),
        "teacher": gaussian(constant(M), S),
        "critic": gaussian(constant(mean), std),
    })  # fmt: skip


def gradient(objective: SiD, network: Linear, roles: Roles, z: Tensor, **labels: float) -> tuple[float, float]:
    network.zero_grad()
    objective.student_loss(roles, batch_of(z, **labels), Step(0)).total.backward()
    return network.b.grad.item(), network.a.grad.item()


def fit(objective: SiD, roles_of: Callable[[Linear], Roles], **labels: float) -> Linear:
    """Trains a linear student with a critic that is made anew for it at every step."""
    network = Linear(0.9, 0.0)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.2)
    torch.manual_seed(4)
    z = torch.randn(256, 16, dtype=torch.float64)
    z = torch.cat([z, -z]) / z.square().mean().sqrt()  # mean 0 and variance 1 exactly: no sampling bias
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / 150)
        optimizer.zero_grad()
        objective.student_loss(roles_of(network), batch_of(z, **labels), Step(step)).total.backward()
        optimizer.step()
    return network


def listening(denoiser: Denoiser) -> list[dict[str, Any]]:
    """What a denoiser is asked from now on."""
    asked: list[dict[str, Any]] = []
    call = denoiser._call

    def keep(network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        asked.append({"labels": label(condition).tolist(), "time": model_time[0].item(),
                      "grad": torch.is_grad_enabled()})  # fmt: skip
        return call(network, x_t, model_time, condition)

    denoiser._call = keep  # type: ignore[method-assign]
    return asked


def plain_batch(count: int = 3) -> Batch:
    prompt, null = (torch.full((count,), v, dtype=torch.float64) for v in (1.0, -1.0))
    return Batch(Condition({"label": prompt}), Condition({"label": null}), (1,), CPU)
