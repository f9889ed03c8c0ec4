"""Consistency distillation: the student's clean image is the same from every point of the teacher's path.

Song et al. 2023, "Consistency Models", arXiv 2303.01469.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.losses import Distance, distance
from stepdistill.objectives.base import Batch, Frozen, InferenceSpec, Loss, NeedsSchedule, Phase, Role, Step, Trained
from stepdistill.objectives.matching import Guidance
from stepdistill.objectives.targets import follow, target_name, target_roles
from stepdistill.objectives.trajectory import sample_guidance
from stepdistill.prediction import add_noise, beside
from stepdistill.sampling import Solver, solver_step
from stepdistill.segments import SolverGrid


if TYPE_CHECKING:
    from stepdistill.cast import Cast
    from stepdistill.schedule import NoiseSchedule


@dataclass(frozen=True)
class Consistency(NeedsSchedule):
    """What the student makes of a noised image is what it makes of the teacher's next, less noisy point.

    Attributes:
        timesteps: where the finished student is called, as indices; the training does not depend on it.
        guidance: the teacher's scale, or a range from which every sample gets its own; 1 means none.
        solver_steps: of the grid on which the teacher steps (paper: 40 points, hence 39).
        rho: how the grid is spaced: evenly in (sigma / alpha)^(1 / rho), which is the paper's 7; null: evenly in time.
        solver: how the teacher steps (paper: heun, with two calls; its own tests have euler worse).
        target_decay: of the moving average of the student that gives the targets (paper: 0.95); 0: the student itself,
            without a gradient.
        distance: mse, l2, huber or sample_huber (the paper has squares, absolute values, and LPIPS on pixels).
        huber_c: the constant of both Huber distances.
    """

    timesteps: tuple[int, ...] = (999,)
    guidance: Guidance = 1.0
    solver_steps: int = 39
    rho: float | None = 7.0
    solver: Solver = "heun"
    target_decay: float = 0.95
    distance: Distance = "mse"
    huber_c: float = 1e-3

    def __post_init__(self) -> None:
        _ = self.roles()  # refuses what is no decay
        if self.rho is not None and not self.rho > 0:
            raise UserError(f"rho must be positive, got {self.rho}; null spaces the grid evenly in time")

    def check_schedule(self, schedule: NoiseSchedule) -> None:
        SolverGrid(schedule, self.solver_steps, torch.device("cpu"), rho=self.rho)

    def roles(self) -> Mapping[str, Role]:
        return {"teacher": Frozen(), "student": Trained(), **target_roles(self.target_decay)}

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("student", ("student",), self.student_loss, stream="images"),)

    def after_step(self, cast: Cast, step: int) -> None:
        follow(cast, step, decay=self.target_decay)

    def inference(self) -> InferenceSpec:
        return InferenceSpec(self.timesteps)

    def student_loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """Algorithm 2: d(f(x_t, t), sg f-(x_s, s)), weighted by 1, t and s neighbours on the grid.

        f is the predicted clean sample, which of noise and velocity predictions is the identity at time 0, and f- the
        target's. The paper's c_skip and c_out give the same to a network that predicts something else.
        """
        assert batch.latents is not None, "the images stream carries latents"
        student = cast.denoiser("student")
        _, t, s = SolverGrid(student.schedule, self.solver_steps, batch.device, rho=self.rho).pairs(len(batch))
        x_t = add_noise(student.schedule, batch.latents, t, batch.noise().to(batch.latents))
        target = self.target(cast, x_t, (t, s), batch)
        found = student(x_t, t, batch.condition).x0
        return Loss({"consistency": distance(self.distance, found, target, self.huber_c).mean()})

    @torch.no_grad()
    def target(self, cast: Cast, x_t: Tensor, times: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        """What the student shall make of x_t, (B, C, H, W): one step of the teacher from t to s, and f- from there.

        At s = 0 that is the teacher's step itself, whatever the network says: the boundary condition, without which
        nothing but a constant would be learnt.

        Args:
            cast: with the teacher, and the target or the student.
            x_t: noised images, (B, C, H, W).
            times: t and s, (B,) each.
            batch: the conditions.
        """
        t, s = times
        guidance = sample_guidance(self.guidance, len(batch), batch.device)
        x_s = solver_step(cast.denoiser("teacher"), x_t, t, s, batch.condition, batch.null, guidance, self.solver)
        said = cast.denoiser(target_name(self.target_decay))(x_s, s, batch.condition).x0
        return torch.where(beside(x_s, s == 0), x_s, said)
