"""The weighted mean of two students of one base, of which one may be a LoRA on it.

Dao et al. 2024, "SwiftBrush v2", arXiv 2408.14176: a student trained with all weights and one trained as a LoRA with a
CLIP loss make a better one between them.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stepdistill.errors import UserError, first_line
from stepdistill.export.pipeline import FACTS_FILE, export_pipeline
from stepdistill.families import load_family


if TYPE_CHECKING:
    from stepdistill.families.base import ModelFamily


OF_THE_RUN = ("method", "recipe", "recipe_sha256", "teacher")  # facts that are not true of a mixture of two runs


@dataclass(frozen=True)
class Student:
    """One of the two.

    Attributes:
        path: Diffusers folder or hub id.
        lora: folder of a LoRA on it, or None; its scheduler, if it brings one, replaces the pipeline's.
    """

    path: str
    lora: str | None = None

    @property
    def name(self) -> str:
        """What messages and facts call it: the run's folder, without the folders above."""
        folder = Path(self.lora or self.path)
        return folder.resolve().parent.name if folder.name in ("pipeline", "lora") else folder.name

    @property
    def facts(self) -> dict[str, Any]:
        """What distillation_config.json says of it; nothing, if there is none."""
        file = Path(self.lora or self.path) / FACTS_FILE
        if not file.is_file():
            return {}
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return content


def blend(a: Mapping[str, Tensor], b: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
    """weight a + (1 - weight) b, name by name; 1 gives a and 0 gives b, to the bit. Tables of integers are a's.

    Raises:
        UserError: the two have not the same names and shapes.
    """
    different = sorted(set(a) ^ set(b)) + sorted(k for k in a if k in b and a[k].shape != b[k].shape)
    if different:
        raise UserError(f"the two networks are not alike: {len(different)} tensors differ in name or shape, first "
                        f"{different[0]!r}; merge students of one base")  # fmt: skip
    # torch.lerp is exact at both ends
    return {key: torch.lerp(b[key], a[key], weight) if a[key].is_floating_point() else a[key] for key in a}


def merge(a: Student, b: Student, weight: float, output: Path) -> Path:
    """Writes the mean of two students as a pipeline, which is otherwise a's.

    Args:
        a: theta_A.
        b: theta_B.
        weight: lambda in lambda theta_A + (1 - lambda) theta_B, 0 to 1.
        output: folder of the new pipeline; appears at once or not at all.

    Raises:
        UserError: their networks or the ways to call them differ, or a folder cannot be read or written.
    """
    first, second = _load(a), _load(b)
    _check_alike(a, b, first, second)
    state = blend(first.network().state_dict(), second.network().state_dict(), weight)
    network = first.plain_network()
    network.load_state_dict(state)
    facts = {key: value for key, value in a.facts.items() if key not in OF_THE_RUN}
    return export_pipeline(
        first, network, None, output, facts={**facts, "method": "merge", "merged": [a.name, b.name], "weight": weight}
    )


def _load(student: Student) -> ModelFamily:
    """The pipeline with its LoRA folded in."""
    family = load_family(student.path)
    if student.lora is None:
        return family
    if not family.supports_lora_loading:
        raise UserError(f"{student.path}: {family.pipeline_class} cannot load a LoRA in Diffusers; give a pipeline")
    try:
        family.pipeline.load_lora_weights(student.lora, use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"{student.lora}: cannot be loaded as a LoRA of {student.path} ({reason})") from error
    family.pipeline.fuse_lora(components=[family.network_component])
    family.pipeline.unload_lora_weights()
    if (Path(student.lora) / "scheduler").is_dir():
        family.pipeline.register_modules(scheduler=_scheduler(Path(student.lora) / "scheduler"))
    return family


def _scheduler(folder: Path) -> Any:
    import diffusers

    config = json.loads((folder / "scheduler_config.json").read_text(encoding="utf-8"))
    return getattr(diffusers, config["_class_name"]).from_pretrained(folder)


def _check_alike(a: Student, b: Student, first: ModelFamily, second: ModelFamily) -> None:
    if type(first.network()) is not type(second.network()):
        kinds = f"{type(first.network()).__name__} and {type(second.network()).__name__}"
        raise UserError(
            f"{a.name} and {b.name} have networks of different kinds ({kinds}); merge students of one base"
        )
    calls = [_call(student, family) for student, family in ((a, first), (b, second))]
    differing = [key for key in calls[0] if calls[0][key] != calls[1].get(key)]
    if differing:
        ways = " and ".join(reprlib.repr(call.get(differing[0])) for call in calls)
        raise UserError(f"{a.name} and {b.name} are called differently ({differing[0]}: {ways}); merge students that "
                        "were trained for the same steps")  # fmt: skip


def _call(student: Student, family: ModelFamily) -> dict[str, Any]:
    """How a student is called: the schedule and, where they are known, its timesteps."""
    scheduler = family.pipeline.scheduler
    config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    facts = student.facts
    known = {key: facts.get(key) for key in ("timesteps", "sampler", "guidance_scale", "eta")}
    return {**known, "scheduler": type(scheduler).__name__, **config}
