"""TCD: trajectory consistency distillation, for students that may jump from any time to any lower one.

Zheng et al. 2024, "Trajectory Consistency Distillation", arXiv 2402.19159.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stepdistill.losses import Distance, distance
from stepdistill.objectives.base import Batch, Frozen, InferenceSpec, Loss, NeedsSchedule, Phase, Role, Step, Trained
from stepdistill.objectives.matching import Guidance
from stepdistill.objectives.targets import follow, target_name, target_roles
from stepdistill.objectives.trajectory import Trajectory, student_jump
from stepdistill.sampling import Sampler, Solver


if TYPE_CHECKING:
    from stepdistill.cast import Cast
    from stepdistill.schedule import NoiseSchedule


@dataclass(frozen=True)
class TCD(NeedsSchedule):
    """The student's jump from t to a random lower time ends where its jump from the teacher's next point does.

    Attributes:
        timesteps: where the finished student is called, as Diffusers indices; the training does not depend on it.
        guidance: the teacher's scale, or a range from which every sample gets its own; 1 means none. The paper's
            2 to 14 of LCM's convention is 3 to 15 here.
        solver_steps: of the grid on which the teacher steps (paper: 50, a step of 20 timesteps).
        solver: how it steps.
        distance: mse, l2, huber or sample_huber.
        huber_c: the constant of both Huber distances.
        target_decay: of the moving average of the student that jumps from the teacher's point; 0: the student itself.
        sampler: how the finished student is sampled.
        eta: TCD's gamma when it is sampled, 0 deterministic, 1 noise as fresh as LCM's (paper: 0.2; Diffusers: 0.3).
    """

    timesteps: tuple[int, ...] = (999, 749, 499, 249)
    guidance: Guidance = (3.0, 15.0)
    solver_steps: int = 50
    solver: Solver = "ddim"
    distance: Distance = "huber"
    huber_c: float = 1e-3
    target_decay: float = 0.95
    sampler: Sampler = "tcd"
    eta: float = 0.3

    def __post_init__(self) -> None:
        # What does not fit together is told before anything is loaded.
        _ = self.trajectory, self.roles(), self.inference()

    def check_schedule(self, schedule: NoiseSchedule) -> None:
        self.trajectory.check_schedule(schedule)

    @property
    def trajectory(self) -> Trajectory:
        """Which jumps are learnt: of the whole path, in one segment."""
        return Trajectory(1, self.solver_steps, self.solver, self.guidance)

    def roles(self) -> Mapping[str, Role]:
        return {"teacher": Frozen(), "student": Trained(), **target_roles(self.target_decay)}

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("student", ("student",), self.student_loss, stream="images"),)

    def after_step(self, cast: Cast, step: int) -> None:
        follow(cast, step, decay=self.target_decay)

    def inference(self) -> InferenceSpec:
        return InferenceSpec(self.timesteps, self.sampler, eta=self.eta)

    def student_loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """d(f^{t -> m}(x_t), sg f^{s -> m}(x_s)), x_s by the teacher from x_t; t and m even on the grid, m <= s."""
        teacher = cast.denoiser("teacher")
        leap = self.trajectory.leap(teacher, batch)
        target = self.trajectory.target(teacher, cast.denoiser(target_name(self.target_decay)), leap, batch)
        found = student_jump(cast, leap, batch)
        return Loss({"trajectory": distance(self.distance, found, target, self.huber_c).mean()})
