"""Latent adversarial diffusion distillation: a few-step student against heads on the teacher's own features.

Sauer et al. 2024, "Fast High-Resolution Image Synthesis with Latent Adversarial Diffusion Distillation", arXiv
2403.12015; its generic form as in NVlabs/FastGen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from stepdistill.discriminator import Discriminator, Game
from stepdistill.errors import UserError
from stepdistill.objectives.adversarial import Adversary
from stepdistill.objectives.base import Batch, Frozen, Head, InferenceSpec, Loss, Phase, Role, Step, Trained
from stepdistill.objectives.inputs import draw_times, few_step_input
from stepdistill.times import grid


if TYPE_CHECKING:
    from stepdistill.cast import Cast


@dataclass(frozen=True)
class LADD:
    """The student denoises data in one go, and its samples must look real to the teacher at every noise level.

    Attributes:
        timesteps: where the student is called, as Diffusers indices; at the first one it gets noise alone.
        probabilities: of each timestep in training; empty: all alike (the paper ends with .7, .1, .1, .1).
        warmup_probabilities: the same in the first `warmup_steps` iterations (the paper: 0, 0, .5, .5).
        warmup_steps: iterations.
        data: where real samples come from: "images", or "pairs", the teacher's stored samples, as in the paper.
        gan_loss: which game is played.
        layers: modules whose outputs are the features, in the order of the pass; empty: the family's own choice. The
            paper has heads behind several blocks.
        log_noise: mean and deviation of log(sigma / alpha) at which samples are judged; for a flow the logit-normal
            density of its noise level (the paper's best: 1, 1). More noise teaches structure, less noise texture.
        r1_weight: of the approximate R1 regulariser (FastGen: 100 to 1000); 0 for none.
        r1_std: deviation of its perturbation.
        misaligned_weight: of telling real samples with their own prompts from the same with others' (SANA-Sprint's
            code); 0 for none. Where little noise is left, nothing else asks the student to follow its prompt.
        discriminator_updates: for each update of the student (FastGen's default: 5).
    """

    timesteps: tuple[int, ...] = (999, 749, 499, 249)
    probabilities: tuple[float, ...] = ()
    warmup_probabilities: tuple[float, ...] = ()
    warmup_steps: int = 0
    data: Literal["images", "pairs"] = "images"
    gan_loss: Game = "hinge"
    layers: tuple[str, ...] = ()
    log_noise: tuple[float, float] = (1.0, 1.0)
    r1_weight: float = 0.0
    r1_std: float = 0.1
    misaligned_weight: float = 0.0
    discriminator_updates: int = 1

    def __post_init__(self) -> None:
        for name in ("probabilities", "warmup_probabilities"):
            given = getattr(self, name)
            if given and (len(given) != len(self.timesteps) or min(given) < 0 or sum(given) == 0):
                raise UserError(f"{name} must be as many numbers as there are timesteps, {len(self.timesteps)}, none "
                                f"negative and not all 0; got {list(given)}")  # fmt: skip
        if self.warmup_steps > 0 and not self.warmup_probabilities:
            raise UserError("warmup_steps has no effect without warmup_probabilities, such as [0, 0, 0.5, 0.5]")
        if self.discriminator_updates < 1 or min(self.r1_weight, self.misaligned_weight) < 0:
            raise UserError("discriminator_updates must be at least 1, r1_weight and misaligned_weight at least 0")

    @property
    def adversary(self) -> Adversary:
        """The game between student and discriminator."""
        return Adversary(
            game=self.gan_loss, features="teacher", r1_weight=self.r1_weight, r1_std=self.r1_std,
            log_noise=self.log_noise, misaligned_weight=self.misaligned_weight,
        )  # fmt: skip

    def probabilities_at(self, step: int) -> tuple[float, ...]:
        """Of the student's timesteps in an iteration; empty: all alike."""
        return self.warmup_probabilities if step < self.warmup_steps else self.probabilities

    def roles(self) -> Mapping[str, Role]:
        return {"teacher": Frozen(), "student": Trained(), "discriminator": Head(Discriminator, self.layers)}

    def phases(self, step: int) -> Sequence[Phase]:
        return (
            Phase("discriminator", ("discriminator",), self.discriminator_loss, stream=self.data,
                  repeats=self.discriminator_updates),
            Phase("student", ("student",), self.student_loss, stream=self.data),
        )  # fmt: skip

    def after_step(self, cast: Cast, step: int) -> None:
        return None

    def inference(self) -> InferenceSpec:
        return InferenceSpec(self.timesteps)

    def discriminator_loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """Heads on the teacher's features tell noised data from noised samples."""
        with torch.no_grad():
            x0 = self.samples(cast, batch, step)
        return Loss(self.adversary.discriminator_terms(cast, x0, batch))

    def student_loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """The adversarial loss alone; there is no distance to the teacher."""
        return Loss({"adversarial": self.adversary.student_term(cast, self.samples(cast, batch, step), batch)})

    def samples(self, cast: Cast, batch: Batch, step: Step) -> Tensor:
        """The student's clean predictions from noised data, (B, C, H, W)."""
        assert batch.latents is not None, "both streams carry latents"
        student = cast.denoiser("student")
        times = grid(student.schedule, self.timesteps, batch.device)
        t = draw_times(times, len(batch), self.probabilities_at(step.index))
        x_t = few_step_input(student.schedule, batch.latents, t, times[0])
        return student(x_t, t, batch.condition).x0
