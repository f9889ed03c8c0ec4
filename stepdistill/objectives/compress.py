"""Distillation into a smaller network: it learns what its teacher says, and how its teacher gets there.

BK-SDM (Kim et al. 2023, arXiv 2305.15798) matches outputs and the features of blocks, KOALA (Lee et al. 2023,
arXiv 2312.04005) outputs and self-attention; outputs alone are the teacher score matching that multi-student
distillation (arXiv 2410.23274) begins with where students are small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.losses import min_snr_weight, weighted_mse
from stepdistill.objectives.base import Batch, Frozen, InferenceSpec, Loss, Phase, Role, Step, Trained
from stepdistill.objectives.checks import check_share, check_times
from stepdistill.prediction import Levels, add_noise, native_target
from stepdistill.times import uniform_times


if TYPE_CHECKING:
    from stepdistill.cast import Cast
    from stepdistill.families.smaller import Plan

WEIGHTS = ("task", "output", "feature", "attention")


@dataclass(frozen=True)
class Compress:
    """Squared errors of output, block features and self-attention to the teacher's, and of plain denoising.

    The student stays a model of many steps, sampled as its teacher is; a stage of a one-step objective comes next. A
    narrower student is compared with the channels that it has kept of the teacher's.

    Attributes:
        task_weight: of denoising the data, as in `denoising` (BK-SDM: 1).
        output_weight: of the difference between the native outputs (BK-SDM: 1).
        feature_weight: of the differences between the outputs of all blocks, their sum (BK-SDM: 1).
        attention_weight: the same between the outputs of all self-attention layers, which KOALA takes instead.
        data: what is noised: encoded images, or the finished samples of stored pairs.
        min_snr_gamma: Min-SNR weighting of task and output (Hang et al. 2023); None leaves native errors unweighted.
        condition_dropout: share of prompts replaced by the null condition, so that guidance can be used later.
        t_min: lowest time, as a fraction of the schedule.
        t_max: highest.
    """

    task_weight: float = 1.0
    output_weight: float = 1.0
    feature_weight: float = 1.0
    attention_weight: float = 0.0
    data: Literal["images", "pairs"] = "images"
    min_snr_gamma: float | None = None
    condition_dropout: float = 0.1
    t_min: float = 0.0
    t_max: float = 1.0

    def __post_init__(self) -> None:
        check_times(self.t_min, self.t_max)
        check_share("condition_dropout", self.condition_dropout)
        weights = [getattr(self, f"{name}_weight") for name in WEIGHTS]
        if min(weights) < 0 or max(weights) == 0:
            named = ", ".join(f"{name}_weight {weight:g}" for name, weight in zip(WEIGHTS, weights, strict=True))
            raise UserError(f"{named}: no weight may be negative, and one must be above 0")

    def roles(self) -> Mapping[str, Role]:
        return {"teacher": Frozen(), "student": Trained()}

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("student", ("student",), self.loss, stream=self.data),)

    def after_step(self, cast: Cast, step: int) -> None:
        return None

    def inference(self) -> InferenceSpec | None:
        return None

    def loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """BK-SDM, section 3.2: task, output and feature terms, each with its weight."""
        student, x0 = cast.denoiser("student"), batch.latents
        assert x0 is not None, "the streams of images and of pairs carry latents"
        t = uniform_times(student.schedule, len(batch), low=self.t_min, high=self.t_max, device=batch.device)
        eps = torch.randn_like(x0)
        keep = torch.rand(len(batch), device=batch.device) >= self.condition_dropout
        condition = batch.condition.where(keep, batch.null)
        at = add_noise(student.schedule, x0, t, eps), t, condition
        groups = self.layers(cast)
        pairs = [pair for group in groups.values() for pair in group]
        said, features = student.observed(*at, [name for name, _ in pairs])
        levels = Levels.at(student.schedule, t, x0)
        weight = None if self.min_snr_gamma is None else min_snr_weight(levels, student.kind, self.min_snr_gamma)
        terms: dict[str, Tensor] = {}
        if self.task_weight > 0:
            target = native_target(student.kind, x0, eps, levels)
            terms["task"] = self.task_weight * weighted_mse(said.native, target, weight)
        if self.output_weight > 0 or pairs:
            with torch.no_grad():
                told, wanted = cast.denoiser("teacher").observed(*at, [name for _, name in pairs])
            if self.output_weight > 0:
                terms["output"] = self.output_weight * weighted_mse(said.native, told.native, weight)
            errors = {pair: layer_error(cast.plan("student"), *both)
                      for pair, *both in zip(pairs, features, wanted, strict=True)}  # fmt: skip
            for name, group in groups.items():
                terms[name] = getattr(self, f"{name}_weight") * torch.stack([errors[pair] for pair in group]).sum()
        return Loss(terms)

    def layers(self, cast: Cast) -> dict[str, list[tuple[str, str]]]:
        """For each term that compares layers, pairs of the student's module and the teacher's."""
        found = {}
        for name in ("feature", "attention"):
            if getattr(self, f"{name}_weight") > 0:
                pattern = cast.family.block_pattern if name == "feature" else cast.family.attention_pattern
                found[name] = cast.plan("student").pairs(cast.denoiser("student").weights.network, pattern)
                if not found[name]:
                    raise UserError(f"{name}_weight is above 0, but the student has no such layers left; set it to 0")
        return found


def layer_error(plan: Plan, own: Tensor, teachers: Tensor) -> Tensor:
    """Mean square of what a student's layer lacks of the teacher's, in the channels that the student has kept.

    Args:
        plan: the student's network in terms of the teacher's.
        own: the student's features, (B, C', H, W) or (B, N, C').
        teachers: of the module that they come from, (B, C, H, W) or (B, N, C).

    Raises:
        UserError: the layers do not stand at the same place.
    """
    wanted = plan.cut(teachers, own.shape)
    if wanted is None:
        raise UserError(f"a layer of the student gives features of shape {tuple(own.shape[1:])}, which cannot be "
                        f"compared with the teacher's of {tuple(teachers.shape[1:])}")  # fmt: skip
    return weighted_mse(own.float(), wanted.float())
