"""The judge against scenes whose truth is known, sharp, blurred and wrong, and the scores against counts by hand."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from scipy import ndimage

from stepdistill.bench.metrics import shapes_judge as judge
from stepdistill.bench.prompts import render_scenes
from stepdistill.data import shapes
from stepdistill.data.shapes import Demand, ObjectDemand, Scene, SceneObject


NUM_SCENES = 250
ATTRIBUTES = ("count", "background", "shape", "color", "size", "place")


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [shapes.captioned_scene(31, index).scene for index in range(NUM_SCENES)]


@pytest.fixture(scope="module")
def images(scenes: list[Scene]) -> torch.Tensor:
    return render_scenes(scenes)


def shares_right(images: torch.Tensor, scenes: list[Scene]) -> dict[str, float]:
    """Share of right readings per attribute; an object is compared with the seen one that lies nearest."""
    right: dict[str, list[bool]] = {attribute: [] for attribute in ATTRIBUTES}
    for reading, scene in zip(judge.read_images(images), scenes, strict=True):
        right["count"].append(len(reading.objects) == len(scene.objects))
        right["background"].append(reading.background == scene.background)
        for o in scene.objects:
            near = min(reading.objects, key=lambda s: math.hypot(s.x - o.x, s.y - o.y), default=None)
            for attribute in ("shape", "color", "size"):
                right[attribute].append(near is not None and getattr(near, attribute) == getattr(o, attribute))
            right["place"].append(near is not None and math.hypot(near.x - o.x, near.y - o.y) < 0.75)
    return {attribute: sum(values) / len(values) for attribute, values in right.items()}


def degrade(images: torch.Tensor, *, blur: float, noise: float) -> torch.Tensor:
    """Gaussian blur of `blur` pixels, then Gaussian noise."""
    soft = torch.from_numpy(ndimage.gaussian_filter(images.numpy(), (0, 0, blur, blur)))
    return (soft + noise * torch.randn(soft.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


def one_object(**changes: object) -> Scene:
    values = {"shape": "circle", "color": "red", "size": "large", "x": 30.0, "y": 33.0} | changes
    return Scene((SceneObject(**values),), "white", None)


def blob(sigma: float) -> torch.Tensor:
    """A hazy red spot on white: as wide as an object, but of no shape."""
    ys, xs = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    alpha = torch.exp(-((xs - 32) ** 2 + (ys - 32) ** 2) / (2 * sigma**2))
    red, white = (torch.tensor(c).view(3, 1, 1) / 255 for c in (shapes.COLORS["red"], shapes.BACKGROUNDS["white"]))
    return (red * alpha + white * (1 - alpha))[None]


def test_real_scenes_are_read_at_least_99_percent_right(images: torch.Tensor, scenes: list[Scene]) -> None:
    assert min(shares_right(images, scenes).values()) >= 0.99


@pytest.mark.parametrize(("blur", "noise"), [(0.6, 0.03), (0.8, 0.02), (0.8, 0.04)])
def test_blurred_and_noisy_scenes_are_read_at_least_97_percent_right(
    images: torch.Tensor, scenes: list[Scene], blur: float, noise: float
) -> None:
    assert min(shares_right(degrade(images, blur=blur, noise=noise), scenes).values()) >= 0.97


@pytest.mark.parametrize("shape", shapes.SHAPES)
@pytest.mark.parametrize("size", shapes.SIZES)
def test_every_shape_and_size_is_recognised_between_pixels(shape: str, size: str) -> None:
    (seen,) = judge.read_images(render_scenes([one_object(shape=shape, size=size, x=28.3, y=35.8)]))[0].objects
    assert (seen.shape, seen.size) == (shape, size)
    assert seen.x == pytest.approx(28.3, abs=0.5)
    assert seen.y == pytest.approx(35.8, abs=0.5)


@pytest.mark.parametrize("color", shapes.COLORS)
@pytest.mark.parametrize("background", shapes.BACKGROUNDS)
def test_every_color_is_recognised_on_every_background(color: str, background: str) -> None:
    scene = Scene(one_object(color=color, shape="star", size="small").objects, background, None)
    reading = judge.read_images(render_scenes([scene]))[0]
    assert reading.background == background
    assert [o.color for o in reading.objects] == [color]


@pytest.mark.parametrize("sigma", [4.0, 5.0])
def test_a_hazy_blob_is_seen_but_has_no_shape(sigma: float) -> None:
    (seen,) = judge.read_images(blob(sigma))[0].objects
    assert seen.shape is None
    assert seen.size is None
    assert seen.agreement < judge.MIN_AGREEMENT


def test_a_shape_between_circle_and_square_is_neither() -> None:
    circle, square = (render_scenes([one_object(shape=s, x=32.0, y=32.0)]) for s in ("circle", "square"))
    shares = [judge.read_images(w * circle + (1 - w) * square)[0].objects[0].shape for w in np.linspace(0, 1, 21)]
    assert shares[0] == "square"
    assert shares[-1] == "circle"
    assert None in shares


def test_a_color_outside_of_the_palette_is_unrecognised() -> None:
    image = render_scenes([one_object(color="blue")])
    painted = torch.where(image[:, :1] < 0.5, torch.tensor([0.35, 0.3, 0.02]).view(3, 1, 1), image)
    (seen,) = judge.read_images(painted)[0].objects
    assert seen.color is None
    assert seen.shape == "circle"


def test_noise_is_no_scene() -> None:
    noise = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    readings = judge.read_images(noise)
    assert all(o.shape is None and o.color is None for reading in readings for o in reading.objects)
    assert all(reading.background is None for reading in readings)


def test_an_empty_image_has_no_objects() -> None:
    assert judge.read_images(torch.full((1, 3, 64, 64), 128 / 255))[0] == judge.Reading((), "gray")


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="64"):
        judge.read_images(torch.zeros(1, 3, 32, 32))


def test_two_large_stars_as_close_as_they_come_are_two_objects() -> None:
    pair = tuple(SceneObject("star", c, "large", x, 32.0) for c, x in (("red", 18.0), ("yellow", 46.0)))
    reading = judge.read_images(render_scenes([Scene(pair, "black", "left of")]))[0]
    assert [(o.shape, o.color) for o in reading.objects] == [("star", "red"), ("star", "yellow")]


RED_CIRCLE = ObjectDemand("circle", "red", None)
BLUE_SQUARE = ObjectDemand("square", "blue", "small")
PAIR = Demand((RED_CIRCLE, BLUE_SQUARE), "white", "left of")


def seen(shape: str | None, color: str | None, size: str | None, x: float, y: float = 32.0) -> judge.SeenObject:
    return judge.SeenObject(shape, color, size, x, y)


def test_scores_count_the_number_of_objects_and_every_named_attribute() -> None:
    right = judge.Reading((seen("circle", "red", "large", 16), seen("square", "blue", "small", 48)), "white")
    assert judge.attribute_scores(right, PAIR) == (8, 8)
    swapped = judge.Reading((seen("square", "blue", "small", 16), seen("circle", "red", "large", 48)), "black")
    assert judge.attribute_scores(swapped, PAIR) == (6, 8)  # neither relation nor background
    alone = judge.Reading((seen("square", "red", None, 16),), "white")
    assert judge.attribute_scores(alone, PAIR) == (2, 8)  # either as circle or as square, and the background


def test_objects_beyond_the_demanded_ones_cost_the_count_alone() -> None:
    objects = (seen(None, None, None, 5), seen("circle", "red", "large", 16), seen("square", "blue", "small", 48))
    assert judge.attribute_scores(judge.Reading(objects, "white"), PAIR) == (7, 8)


def test_unrecognised_attributes_are_not_fulfilled() -> None:
    nothing = judge.Reading((seen(None, None, None, 16), seen(None, None, None, 48)), None)
    assert judge.attribute_scores(nothing, PAIR) == (1, 8)  # the count; mere spots stand in no relation


def test_a_demand_that_names_nothing_still_demands_the_count() -> None:
    reading = judge.Reading((seen("ring", "pink", "small", 16),), "navy")
    assert judge.attribute_scores(reading, shapes.open_demand(1)) == (1, 1)
    assert judge.attribute_scores(reading, shapes.open_demand(2)) == (0, 1)


@pytest.mark.parametrize("index", range(12))
def test_a_true_scene_fulfils_its_own_caption(index: int) -> None:
    case = shapes.captioned_scene(5, index)
    score = judge.attribute_scores(judge.Reading.of_scene(case.scene), case.demand)
    assert score.fulfilled == score.demanded


def test_accuracy_is_the_share_of_attributes_and_of_perfect_images() -> None:
    right = judge.Reading((seen("circle", "red", "large", 16), seen("square", "blue", "small", 48)), "white")
    half = judge.Reading((), "white")
    assert judge.accuracy([right, half], [PAIR, PAIR]) == (9 / 16, 0.5)


def test_entropy_of_known_frequencies() -> None:
    assert judge.entropy(["a", "b", "a", "b"]) == pytest.approx(math.log(2))
    assert judge.entropy(["a", "a", "a"]) == 0
    assert judge.entropy([]) == 0


@pytest.mark.parametrize("values", [["a"] * 7, ["a", "b", "b", "c"], ["a", "b", "c", "d"]])
def test_unrecognised_values_never_raise_the_entropy(values: list[str]) -> None:
    spoilt = judge.entropy([*values, None, None])
    assert all(spoilt <= judge.entropy([*values, other, another]) + 1e-12 for other in "abcdx" for another in "abcdy")
    assert judge.entropy([None, None, None]) == 0


def diversity_of(readings: list[list[judge.Reading]], demands: list[Demand], count: int) -> float:
    rng = random.Random(9)
    real = [[shapes.complete_scene(demand, rng) for _ in range(count)] for demand in demands]
    value = judge.diversity(readings, demands, real)
    assert value is not None
    return value


def test_diversity_of_real_scenes_is_one_and_of_a_single_picture_zero() -> None:
    demands = [shapes.captioned_scene(8, index).demand for index in range(60)]
    rng = random.Random(1)
    fresh = [[judge.Reading.of_scene(shapes.complete_scene(d, rng)) for _ in range(8)] for d in demands]
    assert diversity_of(fresh, demands, 8) == pytest.approx(1, abs=0.03)
    assert diversity_of([[images[0]] * 8 for images in fresh], demands, 8) == 0


def test_diversity_counts_only_what_the_prompt_left_open() -> None:
    demand = Demand((ObjectDemand(None, "red", "small"),), "white", None)
    reading = judge.Reading((seen("ring", "blue", "large", 16),), "black")
    assert judge.open_values(reading, demand) == {"shape 0": "ring", "cell": "0 1"}


def test_objects_that_the_prompt_does_not_tell_apart_are_told_apart_by_place() -> None:
    left, right = seen("ring", "blue", "large", 16), seen("star", "pink", "small", 48)
    reading = judge.Reading((left, right), "black")
    values = judge.open_values(reading, shapes.open_demand(2))
    assert values["shape 0"] == "ring"
    assert values["direction"] == "left of"


def test_unrecognisable_images_have_no_diversity() -> None:
    demands = [shapes.open_demand(1)] * 4
    hazy = [[judge.Reading((seen(None, None, None, 32),), None)] * 8 for _ in demands]
    assert diversity_of(hazy, demands, 8) == 0


def test_diversity_is_undefined_where_nothing_is_open() -> None:
    demand = Demand((RED_CIRCLE, BLUE_SQUARE), "white", "left of")
    full = Demand((ObjectDemand("circle", "red", "small"), BLUE_SQUARE), "white", "left of")
    scene = shapes.complete_scene(full, random.Random(0))
    assert judge.diversity([[judge.Reading.of_scene(scene)] * 2], [full], [[scene] * 2]) is None
    with pytest.raises(ValueError, match="equally many"):
        judge.diversity([[judge.Reading.of_scene(scene)] * 3], [demand], [[scene] * 2])
