"""Progressive adversarial distillation: a discriminator judges whether a student's long step ended where it should.

Lin, Wang and Yang 2024, "SDXL-Lightning: Progressive Adversarial Diffusion Distillation", arXiv 2402.13929.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stepdistill.discriminator import Game
from stepdistill.errors import UserError
from stepdistill.objectives.base import Batch, Frozen, InferenceSpec, Loss, Phase, Recorded, Role, Step, Trained
from stepdistill.objectives.encoder_adversary import EncoderAdversary, Start
from stepdistill.objectives.inputs import (
    PREVIOUS,
    LearnFrom,
    check_guidance,
    draw_paths,
    draw_times,
    few_step_input,
    guide_of,
    subdivided,
    walk,
)
from stepdistill.prediction import add_more_noise
from stepdistill.sampling import ddim_step
from stepdistill.schedule import NoiseSchedule
from stepdistill.times import grid


if TYPE_CHECKING:
    from stepdistill.cast import Cast

UNCONDITIONAL = "unconditional"


@dataclass(frozen=True)
class Lightning:
    """A student's one step against several of its teacher's; a stage has one number of steps.

    Attributes:
        timesteps: where the student is called, as Diffusers indices.
        teacher_steps: how many of the teacher's steps one of the student's replaces (the paper: 4 from 32 steps to 8,
            then 2).
        learn_from: who is the teacher: "teacher", or "student", the student as the stage before left it.
        guidance: of the teacher as loaded; a student has learnt it and is followed without.
        conditional_steps: for so many iterations the discriminator sees where a step began (section 3), which keeps
            the student on the teacher's path; then another one, that does not, lets it leave the path for the sake of
            better images. null: to the end; 0: never.
        gan_loss: which game is played, see `EncoderAdversary`.
        layers: modules of the discriminator's encoder that give its features; empty: the bottleneck.
        discriminator_updates: of discriminator and encoder, for each of the student.
        noised_at: timesteps to one of which, drawn evenly, both ends are noised before they are judged; where that is
            less noise than there is, they are judged as they are. For 1 and 2 steps: 10, 250, 500, 750.
    """

    timesteps: tuple[int, ...] = (999, 749, 499, 249)
    teacher_steps: int = 2
    learn_from: LearnFrom = "teacher"
    guidance: float = 1.0
    conditional_steps: int | None = None
    gan_loss: Game = "non_saturating"
    layers: tuple[str, ...] = ()
    discriminator_updates: int = 1
    noised_at: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.teacher_steps < 1 or self.discriminator_updates < 1 or (self.conditional_steps or 0) < 0:
            raise UserError("teacher_steps and discriminator_updates must be at least 1, conditional_steps at least 0")
        check_guidance(self.learn_from, self.guidance)
        _ = self.adversary(0)  # checks the game

    def adversary(self, step: int) -> EncoderAdversary:
        """The game between student and discriminator in an iteration."""
        conditional = self.conditional_steps is None or step < self.conditional_steps
        return EncoderAdversary(conditional, self.gan_loss, self.layers)

    def head(self, step: int) -> str:
        """The role of the discriminator in an iteration; that of the second part has another shape."""
        return UNCONDITIONAL if self.conditional_steps and step >= self.conditional_steps else "discriminator"

    def roles(self) -> Mapping[str, Role]:
        roles: dict[str, Role] = {"teacher": Frozen(), "student": Trained(), **self.adversary(0).roles()}
        if self.conditional_steps:
            roles[UNCONDITIONAL] = self.adversary(self.conditional_steps).roles()["discriminator"]
        return {**roles, PREVIOUS: Recorded(like="student")} if self.learn_from == "student" else roles

    def phases(self, step: int) -> Sequence[Phase]:
        return (
            Phase("discriminator", ("encoder", self.head(step)), self.discriminator_loss, stream="images",
                  repeats=self.discriminator_updates),
            Phase("student", ("student",), self.student_loss, stream="images"),
        )  # fmt: skip

    def after_step(self, cast: Cast, step: int) -> None:
        return None

    def inference(self) -> InferenceSpec:
        return InferenceSpec(self.timesteps, "deterministic")

    def discriminator_loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """Section 3: -log D(x_t, x_s) - log(1 - D(x_t, x^_s)) for the non-saturating game."""
        start, path = self._start(cast, batch)
        teacher, guidance = guide_of(cast, self.learn_from, self.guidance)
        real = walk(teacher, start[0], path, batch, guidance)
        with torch.no_grad():
            fake = self._step(cast, start, path, batch)
        s, schedule = path[:, -1], teacher.schedule
        at = self._judged_at(schedule, s)
        real, fake = (self._noised(schedule, x_s, s, at) for x_s in (real, fake))
        view = cast.renamed({"discriminator": self.head(step.index)})
        game = self.adversary(step.index)
        return Loss({"discriminator": game.discriminator_term(view, start, real, fake, at, batch)})

    def student_loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """Section 3: -log D(x_t, x^_s) for the non-saturating game; there is no distance to the teacher."""
        start, path = self._start(cast, batch)
        schedule, s = cast.denoiser("student").schedule, path[:, -1]
        at = self._judged_at(schedule, s)
        fake = self._noised(schedule, self._step(cast, start, path, batch), s, at)
        view = cast.renamed({"discriminator": self.head(step.index)})
        return Loss({"adversarial": self.adversary(step.index).student_term(view, start, fake, at, batch)})

    def _start(self, cast: Cast, batch: Batch) -> tuple[Start, Tensor]:
        """((x_t, t), the teacher's times from t on, (B, K + 1)); pure noise at the first time."""
        assert batch.latents is not None, "the images stream carries latents"
        schedule = cast.denoiser("student").schedule
        times = subdivided(schedule, self.timesteps, self.teacher_steps, batch.device)
        path = draw_paths(times, self.teacher_steps, len(batch))
        t = path[:, 0]
        return (few_step_input(schedule, batch.latents, t, times[0], "deterministic"), t), path

    def _step(self, cast: Cast, start: Start, path: Tensor, batch: Batch) -> Tensor:
        """The student's one step to the end of the path, (B, C, H, W)."""
        student = cast.denoiser("student")
        return ddim_step(student, student(*start, batch.condition), path[:, -1])

    def _judged_at(self, schedule: NoiseSchedule, s: Tensor) -> Tensor:
        """The times at which the ends are judged, (B,), nowhere before s."""
        if not self.noised_at:
            return s
        return torch.maximum(s, draw_times(grid(schedule, self.noised_at, s.device), len(s)))

    def _noised(self, schedule: NoiseSchedule, x_s: Tensor, s: Tensor, at: Tensor) -> Tensor:
        return add_more_noise(schedule, x_s, s, at, torch.randn_like(x_s)) if self.noised_at else x_s
