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
from stepdistill.families.base import read_model_index


if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import Tensor

TINY = "tiny:"
SINGLE_FILE = ".safetensors"
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
LEFT_OUT = {"safety_checker": None, "feature_extractor": None}  # of Stable Diffusion: they judge images, not make them
CONFIG_FILES = ("*.json", "**/*.json", "*.txt", "**/*.txt", "**/*.model")
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")


def is_stored(path: str) -> bool:
    """Whether plain Diffusers finds a pipeline at this path by itself: a folder or a hub id."""
    return not path.startswith(TINY) and Path(path).suffix not in (SINGLE_FILE, *PICKLES)


def load_pipeline(
    path: str, supported: Collection[str], *, dtype: Any, config: str | None = None
) -> DiffusionPipeline:
    """The stock pipeline that a path means, float32 or as asked, on the CPU.

    Args:
        path: a Diffusers folder, a hub id, one .safetensors file of all components, or "tiny:" and a family.
        supported: classes of pipelines that may be loaded.
        dtype: of all weights, or a mapping of components to types, "default" for those that it does not name.
        config: of a single file: the Diffusers folder or hub id that says how it is built; see `_from_single_file`.

    Raises:
        UserError: it is none of these, incomplete, of another class, or a pickle.
    """
    if path.startswith(TINY):
        from stepdistill.families.tiny import tiny_pipeline

        return _as_types(tiny_pipeline(path.removeprefix(TINY)), dtype)
    path = resolve_model_path(path)
    if not is_stored(path):
        return _as_types(_from_single_file(Path(path), config, supported), dtype)
    if config is not None:
        raise UserError(f"teacher_config: {config} is of no use, since the teacher {path} is no single file and has a "
                        "configuration of its own; leave it out")  # fmt: skip
    kind = _pipeline_class(path, supported)
    try:
        loaded: DiffusionPipeline = kind.from_pretrained(path, dtype=dtype, use_safetensors=True, **_left_out(kind))
    except (OSError, ValueError) as error:
        raise UserError(f"teacher: {path} could not be loaded: {first_line(error)}") from error
    return loaded


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


def _pipeline_class(path: str, supported: Collection[str]) -> Any:
    import diffusers

    name = str(read_model_index(path).get("_class_name"))
    if name not in supported:
        raise UserError(f"teacher: {path} is a {name}; supported pipelines: {', '.join(sorted(supported))}")
    return getattr(diffusers, name)


def _left_out(kind: Any) -> dict[str, None]:
    return LEFT_OUT if kind.__name__ == "StableDiffusionPipeline" else {}


# ---- one file ------------------------------------------------------------------------------------------------------


def _from_single_file(file: Path, config: str | None, supported: Collection[str]) -> DiffusionPipeline:
    """All components out of one file, float32, with Diffusers' own conversion of the original names.

    Such a file holds weights alone. How the networks are built, the tokenizers and the scheduler, hence also what the
    network predicts, come from `config`; components that the file lacks are read there too, if it has weights.
    """
    import torch
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    if file.suffix != SINGLE_FILE:
        raise UserError(f"teacher: {file} is a pickle, which can run any code when it is read; give a .safetensors "
                        "file or a Diffusers folder")  # fmt: skip
    shapes = _shapes(file)
    folder = _config_folder(file, shapes, config)
    kind = _pipeline_class(folder, supported)
    try:
        loaded: DiffusionPipeline = kind.from_single_file(
            str(file), config=folder, local_files_only=True, dtype=torch.float32, **_left_out(kind),
            **_absent_encoders(shapes, Path(folder), torch.float32),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError, SingleFileComponentError) as error:
        # Networks are built without memory for weights; what the file did not fill cannot be moved anywhere.
        lacks = "Cannot copy out of meta tensor" in str(error)
        what = "lacks weights that" if lacks else "could not be loaded as"
        why = "" if lacks else f": {first_line(error)}"
        raise UserError(f"teacher: {file} {what} a {kind.__name__} built as {folder} says{why}; give a folder of its "
                        "architecture as teacher_config, with the weights that the file has not"
                        ) from error  # fmt: skip
    return loaded


def _absent_encoders(shapes: Mapping[str, Tensor], folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Text encoders that a file lacks and the configuration's folder has: Diffusers looks there for its own only."""
    import transformers
    from diffusers.loaders.single_file_utils import is_clip_model_in_single_file, is_t5_in_single_file

    found = {}
    for name, entry in read_model_index(str(folder)).items():
        if not isinstance(entry, list) or entry[0] != "transformers" or not any((folder / name).glob("*.safetensors")):
            continue
        kind: Any = getattr(transformers, entry[1])
        inside = is_t5_in_single_file(shapes) if "T5" in entry[1] else is_clip_model_in_single_file(kind, shapes)
        if not inside:
            found[name] = kind.from_pretrained(folder / name, dtype=dtype, use_safetensors=True)
    return found


def _config_folder(file: Path, shapes: Mapping[str, Tensor], config: str | None) -> str:
    """A local Diffusers folder with the configuration of a single file, which may be in the hub's cache."""
    from huggingface_hub import snapshot_download

    if config is not None and Path(resolve_bundled(config)).is_dir():
        return resolve_bundled(config)
    wanted = _guessed_config(shapes) if config is None else config
    try:
        # Without a word from the user nothing is downloaded: then only the cache is asked.
        folder: str = snapshot_download(wanted, allow_patterns=list(CONFIG_FILES), local_files_only=config is None)
    except (OSError, ValueError) as error:
        if config is not None:
            raise UserError(f"teacher_config: {config} is neither a folder nor a reachable hub id: "
                            f"{first_line(error)}") from error  # fmt: skip
        raise UserError(
            f"teacher: {file} holds weights alone; say how it is built with teacher_config: a Diffusers folder of "
            f"the same architecture (its weights are not needed), or a hub id. It looks like {wanted}, whose "
            "configuration is not on this machine"
        ) from error
    return folder


def _guessed_config(shapes: Mapping[str, Tensor]) -> str:
    """The hub id that Diffusers takes a file for by the names and shapes of its tensors."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    return str(fetch_diffusers_config(shapes)["pretrained_model_name_or_path"])


def _shapes(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, with shapes and without contents; nothing but the header is read."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as content:
            names = list(content.keys())
            return {k: torch.empty(content.get_slice(k).get_shape(), device="meta") for k in names}
    except (OSError, SafetensorError) as error:
        raise UserError(f"teacher: {file} is no readable .safetensors file: {first_line(error)}") from error


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
    pipeline.fuse_lora(lora_scale=scale)
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
