"""Reads shapes scenes off images, and scores them against what a prompt demands and what it leaves open.

The judge is analytic: the scenes come from a known renderer, so their attributes can be measured rather than learnt.
It has no weights, and it is as exact on a model's images as they are well made.

Letters: B images, C components (objects found), O templates, P pixels of a template's window.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import ndimage

from stepdistill.data import shapes
from stepdistill.errors import UserError


if TYPE_CHECKING:
    import torch

    Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]

# Colours are compared by Euclidean distance in RGB, each channel in [0, 1]. The nearest two colours that may meet are
# pink on beige, 0.34 apart; yellow and orange, the nearest two objects' colours, are 0.33 apart.
FOREGROUND_DISTANCE = 0.17  # from the background, at least: half of pink on beige
COLOR_TOLERANCE = 0.2  # from a palette colour, at most; beyond it the colour counts as unrecognised
FRAME = 4  # width in pixels of the image's border, whose median is the background
MIN_AREA = 25  # pixels of a component that counts as an object: a quarter of the smallest one, a small star
MAX_OBJECTS = 6  # an image of noise has many components; past this many their number is wrong in any case
# Tanimoto index with the best template: at least 0.97 for sharp renders, 0.89 after a blur of 1 pixel and noise.
MIN_AGREEMENT = 0.85
# ... and its lead over the best template of any other shape: at least 0.08 sharp, 0.04 after that blur. What lies
# between two shapes is neither.
MIN_LEAD = 0.02
WINDOW = 37  # pixels: the largest shape with room to move
OFFSETS = tuple(i * 0.5 for i in range(-3, 4))  # pixels


@dataclass(frozen=True)
class SeenObject:
    """One object as the judge sees it; None means that the attribute is not recognisable.

    `x` and `y` are its centre in pixels, `agreement` is the Tanimoto index with the best template, in [0, 1].
    """

    shape: str | None
    color: str | None
    size: str | None
    x: float
    y: float
    agreement: float = 1.0

    @property
    def cell(self) -> str:
        """Which ninth of the area where single objects may lie: "0 0" is the top left one."""
        margin = shapes.SIZES["large"] + 1.5
        thirds = (3 * (v - margin) / (shapes.IMAGE_SIZE - 2 * margin) for v in (self.x, self.y))
        return " ".join(str(min(2, max(0, math.floor(third)))) for third in thirds)


@dataclass(frozen=True)
class Reading:
    """Everything the judge sees in one image; objects are in order of x + y, from the top left corner."""

    objects: tuple[SeenObject, ...]
    background: str | None

    @classmethod
    def of_scene(cls, scene: shapes.Scene) -> Reading:
        """What a perfect judge would see in `scene`."""
        seen = (SeenObject(o.shape, o.color, o.size, o.x, o.y) for o in scene.objects)
        return cls(tuple(sorted(seen, key=lambda o: o.x + o.y)), scene.background)


class Score(NamedTuple):
    """How many attributes a prompt demands of an image, and how many of them the image shows."""

    fulfilled: int
    demanded: int


@dataclass(frozen=True)
class Template:
    """A shape in a size, and where its centre lies relative to the window's middle pixel, in pixels."""

    shape: str
    size: str
    dx: float
    dy: float


@functools.cache
def _templates() -> tuple[tuple[Template, ...], Array]:
    """Every shape in every size at every offset of its centre of mass => their descriptions and masks (O, P)."""
    middle = WINDOW / 2
    kinds, masks = [], []
    for shape, (size, radius) in itertools.product(shapes.SHAPES, shapes.SIZES.items()):
        cx, cy = _centroid(np.asarray(shapes.coverage(shape, middle, middle, radius, WINDOW), np.float32))
        for dx, dy in itertools.product(OFFSETS, OFFSETS):
            x, y = 2 * middle - cx + dx, 2 * middle - cy + dy
            kinds.append(Template(shape, size, x - middle, y - middle))
            masks.append(np.asarray(shapes.coverage(shape, x, y, radius, WINDOW), np.float32).ravel() / 255)
    return tuple(kinds), np.stack(masks)


def _centroid(mask: Array) -> tuple[float, float]:
    """(H, W) weights => the centre of mass (x, y) in pixels; pixel i covers i..i+1."""
    total = mask.sum()
    ys, xs = (np.arange(n) + 0.5 for n in mask.shape)
    return float(mask.sum(0) @ xs / total), float(mask.sum(1) @ ys / total)


def _nearest(color: Array, palette: Mapping[str, tuple[int, int, int]]) -> str | None:
    """The palette's nearest colour to an RGB triple in [0, 1], or None if even that is too far."""
    distances = np.linalg.norm(np.array(list(palette.values())) / 255 - color, axis=1)
    best = int(distances.argmin())
    return list(palette)[best] if distances[best] <= COLOR_TOLERANCE else None


class _Component(NamedTuple):
    """A connected piece of foreground: its image's number, colour, soft mask and the pixel it is centred on."""

    image: int
    color: str | None
    alpha: Array  # (WINDOW, WINDOW)
    column: int
    row: int


def read_images(images: torch.Tensor) -> list[Reading]:
    """Reads every image: background, number of objects, and each one's shape, colour, size and place.

    Background: the palette's nearest colour to the median of the image's frame, if half of the frame agrees with it.
    Foreground: what differs from it by more than FOREGROUND_DISTANCE, and by at least half as much as the strongest
    pixel within 3 pixels does, so that edges lie at half coverage. Objects: connected components. Colour: median of a
    component's core. Shape and size: projecting the component's pixels on the line from background to object colour
    gives a soft mask a, compared with every antialiased template m by the Tanimoto index a.m / (a.a + m.m - a.m), all
    of them in one matrix product; MIN_AGREEMENT and MIN_LEAD say when nothing is recognised.

    Args:
        images: (B, 3, 64, 64) in [0, 1], any floating type and device.

    Raises:
        UserError: the images have another size.
    """
    size = shapes.IMAGE_SIZE
    if images.ndim != 4 or images.shape[1:] != (3, size, size):
        raise UserError(f"the judge of shapes reads images (B, 3, {size}, {size}), got {tuple(images.shape)}; ask for "
                        "this height and width, or measure by another protocol")  # fmt: skip
    pixels = images.detach().float().cpu().permute(0, 2, 3, 1).numpy()
    # A diverged model's NaN must read as a bad picture, not stop the benchmark.
    pixels = np.nan_to_num(pixels, nan=0.5).clip(0, 1)
    inside = np.zeros((size, size), bool)
    inside[FRAME:-FRAME, FRAME:-FRAME] = True
    frames = pixels[:, ~inside]
    backgrounds = np.median(frames, axis=1)
    # The median of noise is gray; that does not make it a gray background.
    plain = (np.linalg.norm(frames - backgrounds[:, None], axis=-1) <= COLOR_TOLERANCE).mean(1) >= 0.5
    components = list(_components(pixels, backgrounds))
    objects: list[list[SeenObject]] = [[] for _ in pixels]
    for component, seen in zip(components, _recognise(components), strict=True):
        objects[component.image].append(seen)
    return [
        Reading(
            tuple(sorted(found, key=lambda o: o.x + o.y)), _nearest(background, shapes.BACKGROUNDS) if even else None
        )
        for found, background, even in zip(objects, backgrounds, plain, strict=True)
    ]


def _components(pixels: Array, backgrounds: Array) -> Iterator[_Component]:
    """(B, H, W, 3) images and (B, 3) background colours => the objects of all images, largest first in each."""
    if not len(pixels):
        return
    distance = np.linalg.norm(pixels - backgrounds[:, None, None], axis=-1)
    strongest = ndimage.maximum_filter(distance, size=(1, 7, 7))
    foreground = distance > np.maximum(FOREGROUND_DISTANCE, 0.5 * strongest)
    neighbours = np.zeros((3, 3, 3), bool)
    neighbours[1] = ndimage.generate_binary_structure(2, 1)
    labels, _ = ndimage.label(foreground, structure=neighbours)
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    boxes = ndimage.find_objects(labels)
    taken: Counter[int] = Counter()
    for label in np.argsort(-areas, kind="stable"):
        if areas[label] < MIN_AREA:
            return
        image = boxes[label - 1][0].start
        taken[image] += 1
        if taken[image] <= MAX_OBJECTS:
            yield _component(image, pixels[image], backgrounds[image], labels[image], int(label))


def _component(image: int, pixels: Array, background: Array, labels: np.ndarray, label: int) -> _Component:
    """One labelled component => its colour and soft mask; other components are cut out of the mask."""
    own = labels == label
    core = ndimage.binary_erosion(own)
    color = np.median(pixels[core if core.any() else own], axis=0)
    axis = color - background
    alpha = ((pixels - background) @ axis / (axis @ axis)).clip(0, 1)
    # Antialiased edges lie outside of the component, which ends at half coverage.
    alpha *= ndimage.binary_dilation(own, iterations=2) & (own | (labels == 0))
    x, y = _centroid(alpha)
    column, row = int(x), int(y)
    padded = np.pad(alpha, WINDOW // 2)
    window = padded[row : row + WINDOW, column : column + WINDOW]
    return _Component(image, _nearest(color, shapes.COLORS), window, column, row)


def _recognise(components: Sequence[_Component]) -> Iterator[SeenObject]:
    """Compares every component with every template."""
    if not components:
        return
    kinds, masks = _templates()
    alphas = np.stack([component.alpha.ravel() for component in components])
    common = alphas @ masks.T
    agreement = common / ((alphas**2).sum(1)[:, None] + (masks**2).sum(1) - common)  # (C, O)
    by_shape = agreement.reshape(len(components), len(shapes.SHAPES), -1).max(-1)
    second, first = np.sort(by_shape, axis=1)[:, -2:].T
    clear = (first >= MIN_AGREEMENT) & (first - second >= MIN_LEAD)
    for component, best, value, known in zip(components, agreement.argmax(1), first, clear, strict=True):
        kind = kinds[best]
        yield SeenObject(
            kind.shape if known else None, component.color, kind.size if value >= MIN_AGREEMENT else None,
            component.column + 0.5 + kind.dx, component.row + 0.5 + kind.dy, float(value),
        )  # fmt: skip


def _direction(chosen: Sequence[SeenObject | None]) -> str | None:
    """Where the first of two objects lies as seen from the second, along the axis on which they are farther apart.

    None if either is missing, or is a mere spot of which neither shape nor colour is recognised.
    """
    first, second = (o if o is not None and (o.shape or o.color) else None for o in chosen)
    if first is None or second is None:
        return None
    dx, dy = second.x - first.x, second.y - first.y
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def assign(reading: Reading, demand: shapes.Demand) -> tuple[SeenObject | None, ...]:
    """Gives each demanded object the seen one that it is, so that the most attributes are fulfilled.

    Where several assignments are equally good, the first in reading order is taken, so that objects which a prompt
    does not tell apart are told apart by their place alone.

    Returns:
        One seen object, or None, for each demanded one.
    """
    wanted = len(demand.objects)
    candidates: tuple[SeenObject | None, ...] = reading.objects + (None,) * max(0, wanted - len(reading.objects))
    return max(itertools.permutations(candidates, wanted), key=lambda chosen: _object_matches(chosen, demand))


def _object_matches(chosen: Sequence[SeenObject | None], demand: shapes.Demand) -> int:
    """How many of the demanded attributes of objects, and the demanded relation, `chosen` fulfils."""
    matches = 0
    for seen, wanted in zip(chosen, demand.objects, strict=True):
        if seen is not None:
            matches += wanted.shape is not None and seen.shape == wanted.shape
            matches += wanted.color is not None and seen.color == wanted.color
            matches += wanted.size is not None and seen.size == wanted.size
    return matches + (demand.relation is not None and _direction(chosen) == demand.relation)


def attribute_scores(reading: Reading, demand: shapes.Demand) -> Score:
    """Counts the attributes that a prompt demands, and those of them that the image shows.

    Demanded are: the number of objects (always); each named shape, colour and size; the named relation; the named
    background. An unrecognised attribute is not fulfilled.
    """
    named = sum(value is not None for o in demand.objects for value in (o.shape, o.color, o.size))
    demanded = 1 + named + (demand.relation is not None) + (demand.background is not None)
    fulfilled = int(len(reading.objects) == len(demand.objects))
    fulfilled += _object_matches(assign(reading, demand), demand)
    fulfilled += demand.background is not None and reading.background == demand.background
    return Score(fulfilled, demanded)


class Accuracy(NamedTuple):
    """Shares in [0, 1]: of demanded attributes that are fulfilled, and of images that fulfil all of theirs."""

    caption_accuracy: float
    images_all_correct: float


def accuracy(readings: Sequence[Reading], demands: Sequence[shapes.Demand]) -> Accuracy:
    """caption_accuracy = sum of fulfilled / sum of demanded; images_all_correct = mean of [fulfilled = demanded]."""
    scores = [attribute_scores(r, d) for r, d in zip(readings, demands, strict=True)]
    if not scores:
        raise ValueError("accuracy needs at least one image")
    return Accuracy(
        sum(s.fulfilled for s in scores) / sum(s.demanded for s in scores),
        sum(s.fulfilled == s.demanded for s in scores) / len(scores),
    )


def open_values(reading: Reading, demand: shapes.Demand) -> dict[str, str | None]:
    """What the image chose where the prompt left it open: attribute => value, None if unrecognised.

    The attributes are shape, colour and size of each object, the background, the direction between two objects, and
    the ninth of the image in which a single object lies.
    """
    values: dict[str, str | None] = {}
    chosen = assign(reading, demand)
    for number, (seen, wanted) in enumerate(zip(chosen, demand.objects, strict=True)):
        if wanted.shape is None:
            values[f"shape {number}"] = seen.shape if seen else None
        if wanted.color is None:
            values[f"color {number}"] = seen.color if seen else None
        if wanted.size is None:
            values[f"size {number}"] = seen.size if seen else None
    if demand.background is None:
        values["background"] = reading.background
    if len(chosen) == 1:
        values["cell"] = chosen[0].cell if chosen[0] else None
    elif demand.relation is None:
        values["direction"] = _direction(chosen)
    return values


def entropy(values: Sequence[str | None]) -> float:
    """Entropy in nats of the values' frequencies, -sum p log p, with the unrecognised ones counted as the commonest.

    That is the least that the entropy can be whatever the unrecognised values really are (adding to the largest
    frequency makes a distribution less even than adding anywhere else), so bad images never pass for variety.
    """
    counts = Counter(value for value in values if value is not None)
    if not counts:
        return 0.0
    counts[counts.most_common(1)[0][0]] += len(values) - counts.total()
    return max(0.0, -sum(n / len(values) * math.log(n / len(values)) for n in counts.values()))


def open_entropy(readings: Sequence[Sequence[Reading]], demands: Sequence[shapes.Demand]) -> float:
    """Mean entropy of what the prompts left open: over a prompt's open attributes, then over prompts.

    Args:
        readings: for each prompt its K images.
        demands: for each prompt what it demands. Prompts that leave nothing open do not count.

    Returns:
        Nats; 0 if no prompt leaves anything open.
    """
    means = []
    for images, demand in zip(readings, demands, strict=True):
        values = [open_values(reading, demand) for reading in images]
        entropies = [entropy([v[attribute] for v in values]) for attribute in values[0]]
        if entropies:
            means.append(sum(entropies) / len(entropies))
    return sum(means) / len(means) if means else 0.0


def diversity(
    readings: Sequence[Sequence[Reading]],
    demands: Sequence[shapes.Demand],
    real: Sequence[Sequence[shapes.Scene]],
) -> float | None:
    """`open_entropy` of a model's images divided by that of real scenes for the same prompts.

    The entropy of K draws is biased downwards; as there are as many real scenes as images for each prompt, the bias
    is the same above and below the line. 1 is as varied as real data; more is possible by chance.

    Args:
        readings: for each prompt its K images.
        demands: for each prompt what it demands.
        real: for each prompt K scenes drawn by `shapes.complete_scene`.

    Returns:
        None if the prompts leave nothing open, or there is one image per prompt, so that nothing can vary.
    """
    if any(len(images) != len(scenes) for images, scenes in zip(readings, real, strict=True)):
        raise ValueError("diversity compares equally many images and real scenes for each prompt")
    reference = open_entropy([[Reading.of_scene(scene) for scene in scenes] for scenes in real], demands)
    return open_entropy(readings, demands) / reference if reference > 0 else None
