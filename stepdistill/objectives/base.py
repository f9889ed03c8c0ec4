"""The rules of a distillation game: which roles there are, whose turn it is, and what each turn's loss is.

An objective holds hyper-parameters only. It sees denoisers and data; optimisers, devices and files belong to the
trainer. Subclassing is not needed: whatever has these four methods is an objective.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from stepdistill.condition import Condition
from stepdistill.errors import UserError
from stepdistill.guidance.modules import AdapterSettings
from stepdistill.network_shape import NetworkShape
from stepdistill.sampling import Sampler


if TYPE_CHECKING:
    from stepdistill.cast import Cast
    from stepdistill.schedule import NoiseSchedule


@dataclass(frozen=True)
class Frozen:
    """A role that is never trained; it shares the teacher's network."""


@dataclass(frozen=True)
class Trained:
    """A role that is trained; the recipe decides whether as a full copy of the teacher or as adapters on it.

    Attributes:
        embeds_guidance: whether its network takes a guidance scale as an input, the tensor "guidance" (B,) of its
            condition (`Condition.with_guidance`). Only a full copy can: the teacher has no such layer.
        shape: what its network lacks of the teacher's, as a recipe says of the student; None: nothing.
        adapter: modules beside the teacher's attention that are trained instead of any weights of the network; they
            are told the tensor "guidance" too. None: the network itself is trained.
    """

    embeds_guidance: bool = False
    shape: NetworkShape | None = None
    adapter: AdapterSettings | None = None


FeatureShape = tuple[int, ...]  # of one sample's feature: (C, H, W) of a UNet's block, (N, C) of a transformer's


@dataclass(frozen=True)
class Head:
    """A small trained module on a denoiser's features, such as a discriminator's; its buffers are kept with it.

    Attributes:
        build: shapes of the features that it will get => the module, freshly initialised.
        layers: which modules of the network give the features; empty: the family's own choice, one; "blocks" alone:
            its choice at several depths.
    """

    build: Callable[[Sequence[FeatureShape]], nn.Module]
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recorded:
    """A role that no optimiser touches: weights of the same kind as another role's, which it starts with.

    Afterwards `Cast.copy`, `Cast.blend` and `Cast.fetch` write them.

    Attributes:
        like: the trained role whose weights it can hold.
    """

    like: str


Role = Frozen | Trained | Head | Recorded


@dataclass(frozen=True)
class Visited:
    """Places on stored paths of the guided teacher, and what it said there.

    Attributes:
        x_t: what the network was given, (B, C, H, W).
        t: times, (B,), float64.
        guidance: the scale of each path, (B,), float64.
        native: the guided network's output, (B, C, H, W).
    """

    x_t: Tensor
    t: Tensor
    guidance: Tensor
    native: Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        condition: encoded prompts, B rows.
        null: the unconditional condition, B rows.
        latent_shape: (C, H, W).
        latents: encoded images of the same captions, (B, C, H, W), where the phase asked for the images stream; the
            teacher's finished samples, where it asked for the pairs stream.
        prompts: the B prompts as text, for losses that look at the image.
        pair_noise: the noise that the teacher's sampler made `latents` from, (B, C, H, W), in the pairs stream.
        samples: what the student made of this batch and of which condition, and how it was steered, where several
            losses look at the same sample; None: each loss makes its own.
        visited: B places on the teacher's paths, in the states stream.
    """

    condition: Condition
    null: Condition
    latent_shape: tuple[int, int, int]
    device: torch.device
    latents: Tensor | None = None
    prompts: tuple[str, ...] = ()
    pair_noise: Tensor | None = None
    samples: dict[Hashable, Any] | None = None
    visited: Visited | None = None

    def __len__(self) -> int:
        return len(self.condition)

    def noise(self) -> Tensor:
        """Fresh unit-variance noise, (B, C, H, W)."""
        return torch.randn(len(self), *self.latent_shape, device=self.device)


@dataclass(frozen=True)
class Step:
    """Where a run stands.

    Attributes:
        index: the iteration, from 0, within its stage.
        seed: of the run.
        turn: counts the micro-batches within the iteration, so that each draws its own numbers.
    """

    index: int
    seed: int = 0
    turn: int = 0

    def shared(self, name: str) -> random.Random:
        """A generator that is the same on every process; torch's own differs per rank."""
        return random.Random(f"{self.seed}/{self.index}/{self.turn}/{name}")


@dataclass(frozen=True)
class Loss:
    """Named terms whose sum is minimised, and values that are only logged."""

    terms: Mapping[str, Tensor]
    logged: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> Tensor:
        """The scalar to differentiate."""
        return torch.stack(list(self.terms.values())).sum()


@dataclass(frozen=True)
class Phase:
    """One optimiser turn: who is updated, on which data, by which loss, how many times in a row.

    Attributes:
        name: for logs.
        updates: the roles that are trainable while it runs; nobody else is.
        loss: one micro-batch => Loss.
        stream: "prompts", "images" where the loss needs encoded images, "pairs" where it needs stored pairs of noise
            and teacher sample, or "states" where it needs what the teacher said on the way.
        repeats: optimiser steps in a row, each on a fresh batch (two time scales: critic 5, student 1).
    """

    name: str
    updates: tuple[str, ...]
    loss: Callable[[Cast, Batch, Step], Loss]
    stream: str = "prompts"
    repeats: int = 1


@dataclass(frozen=True)
class InferenceSpec:
    """How the finished student is to be called.

    Attributes:
        timesteps: where the student is called, as indices of training timesteps, falling, e.g. (999,) or
            (999, 749, 499, 249). Index i of n lies at t = (i + 1) / n, for flow-matching teachers too: 999 of 1000 is
            pure noise for all of them.
        sampler: "stochastic" (begins with unit noise; clean prediction, then fresh noise: Diffusers' LCMScheduler),
            "deterministic" (begins with sigma times the noise; goes on with the predicted noise: Euler), "tcd"
            (begins with unit noise; goes on with both: TCDScheduler) or "own" (the teacher's own scheduler, with as
            many steps as one likes; training looks at it through DDIM steps at `timesteps`).
        guidance_scale: what the user passes; 1 means no guidance, hence one network call a step.
        eta: share of fresh noise between steps, 0 to 1, of the sampler "tcd" alone; the user passes it too.
        embeds_guidance: whether the scale is an input of the network: one call a step at any scale.
        adapter: what the student is where it is an adapter beside the teacher's network; None: a network.
    """

    timesteps: tuple[int, ...]
    sampler: Sampler | Literal["own"] = "stochastic"
    guidance_scale: float = 1.0
    eta: float = 0.0
    embeds_guidance: bool = False
    adapter: AdapterSettings | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1 or (self.eta and self.sampler != "tcd"):
            raise UserError(f"eta is a number from 0 to 1 for the sampler tcd and 0 for others, got {self.eta:g} with "
                            f"{self.sampler}")  # fmt: skip

    @property
    def num_steps(self) -> int:
        """How many times the network is called."""
        return len(self.timesteps)

    def told(self, condition: Condition) -> Condition:
        """What the student is called with: the condition, and the guidance scale where it is an input."""
        return condition.with_guidance(self.guidance_scale) if self.embeds_guidance else condition


class NeedsSchedule:
    """What an objective inherits whose options go with some teachers' schedules only; a run asks before it begins."""

    def check_schedule(self, schedule: NoiseSchedule) -> None:
        """Raises UserError if the options do not go with the teacher's schedule."""
        raise NotImplementedError


class GuidesCritic:
    """What an objective inherits whose critic learns what the student makes at a guidance scale of its own."""

    @property
    def critic_scale(self) -> float:
        """At which the critic denoises the student's samples: 1 with the prompt alone, 0 without any."""
        raise NotImplementedError


def critic_scale_of(objective: Objective) -> float:
    """The guidance scale at which an objective's critic knows the student; 1 unless it says otherwise."""
    return objective.critic_scale if isinstance(objective, GuidesCritic) else 1.0


class Objective(Protocol):
    """The rules of one distillation game. A dataclass' fields are its options in a recipe."""

    def roles(self) -> Mapping[str, Role]:
        """Who takes part; "teacher" and "student" are names that the rest of the toolkit knows.

        A trained role "critic" is taken for a denoiser of what the student makes, by what watches a run.
        """

    def phases(self, step: int) -> Sequence[Phase]:
        """The turns of iteration `step`, a function of the step alone: curricula, segments, warm-ups."""

    def after_step(self, cast: Cast, step: int) -> None:
        """Between iterations: swap teachers, record way-points. Usually empty."""

    def inference(self) -> InferenceSpec | None:
        """How to call the student; None if it is a many-step model that keeps the teacher's scheduler."""
