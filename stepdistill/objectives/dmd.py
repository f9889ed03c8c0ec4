"""DMD: distribution matching, held in place by regression on stored pairs.

Yin et al. 2023, "One-step Diffusion with Distribution Matching Distillation", arXiv 2311.18828.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from stepdistill.condition import Condition
from stepdistill.losses import DmdWeighting, pseudo_loss
from stepdistill.objectives.base import Batch, InferenceSpec, Loss, Phase, Role, Step
from stepdistill.objectives.dmd2 import DMD2
from stepdistill.objectives.matching import Guidance, rollout
from stepdistill.objectives.regression import Regression, pairs_of
from stepdistill.times import LogNoise


if TYPE_CHECKING:
    from stepdistill.cast import Cast


@dataclass(frozen=True)
class DMD:
    """Descends KL(student || guided teacher), while stored noises keep leading to the teacher's images of them.

    Attributes:
        timestep: what the student is told together with pure noise.
        guidance: the teacher's guidance scale, or a range to draw it from; the critic is never guided. The pairs
            should have been made with the same one.
        critic_updates: critic steps per student step (algorithm 1: 1).
        critic_lead: iterations at the start without the student, for a stage whose student has learnt already.
        t_min: lowest time of the matching loss, as a fraction (published: 0.02).
        t_max: highest time of the matching loss (published: 0.98; the longest run ended with 0.5).
        log_noise: mean and deviation of a normal density of log(sigma / alpha) in place of these times; None: uniform.
        weighting: of the matching direction, see `matching_direction`; the paper compares all three.
        regression_weight: of the regression loss (published: 0.25); 0 needs no pairs.
        match_pairs: whether the samples from stored noises are matched too, beside as many from fresh noise (LAION),
            or the fresh ones alone (CIFAR-10, ImageNet).
        distance: of the regression: l2, huber, or lpips on decoded images (the paper).
        huber_delta: where the Huber distance turns from square to linear, in units of latents.
        lpips: safetensors file with VGG16's weights, for the distance lpips.
    """

    timestep: int = 999
    guidance: Guidance = 3.0
    critic_updates: int = 1
    critic_lead: int = 0
    t_min: float = 0.02
    t_max: float = 0.98
    log_noise: LogNoise | None = None
    weighting: DmdWeighting = "distance"
    regression_weight: float = 0.25
    match_pairs: bool = True
    distance: Literal["l2", "huber", "lpips"] = "l2"
    huber_delta: float = 1.0
    lpips: str | None = None

    def __post_init__(self) -> None:
        _ = self.matching, self.regression  # they check their options

    @property
    def matching(self) -> DMD2:
        """The game without the pairs: DMD2 without what it adds."""
        return DMD2(timesteps=(self.timestep,), guidance=self.guidance, critic_updates=self.critic_updates,
                    critic_lead=self.critic_lead, t_min=self.t_min, t_max=self.t_max, log_noise=self.log_noise,
                    weighting=self.weighting)  # fmt: skip

    @property
    def regression(self) -> Regression:
        """The game on the pairs."""
        return Regression(
            timestep=self.timestep, distance=self.distance, huber_delta=self.huber_delta, lpips=self.lpips
        )

    def roles(self) -> Mapping[str, Role]:
        return self.matching.roles()

    def phases(self, step: int) -> Sequence[Phase]:
        """Algorithm 1: the generator, then the critic."""
        stream = "pairs" if self.regression_weight > 0 else "prompts"
        student = Phase("student", ("student",), self.student_loss, stream=stream)
        critic = Phase("critic", ("critic",), self.matching.critic_loss, repeats=self.critic_updates)
        return (critic,) if step < self.critic_lead else (student, critic)

    def after_step(self, cast: Cast, step: int) -> None:
        return None

    def inference(self) -> InferenceSpec:
        return InferenceSpec((self.timestep,))

    def student_loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """Matching (eq. 7 and 8) and, weighted, regression (eq. 9); the free samples are of the pairs' prompts."""
        if self.regression_weight == 0:
            return self.matching.student_loss(cast, batch, step)
        noise, target = pairs_of(batch)
        free = rollout(cast.denoiser("student"), batch, (self.timestep,), step)
        paired = self.regression.sample(cast, noise, batch.condition)
        matched, given = (torch.cat([free, paired]), doubled(batch)) if self.match_pairs else (free, batch)
        direction = self.matching.direction(cast, matched.detach(), given, step)
        terms = {
            "matching": pseudo_loss(matched, direction),
            "regression": self.regression_weight * self.regression.error(cast, paired, target),
        }
        return Loss(terms, {"direction": direction.square().mean().sqrt()})


def doubled(batch: Batch) -> Batch:
    """The batch's conditions twice, 2 B rows."""
    return replace(batch, condition=Condition.cat([batch.condition] * 2), null=Condition.cat([batch.null] * 2))
