"""Every objective on a class-conditional transformer: nothing in a method may need text, or a UNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stepdistill.data.cache import EncodedOnTheFly
from stepdistill.data.latents import LatentBatch
from stepdistill.data.pair_maker import PairSettings, make_pairs
from stepdistill.data.pairs import PairStream, load_pairs
from stepdistill.data.prompts import PromptSet
from stepdistill.families import load_family
from stepdistill.families.base import ModelFamily
from stepdistill.objectives import OBJECTIVES
from stepdistill.options import build_named
from tests.tiny import trainer_of


CLASSES = ("3", "7", "11", "999")
# What has no defaults, or one that this architecture has no input for.
OPTIONS: dict[str, dict[str, Any]] = {
    "disback": {"base": {"name": "dmd2"}, "nodes": 1, "node_steps": 1},
    "lcm": {"embed_guidance": False},
    "reward": {"rewards": [{"reward": {"name": "clip"}, "margin": 0.9}]},
    "sid": {"timesteps": [999], "sampler": "stochastic"},
    "sum": {"parts": [{"objective": {"name": "vsd"}}, {"objective": {"name": "clip"}, "weight": 0.5}]},
}


class Pictures:
    """An images stream without images, of classes."""

    def batch(self, seed: int, start: int, count: int, parts: int = 1) -> LatentBatch:
        generator = torch.Generator().manual_seed(1000 * seed + start)
        classes = [CLASSES[number % len(CLASSES)] for number in range(start, start + count)]
        return LatentBatch(torch.randn(count, 4, 8, 8, generator=generator), classes)


@pytest.fixture(scope="module")
def pairs(dit_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of the tiny DiT with every state on the way."""
    folder = tmp_path_factory.mktemp("pairs")
    settings = PairSettings(steps=2, guidance=(1.0, 4.0), states="all", predictions=True)
    make_pairs(load_family(dit_folder), PromptSet(CLASSES), folder, settings)
    return folder


def copied(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_objective_takes_a_step_on_a_class_conditional_transformer(
    name: str, dit: ModelFamily, pairs: Path
) -> None:
    objective = build_named(name, OPTIONS.get(name, {}), "test")
    teacher = copied(dit.network())
    trainer = trainer_of(dit, objective, texts=CLASSES, player={"options": {"lr": 1e-3, "weight_decay": 0.0}})
    stored = load_pairs(pairs, dit)
    trainer.batches.latents = Pictures()
    trainer.batches.pairs = PairStream(stored, EncodedOnTheFly(dit, stored.prompts))
    before = {role: [p.detach().clone() for p in trainer.cast.parameters(role).values()] for role in trainer.players}
    for _ in range(2):  # at the first, a critic may still say what the teacher says, and lead the student nowhere
        trainer._iterate()
    updated = {role for step in range(2) for phase in objective.phases(step) for role in phase.updates}
    assert updated, "an iteration in which nobody learns would show nothing"
    for role, old in before.items():
        new = trainer.cast.parameters(role).values()
        assert all(torch.isfinite(p).all() for p in new), role
        changed = any(not torch.equal(a, b) for a, b in zip(old, new, strict=True))
        assert changed == (role in updated), role
    for key, tensor in dit.network().state_dict().items():
        assert torch.equal(tensor, teacher[key]), f"the teacher's {key} has changed"
