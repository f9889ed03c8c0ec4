"""The stock scheduler that calls a student as it was trained: same timesteps, same levels, same noise between."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from stepdistill.errors import UserError
from stepdistill.schedule import FlowSchedule, even_sigmas, flow_schedule
from stepdistill.times import grid


if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from stepdistill.families.base import ModelFamily
    from stepdistill.objectives.base import InferenceSpec


STOCHASTIC, DETERMINISTIC, TCD, OWN = "stochastic", "deterministic", "tcd", "own"
DEFAULT_ETA = 0.3  # of TCDScheduler, where a pipeline says nothing
_BETA_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
_NATIVE_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")  # what LCM and Euler both compute
_PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
_SAME_SIGMA = 1e-5  # flow schedulers compute in float32


def family_scheduler(family: ModelFamily, spec: InferenceSpec) -> SchedulerMixin:
    """The student's scheduler for a family's stock pipeline; see `student_scheduler`.

    Raises:
        UserError: no stock scheduler can express the spec, or the stock pipeline cannot call it as it says.
    """
    if spec.sampler == OWN:
        return copy.deepcopy(family.pipeline.scheduler)
    name = family.pipeline_class
    table = family.kind != "flow"  # flow schedulers know neither an initial scale nor eta
    if table and spec.sampler == DETERMINISTIC and not family.scales_noise:
        raise UserError(
            f"{name} gives its network unscaled noise, so a {DETERMINISTIC} student, which begins with scaled noise, "
            f"cannot be exported; train it with sampler: {STOCHASTIC}"
        )
    if table and spec.sampler == TCD and not family.takes_eta and spec.eta != DEFAULT_ETA:
        raise UserError(
            f"{name} has no argument eta, so its scheduler takes its own {DEFAULT_ETA:g}; a student with sampler "
            f"{TCD} and eta {spec.eta:g} cannot be exported, eta: {DEFAULT_ETA:g} or sampler: {STOCHASTIC} can"
        )
    scheduler = family.pipeline.scheduler
    # A scheduler made in memory does not name its class in its configuration.
    config = {**scheduler.config, "_class_name": type(scheduler).__name__}
    if isinstance(family.schedule, FlowSchedule):
        config["shift"] = family.schedule.shift  # where it follows from the size of the images, it is settled by now
    return student_scheduler(config, spec, even=family.even_sigmas)


def student_scheduler(teacher_config: Mapping[str, Any], spec: InferenceSpec, *, even: bool = False) -> SchedulerMixin:
    """The stock scheduler whose own `set_timesteps(N)` gives exactly the student's timesteps and noise levels.

    On a table of betas, stochastic students (x0, then fresh noise) get an LCMScheduler, deterministic ones an
    EulerDiscreteScheduler with trailing spacing, tcd ones a TCDScheduler; of flow-matching teachers, a
    FlowMatchLCMScheduler or a FlowMatchEulerDiscreteScheduler. A schedule that starts below the last training timestep
    is written as a shorter table of betas; the noise levels stay the teacher's. Every value is explicit, none is
    inherited from the teacher's sampler, whose clipping, offsets and spacing made exported students wrong elsewhere.

    Args:
        teacher_config: config of the teacher's Diffusers scheduler, with its `_class_name` if it is flow matching.
        spec: timesteps (falling), sampler.
        even: see `ModelFamily.even_sigmas`.

    Returns:
        A scheduler that is fed unit-variance noise; the Euler scheduler is fed sigma * noise.

    Raises:
        UserError: no stock scheduler can express it; the text says what can be done.
    """
    if spec.sampler not in (STOCHASTIC, DETERMINISTIC, TCD):
        raise UserError(
            f"sampler {spec.sampler!r} is unknown; the samplers are {STOCHASTIC}, {DETERMINISTIC} and {TCD}"
        )
    flow = flow_schedule(teacher_config)
    return _table_scheduler(teacher_config, spec) if flow is None else _flow_scheduler(flow, spec, even=even)


def input_scale(scheduler: SchedulerMixin) -> float:
    """What unit-variance noise is multiplied by before the network sees it at the first timestep."""
    from diffusers import EulerDiscreteScheduler

    if isinstance(scheduler, EulerDiscreteScheduler):
        sigma = float(scheduler.init_noise_sigma)
        return sigma / math.sqrt(sigma**2 + 1)
    return 1.0


def told_timesteps(scheduler: Any, spec: InferenceSpec, *, even: bool = False) -> list[float]:
    """What the network is told at each step: the spec's indices; of a flow-matching student, 1000 sigma.

    Args:
        scheduler: the student's.
        spec: how it is called.
        even: see `ModelFamily.even_sigmas`.
    """
    if not _matches_flow(scheduler):
        return list(spec.timesteps)
    visited: list[float] = _visited(scheduler, spec.num_steps, even=even).timesteps.tolist()
    return visited


def noise_levels(scheduler: Any, spec: InferenceSpec, *, even: bool = False) -> list[float]:
    """Noise levels at the student's timesteps as other programs list a schedule: sigma/alpha; of a flow, sigma."""
    if _matches_flow(scheduler):
        sigmas: list[float] = _visited(scheduler, spec.num_steps, even=even).sigmas[:-1].tolist()
        return sigmas
    levels = [float(scheduler.alphas_cumprod[t]) for t in spec.timesteps]
    # Without any signal the ratio is infinite; Diffusers' Euler scheduler stands at the same 2**-24.
    return [((1 - a) / max(a, 2**-24)) ** 0.5 for a in levels]


def _matches_flow(scheduler: SchedulerMixin) -> bool:
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler

    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler | FlowMatchLCMScheduler)


def _visited(scheduler: Any, steps: int, *, even: bool = False) -> Any:
    """A copy after a pipeline's call for `steps` steps; `even`: of one that gives its scheduler even sigmas."""
    probe = copy.deepcopy(scheduler)
    probe.set_timesteps(steps, **({"sigmas": even_sigmas(steps)} if even else {}))
    return probe


# ---- tables of betas ---------------------------------------------------------------------------------------------


def _table_scheduler(teacher_config: Mapping[str, Any], spec: InferenceSpec) -> SchedulerMixin:
    timesteps = [int(t) for t in spec.timesteps]
    betas = teacher_betas(teacher_config)
    # LCM's and TCD's schedulers take timestep 0 for clean data.
    _check_timesteps(timesteps, len(betas), 0 if spec.sampler == DETERMINISTIC else 1)
    prediction_type = teacher_config.get("prediction_type", "epsilon")
    if prediction_type not in _PREDICTION_TYPES:
        raise UserError(
            f"prediction_type {prediction_type!r} has no stock few-step scheduler; "
            f"it can be {', '.join(_PREDICTION_TYPES)}"
        )
    zero_snr = bool(teacher_config.get("rescale_betas_zero_snr", False)) and timesteps[0] + 1 == len(betas)
    if zero_snr and prediction_type == "epsilon":
        raise UserError(
            "an epsilon prediction says nothing about the image at zero terminal SNR; start the student below "
            f"timestep {timesteps[0]} or give a teacher with v_prediction"
        )
    if spec.sampler == TCD:
        return _tcd_scheduler({**_clean_table(teacher_config, betas, timesteps), "prediction_type": prediction_type},
                              timesteps)  # fmt: skip
    common = {**_beta_config(teacher_config, betas, timesteps[0] + 1), "prediction_type": prediction_type}
    build = _lcm_scheduler if spec.sampler == STOCHASTIC else _euler_scheduler
    return build(common, timesteps)


def teacher_betas(teacher_config: Mapping[str, Any]) -> torch.Tensor:
    """The teacher's table of betas, (T,) float32 as Diffusers computes it, before any zero-SNR rescaling."""
    from diffusers import DDPMScheduler

    missing = [key for key in _BETA_KEYS if key not in teacher_config]
    if missing and teacher_config.get("trained_betas") is None:
        name = teacher_config.get("_class_name", "the teacher's scheduler")
        raise UserError(
            f"{name} is no flow-matching scheduler and has no table of betas (no {', '.join(missing)} in its config), "
            "so no stock few-step scheduler fits"
        )
    betas: torch.Tensor = DDPMScheduler(**_given_betas(teacher_config)).betas
    return betas


def _given_betas(teacher_config: Mapping[str, Any]) -> dict[str, Any]:
    """What the teacher's config says about its betas, with nothing left to a class's defaults."""
    keys = (*_BETA_KEYS, "trained_betas")
    given = {key: teacher_config[key] for key in keys if teacher_config.get(key) is not None}
    if "trained_betas" in given:
        given["trained_betas"] = [float(b) for b in given["trained_betas"]]
        given["num_train_timesteps"] = len(given["trained_betas"])
    return given


def _beta_config(teacher_config: Mapping[str, Any], betas: torch.Tensor, length: int) -> dict[str, Any]:
    """Scheduler options for the first `length` noise levels of the teacher."""
    if length < len(betas):
        return _table_config(_rescaled(teacher_config, betas)[:length])
    config = _given_betas(teacher_config)
    if "trained_betas" not in config and config["beta_schedule"] not in _NATIVE_BETA_SCHEDULES:
        config = {"num_train_timesteps": length, "trained_betas": betas.tolist()}
    return {**config, "rescale_betas_zero_snr": bool(teacher_config.get("rescale_betas_zero_snr", False))}


def _clean_table(teacher_config: Mapping[str, Any], betas: torch.Tensor, timesteps: Sequence[int]) -> dict[str, Any]:
    """Options for the same levels but the first, which becomes clean data.

    TCDScheduler ends at index 0, where the teacher's table still has noise: 0.03 for Stable Diffusion.
    """
    betas = _rescaled(teacher_config, betas)[: timesteps[0] + 1].double()
    betas[1] = 1 - (1 - betas[0]) * (1 - betas[1])
    betas[0] = 0
    return _table_config(betas)


def _rescaled(teacher_config: Mapping[str, Any], betas: torch.Tensor) -> torch.Tensor:
    """The betas after zero-SNR rescaling, if the teacher asks for it: other tables cannot be rescaled again."""
    from diffusers import DDPMScheduler

    if not teacher_config.get("rescale_betas_zero_snr", False):
        return betas
    table = {"num_train_timesteps": len(betas), "trained_betas": betas.tolist()}
    rescaled: torch.Tensor = DDPMScheduler(**table, rescale_betas_zero_snr=True).betas
    return rescaled


def _table_config(betas: torch.Tensor) -> dict[str, Any]:
    return {"num_train_timesteps": len(betas), "trained_betas": betas.tolist(), "rescale_betas_zero_snr": False}


def _check_timesteps(timesteps: list[int], num_train_timesteps: int, lowest: int) -> None:
    falling = all(a > b for a, b in pairwise(timesteps))
    if not timesteps or not falling or timesteps[0] >= num_train_timesteps or timesteps[-1] < lowest:
        raise UserError(
            f"timesteps {timesteps} must fall strictly from at most {num_train_timesteps - 1} to at least {lowest}"
        )


def _lcm_scheduler(common: Mapping[str, Any], timesteps: list[int]) -> SchedulerMixin:
    from diffusers import LCMScheduler

    # The scheduler mixes a trace of its input into x0, 2.5e-9 at t=999 but 2.5e-3 at t=1; a larger scaling makes it
    # x0 everywhere. steps_offset is not read by it, but StableDiffusionPipeline warns unless it is 1.
    return _on_a_grid(
        lambda original_steps: LCMScheduler(
            **common, original_inference_steps=original_steps, timestep_scaling=1000.0, clip_sample=False,
            set_alpha_to_one=True, steps_offset=1, thresholding=False,
        ),
        timesteps,
    )  # fmt: skip


def _tcd_scheduler(common: Mapping[str, Any], timesteps: list[int]) -> SchedulerMixin:
    from diffusers import TCDScheduler

    return _on_a_grid(
        lambda original_steps: TCDScheduler(
            **common, original_inference_steps=original_steps, timestep_spacing="trailing", clip_sample=False,
            set_alpha_to_one=True, steps_offset=1, thresholding=False,
        ),
        timesteps,
    )  # fmt: skip


def _on_a_grid(build: Callable[[int], Any], timesteps: list[int]) -> Any:
    """The scheduler whose grid of `original_inference_steps` contains the timesteps in even spacing.

    The smallest such grid: with N steps in it, the same scheduler serves all numbers that divide N.
    """
    total, count = timesteps[0] + 1, len(timesteps)
    probe = build(total)
    for original_steps in range(count, total + 1):
        probe.register_to_config(original_inference_steps=original_steps)
        probe.set_timesteps(count)
        if probe.timesteps.tolist() == timesteps:
            return _checked(build(original_steps), timesteps)
    probe.set_timesteps(count)
    raise _no_encoding(timesteps, probe.timesteps.tolist())


def _euler_scheduler(common: Mapping[str, Any], timesteps: list[int]) -> SchedulerMixin:
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(
        **common, timestep_spacing="trailing", steps_offset=1, interpolation_type="linear",
        final_sigmas_type="zero", timestep_type="discrete",
    )  # fmt: skip
    return _checked(scheduler, timesteps)


def _checked(scheduler: Any, timesteps: list[int]) -> Any:
    """The scheduler, after a copy has shown that a plain call with N steps visits exactly the student's timesteps."""
    visited = _visited(scheduler, len(timesteps)).timesteps.tolist()
    if visited != timesteps:
        raise _no_encoding(timesteps, visited)
    return scheduler


def _no_encoding(timesteps: Sequence[int], possible: Sequence[float]) -> UserError:
    return UserError(
        f"no stock Diffusers scheduler visits the timesteps {list(timesteps)} when it is asked for {len(timesteps)} "
        f"steps; train the student on evenly spaced ones, for example {[int(t) for t in possible]}"
    )


# ---- flow matching -----------------------------------------------------------------------------------------------


def _flow_scheduler(schedule: FlowSchedule, spec: InferenceSpec, *, even: bool = False) -> SchedulerMixin:
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler

    timesteps, total = [int(t) for t in spec.timesteps], schedule.num_train_timesteps
    _check_timesteps(timesteps, total, 0)
    if timesteps[0] != total - 1:
        raise UserError(f"flow-matching schedulers begin with pure noise; begin at timestep {total - 1}, not at "
                        f"{timesteps[0]}")  # fmt: skip
    if spec.sampler == TCD and spec.eta not in (0, 1):
        raise UserError(
            f"no stock flow-matching scheduler mixes predicted and fresh noise, so sampler {TCD} with eta "
            f"{spec.eta:g} cannot be exported; eta 0 ({DETERMINISTIC}) and eta 1 ({STOCHASTIC}) can"
        )
    fresh = spec.sampler == STOCHASTIC or (spec.sampler == TCD and spec.eta == 1)
    sigmas = schedule.sigma(grid(schedule, spec.timesteps, torch.device("cpu"))).tolist()
    found = (schedule.shift, None) if even else _shift_and_terminal(sigmas, schedule)
    if found is None:
        raise _no_flow_encoding(timesteps, total)
    shift, terminal = found
    common = {"num_train_timesteps": total, "shift": shift, "shift_terminal": terminal, "use_dynamic_shifting": False,
              "invert_sigmas": False, "use_karras_sigmas": False, "use_exponential_sigmas": False,
              "use_beta_sigmas": False}  # fmt: skip
    scheduler: Any = FlowMatchLCMScheduler(**common) if fresh else FlowMatchEulerDiscreteScheduler(**common)
    visited = _visited(scheduler, len(sigmas), even=even).sigmas[:-1].double()
    # "not <=" so that a NaN fails as well.
    if not float((visited - torch.tensor(sigmas)).abs().max()) <= _SAME_SIGMA:
        raise _no_flow_encoding(timesteps, total)
    return scheduler


def _no_flow_encoding(timesteps: Sequence[int], total: int) -> UserError:
    fitting = next(n for n in range(len(timesteps), 0, -1) if total % n == 0)
    return UserError(
        f"no stock flow-matching scheduler visits the timesteps {list(timesteps)}; train the student on evenly spaced "
        f"ones, for example {[total - 1 - i * total // fitting for i in range(fitting)]}"
    )


def _shift_and_terminal(sigmas: Sequence[float], schedule: FlowSchedule) -> tuple[float, float | None] | None:
    """Options `shift` and `shift_terminal` with which a flow scheduler visits these sigmas, if there can be any.

    The scheduler takes N even steps from 1 to its smallest sigma, applies the shift, and stretches the result so that
    it ends at the terminal. With u = i / (N - 1), a share r(u) = (1 - sigma_i) / (1 - sigma_last) of the way is done
    after i steps, and r = u (1 - q) / (1 - q u), where q = (1 - 1 / shift) (1 - smallest sigma), and smallest sigma =
    shift m / (1 + (shift - 1) m) with m = 1 / num_train_timesteps: the second sigma gives q, and q the shift.
    """
    last = len(sigmas) - 1
    if last == 0:
        return schedule.shift, None
    if last == 1:
        return schedule.shift, sigmas[1]
    u, r = 1 / last, (1 - sigmas[1]) / (1 - sigmas[-1])
    q, m = (u - r) / (u * (1 - r)), 1 / schedule.num_train_timesteps
    linear = (1 - m) * (1 - q)
    under_root = linear**2 - 4 * q * m * (1 - m)
    if under_root < 0:
        return None
    return 2 * (1 - m) / (linear + math.sqrt(under_root)), sigmas[-1]
