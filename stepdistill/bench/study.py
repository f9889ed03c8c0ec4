"""What a benchmark needs of a protocol, whichever it is: prompts, metrics, and the record of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stepdistill.bench.metrics.base import Metric, Observer


@dataclass(frozen=True)
class Progress:
    """How far a benchmark has come: `done` of `total` images of the part called `label`."""

    label: str
    done: int
    total: int


@dataclass(frozen=True)
class Study:
    """A protocol made ready to measure.

    Attributes:
        prompts: P texts.
        images_per_prompt: K.
        metrics: what is measured.
        facts: the record: everything that says what the numbers mean. Of it, reports tell in words `feature_network`
            (of FID, KID, precision and recall), `clip_network`, `prefix` of its prompts, and `resize`.
        missing: metric => why it is not measured.
        kept_prompts: of how many prompts images are kept for pictures and distances between images.
        seeds: the protocol's own.
    """

    prompts: tuple[str, ...]
    images_per_prompt: int
    metrics: tuple[Metric, ...]
    facts: Mapping[str, Any]
    missing: Mapping[str, str] = field(default_factory=dict)
    kept_prompts: int = 8
    seeds: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_images(self) -> int:
        """Images of each model."""
        return len(self.prompts) * self.images_per_prompt

    @property
    def observers(self) -> Mapping[str, Observer]:
        """What is taken from every batch, by name."""
        return {name: observer for metric in self.metrics for name, observer in metric.observers.items()}

    @property
    def weights(self) -> dict[str, str]:
        """sha256 of all networks that measure."""
        return {name: sha256 for metric in self.metrics for name, sha256 in metric.weights.items()}
