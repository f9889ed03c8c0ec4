"""The supported architectures, and the function that picks one by a folder's `model_index.json`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from stepdistill.families.base import ModelFamily

# pipeline class => where its family lives; an explicit table, so that nothing registers itself at import
FAMILIES: dict[str, str] = {
    "StableDiffusionPipeline": "stepdistill.families.sd:StableDiffusion",
    "StableDiffusionXLPipeline": "stepdistill.families.sdxl:StableDiffusionXL",
    "StableDiffusion3Pipeline": "stepdistill.families.sd3:StableDiffusion3",
    "PixArtAlphaPipeline": "stepdistill.families.pixart:PixArt",
    "PixArtSigmaPipeline": "stepdistill.families.pixart:PixArtSigma",
    "FluxPipeline": "stepdistill.families.flux:Flux",
    "SanaPipeline": "stepdistill.families.sana:Sana",
    "DiTPipeline": "stepdistill.families.dit:DiT",
}


def load_family(
    path: str,
    *,
    dtype: Any = None,
    device: str = "cpu",
    config: str | None = None,
    loras: Sequence[tuple[str, float]] = (),
) -> ModelFamily:
    """Loads a teacher with plain Diffusers, safetensors only.

    Args:
        path: a Diffusers folder, a hub id, one .safetensors file of all components, or "tiny:" and a family's name: a
            tiny network of random weights, made in memory.
        dtype: of all weights, or a mapping of components to types as Diffusers takes it; default float32.
        device: torch device.
        config: of a single file: the Diffusers folder or hub id that says how it is built.
        loras: (path, scale) of LoRAs to merge.

    Raises:
        UserError: not a Diffusers pipeline, a missing component, or an architecture without a family.
    """
    import torch

    from stepdistill.assets import resolve_model_path
    from stepdistill.families.loading import TINY, is_stored, load_pipeline, merge_loras

    path = path if path.startswith(TINY) else str(resolve_model_path(path))
    pipeline = load_pipeline(path, FAMILIES, dtype=dtype or torch.float32, config=config)
    merge_loras(pipeline, loras)
    pipeline.set_progress_bar_config(disable=True)
    kind = family_class(type(pipeline).__name__)
    return kind(pipeline.to(device), path, stored=is_stored(path) and not loras)


def family_class(name: str) -> type[ModelFamily]:
    """The family that serves a pipeline class."""
    module, _, attribute = FAMILIES[name].partition(":")
    found: type[ModelFamily] = getattr(import_module(module), attribute)
    return found
