"""Captioned images for the stages that learn from data: rendered scenes without end, or a folder of one's own.

source => ImageSet;  image numbers => images (B, 3, H, W) in [-1, 1] and their captions
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image, ImageOps

from stepdistill.data.prompts import PROMPT_KEYS, SHAPES_SOURCE, epoch_indices
from stepdistill.data.shapes import IMAGE_SIZE, captioned_scene, render, to_tensor
from stepdistill.errors import UserError


if TYPE_CHECKING:
    import torch


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
METADATA_FILE = "metadata.jsonl"


class ImageBatch(NamedTuple):
    """Images (B, 3, H, W) float32 in [-1, 1] and their B captions."""

    images: torch.Tensor
    captions: list[str]


class ImageSet(ABC):
    """Captioned square images of one size, addressed by number."""

    size: int

    @property
    def length(self) -> int | None:
        """How many images there are; None: endless."""
        return None

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 (hexadecimal) that changes whenever an image, a caption or the size does."""

    @abstractmethod
    def indices(self, seed: int, start: int, count: int) -> list[int]:
        """Image numbers of the samples `start` to `start + count - 1` of a run: a function of the arguments alone."""

    @abstractmethod
    def batch(self, indices: Sequence[int]) -> ImageBatch:
        """The images with these numbers."""

    def texts(self, indices: Sequence[int]) -> list[str]:
        """The captions of the images with these numbers."""
        return self.batch(indices).captions

    @abstractmethod
    def summary(self) -> str:
        """One line for the log: how many images there are and what was left out by which rule."""


def load_images(source: str | Path, *, size: int | None = None, seed: int = 1) -> ImageSet:
    """Opens a source of captioned images.

    Args:
        source: "shapes" (the bundled scenes, endless), or a folder, also nested, with images and captions: either
            `name.txt` beside `name.png`, or a `metadata.jsonl` of objects with file_name and text, caption or prompt.
        size: side of the square images in pixels; a folder's images are cropped at the centre and resized to it.
            None: 64 for "shapes"; a folder needs it.
        seed: which endless series of scenes; only for "shapes".

    Raises:
        UserError: no such folder, an unreadable image, a malformed metadata line, or no image left after filtering.
    """
    if size is not None and size < 1:
        raise UserError(f"images: size must be at least 1 pixel, got {size}")
    if str(source) == SHAPES_SOURCE:
        return ShapesImages(seed=seed, size=size or IMAGE_SIZE)
    if size is None:
        raise UserError(f"{source}: a folder of images needs a size in pixels, for example data.size=512")
    return _open_folder(Path(source), size)


@dataclass(frozen=True)
class ShapesImages(ImageSet):
    """Rendered scenes: image i is scene i of the series `seed`, made when it is asked for."""

    seed: int = 1
    size: int = IMAGE_SIZE

    @property
    def fingerprint(self) -> str:
        """Of the seed, the size, and one painted scene, which stands for the way scenes are painted."""
        sample = self.batch([0])
        return _digest([self.seed, self.size, *sample.captions, sample.images.sum().item()])

    def indices(self, seed: int, start: int, count: int) -> list[int]:
        """Scene numbers; no scene comes twice, and the scenes have a seed of their own already."""
        return list(range(start, start + count))

    def batch(self, indices: Sequence[int]) -> ImageBatch:
        """Paints the scenes with these numbers."""
        scenes = [captioned_scene(self.seed, index) for index in indices]
        images = [_fit(render(scene.scene), self.size) for scene in scenes]
        return ImageBatch(to_tensor(images), [scene.caption for scene in scenes])

    def texts(self, indices: Sequence[int]) -> list[str]:
        """The captions, without painting."""
        return [captioned_scene(self.seed, index).caption for index in indices]

    def summary(self) -> str:
        """What is played."""
        return f"endless images from {SHAPES_SOURCE} (seed {self.seed})"


@dataclass(frozen=True)
class FolderImages(ImageSet):
    """Images on disk, in the order of their names, with one caption each.

    Attributes:
        paths: image files.
        captions: one for each.
        size: side in pixels.
        source: the folder, for messages.
        dropped: how many images each rule left out, by rule.
    """

    paths: tuple[Path, ...]
    captions: tuple[str, ...]
    size: int
    source: str = ""
    dropped: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def length(self) -> int:
        """How many images the folder has."""
        return len(self)

    @property
    def fingerprint(self) -> str:
        """Of names, captions and the size, and of the files' lengths and times; it does not read the images."""
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths]
        return _digest([self.size, self.captions, stats])

    def indices(self, seed: int, start: int, count: int) -> list[int]:
        """Image numbers; every epoch plays each image once, in an order of its own."""
        return epoch_indices(seed, start, count, len(self))

    def batch(self, indices: Sequence[int]) -> ImageBatch:
        """Reads, crops and resizes the images with these numbers."""
        images = [read_image(self.paths[i], self.size) for i in indices]
        return ImageBatch(to_tensor(images), [self.captions[i] for i in indices])

    def texts(self, indices: Sequence[int]) -> list[str]:
        """The captions, without reading the images."""
        return [self.captions[i] for i in indices]

    def summary(self) -> str:
        """How many images there are and what was left out by which rule."""
        dropped = ", ".join(f"{count} {rule}" for rule, count in self.dropped.items())
        return f"{len(self)} images from {self.source}" + (f" (left out: {dropped})" if dropped else "")


def read_image(path: Path, size: int) -> Image.Image:
    """Reads one image: turned upright, transparency on white, cropped at the centre, resized with Lanczos.

    Raises:
        UserError: the file is missing, damaged or no image.
    """
    try:
        with Image.open(path) as opened:
            return _fit(_flatten(ImageOps.exif_transpose(opened)), size)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error


def _fit(image: Image.Image, size: int) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # Two calls: ImageOps.fit would let pixels from outside the square bleed in.
    square = image if image.width == image.height else image.crop((left, top, left + side, top + side))
    return square if side == size else square.resize((size, size), Image.Resampling.LANCZOS)


def _digest(facts: list[object]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _flatten(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: cannot be read as an image ({error}); repair or remove the file")


def _open_folder(folder: Path, size: int) -> FolderImages:
    if not folder.is_dir():
        raise UserError(f'{folder}: no such folder of images; give a folder or "{SHAPES_SOURCE}"')
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    told = _read_metadata(folder)
    paths, captions, dropped = [], [], Counter[str]()
    for path in files:
        caption = told.get(path) or _caption_beside(path)
        if caption is None:
            dropped["without a caption"] += 1
        elif not caption:
            dropped["with a blank caption"] += 1
        elif min(_image_size(path)) < size:
            dropped[f"smaller than {size} pixels"] += 1
        else:
            paths.append(path)
            captions.append(caption)
    if not paths:
        reasons = ", ".join(f"{count} {rule}" for rule, count in dropped.items())
        raise UserError(
            f"{folder}: none of {len(files)} images can be used ({reasons or 'no ' + ', '.join(IMAGE_SUFFIXES)}); "
            f"put name.txt beside name.png or write {METADATA_FILE} with file_name and text, and check the size"
        )
    return FolderImages(tuple(paths), tuple(captions), size, str(folder), dict(dropped))


def _image_size(path: Path) -> tuple[int, int]:
    """Reads the header alone, so that a damaged file is named before training starts and not hours later."""
    try:
        with Image.open(path) as image:
            return image.width, image.height
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error


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
