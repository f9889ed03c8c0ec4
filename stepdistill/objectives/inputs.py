"""What students of few steps are given while they learn from data, and the teacher's path from there.

Letters: B batch, N the student's steps, K the teacher's steps for one of the student's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.objectives.base import Batch
from stepdistill.prediction import add_noise, beside
from stepdistill.sampling import Sampler, solver_step
from stepdistill.schedule import NoiseSchedule, VPSchedule
from stepdistill.times import grid


if TYPE_CHECKING:
    from stepdistill.cast import Cast

LearnFrom = Literal["teacher", "student"]
PREVIOUS = "previous"  # the role of a student that has become a teacher


def subdivided(schedule: NoiseSchedule, timesteps: Sequence[int], parts: int, device: torch.device) -> Tensor:
    """The times of N steps, each cut into `parts` even ones => falling times down to 0, (N parts + 1,), float64.

    A VP network gets the nearest timesteps that it has learnt, rounded as Diffusers' trailing spacing rounds.

    Raises:
        UserError: there are fewer timesteps than parts.
    """
    times = torch.cat([grid(schedule, tuple(timesteps), device), torch.zeros(1, dtype=torch.float64, device=device)])
    shares = torch.arange(parts, dtype=torch.float64, device=device) / parts
    fine = torch.cat([(times[:-1, None] + times.diff()[:, None] * shares).flatten(), times[-1:]])
    if isinstance(schedule, VPSchedule):
        total = schedule.num_train_timesteps
        fine = (fine * total).round() / total
    if not bool((fine.diff() < 0).all()):
        raise UserError(f"the steps of timesteps {list(timesteps)} cannot be cut into {parts} each: they must fall, "
                        "and be that many training timesteps apart")  # fmt: skip
    return fine


def draw_paths(times: Tensor, parts: int, count: int) -> Tensor:
    """For each sample one of the N steps, evenly drawn => the times of the K + 1 places that the teacher goes by.

    Args:
        times: falling times of all places, (N K + 1,).
        parts: K.
        count: B.

    Returns:
        (B, K + 1), falling.
    """
    steps = (len(times) - 1) // parts
    first = parts * torch.randint(steps, (count, 1), device=times.device)
    return times[first + torch.arange(parts + 1, device=times.device)]


def draw_times(times: Tensor, count: int, probabilities: Sequence[float] = ()) -> Tensor:
    """For each sample one of the student's times, (B,), with these probabilities; evenly for none."""
    weights = torch.tensor(probabilities or [1.0] * len(times), dtype=torch.float64, device=times.device)
    return times[torch.multinomial(weights, count, replacement=True)]


def few_step_input(
    schedule: NoiseSchedule, x0: Tensor, t: Tensor, first: Tensor, sampler: Sampler = "stochastic"
) -> Tensor:
    """Data at times t as the student will meet them, (B, C, H, W): noised, and at its first time noise alone.

    Schedules that leave a trace of the image at their last time show it there in training and not in use; ADD (arXiv
    2311.17042, section 3.1) and SDXL-Lightning (arXiv 2402.13929, section 3) take it away.

    Args:
        schedule: the student's.
        x0: clean data, (B, C, H, W).
        t: times, (B,).
        first: the time at which the student begins, a scalar.
        sampler: "deterministic" begins with sigma noise, the others with noise of unit variance.
    """
    eps = torch.randn_like(x0)
    pure = add_noise(schedule, torch.zeros_like(x0), t, eps) if sampler == "deterministic" else eps
    begins = beside(x0, t >= first)
    return torch.where(begins, pure, add_noise(schedule, x0, t, eps))


@torch.no_grad()
def walk(teacher: Denoiser, x_t: Tensor, path: Tensor, batch: Batch, guidance: float) -> Tensor:
    """The teacher's DDIM steps from x_t at the first time of each path to its last => x_s, (B, C, H, W).

    Args:
        teacher: whose path it is.
        x_t: samples at path[:, 0], (B, C, H, W).
        path: falling times, (B, K + 1).
        batch: the conditions.
        guidance: standard scale, 1 = none.
    """
    for t, s in pairwise(path.unbind(1)):
        x_t = solver_step(teacher, x_t, t, s, batch.condition, batch.null, guidance)
    return x_t


def check_guidance(learn_from: LearnFrom, guidance: float) -> None:
    """Raises UserError if a guidance scale is given that nobody would use."""
    if learn_from == "student" and guidance != 1:
        raise UserError(f"guidance {guidance:g} has no effect with learn_from: student, whose weights have learnt it "
                        "in the stage before; leave it out")  # fmt: skip


def guide_of(cast: Cast, learn_from: LearnFrom, guidance: float) -> tuple[Denoiser, float]:
    """Who leads the way, and its guidance: a student that has become a teacher has guidance in its weights already."""
    return (cast.denoiser("teacher"), guidance) if learn_from == "teacher" else (cast.denoiser(PREVIOUS), 1.0)
