"""Entropic score distillation: VSD that also maximises the entropy of what the student makes.

Wang et al. 2024, "Taming Mode Collapse in Score Distillation for Text-to-3D Generation", arXiv 2401.00909.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from stepdistill.errors import UserError
from stepdistill.losses import VsdWeighting, pseudo_loss, vsd_direction
from stepdistill.objectives.base import Batch, Frozen, InferenceSpec, Loss, Phase, Role, Step, Trained
from stepdistill.objectives.checks import check_times
from stepdistill.objectives.matching import Guidance, draw_guidance, renoise, rollout
from stepdistill.objectives.negatives import Pool, steered_student
from stepdistill.objectives.vsd import VSD
from stepdistill.times import LogNoise


if TYPE_CHECKING:
    from stepdistill.cast import Cast


@dataclass(frozen=True)
class ESD:
    """VSD against a mixture of the critic's scores: with the prompt, and of all samples whatever their prompt.

    The paper's condition is the camera of a rendering; here it is the prompt, which is what tells samples apart.

    Attributes:
        timesteps: where the student is called.
        guidance: guidance scale of the teacher, or a range from which every iteration draws one.
        entropy: lambda, the share of the unconditional score, 0 to 1: 0 is VSD with an unguided critic, 1 knows the
            unconditional score alone (the code's setting for threestudio: 0.5).
        critic_updates: critic steps per student step.
        critic_lead: iterations at the start without the student, for a stage whose student has learnt already.
        condition_dropout: probability that a whole batch trains the critic's unconditional branch (not published).
        t_min: lowest time of the student's loss, as a fraction.
        t_max: highest time of the student's loss.
        log_noise: mean and deviation of a normal density of log(sigma / alpha) in place of these times; None: uniform.
        weighting: w(t) of the direction, see `vsd_direction`; published is sigma^2.
        negatives: negative prompts that the student is trained to keep away from, as in `VSD`; empty: none.
        nasa: strength of the negatives in the student, or a range to draw it from.
    """

    timesteps: tuple[int, ...] = (999,)
    guidance: Guidance = 4.5
    entropy: float = 0.5
    critic_updates: int = 1
    critic_lead: int = 0
    condition_dropout: float = 0.2
    t_min: float = 0.02
    t_max: float = 0.98
    log_noise: LogNoise | None = None
    weighting: VsdWeighting = "sigma_squared"
    negatives: Pool = ()
    nasa: Guidance = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not 0 <= self.entropy <= 1:
            raise UserError(f"entropy is a share of the critic's unconditional score, from 0 to 1, not {self.entropy}")
        check_times(self.t_min, self.t_max)
        _ = self.base  # checks the options that the critic's game has too

    @property
    def base(self) -> VSD:
        """The game whose critic is trained the same way."""
        return VSD(timesteps=self.timesteps, critic_updates=self.critic_updates, critic_lead=self.critic_lead,
                   condition_dropout=self.condition_dropout, negatives=self.negatives, nasa=self.nasa)  # fmt: skip

    def roles(self) -> Mapping[str, Role]:
        return {"teacher": Frozen(), "critic": Trained(), "student": Trained()}

    def phases(self, step: int) -> Sequence[Phase]:
        own = {"student": self.student_loss}
        return tuple(replace(phase, loss=own.get(phase.name, phase.loss)) for phase in self.base.phases(step))

    def after_step(self, cast: Cast, step: int) -> None:
        return None

    def inference(self) -> InferenceSpec:
        return InferenceSpec(self.timesteps)

    def student_loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """The entropic gradient: guidance of scale 1 - lambda *on the critic* mixes its two scores as wanted."""
        student, null = steered_student(cast, batch, step, self.negatives, self.nasa)
        x0 = rollout(student, batch, self.timesteps, step)
        teacher, critic = cast.denoiser("teacher"), cast.denoiser("critic")
        x_t, t = renoise(teacher, x0, self.t_min, self.t_max, self.log_noise)
        with torch.no_grad():
            real = teacher.guided(x_t, t, batch.condition, null, draw_guidance(self.guidance, step))
            fake = critic.guided(x_t, t, batch.condition, batch.null, 1 - self.entropy)
        direction = vsd_direction(real.eps, fake.eps, real.levels, self.weighting)
        return Loss({"matching": pseudo_loss(x0, direction)}, {"direction": direction.square().mean().sqrt()})
