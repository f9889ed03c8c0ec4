"""DMD2: distribution matching with a critic on a faster time scale, and a GAN on the critic's features.

Yin et al. 2024, "Improved Distribution Matching Distillation for Fast Image Synthesis", arXiv 2405.14867.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from stepdistill.discriminator import Discriminator, Game
from stepdistill.losses import DmdWeighting, matching_direction, pseudo_loss
from stepdistill.objectives.adversarial import Adversary
from stepdistill.objectives.base import Batch, Frozen, Head, InferenceSpec, Loss, Phase, Role, Step, Trained
from stepdistill.objectives.checks import check_lead, check_times, check_updates, check_weights
from stepdistill.objectives.matching import Guidance, critic_denoising, draw_guidance, renoise, rollout
from stepdistill.times import LogNoise


if TYPE_CHECKING:
    from stepdistill.cast import Cast


@dataclass(frozen=True)
class DMD2:
    """Descends KL(student || guided teacher) at every noise level; the critic knows the student's score.

    Attributes:
        timesteps: where the student is called, as Diffusers indices; four steps: 999, 749, 499, 249. The first may
            lie below the last index, like 399 for SDXL in one step: the student still begins with pure noise.
        guidance: the teacher's guidance scale, or a range to draw it from; the critic is never guided.
        critic_updates: critic steps per student step (section 4.2: 5, and 10 for SD1.5).
        critic_lead: iterations at the start that play without the student: a critic that begins as the teacher does
            not know a student that has learnt in an earlier stage, and would at first lead it astray; none published.
        t_min: lowest time of the matching loss, as a fraction (code: 0.02).
        t_max: highest time of the matching loss (code: 0.98).
        log_noise: mean and deviation of a normal density of log(sigma / alpha) in place of these times; None: uniform.
        weighting: of the matching direction, one of the three that DMD compares, see `matching_direction`.
        gan_weight: of the adversarial term in the student's loss (SD1.5: 1e-3, SDXL: 5e-3); 0 plays no GAN and needs
            no images.
        discriminator_weight: of the classification term in the critic's loss (code: 1e-2).
        gan_loss: which game the discriminator plays (DMD2: non_saturating).
        features: whose features the discriminator sees: the critic's, which it then also shapes (DMD2), or the frozen
            teacher's.
        layers: modules whose outputs are the features; empty: the bottleneck.
        r1_weight: of the approximate R1 regulariser; 0 for none.
        gan_log_noise: mean and deviation of log(sigma / alpha) at which the discriminator looks; by default at all
            times alike, as DMD2. Little noise shows it shapes and edges.
        misaligned_weight: of telling real samples with their own prompts from the same with others', beside the
            classification term; SANA-Sprint's code (arXiv 2503.09641) has it, DMD2 does not. 0 for none.
    """

    timesteps: tuple[int, ...] = (999,)
    guidance: Guidance = 1.75
    critic_updates: int = 5
    critic_lead: int = 0
    t_min: float = 0.02
    t_max: float = 0.98
    log_noise: LogNoise | None = None
    weighting: DmdWeighting = "distance"
    gan_weight: float = 0.0
    discriminator_weight: float = 1e-2
    gan_loss: Game = "non_saturating"
    features: Literal["critic", "teacher"] = "critic"
    layers: tuple[str, ...] = ()
    r1_weight: float = 0.0
    gan_log_noise: LogNoise | None = None
    misaligned_weight: float = 0.0

    def __post_init__(self) -> None:
        check_weights(
            gan_weight=self.gan_weight, discriminator_weight=self.discriminator_weight, r1_weight=self.r1_weight,
            misaligned_weight=self.misaligned_weight,
        )  # fmt: skip
        check_lead(self.critic_lead)
        check_times(self.t_min, self.t_max)
        check_updates("critic_updates", self.critic_updates)

    @property
    def adversarial(self) -> bool:
        """Whether there is a discriminator, and hence a need for images."""
        return self.gan_weight > 0

    @property
    def adversary(self) -> Adversary:
        """The game between student and discriminator."""
        return Adversary(
            game=self.gan_loss, features=self.features, r1_weight=self.r1_weight, log_noise=self.gan_log_noise,
            misaligned_weight=self.misaligned_weight,
        )  # fmt: skip

    def roles(self) -> Mapping[str, Role]:
        roles: dict[str, Role] = {"teacher": Frozen(), "critic": Trained(), "student": Trained()}
        return {**roles, "discriminator": Head(Discriminator, self.layers)} if self.adversarial else roles

    def phases(self, step: int) -> Sequence[Phase]:
        updates = ("critic", "discriminator") if self.adversarial else ("critic",)
        stream = "images" if self.adversarial else "prompts"
        student_stream = "images" if self.adversarial and self.adversary.student_needs_images else "prompts"
        critic = Phase("critic", updates, self.critic_loss, stream=stream, repeats=self.critic_updates)
        student = Phase("student", ("student",), self.student_loss, stream=student_stream)
        return (critic,) if step < self.critic_lead else (critic, student)

    def after_step(self, cast: Cast, step: int) -> None:
        return None

    def inference(self) -> InferenceSpec:
        return InferenceSpec(self.timesteps)

    def critic_loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """Sections 4.2 and 4.3: the critic follows the student's distribution, its features tell real from made."""
        with torch.no_grad():
            x0 = rollout(cast.denoiser("student"), batch, self.timesteps, step)
        terms = {"critic": critic_denoising(cast.denoiser("critic"), x0, batch, drop=None, signal_weight=False)}
        if self.adversarial:
            told = self.adversary.discriminator_terms(cast, x0, batch)
            terms |= {name: self.discriminator_weight * value for name, value in told.items()}
        return Loss(terms)

    def student_loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """Eq. 3 with DMD's normaliser (arXiv 2311.18828, eq. 7 and 8), and section 4.3's adversarial term."""
        x0 = rollout(cast.denoiser("student"), batch, self.timesteps, step)
        direction = self.direction(cast, x0.detach(), batch, step)
        terms = {"matching": pseudo_loss(x0, direction)}
        if self.adversarial:
            terms["adversarial"] = self.gan_weight * self.adversary.student_term(cast, x0, batch)
        return Loss(terms, {"direction": direction.square().mean().sqrt()})

    def direction(self, cast: Cast, x0: Tensor, batch: Batch, step: Step) -> Tensor:
        """Which way the samples x0, (B, C, H, W), are to move; teacher and critic see them at the same noise."""
        at = renoise(cast.denoiser("teacher"), x0, self.t_min, self.t_max, self.log_noise)
        return self.direction_at(cast, x0, at, batch, step)

    def direction_at(self, cast: Cast, x0: Tensor, at: tuple[Tensor, Tensor], batch: Batch, step: Step) -> Tensor:
        """The same where x0 was noised to `at` = (x_t, t), of shapes (B, C, H, W) and (B,)."""
        x_t, t = at
        with torch.no_grad():
            guidance = draw_guidance(self.guidance, step)
            real = cast.denoiser("teacher").guided(x_t, t, batch.condition, batch.null, guidance)
            fake = cast.denoiser("critic")(x_t, t, batch.condition)
        return matching_direction(x0, real, fake, self.weighting)
