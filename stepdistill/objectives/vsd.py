"""Variational score distillation for one-step students, as SwiftBrush uses it.

Nguyen and Tran 2023, "SwiftBrush", arXiv 2312.05239; the loss is ProlificDreamer's (arXiv 2305.16213).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from stepdistill.losses import VsdWeighting, pseudo_loss, vsd_direction
from stepdistill.objectives.base import Batch, Frozen, InferenceSpec, Loss, Phase, Role, Step, Trained
from stepdistill.objectives.checks import check_lead, check_share, check_times, check_updates
from stepdistill.objectives.matching import Guidance, critic_denoising, draw_guidance, renoise, rollout
from stepdistill.objectives.negatives import Pool, steered_student
from stepdistill.times import LogNoise


if TYPE_CHECKING:
    from stepdistill.cast import Cast


@dataclass(frozen=True)
class VSD:
    """Moves the student's samples along sigma^2 (eps_teacher - eps_critic).

    Attributes:
        timesteps: where the student is called; SwiftBrush: once, at 999.
        guidance: guidance scale of the teacher, or a range from which every iteration draws one for both networks
            (PG-SB, arXiv 2412.02687: 0.5 to 4).
        guide_critic: whether the critic is guided with the same scale, as SwiftBrush does. Then the *unguided* teacher
            is a fixed point; without it the guided teacher is.
        critic_updates: critic steps per student step (SwiftBrush: 1).
        critic_lead: iterations at the start without the student, for a stage whose student has learnt already, such as
            SwiftBrush v2's, which begins as SD-Turbo; none published.
        condition_dropout: probability that a whole batch trains the critic's null branch (SwiftBrush's code: 0.1).
        t_min: lowest time of the student's loss, as a fraction (code: 0.02).
        t_max: highest time of the student's loss (code: 0.98).
        log_noise: mean and deviation of a normal density of log(sigma / alpha) in place of these times; None: uniform.
        weighting: w(t) of the direction, see `vsd_direction`; published is sigma^2.
        negatives: negative prompts that the student is trained to keep away from (NASA-T, arXiv 2412.02687), as a list
            or a file of prompts; the teacher's null prompt is replaced by them, the critic gets none. Empty: none.
        nasa: strength of the negatives in the student, or a range to draw it from (NASA-T: 0 to 1).
    """

    timesteps: tuple[int, ...] = (999,)
    guidance: Guidance = 4.5
    guide_critic: bool = True
    critic_updates: int = 1
    critic_lead: int = 0
    condition_dropout: float = 0.1
    t_min: float = 0.02
    t_max: float = 0.98
    log_noise: LogNoise | None = None
    weighting: VsdWeighting = "sigma_squared"
    negatives: Pool = ()
    nasa: Guidance = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_times(self.t_min, self.t_max)
        check_updates("critic_updates", self.critic_updates)
        check_lead(self.critic_lead)
        check_share("condition_dropout", self.condition_dropout)

    def roles(self) -> Mapping[str, Role]:
        return {"teacher": Frozen(), "critic": Trained(), "student": Trained()}

    def phases(self, step: int) -> Sequence[Phase]:
        critic = Phase("critic", ("critic",), self.critic_loss, repeats=self.critic_updates)
        return (critic,) if step < self.critic_lead else (Phase("student", ("student",), self.student_loss), critic)

    def after_step(self, cast: Cast, step: int) -> None:
        return None

    def inference(self) -> InferenceSpec:
        return InferenceSpec(self.timesteps)

    def student_loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """SwiftBrush algorithm 1, the student's line."""
        student, null = steered_student(cast, batch, step, self.negatives, self.nasa)
        x0 = rollout(student, batch, self.timesteps, step)
        teacher, critic = cast.denoiser("teacher"), cast.denoiser("critic")
        x_t, t = renoise(teacher, x0, self.t_min, self.t_max, self.log_noise)
        guidance = draw_guidance(self.guidance, step)
        with torch.no_grad():
            real = teacher.guided(x_t, t, batch.condition, null, guidance)
            fake = critic.guided(x_t, t, batch.condition, batch.null, guidance if self.guide_critic else 1.0)
        direction = vsd_direction(real.eps, fake.eps, real.levels, self.weighting)
        return Loss({"matching": pseudo_loss(x0, direction)}, {"direction": direction.square().mean().sqrt()})

    def critic_loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """SwiftBrush algorithm 1, the LoRA teacher's line; weighted by alpha_t^2 as in the released code."""
        with torch.no_grad():
            student, _ = steered_student(cast, batch, step, self.negatives, self.nasa)
            x0 = rollout(student, batch, self.timesteps, step)
        dropped = step.shared("condition dropout").random() < self.condition_dropout
        drop = torch.full((len(batch),), dropped, device=batch.device)
        loss = critic_denoising(cast.denoiser("critic"), x0, batch, drop=drop, signal_weight=True)
        return Loss({"critic": loss})
