"""The models of a benchmark: their cells over network calls, what identifies them, and images made elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.assets import resolve_model_path
from stepdistill.bench.generate import Job, ModelUnderTest
from stepdistill.bench.loading import image_files
from stepdistill.bench.metrics.weights import fingerprint
from stepdistill.bench.own_copies import read_image
from stepdistill.errors import UserError


ANY_FILE = ".gitattributes"


def at_nfe(model: ModelUnderTest, calls: Sequence[int]) -> list[ModelUnderTest]:
    """The model at several numbers of network calls per image, as far as it can be called so often.

    Guidance doubles the batch, so that a guided model makes half as many steps, and no odd number of calls. What an
    image really costs is counted when it is made.

    Args:
        model: for its `steps` others are put in.
        calls: network calls per image.

    Returns:
        One for each number of calls that the model can make, called "name, 4 steps".
    """
    each = 2 if model.guidance_scale > 1 and model.adapter is None else 1
    steps = [count // each for count in calls if count >= each and count % each == 0]
    return [replace(model, name=f"{model.name}, {n} step{'s' if n > 1 else ''}", steps=n) for n in steps]


def identity(model: ModelUnderTest, *, offline: bool = False) -> dict[str, Any]:
    """What the model's images depend on, with hashes of its weights; of what is on the hub, the commit.

    Args:
        model: with paths that need not have been downloaded.
        offline: the hub is not asked, only its cache.
    """
    facts = {key: value for key, value in asdict(model).items() if key not in ("name", "train_seconds")}
    for key in ("path", "lora", "adapter", "base", "scheduler", "config"):
        if facts.get(key) is not None:
            facts[f"{key}_sha256"] = _fingerprint(str(facts[key]), offline)
    return facts


def _fingerprint(path: str, offline: bool) -> str:
    """Of files, their hash; of images, that of their names and sizes; of a hub id, the commit that would be loaded."""
    images = image_files(path)
    if images:
        names = "\n".join(f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in images)
        return hashlib.sha256(names.encode()).hexdigest()
    place = Path(path)
    if place.exists() or place.parts[:1] == ("assets",):
        return fingerprint(resolve_model_path(path))
    # Anything else is a word, such as the name of a scheduler.
    return _commit(path, offline) if path.count("/") == 1 else path


def _commit(repository: str, offline: bool) -> str:
    """The commit that loading a repository would take, the same before it is downloaded and after.

    Without the network that is the one in the cache; the id itself where there is none, or no such repository.
    """
    from huggingface_hub import snapshot_download

    # Of the hub a small file that every repository has; of the cache none, so that any part of it will do.
    for patterns, local in (([ANY_FILE], False), ([], True)):
        if local or not offline:
            try:
                return Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=local)).name
            except (OSError, ValueError):
                continue
    return repository


@dataclass(frozen=True)
class Folder:
    """Images that were made elsewhere, prompt by prompt in order of their names.

    Args:
        name: of the model.
        files: at least as many as there are jobs.
        images_per_prompt: K.
    """

    name: str
    files: Sequence[Path]
    images_per_prompt: int

    def __call__(self, jobs: Sequence[Job]) -> Tensor:
        """Images (B, 3, H, W) of the jobs, in [0, 1]."""
        images = [read_image(self.files[p * self.images_per_prompt + k]) for p, k in jobs]
        if len({image.shape for image in images}) > 1:
            raise UserError(f"{self.name}: images of a folder must have one size; resize them alike first")
        return torch.stack(images)
