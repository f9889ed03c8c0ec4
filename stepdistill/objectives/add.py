"""Adversarial diffusion distillation: heads on an image network's features, and a pull towards the teacher.

Sauer et al. 2023, "Adversarial Diffusion Distillation", arXiv 2311.17042.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from stepdistill.clip_model import ImageTextModel, image_text_model
from stepdistill.discriminator import discriminator_loss, generator_loss
from stepdistill.errors import UserError
from stepdistill.losses import AddWeighting, add_weight, value_with_gradient, weighted_mse
from stepdistill.objectives.base import Batch, Frozen, Head, InferenceSpec, Loss, Phase, Role, Step, Trained
from stepdistill.objectives.checks import check_times
from stepdistill.objectives.inputs import draw_times, few_step_input
from stepdistill.prediction import add_noise
from stepdistill.times import grid, uniform_times
from stepdistill.vision_discriminator import (
    VisionDiscriminator,
    condition_of,
    input_penalty,
    tower_layers,
    vision_discriminator,
)


if TYPE_CHECKING:
    from stepdistill.cast import Cast


@dataclass(frozen=True)
class ADD:
    """The student denoises data in one go; its decoded samples must look real, and stay where the teacher has them.

    Attributes:
        timesteps: where the student is called, as Diffusers indices, drawn evenly; at the first it gets noise alone.
        model: folder of a local `CLIPModel`, whose image tower gives the features; the paper's is DINOv2.
        layers: behind which layers of the tower the heads sit, from 1; empty: up to five, evenly spaced.
        image_condition: whether the heads also know the image that the student's input was made of.
        r1_weight: gamma, of R1 on the heads' inputs (section 3.2: 1e-5).
        distill_weight: lambda, of the distance to the teacher (section 3.1: 2.5).
        distill_in: where that distance is measured: "pixels", through the decoder (section 3.3), or "latents".
        weighting: c(t) of the distance, see `add_weight`.
        guidance: of the teacher (not published).
        t_min: lowest time at which the teacher is asked.
        t_max: highest time.
        discriminator_updates: for each update of the student.
    """

    timesteps: tuple[int, ...] = (999, 749, 499, 249)
    model: str = "assets/shapes/clip"
    layers: tuple[int, ...] = ()
    image_condition: bool = True
    r1_weight: float = 1e-5
    distill_weight: float = 2.5
    distill_in: Literal["pixels", "latents"] = "pixels"
    weighting: AddWeighting = "exponential"
    guidance: float = 1.0
    t_min: float = 0.02
    t_max: float = 0.98
    discriminator_updates: int = 1

    def __post_init__(self) -> None:
        check_times(self.t_min, self.t_max)
        if self.discriminator_updates < 1 or self.r1_weight < 0 or self.distill_weight < 0:
            raise UserError("discriminator_updates must be at least 1, r1_weight and distill_weight at least 0")

    def roles(self) -> Mapping[str, Role]:
        conditions = 2 if self.image_condition else 1
        build = partial(vision_discriminator, model=self.model, layers=self.layers, conditions=conditions)
        return {"teacher": Frozen(), "student": Trained(), "discriminator": Head(build)}

    def phases(self, step: int) -> Sequence[Phase]:
        return (
            Phase("discriminator", ("discriminator",), self.discriminator_loss, stream="images",
                  repeats=self.discriminator_updates),
            Phase("student", ("student",), self.student_loss, stream="images"),
        )  # fmt: skip

    def after_step(self, cast: Cast, step: int) -> None:
        return None

    def inference(self) -> InferenceSpec:
        return InferenceSpec(self.timesteps)

    def discriminator_loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """Eq. 3: the hinge loss of all heads, and R1 on what goes into them for real images."""
        with torch.no_grad():
            x0, shown = self.samples(cast, batch)
        network, heads = self._judges(cast, batch)
        with torch.autocast(batch.device.type, enabled=False):
            with torch.no_grad():
                real, fake = (cast.family.decode_latents(x).float() for x in (_latents(batch), x0))
                condition = condition_of(network, batch.prompts, real if self.image_condition else None, shown)
                real_tokens, fake_tokens = (self._tokens(network, images) for images in (real, fake))
            for tokens in real_tokens:
                tokens.requires_grad_(self.r1_weight > 0)
            logits = heads(real_tokens, condition)
            # The equation sums over the heads; a game's loss is a mean.
            game = len(real_tokens) * discriminator_loss(logits, heads(fake_tokens, condition), "hinge")
            terms = {"discriminator": game}
            if self.r1_weight > 0:
                terms["r1"] = self.r1_weight * input_penalty(logits, real_tokens)
        return Loss(terms)

    def student_loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """Eq. 1: L_adv (eq. 2) + lambda L_distill (eq. 4); the graph through decoder and heads is freed at once."""
        x0, shown = self.samples(cast, batch)
        network, heads = self._judges(cast, batch)
        target, weight = self.teachers_view(cast, x0.detach(), batch)
        # In float32: in half precision decoders overflow, and this gradient would vanish for want of a loss scale.
        with torch.enable_grad(), torch.autocast(x0.device.type, enabled=False):
            sample = x0.detach().requires_grad_(True)
            decode = cast.family.decode_latents
            images = decode(sample).float()
            with torch.no_grad():
                begun = decode(_latents(batch)).float() if self.image_condition else None
                wanted = target if self.distill_in == "latents" else decode(target).float()
            tokens = self._tokens(network, images)
            logits = heads(tokens, condition_of(network, batch.prompts, begun, shown))
            adversarial = len(tokens) * generator_loss(logits, "hinge")
            distance = weighted_mse(sample if self.distill_in == "latents" else images, wanted, weight)
            loss = adversarial + self.distill_weight * distance
            (gradient,) = torch.autograd.grad(loss, sample)
        told = {"adversarial": adversarial.detach(), "distillation": distance.detach()}
        return Loss({"add": value_with_gradient(x0, loss, gradient)}, told)

    def samples(self, cast: Cast, batch: Batch) -> tuple[Tensor, Tensor]:
        """(The student's clean predictions, (B, C, H, W); whether it was shown the data or noise alone, (B,) bool)."""
        student = cast.denoiser("student")
        times = grid(student.schedule, self.timesteps, batch.device)
        t = draw_times(times, len(batch))
        x_t = few_step_input(student.schedule, _latents(batch), t, times[0])
        return student(x_t, t, batch.condition).x0, t < times[0]

    @torch.no_grad()
    def teachers_view(self, cast: Cast, x0: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(The teacher's clean prediction of noised samples, (B, C, H, W); its weight c(t), (B,)), section 3.3."""
        teacher = cast.denoiser("teacher")
        t = uniform_times(teacher.schedule, len(x0), low=self.t_min, high=self.t_max, device=x0.device)
        x_t = add_noise(teacher.schedule, x0, t, torch.randn_like(x0))
        said = teacher.guided(x_t, t, batch.condition, batch.null, self.guidance)
        return said.x0, add_weight(said.levels, self.weighting)

    def _judges(self, cast: Cast, batch: Batch) -> tuple[ImageTextModel, VisionDiscriminator]:
        heads = cast.head("discriminator").module
        assert isinstance(heads, VisionDiscriminator), "the head that this objective's roles ask for"
        return image_text_model(self.model, batch.device), heads

    def _tokens(self, network: ImageTextModel, images: Tensor) -> list[Tensor]:
        return network.image_tokens(images, tower_layers(self.model, self.layers))


def _latents(batch: Batch) -> Tensor:
    assert batch.latents is not None, "the images stream carries latents"
    return batch.latents
