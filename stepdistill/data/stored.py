"""Images on disk, in a folder or in webdataset shards: everything but the pixels is known from the start."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from stepdistill.data.buckets import nearest_bucket
from stepdistill.data.findings import Findings
from stepdistill.data.images import ImageBatch, ImageSet, digest
from stepdistill.data.pixels import read_pixels, read_size
from stepdistill.data.prompts import epoch_indices
from stepdistill.data.shapes import to_tensor
from stepdistill.data.source import PROMPT_KEYS, SHAPES_SOURCE, Source
from stepdistill.errors import UserError
from stepdistill.framing import Framing, Size, framing_of


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
METADATA_FILE = "metadata.jsonl"
ENDS = 4096  # bytes at either end of a file that its fingerprint looks at


@dataclass(frozen=True)
class Place:
    """Where the bytes of one image are.

    Attributes:
        path: an image file, or a shard that holds it.
        inside: its name in the shard.
        offset: of the image in the file.
        length: in bytes; None: the whole file.
    """

    path: Path
    inside: str = ""
    offset: int = 0
    length: int | None = None

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.path}: {self.inside}" if self.inside else str(self.path)

    def open(self) -> IO[bytes]:
        """The image as a file of its own."""
        if self.length is None:
            return self.path.open("rb")
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.length))


@dataclass(frozen=True)
class Found:
    """One image before any rule has looked at it; a caption of None is missing, `lack` then says what is there."""

    place: Place
    caption: str | None
    lack: str = ""


@dataclass(frozen=True)
class StoredImages(ImageSet):
    """Images on disk with one caption each.

    Attributes:
        places: where the images are.
        captions: one for each.
        framings: one for each.
        marks: of each image's bytes, for the fingerprint.
        size: side of squares in pixels.
        source: as the user wrote it, for messages.
        dropped: how many images each rule left out, by rule.
        sizes: of the buckets.
    """

    places: tuple[Place, ...]
    captions: tuple[str, ...]
    framings: tuple[Framing, ...]
    marks: tuple[int, ...]
    size: int
    source: str = ""
    dropped: Mapping[str, int] = field(default_factory=dict)
    sizes: tuple[Size, ...] = ()

    def __len__(self) -> int:
        return len(self.places)

    @property
    def length(self) -> int:
        """How many images there are."""
        return len(self)

    @property
    def buckets(self) -> tuple[Size, ...]:
        """The sizes that images are fitted to."""
        return self.sizes

    @property
    def fingerprint(self) -> str:
        """Of names, captions, sizes, and of the ends of the files' bytes: copies elsewhere have the same."""
        names = [[place.path.name, place.inside] for place in self.places]
        return digest([self.size, self.sizes, self.captions, names, self.marks])

    def indices(self, seed: int, start: int, count: int) -> list[int]:
        """Image numbers; every epoch plays each image once, in an order of its own."""
        return epoch_indices(seed, start, count, len(self))

    def batch(self, indices: Sequence[int]) -> ImageBatch:
        """Reads, crops and resizes the images with these numbers."""
        images = []
        for index in indices:
            with self.places[index].open() as file:
                images.append(read_pixels(file, self.places[index].name, self.framings[index].target))
        return ImageBatch(to_tensor(images), self.texts(indices))

    def texts(self, indices: Sequence[int]) -> list[str]:
        """The captions, without reading the images."""
        return [self.captions[i] for i in indices]

    def framing(self, index: int) -> Framing:
        """From the image's size, without reading it."""
        return self.framings[index]

    def summary(self) -> str:
        """How many images there are and what was left out by which rule."""
        dropped = ", ".join(f"{count} {rule}" for rule, count in self.dropped.items())
        return f"{len(self)} images from {self.source}" + (f" (left out: {dropped})" if dropped else "")


def open_stored(source: Source, size: int, buckets: tuple[Size, ...], findings: Findings) -> StoredImages:
    """Opens a folder of images, webdataset shards, or a folder of them.

    Raises:
        UserError: there is no such thing, a broken image or caption, or no image left after filtering.
    """
    from stepdistill.data.shards import is_shard, shard_images

    files = source.files()
    if len(files) == 1 and files[0].is_dir():
        shards = sorted(p for p in files[0].rglob("*") if is_shard(p))
        candidates = shard_images(shards, source, findings) if shards else _folder_images(files[0])
    elif all(is_shard(file) for file in files):
        candidates = shard_images(files, source, findings)
    else:
        raise UserError(f'{source.text}: no such folder of images; give a folder, name.tar, hf:owner/name or '
                        f'"{SHAPES_SOURCE}"')  # fmt: skip
    kept: list[tuple[Place, str, Framing, int]] = []
    seen = 0
    for found in candidates:
        seen += 1
        examined = _examine(found, size, buckets, findings)
        if examined is not None:
            kept.append((found.place, *examined))
    if not kept:
        raise UserError(
            f"{source.text}: none of {seen} images can be used "
            f"({findings.reasons() or 'no ' + ', '.join(IMAGE_SUFFIXES)}); put name.txt beside name.png or write "
            f"{METADATA_FILE} with file_name and text, and check the size"
        )
    places, captions, framings, marks = zip(*kept, strict=True)
    return StoredImages(places, captions, framings, marks, size, source.text, dict(findings.dropped), buckets)


def _examine(
    found: Found, size: int, buckets: tuple[Size, ...], findings: Findings
) -> tuple[str, Framing, int] | None:
    """Caption, framing and mark of an image that every rule lets pass."""
    name = found.place.name
    if found.caption is None:
        findings.drop("without a caption", f"{name}{found.lack}")
        return None
    if not found.caption:
        findings.drop("with a blank caption", name)
        return None
    try:
        with found.place.open() as file:
            original = read_size(file, name)
            mark = _mark(file)
    except (UserError, OSError) as error:
        findings.fault("unreadable", error if isinstance(error, UserError) else UserError(f"{name}: {error}"))
        return None
    target = nearest_bucket(original, buckets) if buckets else Size(size, size)
    if original.height < target.height or original.width < target.width:
        rule = "smaller than their bucket" if buckets else f"smaller than {size} pixels"
        findings.drop(rule, f"{name} ({original.width}x{original.height})")
        return None
    return found.caption, framing_of(original, target), mark


def _mark(file: IO[bytes]) -> int:
    """A checksum of length, beginning and end of a file: changes of an image show there, and it costs one read."""
    length = file.seek(0, io.SEEK_END)
    mark = zlib.crc32(str(length).encode())
    for offset in (0, max(0, length - ENDS)):
        file.seek(offset)
        mark = zlib.crc32(file.read(ENDS), mark)
    return mark


def _folder_images(folder: Path) -> Iterator[Found]:
    told = _read_metadata(folder)
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES):
        yield Found(Place(path), told.get(path) or _caption_beside(path))


def _caption_beside(path: Path) -> str | None:
    file = path.with_suffix(".txt")
    if not file.is_file():
        return None
    try:
        return " ".join(file.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text; save the caption with UTF-8 encoding") from error


def _read_metadata(folder: Path) -> dict[Path, str]:
    """Captions by image path, from the metadata.jsonl of the folder, as Hugging Face's imagefolder writes it."""
    file = folder / METADATA_FILE
    if not file.is_file():
        return {}
    captions = {}
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}, line {number}: not valid JSON ({error.msg})") from error
        key = next((k for k in PROMPT_KEYS if isinstance(entry, dict) and k in entry), None)
        if key is None or "file_name" not in entry:
            raise UserError(f"{file}, line {number}: needs file_name and one of {', '.join(PROMPT_KEYS)}")
        path = folder / entry["file_name"]
        if not path.is_file():
            raise UserError(f"{file}, line {number}: {path} does not exist; correct file_name or remove the line")
        captions[path] = " ".join(str(entry[key] or "").split())
    return captions
