"""What a recipe will need, before anything is loaded: one iteration of every stage, played without values.

    configuration files => networks of shapes => the recipe's own cast, objective and optimisers => bytes and passes

Nothing is estimated by a formula that could forget something: the very phases that training runs are run, with their
backward passes and optimiser steps, and the storages that live at the same time are added up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stepdistill.cast import Cast
from stepdistill.objectives.base import Batch, Objective, Phase, Visited
from stepdistill.resources.meter import MemoryMeter, fake_mode, shaped, without_values
from stepdistill.resources.skeleton import family_without_weights
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
    """

    stages: tuple[StagePlan, ...]
    device: str
    capacity_bytes: int | None = None

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
                "peak_bytes": self.peak_bytes, "fits": self.fits}  # fmt: skip


def plan(recipe: Recipe, *, device: str = "unknown", capacity_bytes: int | None = None) -> MemoryPlan:
    """Plays one iteration of every stage without values.

    Args:
        recipe: what is to be trained; its teacher's configuration files are read, and no weights.
        device: the name of what it is planned for.
        capacity_bytes: of that device.

    Raises:
        UserError: the recipe is wrong, or there are no configurations of its teacher.
    """
    recipe = recipe.resolved()
    stages = tuple(plan_stage(recipe, index) for index in range(len(recipe.stages)))
    return MemoryPlan(stages, device, capacity_bytes)


def plan_stage(recipe: Recipe, index: int, family: ModelFamily | None = None) -> StagePlan:
    """Plays one iteration of one stage without values; `family` is a teacher without weights, None builds it."""
    from stepdistill.recipe import build_objective
    from stepdistill.run import trained_roles

    stage = recipe.stages[index]
    objective = build_objective(stage.objective, recipe.where(f"stages.{index}.objective"))
    stage.check_roles(trained_roles(objective), recipe.where(f"stages.{index}"))
    fake, meter = fake_mode(), MemoryMeter()
    family = family or family_without_weights(recipe.teacher_config or recipe.teacher, fake)
    family.at_size(recipe.data.size)
    with shaped(fake):
        _take_types(family, recipe)
        base = family.network()
        saved = _saved_by_quantising(base, recipe)
    for module in (base, *_companions(family, recipe)):
        meter.hold(module)
    with without_values(fake, meter):
        played = _Played(recipe, stage, objective, family, meter)
        return played.plan(saved)


class _Played:
    """One stage in the middle of being played; lives inside the modes."""

    def __init__(
        self, recipe: Recipe, stage: StageConfig, objective: Objective, family: ModelFamily, meter: MemoryMeter
    ) -> None:
        from stepdistill.run import build_player, lora_settings
        from stepdistill.small_students import shaped_roles

        self.recipe, self.stage, self.objective, self.meter = recipe, stage, objective, meter
        shape = recipe.student.shape
        self.cast = Cast(
            family, shaped_roles(objective, shape), lora=lora_settings(stage, objective, family),
            checkpointing=stage.checkpointing, size=recipe.data.size,
        )  # fmt: skip
        precision: Any = _Precision(recipe.precision)
        before = meter.now
        self.players = {name: build_player(name, self.cast, stage, objective, precision) for name in self.cast.trained}
        self.average_bytes = meter.now - before
        self.weights_bytes = before
        batches: Any = ShapedBatches(family, recipe.data.size)
        self.micro = min(stage.accumulate, 2)  # a second micro-batch meets the gradients of the first
        settings = TrainerSettings(steps=stage.steps, batch_size=stage.batch_size, accumulate=self.micro)
        self.trainer = Trainer(self.cast, objective, self.players, batches, precision, settings)

    def plan(self, saved: int) -> StagePlan:
        optimizer = {name: states_of(player, self.meter) for name, player in self.players.items()}
        offload = self.recipe.memory.offload_optimizer
        if offload:
            for player in self.players.values():
                player.optimizer.state.clear()
        phases = tuple(self._phase(step, phase, saved) for step, phase in distinct_phases(self.stage, self.objective))
        fullest = max(phases, key=lambda phase: phase.peak_bytes)
        gradients = sum(
            p.numel() * p.element_size() for r in fullest.updates for p in self.players[r].parameters.values()
        )
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
        times = phase.repeats * self.stage.accumulate // self.micro
        found = tuple(PassPlan(role, graph, len(rows) * times, sum(rows) * times)
                      for (role, graph), rows in sorted(passes.items()))  # fmt: skip
        return PhasePlan(phase.name, phase.updates, phase.repeats, self.meter.peak - saved, found)


@dataclass
class ShapedBatches:
    """Micro-batches of the right shapes for every stream."""

    family: ModelFamily
    size: int | None
    drawn: dict[str, int] = field(default_factory=dict)

    def next(self, stream: str, count: int, groups: int = 1) -> Batch:
        """As `Batches.next`."""
        rows = torch.zeros(count, dtype=torch.long)
        shape = self.family.latent_shape(self.size)
        # "0" is a prompt like another, and a class of class-conditional teachers.
        condition = self.family.encode_prompts(["0"])[rows]
        null = self.family.null_condition(1)[rows]
        stored = stream in ("images", "pairs")
        visited = None
        if stream == "states":
            x, times = torch.randn(count, *shape), torch.rand(count, dtype=torch.float64)
            visited = Visited(x, times, torch.ones(count, dtype=torch.float64), x.clone())
        latents = torch.randn(count, *shape) if stored else None
        noise = torch.randn(count, *shape) if stream == "pairs" else None
        device, prompts = torch.device("cpu"), ("0",) * count
        return Batch(condition, null, shape, device, latents, prompts, noise, visited=visited)


class _Precision:
    """What a trainer and its players ask an accelerator for, on one process."""

    scaler = None
    num_processes, process_index, is_main_process = 1, 0, True
    device = torch.device("cpu")

    def __init__(self, precision: str) -> None:
        self._half = precision != "fp32"

    def autocast(self, handler: Any = None) -> AbstractContextManager[Any]:
        # Both half types are of the same size, and the CPU's autocast knows bf16 best.
        return torch.autocast("cpu", torch.bfloat16, enabled=self._half, cache_enabled=False)

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def reduce(self, tensor: Tensor, reduction: str = "mean") -> Tensor:
        return tensor


def states_of(player: Player, meter: MemoryMeter) -> int:
    """Has an optimiser make its states => their bytes, as its first step would."""
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
