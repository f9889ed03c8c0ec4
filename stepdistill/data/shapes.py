"""Captioned scenes of coloured shapes: an endless, seeded text-to-image data set whose truth is known exactly.

A scene holds one or two objects on a plain background. Its caption names some of the attributes and leaves others
open, so for every prompt it is known what an image must show and what it may choose.

    seed, index => Scene => (Pillow image, caption, the attributes that the caption demands)
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw


if TYPE_CHECKING:
    import torch


IMAGE_SIZE = 64  # pixels
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS: Mapping[str, tuple[int, int, int]] = {
    "red": (220, 38, 38),
    "green": (34, 160, 62),
    "blue": (45, 85, 225),
    "yellow": (242, 212, 40),
    "orange": (242, 130, 28),
    "purple": (142, 58, 184),
    "cyan": (40, 205, 215),
    "pink": (246, 120, 182),
}
BACKGROUNDS: Mapping[str, tuple[int, int, int]] = {
    "white": (244, 244, 244),
    "black": (18, 18, 18),
    "gray": (128, 128, 128),
    "beige": (222, 202, 168),
    "navy": (22, 32, 84),
}
SIZES: Mapping[str, float] = {"small": 8.5, "large": 13.5}  # half of an object's extent, in pixels
RELATIONS = ("left of", "above")
COUNTS = (1, 2)  # objects in a scene

# Words that a caption may use for a value; the first is the value's own name.
WORDINGS: Mapping[str, tuple[str, ...]] = {
    "small": ("small", "little"),
    "large": ("large", "big"),
    "left of": ("left of", "to the left of"),
    "above": ("above", "over"),
    "and": ("and", "with", "next to"),
}
OPENINGS = ("", "", "", "a picture of ", "an image of ")
BACKGROUND_WORDINGS = ("on a {} background", "on {}", "against a {} background")
UNNAMED_SHAPE = ("shape", "object")
SUPERSAMPLING = 4

# Centres lie on a grid of 8 pixels, the factor of the teacher's autoencoder: moving an object moves its latents by
# whole cells and changes nothing else, so a small teacher learns every shape once, not once for each part of a cell.
GRID = (16, 24, 32, 40, 48)  # pixels


@dataclass(frozen=True)
class SceneObject:
    """One object: what it is and where its centre lies, in pixels from the top left corner."""

    shape: str
    color: str
    size: str
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """Everything there is to know about one image. `relation` holds from the first object to the second."""

    objects: tuple[SceneObject, ...]
    background: str
    relation: str | None


@dataclass(frozen=True)
class ObjectDemand:
    """What a caption demands of one object; None means that the caption leaves it open."""

    shape: str | None
    color: str | None
    size: str | None


@dataclass(frozen=True)
class Demand:
    """What a caption demands of an image; None means that the caption leaves it open."""

    objects: tuple[ObjectDemand, ...]
    background: str | None
    relation: str | None


@dataclass(frozen=True)
class CaptionedScene:
    """A scene with one caption for it and what that caption demands."""

    scene: Scene
    caption: str
    demand: Demand


def sample_scene(rng: random.Random, objects: int | None = None) -> Scene:
    """Draws a scene: one or two objects with equal odds, or as many as are asked for; every attribute uniform."""
    count = rng.choice(COUNTS)
    return complete_scene(open_demand(objects or count, rng.choice(RELATIONS)), rng)


def open_demand(num_objects: int, relation: str | None = None) -> Demand:
    """The demand that leaves every attribute open but the number of objects (and, if given, their relation)."""
    nothing = ObjectDemand(None, None, None)
    return Demand((nothing,) * num_objects, None, relation if num_objects == 2 else None)


def complete_scene(demand: Demand, rng: random.Random) -> Scene:
    """Draws a scene that fulfils `demand`, the open attributes uniformly: what real data looks like for a prompt."""

    def choose(value: str | None, values: tuple[str, ...]) -> str:
        return value if value is not None else rng.choice(values)

    kinds = [
        (choose(d.shape, SHAPES), choose(d.color, tuple(COLORS)), choose(d.size, tuple(SIZES))) for d in demand.objects
    ]
    background = choose(demand.background, tuple(BACKGROUNDS))
    if len(kinds) == 1:
        x, y = (float(rng.choice(GRID)) for _ in range(2))
        return Scene((SceneObject(*kinds[0], x, y),), background, None)
    relation = demand.relation
    order = 1
    if relation is None:
        relation, order = rng.choice(RELATIONS), rng.choice((1, -1))
    across = [float(rng.choice(GRID[1:-1])) for _ in range(2)]
    along = (float(GRID[0]), float(GRID[-1]))[::order]
    places = [(a, b) if relation == "left of" else (b, a) for a, b in zip(along, across, strict=True)]
    objects = tuple(SceneObject(*kind, *place) for kind, place in zip(kinds, places, strict=True))
    # The relation is stated from the first object to the second; "B left of A" is the same picture with A, B swapped.
    return Scene(objects[::order], background, relation)


def caption_scene(scene: Scene, rng: random.Random, *, keep: float = 0.7) -> CaptionedScene:
    """Words a caption for `scene` that names each attribute with probability `keep` and leaves the others open.

    Args:
        scene: what to describe.
        rng: decides on wording and on what is left open.
        keep: 1 names every attribute.
    """

    def kept() -> bool:
        return rng.random() < keep

    demands = []
    for o in scene.objects:
        shape, color, size = (v if kept() else None for v in (o.shape, o.color, o.size))
        # An object of which neither shape nor colour is named would be no description at all.
        color = o.color if shape is None and color is None else color
        demands.append(ObjectDemand(shape, color, size))
    relation = scene.relation if scene.relation is not None and kept() else None
    background = scene.background if kept() else None
    words = [_noun_phrase(d, rng) for d in demands]
    text = words[0]
    if len(words) == 2:
        text = f"{words[0]} {rng.choice(WORDINGS[relation or 'and'])} {words[1]}"
    if background is not None:
        text = f"{text} {rng.choice(BACKGROUND_WORDINGS).format(background)}"
    caption = rng.choice(OPENINGS) + text
    return CaptionedScene(scene, caption, Demand(tuple(demands), background, relation))


def _noun_phrase(demand: ObjectDemand, rng: random.Random) -> str:
    words = [rng.choice(WORDINGS[demand.size])] if demand.size is not None else []
    words += [demand.color] if demand.color is not None else []
    words += [demand.shape if demand.shape is not None else rng.choice(UNNAMED_SHAPE)]
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])


def outline(shape: str, x: float, y: float, radius: float) -> list[list[tuple[float, float]]]:
    """Polygons of a shape, filled by the even-odd rule: (x, y) pairs; circle and ring are 64-gons."""

    def polygon(radii: tuple[float, ...], count: int, start: float) -> list[tuple[float, float]]:
        angles = (start + 2 * math.pi * i / count for i in range(count))
        return [(x + radii[i % len(radii)] * math.cos(a), y + radii[i % len(radii)] * math.sin(a))
                for i, a in enumerate(angles)]  # fmt: skip

    r = radius
    if shape == "circle":
        return [polygon((r,), 64, 0.0)]
    if shape == "ring":
        return [polygon((r,), 64, 0.0), polygon((0.52 * r,), 64, 0.0)]
    if shape == "square":
        s = 0.88 * r
        return [[(x - s, y - s), (x + s, y - s), (x + s, y + s), (x - s, y + s)]]
    if shape == "triangle":
        return [[(x, y - r), (x + r, y + 0.85 * r), (x - r, y + 0.85 * r)]]
    if shape == "star":
        return [polygon((1.1 * r, 0.45 * r), 10, -math.pi / 2)]
    if shape == "cross":
        a = 0.34 * r
        corners = [(-a, -r), (a, -r), (a, -a), (r, -a), (r, a), (a, a)]
        return [[(x + dx, y + dy) for dx, dy in (*corners, *((-dx, -dy) for dx, dy in corners))]]
    raise ValueError(f"unknown shape {shape!r}; the shapes are {', '.join(SHAPES)}")


def coverage(shape: str, x: float, y: float, radius: float, size: int = IMAGE_SIZE) -> Image.Image:
    """Antialiased mask of one object: a greyscale image of `size` x `size` pixels, 255 where it covers all."""
    mask = Image.new("L", (size * SUPERSAMPLING,) * 2, 0)
    draw = ImageDraw.Draw(mask)
    for fill, points in zip((255, 0), outline(shape, x, y, radius), strict=False):
        # Pillow fills pixel centres at integers, hence the half pixel.
        draw.polygon([(px * SUPERSAMPLING - 0.5, py * SUPERSAMPLING - 0.5) for px, py in points], fill=fill)
    return mask.resize((size, size), Image.Resampling.BOX)


def render(scene: Scene) -> Image.Image:
    """Paints a scene, antialiased: an RGB image of 64 x 64 pixels."""
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), BACKGROUNDS[scene.background])
    for o in scene.objects:
        image.paste(COLORS[o.color], mask=coverage(o.shape, o.x, o.y, SIZES[o.size]))
    return image


def captioned_scene(seed: int, index: int, *, keep: float = 0.7, objects: int | None = None) -> CaptionedScene:
    """The `index`-th scene of the endless data set `seed`; depends on nothing else.

    Args:
        seed: which data set.
        index: which scene.
        keep: see `caption_scene`.
        objects: 1 or 2 in every scene; None: as it comes.
    """
    rng = random.Random(f"shapes/{seed}/{index}")
    return caption_scene(sample_scene(rng, objects), rng, keep=keep)


def captioned_scenes(seed: int, start: int = 0, *, keep: float = 0.7) -> Iterator[CaptionedScene]:
    """Endless captioned scenes from `start` on."""
    index = start
    while True:
        yield captioned_scene(seed, index, keep=keep)
        index += 1


def sibling(scene: Scene, rng: random.Random, attribute: str) -> Scene:
    """The scene with the background, or one object's shape, color or size, changed to another value.

    Args:
        scene: what is to be told from its sibling.
        rng: draws the object and the value.
        attribute: "shape", "color", "size" or "background".
    """
    if attribute == "background":
        return replace(scene, background=rng.choice([name for name in BACKGROUNDS if name != scene.background]))
    values = {"shape": SHAPES, "color": tuple(COLORS), "size": tuple(SIZES)}[attribute]
    number = rng.randrange(len(scene.objects))
    changed = scene.objects[number]
    value = rng.choice([value for value in values if value != getattr(changed, attribute)])
    change: dict[str, Any] = {attribute: value}
    objects = list(scene.objects)
    objects[number] = replace(changed, **change)
    return replace(scene, objects=tuple(objects))


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """Pillow RGB images => (B, 3, H, W) float32 in [-1, 1]."""
    import numpy as np
    import torch

    stacked = np.stack([np.asarray(image, dtype=np.uint8) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float().div(127.5).sub(1)
