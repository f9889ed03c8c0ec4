"""Aspect buckets: images of different shapes, each fitted to the nearest of a few sizes of about the same area.

A micro-batch holds images of one bucket, since its tensor has one shape. SDXL was trained so (arXiv 2307.01952,
section 2.3).
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from math import lcm, log

from stepdistill.errors import UserError
from stepdistill.framing import Size


AUTO = "auto"
STEP = 64  # pixels; SDXL's own sizes (arXiv 2307.01952, appendix I) are multiples of it
_SIZE = re.compile(r"^(\d+)x(\d+)$")


def parse_buckets(given: str | Sequence[str], size: int, step: int) -> tuple[Size, ...]:
    """What a recipe says about buckets => their sizes.

    Args:
        given: "auto" for eleven common aspect ratios from 1:2 to 2:1 at the area of a square, or sizes as width x
            height, such as 832x1216.
        size: side of the square in pixels.
        step: pixels of which every side has to be a multiple; see `ModelFamily.pixel_step`.

    Raises:
        UserError: a size that is malformed or does not fit the networks.
    """
    if given == AUTO:
        from diffusers.training_utils import generate_aspect_ratio_buckets

        return tuple(Size(*pair) for pair in generate_aspect_ratio_buckets(size, lcm(STEP, step)))
    found = []
    for text in given:
        match = _SIZE.match(text)
        if match is None:
            raise UserError(f"data.buckets: {text!r} is no size; write width x height like 832x1216, or auto for all")
        width, height = int(match[1]), int(match[2])
        if width < 1 or height < 1 or width % step or height % step:
            raise UserError(f"data.buckets: {text}: both sides have to be multiples of {step} pixels, into which the "
                            "teacher's networks divide an image")  # fmt: skip
        found.append(Size(height, width))
    if not found:
        raise UserError("data.buckets: is empty; write sizes like 832x1216, auto, or null for squares")
    return tuple(dict.fromkeys(found))


def nearest_bucket(original: Size, buckets: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is nearest, as a factor, so that tall and wide images are treated alike."""
    ratio = log(original.height / original.width)
    return min(buckets, key=lambda bucket: abs(log(bucket.height / bucket.width) - ratio))


class BucketOrder:
    """Which images are drawn together: groups of one bucket, every image in at least one group of every epoch.

    The order is a function of the arguments alone: a resumed run goes on with the right group although nothing was
    saved, and processes that share a group take its parts.

    Args:
        targets: the bucket of every image.
    """

    def __init__(self, targets: Sequence[Size]) -> None:
        self._members: dict[Size, list[int]] = {}
        for index, target in enumerate(targets):
            self._members.setdefault(target, []).append(index)
        self._epochs: dict[tuple[int, int, int], list[list[int]]] = {}

    def group(self, seed: int, number: int, count: int) -> list[int]:
        """The image numbers of group `number`, counted from the start of the run.

        Args:
            seed: of the run.
            number: from 0.
            count: images in a group; a bucket's last one is filled up with the images that came first.
        """
        groups = sum(-(-len(members) // count) for members in self._members.values())
        epoch, place = divmod(number, groups)
        return self._epoch(seed, epoch, count)[place]

    def _epoch(self, seed: int, epoch: int, count: int) -> list[list[int]]:
        key = (seed, epoch, count)
        if key not in self._epochs:
            while len(self._epochs) > 1:  # look-ahead may stand in the next epoch already
                self._epochs.pop(next(iter(self._epochs)), None)
            draw = random.Random(f"buckets/{seed}/{epoch}")
            groups = []
            for target in sorted(self._members):
                order = list(self._members[target])
                draw.shuffle(order)
                padded = [order[place % len(order)] for place in range(-(-len(order) // count) * count)]
                groups += [padded[first : first + count] for first in range(0, len(padded), count)]
            draw.shuffle(groups)
            self._epochs[key] = groups
        return self._epochs[key]
