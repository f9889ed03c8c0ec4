"""Guidance distillation: one pass of the student says what two passes of the guided teacher say.

Meng et al. 2023, "On Distillation of Guided Diffusion Models", arXiv 2210.03142, section 3.1 (its first stage; the
second is the objective `progressive`); Golnari 2023, "LoRA-Enhanced Distillation on Guided Diffusion Models", arXiv
2312.06899.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.losses import ProgressiveWeighting, native_weight, weighted_mse
from stepdistill.objectives.base import Batch, Frozen, InferenceSpec, Loss, Phase, Role, Step, Trained, Visited
from stepdistill.objectives.matching import Guidance
from stepdistill.objectives.trajectory import sample_guidance
from stepdistill.prediction import add_noise
from stepdistill.times import uniform_times


if TYPE_CHECKING:
    from stepdistill.cast import Cast

LearnOn = Literal["images", "pairs", "states"]
TRAINING_STEPS = 1000  # timesteps of a teacher, in which students' own are counted


@dataclass(frozen=True)
class GuidanceDistillation:
    """The student answers at once as the teacher does with classifier-free guidance, at every time.

    It remains a model of many steps, with the teacher's own scheduler, at half the network calls.

    Attributes:
        guidance: the teacher's scale, or a range from which every sample gets its own. The paper counts one less.
        embed_guidance: the student takes the scale as an input, so that it serves the whole range; needs full weights,
            and a family whose networks can. False: a fixed scale is trained in, with a LoRA or with full weights.
        call_guidance: the scale that the exported student is called with, where it is an input; None: the middle.
        learn_on: where the two are compared: on noised "images", on the teacher's own samples, noised ("pairs"), or on
            stored "states" of its guided paths, which also hold its answers.
        weighting: of the squared error of the clean sample: "native", which makes it that of what the network says;
            "truncated_snr", max(SNR, 1); or "snr_plus_one".
        steps: of the previews and of the measurement; the student may be called with any number.
    """

    guidance: Guidance = 7.5
    embed_guidance: bool = False
    call_guidance: float | None = None
    learn_on: LearnOn = "images"
    weighting: ProgressiveWeighting = "native"
    steps: int = 25

    def __post_init__(self) -> None:
        low, high = self.guidance_range
        if low > high:
            raise UserError(f"guidance {list(self.guidance_range)} is no range; give the lower scale first")
        if low < high and not self.embed_guidance:
            raise UserError("a student that does not take the scale as an input can learn one alone; give one "
                            "guidance, or embed_guidance: true")  # fmt: skip
        if self.call_guidance is not None and not self.embed_guidance:
            raise UserError("call_guidance is for students that take the scale as an input; leave it out, or set "
                            "embed_guidance: true")  # fmt: skip
        check_steps(self.steps)

    @property
    def guidance_range(self) -> tuple[float, float]:
        """The lowest and the highest scale that is trained."""
        return self.guidance if isinstance(self.guidance, tuple) else (self.guidance, self.guidance)

    def roles(self) -> Mapping[str, Role]:
        return {"teacher": Frozen(), "student": Trained(embeds_guidance=self.embed_guidance)}

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("student", ("student",), self.loss, stream=self.learn_on),)

    def after_step(self, cast: Cast, step: int) -> None:
        return None

    def inference(self) -> InferenceSpec:
        timesteps = even_timesteps(self.steps)
        if not self.embed_guidance:
            return InferenceSpec(timesteps, "own")
        scale = sum(self.guidance_range) / 2 if self.call_guidance is None else self.call_guidance
        return InferenceSpec(timesteps, "own", guidance_scale=scale, embeds_guidance=True)

    def loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """w(t) |x0_student(z_t, s) - x0_guided(z_t)|^2, arXiv 2210.03142, section 3.1, for scales s = 1 + w."""
        place = self._place(cast, batch)
        student = cast.denoiser("student")
        told = batch.condition.with_guidance(place.guidance) if self.embed_guidance else batch.condition
        said = student(place.x_t, place.t, told)
        weight = native_weight(said.levels, said.kind, self.weighting)
        return Loss({"guidance": weighted_mse(said.native, place.native, weight)})

    def _place(self, cast: Cast, batch: Batch) -> Visited:
        """Where the student is asked, and what the guided teacher says there."""
        if self.learn_on != "states":
            return noised_place(cast, batch, self.guidance)
        place, (low, _) = visited_of(batch), self.guidance_range
        if not self.embed_guidance and not torch.allclose(place.guidance, torch.full_like(place.guidance, low)):
            raise UserError(f"the stored paths were not made with guidance {low:g} alone, and this student cannot "
                            "tell scales apart; make them so, or set embed_guidance: true")  # fmt: skip
        return place


def noised_place(cast: Cast, batch: Batch, guidance: Guidance) -> Visited:
    """Samples noised to any time, and what the guided teacher says there.

    Args:
        cast: asked for the teacher.
        batch: B of the stream of images or of pairs.
        guidance: scale, or range of which every sample gets its own.
    """
    assert batch.latents is not None, "the images stream and the pairs stream carry latents"
    teacher, latents = cast.denoiser("teacher"), batch.latents
    scale = sample_guidance(guidance, len(batch), batch.device)
    t = uniform_times(teacher.schedule, len(batch), low=0.0, high=1.0, device=batch.device)
    x_t = add_noise(teacher.schedule, latents, t, torch.randn_like(latents))
    with torch.no_grad():
        native = teacher.guided(x_t, t, batch.condition, batch.null, scale).native
    scales: Tensor = torch.as_tensor(scale, dtype=torch.float64, device=batch.device).expand(len(batch))
    return Visited(x_t, t, scales, native)


def visited_of(batch: Batch) -> Visited:
    """The places of a batch of the states stream."""
    assert batch.visited is not None, "the states stream carries places on the teacher's paths"
    return batch.visited


def even_timesteps(steps: int) -> tuple[int, ...]:
    """Evenly spaced indices of timesteps from the last one down: 4 => 999, 749, 499, 249."""
    return tuple(round(TRAINING_STEPS * (1 - i / steps)) - 1 for i in range(steps))


def check_steps(steps: int) -> None:
    """Raises UserError for a number of steps that cannot be."""
    if not 1 <= steps <= TRAINING_STEPS:
        raise UserError(f"steps is {steps}; it must be from 1 to {TRAINING_STEPS}")
