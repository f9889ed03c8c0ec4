"""A stock pipeline led through a part of its schedule, and told what each of its network calls predicts.

A pipeline asks its scheduler for everything about time: where to call the network, what to make of the answer. So a
scheduler that shows a part of its timesteps is enough to stop any stock pipeline early or to let it begin late, with
its own text encoding and guidance. Letters: B rows, C channels, H height, W width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.prediction import Levels, Prediction
from stepdistill.schedule import flow_schedule


class Seen(NamedTuple):
    """One network call of a pipeline.

    Attributes:
        timestep: where.
        x0: the clean latents that its (guided) answer amounts to, (B, C, H, W), or FLUX's packed ones, (B, N, 4 C); 2B
            rows, of which the second half repeats the first, where a pipeline steps both halves of its guidance.
        base: whether it is a call of the base model of hybrid sampling.
    """

    timestep: float
    x0: Tensor
    base: bool = False


Watch = Callable[[Seen], None]


class Stretch:
    """Stands for a scheduler, and shows the timesteps `start` to `stop` of its schedule alone.

    Everything else is the scheduler's own. Its list of timesteps stays whole: schedulers look up in it where they are
    and where they go next.

    Args:
        scheduler: a stock one.
        start: number of the first timestep that is shown; a pipeline that begins later than the schedule is given
            latents that are scaled already.
        stop: number of the first that is not shown any more; None: to the end.
        grid: arguments for `set_timesteps` in place of the pipeline's number of steps.
        entry: latents to begin with, (B, C, H, W), for pipelines that have no argument for them.
        watch: is told about every call.

    Attributes:
        latents: what the latest step made, (B, C, H, W).
    """

    def __init__(
        self,
        scheduler: Any,
        *,
        start: int = 0,
        stop: int | None = None,
        grid: Mapping[str, Any] | None = None,
        entry: Tensor | None = None,
        watch: Watch | None = None,
    ) -> None:
        self._inner = scheduler
        self._shown, self._grid, self._entry, self._watch = slice(start, stop), grid, entry, watch
        self.latents: Tensor | None = None
        # Pipelines read the signatures of these, to see which arguments they take.
        self.step = _in_place_of(scheduler.step, self._step)
        self.set_timesteps = _in_place_of(scheduler.set_timesteps, self._set_timesteps)
        if entry is not None:
            self.scale_model_input = self._enter

    def __getattr__(self, name: str) -> Any:
        if name == "_inner":  # asked for before it is there, by whoever copies this object
            raise AttributeError(name)
        return getattr(self._inner, name)

    @property
    def timesteps(self) -> Tensor:
        """Where the pipeline calls its network, falling."""
        shown: Tensor = self._inner.timesteps[self._shown]
        return shown

    @property
    def init_noise_sigma(self) -> Any:
        """What the pipeline multiplies the latents by that it begins with."""
        return 1.0 if self._shown.start else self._inner.init_noise_sigma

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Does nothing: pipelines that say they begin at 0 mean the beginning of what they are shown."""

    def _set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        if self._grid is None:
            self._inner.set_timesteps(*args, **kwargs)
        else:
            self._inner.set_timesteps(**self._grid, device=kwargs.get("device"))

    def _step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._watch is not None:
            self._watch(Seen(float(timestep), clean_prediction(self._inner, model_output, timestep, sample)))
        result = self._inner.step(model_output, timestep, sample, *args, **kwargs)
        self.latents = result[0]
        if isinstance(result, tuple) and len(result) == 1:
            # Of a single step, PixArt's pipeline takes the second that schedulers return: the clean prediction.
            result = (*result, clean_prediction(self._inner, model_output, timestep, sample))
        return result

    def _enter(self, sample: Tensor, timestep: Any) -> Tensor:
        """The latents to begin with in the place of the pipeline's noise, once for each half of its guidance."""
        if self._entry is not None:
            sample, self._entry = self._entry.repeat(len(sample) // len(self._entry), 1, 1, 1).to(sample), None
        scaled: Tensor = self._inner.scale_model_input(sample, timestep)
        return scaled


def _in_place_of(method: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """Ours, with the other's signature."""
    return functools.update_wrapper(functools.partial(ours), method)


def clean_prediction(scheduler: Any, model_output: Tensor, timestep: Any, sample: Tensor) -> Tensor:
    """What a network's answer amounts to as clean latents: (x_t - sigma eps) / alpha if it says eps.

    Args:
        scheduler: a stock one that has been told its timesteps.
        model_output: the answer, (B, C, H, W), or packed, (B, N, 4 C).
        timestep: where the network was called.
        sample: what the scheduler is stepping, of the same shape, in the scheduler's own scale.

    Returns:
        Latents of the same shape.

    Raises:
        UserError: a scheduler whose noise levels are not known here.
    """
    flow = is_flow(scheduler)
    seen = sample if flow else scheduler.scale_model_input(sample, timestep)
    ones = (1,) * sample.ndim
    alpha, sigma = (level.to(sample.device).reshape(ones) for level in levels(scheduler, float(timestep)))
    # Slopes belong to the velocity alone.
    there = Levels(alpha, sigma, torch.zeros_like(alpha), torch.zeros_like(sigma))
    kind = "flow" if flow else str(scheduler.config.get("prediction_type", "epsilon"))
    return Prediction(model_output, kind, seen, there).x0


def levels(scheduler: Any, timestep: float) -> tuple[Tensor, Tensor]:
    """alpha and sigma where a scheduler tells its network `timestep`, float64 scalars.

    Raises:
        UserError: neither flow matching nor a table of alphas.
    """
    if is_flow(scheduler):
        sigma = torch.tensor(timestep / scheduler.config.num_train_timesteps, dtype=torch.float64)
        return 1 - sigma, sigma
    table = vars(scheduler).get("alphas_cumprod")
    if table is None:
        raise UserError(f"{type(scheduler).__name__} has no table of noise levels, so what it is given cannot be read "
                        "as a clean image")  # fmt: skip
    below = int(timestep)
    near = table[below : below + 2].double().cpu()
    share = timestep - below  # Euler's evenly spaced timesteps are no integers
    alpha_squared = near[0] if share == 0 else near[0] + share * (near[1] - near[0])
    return alpha_squared.sqrt(), (1 - alpha_squared).sqrt()


def is_flow(scheduler: Any) -> bool:
    """Whether it is one of flow matching, whose latents are (1 - sigma) x0 + sigma eps."""
    return flow_schedule({**scheduler.config, "_class_name": type(scheduler).__name__}) is not None
