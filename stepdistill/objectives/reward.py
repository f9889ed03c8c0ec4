"""Reward feedback: the student's images are changed until those who judge them are content.

Xu et al. 2023, "ImageReward", arXiv 2304.05977, whose ReFL this is; with hinges as in the second stage of Ren et al.
2024, "Hyper-SD", arXiv 2404.13686.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.losses import clamped_similarity_loss, value_with_gradient
from stepdistill.objectives.base import Batch, Frozen, InferenceSpec, Loss, Phase, Role, Step, Trained
from stepdistill.objectives.matching import rollout
from stepdistill.options import options_of
from stepdistill.rewards import REWARD, Reward, name_of_reward
from stepdistill.sampling import Sampler


if TYPE_CHECKING:
    from stepdistill.cast import Cast


@dataclass(frozen=True)
class Judge:
    """One reward, and how far the student goes for it.

    Attributes:
        reward: an entry `{name: clip}` with the reward's options; the name may be "package.module:function".
        margin: alpha_d, what an image has to be worth to have no loss; of the reward's own scale.
        weight: of its loss.
        label: what the log calls it; by default the reward's name.
    """

    reward: Annotated[Reward, REWARD]
    margin: float
    weight: float = 1.0
    label: str | None = None

    @cached_property
    def name(self) -> str:
        """What the log and error messages call it."""
        return self.label or name_of_reward(self.reward).rpartition(":")[2]

    def values(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """What each image is worth, (B,).

        Raises:
            UserError: the reward gives something else, or something that no gradient goes through.
        """
        told = self.reward(images, prompts)
        if not isinstance(told, Tensor) or told.shape != (len(images),):
            shape = tuple(told.shape) if isinstance(told, Tensor) else type(told).__name__
            raise UserError(f"reward {self.name!r} must give one number per image, a tensor of shape "
                            f"({len(images)},), not {shape}")  # fmt: skip
        if not told.requires_grad:
            raise UserError(f"reward {self.name!r} must be differentiable with respect to the images; it computes "
                            "without a graph (no_grad, detach, numpy or whole numbers)")  # fmt: skip
        return told


@dataclass(frozen=True)
class RewardFeedback:
    """Raises every reward of the student's images to its margin and no further.

    Attributes:
        rewards: who judges.
        timesteps: where the student is called, as Diffusers indices; one of the steps is drawn, and only its clean
            prediction carries a gradient.
        sampler: how it is sampled between them.
        eta: TCD's gamma, for the sampler tcd.
    """

    rewards: tuple[Annotated[Judge, options_of(Judge)], ...]
    timesteps: tuple[int, ...] = (999,)
    sampler: Sampler = "stochastic"
    eta: float = 0.0

    def __post_init__(self) -> None:
        if not self.rewards:
            raise UserError("rewards must name one at least: rewards: [{reward: {name: clip}, margin: 0.8}]")
        names = [judge.name for judge in self.rewards]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(f"two rewards are called {twice[0]!r}; give them a label each")

    def roles(self) -> Mapping[str, Role]:
        return {"teacher": Frozen(), "student": Trained()}  # the teacher is only watched beside the student

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("student", ("student",), self.student_loss),)

    def after_step(self, cast: Cast, step: int) -> None:
        return None

    def inference(self) -> InferenceSpec:
        return InferenceSpec(self.timesteps, self.sampler, eta=self.eta)

    def student_loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """sum_d weight_d max(0, alpha_d - r_d(image, prompt)); the graph of decoder and judges is freed at once."""
        x0 = rollout(cast.denoiser("student"), batch, self.timesteps, step, self.sampler, self.eta)
        # In float32: in half precision decoders overflow, and this gradient would vanish for want of a loss scale.
        with torch.enable_grad(), torch.autocast(x0.device.type, enabled=False):
            sample = x0.detach().requires_grad_(True)
            images = cast.family.decode_latents(sample).float()
            values = {judge.name: judge.values(images, batch.prompts) for judge in self.rewards}
            losses = [
                judge.weight * clamped_similarity_loss(values[judge.name], judge.margin) for judge in self.rewards
            ]
            loss = torch.stack([value.float() for value in losses]).sum()
            (gradient,) = torch.autograd.grad(loss, sample)
        told = {name: value.detach().mean() for name, value in values.items()}
        return Loss({"reward": value_with_gradient(x0, loss, gradient)}, told)
