"""Score identity distillation, with long and short guidance, few steps, and a diffusion-GAN.

Zhou et al. 2024: SiD, arXiv 2404.04057; guidance (SiD-LSG), 2406.01561; few steps and the GAN (SiDa), 2505.12674;
flow-matching teachers, 2509.25127.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stepdistill.discriminator import ChannelMean, Game
from stepdistill.errors import UserError
from stepdistill.losses import SidWeighting, sid_critic_loss, sid_loss, sid_weight, value_with_gradient
from stepdistill.objectives.adversarial import Adversary
from stepdistill.objectives.base import (
    Batch,
    Frozen,
    GuidesCritic,
    Head,
    InferenceSpec,
    Loss,
    Phase,
    Role,
    Step,
    Trained,
)
from stepdistill.objectives.checks import check_share, check_times, check_updates, check_weights
from stepdistill.objectives.matching import Guidance, draw_guidance, rollout
from stepdistill.prediction import add_noise
from stepdistill.sampling import Sampler
from stepdistill.schedule import NoiseSchedule
from stepdistill.times import LogNoise, drawn_times


if TYPE_CHECKING:
    from stepdistill.cast import Cast


@dataclass(frozen=True)
class SiD(GuidesCritic):
    """Descends a Fisher divergence, the squared distance of the teacher's and the critic's idea of the clean sample.

    Attributes:
        timesteps: where the student is called, as Diffusers indices; SiD-LSG: 625. Several: one is drawn at a time, so
            that one critic learns the uniform mixture of what all of them make.
        sampler: "deterministic": the student begins with sigma z, as in SiD-LSG, and goes on with its predicted noise;
            "stochastic": it begins with z and goes on with fresh noise, as in few-step SiD.
        alpha: SiD's alpha; SiD-LSG 1, SiD 1.2. Above 1, a student far wider than the teacher is pushed away.
        weighting: omega of the student's loss, see `sid_weight`.
        guidance: of the teacher, kappa_4, or a range from which every iteration draws it.
        critic_guidance: of the critic: one number, or kappa_1 (while it is trained), kappa_2 (in the difference to the
            teacher) and kappa_3 (to the sample); 0 shows it no prompts. None: the teacher's (LSG); with a range, 1
            while it is trained and the draw for both others (PG-SB, arXiv 2412.02687).
        critic_updates: critic steps per student step.
        critic_warmup: iterations in which only the critic learns.
        condition_dropout: share of prompts dropped while the critic is trained, where both of its branches are used.
        t_min: lowest time of both losses and of the GAN, as a fraction (code: 0.02).
        t_max: highest time of them (code: 0.979).
        log_noise: mean and deviation of a normal density of log(sigma / alpha) in place of the uniform one; for flow
            teachers (log 2, 1.6).
        gan_weight: of the adversarial term (SiDa: 0.001); 0 plays no GAN and needs no images.
        discriminator_weight: of the classification term in the critic's loss (code: half the sum of its two parts).
        gan_loss: which game the critic's features play.
        layers: modules whose outputs, averaged over channels, are the logits; empty: the bottleneck.
        r1_weight: of the approximate R1 regulariser of the game, beside the classification term; 0 for none, as in
            the code.
    """

    timesteps: tuple[int, ...] = (625,)
    sampler: Sampler = "deterministic"
    alpha: float = 1.0
    weighting: SidWeighting = "distance"
    guidance: Guidance = 1.5
    critic_guidance: float | tuple[float, float, float] | None = None
    critic_updates: int = 1
    critic_warmup: int = 0
    condition_dropout: float = 0.1
    t_min: float = 0.02
    t_max: float = 0.979
    log_noise: LogNoise | None = None
    gan_weight: float = 0.0
    discriminator_weight: float = 0.5
    gan_loss: Game = "non_saturating"
    layers: tuple[str, ...] = ()
    r1_weight: float = 0.0

    def __post_init__(self) -> None:
        check_times(self.t_min, self.t_max)
        check_updates("critic_updates", self.critic_updates)
        check_share("condition_dropout", self.condition_dropout)
        check_weights(
            gan_weight=self.gan_weight, discriminator_weight=self.discriminator_weight, r1_weight=self.r1_weight
        )
        trained, *used = self.critic_scales
        away = [scale for scale in used if scale]
        if trained == 0 and away:
            raise UserError("critic_guidance: a critic that is trained at 0 sees no prompts, so it can be used at 0 "
                            f"only, not at {max(away, key=abs):g}")  # fmt: skip

    @property
    def critic_scales(self) -> tuple[float, float | None, float | None]:
        """The critic's guidance kappa_1, kappa_2 and kappa_3; None: the teacher's of the iteration."""
        if isinstance(self.critic_guidance, tuple):
            return self.critic_guidance
        scale = self.guidance if self.critic_guidance is None else self.critic_guidance
        return (1.0, None, None) if isinstance(scale, tuple) else (scale, scale, scale)

    @property
    def critic_scale(self) -> float:
        return self.critic_scales[0]

    @property
    def adversary(self) -> Adversary:
        """The game between the student and the critic's features, at times of the density of the other losses.

        In SiD's code for transformers one density serves all of them, and real and made samples share time and noise.
        """
        return Adversary(game=self.gan_loss, r1_weight=self.r1_weight, shared_noise=True, log_noise=self.log_noise,
                         t_min=self.t_min, t_max=self.t_max)  # fmt: skip

    def roles(self) -> Mapping[str, Role]:
        roles: dict[str, Role] = {"teacher": Frozen(), "critic": Trained(), "student": Trained()}
        return {**roles, "discriminator": Head(ChannelMean, self.layers)} if self.gan_weight else roles

    def phases(self, step: int) -> Sequence[Phase]:
        adversarial = self.gan_weight > 0
        images = "images" if adversarial else "prompts"
        critic = Phase("critic", ("critic",), self.critic_loss, stream=images, repeats=self.critic_updates)
        if step < self.critic_warmup:
            return (critic,)
        stream = "images" if adversarial and self.adversary.student_needs_images else "prompts"
        return critic, Phase("student", ("student",), self.student_loss, stream=stream)

    def after_step(self, cast: Cast, step: int) -> None:
        return None

    def inference(self) -> InferenceSpec:
        return InferenceSpec(self.timesteps, self.sampler)

    def critic_loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """SiD-LSG's first line: the guided critic, both of its branches, denoises what the student makes."""
        batch = self._without_some_prompts(batch)
        critic = cast.denoiser("critic")
        with torch.no_grad():
            x0 = rollout(cast.denoiser("student"), batch, self.timesteps, step, self.sampler)
        t, eps = self._times(critic.schedule, x0), torch.randn_like(x0)
        x_t = add_noise(critic.schedule, x0, t, eps)
        said = critic.guided(x_t, t, batch.condition, batch.null, self.critic_scales[0])
        terms = {"critic": sid_critic_loss(said, x0, eps).mean()}
        if self.gan_weight > 0:
            # SiD sums over elements, so the game, a mean, is multiplied by their number to stay commensurate.
            weight = self.discriminator_weight * x0[0].numel()
            told = self.adversary.discriminator_terms(cast, x0, batch)
            terms |= {name: weight * value for name, value in told.items()}
        return Loss(terms)

    def student_loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """SiD-LSG's second line, and SiDa's adversarial term, through one gradient with respect to the samples.

        As in the released code, samples of which teacher or critic say something that is not finite drop out.
        """
        x0 = rollout(cast.denoiser("student"), batch, self.timesteps, step, self.sampler)
        losses, gradient = self.losses_and_gradient(cast, x0, batch, step)
        kept = losses.isfinite() & gradient.flatten(1).isfinite().all(1)
        gradient[~kept] = 0
        # If none is left the value is NaN, and the trainer stops.
        terms = {"sid": value_with_gradient(x0, losses[kept].mean(), gradient / kept.sum())}
        if self.gan_weight > 0:
            terms["adversarial"] = self.gan_weight * x0[0].numel() * self.adversary.student_term(cast, x0, batch)
        dropped = 1 - kept.float().mean()
        return Loss(terms, {"direction": gradient.square().mean().sqrt(), "dropped": dropped})

    def losses_and_gradient(self, cast: Cast, x0: Tensor, batch: Batch, step: Step) -> tuple[Tensor, Tensor]:
        """SiD's loss of each sample, (B,), and its gradient with respect to the samples x0, (B, C, H, W).

        The gradient goes through the inputs of teacher and critic; it is taken here, at detached samples, so that
        their graphs are freed before the student's backward pass.
        """
        teacher, critic = cast.denoiser("teacher"), cast.denoiser("critic")
        guidance = draw_guidance(self.guidance, step)
        outer, inner = (guidance if scale is None else scale for scale in self.critic_scales[1:])
        with torch.enable_grad():
            x = x0.detach().requires_grad_(True)
            t = self._times(teacher.schedule, x0)
            x_t = add_noise(teacher.schedule, x, t, torch.randn_like(x0))
            real = teacher.guided(x_t, t, batch.condition, batch.null, guidance)
            fake = critic.guided(x_t, t, batch.condition, batch.null, outer).x0
            other = fake if inner == outer else critic.guided(x_t, t, batch.condition, batch.null, inner).x0
            weight = sid_weight(x, real.x0, real.levels, self.weighting)
            losses = sid_loss(x, real.x0, fake, other, alpha=self.alpha, weight=weight)
            (gradient,) = torch.autograd.grad(losses.sum(), x)
        return losses.detach(), gradient

    def _without_some_prompts(self, batch: Batch) -> Batch:
        """Drops prompts, also the student's, if the critic is used with and without them: so it learns both."""
        if self.condition_dropout == 0 or set(self.critic_scales) in ({0}, {1}):
            return batch
        keep = torch.rand(len(batch), device=batch.device) >= self.condition_dropout
        return replace(batch, condition=batch.condition.where(keep, batch.null))

    def _times(self, schedule: NoiseSchedule, x0: Tensor) -> Tensor:
        return drawn_times(schedule, len(x0), low=self.t_min, high=self.t_max, log_noise=self.log_noise,
                           device=x0.device)  # fmt: skip
