"""From a finished student to a folder that plain Diffusers loads: stock classes, the schedule inside.

Nobody who uses the folder needs this package, a custom scheduler, or a list of timesteps to paste:
`DiffusionPipeline.from_pretrained(folder)(prompt, num_inference_steps=N, guidance_scale=1)` is right as it stands.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepdistill.errors import UserError
from stepdistill.export.schedulers import OWN, TCD, family_scheduler, input_scale, noise_levels, told_timesteps
from stepdistill.files import replacing


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin
    from torch import nn

    from stepdistill.families.base import ModelFamily
    from stepdistill.objectives.base import InferenceSpec


FACTS_FILE = "distillation_config.json"


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
    if family.stored:
        pipeline.register_to_config(**_lost_config(pipeline, family.path))
    with atomic_folder(folder, marker="model_index.json") as new:
        pipeline.save_pretrained(new, safe_serialization=True)
        forget_origin(new)
        write_facts(new, spec, type(pipeline), pipeline.scheduler, facts, even=family.even_sigmas)
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
    *,
    even: bool = False,
) -> None:
    """Writes distillation_config.json: for tools and for people, ignored by Diffusers."""
    known: dict[str, Any] = {"toolkit": "stepdistill", "toolkit_version": toolkit_version()}
    known["pipeline"] = pipeline_class.__name__
    if spec is not None:
        known.update(
            steps=len(spec.timesteps),
            sampler=spec.sampler,
            scheduler=type(scheduler).__name__,
            guidance_scale=spec.guidance_scale,
        )
        if spec.sampler != OWN:  # whose steps are the caller's business
            known.update(
                timesteps=told_timesteps(scheduler, spec, even=even),
                sigmas=noise_levels(scheduler, spec, even=even),
                input_scale=input_scale(scheduler),
            )
        if spec.sampler == TCD:
            known["eta"] = spec.eta
        if spec.embeds_guidance:
            known["embeds_guidance"] = True
    (folder / FACTS_FILE).write_text(json.dumps({**known, **facts}, indent=2, default=str) + "\n")


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
