"""Rendered scenes: siblings differ in what is asked for and in nothing else."""

from __future__ import annotations

import random
from dataclasses import fields

import pytest

from stepdistill.data import shapes


@pytest.mark.parametrize("attribute", ["shape", "color", "size"])
def test_a_sibling_differs_in_one_attribute_of_one_object(attribute: str) -> None:
    for index in range(50):
        scene = shapes.captioned_scene(5, index).scene
        other = shapes.sibling(scene, random.Random(index), attribute)
        pairs = [(a, b) for a, b in zip(scene.objects, other.objects, strict=True) if a != b]
        assert other.background == scene.background
        assert len(pairs) == 1
        (first, second) = pairs[0]
        assert [f.name for f in fields(first) if getattr(first, f.name) != getattr(second, f.name)] == [attribute]


def test_a_sibling_of_another_background_has_the_same_objects_and_looks_different() -> None:
    for index in range(20):
        scene = shapes.captioned_scene(5, index).scene
        other = shapes.sibling(scene, random.Random(index), "background")
        assert other.objects == scene.objects
        assert other.background != scene.background
        assert shapes.render(other).tobytes() != shapes.render(scene).tobytes()


def test_every_value_can_be_a_siblings() -> None:
    scene = shapes.captioned_scene(5, 0).scene
    rng = random.Random(0)
    seen = {o.shape for _ in range(200) for o in shapes.sibling(scene, rng, "shape").objects}
    assert seen == set(shapes.SHAPES)
