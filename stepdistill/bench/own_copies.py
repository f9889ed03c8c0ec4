"""The user's own copy of a protocol's prompts and real images: which of them are meant, and whether all are there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stepdistill.bench.loading import IMAGE_SUFFIXES
from stepdistill.data.entries import file_entries, text_of
from stepdistill.data.findings import Findings
from stepdistill.data.prompts import load_prompts
from stepdistill.data.source import parse_source
from stepdistill.errors import UserError


if TYPE_CHECKING:
    from stepdistill.bench.protocols import Standard


def own_prompts(file: Path, standard: Standard) -> list[str]:
    """The first prompts of a file, each in one line; MJHQ's is {id: {category, prompt}}.

    Raises:
        UserError: it has too few, or cannot be read.
    """
    entries = _by_id(file)
    found: Sequence[str] = load_prompts(file).prompts if entries is None else [e["prompt"] for e in entries.values()]
    if len(found) < standard.count:
        raise UserError(f"{file}: has {len(found):,} prompts, the protocol wants {standard.count:,}: "
                        f"{standard.source}")  # fmt: skip
    return [" ".join(text.split()) for text in found[: standard.count]]


def own_images(folder: Path, prompts: Path | None, kind: str, standard: Standard) -> list[Path]:
    """The real images of a protocol, all of them and no others, in order of their paths.

    Args:
        folder: holds them at any depth.
        prompts: the protocol's file of prompts, which may name their images; None if it is not given yet.
        kind: name of the protocol.
        standard: says how many they are.

    Raises:
        UserError: the folder does not hold exactly these; says what to do.
    """
    found = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
    named = _named_images(prompts, standard) if prompts is not None and standard.own_images else None
    files = found if named is None else [file for file in found if file.stem in named]
    if len(files) == standard.real:
        return files
    kinds, wanted = ", ".join(IMAGE_SUFFIXES), f"{kind} wants {standard.real:,}, {standard.reference}"
    if named is not None:
        raise UserError(f"{folder}: holds {len(files):,} images ({kinds}) of the {len(named):,} names in {prompts}, "
                        f"{wanted}; give the folder that has each of them once")  # fmt: skip
    remedy = "give a folder that holds these alone"
    if standard.own_images and len(files) > standard.real:
        remedy += ", or prompts as .jsonl with prompt and file_name"
    raise UserError(f"{folder}: holds {len(files):,} images ({kinds}), {wanted}; {remedy}")


def _by_id(file: Path) -> dict[str, Any] | None:
    """What a JSON file of MJHQ's kind holds; None of any other file."""
    if file.suffix.lower() != ".json":
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        return None
    if not all(isinstance(entry, dict) and isinstance(entry.get("prompt"), str) for entry in content.values()):
        raise UserError(f"{file}: an object must be as MJHQ's meta_data.json, {{id: {{category, prompt}}}}; else give "
                        "a list of prompts")  # fmt: skip
    return content


def _named_images(file: Path, standard: Standard) -> set[str] | None:
    """Names, without suffixes, of the images that belong to the prompts, where the file of prompts says them."""
    entries = _by_id(file)
    if entries is not None:
        return set(list(entries)[: standard.count])
    if file.suffix.lower() not in (".json", ".jsonl"):
        return None
    source, findings = parse_source(file), Findings()
    found = [e for place, e in file_entries(file, source, findings) if text_of(e, place, source.prompt_keys, findings)]
    named = [e["file_name"] for e in found[: standard.count] if isinstance(e, dict) and "file_name" in e]
    return {Path(name).stem for name in named} if len(named) == standard.count else None


def read_image(file: Path) -> Tensor:
    """A file => (3, H, W) in [0, 1].

    Raises:
        UserError: it is no image.
    """
    try:
        with Image.open(file) as opened:
            pixels = np.asarray(opened.convert("RGB"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read as an image ({error})") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
