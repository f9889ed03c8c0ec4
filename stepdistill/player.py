"""A player: one trained role's parameters with their optimiser, learning rate, moving average and clipping."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler

from stepdistill.errors import UserError, first_line
from stepdistill.processes.sharding import gathered, optimizer_state_like, placed_like, whole


# torch's default on a CPU goes through the parameters one by one in Python, which costs as much as a network pass; on
# an accelerator it makes copies of all of them. The fused kernels do neither.
FUSED = (torch.optim.Adam, torch.optim.AdamW)  # the two that sharded parameters (FSDP2) take, too
IMPLEMENTATIONS = ("fused", "foreach", "differentiable")  # options that choose one, in which case it is the recipe's
REFUSALS = (TypeError, ValueError, LookupError, RuntimeError)  # what optimisers raise for options


@dataclass(frozen=True)
class PlayerSettings:
    """How a role learns.

    Attributes:
        optimizer: a class of torch.optim, or any optimiser class.
        options: its keyword arguments.
        schedule: a name of `diffusers.optimization.get_scheduler`.
        warmup_steps: optimiser steps.
        total_steps: optimiser steps of the stage, for schedules that end.
        clip: largest norm of the role's gradient; None for no limit.
        ema: decay of the moving average of the weights; None for none.
        where: the optimiser's place in a recipe, for errors; empty: that of a stage that is not known.
    """

    optimizer: type[torch.optim.Optimizer]
    options: Mapping[str, Any]
    schedule: str = "constant"
    warmup_steps: int = 0
    total_steps: int = 1
    clip: float | None = 1.0
    ema: float | None = None
    where: str = ""


class Player:
    """Turns gradients into updates for one role.

    Gradients are averaged over processes here, in one flattened reduction per step: a DistributedDataParallel wrapper
    around a network that several roles share would leave some roles' gradients local to each process.

    Args:
        name: of the role.
        parameters: by file name.
        settings: how it learns.
        accelerator: gives the loss scaler, if any, and the process group.

    Raises:
        UserError: the optimiser does not take its options, or not these parameters.
    """

    def __init__(
        self, name: str, parameters: Mapping[str, nn.Parameter], settings: PlayerSettings, accelerator: Accelerator
    ) -> None:
        self.name = name
        self.parameters = dict(parameters)
        self._settings, self._accelerator = settings, accelerator
        values = list(self.parameters.values())
        where = settings.where or f"players.{name}.optimizer"
        self.optimizer = open_optimizer(settings.optimizer, values, with_fused_kernels(settings, values), where)
        self._scheduler: LRScheduler = get_scheduler(
            settings.schedule, self.optimizer,
            num_warmup_steps=settings.warmup_steps, num_training_steps=settings.total_steps,
        )  # fmt: skip
        self._ema = None if settings.ema is None else EMAModel(values, decay=settings.ema)
        self.updates = 0

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return float(self._scheduler.get_last_lr()[0])

    @property
    def averages(self) -> list[Tensor]:
        """The moving averages of the parameters; none where the role keeps none."""
        return [] if self._ema is None else list(self._ema.shadow_params)

    def step(self) -> float:
        """One update from the gradients accumulated so far => the gradient's norm before clipping.

        A gradient that is not finite leaves everything as it was.
        """
        norm = self.prepare()
        if math.isfinite(norm):
            self.apply()
        else:
            self.discard()
        return norm

    def prepare(self) -> float:
        """Averages, unscales and clips the gradients accumulated so far => their norm before clipping.

        Under a loss scaler (fp16) the scaler's own `update` is the caller's: all roles of one backward pass have to be
        unscaled by the same scale, which accelerate's wrapped optimiser, who updates it at every step, does not grant.

        Raises:
            UserError: no parameter got a gradient, so the objective does not train this role.
        """
        values = list(self.parameters.values())
        if all(p.grad is None for p in values):
            raise UserError(f"role {self.name!r} got no gradient: its phase's loss does not depend on its weights")
        self._reduce(values)
        scaler = self._accelerator.scaler
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        limit = float("inf") if self._settings.clip is None else self._settings.clip
        return float(whole(torch.nn.utils.clip_grad_norm_(values, limit)))

    def apply(self) -> None:
        """The update that `prepare` made ready."""
        if self._accelerator.scaler is None:
            self.optimizer.step()
        else:
            self._accelerator.scaler.step(self.optimizer)
        self._scheduler.step()
        self.updates += 1
        if self._ema is not None:
            self._ema.step(list(self.parameters.values()))
        self.discard()

    def discard(self) -> None:
        """Forgets the gradients; weights, averages and schedules stay as they are."""
        self.optimizer.zero_grad()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the role computes with its averaged weights, if it keeps any."""
        if self._ema is None:
            yield
            return
        values = list(self.parameters.values())
        self._ema.store(values)
        self._ema.copy_to(values)
        try:
            yield
        finally:
            self._ema.restore(values)

    def state(self) -> dict[str, Any]:
        """Everything that the next update depends on besides the weights, whole; all processes have to ask for it."""
        state: dict[str, Any] = gathered(self._state())
        return state

    def _state(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "ema": None if self._ema is None else {"names": list(self.parameters), **self._ema.state_dict()},
            "updates": self.updates,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores what `state` returned."""
        values = list(self.parameters.values())
        self.optimizer.load_state_dict(optimizer_state_like(state["optimizer"], values))
        self._scheduler.load_state_dict(state["scheduler"])
        if self._ema is not None and state["ema"] is not None:
            shadows = [placed_like(*pair) for pair in zip(state["ema"]["shadow_params"], values, strict=True)]
            told = {key: value for key, value in state["ema"].items() if key != "names"}
            self._ema.load_state_dict({**told, "shadow_params": shadows})
            self._ema.to(device=self._accelerator.device)
        self.updates = state["updates"]

    def _reduce(self, values: list[nn.Parameter]) -> None:
        if self._accelerator.num_processes == 1 or isinstance(values[0], DTensor):  # FSDP2 has averaged those already
            return
        grads: list[Tensor] = [p.grad if p.grad is not None else torch.zeros_like(p) for p in values]
        flat = self._accelerator.reduce(torch.cat([g.flatten() for g in grads]), reduction="mean")
        for parameter, part in zip(values, flat.split([g.numel() for g in grads]), strict=True):
            parameter.grad = part.view_as(parameter)


def with_fused_kernels(settings: PlayerSettings, values: Sequence[nn.Parameter]) -> dict[str, Any]:
    """The optimiser's options, with torch's fused kernels where it has them and the recipe does not choose."""
    options = dict(settings.options)
    chosen = any(name in options for name in IMPLEMENTATIONS)
    if settings.optimizer in FUSED and not chosen and all(not value.is_meta for value in values):
        options["fused"] = True
    return options


def open_optimizer(
    kind: type[torch.optim.Optimizer], values: Sequence[nn.Parameter], options: Mapping[str, Any], where: str
) -> torch.optim.Optimizer:
    """An optimiser of parameters.

    Args:
        kind: its class.
        values: the parameters.
        options: keyword arguments.
        where: begins what errors say; the option that is to blame is put behind it.

    Raises:
        UserError: it does not take the options, or not these parameters.
    """
    try:
        return kind(values, **options)
    except REFUSALS as error:
        key = _refused(kind, values, options)
        place, what = (where, "these options") if key is None else (f"{where}.{key}", reprlib.repr(options[key]))
        raise UserError(f"{place}: {kind.__name__} does not take {what} ({first_line(error)}); see the documentation "
                        f"of {kind.__module__}.{kind.__qualname__}") from error  # fmt: skip


def _refused(
    kind: type[torch.optim.Optimizer], values: Sequence[nn.Parameter], options: Mapping[str, Any]
) -> str | None:
    """The one option without which an optimiser could be made; None if there is none, or more than one."""
    found = []
    for key in options:
        try:
            kind(values, **{other: value for other, value in options.items() if other != key})
        except REFUSALS:
            continue
        found.append(key)
    return found[0] if len(found) == 1 else None
