"""What a recipe will need, before anything is loaded: one iteration of every stage, played without values.

    configuration files => networks of shapes => the recipe's own cast, objective and optimisers => bytes and passes

Nothing is estimated by a formula that could forget something: the very phases that training runs are run, with their
backward passes and optimiser steps, and the storages that live at the same time are added up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stepdistill.cast import Cast
from stepdistill.objectives.base import Objective, Phase
from stepdistill.processes.sharding import gathered_bytes
from stepdistill.processes.share import Share
from stepdistill.resources.meter import MemoryMeter, fake_mode, shaped, without_values
from stepdistill.resources.skeleton import family_without_weights
from stepdistill.resources.stand_ins import ShapedBatches, ShapedPrecision
from stepdistill.trainer import Trainer, TrainerSettings


if TYPE_CHECKING:
    from collections.abc import Iterator

    from stepdistill.families.base import ModelFamily
    from stepdistill.player import Player
    from stepdistill.recipe import Recipe
    from stepdistill.recipe_sections import StageConfig

GIB = 2**30
CONTEXT_BYTES = GIB // 2  # what an accelerator's driver and libraries take for themselves
BASE_BYTES = {"int8": 1.0, "nf4": 0.5}  # of one weight of a linear layer; scales are small beside them


@dataclass(frozen=True)
class RolePlan:
    """One role: what computes it, its parameters that are trained, and all of them."""

    role: str
    weights: str
    trained: int
    parameters: int


@dataclass(frozen=True)
class PassPlan:
    """Calls of one role's network in one iteration.

    Attributes:
        role: whose weights.
        graph: whether for a backward pass.
        calls: how many, all micro-batches and repeats together.
        rows: samples of all these calls; guidance makes two of one.
    """

    role: str
    graph: bool
    calls: int
    rows: int


@dataclass(frozen=True)
class PhasePlan:
    """One turn: who is updated, how often in an iteration, and the most bytes alive during it."""

    name: str
    updates: tuple[str, ...]
    repeats: int
    peak_bytes: int
    passes: tuple[PassPlan, ...]


@dataclass(frozen=True)
class StagePlan:
    """One stage. Bytes of weights are those of everything on the device, encoders included where they stay there.

    Attributes:
        activations: what the fullest phase holds beyond the four kinds of bytes named here.

    Of several processes it is what one of them holds and calls; parameters are counted whole.
    """

    objective: str
    roles: tuple[RolePlan, ...]
    weights_bytes: int
    optimizer_bytes: int
    average_bytes: int
    gradient_bytes: int
    phases: tuple[PhasePlan, ...]
    notes: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """Of the fullest phase."""
        return max(phase.peak_bytes for phase in self.phases)

    @property
    def activation_bytes(self) -> int:
        known = self.weights_bytes + self.optimizer_bytes + self.average_bytes + self.gradient_bytes
        return max(0, self.peak_bytes - known)


@dataclass(frozen=True)
class MemoryPlan:
    """All stages of a recipe and a device for them.

    Attributes:
        stages: in order.
        device: what it was planned for, in words.
        capacity_bytes: what that device has; None: unknown.
        num_processes: each with such a device of its own.
        sharded: whether they divide networks with full weights.
    """

    stages: tuple[StagePlan, ...]
    device: str
    capacity_bytes: int | None = None
    num_processes: int = 1
    sharded: bool = False

    @property
    def peak_bytes(self) -> int:
        """Of the fullest stage."""
        return max(stage.peak_bytes for stage in self.stages)

    @property
    def fits(self) -> bool | None:
        """Whether the device has room; None if nobody knows what it has."""
        return None if self.capacity_bytes is None else self.peak_bytes + CONTEXT_BYTES <= self.capacity_bytes

    def as_json(self) -> dict[str, Any]:
        """Plain values, sums included."""
        stages = [{**asdict(s), "peak_bytes": s.peak_bytes, "activation_bytes": s.activation_bytes}
                  for s in self.stages]  # fmt: skip
        return {"stages": stages, "device": self.device, "capacity_bytes": self.capacity_bytes,
                "peak_bytes": self.peak_bytes, "fits": self.fits, "num_processes": self.num_processes,
                "sharded": self.sharded}  # fmt: skip


def plan(
    recipe: Recipe,
    *,
    device: str = "unknown",
    capacity_bytes: int | None = None,
    num_processes: int = 1,
    shard: bool = False,
) -> MemoryPlan:
    """Plays one iteration of every stage without values.

    Args:
        recipe: what is to be trained; its teacher's configuration files are read, and no weights.
        device: the name of what it is planned for.
        capacity_bytes: of that device.
        num_processes: how many share every batch; the plan is one process's.
        shard: they divide networks with full weights.

    Raises:
        UserError: the recipe is wrong, or there are no configurations of its teacher, or the processes cannot share
            its batches or divide its networks.
    """
    from stepdistill.processes.launch import check_divided, shares
    from stepdistill.resources.apply import check_precision
    from stepdistill.teacher_kind import resolve

    recipe = resolve(recipe)
    check_precision(recipe)
    if shard:
        check_divided(recipe)
    parts = num_processes if shard else 1
    stages = tuple(
        plan_stage(recipe, index, crew=Crew(share, num_processes, parts))
        for index, share in enumerate(shares(recipe, num_processes, sharded=shard))
    )
    return MemoryPlan(stages, device, capacity_bytes, num_processes, shard)


@dataclass(frozen=True)
class Crew:
    """The processes that play a stage, of which one is planned.

    Attributes:
        share: what it plays of every batch.
        count: how many there are.
        parts: among how many of them networks with full weights are divided; 1: each has all of them.
    """

    share: Share
    count: int = 1
    parts: int = 1


def plan_stage(
    recipe: Recipe, index: int, family: ModelFamily | None = None, *, crew: Crew | None = None
) -> StagePlan:
    """Plays one iteration of one stage without values.

    Args:
        recipe: resolved.
        index: of the stage.
        family: a teacher without weights; None builds it.
        crew: the processes; None: there is one.
    """
    from stepdistill.recipe import build_objective
    from stepdistill.stages import check_stage

    stage = recipe.stages[index]
    objective = build_objective(stage.objective, recipe.where(f"stages.{index}.objective"))
    check_stage(stage, objective, recipe.where(f"stages.{index}"))
    fake, meter = fake_mode(), MemoryMeter()
    family = family or family_without_weights(recipe.teacher_config or recipe.teacher, fake)
    family.at_size(recipe.data.size)
    with shaped(fake):
        _take_types(family, recipe)
        base = family.network()
        saved = _saved_by_quantising(base, recipe)
    for module in (base, *_companions(family, recipe)):
        meter.hold(module)
    crew = crew or Crew(Share(stage.batch_size, stage.accumulate))
    with without_values(fake, meter):
        played = _Played(recipe, stage, objective, family, meter, crew)
        return played.plan(saved)


class _Played:
    """One stage in the middle of being played; lives inside the modes."""

    def __init__(
        self, recipe: Recipe, stage: StageConfig, objective: Objective, family: ModelFamily, meter: MemoryMeter,
        crew: Crew,
    ) -> None:  # fmt: skip
        from stepdistill.run import build_player
        from stepdistill.small_students import shaped_roles
        from stepdistill.stages import lora_settings

        self.recipe, self.stage, self.objective, self.meter, self.crew = recipe, stage, objective, meter, crew
        shape = recipe.student.shape
        self.cast = Cast(
            family, shaped_roles(objective, shape), lora=lora_settings(stage, objective, family),
            checkpointing=stage.checkpointing, size=recipe.data.size,
        )  # fmt: skip
        self.divided = self._divide() if crew.parts > 1 else {}
        whole: Any = ShapedPrecision(recipe.precision, crew.count)
        part: Any = ShapedPrecision(recipe.precision)  # whose gradients have been averaged block by block
        before = meter.now
        self.players = {
            name: build_player(name, self.cast, stage, objective, part if name in self.divided else whole)
            for name in self.cast.trained
        }
        for name in self.players.keys() & self.divided.keys():
            meter.divide(self.players[name].averages, crew.parts)
        self.average_bytes = meter.now - before
        self.weights_bytes = before
        batches: Any = ShapedBatches(family, recipe.data.size)
        share = crew.share
        self.micro = min(share.accumulate, 2)  # a second micro-batch meets the gradients of the first
        settings = TrainerSettings(steps=stage.steps, batch_size=share.batch_size, accumulate=self.micro,
                                   groups=share.groups)  # fmt: skip
        self.trainer = Trainer(self.cast, objective, self.players, batches, whole, settings)

    def _divide(self) -> dict[str, nn.Module]:
        """Counts a part of every network of a role's own, and of its gradients as they come => these networks."""
        meter, parts = self.meter, self.crew.parts
        own = {name: network for name, network in self.cast.networks().items() if name != "teacher"}

        def divide(parameter: Tensor) -> None:
            if parameter.grad is not None:
                meter.divide([parameter.grad], parts)

        for network in own.values():
            meter.divide(network.parameters(), parts)
            for parameter in network.parameters():
                parameter.requires_grad_(True)  # which torch wants for a hook
                parameter.register_post_accumulate_grad_hook(divide)  # type: ignore[no-untyped-call]
                parameter.requires_grad_(False)
        return own

    def plan(self, saved: int) -> StagePlan:
        parts = self.crew.parts
        optimizer = {
            name: states_of(player, self.meter, parts if name in self.divided else 1)
            for name, player in self.players.items()
        }
        offload = self.recipe.memory.offload_optimizer
        if offload:
            for player in self.players.values():
                player.optimizer.state.clear()
        phases = tuple(self._phase(step, phase, saved) for step, phase in distinct_phases(self.stage, self.objective))
        fullest = max(phases, key=lambda phase: phase.peak_bytes)
        gradients = sum(
            p.numel() * p.element_size() // (parts if r in self.divided else 1)
            for r in fullest.updates for p in self.players[r].parameters.values()
        )  # fmt: skip
        notes = ("optimiser states of the role that steps are counted with the activations",) if offload else ()
        return StagePlan(
            self.stage.objective.name, tuple(RolePlan(*row) for row in self.cast.summary()),
            weights_bytes=self.weights_bytes - saved, optimizer_bytes=0 if offload else sum(optimizer.values()),
            average_bytes=self.average_bytes, gradient_bytes=gradients, phases=phases, notes=notes,
        )  # fmt: skip

    def _phase(self, step: int, phase: Phase, saved: int) -> PhasePlan:
        self.trainer.step = step
        self.meter.start_anew()
        with counted_passes(self.cast) as passes:
            self.trainer._run_phase(phase, 0)
        if self.recipe.memory.offload_optimizer:
            for role in phase.updates:
                self.players[role].optimizer.state.clear()
        times = phase.repeats * self.crew.share.accumulate // self.micro
        gathered = max((gathered_bytes(network) for network in self.divided.values()), default=0)
        found = tuple(PassPlan(role, graph, len(rows) * times, sum(rows) * times)
                      for (role, graph), rows in sorted(passes.items()))  # fmt: skip
        return PhasePlan(phase.name, phase.updates, phase.repeats, self.meter.peak + gathered - saved, found)


def states_of(player: Player, meter: MemoryMeter, parts: int = 1) -> int:
    """Has an optimiser make its states => their bytes, as its first step would; of divided ones, a part."""
    before, optimizer = meter.now, player.optimizer
    if not type(optimizer).__module__.startswith("torch."):
        return 0  # not made of torch's operations, and known only where it runs
    for group in optimizer.param_groups:
        if group.get("foreach", True) is None and not group.get("fused"):
            group["foreach"] = True  # as torch chooses on an accelerator
    for parameter in player.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    if parts > 1:
        states = [state for states in optimizer.state.values() for state in states.values()]
        meter.divide([state for state in states if isinstance(state, Tensor) and state.ndim], parts)
    return meter.now - before


def distinct_phases(stage: StageConfig, objective: Objective) -> list[tuple[int, Phase]]:
    """Every turn that the stage has, with the first iteration that has it."""
    found: dict[tuple[Any, ...], tuple[int, Phase]] = {}
    for step in range(stage.steps):
        for phase in objective.phases(step):
            found.setdefault((phase.name, phase.updates, phase.stream), (step, phase))
    return list(found.values())


@contextmanager
def counted_passes(cast: Cast) -> Iterator[dict[tuple[str, bool], list[int]]]:
    """Inside, calls of the cast's networks are noted: (role, with a graph?) => rows of each call."""
    found: dict[tuple[str, bool], list[int]] = {}

    def noting(role: str, network: nn.Module) -> Callable[..., None]:
        def note(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
            shared = module is cast.shared.network
            name = cast.shared.route or role if shared else role
            x = args[0] if args else kwargs["hidden_states"]
            found.setdefault((name, torch.is_grad_enabled()), []).append(len(x))

        return note

    with ExitStack() as stack:
        for role, network in cast.networks().items():
            hook = network.register_forward_pre_hook(noting(role, network), with_kwargs=True)
            stack.callback(hook.remove)
        yield found


def _take_types(family: ModelFamily, recipe: Recipe) -> None:
    """As `resources.apply` has a teacher loaded."""
    from stepdistill.resources.apply import BASE_TYPES

    dtype = BASE_TYPES[recipe.memory.base]
    for name, component in family.pipeline.components.items():
        if isinstance(component, nn.Module) and name != "vae" and dtype != torch.float32:
            component.to(dtype)


def _companions(family: ModelFamily, recipe: Recipe) -> list[nn.Module]:
    """The modules beside the network that stay on the device."""
    if recipe.memory.park_encoders:
        return []
    components = family.pipeline.components.values()
    return [c for c in components if isinstance(c, nn.Module) and c is not family.network()]


def _saved_by_quantising(network: nn.Module, recipe: Recipe) -> int:
    """Bytes that the linear layers of the base do not take since they are quantised."""
    size = BASE_BYTES.get(recipe.memory.base)
    if size is None:
        return 0
    weights = [module.weight for module in network.modules() if isinstance(module, nn.Linear)]
    return int(sum(w.numel() * (w.element_size() - size) for w in weights))
