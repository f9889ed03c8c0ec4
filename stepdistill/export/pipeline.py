"""From a finished student to a folder that plain Diffusers loads: stock classes, the schedule inside.

Nobody who uses the folder needs this package, a custom scheduler, or a list of timesteps to paste:
`DiffusionPipeline.from_pretrained(folder)(prompt, num_inference_steps=N, guidance_scale=1)` is right as it stands.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepdistill.errors import UserError
from stepdistill.files import replacing


if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, SchedulerMixin
    from torch import nn

    from stepdistill.families.base import ModelFamily
    from stepdistill.objectives.base import InferenceSpec


FACTS_FILE = "distillation_config.json"
STOCHASTIC, DETERMINISTIC = "stochastic", "deterministic"
_BETA_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
_NATIVE_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")  # what LCM and Euler both compute
_PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def student_scheduler(teacher_config: Mapping[str, Any], spec: InferenceSpec) -> SchedulerMixin:
    """The stock scheduler whose own `set_timesteps(N)` gives exactly the student's timesteps, on the teacher's betas.

    Stochastic students (x0, then fresh noise) get an LCMScheduler, deterministic ones an EulerDiscreteScheduler with
    trailing spacing. A schedule that starts below the last training timestep is written as a shorter table of betas;
    the noise levels stay the teacher's. Every value is explicit, none is inherited from the teacher's sampler, whose
    clipping, offsets and spacing made exported students wrong elsewhere.

    Args:
        teacher_config: config of the teacher's Diffusers scheduler (a table of betas; not flow matching).
        spec: timesteps (falling), sampler.

    Returns:
        An LCMScheduler, fed unit-variance noise, or an EulerDiscreteScheduler, fed sigma * noise.

    Raises:
        UserError: no stock scheduler can express it; the text says what can be done.
    """
    timesteps = [int(t) for t in spec.timesteps]
    betas = teacher_betas(teacher_config)
    _check_timesteps(timesteps, len(betas), spec.sampler)
    prediction_type = teacher_config.get("prediction_type", "epsilon")
    if prediction_type not in _PREDICTION_TYPES:
        raise UserError(
            f"prediction_type {prediction_type!r} has no stock few-step scheduler; "
            f"it can be {', '.join(_PREDICTION_TYPES)}"
        )
    common = {**_beta_config(teacher_config, betas, timesteps[0] + 1), "prediction_type": prediction_type}
    if common["rescale_betas_zero_snr"] and prediction_type == "epsilon":
        raise UserError(
            "an epsilon prediction says nothing about the image at zero terminal SNR; start the student below "
            f"timestep {timesteps[0]} or give a teacher with v_prediction"
        )
    if spec.sampler == STOCHASTIC:
        return _lcm_scheduler(common, timesteps)
    if spec.sampler == DETERMINISTIC:
        return _euler_scheduler(common, timesteps)
    raise UserError(f"sampler {spec.sampler!r} is unknown; the samplers are {STOCHASTIC} and {DETERMINISTIC}")


def teacher_betas(teacher_config: Mapping[str, Any]) -> torch.Tensor:
    """The teacher's table of betas, (T,) float32 as Diffusers computes it, before any zero-SNR rescaling."""
    from diffusers import DDPMScheduler

    missing = [key for key in _BETA_KEYS if key not in teacher_config]
    if missing and teacher_config.get("trained_betas") is None:
        name = teacher_config.get("_class_name", "the teacher's scheduler")
        raise UserError(
            f"{name} has no table of betas (no {', '.join(missing)} in its config), so no stock few-step scheduler "
            "fits; flow-matching students cannot be exported as a folder yet"
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
    zero_snr = bool(teacher_config.get("rescale_betas_zero_snr", False))
    if length == len(betas):
        config = _given_betas(teacher_config)
        if "trained_betas" not in config and config["beta_schedule"] not in _NATIVE_BETA_SCHEDULES:
            config = {"num_train_timesteps": length, "trained_betas": betas.tolist()}
        return {**config, "rescale_betas_zero_snr": zero_snr}
    if zero_snr:
        from diffusers import DDPMScheduler

        # A shorter table cannot be rescaled again: its last level is not the one without signal.
        betas = DDPMScheduler(
            num_train_timesteps=len(betas), trained_betas=betas.tolist(), rescale_betas_zero_snr=True
        ).betas
    return {
        "num_train_timesteps": length,
        "trained_betas": betas[:length].tolist(),
        "rescale_betas_zero_snr": False,
    }


def _check_timesteps(timesteps: list[int], num_train_timesteps: int, sampler: str) -> None:
    lowest = 1 if sampler == STOCHASTIC else 0  # LCMScheduler returns its input unchanged at timestep 0
    falling = all(a > b for a, b in pairwise(timesteps))
    if not timesteps or not falling or timesteps[0] >= num_train_timesteps or timesteps[-1] < lowest:
        raise UserError(
            f"timesteps {timesteps} must fall strictly from at most {num_train_timesteps - 1} to at least {lowest}"
        )


def _lcm_scheduler(common: Mapping[str, Any], timesteps: list[int]) -> SchedulerMixin:
    """The LCMScheduler whose grid of `original_inference_steps` contains the timesteps in even spacing."""
    from diffusers import LCMScheduler

    def build(original_steps: int) -> LCMScheduler:
        # The scheduler mixes a trace of its input into x0, 2.5e-9 at t=999 but 2.5e-3 at t=1; a larger scaling
        # makes it x0 everywhere. steps_offset is not read by it, but StableDiffusionPipeline warns unless it is 1.
        return LCMScheduler(
            **common, original_inference_steps=original_steps, timestep_scaling=1000.0, clip_sample=False,
            set_alpha_to_one=True, steps_offset=1, thresholding=False,
        )  # fmt: skip

    total, count = timesteps[0] + 1, len(timesteps)
    probe = build(total)
    for original_steps in (count, *range(count + 1, total + 1)):
        probe.set_timesteps(count, original_inference_steps=original_steps)
        if probe.timesteps.tolist() == timesteps:
            return _checked(build(original_steps), timesteps)
    probe.set_timesteps(count, original_inference_steps=total)
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
    probe = copy.deepcopy(scheduler)
    probe.set_timesteps(len(timesteps))
    if probe.timesteps.tolist() != timesteps:
        raise _no_encoding(timesteps, probe.timesteps.tolist())
    return scheduler


def _no_encoding(timesteps: list[int], possible: list[float]) -> UserError:
    return UserError(
        f"no stock Diffusers scheduler visits the timesteps {timesteps} when it is asked for {len(timesteps)} steps; "
        f"train the student on evenly spaced ones, for example {[int(t) for t in possible]}"
    )


def family_scheduler(family: ModelFamily, spec: InferenceSpec) -> SchedulerMixin:
    """The student's scheduler for a family's stock pipeline; see `student_scheduler`.

    Raises:
        UserError: no stock scheduler can express the spec, or the stock pipeline cannot begin as it says.
    """
    if spec.sampler == DETERMINISTIC and not family.scales_noise:
        raise UserError(
            f"{family.pipeline_class} gives its network unscaled noise, so a {DETERMINISTIC} student, which begins "
            f"with scaled noise, cannot be exported; train it with sampler: {STOCHASTIC}"
        )
    return student_scheduler(family.pipeline.scheduler.config, spec)


def input_scale(scheduler: SchedulerMixin) -> float:
    """What unit-variance noise is multiplied by before the network sees it at the first timestep."""
    from diffusers import EulerDiscreteScheduler

    if isinstance(scheduler, EulerDiscreteScheduler):
        sigma = float(scheduler.init_noise_sigma)
        return sigma / math.sqrt(sigma**2 + 1)
    return 1.0


def export_pipeline(
    family: ModelFamily, network: nn.Module, spec: InferenceSpec | None, folder: Path, *, facts: Mapping[str, Any]
) -> Path:
    """Writes the teacher's pipeline with the student's network and scheduler in it.

    The folder appears at once or not at all, and replaces an earlier export; anything else that stands there stays.

    Args:
        family: the loaded teacher; its pipeline is left as it is.
        network: the student, a plain network of the teacher's class (adapters merged).
        spec: how the student is called; None (plain denoising training) keeps the teacher's scheduler.
        folder: where to write.
        facts: what distillation_config.json shall say besides steps, timesteps and guidance: method, teacher,
            recipe_sha256 ...

    Returns:
        The folder.

    Raises:
        UserError: the schedule has no stock encoding, the disk is full, or something else stands in the folder.
    """
    check_plain(network)
    pipeline = copy.copy(family.pipeline)  # shallow: same components, own table of them
    changes: dict[str, Any] = {family.network_component: network}
    if spec is not None:
        changes["scheduler"] = family_scheduler(family, spec)
    pipeline.register_modules(**changes)
    pipeline.register_to_config(**_lost_config(pipeline, family.path))
    with atomic_folder(folder, marker="model_index.json") as new:
        pipeline.save_pretrained(new, safe_serialization=True)
        forget_origin(new)
        write_facts(new, spec, type(pipeline), pipeline.scheduler, facts)
    return folder


def forget_origin(folder: Path) -> None:
    """Removes `_name_or_path` from a saved pipeline's configurations: Diffusers writes the maker's own paths there."""
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_plain(network: nn.Module) -> None:
    """Raises ValueError if adapters are still attached: their keys mean nothing to a stock class."""
    attached = [key for key in network.state_dict() if "lora_" in key or "base_layer" in key]
    if attached:
        raise ValueError(f"the network still carries adapters ({attached[0]} ...); merge them before the export")


def _lost_config(pipeline: DiffusionPipeline, path: str) -> dict[str, Any]:
    """Entries of the teacher's model_index.json that loading does not keep, such as DiTPipeline's id2label."""
    index_file = Path(path) / "model_index.json"
    if index_file.is_file():
        index = json.loads(index_file.read_text())
    else:
        index = type(pipeline).load_config(path, local_files_only=True)  # a hub id: it is in the cache by now
    return {key: value for key, value in index.items() if not key.startswith("_") and key not in pipeline.config}


def write_facts(
    folder: Path,
    spec: InferenceSpec | None,
    pipeline_class: type[DiffusionPipeline],
    scheduler: SchedulerMixin,
    facts: Mapping[str, Any],
) -> None:
    """Writes distillation_config.json: for tools and for people, ignored by Diffusers."""
    known: dict[str, Any] = {"toolkit": "stepdistill", "toolkit_version": toolkit_version()}
    known["pipeline"] = pipeline_class.__name__
    if spec is not None:
        known.update(
            steps=len(spec.timesteps),
            timesteps=list(spec.timesteps),
            sigmas=spec_sigmas(scheduler, spec),
            sampler=spec.sampler,
            scheduler=type(scheduler).__name__,
            guidance_scale=spec.guidance_scale,
            input_scale=input_scale(scheduler),
        )
    (folder / FACTS_FILE).write_text(json.dumps({**known, **facts}, indent=2, default=str) + "\n")


def spec_sigmas(scheduler: Any, spec: InferenceSpec) -> list[float]:
    """Noise-to-signal ratios sigma/alpha at the student's timesteps, as other programs list a schedule."""
    levels = [float(scheduler.alphas_cumprod[t]) for t in spec.timesteps]
    # Without any signal the ratio is infinite; Diffusers' Euler scheduler stands at the same 2**-24.
    return [((1 - a) / max(a, 2**-24)) ** 0.5 for a in levels]


def toolkit_version() -> str:
    """The installed version, or "uninstalled" when run from a bare checkout."""
    try:
        return metadata.version("stepdistill")
    except metadata.PackageNotFoundError:
        return "uninstalled"


@contextmanager
def atomic_folder(folder: Path, *, marker: str) -> Iterator[Path]:
    """Gives a new sibling of `folder` to write into and puts it in place when the block ends without an error.

    Args:
        folder: final place. If it exists it must be empty or an earlier export, known by a file named `marker`.
        marker: that file.
    """
    if folder.exists() and not (folder / marker).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: holds something that is not an export; name another folder or move it away")
    try:
        with replacing(folder) as new:
            yield new
    except BaseException as error:
        if _is_disk_error(error):
            raise UserError(f"{folder}: could not be written ({error}); check free space and permissions") from error
        raise


def _is_disk_error(error: BaseException) -> bool:
    from safetensors import SafetensorError

    # safetensors reports a failed write with an error of its own.
    return isinstance(error, OSError | SafetensorError)
