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
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs

from stepdistill.adapters import copy_into
from stepdistill.cast import Cast
from stepdistill.checkpoint import Checkpoints
from stepdistill.data.batches import Batches
from stepdistill.errors import UserError
from stepdistill.health import Monitor
from stepdistill.objectives.base import Objective, Phase, Step
from stepdistill.player import Player
from stepdistill.processes.agreement import check_agreement
from stepdistill.processes.sharding import gathered
from stepdistill.processes.share import SlicedDraws
from stepdistill.resources.heap import kept_heap
from stepdistill.seeds import seed_of


PARKED = "parked-"  # begins the name of files that hold parked weights
# torch 2.9 and older keep casts that were made without a graph and use them again where a graph is needed: a student
# whose first steps run without gradients would then get none at its last one.
NO_CACHE = AutocastKwargs(cache_enabled=False)


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived.

    Attributes:
        checkpoint: what was written of the last whole iteration; None while the run was in doubt.
    """

    def __init__(self, number: int, checkpoint: Path | None) -> None:
        super().__init__(number)
        self.checkpoint = checkpoint


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
        health: the last measurement of the student beside its teacher, by name; empty where nothing is measured.
        doubts: what was wrong with it, and what of this iteration was not finite.
    """

    stage: int
    step: int
    steps: int
    losses: Mapping[str, float]
    images_per_second: float
    seconds_left: float
    health: Mapping[str, float] = field(default_factory=dict)
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainerSettings:
    """How long and how a stage is played.

    Attributes:
        steps: iterations.
        batch_size: samples per micro-batch and process.
        accumulate: micro-batches per update and process.
        groups: how many micro-batches all processes play at the same time, each of them those of one group.
        seed: of the run; all randomness of an iteration derives from (seed, stage, step, micro-batch).
        checkpoint_every: iterations.
        stage: number of the stage, from 0.
        first_step: iterations of the stages before, so that checkpoints of a run count on.
        skips: so many iterations in a row may have an update skipped, because its loss or gradient was not finite;
            one more stops the run.
    """

    steps: int
    batch_size: int
    accumulate: int = 1
    groups: int = 1
    seed: int = 0
    checkpoint_every: int = 500
    stage: int = 0
    first_step: int = 0
    skips: int = 3


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
        monitor: watches whether the student is well, or None.
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
    monitor: Monitor | None = None
    step: int = 0
    _skips: int = field(default=0, init=False)
    _wrong: list[str] = field(default_factory=list, init=False)
    _signal: int | None = field(default=None, init=False)
    _pace: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=50), init=False)

    def run(self) -> None:
        """Plays until the last step, from wherever `resume` left it.

        Raises:
            Interrupted: after SIGINT or SIGTERM, with a checkpoint of the last whole iteration.
            UserError: the student has collapsed, losses are not finite again and again, or a checkpoint could not be
                written.
        """
        with self._catching_signals(), kept_heap(self.accelerator.device):
            if self.monitor is not None:
                with self.accelerator.autocast(NO_CACHE):
                    self.monitor.begin()
            while self.step < self.settings.steps:
                self._iterate()
                self._stop_if_ill()
                stopped = self._stopped()
                saved = self.save() if stopped is not None or self._saves else None
                if stopped is not None:
                    raise Interrupted(stopped, saved)

    def save(self) -> Path | None:
        """Writes a checkpoint of the present state (the main process does); all processes have to call it.

        While the run is in doubt nothing is written, so that every checkpoint is a good one, and none of these is
        removed to make room for a bad one.

        Raises:
            RuntimeError: the processes' weights differ.
        """
        if self.checkpoints is None or self._in_doubt:
            return None
        roles: dict[str, Any] = gathered({name: self.cast.tensors(name) for name in self.cast.kept})
        check_agreement(self.accelerator, roles)
        roles |= {f"{PARKED}{key}": tensors for key, tensors in self.cast.parked.items()}
        scaler = self.accelerator.scaler
        state = {
            "stage": self.settings.stage,
            "step": self.step,
            "drawn": self.batches.drawn,
            "players": {name: player.state() for name, player in self.players.items()},
            "scaler": None if scaler is None else scaler.state_dict(),
            "health": None if self.monitor is None else self.monitor.state(),
        }
        number = self.settings.first_step + self.step
        if self.accelerator.is_main_process:
            self.checkpoints.save(number, roles, state)
        self.accelerator.wait_for_everyone()
        return self.checkpoints.path(number)

    def resume(self, roles: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any]) -> None:
        """Restores what `save` wrote; the next iteration then is bit-identical to an uninterrupted one."""
        for name in self.cast.kept:
            copy_into(self.cast.tensors(name), roles.get(name, {}), f"checkpoint of role {name!r}")
        for name, player in self.players.items():
            player.load_state(state["players"][name])
        parked = {name: tensors for name, tensors in roles.items() if name.startswith(PARKED)}
        self.cast.parked.update({name.removeprefix(PARKED): dict(tensors) for name, tensors in parked.items()})
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.monitor is not None and state.get("health") is not None:
            self.monitor.load_state(state["health"])
        self.batches.restore(state["drawn"])
        self.step = state["step"]

    @property
    def _saves(self) -> bool:
        """Whether a checkpoint is due after the iterations so far."""
        return self.step == self.settings.steps or self.step % self.settings.checkpoint_every == 0

    @property
    def _in_doubt(self) -> bool:
        return self._skips > 0 or (self.monitor is not None and self.monitor.strikes > 0)

    def _iterate(self) -> None:
        began = time.monotonic()
        # Everything random below is a function of (seed, stage, step), so resuming needs no generator's state. All
        # processes draw the numbers of process 0.
        torch.manual_seed(seed_of(self.settings.seed, 0, self.settings.stage, self.step))
        values: dict[str, float] = {}
        turn = 0
        self._wrong = []
        for phase in self.objective.phases(self.step):
            for _ in range(phase.repeats):
                values.update(self._run_phase(phase, turn))
                turn += self.settings.accumulate * self.settings.groups
        self.objective.after_step(self.cast, self.step)
        self.step += 1
        self._skips = self._skips + 1 if self._wrong else 0
        if self._wrong:
            values["skipped"] = float(len(self._wrong))
        values.update(self._examine())
        self._pace.append((time.monotonic() - began, self.settings.batch_size * self.settings.accumulate))
        self._report(values)

    def _run_phase(self, phase: Phase, turn: int) -> dict[str, float]:
        """One update of the phase's roles: accumulate gradients over micro-batches, then every player steps."""
        sums: dict[str, torch.Tensor] = {}
        before = [buffer.clone() for buffer in self.cast.buffers()]
        with self.cast.trainable(phase.updates):
            for micro in range(self.settings.accumulate):
                number = turn + micro * self.settings.groups + self._group
                with self._draws(number):
                    batch = self.batches.next(phase.stream, self.settings.batch_size, self.settings.groups)
                    with self.accelerator.autocast(NO_CACHE):
                        loss = phase.loss(self.cast, batch, Step(self.step, self.settings.seed, number))
                self.accelerator.backward(loss.total / self.settings.accumulate)
                for name, value in (*loss.terms.items(), *loss.logged.items()):
                    sums[name] = sums.get(name, 0) + value.detach() / self.settings.accumulate
            values = {name: float(value) for name, value in sums.items()}
            if not self._update(phase, values):
                for buffer, value in zip(self.cast.buffers(), before, strict=True):
                    buffer.copy_(value)
        return values

    @property
    def _parts(self) -> int:
        """How many processes share a micro-batch."""
        return int(self.accelerator.num_processes) // self.settings.groups

    @property
    def _group(self) -> int:
        """Which of the micro-batches that are played at the same time is this process's."""
        return int(self.accelerator.process_index) // self._parts

    def _draws(self, number: int) -> AbstractContextManager[object]:
        """Random numbers of a micro-batch, the same however many processes play it."""
        if self.settings.accumulate * self.settings.groups > 1:  # whoever plays it has not played all those before
            torch.manual_seed(seed_of(self.settings.seed, "micro", self.settings.stage, self.step, number))
        if self._parts == 1:
            return nullcontext()
        return SlicedDraws(self.settings.batch_size, self.accelerator.process_index % self._parts, self._parts)

    def _update(self, phase: Phase, values: dict[str, float]) -> bool:
        """All of the phase's players step, or none does => whether they did; notes what was not finite."""
        wrong = [name for name, value in values.items() if not math.isfinite(value)]
        ready = not self._anywhere(bool(wrong))
        if ready:
            norms = {f"{role}/gradient_norm": self.players[role].prepare() for role in phase.updates}
            wrong = [name for name, norm in norms.items() if not math.isfinite(norm)]
            values.update(norms)
        elif not wrong:
            wrong = ["a loss on another process"]
        for role in phase.updates:
            player = self.players[role]
            (player.discard if wrong else player.apply)()
            values[f"{role}/learning_rate"] = player.learning_rate
        scaler = self.accelerator.scaler
        overflow = False
        if scaler is not None and ready:
            overflow = bool(wrong) and scaler.get_scale() > 1  # the scale was too large, which the scaler now mends
            scaler.update()
        if wrong and not overflow:
            self._wrong.append(f"phase {phase.name!r}: {', '.join(wrong)} is not finite")
        return not wrong

    def _anywhere(self, here: bool) -> bool:
        """Whether it is so on any process: all of them update their weights or none does."""
        if self.accelerator.num_processes == 1:
            return here
        flag = torch.tensor(float(here), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum") > 0)

    def _stopped(self) -> int | None:
        """The signal that any process got: all of them stop after the same iteration, or none does."""
        here = self._signal
        if self._anywhere(here is not None):
            return signal.SIGTERM if here is None else here
        return None

    def _examine(self) -> dict[str, float]:
        """The monitor's measures where they are due: now and then, and before every checkpoint."""
        if self.monitor is None or not (self._saves or self.step % self.monitor.settings.every == 0):
            return {}
        with self.accelerator.autocast(NO_CACHE):
            measures = self.monitor.examine(self.step)
        return {f"health/{name}": value for name, value in measures.items()}

    def _stop_if_ill(self) -> None:
        """Raises UserError with a diagnosis, and with the way back to the last good checkpoint."""
        where = f"stage {self.settings.stage + 1}, step {self.step}"
        monitor = self.monitor
        if self._skips > self.settings.skips:
            measures = "" if monitor is None or not monitor.latest else f" Last measured: {monitor.summary()}."
            raise UserError(f"{where}: {'; '.join(dict.fromkeys(self._wrong))}; {self._skips} step(s) in a row were "
                            "skipped for that, and no weight was touched. Lower the learning rate or the clipping, "
                            "or use precision bf16 or fp32."
                            f"{measures} {self._way_back()}")  # fmt: skip
        if monitor is not None and monitor.has_collapsed(last=self.step == self.settings.steps):
            raise UserError(f"{where}: {monitor.diagnosis()} {self._way_back()}")

    def _way_back(self) -> str:
        steps = [] if self.checkpoints is None else self.checkpoints.steps()
        if self.checkpoints is None or not steps:
            return "No checkpoint had been written yet."
        return (f"The last good checkpoint is {self.checkpoints.path(steps[-1])}; make a pipeline of it with: "
                f"stepdistill export {self.checkpoints.folder.parent} --checkpoint {steps[-1]}")  # fmt: skip

    def _report(self, values: Mapping[str, float]) -> None:
        values = {name: value for name, value in values.items() if math.isfinite(value)}  # JSON has no other numbers
        health, doubts = ({}, ()) if self.monitor is None else (self.monitor.latest, self.monitor.doubts)
        seconds = sum(s for s, _ in self._pace)
        images = sum(n for _, n in self._pace) * self.accelerator.num_processes
        left = (self.settings.steps - self.step) * seconds / len(self._pace)
        progress = Progress(self.settings.stage, self.step, self.settings.steps, values, images / seconds, left,
                            health, (*doubts, *self._wrong))  # fmt: skip
        if self.log is not None and self.accelerator.is_main_process:
            line = {"stage": self.settings.stage, "step": self.step, **values,
                    "seconds": self._pace[-1][0], "images_per_second": progress.images_per_second}  # fmt: skip
            _append(self.log, json.dumps(line) + "\n")
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


def _append(log: Path, line: str) -> None:
    try:
        with log.open("a") as file:
            file.write(line)
    except OSError as error:
        raise UserError(f"{log} could not be written ({error.strerror}); checkpoints are intact: make room and "
                        "run the same command again to go on from the last one") from error  # fmt: skip
