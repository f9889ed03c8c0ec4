"""SANA-Sprint: continuous-time consistency and an adversary on the teacher's features, for one to four steps.

Chen et al. 2025, "SANA-Sprint: One-Step Diffusion with Continuous-Time Consistency Distillation", arXiv 2503.09641.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stepdistill.discriminator import Discriminator, Game
from stepdistill.errors import UserError
from stepdistill.objectives.adversarial import Adversary
from stepdistill.objectives.base import Batch, Head, InferenceSpec, Loss, Phase, Role, Step
from stepdistill.objectives.checks import check_share, check_weights
from stepdistill.objectives.matching import Guidance
from stepdistill.objectives.scm import SCM, Point
from stepdistill.trigflow import TangentNorm


if TYPE_CHECKING:
    from stepdistill.cast import Cast


@dataclass(frozen=True)
class Sprint:
    """`scm`, and beside it latent adversarial distillation (LADD) that often looks at samples of pure noise.

    Attributes:
        timesteps: where the finished student is called; it learns all times at once.
        guidance: the teacher's guidance scale, or a range, from which every sample gets its own (published: 4 to 5).
        embed_guidance: tell the student the scale, which then is an input of the finished student too.
        time_mean: P_mean of the noise level's logarithm (0; released configuration: 0.2; -0.8 and 0.6 were unstable).
        time_std: P_std.
        sigma_d: standard deviation of the data in the paper's units.
        data_std: standard deviation of our latents.
        warmup_steps: H, iterations until the terms with derivatives count in full (released configuration: 4,000).
        tangent_norm: how the tangent is normalised, see `scm`.
        norm_constant: c, added to the norm.
        adaptive: weigh angles by a learnt function of the angle.
        prior_weight: weigh by 1 / (sigma_d tan angle) beforehand.
        difference: relative size of central differences instead of forward-mode derivatives; 0 for the latter.
        gan_weight: of the adversarial term in the student's loss (0.5).
        gan_loss: which game is played (hinge).
        largest_time_share: share of the adversary's samples that begin with pure noise at the last time (0.5); the
            others are those of the consistency loss.
        gan_time_mean: P_mean of the times at which the discriminator looks (-0.6).
        gan_time_std: P_std of these.
        misaligned_weight: of a second game, real samples with their own prompts against the same with others' (the
            released code's option counts these as generated).
        layers: modules of the teacher whose outputs the discriminator sees; empty: the family's own choice.
    """

    timesteps: tuple[int, ...] = (999,)
    guidance: Guidance = 4.5
    embed_guidance: bool = False
    time_mean: float = 0.0
    time_std: float = 1.6
    sigma_d: float = 0.5
    data_std: float = 1.0
    warmup_steps: int = 4000
    tangent_norm: TangentNorm = "l2"
    norm_constant: float = 0.1
    adaptive: bool = True
    prior_weight: bool = True
    difference: float = 0.0
    gan_weight: float = 0.5
    gan_loss: Game = "hinge"
    largest_time_share: float = 0.5
    gan_time_mean: float = -0.6
    gan_time_std: float = 1.0
    misaligned_weight: float = 0.0
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.gan_weight <= 0:
            raise UserError(f"gan_weight must be positive, got {self.gan_weight}; scm is the method without adversary")
        check_share("largest_time_share", self.largest_time_share)
        if self.gan_time_std < 0:
            raise UserError(f"gan_time_std must not be negative, got {self.gan_time_std}")
        check_weights(misaligned_weight=self.misaligned_weight)
        assert self.scm.updates  # and SCM checks its own options

    @property
    def scm(self) -> SCM:
        """The consistency part."""
        return SCM(
            timesteps=self.timesteps, guidance=self.guidance, embed_guidance=self.embed_guidance,
            time_mean=self.time_mean, time_std=self.time_std, sigma_d=self.sigma_d, data_std=self.data_std,
            warmup_steps=self.warmup_steps, tangent_norm=self.tangent_norm, norm_constant=self.norm_constant,
            adaptive=self.adaptive, prior_weight=self.prior_weight, difference=self.difference,
        )  # fmt: skip

    @property
    def adversary(self) -> Adversary:
        """The game between student and discriminator, seen through the frozen teacher."""
        # arctan(e^tau / sigma_d) has log tan = tau - log sigma_d, and tan = sigma / (data_std alpha)
        mean = self.gan_time_mean + math.log(self.data_std / self.sigma_d)
        return Adversary(game=self.gan_loss, features="teacher", log_noise=(mean, self.gan_time_std),
                         misaligned_weight=self.misaligned_weight)  # fmt: skip

    def roles(self) -> Mapping[str, Role]:
        return {**self.scm.roles(), "discriminator": Head(Discriminator, self.layers)}

    def phases(self, step: int) -> Sequence[Phase]:
        return (
            Phase("discriminator", ("discriminator",), self.discriminator_loss, stream="images"),
            Phase("student", self.scm.updates, self.student_loss, stream="images"),
        )

    def after_step(self, cast: Cast, step: int) -> None:
        return None

    def inference(self) -> InferenceSpec:
        return self.scm.inference()

    def discriminator_loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """Section 3.3: real latents against the student's, the mean over both."""
        student, trig = cast.denoiser("student"), self.scm.trigflow(cast)
        point, count = self.scm.draw(trig, batch), self.at_largest_time(len(batch), step)
        with torch.no_grad():
            x_t, t = trig.place(point.x, point.angle)
            # Of all rows, of which some are taken: a single row would be the same on all processes.
            x_t = torch.cat([torch.randn_like(x_t)[:count], x_t[count:]])
            t = torch.cat([torch.ones_like(t[:count]), t[count:]])
            x0 = student(x_t, t, point.condition).x0
        terms = self.adversary.discriminator_terms(cast, x0, batch)
        return Loss({name: 0.5 * value for name, value in terms.items()})

    def student_loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """Consistency (algorithm 1 of sCM), and section 3.3's adversarial term with max-time weighting."""
        scm, point, said = self.scm.matched(cast, batch, step)
        count = self.at_largest_time(len(batch), step)
        x0 = torch.cat([self.from_noise(cast, point, count), said.x0[count:]]) if count else said.x0
        adversarial = self.gan_weight * self.adversary.student_term(cast, x0, batch)
        return Loss({**scm.terms, "adversarial": adversarial}, scm.logged)

    def at_largest_time(self, rows: int, step: Step) -> int:
        """How many samples of a batch begin with pure noise: the share of them on average, equal on all processes."""
        return math.floor(self.largest_time_share * rows + step.shared("largest time").random())

    def from_noise(self, cast: Cast, point: Point, count: int) -> Tensor:
        """The student's clean predictions of fresh noise at the last time, (count, ...), for the first conditions."""
        noise = torch.randn_like(point.x)[:count]  # of all rows: a single one would be the same on all processes
        t = torch.ones(count, dtype=torch.float64, device=noise.device)
        return cast.denoiser("student")(noise, t, point.condition[:count]).x0
