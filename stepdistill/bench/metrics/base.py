"""The one interface of all metrics: what is taken from each batch of images, and figures of all of it at the end.

Letters: N images, P prompts, K images of each, N = P K; B images of a batch; D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from stepdistill.bench.intervals import Estimate, Resamples


# Images (B, 3, H, W) in [0, 1] and their B prompts => one row of numbers for each image, (B, ...).
Observer = Callable[[Tensor, Sequence[str]], Tensor]


@dataclass(frozen=True)
class Seen:
    """What was taken from one model's images, prompt by prompt.

    Attributes:
        prompts: P texts.
        images_per_prompt: K.
        values: observer's name => (N, ...).
        images: of the first prompts, (n, 3, H, W) bytes; n may be 0.
        baseline: the same of the first model at its most steps, which others are compared with; None for itself.
    """

    prompts: Sequence[str]
    images_per_prompt: int
    values: Mapping[str, Tensor]
    images: Tensor
    baseline: Seen | None = None


class Metric(Protocol):
    """One or several columns of a report.

    Attributes:
        observers: by name; metrics that name the same one share its work.
        weights: name => sha256 of what it reads from disk, for the record.
    """

    @property
    def observers(self) -> Mapping[str, Observer]: ...

    @property
    def weights(self) -> Mapping[str, str]: ...

    def figures(self, seen: Seen, resamples: Resamples) -> Mapping[str, Estimate]:
        """Columns => figures; None as a value where one does not apply."""


class MissingError(Exception):
    """A metric cannot be measured here; the text says what it wanted, and where."""
