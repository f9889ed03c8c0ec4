"""The models of a benchmark: their cells over network calls, what identifies them, and images made elsewhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.assets import resolve_bundled, resolve_model_path
from stepdistill.bench.generate import Job, ModelUnderTest
from stepdistill.bench.loading import image_files
from stepdistill.bench.metrics.weights import fingerprint
from stepdistill.bench.own_copies import read_image
from stepdistill.errors import UserError
from stepdistill.inspection.tensors import read_header, takes_guidance
from stepdistill.routed import is_routed, student_folders


ANY_FILE = ".gitattributes"


def at_nfe(model: ModelUnderTest, calls: Sequence[int]) -> tuple[list[ModelUnderTest], list[int]]:
    """The model at several numbers of network calls per image, and those numbers that it cannot be called at.

    Guidance doubles the batch, so that a guided model makes half as many steps, and no odd number of calls; unless its
    network takes the guidance scale as an input. What an image really costs is counted when it is made.

    Args:
        model: for its `steps` others are put in.
        calls: network calls per image.

    Returns:
        One for each number of calls that the model can make, called "name, 4 steps"; the other numbers.
    """
    each = 2 if doubles(model) else 1
    steps = [count // each for count in calls if count % each == 0]
    cells = [replace(model, name=f"{model.name}, {n} step{'s' if n > 1 else ''}", steps=n, timesteps=None)
             for n in steps]  # fmt: skip
    return cells, [count for count in calls if count % each]


def doubles(model: ModelUnderTest) -> bool:
    """Whether guidance doubles the batch of the model's network, by what its file or its configuration says.

    It does not where the network takes the scale as an input: UNets like LCM's (time_cond_proj_dim), FLUX and
    Sana-Sprint (guidance_embeds). Of a model whose configuration cannot be read it is taken to.
    """
    if model.guidance_scale <= 1 or model.adapter is not None:
        return False
    path = resolve_bundled(model.path)
    if is_routed(path):
        path = str(student_folders(Path(path))[0])  # they are of one architecture
    if Path(path).is_file():
        return not takes_guidance(read_header(Path(path)).shapes)
    for part in ("unet", "transformer"):
        network = _network_config(path, part)
        if network is not None:
            embedded = network.get("time_cond_proj_dim") is not None or bool(network.get("guidance_embeds"))
            # FLUX without such an input was distilled, and its pipeline then does without guidance.
            return not embedded and not str(network.get("_class_name")).startswith("Flux")
    return True


def _network_config(path: str, part: str) -> dict[str, Any] | None:
    """config.json of a part of a Diffusers folder or hub id; None if there is none, or it cannot be had."""
    file = Path(path) / part / "config.json"
    if not Path(path).exists():
        from huggingface_hub import hf_hub_download

        try:
            file = Path(hf_hub_download(path, f"{part}/config.json"))
        except (OSError, ValueError, RuntimeError):  # there is none, no network, or this is no hub id
            return None
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def identity(model: ModelUnderTest, *, offline: bool = False) -> dict[str, Any]:
    """What the model's images depend on, with hashes of its weights; of what is on the hub, the commit.

    Args:
        model: with paths that need not have been downloaded.
        offline: the hub is not asked, only its cache.
    """
    left_out = ("name", "train_seconds", "height", "width")
    # A size that is not given says nothing, so that cells from before there were sizes stay good.
    facts = {key: value for key, value in asdict(model).items() if key not in left_out} | model.size_options
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
