"""Trajectory consistency: jumps of the student from two neighbouring points of one path shall end at the same place.

Zheng et al. 2024 (TCD), arXiv 2402.19159; Ren et al. 2024 (Hyper-SD), arXiv 2404.13686, which cuts the path in
segments; both after Kim et al. 2023 (CTM), arXiv 2310.02279.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stepdistill.condition import Condition
from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.objectives.base import Batch
from stepdistill.objectives.matching import Guidance
from stepdistill.prediction import add_noise, beside
from stepdistill.sampling import Solver, ddim_step, solver_step
from stepdistill.segments import SolverGrid


if TYPE_CHECKING:
    from stepdistill.cast import Cast
    from stepdistill.schedule import NoiseSchedule


@dataclass(frozen=True)
class Leap:
    """Where the examples of a batch begin, and where their jumps end: end <= s < t.

    Attributes:
        x_t: noised data, (B, C, H, W).
        t: its times, (B,).
        s: the next lower times of the solver's grid, (B,).
        end: where both jumps lead, from t and from s, (B,).
    """

    x_t: Tensor
    t: Tensor
    s: Tensor
    end: Tensor


@dataclass(frozen=True)
class Trajectory:
    """Draws leaps, and says where they should end.

    Attributes:
        segments: into how many equal parts the grid is cut; a leap stays in its own.
        steps: of the solver's grid, from the last training time to clean data.
        solver: how the teacher goes from t to s.
        guidance: the teacher's scale there, or a range, from which every sample gets its own.
        noise_offset: size of a constant per channel that is added to the noise.
    """

    segments: int = 1
    steps: int = 50
    solver: Solver = "ddim"
    guidance: Guidance = 1.0
    noise_offset: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.segments <= self.steps:
            raise UserError(f"{self.steps} solver steps cannot be cut into {self.segments} segments; give 1 to "
                            f"{self.steps}")  # fmt: skip

    def check_schedule(self, schedule: NoiseSchedule) -> None:
        """Raises UserError if the teacher's schedule has no such grid."""
        SolverGrid(schedule, self.steps, torch.device("cpu"))

    def leap(self, denoiser: Denoiser, batch: Batch) -> Leap:
        """A leap for every image of a batch of the images stream, with fresh noise."""
        assert batch.latents is not None, "the images stream carries latents"
        grid = SolverGrid(denoiser.schedule, self.steps, batch.device)
        i, t, s = grid.pairs(len(batch))
        end = grid.times[grid.draw_end(i, self.segments)]
        noise = batch.noise()
        if self.noise_offset:
            noise = noise + self.noise_offset * torch.randn(*noise.shape[:2], 1, 1, device=noise.device)
        return Leap(add_noise(denoiser.schedule, batch.latents, t, noise.to(batch.latents.dtype)), t, s, end)

    @torch.no_grad()
    def target(self, solving: Denoiser, jumping: Denoiser, leap: Leap, batch: Batch) -> Tensor:
        """Where the leaps should end: one step of the solver to s, and from there a jump => (B, C, H, W).

        A leap that ends at s ends with the solver's step, whatever the network says: the boundary condition, which
        also spares it being asked for the noise of a clean sample.

        Args:
            solving: whose path is followed, the teacher.
            jumping: the student, or its average.
            leap: where from and where to.
            batch: the conditions.
        """
        guidance = sample_guidance(self.guidance, len(batch), batch.device)
        x_s = solver_step(solving, leap.x_t, leap.t, leap.s, batch.condition, batch.null, guidance, self.solver)
        ended = beside(x_s, leap.end >= leap.s)
        return torch.where(ended, x_s, jump(jumping, x_s, leap.s, leap.end, batch.condition))


def jump(denoiser: Denoiser, x: Tensor, t: Tensor, end: Tensor, condition: Condition) -> Tensor:
    """f^{t -> end}(x) = alpha_end x0(x, t) + sigma_end eps(x, t), (B, C, H, W): TCD's first-order parameterisation.

    The network is not told where the jump ends: one clean sample and one noise serve every end.
    """
    return ddim_step(denoiser, denoiser(x, t, condition), end)


def student_jump(cast: Cast, leap: Leap, batch: Batch) -> Tensor:
    """Where the student's own jumps from the beginning of the leaps end, (B, C, H, W)."""
    return jump(cast.denoiser("student"), leap.x_t, leap.t, leap.end, batch.condition)


def sample_guidance(guidance: Guidance, count: int, device: torch.device) -> float | Tensor:
    """A fixed scale as it is; of a range, a scale for every sample, (count,), as LCM and TCD train."""
    if isinstance(guidance, tuple):
        low, high = guidance
        return low + (high - low) * torch.rand(count, dtype=torch.float64, device=device)
    return guidance
