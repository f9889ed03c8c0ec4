"""DisBack: first the teacher is taken to the initial student, then the student is led back along that path.

Zhang et al. 2024, "Distribution Backtracking Builds A Faster Convergence Trajectory for Diffusion Distillation", arXiv
2408.15991. The released code stops switching early, because it compares a checkpoint's number with the running step;
this is the schedule that the paper intends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

import torch

from stepdistill.errors import UserError
from stepdistill.objectives.base import (
    Batch,
    Frozen,
    GuidesCritic,
    InferenceSpec,
    Loss,
    NeedsSchedule,
    Objective,
    Phase,
    Recorded,
    Role,
    Step,
    Trained,
    critic_scale_of,
)
from stepdistill.objectives.checks import check_share
from stepdistill.objectives.matching import critic_denoising, rollout
from stepdistill.options import OBJECTIVE


if TYPE_CHECKING:
    from stepdistill.cast import Cast
    from stepdistill.schedule import NoiseSchedule


TARGET = "target"
NEEDED: Mapping[str, type] = {"teacher": Frozen, "critic": Trained, "student": Trained}


@dataclass(frozen=True)
class DisBack(NeedsSchedule, GuidesCritic):
    """Wraps a game of teacher, critic and student: its teacher is at first one that has become like the student.

    Iterations 0 to nodes * node_steps record: the critic, a copy of the teacher, learns the samples of the untouched
    student and is kept `nodes` times on the way. Then the wrapped game is played from its own step 0 with the last but
    one of these nodes in the teacher's place, with the node before for the next `interval` iterations, and so on; with
    the teacher itself from iteration nodes * node_steps + (nodes - 1) * interval to the end.

    Attributes:
        base: the wrapped objective, an entry like a stage's own: `{name: dmd2, guidance: 3.0}`.
        nodes: N, how many points of the path are recorded; 0 plays the wrapped objective alone. Each of them but the
            last waits in the CPU's memory until its turn (SDXL in the code: 10).
        node_steps: critic updates between two nodes (code: 100).
        interval: iterations per node on the way back (code: 1000).
        condition_dropout: share of prompts that train the critic's unconditional branch while recording: the wrapped
            game guides nodes with the same scale as the teacher (not published).
    """

    base: Annotated[Objective, OBJECTIVE]
    nodes: int = 5
    node_steps: int = 200
    interval: int = 1000
    condition_dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.nodes < 0 or self.node_steps < 1 or self.interval < 1:
            raise UserError("nodes must be at least 0, node_steps and interval at least 1")
        check_share("condition_dropout", self.condition_dropout)
        roles = self.base.roles()
        lacking = [name for name, kind in NEEDED.items() if not isinstance(roles.get(name), kind)]
        spec = self.base.inference()
        if lacking or TARGET in roles or spec is None or spec.sampler == "own":
            raise UserError(f"base must be a game of a frozen teacher, a trained critic and a few-step student, and "
                            f"have no role {TARGET!r}, such as dmd2; this one has {', '.join(roles)}")  # fmt: skip

    def check_schedule(self, schedule: NoiseSchedule) -> None:
        if isinstance(self.base, NeedsSchedule):
            self.base.check_schedule(schedule)

    @property
    def critic_scale(self) -> float:
        return critic_scale_of(self.base)

    @property
    def recording(self) -> int:
        """Iterations of the first part."""
        return self.nodes * self.node_steps

    def node(self, step: int) -> int | None:
        """Which node stands in for the teacher in an iteration: N - 1 ... 1, 0 the teacher itself; None: recording."""
        played = step - self.recording
        return None if played < 0 else max(0, self.nodes - 1 - played // self.interval)

    def roles(self) -> Mapping[str, Role]:
        roles = self.base.roles()
        return {**roles, TARGET: Recorded(like="critic")} if self.nodes > 1 else roles

    def phases(self, step: int) -> Sequence[Phase]:
        node = self.node(step)
        if node is None:
            return (Phase("recording", ("critic",), self.recording_loss),)
        phases = self.base.phases(step - self.recording)
        if self.nodes == 0:
            return phases
        return tuple(replace(phase, loss=partial(self._loss, phase.loss, node)) for phase in phases)

    def after_step(self, cast: Cast, step: int) -> None:
        done = step + 1
        if done < self.recording and done % self.node_steps == 0:  # the last node is the critic as it stands then
            cast.park("critic", _key(done // self.node_steps))
        node, following = self.node(step), self.node(done)
        if following and following != node:
            cast.fetch(_key(following), TARGET)
            del cast.parked[_key(following)]  # never needed again: the path is gone once
        if node is not None:
            self.base.after_step(cast, step - self.recording)

    def inference(self) -> InferenceSpec | None:
        return self.base.inference()

    def recording_loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """Algorithm's first stage: ordinary denoising of the initial student's samples; only the critic is trained."""
        spec = self.base.inference()
        assert spec is not None and spec.sampler != "own", "checked when this was made"
        with torch.no_grad():
            x0 = rollout(cast.denoiser("student"), batch, spec.timesteps, step, spec.sampler)
        drop = torch.rand(len(batch), device=batch.device) < self.condition_dropout
        return Loss(
            {"recording": critic_denoising(cast.denoiser("critic"), x0, batch, drop=drop, signal_weight=False)}
        )

    def _loss(
        self, loss: Callable[[Cast, Batch, Step], Loss], node: int, cast: Cast, batch: Batch, step: Step
    ) -> Loss:
        """The wrapped game's loss with a node as its teacher, at its own count of steps.

        A discriminator on the teacher's features keeps them: they would change under it at every node (ours; the
        code's discriminator has the critic's).
        """
        view = cast.renamed({"teacher": TARGET}) if node else cast
        told = loss(view, batch, replace(step, index=step.index - self.recording))
        return Loss(told.terms, {**told.logged, "node": torch.tensor(float(node))})


def _key(node: int) -> str:
    return f"node-{node}"
