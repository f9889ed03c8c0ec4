"""Pipelines that are more than a folder: one file of weights, or a base with one of our adapters on it."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepdistill.errors import UserError, first_line
from stepdistill.routed import RoutedPipeline, is_routed, load_students
from stepdistill.stock_files import load_single_file, stock_pipeline


if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from stepdistill.bench.generate import ModelUnderTest

PIXEL_STEP = 8
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
CHECKS = ("safety_checker", "watermarker")  # components that judge or mark images, and make none


def open_pipeline(model: ModelUnderTest, path: str, dtype: torch.dtype) -> Any:
    """A Diffusers folder or hub id, one file of weights, or a folder of several students => pipeline.

    Raises:
        UserError: students or one file that cannot be loaded.
        Exception: of `stock_files.loading_errors`, what Diffusers says to a folder that it cannot load.
    """
    if is_routed(path):
        return _load_several(model, path, dtype)
    if Path(path).is_file():
        return load_single_file(Path(path), model.config, where=model.name, key="config", dtype=dtype, download=True)
    return stock_pipeline(path, dtype=dtype)


def _load_several(model: ModelUnderTest, folder: str, dtype: torch.dtype) -> Any:
    single = {"lora": model.lora, "adapter": model.adapter, "base": model.base}
    given = [name for name, value in single.items() if value is not None]
    if given:
        raise UserError(f"{model.name}: {folder} holds several students, which have no use for {given[0]}; name "
                        "one of them, such as its folder student-0")  # fmt: skip
    return load_students(folder, rule=model.rule, dtype=dtype)


def leave_out_checks(pipeline: Any) -> None:
    """Takes safety checker and watermark off a pipeline.

    Neither is the model's work: images that the one flags turn black, the other changes pixels, and both cost time.
    """
    present = [name for name in CHECKS if name in pipeline.components]
    pipeline.register_modules(**dict.fromkeys(present))
    stock = pipeline.stock if isinstance(pipeline, RoutedPipeline) else pipeline
    if "watermark" in vars(stock):  # Stable Diffusion XL's, which is no component
        stock.watermark = None


def check_size(pipeline: Any, sides: Mapping[str, int], name: str) -> None:
    """Looks now, and not at the first image, whether a pipeline can be asked for images of a size.

    Args:
        pipeline: as loaded.
        sides: arguments of its call, in pixels; none where it decides itself.
        name: of the model.

    Raises:
        UserError: its size is fixed, or a side is no whole number of tokens.
    """
    if not sides:
        return
    stock = pipeline.stock if isinstance(pipeline, RoutedPipeline) else pipeline
    accepted = inspect.signature(stock.__call__).parameters
    parts = stock.components
    denoiser = parts["unet"] if "unet" in parts else parts["transformer"]
    for side, pixels in sides.items():
        if side not in accepted:
            raise UserError(f"{name}: {type(stock).__name__} makes images of one size; leave out {side}")
        # Whatever their autoencoder, stock pipelines want multiples of 8.
        step = math.lcm(PIXEL_STEP, stock.vae_scale_factor * int(denoiser.config.get("patch_size") or 1))
        if pixels < 1 or pixels % step:
            raise UserError(f"{name}: {side} is {pixels}; {type(stock).__name__} makes images whose sides are "
                            f"multiples of {step} pixels")  # fmt: skip


def put_on_adapter(pipeline: DiffusionPipeline, path: str, guidance: float, name: str) -> None:
    """Loads one of our guidance adapters onto a pipeline and tells it the scale.

    Raises:
        UserError: there is none at `path`; the text names the model.
    """
    from stepdistill.guidance.files import load_adapter

    try:
        load_adapter(pipeline, path, guidance=guidance)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: {path} cannot be loaded as an adapter ({first_line(error)})") from error


def image_files(path: str) -> list[Path]:
    """The images of a plain folder in order of their names, 2.png before 10.png; none if it is anything else."""
    folder = Path(path)
    if not folder.is_dir() or (folder / "model_index.json").is_file():
        return []
    return sorted((file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES), key=_as_counted)


def _as_counted(file: Path) -> tuple[list[str | int], str]:
    """Orders names by the numbers in them; names that differ in zeros alone, as text."""
    words = re.split(r"(\d+)", file.name)  # every second one is a number
    return [int(word) if place % 2 else word for place, word in enumerate(words)], file.name
