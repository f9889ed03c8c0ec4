"""What of a recipe's options cannot be had on a tiny teacher, and what stands in its place.

An objective may name parts of the real network, or files that only a user has. Neither exists where a recipe is merely
tried: there its other options are what is tried.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


CLIP = "assets/shapes/clip"  # bundled; as a judge of noise as good as any
NEGATIVES = ("b", "c d")
STEPS = 4  # of a sampler
# what takes long, or comes late in a stage, at most so much
SHORT = {"conditional_steps": 1, "halving_steps": 1, "critic_lead": 1, "critic_warmup": 1, "weight_steps": 2,
         "critic_updates": 2, "discriminator_updates": 2}  # fmt: skip


def small_objective(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry `{name: ..., options}` of a recipe, fit for a tiny teacher and for a handful of iterations.

    Modules are left to the family, weights of other networks are replaced by what is bundled, texts stand for files of
    texts; and what comes later in a stage comes after the first iteration, so that it is tried too.
    """
    small = dict(entry)
    if small.get("layers") not in (None, ["blocks"]):
        small["layers"] = []
    if small.get("distance") == "lpips":
        small |= {"distance": "l2", "lpips": None}
    if isinstance(small.get("negatives"), str):
        small["negatives"] = list(NEGATIVES)
    if "model" in small:
        small["model"] = CLIP
    small |= {key: min(small[key], limit) for key, limit in SHORT.items() if small.get(key)}
    if "parts" in small:
        small["parts"] = [{**part, "objective": small_objective(part["objective"])} for part in small["parts"]]
    if "rewards" in small:
        small["rewards"] = [{**judge, "reward": small_objective(judge["reward"])} for judge in small["rewards"]]
    return small


def small_pairs(settings: Mapping[str, Any]) -> dict[str, Any]:
    """How pairs are made, with few steps where it does not matter which timesteps the sampler visits."""
    if settings.get("states", "all") in ("all", [], ()):
        return {**settings, "steps": min(STEPS, settings.get("steps", STEPS))}
    return dict(settings)
