"""Progressive distillation: a student learns to do two of its teacher's steps in one, then becomes the teacher.

Salimans and Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models", arXiv 2202.00512; the first
teacher's guidance is learnt too, as in Meng et al. 2022, arXiv 2210.03142.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from stepdistill.errors import UserError
from stepdistill.losses import ProgressiveWeighting, line_x0, progressive_weight, weighted_mse
from stepdistill.objectives.base import Batch, Frozen, InferenceSpec, Loss, Phase, Recorded, Role, Step, Trained
from stepdistill.objectives.inputs import (
    PREVIOUS,
    LearnFrom,
    check_guidance,
    draw_paths,
    few_step_input,
    guide_of,
    subdivided,
    walk,
)
from stepdistill.prediction import Levels


if TYPE_CHECKING:
    from stepdistill.cast import Cast


@dataclass(frozen=True)
class Progressive:
    """Halves the number of deterministic steps, once or several times in a row.

    With N timesteps and H halvings the first teacher takes 2^H N steps and the student 2^(H-1) N; the last student
    takes N.

    Attributes:
        timesteps: where the last student is called, as Diffusers indices.
        halvings: H, how many are played in this stage.
        halving_steps: iterations of each halving but the last, which goes on to the end of the stage.
        learn_from: who is the first teacher: "teacher", or "student", the student as the stage before left it.
        guidance: of the teacher as loaded; a student has learnt it and is followed without.
        weighting: of the squared error of the clean sample: "truncated_snr", max(SNR, 1); "snr_plus_one"; or "native",
            which makes it the error of what the network says.
    """

    timesteps: tuple[int, ...] = (999, 749, 499, 249)
    halvings: int = 1
    halving_steps: int = 1000
    learn_from: LearnFrom = "teacher"
    guidance: float = 1.0
    weighting: ProgressiveWeighting = "truncated_snr"

    def __post_init__(self) -> None:
        if self.halvings < 1 or self.halving_steps < 1:
            raise UserError("halvings and halving_steps must be at least 1")
        check_guidance(self.learn_from, self.guidance)

    def halving(self, step: int) -> int:
        """Which halving an iteration belongs to: 0 ... H - 1."""
        return min(step // self.halving_steps, self.halvings - 1)

    def roles(self) -> Mapping[str, Role]:
        roles: dict[str, Role] = {"teacher": Frozen(), "student": Trained()}
        followed = self.halvings > 1 or self.learn_from == "student"
        return {**roles, PREVIOUS: Recorded(like="student")} if followed else roles

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("student", ("student",), self.loss, stream="images"),)

    def after_step(self, cast: Cast, step: int) -> None:
        if self.halving(step + 1) > self.halving(step):
            cast.copy("student", PREVIOUS)  # Algorithm 2: the student becomes the next teacher

    def inference(self) -> InferenceSpec:
        return InferenceSpec(self.timesteps, "deterministic")

    def loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """Algorithm 2: w(t) |x~ - x0(z_t)|^2, x~ being where one step has to aim to end where two ended."""
        assert batch.latents is not None, "the images stream carries latents"
        halving = self.halving(step.index)
        teacher, guidance = guide_of(cast, self.learn_from if halving == 0 else "student", self.guidance)
        student = cast.denoiser("student")
        times = subdivided(student.schedule, self.timesteps, 2 ** (self.halvings - halving), batch.device)
        path = draw_paths(times, 2, len(batch))
        t, s = path[:, 0], path[:, -1]
        x_t = few_step_input(student.schedule, batch.latents, t, times[0], "deterministic")
        x_s = walk(teacher, x_t, path, batch, guidance)
        here, there = (Levels.at(student.schedule, time, x_t) for time in (t, s))
        weight = progressive_weight(here, student.kind, self.weighting)
        said = student(x_t, t, batch.condition).x0
        error = weighted_mse(said, line_x0(x_t, x_s, here, there), weight)
        return Loss({"progressive": error}, {"student_steps": torch.tensor((len(times) - 1) / 2)})
