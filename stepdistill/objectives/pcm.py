"""PCM: phased consistency, each part of the teacher's path in one jump, with a GAN between jumps and targets.

Wang et al. 2024, "Phased Consistency Models", arXiv 2405.18407, and its code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stepdistill.discriminator import Discriminator, discriminator_loss
from stepdistill.errors import UserError
from stepdistill.losses import Distance, distance, taken_early
from stepdistill.objectives.base import (
    Batch,
    Frozen,
    Head,
    InferenceSpec,
    Loss,
    NeedsSchedule,
    Phase,
    Role,
    Step,
    Trained,
)
from stepdistill.objectives.checks import check_weights
from stepdistill.objectives.matching import Guidance
from stepdistill.objectives.targets import follow, target_name, target_roles
from stepdistill.objectives.trajectory import Leap, Trajectory, student_jump
from stepdistill.prediction import add_more_noise, add_noise
from stepdistill.sampling import Solver
from stepdistill.schedule import NoiseSchedule
from stepdistill.segments import SolverGrid
from stepdistill.times import times_between


if TYPE_CHECKING:
    from stepdistill.cast import Cast


@dataclass(frozen=True)
class PCM(NeedsSchedule):
    """The student's jump to the end of its phase ends at the same place from every point of the phase.

    An iteration is two steps of the paper's code, which alternates between discriminator and student.

    Attributes:
        timesteps: the beginnings of the phases, as indices, where the finished student is called once each; they are
            edges of the solver's grid.
        solver_steps: of the grid on which the teacher steps (SDXL: 40, SD1.5: 50, SD3: 100).
        guidance: the teacher's scale, or a range from which every sample gets its own; the paper counts one less: its
            6 to 7 for SDXL are 7 to 8 here.
        condition_dropout: share of prompts replaced by the null condition; with `guidance` 1 and 0.1 the student can
            still be guided when it is used.
        solver: how the teacher steps.
        target_decay: of the moving average that gives the targets; 0: the student itself (the code's choice).
        distance: mse, l2, huber or sample_huber.
        huber_c: the constant of both Huber distances.
        gan_weight: of the adversarial consistency loss; 0 plays no GAN.
        layers: modules of the teacher whose outputs the discriminator sees, in the order of the pass; empty: the
            bottleneck. The code takes every block.
    """

    timesteps: tuple[int, ...] = (999, 749, 499, 249)
    solver_steps: int = 40
    guidance: Guidance = (7.0, 8.0)
    condition_dropout: float = 0.0
    solver: Solver = "ddim"
    target_decay: float = 0.0
    distance: Distance = "huber"
    huber_c: float = 1e-3
    gan_weight: float = 0.1
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_weights(gan_weight=self.gan_weight)
        _ = self.trajectory, self.roles()  # refuse more phases than steps, and what is no decay

    @property
    def trajectory(self) -> Trajectory:
        """The teacher's path in phases."""
        return Trajectory(len(self.timesteps), self.solver_steps, self.solver, self.guidance)

    def check_schedule(self, schedule: NoiseSchedule) -> None:
        check_phases(schedule, self.solver_steps, self.timesteps)

    def roles(self) -> Mapping[str, Role]:
        roles: dict[str, Role] = {"teacher": Frozen(), "student": Trained(), **target_roles(self.target_decay)}
        return {**roles, "discriminator": Head(Discriminator, self.layers)} if self.gan_weight > 0 else roles

    def phases(self, step: int) -> Sequence[Phase]:
        student = Phase("student", ("student",), self.student_loss, stream="images")
        if self.gan_weight == 0:
            return (student,)
        return Phase("discriminator", ("discriminator",), self.discriminator_loss, stream="images"), student

    def after_step(self, cast: Cast, step: int) -> None:
        follow(cast, step, decay=self.target_decay)

    def inference(self) -> InferenceSpec:
        return InferenceSpec(self.timesteps, sampler="deterministic")

    def student_loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """d(jump from x_t, sg jump from x_s), both to the end of the phase; and the student's part in the GAN."""
        batch = self._dropped(batch)
        leap = self.leap(cast.denoiser("teacher").schedule, batch)
        target = self._target(cast, leap, batch)
        found = student_jump(cast, leap, batch)
        terms = {"consistency": distance(self.distance, found, target, self.huber_c).mean()}
        if self.gan_weight > 0:
            terms["adversarial"] = self.gan_weight * self._adversarial(cast, found, leap, batch)
        return Loss(terms)

    def discriminator_loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """Adversarial consistency: hinge loss between jumps and targets, both noised again within the phase."""
        batch = self._dropped(batch)
        leap = self.leap(cast.denoiser("teacher").schedule, batch)
        with torch.no_grad():
            found = student_jump(cast, leap, batch)
        seen = self._seen(cast, leap)
        real = self._logits(cast, self._target(cast, leap, batch), leap, seen, batch)
        return Loss({"discriminator": discriminator_loss(real, self._logits(cast, found, leap, seen, batch), "hinge")})

    def leap(self, schedule: NoiseSchedule, batch: Batch) -> Leap:
        """Noised images at grid times, one grid step below each, and the ends of their phases."""
        assert batch.latents is not None, "the images stream carries latents"
        check_phases(schedule, self.solver_steps, self.timesteps)
        grid = SolverGrid(schedule, self.solver_steps, batch.device)
        i, t, s = grid.pairs(len(batch))
        end = grid.times[grid.segment_start(i, len(self.timesteps))]
        return Leap(add_noise(schedule, batch.latents, t, batch.noise()), t, s, end)

    def _target(self, cast: Cast, leap: Leap, batch: Batch) -> Tensor:
        jumping = cast.denoiser(target_name(self.target_decay))
        return self.trajectory.target(cast.denoiser("teacher"), jumping, leap, batch)

    def _dropped(self, batch: Batch) -> Batch:
        if self.condition_dropout == 0:
            return batch
        keep = torch.rand(len(batch), device=batch.device) >= self.condition_dropout
        return replace(batch, condition=batch.condition.where(keep, batch.null))

    def _adversarial(self, cast: Cast, found: Tensor, leap: Leap, batch: Batch) -> Tensor:
        """mean relu(1 - D) of the jumps; the features' graph is freed before the student's backward pass."""
        seen = self._seen(cast, leap)
        return taken_early(found, lambda x: (1 - self._logits(cast, x, leap, seen, batch)).relu().mean())

    def _seen(self, cast: Cast, leap: Leap) -> Tensor:
        """Where the discriminator sees a jump, (B,): uniform between its end and one phase above."""
        return times_between(cast.denoiser("teacher").schedule, leap.end, leap.end + 1 / len(self.timesteps))

    def _logits(self, cast: Cast, x: Tensor, leap: Leap, seen: Tensor, batch: Batch) -> Tensor:
        """Samples at the ends of phases => logits (B, L) on the teacher's features of them, noised to `seen`."""
        teacher = cast.denoiser("teacher")
        noised = add_more_noise(teacher.schedule, x, leap.end, seen, torch.randn_like(x))
        return cast.head("discriminator")(teacher, noised, seen, batch.condition)


def check_phases(schedule: NoiseSchedule, solver_steps: int, timesteps: tuple[int, ...]) -> None:
    """Raises UserError unless the timesteps are where a grid of so many steps begins as many equal phases."""
    grid, total = SolverGrid(schedule, solver_steps, torch.device("cpu")), schedule.num_train_timesteps
    begins = grid.times[grid.edges(len(timesteps))[1:]].flip(0)
    expected = tuple(round(float(t) * total) - 1 for t in begins)
    if expected != timesteps:
        raise UserError(f"timesteps {list(timesteps)} are not the beginnings of {len(timesteps)} equal phases of "
                        f"{solver_steps} solver steps; those are {list(expected)}")  # fmt: skip
