"""What lies on disk of a stock pipeline: a Diffusers folder with its index, or one file of all weights.

Teachers and models under test are read here alike, and what is damaged or missing is told by the file's name. Nothing
is read from pickles.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepdistill.assets import resolve_bundled
from stepdistill.errors import UserError, first_line


if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import Tensor

STAND_IN = "FunnelBaseModel"  # for T5
SINGLE_FILE = ".safetensors"
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
LEFT_OUT = {"safety_checker": None, "feature_extractor": None}  # of Stable Diffusion: they judge images, not make them
CONFIG_FILES = ("*.json", "**/*.json", "*.txt", "**/*.txt", "**/*.model")


# ---- folders -------------------------------------------------------------------------------------------------------


def read_model_index(path: str, where: str = "teacher") -> dict[str, Any]:
    """The content of `model_index.json` of a Diffusers folder or hub id; `where` begins what errors say.

    Raises:
        UserError: there is none, it is broken, or a component that it names has no folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        if folder.suffix or path.startswith((".", "/")) or path.count("/") > 1:
            raise UserError(f"{where}: {path} is no folder; give a Diffusers folder or a hub id like 'owner/name'")
        return _read_hub_index(path, where)
    index = folder / "model_index.json"
    if not index.is_file():
        exported = folder / "pipeline" / index.name  # of a run
        remedy = f"give {exported.parent}" if exported.is_file() else "save one with pipeline.save_pretrained(...)"
        raise UserError(f"{where}: {path} has no model_index.json, so it is not a Diffusers pipeline folder; {remedy}")
    try:
        content: Any = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {index} {_damaged(first_line(error))}") from error
    if not isinstance(content, dict):
        raise UserError(f"{where}: {index} {_damaged('it holds no table of components')}")
    for name, entry in content.items():
        used = isinstance(entry, list) and entry[1:] not in ([], [None])
        if used and name not in LEFT_OUT and not (folder / name).is_dir():
            raise UserError(f"{where}: {path} lacks its component {name!r} ({entry[1]}), which model_index.json "
                            f"names; copy the folder {name}/ there or save the pipeline again")  # fmt: skip
    return content


def _read_hub_index(path: str, where: str) -> dict[str, Any]:
    from diffusers import DiffusionPipeline

    try:
        content: dict[str, Any] = DiffusionPipeline.load_config(path)
    except OSError as error:
        raise UserError(f"{where}: {path} is neither a local folder nor a reachable hub id "
                        f"({first_line(error)})") from error  # fmt: skip
    return content


def pipeline_class(path: str, supported: Collection[str] | None, where: str = "teacher") -> Any:
    """The Diffusers class of a folder or hub id; `supported` are names of those that may be loaded, None: all."""
    import diffusers

    name = str(read_model_index(path, where).get("_class_name"))
    known = dir(diffusers) if supported is None else supported
    if name not in known:
        said = "" if supported is None else f"; supported pipelines: {', '.join(sorted(supported))}"
        raise UserError(f"{where}: {path} is a {name}{said or ', which Diffusers does not know'}")
    return getattr(diffusers, name)


def left_out(kind: Any) -> dict[str, None]:
    """Components that a pipeline of this class is loaded without."""
    return LEFT_OUT if kind.__name__ == "StableDiffusionPipeline" else {}


def stock_pipeline(path: str, kind: Any = None, *, dtype: Any, **options: Any) -> Any:
    """A Diffusers folder or hub id => pipeline, from safetensors only.

    Args:
        path: of the folder, or the id.
        kind: class of the pipeline; None: the one that its index names.
        dtype: of all weights, or a mapping of components to types, "default" for those that it does not name.
        options: components that are replaced, or None for those that are left out.

    Raises:
        Exception: of `loading_errors`, what Diffusers says to a folder that it cannot load.
    """
    from diffusers import DiffusionPipeline

    parts = {name: part for name, part in _stand_ins(Path(path)).items() if name not in options}
    absent = dict.fromkeys(parts)
    pipeline = (kind or DiffusionPipeline).from_pretrained(
        path, dtype=dtype, use_safetensors=True, **absent, **options
    )  # fmt: skip
    if parts:
        types = dtype if isinstance(dtype, Mapping) else {"default": dtype}
        pipeline.register_modules(**{
            name: part.from_pretrained(
                Path(path) / name, dtype=types.get(name, types.get("default")), use_safetensors=True
            ).eval()
            for name, part in parts.items()
        })  # fmt: skip
    return pipeline


def _stand_ins(folder: Path) -> dict[str, Any]:
    """Components of a folder that are of another class than their pipeline's code says, and made to be.

    The bundled flow-matching teacher has a small encoder where T5 is. Diffusers loads it, and warns each time of a
    type that it did not expect; loaded by itself and put in its place it is no surprise.
    """
    try:
        content = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # a hub id, or a folder of which Diffusers says what is wrong
    names = [name for name, entry in content.items() if isinstance(entry, list) and entry[1:] == [STAND_IN]]
    if not names:
        return {}
    import transformers

    return dict.fromkeys(names, getattr(transformers, STAND_IN))


# ---- what goes wrong -----------------------------------------------------------------------------------------------


def loading_errors() -> tuple[type[Exception], ...]:
    """What Diffusers and Transformers raise for files that are incomplete, damaged, or of another architecture."""
    from diffusers.loaders.single_file_utils import SingleFileComponentError
    from safetensors import SafetensorError

    return OSError, ValueError, KeyError, AttributeError, RuntimeError, SafetensorError, SingleFileComponentError


def reason(path: str, error: Exception) -> str:
    """Why a model could not be loaded: its weights are pickles, a file is damaged, or else the error's first line."""
    folder = Path(path)
    pickled = [str(part) for part in _pickled(folder)] if folder.is_dir() else [path] if _no_safetensors(error) else []
    if pickled:
        return (f"{', '.join(pickled)}: the weights are pickles, which can run any code when they are read, and are "
                f"left alone; if you trust them, convert them once: python -c \"from diffusers import "
                f"DiffusionPipeline as P; P.from_pretrained('{path}').save_pretrained('converted')\", and give the "
                "folder converted")  # fmt: skip
    for file in sorted(folder.rglob("*")) if folder.is_dir() else ():
        wrong = _wrong_with(file)
        if wrong is not None:
            return f"{file} {_damaged(wrong)}"
    return first_line(error)


def _pickled(folder: Path) -> list[Path]:
    """Components of a Diffusers folder whose weights are there as pickles alone."""
    parts = {file.parent for file in folder.glob("*/*.bin")}
    return sorted(part for part in parts if part.name not in LEFT_OUT and not any(part.glob(f"*{SINGLE_FILE}")))


def _no_safetensors(error: Exception) -> bool:
    """Whether Diffusers says that a hub id has no weights of the one kind that was asked for."""
    return "necessary `safetensors` weights" in str(error)


def _damaged(why: str) -> str:
    return f"is damaged ({why}); copy or download it again"


def _wrong_with(file: Path) -> str | None:
    """What keeps a file from being read, as far as its ending and its header tell; None: nothing."""
    from safetensors import SafetensorError, safe_open

    try:
        if file.suffix == SINGLE_FILE:
            with safe_open(file, framework="pt"):
                pass
        elif file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        return first_line(error)
    return None


# ---- one file ------------------------------------------------------------------------------------------------------


def load_single_file(
    file: Path, config: str | None, *, where: str, key: str, supported: Collection[str] | None = None,
    dtype: torch.dtype | None = None, download: bool = False,
) -> DiffusionPipeline:  # fmt: skip
    """All components out of one file with Diffusers' own conversion of the original names.

    Such a file holds weights alone. How the networks are built, the tokenizers and the scheduler, hence also what the
    network predicts, come from `config`; components that the file lacks are read there too, if it has weights.

    Args:
        file: of all components' weights.
        config: Diffusers folder or hub id that says how it is built; None: what the file looks like.
        where: begins what errors say.
        key: how the user gives `config`.
        supported: classes of pipelines that may be loaded; None: all.
        dtype: of all weights; None: float32.
        download: whether a configuration that nobody named may come from the hub, and not from its cache alone.

    Raises:
        UserError: it is a pickle, damaged, incomplete, or there is no configuration of it.
    """
    import torch

    _refuse_pickle(file, where)
    dtype = dtype or torch.float32
    shapes = _shapes(file, where)
    folder = _config_folder(file, shapes, config, where=where, key=key, download=download)
    kind = pipeline_class(folder, supported, where)
    try:
        loaded: DiffusionPipeline = kind.from_single_file(
            str(file), config=folder, local_files_only=True, dtype=dtype, **left_out(kind),
            **_absent_encoders(shapes, Path(folder), dtype, where),
        )  # fmt: skip
    except UserError:
        raise
    except loading_errors() as error:
        # Networks are built without memory for weights; what the file did not fill cannot be moved anywhere.
        lacks = "Cannot copy out of meta tensor" in str(error)
        what = "lacks weights that" if lacks else "could not be loaded as"
        why = "" if lacks else f": {reason(folder, error)}"
        raise UserError(f"{where}: {file} {what} a {kind.__name__} built as {folder} says{why}; give a folder of its "
                        f"architecture as {key}, with the weights that the file has not") from error  # fmt: skip
    return loaded


def single_file_config(file: Path, config: str | None, *, where: str, key: str) -> str:
    """The folder that says how a single file is built; arguments and errors as of `load_single_file`."""
    _refuse_pickle(file, where)
    return _config_folder(file, _shapes(file, where), config, where=where, key=key, download=False)


def _refuse_pickle(file: Path, where: str) -> None:
    if file.suffix != SINGLE_FILE:
        raise UserError(f"{where}: {file} is a pickle, which can run any code when it is read; give a .safetensors "
                        "file or a Diffusers folder")  # fmt: skip


def _absent_encoders(shapes: Mapping[str, Tensor], folder: Path, dtype: torch.dtype, where: str) -> dict[str, Any]:
    """Text encoders that a file lacks and the configuration's folder has: Diffusers looks there for its own only."""
    import transformers
    from diffusers.loaders.single_file_utils import is_clip_model_in_single_file, is_t5_in_single_file

    found = {}
    for name, entry in read_model_index(str(folder), where).items():
        if not isinstance(entry, list) or entry[0] != "transformers" or not any((folder / name).glob("*.safetensors")):
            continue
        kind: Any = getattr(transformers, entry[1])
        inside = is_t5_in_single_file(shapes) if "T5" in entry[1] else is_clip_model_in_single_file(kind, shapes)
        if not inside:
            found[name] = kind.from_pretrained(folder / name, dtype=dtype, use_safetensors=True)
    return found


def _config_folder(
    file: Path, shapes: Mapping[str, Tensor], config: str | None, *, where: str, key: str, download: bool
) -> str:
    """A local Diffusers folder with the configuration of a single file, which may be in the hub's cache."""
    from huggingface_hub import snapshot_download

    if config is not None and Path(resolve_bundled(config)).is_dir():
        return resolve_bundled(config)
    wanted = _guessed_config(shapes) if config is None else config
    cached = config is None and not download
    try:
        folder: str = snapshot_download(wanted, allow_patterns=list(CONFIG_FILES), local_files_only=cached)
    except (OSError, ValueError) as error:
        if config is not None:
            raise UserError(f"{key}: {config} is neither a folder nor a reachable hub id: "
                            f"{first_line(error)}") from error  # fmt: skip
        raise UserError(
            f"{where}: {file} holds weights alone; say how it is built with {key}: a Diffusers folder of "
            f"the same architecture (its weights are not needed), or a hub id. It looks like {wanted}, whose "
            "configuration is not on this machine"
        ) from error
    return folder


def _guessed_config(shapes: Mapping[str, Tensor]) -> str:
    """The hub id that Diffusers takes a file for by the names and shapes of its tensors."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    return str(fetch_diffusers_config(shapes)["pretrained_model_name_or_path"])


def _shapes(file: Path, where: str) -> dict[str, Tensor]:
    """The tensors of a file by name, with shapes and without contents; nothing but the header is read."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as content:
            names = list(content.keys())
            return {k: torch.empty(content.get_slice(k).get_shape(), device="meta") for k in names}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{where}: {file} is no readable .safetensors file: {first_line(error)}") from error
