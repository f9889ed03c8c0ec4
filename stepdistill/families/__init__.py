"""The supported architectures, and the function that picks one by a folder's `model_index.json`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from stepdistill.errors import UserError, first_line


if TYPE_CHECKING:
    import torch

    from stepdistill.families.base import ModelFamily

# pipeline class => where its family lives; an explicit table, so that nothing registers itself at import
FAMILIES: dict[str, str] = {
    "StableDiffusionPipeline": "stepdistill.families.sd:StableDiffusion",
    "StableDiffusion3Pipeline": "stepdistill.families.sd3:StableDiffusion3",
    "DiTPipeline": "stepdistill.families.dit:DiT",
}


def load_family(path: str, *, dtype: torch.dtype | None = None, device: str = "cpu") -> ModelFamily:
    """Loads a teacher with plain Diffusers, safetensors only.

    Args:
        path: a Diffusers folder, or a hub id.
        dtype: of all weights; default float32.
        device: torch device.

    Raises:
        UserError: not a Diffusers pipeline, a missing component, or an architecture without a family.
    """
    import diffusers
    import torch

    from stepdistill.assets import resolve_model_path
    from stepdistill.families.base import read_model_index

    path = str(resolve_model_path(path))
    name = str(read_model_index(path).get("_class_name"))
    if name not in FAMILIES:
        raise UserError(f"teacher: {path} is a {name}; supported pipelines: {', '.join(sorted(FAMILIES))}")
    optional = {"safety_checker": None, "feature_extractor": None} if name == "StableDiffusionPipeline" else {}
    try:
        pipeline = getattr(diffusers, name).from_pretrained(
            path, dtype=dtype or torch.float32, use_safetensors=True, **optional
        )
    except (OSError, ValueError) as error:
        raise UserError(f"teacher: {path} could not be loaded: {first_line(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    module, _, attribute = FAMILIES[name].partition(":")
    family: ModelFamily = getattr(import_module(module), attribute)(pipeline.to(device), path)
    return family
