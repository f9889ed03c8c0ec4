"""The teacher's own sampler: a stock Diffusers scheduler, run over a denoiser.

Letters: B batch, C channels, H height, W width, K kept states.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from copy import deepcopy
from math import log
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from stepdistill.condition import Condition
from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.schedule import FlowSchedule, even_sigmas


if TYPE_CHECKING:
    from diffusers import SchedulerMixin

# name => stock scheduler; only deterministic ones, since a pair is a function of its noise
SAMPLERS = {
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}
FLOW_SAMPLERS = {"euler": "FlowMatchEulerDiscreteScheduler"}
# Trailing spacing begins at the last training timestep, the only one at which pure noise is what the network expects;
# DMD2's code makes its pairs so. Clipping is meant for pixels and would cut latents.
CHOICES = {"timestep_spacing": "trailing", "clip_sample": False, "thresholding": False}


class Trajectory(NamedTuple):
    """What a sampler made of a batch of noise.

    Attributes:
        sample: the finished latents, (B, C, H, W).
        states: what the network was given at the timesteps that were asked for, (B, K, C, H, W); None for K = 0.
        predictions: what the guided network said there, (B, K, C, H, W); None for K = 0.
    """

    sample: Tensor
    states: Tensor | None
    predictions: Tensor | None


class StockSampler:
    """Noise => the teacher's sample, with the numbers of the stock pipeline of the same scheduler.

    Args:
        denoiser: the teacher.
        config: of the teacher's own scheduler, which names the noise levels.
        name: of the scheduler, a key of `SAMPLERS` (for flow matching, of `FLOW_SAMPLERS`); or a scheduler, of which a
            copy is taken as it is.
        steps: how many.
        guidance: standard scale, 1 = none.
        keep: timesteps whose states are returned, falling; or "all" that are visited.

    Attributes:
        kept: the timesteps whose states are returned, falling.

    Raises:
        UserError: the scheduler is unknown, or does not visit a timestep to keep.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        config: Mapping[str, Any],
        *,
        name: str | SchedulerMixin = "ddim",
        steps: int = 50,
        guidance: float = 1.0,
        keep: Sequence[int] | Literal["all"] = (),
    ) -> None:
        self._denoiser, self._steps, self._guidance = denoiser, steps, guidance
        self._flow = denoiser.kind == "flow"
        self._scheduler = _scheduler(name, config, denoiser)
        self._set_timesteps(None)
        visited = self.timesteps
        self.kept = visited if keep == "all" else [_visited(timestep, visited) for timestep in keep]

    @property
    def timesteps(self) -> list[float]:
        """Where the network is called, falling."""
        return [float(t) for t in self._scheduler.timesteps]

    @property
    def facts(self) -> dict[str, Any]:
        """The scheduler's class and configuration."""
        config = {key: value for key, value in self._scheduler.config.items() if not key.startswith("_")}
        return {"class": type(self._scheduler).__name__, **config}

    @torch.no_grad()
    def __call__(
        self, noise: Tensor, condition: Condition, null: Condition, guidance: Tensor | None = None
    ) -> Trajectory:
        """Runs all steps.

        Args:
            noise: unit-variance noise, (B, C, H, W).
            condition: B rows.
            null: B rows.
            guidance: a scale for each row, (B,); None: the sampler's own.
        """
        scheduler, schedule = self._scheduler, self._denoiser.schedule
        self._set_timesteps(noise.device)  # multi-step schedulers forget the batch before
        # Flow-matching schedulers have neither an initial scale nor an input scale.
        x = noise if self._flow else noise * scheduler.init_noise_sigma
        scale = self._guidance if guidance is None else guidance
        states, predictions = [], []
        for timestep in scheduler.timesteps:
            seen = x if self._flow else scheduler.scale_model_input(x, timestep)
            t = schedule.t_from_model_time(timestep.double()).expand(len(x))
            native = self._denoiser.guided(seen, t, condition, null, scale).native
            if float(timestep) in self.kept:
                states.append(seen)
                predictions.append(native)
            x = scheduler.step(native, timestep, x, return_dict=False)[0]
        kept = [torch.stack(list_, dim=1) if list_ else None for list_ in (states, predictions)]
        return Trajectory(x, *kept)

    def _set_timesteps(self, device: torch.device | None) -> None:
        """Spaces the steps as the stock pipeline of this architecture does."""
        scheduler, schedule = self._scheduler, self._denoiser.schedule
        options: dict[str, Any] = {}
        if self._denoiser.even_sigmas:
            options["sigmas"] = even_sigmas(self._steps)
        if scheduler.config.get("use_dynamic_shifting") and isinstance(schedule, FlowSchedule):
            linear = scheduler.config.get("time_shift_type") == "linear"  # the other kind is the exponential
            options["mu"] = schedule.shift if linear else log(schedule.shift)
        scheduler.set_timesteps(self._steps, device=device, **options)


def _scheduler(name: str | SchedulerMixin, config: Mapping[str, Any], denoiser: Denoiser) -> Any:
    import diffusers

    if not isinstance(name, str):
        return deepcopy(name)
    flow = isinstance(denoiser.schedule, FlowSchedule)
    table, choices = (FLOW_SAMPLERS if flow else SAMPLERS), dict(CHOICES)
    if isinstance(denoiser.schedule, FlowSchedule):
        # Other classes call the shift otherwise, and one that follows from the size of the image is settled by now.
        choices |= {"shift": denoiser.schedule.shift, "use_dynamic_shifting": False}
    if name not in table:
        raise UserError(f"sampler: {name!r} does not fit this teacher; choose from {', '.join(table)}")
    kind = getattr(diffusers, table[name])
    accepted = inspect.signature(kind.__init__).parameters
    return kind.from_config(config, **{key: value for key, value in choices.items() if key in accepted})


def _visited(timestep: int, timesteps: Sequence[float]) -> float:
    if timestep not in timesteps:
        near = sorted(sorted(timesteps, key=lambda t: abs(t - timestep))[:2], reverse=True)
        raise UserError(
            f"states: the sampler does not visit timestep {timestep}; the nearest of its {len(timesteps)} steps are "
            + " and ".join(f"{t:g}" for t in near)
        )
    return float(timestep)
