"""Captioned images for the stages that learn from data: rendered scenes without end, files of one's own, streams.

source => ImageSet;  image numbers => images (B, 3, H, W) in [-1, 1] and their captions
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stepdistill.data.findings import Findings
from stepdistill.data.pixels import fit
from stepdistill.data.shapes import IMAGE_SIZE, CaptionedScene, captioned_scene, render, to_tensor
from stepdistill.data.source import SHAPES_SOURCE, parse_source
from stepdistill.errors import UserError
from stepdistill.framing import Framing, Size


if TYPE_CHECKING:
    import torch


class ImageBatch(NamedTuple):
    """Images (B, 3, H, W) float32 in [-1, 1] and their B captions."""

    images: torch.Tensor
    captions: list[str]


class ImageSet(ABC):
    """Captioned images, addressed by number: squares of one size, or of the sizes of some buckets."""

    size: int

    @property
    def length(self) -> int | None:
        """How many images there are; None: endless."""
        return None

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 (hexadecimal) that changes whenever an image, a caption or the size does."""

    @property
    def buckets(self) -> tuple[Size, ...]:
        """The sizes that images are fitted to, each to the nearest; empty: all are squares of `size`."""
        return ()

    @abstractmethod
    def indices(self, seed: int, start: int, count: int) -> list[int]:
        """Image numbers of the samples `start` to `start + count - 1` of a run: a function of the arguments alone."""

    @abstractmethod
    def batch(self, indices: Sequence[int]) -> ImageBatch:
        """The images with these numbers, which have to be of one bucket."""

    def texts(self, indices: Sequence[int]) -> list[str]:
        """The captions of the images with these numbers."""
        return self.batch(indices).captions

    def framing(self, index: int) -> Framing:
        """How the image with this number is cut out of its original."""
        whole = Size(self.size, self.size)
        return Framing(whole, (0, 0), whole)

    @abstractmethod
    def summary(self) -> str:
        """One line for the log: how many images there are and what was left out by which rule."""


def load_images(
    source: str | Path,
    *,
    size: int | None = None,
    seed: int = 1,
    buckets: Sequence[Size] = (),
    count: int | None = None,
    findings: Findings | None = None,
) -> ImageSet:
    """Opens a source of captioned images.

    Args:
        source: "shapes" (the bundled scenes, endless; "shapes?objects=2": those of two); a folder, also nested, with
            images and captions: either `name.txt` beside `name.png`, or a `metadata.jsonl` of objects with file_name
            and text, caption or prompt; webdataset shards, `name.tar` or a pattern or a folder of them;
            hf:owner/name or hf:folder.
        size: side of the square images in pixels; others are cropped at the centre and resized to it. None: 64 for
            "shapes"; everything else needs it.
        seed: which endless series of scenes; only for "shapes".
        buckets: sizes to fit the images to instead of squares.
        count: how many images a stream is to be taken to have, where it does not say so itself.
        findings: gets what is left out; one that is not strict also counts what is broken instead of stopping there.

    Raises:
        UserError: no such source, an unreadable image, a malformed metadata line, or no image left after filtering.
    """
    if size is not None and size < 1:
        raise UserError(f"images: size must be at least 1 pixel, got {size}")
    parsed = parse_source(source)
    if parsed.is_shapes:
        if buckets:
            raise UserError('images: "shapes" are squares and need no buckets; set data.buckets: null')
        return ShapesImages(seed=seed, size=size or IMAGE_SIZE, objects=parsed.objects)
    if size is None:
        raise UserError(f"{source}: images need a size in pixels, for example data.size=512")
    if parsed.is_hub:
        from stepdistill.data.hub import open_hub_images

        return open_hub_images(parsed, size, tuple(buckets), count)
    from stepdistill.data.stored import open_stored

    return open_stored(parsed, size, tuple(buckets), findings or Findings())


@dataclass(frozen=True)
class ShapesImages(ImageSet):
    """Rendered scenes: image i is scene i of the series `seed`, made when it is asked for.

    Attributes:
        seed: which series.
        size: side of the images in pixels.
        objects: in every scene; None: one or two.
    """

    seed: int = 1
    size: int = IMAGE_SIZE
    objects: int | None = None

    @property
    def fingerprint(self) -> str:
        """Of the seed, the size, and one painted scene, which stands for the way scenes are painted."""
        sample = self.batch([0])
        kind = [] if self.objects is None else [self.objects]
        return digest([self.seed, self.size, *kind, *sample.captions, sample.images.sum().item()])

    def indices(self, seed: int, start: int, count: int) -> list[int]:
        """Scene numbers; no scene comes twice, and the scenes have a seed of their own already."""
        return list(range(start, start + count))

    def batch(self, indices: Sequence[int]) -> ImageBatch:
        """Paints the scenes with these numbers."""
        scenes = self._scenes(indices)
        images = [fit(render(scene.scene), Size(self.size, self.size)) for scene in scenes]
        return ImageBatch(to_tensor(images), [scene.caption for scene in scenes])

    def texts(self, indices: Sequence[int]) -> list[str]:
        """The captions, without painting."""
        return [scene.caption for scene in self._scenes(indices)]

    def summary(self) -> str:
        """What is played."""
        kind = "" if self.objects is None else f", {self.objects} in each"
        return f"endless images from {SHAPES_SOURCE} (seed {self.seed}{kind})"

    def _scenes(self, indices: Sequence[int]) -> list[CaptionedScene]:
        return [captioned_scene(self.seed, index, objects=self.objects) for index in indices]


def digest(facts: Sequence[object]) -> str:
    """sha256 (hexadecimal) of plain values."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
