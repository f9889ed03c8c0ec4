"""Seeds that are a function of what they are for, the same on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_of(*parts: object) -> int:
    """A seed for torch's generators, in [0, 2^63), from the text of the parts: run's seed, rank, step, role ..."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch draws from this seed; outside, as if nothing had been drawn: looking must not change training."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
