"""sCM: consistency in continuous time, from the derivative of the student along the teacher's flow.

Lu and Song 2024, "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models", arXiv 2410.11081.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from stepdistill.condition import Condition
from stepdistill.errors import UserError
from stepdistill.objectives.base import Batch, Frozen, Head, InferenceSpec, Loss, Phase, Role, Step, Trained
from stepdistill.objectives.matching import Guidance
from stepdistill.objectives.targets import needs_boundary
from stepdistill.objectives.trajectory import sample_guidance
from stepdistill.prediction import Prediction, beside
from stepdistill.trigflow import LogWeight, TangentNorm, TrigFlow, consistency_tangent, normalized_tangent


if TYPE_CHECKING:
    from stepdistill.cast import Cast


@dataclass(frozen=True)
class Point:
    """Noised images of a batch, and what is said about them.

    Attributes:
        x: on the circle, (B, ...).
        angle: (B,).
        eps: the noise in x, (B, ...).
        guidance: the teacher's scale there, one number or (B,).
        condition: what the student is told, B rows.
    """

    x: Tensor
    angle: Tensor
    eps: Tensor
    guidance: float | Tensor
    condition: Condition


@dataclass(frozen=True)
class SCM:
    """The student's clean prediction shall not change along the flow: its derivative there is brought to zero.

    Attributes:
        timesteps: where the finished student is called; it learns all times at once.
        velocity: the flow's direction, from the guided teacher (sCD) or from data and noise (sCT).
        guidance: the teacher's guidance scale, or a range, from which every sample gets its own (1 to 2 for
            ImageNet-512).
        embed_guidance: tell the student the scale, which then is an input of the finished student too.
        time_mean: P_mean of the noise level's logarithm (ImageNet-512: -0.8, ImageNet-64 and CIFAR-10: -1).
        time_std: P_std (1.6; CIFAR-10: 1.4).
        sigma_d: standard deviation of the data in the paper's units, to which P_mean and the norm's constant refer.
        data_std: standard deviation of our latents; they are multiplied by sigma_d / data_std in effect.
        warmup_steps: H, iterations until the terms with derivatives count in full.
        tangent_norm: rms or l2 divide the tangent by its norm per sample, clip limits its elements, none leaves it.
        norm_constant: c, added to the norm.
        adaptive: weigh angles by a learnt function of the angle, the role "weighting".
        prior_weight: weigh by 1 / (sigma_d tan angle) beforehand.
        difference: relative size of central differences instead of forward-mode derivatives; 0 for the latter.
    """

    timesteps: tuple[int, ...] = (999,)
    velocity: Literal["teacher", "data"] = "teacher"
    guidance: Guidance = 1.0
    embed_guidance: bool = False
    time_mean: float = -0.8
    time_std: float = 1.6
    sigma_d: float = 0.5
    data_std: float = 1.0
    warmup_steps: int = 10_000
    tangent_norm: TangentNorm = "rms"
    norm_constant: float = 0.1
    adaptive: bool = True
    prior_weight: bool = False
    difference: float = 0.0

    def __post_init__(self) -> None:
        for name in ("sigma_d", "data_std", "norm_constant"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("time_std", "warmup_steps", "difference"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative, got {getattr(self, name)}")

    def roles(self) -> Mapping[str, Role]:
        roles: dict[str, Role] = {"teacher": Frozen(), "student": Trained(self.embed_guidance)}
        return {**roles, "weighting": Head(LogWeight)} if self.adaptive else roles

    @property
    def updates(self) -> tuple[str, ...]:
        """The roles that the loss trains."""
        return ("student", "weighting") if self.adaptive else ("student",)

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("student", self.updates, self.loss, stream="images"),)

    def after_step(self, cast: Cast, step: int) -> None:
        return None

    def inference(self) -> InferenceSpec:
        scale = statistics.mean(self.guidance) if isinstance(self.guidance, tuple) else self.guidance
        if not self.embed_guidance:
            return InferenceSpec(self.timesteps)
        return InferenceSpec(self.timesteps, guidance_scale=scale, embeds_guidance=True)

    def loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """Algorithm 1 of the paper."""
        return self.matched(cast, batch, step)[0]

    def matched(self, cast: Cast, batch: Batch, step: Step) -> tuple[Loss, Point, Prediction]:
        """The loss, where it was taken, and the student's prediction there, which carries its gradient."""
        student, trig = cast.denoiser("student"), self.trigflow(cast)
        needs_boundary(student, "scm")
        point = self.draw(trig, batch)
        tangent = self.tangent(cast, batch, point, step)
        said = student(*trig.place(point.x, point.angle), point.condition)
        output = trig.output(said)
        target = output.detach() + normalized_tangent(tangent, self.tangent_norm, self.norm_constant)
        value, logged = self.weighted(cast, (output - target).square().flatten(1).mean(1), point.angle)
        return Loss({"scm": value}, {"tangent": tangent.square().mean().sqrt(), **logged}), point, said

    def trigflow(self, cast: Cast) -> TrigFlow:
        """The circle of the student's schedule, which is the teacher's."""
        return TrigFlow(cast.denoiser("student").schedule, self.data_std)

    def draw(self, trig: TrigFlow, batch: Batch) -> Point:
        """The batch's images at angles of the proposal distribution, with fresh noise."""
        assert batch.latents is not None, "the images stream carries latents"
        angle = trig.draw_angles(
            len(batch), mean=self.time_mean, std=self.time_std, sigma_d=self.sigma_d, device=batch.device
        )
        eps = torch.randn_like(batch.latents)
        scale = sample_guidance(self.guidance, len(batch), batch.device)
        told = batch.condition.with_guidance(scale) if self.embed_guidance else batch.condition
        return Point(trig.noised(batch.latents, angle, eps), angle, eps, scale, told)

    @torch.no_grad()
    def tangent(self, cast: Cast, batch: Batch, point: Point, step: Step) -> Tensor:
        """g of algorithm 1 before its normalisation, (B, ...)."""
        trig, velocity = self.trigflow(cast), self.flow(cast, batch, point)
        turn = point.angle.cos() * point.angle.sin()  # the paper's rearrangement: no derivative is infinite at pi/2
        along = (beside(velocity, turn) * velocity).to(velocity.dtype)
        output, derivative = trig.derivative(
            cast.denoiser("student"), point.x, point.angle, point.condition, (along, turn), difference=self.difference
        )
        warmup = min(1.0, step.index / self.warmup_steps) if self.warmup_steps else 1.0
        tangent = consistency_tangent(point.x, point.angle, output, velocity, derivative, warmup=warmup)
        return self.sigma_d * tangent

    def flow(self, cast: Cast, batch: Batch, point: Point) -> Tensor:
        """dx / dangle of the probability flow, or of the one path through data and noise, (B, ...)."""
        trig = self.trigflow(cast)
        if self.velocity == "data":
            assert batch.latents is not None, "the images stream carries latents"
            # cos eps - sin x0 lies a quarter turn ahead of cos x0 + sin eps
            return trig.noised(batch.latents, point.angle + torch.pi / 2, point.eps)
        x_t, t = trig.place(point.x, point.angle)
        return trig.output(cast.denoiser("teacher").guided(x_t, t, batch.condition, batch.null, point.guidance))

    def weighted(self, cast: Cast, error: Tensor, angle: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squares per sample, (B,) => the loss, a scalar, and what is worth logging: e^w error - w."""
        if self.prior_weight:
            error = error / (self.sigma_d * angle.tan()).to(error.dtype)
        if not self.adaptive:
            return error.mean(), {}
        weight = cast.head("weighting").module(angle)
        return (weight.exp() * error - weight).mean(), {"weight": weight.detach().exp().mean()}
