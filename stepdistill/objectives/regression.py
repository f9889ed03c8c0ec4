"""Regression on stored pairs: the student learns which image the teacher's sampler makes of which noise.

Luhman and Luhman 2021 (arXiv 2101.02388); the regression loss of DMD (arXiv 2311.18828, section 3.3); the warm-up of
DMD2's one-step SDXL (arXiv 2405.14867, appendix; there called ODE pretraining).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from stepdistill.condition import Condition
from stepdistill.errors import UserError
from stepdistill.losses import taken_early, weighted_mse
from stepdistill.lpips import load_lpips
from stepdistill.objectives.base import Batch, Frozen, InferenceSpec, Loss, Phase, Role, Step, Trained
from stepdistill.times import grid


if TYPE_CHECKING:
    from stepdistill.cast import Cast


@dataclass(frozen=True)
class Regression:
    """The student's sample from a stored noise is pulled to the sample that the teacher made of it.

    Attributes:
        timestep: what the student is told together with pure noise, and whose noise level turns its output into an
            image. DMD2's one-step SDXL takes 399 instead of the last one.
        distance: l2 (mean square) or huber on latents, or lpips on decoded images (DMD, DMD2).
        huber_delta: where the Huber distance turns from square to linear, in units of latents.
        lpips: safetensors file with VGG16's weights, for the distance lpips.
    """

    timestep: int = 999
    distance: Literal["l2", "huber", "lpips"] = "l2"
    huber_delta: float = 1.0
    lpips: str | None = None

    def __post_init__(self) -> None:
        if self.distance == "lpips" and self.lpips is None:
            raise UserError("distance lpips needs VGG16's weights, which are not bundled: set lpips to a safetensors "
                            "file of them (docs/objectives/regression.md says how to make it)")  # fmt: skip

    def roles(self) -> Mapping[str, Role]:
        return {"teacher": Frozen(), "student": Trained()}  # the teacher is only watched beside the student

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("student", ("student",), self.loss, stream="pairs"),)

    def after_step(self, cast: Cast, step: int) -> None:
        return None

    def inference(self) -> InferenceSpec:
        return InferenceSpec((self.timestep,))

    def loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """Distance between G(z) and y, over the pairs (z, y)."""
        noise, target = pairs_of(batch)
        x0 = self.sample(cast, noise, batch.condition)
        return Loss({"regression": self.error(cast, x0, target)})

    def sample(self, cast: Cast, noise: Tensor, condition: Condition) -> Tensor:
        """The student's one-step samples from unit-variance noise, (B, C, H, W)."""
        student = cast.denoiser("student")
        (t,) = grid(student.schedule, (self.timestep,), noise.device)
        return student(noise, t.expand(len(noise)), condition).x0

    def error(self, cast: Cast, x0: Tensor, target: Tensor) -> Tensor:
        """The distance of samples from their targets, both (B, C, H, W), as a scalar."""
        if self.distance == "lpips":
            return self._perceptual(cast, x0, target)
        if self.distance == "huber":
            return huber_loss(x0, target, delta=self.huber_delta)
        return weighted_mse(x0, target)

    def _perceptual(self, cast: Cast, x0: Tensor, target: Tensor) -> Tensor:
        """LPIPS of the decoded images; the decoder's and VGG16's graphs are freed before the student's backward."""
        assert self.lpips is not None, "checked when the objective was made"
        decode, network = cast.family.decode_latents, load_lpips(self.lpips, x0.device)
        # In float32: in half precision decoders overflow.
        with torch.autocast(x0.device.type, enabled=False):
            with torch.no_grad():
                wanted = decode(target).float()
            return taken_early(x0.float(), lambda x: network(decode(x).float(), wanted).mean())


def pairs_of(batch: Batch) -> tuple[Tensor, Tensor]:
    """(noise, the teacher's sample of it) of a batch of the pairs stream, each (B, C, H, W)."""
    assert batch.pair_noise is not None and batch.latents is not None, "the pairs stream carries noise and latents"
    return batch.pair_noise, batch.latents
