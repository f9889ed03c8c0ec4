"""TSCD: trajectory segmented consistency distillation, one stage of it, of a given number of segments.

Ren et al. 2024, "Hyper-SD: Trajectory Segmented Consistency Model for Efficient Image Synthesis", arXiv 2404.13686;
the discriminator is that of Lin et al. 2024, "SDXL-Lightning", arXiv 2402.13929.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from stepdistill.discriminator import Game
from stepdistill.errors import UserError
from stepdistill.losses import Distance, distance
from stepdistill.objectives.base import (
    Batch,
    Frozen,
    InferenceSpec,
    Loss,
    NeedsSchedule,
    Phase,
    Recorded,
    Role,
    Step,
    Trained,
)
from stepdistill.objectives.checks import check_updates
from stepdistill.objectives.encoder_adversary import EncoderAdversary
from stepdistill.objectives.matching import Guidance
from stepdistill.objectives.targets import follow, target_name, target_roles
from stepdistill.objectives.trajectory import Leap, Trajectory, student_jump
from stepdistill.sampling import Sampler, Solver


if TYPE_CHECKING:
    from stepdistill.cast import Cast
    from stepdistill.schedule import NoiseSchedule


SOURCE = "source"  # the role that holds the student of the stage before


@dataclass(frozen=True)
class TSCD(NeedsSchedule):
    """Trajectory consistency inside of segments: a recipe plays it with 8, then 4, 2 and 1 of them.

    Attributes:
        segments: k. No jump leaves its segment; with one segment per solver step the student learns the teacher's own
            steps, with one in all this is TCD.
        distance_weight: of the distance (paper: it dominates for 8 and 4 segments; values not given).
        gan_weight: of the adversarial term (paper: it dominates for 2 and 1); 0: no discriminator.
        timesteps: where the finished student is called, as Diffusers indices; the training does not depend on it.
        guidance: the teacher's scale, or a range from which every sample gets its own; 1 means none.
        solver_steps: of the grid on which the teacher steps.
        solver: how it steps.
        source: whose step leads from t to the next time: the teacher's, guided, or that of the student as it was when
            the stage began, into which guidance is built already.
        distance: mse, l2, huber or sample_huber.
        huber_c: the constant of both Huber distances.
        target_decay: of the moving average of the student that jumps from that point; 0: the student itself.
        noise_offset: strength of the noise's constant per channel (paper: noise perturbation; 0.03 to 0.05 is usual).
        conditional: the discriminator also sees where the jump began, so that it judges the jump and not the image.
        gan_loss: which game it plays: non_saturating, hinge or least_squares.
        layers: modules whose outputs it sees; empty: the bottleneck.
        discriminator_updates: its updates per student update.
        sampler: how the finished student is sampled.
        eta: TCD's gamma when it is sampled: up to 1 for few steps, less for more.
    """

    segments: int = 8
    distance_weight: float = 1.0
    gan_weight: float = 0.0
    timesteps: tuple[int, ...] = (999, 874, 749, 624, 499, 374, 249, 124)
    guidance: Guidance = 7.5
    solver_steps: int = 50
    solver: Solver = "ddim"
    source: Literal["teacher", "previous"] = "teacher"
    distance: Distance = "mse"
    huber_c: float = 1e-3
    target_decay: float = 0.95
    noise_offset: float = 0.0
    conditional: bool = True
    gan_loss: Game = "non_saturating"
    layers: tuple[str, ...] = ()
    discriminator_updates: int = 1
    sampler: Sampler = "tcd"
    eta: float = 0.0

    def __post_init__(self) -> None:
        if min(self.distance_weight, self.gan_weight) < 0 or self.distance_weight + self.gan_weight == 0:
            raise UserError("distance_weight and gan_weight must not be negative, nor both 0; got "
                            f"{self.distance_weight:g} and {self.gan_weight:g}")  # fmt: skip
        check_updates("discriminator_updates", self.discriminator_updates)
        # What does not fit together is told before anything is loaded.
        _ = self.trajectory, self.roles(), self.inference()

    def check_schedule(self, schedule: NoiseSchedule) -> None:
        self.trajectory.check_schedule(schedule)

    @property
    def trajectory(self) -> Trajectory:
        """Which jumps are learnt."""
        guidance = 1.0 if self.source == "previous" else self.guidance
        return Trajectory(self.segments, self.solver_steps, self.solver, guidance, self.noise_offset)

    @property
    def adversary(self) -> EncoderAdversary:
        """The game between student and discriminator."""
        return EncoderAdversary(self.conditional, self.gan_loss, self.layers)

    def roles(self) -> Mapping[str, Role]:
        roles: dict[str, Role] = {"teacher": Frozen(), "student": Trained(), **target_roles(self.target_decay)}
        if self.source == "previous":
            roles[SOURCE] = Recorded(like="student")
        return {**roles, **self.adversary.roles()} if self.gan_weight else roles

    def phases(self, step: int) -> Sequence[Phase]:
        student = Phase("student", ("student",), self.student_loss, "images")
        if not self.gan_weight:
            return (student,)
        judges = tuple(self.adversary.roles())
        return (
            Phase("discriminator", judges, self.discriminator_loss, "images", self.discriminator_updates),
            student,
        )

    def after_step(self, cast: Cast, step: int) -> None:
        follow(cast, step, decay=self.target_decay)

    def inference(self) -> InferenceSpec:
        return InferenceSpec(self.timesteps, self.sampler, eta=self.eta)

    def discriminator_loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """Jumps by way of the teacher's next point are real, the student's own are not."""
        leap = self.trajectory.leap(cast.denoiser("teacher"), batch)
        real = self._target(cast, leap, batch)
        with torch.no_grad():
            fake = student_jump(cast, leap, batch)
        start = (leap.x_t, leap.t) if self.conditional else None
        return Loss({"discriminator": self.adversary.discriminator_term(cast, start, real, fake, leap.end, batch)})

    def student_loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """L_TSCD: the distance of both jumps' ends, and what the discriminator says about the student's."""
        leap = self.trajectory.leap(cast.denoiser("teacher"), batch)
        target = self._target(cast, leap, batch) if self.distance_weight else None
        found, terms = student_jump(cast, leap, batch), {}
        if target is not None:
            apart = distance(self.distance, found, target, self.huber_c).mean()
            terms["trajectory"] = self.distance_weight * apart
        if self.gan_weight:
            start = (leap.x_t, leap.t) if self.conditional else None
            said = self.adversary.student_term(cast, start, found, leap.end, batch)
            terms["adversarial"] = self.gan_weight * said
        return Loss(terms)

    def _target(self, cast: Cast, leap: Leap, batch: Batch) -> Tensor:
        solving = cast.denoiser("teacher" if self.source == "teacher" else SOURCE)
        return self.trajectory.target(solving, cast.denoiser(target_name(self.target_decay)), leap, batch)
