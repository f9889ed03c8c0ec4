"""Encoded images on disk, so that a long training run meets the autoencoder once per image.

The posterior's mean and standard deviation are stored rather than a sample, so every epoch draws anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.data.cache import weights_fingerprint
from stepdistill.data.images import ImageSet
from stepdistill.data.prompts import epoch_indices
from stepdistill.errors import UserError
from stepdistill.families.base import ModelFamily


Progress = Callable[[int, int], None]


class LatentBatch(NamedTuple):
    """Scaled latents (B, C, H, W) and their B captions."""

    latents: Tensor
    captions: list[str]


class Latents(Protocol):
    """Where the trainer gets encoded images from."""

    def batch(self, seed: int, start: int, count: int) -> LatentBatch:
        """Samples `start` to `start + count - 1` of a run."""


class LatentsOnTheFly:
    """Encodes images whenever they are asked for; for endless sources."""

    def __init__(self, family: ModelFamily, images: ImageSet) -> None:
        self._family, self._images = family, images

    def batch(self, seed: int, start: int, count: int) -> LatentBatch:
        """Reads and encodes the images of these samples."""
        images, captions = self._images.batch(self._images.indices(seed, start, count))
        return LatentBatch(self._family.encode_images(images), captions)


class LatentCache:
    """The first `count` images of a set, encoded once; each epoch plays all of them in an order of its own.

    Args:
        folder: may hold other caches beside this one.
        family: the loaded teacher, whose autoencoder is used.
        images: what to encode.
        count: how many.
        shard_size: images per file; an interrupted build goes on after the last whole file.
    """

    def __init__(
        self, folder: Path, family: ModelFamily, images: ImageSet, count: int, *, shard_size: int = 1024
    ) -> None:
        facts = {"images": images.fingerprint, "size": images.size, "count": count, "shard": shard_size,
                 "vae": weights_fingerprint(family.pipeline.vae)}  # fmt: skip
        self.fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        self.folder = folder / self.fingerprint[:16]
        self._family, self._images, self._count, self._shard_size = family, images, count, shard_size
        self._moments: dict[str, Tensor] = {}
        self._captions: list[str] = []

    def build(self, progress: Progress | None = None) -> None:
        """Encodes what is not on disk yet and loads all; call it once before `batch`.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        parts: list[dict[str, Tensor]] = []
        for first in range(0, self._count, self._shard_size):
            stem = self.folder / f"shard-{first // self._shard_size:05d}"
            if not stem.with_suffix(".json").is_file():
                self._write(stem, range(first, min(first + self._shard_size, self._count)))
            parts.append(load_file(stem.with_suffix(".safetensors")))
            self._captions += json.loads(stem.with_suffix(".json").read_text())
            if progress is not None:
                progress(len(self._captions), self._count)
        self._moments = {name: torch.cat([part[name] for part in parts]) for name in ("mean", "std")}

    @property
    def captions(self) -> tuple[str, ...]:
        """Of all images, by number."""
        return tuple(self._captions)

    def batch(self, seed: int, start: int, count: int) -> LatentBatch:
        """Draws from the posteriors of these samples, on the autoencoder's device."""
        indices = epoch_indices(seed, start, count, self._count)
        mean, std = (self._moments[name][indices].to(self._family.device) for name in ("mean", "std"))
        return LatentBatch(mean + std * torch.randn_like(mean), [self._captions[i] for i in indices])

    @torch.no_grad()
    def _write(self, stem: Path, numbers: range) -> None:
        vae = self._family.pipeline.vae
        scale, shift, parts, captions = vae.config.scaling_factor, self._family.latent_shift, [], []
        for first in range(numbers.start, numbers.stop, 64):
            batch = self._images.batch(range(first, min(first + 64, numbers.stop)))
            posterior = vae.encode(batch.images.to(self._family.device, vae.dtype)).latent_dist
            parts.append(((posterior.mean - shift) * scale, posterior.std * scale))
            captions += batch.captions
        mean, std = (torch.cat([part[i] for part in parts]).float().cpu().contiguous() for i in (0, 1))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # The captions are renamed last: a shard counts as whole only when both files are.
            new = stem.with_name(f".{stem.name}.{os.getpid()}.new")
            save_file({"mean": mean, "std": std}, new)
            new.replace(stem.with_suffix(".safetensors"))
            new.write_text(json.dumps(captions))
            new.replace(stem.with_suffix(".json"))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.folder}: encoded images cannot be written ({error}); make room, or set "
                            "data.cache: false") from error  # fmt: skip
