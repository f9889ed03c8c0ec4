"""A teacher without its weights: the stock pipeline of the right shapes, from configuration files alone."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from diffusers import ModelMixin
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from stepdistill.errors import UserError, first_line
from stepdistill.families import FAMILIES, family_class, load_family
from stepdistill.families.base import ModelFamily
from stepdistill.resources.meter import shaped
from stepdistill.stock_files import read_model_index


UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # of no part in training


def family_without_weights(path: str, fake: FakeTensorMode) -> ModelFamily:
    """A teacher whose networks have shapes and no values; no file of weights is opened or downloaded.

    Args:
        path: a Diffusers folder, a hub id (whose small configuration files are then read), or `tiny:NAME`.
        fake: the mode in which networks are built.

    Raises:
        UserError: there are no configurations to read, or the architecture has no family.
    """
    from stepdistill.assets import resolve_model_path

    if path.startswith("tiny:"):
        with shaped(fake):
            return load_family(path)
    if path.endswith(".safetensors"):
        raise UserError(f"teacher: {path} is a single file, and holds no configurations to plan with; name the folder "
                        "or hub id of its architecture, teacher_config=owner/name")  # fmt: skip
    path = str(resolve_model_path(path))
    index = read_model_index(path)
    name = str(index.get("_class_name"))
    if name not in FAMILIES:
        raise UserError(f"teacher: {path} is a {name}; supported pipelines: {', '.join(sorted(FAMILIES))}")
    try:
        parts = {key: _component(path, key, entry, fake) for key, entry in index.items() if isinstance(entry, list)}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"teacher: {path}: a configuration could not be read: {first_line(error)}") from error
    options = {key: value for key, value in index.items() if not key.startswith("_") and not isinstance(value, list)}
    if "requires_safety_checker" in options:
        options["requires_safety_checker"] = False
    pipeline = getattr(diffusers, name)(**parts, **options)
    pipeline.set_progress_bar_config(disable=True)
    return family_class(name)(pipeline, path)


def _component(path: str, name: str, entry: list[Any], fake: FakeTensorMode) -> Any:
    """One part of a pipeline by its entry [library, class] in model_index.json."""
    library, kind_name = entry[-2], entry[-1]
    if kind_name is None or name in UNUSED:
        return None
    modules = {"diffusers": diffusers, "transformers": transformers}
    if library not in modules:
        raise UserError(f"teacher: {path}: its component {name!r} is a class of {library}, of which no plan is known")
    kind: Any = getattr(modules[library], kind_name)
    if issubclass(kind, ModelMixin):
        config = kind.load_config(path, subfolder=name)
        with shaped(fake):
            return kind.from_config(config)
    if issubclass(kind, PreTrainedModel):
        config = kind.config_class.from_pretrained(path, subfolder=name)
        with shaped(fake):
            return kind(config)
    # Schedulers, tokenizers and processors are small, and their values are needed.
    return kind.from_pretrained(path, subfolder=name)
