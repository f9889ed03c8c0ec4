"""From a finished guidance adapter to a folder with its one file, and the proof that nothing is lost in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stepdistill.errors import UserError
from stepdistill.export.pipeline import atomic_folder, write_facts
from stepdistill.guidance import ADAPTER_FILE
from stepdistill.guidance.files import save_adapter


if TYPE_CHECKING:
    from torch import Tensor

    from stepdistill.families.base import ModelFamily
    from stepdistill.objectives.base import InferenceSpec


def export_adapter(
    family: ModelFamily, tensors: Mapping[str, Tensor], spec: InferenceSpec, folder: Path, *, facts: Mapping[str, Any]
) -> Path:
    """Writes the adapter's file, and distillation_config.json beside it.

    Args:
        family: the loaded teacher, beside which it was trained.
        tensors: of the adapter, as its role is kept.
        spec: how it is called; its guidance scale is the one that the file names.
        folder: appears at once or not at all; an earlier adapter in it is replaced.
        facts: more entries for distillation_config.json.

    Returns:
        The folder.

    Raises:
        UserError: the tensors are no adapter's, or the disk is full.
    """
    if spec.adapter is None:
        raise ValueError("the student is no adapter; export_pipeline and export_lora write others")
    pipeline = family.pipeline
    with atomic_folder(folder, marker=ADAPTER_FILE) as new:
        save_adapter(new / ADAPTER_FILE, family.network(), spec.adapter, tensors, guidance=spec.guidance_scale)
        write_facts(new, spec, type(pipeline), pipeline.scheduler, facts)
    check_adapter(folder, family, tensors)
    return folder


def check_adapter(folder: Path, family: ModelFamily, tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError unless the file, put on the stock pipeline, holds every bit of the adapter."""
    from stepdistill.guidance.files import load_adapter

    with load_adapter(family.pipeline, folder) as attached:
        loaded = attached.adapter.state_dict()
        wrong = sorted(loaded.keys() ^ tensors.keys())
        wrong += [k for k in loaded if k in tensors and not torch.equal(loaded[k].cpu(), tensors[k].detach().cpu())]
    if wrong:
        raise UserError(f"{folder}: the file does not hold the adapter that was trained ({wrong[0]} differs); do not "
                        "publish it")  # fmt: skip
