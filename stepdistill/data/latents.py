"""Encoded images on disk, so that a long training run meets the autoencoder once per image.

    <folder>/<first 16 digits of the fingerprint>/index.json, shard-00000.safetensors, shard-00000.json, ...

The posterior's mean and standard deviation are stored rather than a sample, so every epoch draws anew. A shard has a
pair of tensors for every size of its images, `mean/HxW` and `std/HxW` (N, C, h, w) at H x W pixels; its .json says of
each image its caption, its size, its row and how it was cut out of its original.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stepdistill.data.buckets import BucketOrder
from stepdistill.data.cache import INDEX, fingerprint_of, weights_fingerprint
from stepdistill.data.images import ImageSet
from stepdistill.data.prompts import epoch_indices
from stepdistill.data.reading import ReadAhead
from stepdistill.errors import UserError
from stepdistill.families.base import ModelFamily
from stepdistill.files import write_whole
from stepdistill.framing import Framing, Size


Progress = Callable[[int, int], None]

FORMAT = 2  # of the files
PIXELS = 64 * 256 * 256  # encoded at once: 64 images of 256 pixels, 4 of 1024


class LatentBatch(NamedTuple):
    """Scaled latents (B, C, H, W), their B captions and, where images come in several shapes, their B framings."""

    latents: Tensor
    captions: list[str]
    framings: list[Framing] | None = None


class Latents(Protocol):
    """Where the trainer gets encoded images from."""

    def batch(self, seed: int, start: int, count: int, parts: int = 1) -> LatentBatch:
        """Samples `start` to `start + count - 1` of a run, one of the `parts` of a micro-batch."""


class LatentsOnTheFly:
    """Encodes images whenever they are asked for; for endless sources.

    Args:
        family: the loaded teacher, whose autoencoder is used.
        images: what to encode.
        num_processes: how many draw at the same time, which says what comes next.
        workers: threads that read images ahead.
    """

    def __init__(self, family: ModelFamily, images: ImageSet, *, num_processes: int = 1, workers: int = 0) -> None:
        self._family, self._images, self._num_processes = family, images, num_processes
        self._reader = ReadAhead(images, workers)
        self._order = None
        if images.buckets and images.length is not None:
            self._order = BucketOrder([images.framing(i).target for i in range(images.length)])

    def batch(self, seed: int, start: int, count: int, parts: int = 1) -> LatentBatch:
        """Reads and encodes the images of these samples."""
        indices = self._indices(seed, start, count, parts)
        read = self._reader.read(indices, self._indices(seed, start + count * self._num_processes, count, parts))
        framings = None if self._order is None else [self._images.framing(i) for i in indices]
        return LatentBatch(self._family.encode_images(read.images), read.captions, framings)

    def _indices(self, seed: int, start: int, count: int, parts: int) -> list[int]:
        if self._order is None:
            return self._images.indices(seed, start, count)
        return grouped(self._order, seed, start, count, parts)


class LatentCache:
    """The first `count` images of a set, encoded once; each epoch plays all that are kept in an order of its own.

    Args:
        folder: may hold other caches beside this one.
        family: the loaded teacher, whose autoencoder is used.
        images: what to encode.
        count: how many.
        shard_size: images per file; an interrupted build goes on after the last whole file.

    Attributes:
        facts: what determines the files, by name.
        fingerprint: of the facts.
        folder: of this cache.
    """

    def __init__(
        self, folder: Path, family: ModelFamily, images: ImageSet, count: int, *, shard_size: int = 1024
    ) -> None:
        vae = family.pipeline.vae
        self.facts: dict[str, Any] = {
            "format": FORMAT, "images": images.fingerprint, "size": images.size, "count": count, "shard": shard_size,
            "buckets": [list(bucket) for bucket in images.buckets], "vae": weights_fingerprint(vae),
            "scaling": [float(vae.config.scaling_factor), float(family.latent_shift)],
        }  # fmt: skip
        self.fingerprint = fingerprint_of(self.facts)
        self.folder = folder / self.fingerprint[:16]
        self._family, self._images, self._count, self._shard_size = family, images, count, shard_size
        self._entries: list[dict[str, Any]] = []
        self._shards: dict[int, dict[str, Tensor]] = {}
        self._order: BucketOrder | None = None

    def build(self, progress: Progress | None = None) -> None:
        """Encodes what is not on disk yet and opens all; call it once before `batch`.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        for shard, numbers in enumerate(self._ranges()):
            if not self._path(shard, "json").is_file():
                self._write(shard, numbers)
            if progress is not None:
                progress(numbers.stop, self._count)
        self.open()

    def open(self) -> None:
        """Reads what the files say about the images; their tensors are read when they are played.

        Raises:
            UserError: a file is missing.
        """
        self._entries = []
        for shard in range(len(self._ranges())):
            try:
                written = json.loads(self._path(shard, "json").read_text())
            except OSError as error:
                raise UserError(f"{self._path(shard, 'json')}: is missing, so this cache of encoded images is not "
                                "complete; make it again, it goes on from whole files") from error  # fmt: skip
            self._entries += [{**entry, "shard": shard} for entry in written]
        self._arrange()

    def keep(self, numbers: Sequence[int]) -> None:
        """From now on plays these of the encoded images alone, in this order of their numbers; call it once opened."""
        self._entries = [self._entries[number] for number in numbers]
        self._arrange()

    def _arrange(self) -> None:
        if self._images.buckets:
            self._order = BucketOrder([Size(*entry["size"]) for entry in self._entries])

    @property
    def captions(self) -> tuple[str, ...]:
        """Of all images, by number."""
        return tuple(entry["caption"] for entry in self._entries)

    def batch(self, seed: int, start: int, count: int, parts: int = 1) -> LatentBatch:
        """Draws from the posteriors of these samples, on the autoencoder's device."""
        if self._order is None:
            indices = epoch_indices(seed, start, count, len(self._entries))
        else:
            indices = grouped(self._order, seed, start, count, parts)
        mean, std = (self._rows(name, indices).to(self._family.device) for name in ("mean", "std"))
        entries = [self._entries[i] for i in indices]
        framings = None if self._order is None else [_framing(entry) for entry in entries]
        return LatentBatch(mean + std * torch.randn_like(mean), [entry["caption"] for entry in entries], framings)

    def _ranges(self) -> list[range]:
        firsts = range(0, self._count, self._shard_size)
        return [range(first, min(first + self._shard_size, self._count)) for first in firsts]

    def _path(self, shard: int, suffix: str) -> Path:
        return self.folder / f"shard-{shard:05d}.{suffix}"

    def _rows(self, name: str, indices: Sequence[int]) -> Tensor:
        rows = []
        for index in indices:
            entry = self._entries[index]
            tensors = self._shard(entry["shard"])
            rows.append(tensors[_key(name, Size(*entry["size"]))][entry["row"]])
        return torch.stack(rows)

    def _shard(self, shard: int) -> dict[str, Tensor]:
        """Tensors of one shard: memory maps, so a cache may be larger than the memory."""
        if shard not in self._shards:
            path = self._path(shard, "safetensors")
            try:
                with safe_open(path, framework="pt") as file:
                    self._shards[shard] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path}: cannot be read ({error}); remove it and its .json and make the cache again, "
                                "which goes on from whole files") from error  # fmt: skip
        return self._shards[shard]

    def _write(self, shard: int, numbers: range) -> None:
        tensors, entries = self._encode(numbers)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            index = {"fingerprint": self.fingerprint, "facts": self.facts}
            write_whole(self.folder / INDEX, lambda new: new.write_text(json.dumps(index, indent=2) + "\n"))
            header = {"fingerprint": self.fingerprint}
            write_whole(self._path(shard, "safetensors"), lambda new: save_file(tensors, new, metadata=header))
            # The entries come last: a shard counts as whole only when both files are.
            write_whole(self._path(shard, "json"), lambda new: new.write_text(json.dumps(entries)))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.folder}: encoded images cannot be written ({error}); make room, or set "
                            "data.cache: false") from error  # fmt: skip

    @torch.no_grad()
    def _encode(self, numbers: range) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """Tensors of a shard by name, and what is to be known of each image, in the order of the numbers."""
        by_size: dict[Size, list[int]] = {}
        for number in numbers:
            by_size.setdefault(self._images.framing(number).target, []).append(number)
        tensors: dict[str, Tensor] = {}
        entries: dict[int, dict[str, Any]] = {}
        for size, members in by_size.items():
            at_once = max(1, min(64, PIXELS // (size.height * size.width)))
            parts = []
            for first in range(0, len(members), at_once):
                some = members[first : first + at_once]
                batch = self._images.batch(some)
                parts.append(self._family.image_moments(batch.images))
                for row, (number, caption) in enumerate(zip(some, batch.captions, strict=True), first):
                    framing = self._images.framing(number)
                    entries[number] = {"caption": caption, "size": list(size), "row": row,
                                       "original": list(framing.original), "crop": list(framing.crop)}  # fmt: skip
            for place, name in enumerate(("mean", "std")):
                joined = torch.cat([part[place] for part in parts])
                tensors[_key(name, size)] = joined.float().cpu().contiguous()
        return tensors, [entries[number] for number in numbers]


def grouped(order: BucketOrder, seed: int, start: int, count: int, parts: int) -> list[int]:
    """The samples that one process takes of a micro-batch that several share, so that all of it has one shape."""
    together = count * parts
    number, offset = divmod(start, together)
    return order.group(seed, number, together)[offset : offset + count]


def _key(name: str, size: Size) -> str:
    return f"{name}/{size.height}x{size.width}"


def _framing(entry: dict[str, Any]) -> Framing:
    top, left = entry["crop"]
    return Framing(Size(*entry["original"]), (top, left), Size(*entry["size"]))
