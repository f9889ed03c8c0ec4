"""Recipes for real checkpoints take their steps on tiny teachers of the same families, stage after stage."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from stepdistill.cast import Cast, RoleState
from stepdistill.export.schedulers import family_scheduler
from stepdistill.families import FAMILIES, load_family
from stepdistill.families.base import ModelFamily
from stepdistill.objectives.base import Batch, InferenceSpec, Objective, Visited
from stepdistill.recipe import Recipe, build_objective
from stepdistill.recipe_sections import StageConfig
from stepdistill.run import build_player, resolve_starts
from stepdistill.sampling import student_samples
from stepdistill.small_options import small_objective
from stepdistill.stages import lora_settings, trained_roles
from stepdistill.trainer import Trainer, TrainerSettings
from tests.unit.test_real_recipes import REAL


# recipe's folder => the tiny teachers that stand for its teacher; the 2.1-base model predicts as 1.5 does
TINY = {"sd15": "sd", "sd21": "sd21", "sdxl": "sdxl", "pixart": "pixart", "sd3": "sd3", "flux": "flux",
        "sana": "sana", "dit": "dit"}  # fmt: skip
BASE = {"sd21/snoopi_1step": "sd"}
STEPS = 2
STORED = {"sd": "sd_folder", "dit": "dit_folder", "sd3": "sd3_folder"}  # where there is no module of tiny teachers


def tiny_teacher(name: str, request: pytest.FixtureRequest) -> ModelFamily:
    """A recipe's teacher in small; skips where the checkout has none of its family."""
    family = BASE.get(name, TINY[name.partition("/")[0]])
    if importlib.util.find_spec("stepdistill.families.tiny") is not None:
        from stepdistill.families.tiny import TINY_PIPELINES

        if family in TINY_PIPELINES:
            return load_family(f"tiny:{family}")
    if family not in STORED:
        pytest.skip(f"no tiny {family}; families: {', '.join(FAMILIES)}")
    return load_family(request.getfixturevalue(STORED[family]))


@dataclass
class EveryStream:
    """Batches of all streams out of thin air."""

    family: ModelFamily
    drawn: dict[str, int] = field(default_factory=dict)

    def next(self, stream: str, count: int, groups: int = 1) -> Batch:
        number = self.drawn[stream] = self.drawn.get(stream, 0) + 1
        generator = torch.Generator().manual_seed(number)
        shape = self.family.latent_shape()
        texts = tuple("0123"[:count] if self.family.name == "dit" else "abcd"[:count])

        def some() -> Tensor:
            return torch.randn(count, *shape, generator=generator)

        batch = Batch(self.family.encode_prompts(texts), self.family.null_condition(count), shape,
                      torch.device("cpu"), prompts=texts)  # fmt: skip
        if stream == "prompts":
            return batch
        if stream == "states":
            t = torch.rand(count, generator=generator, dtype=torch.float64)
            return replace(batch, visited=Visited(some(), t, 1 + t, some()))
        return replace(batch, latents=some(), pair_noise=some() if stream == "pairs" else None)


def small_stage(stage: StageConfig) -> StageConfig:
    """Two steps of a few samples; rates as they are, without warm-up, which would begin with a rate of 0.

    In the first one, a student whose critic still is the teacher, guided alike, has nothing to learn.
    """
    content = stage.model_dump(mode="json")
    players: Mapping[str, Any] = content["players"]
    content["players"] = {
        role: {**player, "schedule": "constant", "warmup_steps": 0} for role, player in players.items()
    }
    content |= {"steps": STEPS, "batch_size": 2, "accumulate": 2, "objective": small_objective(content["objective"])}
    # A student of another checkpoint is not on this machine.
    content["starts"] = {role: where for role, where in stage.starts.items() if where in ("teacher", "previous")}
    return StageConfig.model_validate(content)


def play(
    family: ModelFamily, stage: StageConfig, objective: Objective, starts: Mapping[str, RoleState]
) -> tuple[dict[str, RoleState], dict[str, float], set[str]]:
    """All steps => the trained roles' weights, what was logged, and the roles that have moved."""
    accelerator = Accelerator(cpu=True)
    cast = Cast(family, objective.roles(), lora=lora_settings(stage, objective, family),
                starts=resolve_starts(stage, starts, family), checkpointing=stage.checkpointing)  # fmt: skip
    players = {name: build_player(name, cast, stage, objective, accelerator) for name in cast.trained}
    before = {name: {k: p.detach().clone() for k, p in cast.parameters(name).items()} for name in players}
    seen: dict[str, float] = {}
    trainer = Trainer(cast, objective, players, EveryStream(family), accelerator,  # type: ignore[arg-type]
                      TrainerSettings(steps=STEPS, batch_size=stage.batch_size, accumulate=stage.accumulate, skips=1),
                      on_step=lambda progress: seen.update(progress.losses))  # fmt: skip
    trainer.run()
    moved = {name for name, old in before.items()
             if any(not torch.equal(p, old[k]) for k, p in cast.parameters(name).items())}  # fmt: skip
    states = {name: cast.state(name) for name in players}
    spec = objective.inference()
    assert spec is not None
    check_sample(family, cast, spec)
    cast.release()
    return states, seen, moved


def check_sample(family: ModelFamily, cast: Cast, spec: InferenceSpec) -> None:
    """The student can be called as it is going to be."""
    if spec.sampler == "own":
        return
    batch = EveryStream(family).next("prompts", 2)
    with torch.no_grad():
        said = student_samples(cast.denoiser("student"), batch.noise(), batch.condition, spec)
    assert said.shape == (2, *batch.latent_shape)
    assert said.isfinite().all()


@pytest.mark.parametrize("name", REAL)
def test_every_recipe_plays_its_stages_and_its_student_can_be_exported(
    name: str, request: pytest.FixtureRequest
) -> None:
    family = tiny_teacher(name, request)
    starts: dict[str, RoleState] = {}
    objective: Objective | None = None
    for index, stage in enumerate(small_stage(stage) for stage in Recipe.load(name).stages):
        objective = build_objective(stage.objective, f"{name}: {index}")
        states, seen, moved = play(family, stage, objective, starts)
        updated = {role for step in range(STEPS) for phase in objective.phases(step) for role in phase.updates}
        assert moved == updated & set(trained_roles(objective)), f"stage {index}"
        assert "skipped" not in seen
        assert any(seen[f"{role}/gradient_norm"] > 0 for role in updated)
        starts |= states
    assert objective is not None
    spec = objective.inference()
    assert spec is not None
    family_scheduler(family, spec)


def test_the_streams_of_the_test_are_those_of_a_run(request: pytest.FixtureRequest) -> None:
    fed = EveryStream(tiny_teacher("sd15/dmd2_1step", request))
    has: dict[str, Callable[[Batch], object]] = {
        "images": lambda b: b.latents, "pairs": lambda b: b.pair_noise, "states": lambda b: b.visited
    }  # fmt: skip
    for stream, part in has.items():
        assert part(fed.next(stream, 2)) is not None
        assert part(fed.next("prompts", 2)) is None
