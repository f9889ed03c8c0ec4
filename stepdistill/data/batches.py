"""Micro-batches by stream, in an order that is a function of the seed and of how many were drawn before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from stepdistill.condition import Condition
from stepdistill.data.cache import Conditions
from stepdistill.data.latents import Latents
from stepdistill.data.pairs import REMEDY, PairStream
from stepdistill.data.prompts import PromptSet, epoch_indices
from stepdistill.errors import UserError
from stepdistill.families.base import ModelFamily
from stepdistill.objectives.base import Batch, Visited


@dataclass
class Batches:
    """Draws micro-batches; its whole state is one counter per stream.

    Attributes:
        family: encodes what is not cached.
        prompts: the captions of the prompts stream.
        conditions: their encodings.
        latents: the images stream, or None where the recipe has no images.
        seed: of the run.
        rank: number of this process; processes draw disjoint samples.
        num_processes: how many there are.
        size: pixel size of the images, None for the teacher's own.
        drawn: micro-batches drawn so far by all processes together, by stream.
        encode: captions of images => condition; None: the family's own encoder.
        pairs: the pairs stream, or None where the recipe has no pairs.
    """

    family: ModelFamily
    prompts: PromptSet
    conditions: Conditions
    latents: Latents | None
    seed: int
    rank: int = 0
    num_processes: int = 1
    size: int | None = None
    drawn: dict[str, int] = field(default_factory=dict)
    encode: Callable[[Sequence[str]], Condition] | None = None
    pairs: PairStream | None = None
    _null: Condition | None = field(default=None, init=False)

    def next(self, stream: str, count: int, groups: int = 1) -> Batch:
        """The next micro-batch of `count` samples of "prompts", "images", "pairs" or "states".

        Args:
            stream: which.
            count: samples of this process.
            groups: how many micro-batches all processes draw at the same time; those of a group draw slices of one.
        """
        number = self.drawn.get(stream, 0)
        self.drawn[stream] = number + groups
        parts = self.num_processes // groups
        start = (number * parts + self.rank) * count
        if stream == "images":
            return self._images(start, count, parts)
        if stream == "pairs":
            return self._pairs(start, count)
        if stream == "states":
            return self._states(start, count)
        indices = epoch_indices(self.seed, start, count, len(self.prompts))
        texts = tuple(self.prompts.prompts[i] for i in indices)
        return self._batch(self.conditions.conditions(indices), None, texts)

    def restore(self, drawn: Mapping[str, int]) -> None:
        """Goes on after a checkpoint."""
        self.drawn = dict(drawn)

    def _images(self, start: int, count: int, parts: int) -> Batch:
        if self.latents is None:
            raise UserError('this objective learns from images: set data.images to "shapes" or to a folder')
        found = self.latents.batch(self.seed, start, count, parts=parts)
        encode = self.encode or self.family.encode_prompts
        batch = self._batch(encode(found.captions), found.latents.float(), tuple(found.captions))
        if found.framings is None:
            return batch
        condition, null = (self.family.framed(c, found.framings) for c in (batch.condition, batch.null))
        shape = (found.latents.shape[1], found.latents.shape[2], found.latents.shape[3])
        return replace(batch, condition=condition, null=null, latent_shape=shape)

    def _states(self, start: int, count: int) -> Batch:
        found, condition = self._stored().draw_states(self.seed, start, count)
        device, schedule = self.family.device, self.family.schedule
        x_t, native, guidance = (z.to(device) for z in (found.states, found.predictions, found.guidance))
        visited = Visited(x_t, schedule.t_from_model_time(found.timesteps.to(device)), guidance, native)
        return replace(self._batch(condition, None, found.prompts), visited=visited)

    def _stored(self) -> PairStream:
        if self.pairs is None:
            raise UserError(f"this objective learns from stored pairs: set data.pairs to their folder; {REMEDY}")
        return self.pairs

    def _pairs(self, start: int, count: int) -> Batch:
        found, condition = self._stored().draw(self.seed, start, count)
        latents, noise = (tensor.to(self.family.device) for tensor in (found.latents, found.noise))
        return self._batch(condition, latents, found.prompts, noise)

    def _batch(
        self, condition: Condition, latents: Tensor | None, prompts: tuple[str, ...], noise: Tensor | None = None
    ) -> Batch:
        device = self.family.device
        shape = self.family.latent_shape(self.size)
        if self._null is None:  # the same for every batch: the text encoder need not work for it again
            self._null = self.family.null_condition(1).to(device)
        null = self._null[torch.zeros(len(condition), dtype=torch.long, device=device)]
        return Batch(condition.to(device), null, shape, device, latents, prompts, noise)
