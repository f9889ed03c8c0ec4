"""How an image was cut out of its original: what some networks are told beside the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Size(NamedTuple):
    """Pixels, height first as in tensors."""

    height: int
    width: int


class Box(NamedTuple):
    """A part of an image in its own pixels, in the order that Pillow takes."""

    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True)
class Framing:
    """What SDXL (arXiv 2307.01952, section 2.2) calls micro-conditioning, of one image.

    Attributes:
        original: the image as it was found.
        crop: pixels (top, left) that were cut off after the image was resized to cover the target.
        target: the image as the network gets it.
    """

    original: Size
    crop: tuple[int, int]
    target: Size


def centred_box(original: Size, target: Size) -> Box:
    """The largest part in the middle of an image that has the target's aspect ratio."""
    scale = max(target.height / original.height, target.width / original.width)
    height = min(original.height, round(target.height / scale))
    width = min(original.width, round(target.width / scale))
    left, top = (original.width - width) // 2, (original.height - height) // 2
    return Box(left, top, left + width, top + height)


def framing_of(original: Size, target: Size) -> Framing:
    """The framing of an image that is cropped at its centre and resized."""
    scale = max(target.height / original.height, target.width / original.width)
    box = centred_box(original, target)
    return Framing(original, (round(box.top * scale), round(box.left * scale)), target)
