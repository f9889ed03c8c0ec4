"""The rules of a distillation game: which roles there are, whose turn it is, and what each turn's loss is.

An objective holds hyper-parameters only. It sees denoisers and data; optimisers, devices and files belong to the
trainer. Subclassing is not needed: whatever has these four methods is an objective.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from stepdistill.condition import Condition


if TYPE_CHECKING:
    from stepdistill.cast import Cast


@dataclass(frozen=True)
class Frozen:
    """A role that is never trained; it shares the teacher's network."""


@dataclass(frozen=True)
class Trained:
    """A role that is trained; the recipe decides whether as a full copy of the teacher or as adapters on it."""


Role = Frozen | Trained


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        condition: encoded prompts, B rows.
        null: the unconditional condition, B rows.
        latent_shape: (C, H, W).
        latents: encoded images of the same captions, (B, C, H, W), where the phase asked for the images stream.
    """

    condition: Condition
    null: Condition
    latent_shape: tuple[int, int, int]
    device: torch.device
    latents: Tensor | None = None

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
        stream: "prompts", or "images" where the loss needs encoded images.
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
        timesteps: the Diffusers indices that the student is told, falling, e.g. (999,) or (999, 749, 499, 249).
        sampler: "stochastic" (clean prediction, then fresh noise: Diffusers' LCMScheduler) or "deterministic" (Euler).
        guidance_scale: what the user passes; 1 means no guidance, hence one network call a step.
    """

    timesteps: tuple[int, ...]
    sampler: str = "stochastic"
    guidance_scale: float = 1.0

    @property
    def num_steps(self) -> int:
        """How many times the network is called."""
        return len(self.timesteps)


class Objective(Protocol):
    """The rules of one distillation game. A dataclass' fields are its options in a recipe."""

    def roles(self) -> Mapping[str, Role]:
        """Who takes part; "teacher" and "student" are names that the rest of the toolkit knows."""

    def phases(self, step: int) -> Sequence[Phase]:
        """The turns of iteration `step`, a function of the step alone: curricula, segments, warm-ups."""

    def after_step(self, cast: Cast, step: int) -> None:
        """Between iterations: swap teachers, record way-points. Usually empty."""

    def inference(self) -> InferenceSpec | None:
        """How to call the student; None if it is a many-step model that keeps the teacher's scheduler."""
