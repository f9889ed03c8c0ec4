"""DMD2 without its GAN: distribution matching with a critic on a faster time scale.

Yin et al. 2024, "Improved Distribution Matching Distillation for Fast Image Synthesis", arXiv 2405.14867.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from stepdistill.losses import dmd_direction, pseudo_loss
from stepdistill.objectives.base import Batch, Frozen, InferenceSpec, Loss, Phase, Role, Step, Trained
from stepdistill.objectives.matching import critic_denoising, renoise, rollout


if TYPE_CHECKING:
    from stepdistill.cast import Cast


@dataclass(frozen=True)
class DMD2:
    """Descends KL(student || guided teacher) at every noise level; the critic knows the student's score.

    Attributes:
        timesteps: where the student is called, as Diffusers indices; four steps: 999, 749, 499, 249.
        guidance: the teacher's guidance scale; the critic is never guided.
        critic_updates: critic steps per student step (section 4.2: 5, and 10 for SD1.5).
        t_min: lowest time of the matching loss, as a fraction (code: 0.02).
        t_max: highest time of the matching loss (code: 0.98).
    """

    timesteps: tuple[int, ...] = (999,)
    guidance: float = 1.75
    critic_updates: int = 5
    t_min: float = 0.02
    t_max: float = 0.98

    def roles(self) -> Mapping[str, Role]:
        return {"teacher": Frozen(), "critic": Trained(), "student": Trained()}

    def phases(self, step: int) -> Sequence[Phase]:
        return (
            Phase("critic", ("critic",), self.critic_loss, repeats=self.critic_updates),
            Phase("student", ("student",), self.student_loss),
        )

    def after_step(self, cast: Cast, step: int) -> None:
        return None

    def inference(self) -> InferenceSpec:
        return InferenceSpec(self.timesteps)

    def critic_loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """Section 4.2: the critic follows the student's distribution."""
        with torch.no_grad():
            x0 = rollout(cast.denoiser("student"), batch, self.timesteps, step)
        loss = critic_denoising(cast.denoiser("critic"), x0, batch, drop=None, signal_weight=False)
        return Loss({"critic": loss})

    def student_loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """Eq. 3 with DMD's normaliser (arXiv 2311.18828, eq. 7 and 8)."""
        x0 = rollout(cast.denoiser("student"), batch, self.timesteps, step)
        teacher = cast.denoiser("teacher")
        x_t, t = renoise(teacher, x0, self.t_min, self.t_max)
        with torch.no_grad():
            real = teacher.guided(x_t, t, batch.condition, batch.null, self.guidance).x0
            fake = cast.denoiser("critic")(x_t, t, batch.condition).x0
        direction = dmd_direction(x0.detach(), real, fake)
        return Loss({"matching": pseudo_loss(x0, direction)}, {"direction": direction.square().mean().sqrt()})
