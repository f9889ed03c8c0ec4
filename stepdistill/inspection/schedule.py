"""What a scheduler's configuration makes of a plain call: which timesteps, and what is wrong with them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


COUNTS = (1, 2, 4, 8)
DEAF_TO_SPACING = ("LCMScheduler", "TCDScheduler")  # they have the option and do not read it
NOISY = 0.9  # share of the table below which the first timestep is no longer close to pure noise


@dataclass(frozen=True)
class Schedule:
    """A scheduler, called plainly.

    Attributes:
        kind: class in Diffusers.
        prediction: what it takes the network's output for.
        spacing: how it spreads timesteps, in words.
        visited: number of steps => timesteps; without those that it refuses.
        total: length of the training schedule.
    """

    kind: str
    prediction: str
    spacing: str
    visited: Mapping[int, tuple[float, ...]]
    total: int

    @property
    def first(self) -> float | None:
        """The timestep that a call begins with, for the smallest number of steps that works."""
        return next((timesteps[0] for timesteps in self.visited.values() if timesteps), None)

    def doubts(self) -> list[str]:
        """What a user of the model should know before the first call."""
        found = []
        if self.first is not None and self.first < NOISY * self.total:
            steps = "1 step" if 1 in self.visited else f"{next(iter(self.visited))} steps"
            found.append(
                f"A call with {steps} begins at t = {self.first:g} of {self.total}, and a network that was trained "
                "from pure noise makes nothing of it; timestep_spacing='trailing' begins at the end of the table."
            )
        if self.kind in DEAF_TO_SPACING:
            found.append(f"{self.kind} ignores timestep_spacing; original_inference_steps decides.")
        return found


def read_schedule(config: Mapping[str, Any], counts: tuple[int, ...] = COUNTS) -> Schedule | None:
    """What a scheduler_config.json does; None if its class is none of Diffusers' own.

    Args:
        config: with its `_class_name`.
        counts: numbers of steps to try.
    """
    import diffusers

    name = str(config.get("_class_name", ""))
    try:
        scheduler: Any = getattr(diffusers, name).from_config(dict(config))
    except AttributeError:
        return None
    flow = name.startswith("FlowMatch")
    kept = scheduler.config
    spacing = "shifted by " + f"{kept.get('shift', 1):g}" if flow else str(kept.get("timestep_spacing", "its own"))
    prediction = "flow (velocity)" if flow else str(kept.get("prediction_type", "its own"))
    visited = {count: timesteps for count in counts if (timesteps := _visited(scheduler, count))}
    return Schedule(name, prediction, spacing, visited, int(kept.get("num_train_timesteps", 1000)))


def _visited(scheduler: Any, count: int) -> tuple[float, ...]:
    """The timesteps of a plain call; empty if the scheduler refuses, as some do without a size or with many steps."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler.set_timesteps(count)
    except (ValueError, TypeError):
        return ()
    return tuple(round(float(t), 1) for t in scheduler.timesteps)
