"""The one training loop. It knows roles and phases, and no method's name.

The training step is `Trainer._run_phase`.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

from stepdistill.adapters import copy_into
from stepdistill.cast import Cast
from stepdistill.checkpoint import Checkpoints
from stepdistill.data.batches import Batches
from stepdistill.errors import UserError
from stepdistill.objectives.base import Objective, Phase, Step
from stepdistill.player import Player
from stepdistill.seeds import seed_of


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived; a checkpoint was written."""


@dataclass(frozen=True)
class Progress:
    """What one iteration did, for whoever shows it.

    Attributes:
        stage: number of the stage, from 0.
        step: iterations of this stage done.
        steps: iterations of this stage in all.
        losses: every loss term, logged value, gradient norm and learning rate of this iteration, by name.
        images_per_second: student samples that were trained on, a running mean.
        seconds_left: of this stage, an estimate.
    """

    stage: int
    step: int
    steps: int
    losses: Mapping[str, float]
    images_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class TrainerSettings:
    """How long and how a stage is played.

    Attributes:
        steps: iterations.
        batch_size: samples per micro-batch and process.
        accumulate: micro-batches per update.
        seed: of the run; all randomness of an iteration derives from (seed, rank, stage, step).
        checkpoint_every: iterations.
        stage: number of the stage, from 0.
        first_step: iterations of the stages before, so that checkpoints of a run count on.
    """

    steps: int
    batch_size: int
    accumulate: int = 1
    seed: int = 0
    checkpoint_every: int = 500
    stage: int = 0
    first_step: int = 0


@dataclass
class Trainer:
    """Plays one stage of a game.

    Attributes:
        cast: the networks.
        objective: the rules.
        players: one per trained role.
        batches: the data.
        accelerator: precision, device, processes.
        settings: how long and how.
        checkpoints: where to save, or None.
        log: file that gets one JSON object per iteration, or None.
        on_step: called after every iteration.
    """

    cast: Cast
    objective: Objective
    players: Mapping[str, Player]
    batches: Batches
    accelerator: Accelerator
    settings: TrainerSettings
    checkpoints: Checkpoints | None = None
    log: Path | None = None
    on_step: Callable[[Progress], None] | None = None
    step: int = 0
    _signal: int | None = field(default=None, init=False)
    _pace: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=50), init=False)

    def run(self) -> None:
        """Plays until the last step, from wherever `resume` left it.

        Raises:
            Interrupted: after SIGINT or SIGTERM, with a checkpoint of the last whole iteration.
            UserError: a loss is not finite, or a checkpoint could not be written.
        """
        with self._catching_signals():
            while self.step < self.settings.steps:
                self._iterate()
                last = self.step == self.settings.steps
                if self._signal is not None or last or self.step % self.settings.checkpoint_every == 0:
                    self.save()
                if self._signal is not None and not last:
                    raise Interrupted(self._signal)

    def save(self) -> Path | None:
        """Writes a checkpoint of the present state (the main process does)."""
        if self.checkpoints is None or not self.accelerator.is_main_process:
            return None
        roles = {name: self.cast.parameters(name) for name in self.players}
        scaler = self.accelerator.scaler
        state = {
            "stage": self.settings.stage,
            "step": self.step,
            "drawn": self.batches.drawn,
            "players": {name: player.state() for name, player in self.players.items()},
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        return self.checkpoints.save(self.settings.first_step + self.step, roles, state)

    def resume(self, roles: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any]) -> None:
        """Restores what `save` wrote; the next iteration then is bit-identical to an uninterrupted one."""
        for name, player in self.players.items():
            copy_into(self.cast.parameters(name), roles.get(name, {}), f"checkpoint of role {name!r}")
            player.load_state(state["players"][name])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.batches.restore(state["drawn"])
        self.step = state["step"]

    def _iterate(self) -> None:
        began = time.monotonic()
        # Everything random below is a function of (seed, rank, stage, step), so resuming needs no generator's state.
        torch.manual_seed(seed_of(self.settings.seed, self.accelerator.process_index, self.settings.stage, self.step))
        values: dict[str, float] = {}
        turn = 0
        for phase in self.objective.phases(self.step):
            for _ in range(phase.repeats):
                values.update(self._run_phase(phase, turn))
                turn += self.settings.accumulate
        self.objective.after_step(self.cast, self.step)
        self.step += 1
        self._pace.append((time.monotonic() - began, self.settings.batch_size * self.settings.accumulate))
        self._report(values)

    def _run_phase(self, phase: Phase, turn: int) -> dict[str, float]:
        """One update of the phase's roles: accumulate gradients over micro-batches, then every player steps."""
        sums: dict[str, torch.Tensor] = {}
        with self.cast.trainable(phase.updates):
            for micro in range(self.settings.accumulate):
                batch = self.batches.next(phase.stream, self.settings.batch_size)
                with self.accelerator.autocast():
                    loss = phase.loss(self.cast, batch, Step(self.step, self.settings.seed, turn + micro))
                self.accelerator.backward(loss.total / self.settings.accumulate)
                for name, value in (*loss.terms.items(), *loss.logged.items()):
                    sums[name] = sums.get(name, 0) + value.detach() / self.settings.accumulate
            values = {name: float(value) for name, value in sums.items()}
            self._check_finite(phase, values)
            for role in phase.updates:
                values[f"{role}/gradient_norm"] = self.players[role].step()
                values[f"{role}/learning_rate"] = self.players[role].learning_rate
        return values

    def _check_finite(self, phase: Phase, values: Mapping[str, float]) -> None:
        wrong = [name for name, value in values.items() if not math.isfinite(value)]
        if wrong:
            raise UserError(f"phase {phase.name!r}, step {self.step}: {', '.join(wrong)} is not finite; lower the "
                            "learning rate or the clipping, or use precision bf16 or fp32")  # fmt: skip

    def _report(self, values: Mapping[str, float]) -> None:
        seconds = sum(s for s, _ in self._pace)
        images = sum(n for _, n in self._pace) * self.accelerator.num_processes
        left = (self.settings.steps - self.step) * seconds / len(self._pace)
        progress = Progress(self.settings.stage, self.step, self.settings.steps, values, images / seconds, left)
        if self.log is not None and self.accelerator.is_main_process:
            line = {"stage": self.settings.stage, "step": self.step, **values,
                    "seconds": self._pace[-1][0], "images_per_second": progress.images_per_second}  # fmt: skip
            with self.log.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if self.on_step is not None:
            self.on_step(progress)

    @contextmanager
    def _catching_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM let the iteration finish; a second one acts at once."""

        def remember(number: int, frame: FrameType | None) -> None:
            if self._signal is not None:
                raise KeyboardInterrupt
            self._signal = number

        with ExitStack() as stack:
            try:
                for number in (signal.SIGINT, signal.SIGTERM):
                    stack.callback(signal.signal, number, signal.signal(number, remember))
            except ValueError:  # not the main thread: whoever runs us there handles signals himself
                pass
            yield


def truncate_log(log: Path, stage: int, step: int) -> None:
    """Drops the lines of iterations that a resumed run is going to repeat."""
    if not log.is_file():
        return
    lines = [line for line in log.read_text().splitlines() if line.endswith("}")]
    kept = [line for line in lines if (lambda e: (e["stage"], e["step"]) <= (stage, step))(json.loads(line))]
    log.write_text("".join(line + "\n" for line in kept))
