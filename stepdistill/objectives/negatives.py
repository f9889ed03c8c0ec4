"""Training with negative prompts: NASA-T, Nguyen et al. 2024 (SNOOPI), arXiv 2412.02687, sections 4.2 and 5."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from stepdistill.attention import NASA, steered
from stepdistill.condition import Condition
from stepdistill.data.prompts import load_prompts
from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.objectives.base import Batch, Step
from stepdistill.objectives.matching import Guidance


if TYPE_CHECKING:
    from stepdistill.cast import Cast

Pool = str | tuple[str, ...]  # a file that `load_prompts` reads, or the texts themselves


class Steered(NamedTuple):
    """The student as it is called in one turn, and what the teacher's guidance points away from in the same turn."""

    student: Denoiser
    null: Condition


def steered_student(cast: Cast, batch: Batch, step: Step, pool: Pool, alpha: Guidance) -> Steered:
    """A negative prompt for each row, and one strength for all of them; without a pool, everything as it is.

    Losses that share the batch's samples get the same steered student, and hence one sample of it.

    Args:
        cast: with the role "student", and encoding texts.
        batch: as many negatives are drawn as it has rows.
        step: the strength is the same on every process.
        pool: where negatives come from.
        alpha: NASA's strength, or a range to draw it from (NASA-T: U(0, 1)).

    Raises:
        UserError: the student's network is not conditioned on text, or its attention cannot be steered by NASA.
    """
    if not pool:
        return Steered(cast.denoiser("student"), batch.null)
    if batch.samples is None:
        return _steered(cast, batch, step, pool, alpha)
    key = "steered", step, pool, alpha, len(batch)
    if key not in batch.samples:
        batch.samples[key] = _steered(cast, batch, step, pool, alpha)
    shared: Steered = batch.samples[key]
    return shared


def _steered(cast: Cast, batch: Batch, step: Step, pool: Pool, alpha: Guidance) -> Steered:
    if "class_labels" in batch.condition.tensors:
        raise UserError("negatives: this teacher is conditioned on classes, and on no text that a student could be "
                        "steered away from; set negatives: []")  # fmt: skip
    texts = read_pool(pool) if isinstance(pool, str) else pool
    # By torch, whose draws processes that share a micro-batch divide by rows: each row has the negative that it has in
    # a run of one process. The strength is one for all of them.
    rows = torch.randint(len(texts), (len(batch),)).tolist()
    negative = cast.encode([texts[row] for row in rows])
    strength = step.shared("negatives").uniform(*alpha) if isinstance(alpha, tuple) else alpha
    try:
        return Steered(steered(cast.denoiser("student"), NASA(strength), negative), negative)
    except UserError as error:
        raise UserError(f"negatives: a student is trained with NASA, which does not go with its network ({error}); "
                        "set negatives: [], and steer the finished student with --nag") from error  # fmt: skip


@lru_cache(maxsize=1)
def read_pool(file: str) -> tuple[str, ...]:
    """The texts of a pool's file, read once."""
    return load_prompts(file).prompts
