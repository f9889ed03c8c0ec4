"""An objective of one's own: the student learns where the teacher's sampler ends up, from the same noise.

Regression on the teacher's samples (Luhman and Luhman 2021, arXiv:2101.02388). No critic and no images, and every
update costs the teacher's whole sampler; the student's images are blurred where the teacher's answer is sharp. Run it:

    PYTHONPATH=examples stepdistill train shapes/vsd_1step name=regression output=runs/regression \
        stages.0.objective="{name: own_objective:Regression, guidance: 3.0, teacher_steps: 8}" \
        stages.0.players="{default: {optimizer: {lr: 1e-4}}}"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from stepdistill import Batch, Cast, Frozen, InferenceSpec, Loss, Phase, Step, Trained
from stepdistill.sampling import ddim
from stepdistill.times import grid


@dataclass(frozen=True)
class Regression:
    """Squared distance to the teacher's sample; the fields are the options that a recipe may set."""

    guidance: float = 3.0
    teacher_steps: int = 8

    def roles(self) -> Mapping[str, Frozen | Trained]:
        """Who takes part."""
        return {"teacher": Frozen(), "student": Trained()}

    def phases(self, step: int) -> Sequence[Phase]:
        """Whose turn it is in iteration `step`, and by which loss."""
        return (Phase("student", updates=("student",), loss=self.loss),)

    def after_step(self, cast: Cast, step: int) -> None:
        """Nothing happens between iterations."""

    def inference(self) -> InferenceSpec:
        """The student is called once, at the last timestep."""
        return InferenceSpec(timesteps=(999,))

    def loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """One micro-batch => the loss."""
        teacher, student, noise = cast.denoiser("teacher"), cast.denoiser("student"), batch.noise()
        steps = tuple(round(1000 * (1 - k / self.teacher_steps)) - 1 for k in range(self.teacher_steps))
        times = grid(teacher.schedule, steps, batch.device)
        with torch.no_grad():
            target = ddim(teacher, noise, times, batch.condition, null=batch.null, guidance=self.guidance)
        x0 = student(noise, times[0].expand(len(batch)), batch.condition).x0  # noise => x0, in one call
        return Loss({"regression": (x0 - target).square().mean()})
