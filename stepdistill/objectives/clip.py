"""A clamped CLIP loss on the student's decoded images: SwiftBrush v2's help against images that miss their prompts.

Dao et al. 2024, "SwiftBrush v2: Make Your One-step Diffusion Model Better Than Its Teacher", arXiv 2408.14176.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from stepdistill.clip_model import image_text_model
from stepdistill.errors import UserError
from stepdistill.losses import clamped_similarity_loss, value_with_gradient
from stepdistill.objectives.base import Batch, InferenceSpec, Loss, Phase, Role, Step, Trained
from stepdistill.objectives.matching import Guidance, rollout
from stepdistill.objectives.negatives import Pool, steered_student
from stepdistill.sampling import Sampler


if TYPE_CHECKING:
    from stepdistill.cast import Cast


@dataclass(frozen=True)
class Clip:
    """Raises the CLIP similarity of image and prompt to a threshold and no further; made to be a part of a sum.

    Attributes:
        model: folder of a local `CLIPModel`; the paper's is ViT-B/32.
        threshold: tau, the cosine from which on an image has no loss (section 4: 0.35 for ViT-B/32; other models have
            other scales).
        weight: of the loss at first (0.1).
        weight_steps: iterations in which the weight falls in a line from `weight` to 0; null keeps it. The paper's is
            the length of the training.
        clamp_per_sample: clamp every sample's similarity; false clamps the batch's mean, as a re-implementation does.
        normalize: give CLIP pixels as it was trained with; false: in [0, 1], as that re-implementation.
        timesteps: where the student is called, the same as in the other parts.
        sampler: how it is sampled between them.
        negatives: negative prompts that the student is steered away from while it is judged, the same as in the other
            parts; with the same, all of them look at one sample. Empty: none.
        nasa: strength of the negatives in the student, or a range to draw it from, the same as in the other parts.
    """

    model: str = "assets/shapes/clip"
    threshold: float = 0.35
    weight: float = 0.1
    weight_steps: int | None = None
    clamp_per_sample: bool = True
    normalize: bool = True
    timesteps: tuple[int, ...] = (999,)
    sampler: Sampler = "stochastic"
    negatives: Pool = ()
    nasa: Guidance = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.weight_steps is not None and self.weight_steps < 2:
            raise UserError("weight_steps must be at least 2: the first has all of the weight, the last none")

    def weight_at(self, step: int) -> float:
        """Of an iteration: all in the first, 0 in the last of `weight_steps` and after it."""
        if self.weight_steps is None:
            return self.weight
        return self.weight * max(0.0, 1 - step / (self.weight_steps - 1))

    def roles(self) -> Mapping[str, Role]:
        return {"student": Trained()}

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("student", ("student",), self.student_loss),) if self.weight_at(step) else ()

    def after_step(self, cast: Cast, step: int) -> None:
        return None

    def inference(self) -> InferenceSpec:
        return InferenceSpec(self.timesteps, self.sampler)

    def student_loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """max(0, tau - cos(image, prompt)), section 4; the graph through decoder and CLIP is freed at once."""
        student, _ = steered_student(cast, batch, step, self.negatives, self.nasa)
        x0 = rollout(student, batch, self.timesteps, step, self.sampler)
        clip = image_text_model(self.model, x0.device)
        # In float32: in half precision decoders overflow, and this gradient would vanish for want of a loss scale.
        with torch.enable_grad(), torch.autocast(x0.device.type, enabled=False):
            sample = x0.detach().requires_grad_(True)
            cosines = clip.cosines(cast.family.decode_latents(sample), batch.prompts, normalize=self.normalize)
            loss = clamped_similarity_loss(cosines, self.threshold, per_sample=self.clamp_per_sample)
            (gradient,) = torch.autograd.grad(loss, sample)
        weighted = self.weight_at(step.index) * value_with_gradient(x0, loss, gradient)
        return Loss({"similarity": weighted}, {"cosine": cosines.detach().mean()})
