"""How a teacher gets into memory: from a folder, the hub, one file or code; and what is merged into it.

Nothing is read from pickles. The network is touched only for what was named: a hub id as the teacher, as its
configuration or as a LoRA.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepdistill.assets import resolve_bundled, resolve_model_path
from stepdistill.errors import UserError, first_line
from stepdistill.recipe_text import nearest
from stepdistill.stock_files import (
    PICKLES,
    SINGLE_FILE,
    left_out,
    load_single_file,
    loading_errors,
    pipeline_class,
    reason,
    single_file_config,
    stock_pipeline,
)


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

TINY = "tiny:"
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")


def is_stored(path: str) -> bool:
    """Whether plain Diffusers finds a pipeline at this path by itself: a folder or a hub id."""
    return not path.startswith(TINY) and Path(path).suffix not in (SINGLE_FILE, *PICKLES)


def check_place(path: str, supported: Collection[str], where: str) -> None:
    """Finds out without loading it whether there is a pipeline at a path; of a hub id, only the index is fetched.

    Args:
        path: as of `load_pipeline`.
        supported: classes of pipelines that may be loaded.
        where: begins what errors say.

    Raises:
        UserError: there is none, or it is of another class.
    """
    from stepdistill.families.tiny import TINY_PIPELINES

    if path.startswith(TINY):
        if path.removeprefix(TINY) not in TINY_PIPELINES:
            raise UserError(f"{where}: {path} is unknown; {nearest(path.removeprefix(TINY), TINY_PIPELINES)}")
        return
    try:
        path = resolve_model_path(path)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if is_stored(path):
        pipeline_class(path, supported, where)
    elif Path(path).suffix != SINGLE_FILE or not Path(path).is_file():
        raise UserError(f"{where}: {path} is no {SINGLE_FILE} file; give one, a Diffusers folder, or a hub id")


def load_pipeline(
    path: str, supported: Collection[str], *, dtype: Any, config: str | None = None
) -> DiffusionPipeline:
    """The stock pipeline that a path means, float32 or as asked, on the CPU.

    Args:
        path: a Diffusers folder, a hub id, one .safetensors file of all components, or "tiny:" and a family.
        supported: classes of pipelines that may be loaded.
        dtype: of all weights, or a mapping of components to types, "default" for those that it does not name.
        config: of a single file: the Diffusers folder or hub id that says how it is built.

    Raises:
        UserError: it is none of these, incomplete, of another class, or a pickle.
    """
    if path.startswith(TINY):
        from stepdistill.families.tiny import tiny_pipeline

        return _as_types(tiny_pipeline(path.removeprefix(TINY)), dtype)
    path = resolve_model_path(path)
    if not is_stored(path):
        file = load_single_file(Path(path), config, where="teacher", key="teacher_config", supported=supported)
        return _as_types(file, dtype)
    if config is not None:
        raise UserError(f"teacher_config: {config} is of no use, since the teacher {path} is no single file and has a "
                        "configuration of its own; leave it out")  # fmt: skip
    kind = pipeline_class(path, supported)
    try:
        loaded: DiffusionPipeline = stock_pipeline(path, kind, dtype=dtype, **left_out(kind))
    except loading_errors() as error:
        raise UserError(f"teacher: {path} could not be loaded: {reason(path, error)}") from error
    return loaded


def load_scheduler_config(path: str, supported: Collection[str], config: str | None = None) -> Mapping[str, Any]:
    """What a teacher's scheduler was saved with; reads no weights, and of a hub id this one file and the index.

    Args:
        path: as of `load_pipeline`.
        supported: as of `load_pipeline`.
        config: as of `load_pipeline`.

    Raises:
        UserError: as `load_pipeline`.
    """
    from diffusers import DDIMScheduler

    if path.startswith(TINY):
        from stepdistill.families.tiny import tiny_pipeline

        scheduler = tiny_pipeline(path.removeprefix(TINY)).scheduler
        return {**scheduler.config, "_class_name": type(scheduler).__name__}
    path = resolve_model_path(path)
    folder = path if is_stored(path) else single_file_config(Path(path), config, where="teacher", key="teacher_config")
    pipeline_class(folder, supported)  # refuses
    try:
        found: dict[str, Any] = DDIMScheduler.load_config(folder, subfolder="scheduler")  # of any class
    except loading_errors() as error:
        raise UserError(f"teacher: the scheduler of {path} could not be read: {reason(folder, error)}") from error
    return found


def _as_types(pipeline: DiffusionPipeline, dtype: Any) -> DiffusionPipeline:
    """Casts what is loaded, as `from_pretrained` would have loaded it."""
    import torch

    types = dtype if isinstance(dtype, Mapping) else {"default": dtype}
    for name, component in pipeline.components.items():
        wanted = types.get(name, types.get("default", torch.float32))
        # Diffusers warns about every cast, also about one that changes nothing.
        if isinstance(component, torch.nn.Module) and component.dtype != wanted:
            component.to(wanted)
    return pipeline


# ---- LoRAs ---------------------------------------------------------------------------------------------------------


def merge_loras(pipeline: DiffusionPipeline, loras: Sequence[tuple[str, float]]) -> None:
    """Adds LoRAs to a pipeline's weights for good, one after the other, in all components that they are for.

    Args:
        pipeline: the teacher's, changed in place.
        loras: (folder, .safetensors file or hub id; scale, 1 = as trained). Files as Diffusers or kohya name their
            layers; of pipelines that Diffusers has no loader for, folders that peft saved.

    Raises:
        UserError: there is none, it is a pickle, or it does not fit.
    """
    for path, scale in loras:
        place = Path(resolve_bundled(path))
        if not place.exists() and (place.suffix or path.startswith((".", "/")) or path.count("/") != 1):
            raise UserError(f"teacher_loras: {path}: no such file or folder; give one, or a hub id as owner/name")
        if place.is_file() and place.suffix != SINGLE_FILE:
            raise UserError(f"teacher_loras: {path} is no .safetensors file")
        merge = _merge_peft if (place / PEFT_FILES[0]).is_file() else _merge_stock
        try:
            merge(pipeline, str(place), scale)
        except UserError:
            raise
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"teacher_loras: {path} could not be merged into a {type(pipeline).__name__}: "
                            f"{first_line(error)}") from error  # fmt: skip


def _merge_stock(pipeline: Any, path: str, scale: float) -> None:
    from diffusers.loaders.lora_base import LoraBaseMixin

    if not isinstance(pipeline, LoraBaseMixin):
        raise UserError(f"teacher_loras: {path}: Diffusers has no LoRA loader for {type(pipeline).__name__}; give a "
                        f"folder that peft saved, with {' and '.join(PEFT_FILES)}")  # fmt: skip
    pipeline.load_lora_weights(path, use_safetensors=True)
    if not pipeline.get_list_adapters():
        raise UserError(f"teacher_loras: {path} holds no layers of a {type(pipeline).__name__}")
    # Of all components that it has layers of: the default of some pipelines leaves out the text encoders.
    pipeline.fuse_lora(components=list(pipeline.get_list_adapters()), lora_scale=scale)
    pipeline.unload_lora_weights()


def _merge_peft(pipeline: Any, path: str, scale: float) -> None:
    from peft import LoraConfig, PeftConfig, PeftModel

    if not (Path(path) / PEFT_FILES[1]).is_file():
        raise UserError(f"teacher_loras: {path} has no {PEFT_FILES[1]}")
    config = PeftConfig.from_pretrained(path)
    if not isinstance(config, LoraConfig):
        raise UserError(f"teacher_loras: {path} holds a {config.peft_type}, no LoRA")
    # What a layer adds is in proportion to its alpha.
    config.lora_alpha *= scale
    config.alpha_pattern = {layers: alpha * scale for layers, alpha in config.alpha_pattern.items()}
    component = "unet" if "unet" in pipeline.components else "transformer"
    model: Any = PeftModel.from_pretrained(pipeline.components[component], path, config=config)
    pipeline.register_modules(**{component: model.merge_and_unload()})
