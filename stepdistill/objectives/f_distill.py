"""f-distill: DMD2 whose samples are weighed by the density ratio that its discriminator sees.

Xu, Nie and Vahdat 2025, "One-step Diffusion Models with f-Divergence Distribution Matching", arXiv 2502.15681; limits
and bins are those of the code in NVlabs/FastGen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from stepdistill.divergences import DIVERGENCES, DivergenceName
from stepdistill.errors import UserError
from stepdistill.losses import DmdWeighting, pseudo_loss
from stepdistill.objectives.base import Batch, Head, InferenceSpec, Loss, Phase, Role, Step
from stepdistill.objectives.dmd2 import DMD2
from stepdistill.objectives.matching import Guidance, renoise, rollout
from stepdistill.prediction import beside
from stepdistill.ratios import RatioDiscriminator, density_ratio, over_mean
from stepdistill.times import LogNoise


if TYPE_CHECKING:
    from stepdistill.cast import Cast


@dataclass(frozen=True)
class FDistill:
    """Descends any f-divergence between student and guided teacher: DMD2 with a weight h(r) on every sample.

    Attributes:
        divergence: which one; reverse_kl is DMD2 itself.
        timesteps: where the student is called, as Diffusers indices.
        guidance: the teacher's guidance scale, or a range to draw it from (published for SD1.5: 1.75 and 5).
        critic_updates: steps of critic and discriminator per student step (5, and 10 for SD1.5).
        critic_lead: iterations at the start without the student, in which the critic gets to know one that has learnt
            already, and the discriminator the images; none published.
        t_min: lowest time of the matching loss, as a fraction.
        t_max: highest time of the matching loss.
        log_noise: mean and deviation of a normal density of log(sigma / alpha) in place of these times; None: uniform.
        weighting: of the matching direction that h(r) is a factor of, see `matching_direction` (the paper: distance).
        gan_weight: of the adversarial term in the student's loss (1e-3); with 0 the discriminator only gives ratios.
        discriminator_weight: of the classification term in the critic's loss.
        features: whose features the discriminator sees, the critic's or the frozen teacher's.
        layers: modules whose outputs are the features; empty: the bottleneck.
        r1_weight: of the approximate R1 regulariser; 0 for none.
        gan_log_noise: mean and deviation of log(sigma / alpha) at which the discriminator learns; null: all times
            alike. It gives ratios at the times of the matching loss, so let it cover these.
        logit_limit: logits are clamped to plus and minus this before exp.
        ratio_range: then ratios are clipped to these.
        normalize_ratio: divide ratios by the mean ratio at their noise level.
        bins: how many equal parts of t_min to t_max have a mean ratio each; times beyond belong to the last of them.
        bin_decay: how much of its old mean a bin keeps at an update (0, and 0.5 for ImageNet-64).
        normalize_weight: divide weights by their mean.
    """

    divergence: DivergenceName = "jensen_shannon"
    timesteps: tuple[int, ...] = (999,)
    guidance: Guidance = 1.75
    critic_updates: int = 5
    critic_lead: int = 0
    t_min: float = 0.02
    t_max: float = 0.98
    log_noise: LogNoise | None = None
    weighting: DmdWeighting = "distance"
    gan_weight: float = 1e-3
    discriminator_weight: float = 1e-2
    features: Literal["critic", "teacher"] = "critic"
    layers: tuple[str, ...] = ()
    r1_weight: float = 0.0
    gan_log_noise: LogNoise | None = None
    logit_limit: float = 10.0
    ratio_range: tuple[float, float] = (0.1, 20.0)
    normalize_ratio: bool = True
    bins: int = 10
    bin_decay: float = 0.0
    normalize_weight: bool = True

    def __post_init__(self) -> None:
        low, high = self.ratio_range
        if not 0 < low <= high:
            raise UserError(f"ratio_range must be two rising positive numbers such as [0.1, 20], got [{low}, {high}]")
        if self.bins < 1:
            raise UserError(f"bins must be at least 1, got {self.bins}; to go without, set normalize_ratio: false")
        if not 0 <= self.bin_decay < 1:
            raise UserError(f"bin_decay must be at least 0 and below 1, got {self.bin_decay}")
        if self.discriminator_weight == 0:
            raise UserError("discriminator_weight must be positive: the ratio of a discriminator that does not learn "
                            "says nothing; for matching without ratios take dmd2")  # fmt: skip
        assert self.dmd2.adversarial, "there is no ratio without a discriminator"  # and DMD2 checks its own options

    @property
    def dmd2(self) -> DMD2:
        """The game that is weighed. Its discriminator plays the one game whose best logit is the log ratio."""
        return DMD2(
            timesteps=self.timesteps, guidance=self.guidance, critic_updates=self.critic_updates,
            critic_lead=self.critic_lead, t_min=self.t_min, t_max=self.t_max, weighting=self.weighting,
            discriminator_weight=self.discriminator_weight, features=self.features, layers=self.layers,
            r1_weight=self.r1_weight, gan_log_noise=self.gan_log_noise, gan_loss="non_saturating",
            # Outside of the student's loss, which is our own, the weight only switches the discriminator on.
            gan_weight=self.gan_weight or 1.0,
        )  # fmt: skip

    def roles(self) -> Mapping[str, Role]:
        return {**self.dmd2.roles(), "discriminator": Head(partial(RatioDiscriminator, bins=self.bins), self.layers)}

    def phases(self, step: int) -> Sequence[Phase]:
        own = {"student": self.student_loss}
        return tuple(replace(phase, loss=own.get(phase.name, phase.loss)) for phase in self.dmd2.phases(step))

    def after_step(self, cast: Cast, step: int) -> None:
        return None

    def inference(self) -> InferenceSpec:
        return self.dmd2.inference()

    def student_loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """Theorem 1 with DMD's normaliser, and the adversarial term, which has no weight h."""
        x0 = rollout(cast.denoiser("student"), batch, self.timesteps, step)
        at = renoise(cast.denoiser("teacher"), x0, self.t_min, self.t_max, self.log_noise)
        ratio = self.ratio(cast, at, batch)
        weight = self.weight(cast, ratio, at[1])
        direction = self.dmd2.direction_at(cast, x0.detach(), at, batch, step)
        direction = beside(x0, weight) * direction
        terms = {"matching": pseudo_loss(x0, direction)}
        if self.gan_weight > 0:
            terms["adversarial"] = self.gan_weight * self.dmd2.adversary.student_term(cast, x0, batch)
        return Loss(terms, {"direction": direction.square().mean().sqrt(), "ratio": ratio.mean()})

    @torch.no_grad()
    def ratio(self, cast: Cast, at: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        """Density ratios, (B,), of real to generated samples at `at` = (x_t, t), where the scores are compared too."""
        logits = cast.head("discriminator")(self.dmd2.adversary.encoder(cast), *at, batch.condition)
        return density_ratio(logits, self.logit_limit, self.ratio_range)

    @torch.no_grad()
    def weight(self, cast: Cast, ratio: Tensor, t: Tensor) -> Tensor:
        """Ratios at the times t => weights h(r), all (B,): both stages of the paper's normalisation around h."""
        if self.normalize_ratio:
            discriminator = cast.head("discriminator").module
            assert isinstance(discriminator, RatioDiscriminator), "the head that this objective's roles ask for"
            place = (t - self.t_min) / max(self.t_max - self.t_min, 1e-9)  # a single time lies in one bin
            ratio = discriminator.normalize(ratio, place, self.bin_decay)
        weight = DIVERGENCES[self.divergence].h(ratio)
        return over_mean(weight) if self.normalize_weight else weight
