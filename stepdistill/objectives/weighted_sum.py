"""A weighted sum of objectives: several games with one student, so that hybrids need no class of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Annotated

from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.objectives import name_of
from stepdistill.objectives.base import (
    Batch,
    GuidesCritic,
    InferenceSpec,
    Loss,
    NeedsSchedule,
    Objective,
    Phase,
    Role,
    Step,
    critic_scale_of,
)
from stepdistill.options import OBJECTIVE, options_of


if TYPE_CHECKING:
    from stepdistill.cast import Cast
    from stepdistill.schedule import NoiseSchedule


@dataclass(frozen=True)
class Part:
    """One objective of a sum.

    Attributes:
        objective: the game, an entry like a stage's own: `{name: vsd, guidance: 3.0}`.
        weight: of all its losses, beside the weights that it has inside.
        label: what the log calls it; by default the objective's name.
    """

    objective: Annotated[Objective, OBJECTIVE]
    weight: float = 1.0
    label: str | None = None

    @cached_property
    def name(self) -> str:
        """What the log and error messages call it."""
        return self.label or name_of(type(self.objective)).rpartition(":")[2]


LATE = 10**9  # an iteration when no part warms up any more: phases that come later have to fit too
Turn = list[tuple[Part, Phase]]  # one phase of the sum: the parts that take part, and the phase of each


@dataclass(frozen=True)
class WeightedSum(NeedsSchedule, GuidesCritic):
    """Plays several objectives as one game, whose losses are weighted sums.

    Roles of equal names are one role. Phases that train a common role become one phase, in the order in which the
    parts name them: it trains the roles of all, is repeated as often as the part says that asks for most, and takes
    the stream that one of them needs beside prompts. In it, parts that call the student alike look at the same
    samples.

    Attributes:
        parts: the objectives with their weights.
        called_as: the part, by its name, that says how the finished student is called; by default all have to agree.
    """

    parts: tuple[Annotated[Part, options_of(Part)], ...]
    called_as: str | None = None

    def __post_init__(self) -> None:
        if not self.parts:
            raise UserError("a sum needs parts, at least one: parts: [{objective: {name: vsd}, weight: 1.0}]")
        names = [part.name for part in self.parts]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(f"two parts are called {twice[0]!r}; give them a label each")
        if self.called_as is not None and self.called_as not in names:
            raise UserError(f"called_as {self.called_as!r} is no part; the parts are {', '.join(names)}")
        # What does not fit together is told before anything is loaded.
        self.roles()
        for step in (0, LATE):
            self.phases(step)
        self.inference()

    def check_schedule(self, schedule: NoiseSchedule) -> None:
        for part in self.parts:
            if isinstance(part.objective, NeedsSchedule):
                part.objective.check_schedule(schedule)

    @property
    def critic_scale(self) -> float:
        """Of the first part that has one; the others share it."""
        with_critic = (part.objective for part in self.parts if "critic" in part.objective.roles())
        return next((critic_scale_of(objective) for objective in with_critic), 1.0)

    def roles(self) -> Mapping[str, Role]:
        united: dict[str, tuple[str, Role]] = {}
        for part in self.parts:
            for name, role in part.objective.roles().items():
                owner, known = united.setdefault(name, (part.name, role))
                if known != role:
                    raise UserError(f"parts {owner!r} and {part.name!r} both have a role {name!r}, but not the same "
                                    f"({known} and {role}); they cannot share it")  # fmt: skip
        return {name: role for name, (_, role) in united.items()}

    def phases(self, step: int) -> Sequence[Phase]:
        turns: list[Turn] = []
        for part in self.parts:
            for phase in part.objective.phases(step):
                turn = next((turn for turn in turns if _joins(part, phase, turn)), None)
                if turn is None:
                    turns.append([(part, phase)])
                else:
                    turn.append((part, phase))
        return tuple(_united(turn) for turn in turns)

    def after_step(self, cast: Cast, step: int) -> None:
        for part in self.parts:
            part.objective.after_step(cast, step)

    def inference(self) -> InferenceSpec | None:
        first, *others = [part for part in self.parts if self.called_as in (None, part.name)]
        spec = first.objective.inference()
        for part in others:
            other = part.objective.inference()
            if other != spec:
                raise UserError(f"parts {first.name!r} and {part.name!r} call the student differently "
                                f"({_differences(spec, other)}); give both the same timesteps and sampler, or name "
                                "one of them with called_as")  # fmt: skip
        return spec


def _differences(spec: InferenceSpec | None, other: InferenceSpec | None) -> str:
    """How two ways to call a student differ, in words."""
    if spec is None or other is None:
        told = spec or other
        return f"at timesteps {list(told.timesteps) if told else []}, and with the teacher's own scheduler"
    pairs = ((field.name, getattr(spec, field.name), getattr(other, field.name)) for field in fields(InferenceSpec))
    return ", ".join(f"{name}: {one} and {two}" for name, one, two in pairs if one != two)


def _joins(part: Part, phase: Phase, turn: Turn) -> bool:
    """Whether a phase trains a role of the turn; a part's own phases stay apart, one after the other."""
    shares = any(set(phase.updates) & set(other.updates) for _, other in turn)
    return shares and all(member is not part for member, _ in turn)


def _united(turn: Turn) -> Phase:
    """One phase out of those of several parts."""
    updates = tuple(dict.fromkeys(role for _, phase in turn for role in phase.updates))
    names = " and ".join(repr(part.name) for part, _ in turn)
    for part, phase in turn:
        # Its loss takes these for fixed in this phase, and would send gradients into them that nobody meant.
        unmeant = [role for role in updates if role not in phase.updates and role in part.objective.roles()]
        if unmeant:
            raise UserError(f"parts {names} train {', '.join(updates)} in one phase, in which {part.name!r} keeps "
                            f"{', '.join(unmeant)} fixed; play them in stages of their own")  # fmt: skip
    streams = sorted({phase.stream for _, phase in turn} - {"prompts"})
    if len(streams) > 1:
        raise UserError(f"parts {names} train {', '.join(updates)} together on different data "
                        f"({' and '.join(streams)}); play them in stages of their own")  # fmt: skip
    return Phase(
        name=" + ".join(dict.fromkeys(phase.name for _, phase in turn)),
        updates=updates,
        loss=partial(_loss, turn),
        stream=streams[0] if streams else "prompts",
        repeats=max(phase.repeats for _, phase in turn),
    )


def _loss(turn: Turn, cast: Cast, batch: Batch, step: Step) -> Loss:
    """The sum of the parts' losses, its terms under the parts' names."""
    shared = replace(batch, samples={})
    terms: dict[str, Tensor] = {}
    logged: dict[str, Tensor] = {}
    for part, phase in turn:
        told = phase.loss(cast, shared, step)
        terms |= {f"{part.name}/{name}": part.weight * value for name, value in told.terms.items()}
        logged |= {f"{part.name}/{name}": value for name, value in told.logged.items()}
    return Loss(terms, logged)
