"""LCM: a latent consistency model, which also takes the guidance scale as an input; and LCM-LoRA.

Luo et al. 2023, "Latent Consistency Models", arXiv 2310.04378; "LCM-LoRA", arXiv 2311.05556. The guidance scale as an
input: Meng et al. 2023, "On Distillation of Guided Diffusion Models", arXiv 2210.03142.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from stepdistill.errors import UserError
from stepdistill.losses import Distance, distance
from stepdistill.objectives.base import Batch, Frozen, InferenceSpec, Loss, NeedsSchedule, Phase, Role, Step, Trained
from stepdistill.objectives.matching import Guidance
from stepdistill.objectives.targets import follow, target_name, target_roles
from stepdistill.objectives.trajectory import sample_guidance
from stepdistill.prediction import add_noise, beside
from stepdistill.sampling import Solver, solver_step
from stepdistill.segments import SolverGrid


if TYPE_CHECKING:
    from stepdistill.cast import Cast
    from stepdistill.schedule import NoiseSchedule


@dataclass(frozen=True)
class LCM(NeedsSchedule):
    """The student's clean image is the same from every point of the guided teacher's path.

    LCM-LoRA is this with a LoRA student, `embed_guidance` false and `target_decay` 0: the teacher is the network
    without the adapter, the target the student itself.

    Attributes:
        timesteps: where the finished student is called, as indices; LCM's own grid has 999, 759, 499, 259.
        solver_steps: of the grid on which the teacher steps; 50 are 20 timesteps each.
        guidance: the teacher's scale, or a range from which every sample gets its own. LCM counts one less: its 2 to
            14 are 3 to 15 here.
        embed_guidance: the student takes the scale as an input, so that it serves the whole range at one call a step;
            needs full weights, and a family whose networks can. False: a scale is trained in.
        call_guidance: the scale that the exported student is called with, where it is an input; None: the middle.
        solver: how the teacher steps.
        target_decay: of the moving average that gives the targets; 0: the student itself.
        distance: mse, l2, huber or sample_huber.
        huber_c: the constant of both Huber distances.
        lowest: the time that counts as clean. Diffusers' code takes the first timestep, 0.001, which is nearly so.
    """

    timesteps: tuple[int, ...] = (999, 759, 499, 259)
    solver_steps: int = 50
    guidance: Guidance = (3.0, 15.0)
    embed_guidance: bool = True
    call_guidance: float | None = None
    solver: Solver = "ddim"
    target_decay: float = 0.95
    distance: Distance = "huber"
    huber_c: float = 1e-3
    lowest: float = 0.0

    def __post_init__(self) -> None:
        _ = self.roles()  # refuses what is no decay
        low, high = self.guidance_range
        if low > high:
            raise UserError(f"guidance {list(self.guidance_range)} is no range; give the lower scale first")
        if self.call_guidance is not None and not self.embed_guidance:
            raise UserError("call_guidance is for students that take the scale as an input; leave it out, or set "
                            "embed_guidance: true")  # fmt: skip
        if self.call_guidance is not None and not low <= self.call_guidance <= high:
            raise UserError(f"call_guidance {self.call_guidance:g} is not trained; give a scale from {low:g} to "
                            f"{high:g}, or widen guidance")  # fmt: skip

    def check_schedule(self, schedule: NoiseSchedule) -> None:
        SolverGrid(schedule, self.solver_steps, torch.device("cpu"), lowest=self.lowest)

    @property
    def guidance_range(self) -> tuple[float, float]:
        """The lowest and the highest scale that is trained."""
        return self.guidance if isinstance(self.guidance, tuple) else (self.guidance, self.guidance)

    def roles(self) -> Mapping[str, Role]:
        student = Trained(embeds_guidance=self.embed_guidance)
        return {"teacher": Frozen(), "student": student, **target_roles(self.target_decay)}

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("student", ("student",), self.loss, stream="images"),)

    def after_step(self, cast: Cast, step: int) -> None:
        follow(cast, step, decay=self.target_decay)

    def inference(self) -> InferenceSpec:
        if not self.embed_guidance:
            return InferenceSpec(self.timesteps)
        scale = sum(self.guidance_range) / 2 if self.call_guidance is None else self.call_guidance
        return InferenceSpec(self.timesteps, guidance_scale=scale, embeds_guidance=True)

    def loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """LCM, algorithm 1: d(f(x_t, w, c, t), sg f(x_s, w, c, s)), x_s one step of the guided teacher from x_t.

        f is the predicted clean sample. LCM's c_skip makes it the identity where the time is clean, and leaves 7e-6 of
        the input one grid step above; here the target at `lowest` is x_s itself, and c_skip is nothing elsewhere.
        """
        assert batch.latents is not None, "the images stream carries latents"
        student = cast.denoiser("student")
        i, t, s = SolverGrid(student.schedule, self.solver_steps, batch.device, lowest=self.lowest).pairs(len(batch))
        scale = sample_guidance(self.guidance, len(batch), batch.device)
        told = batch.condition.with_guidance(scale) if self.embed_guidance else batch.condition
        x_t = add_noise(student.schedule, batch.latents, t, batch.noise())
        with torch.no_grad():
            x_s = solver_step(cast.denoiser("teacher"), x_t, t, s, batch.condition, batch.null, scale, self.solver)
            target = cast.denoiser(target_name(self.target_decay))(x_s, s, told).x0
            target = torch.where(beside(x_s, i == 1), x_s, target)
        found = student(x_t, t, told).x0
        return Loss({"consistency": distance(self.distance, found, target, self.huber_c).mean()})
