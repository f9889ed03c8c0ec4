"""One student's share of prompts and images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from stepdistill.data.images import load_images
from stepdistill.data.parts import Part
from stepdistill.data.prompts import PromptSet
from stepdistill.errors import UserError


def by_colour(prompts: Sequence[str]) -> list[int]:
    return [int("red" in prompt) for prompt in prompts]


BLUE, RED, NOBODY = (Part(number, 3, by_colour) for number in range(3))
PROMPTS = PromptSet(("red ring", "blue ring", "red ring", "red disc"), "somewhere", {"blank": 1})


def test_prompts_are_divided_without_rest_in_their_order_and_as_often_as_they_come() -> None:
    assert RED.prompts(PROMPTS).prompts == ("red ring", "red ring", "red disc")
    assert BLUE.prompts(PROMPTS).prompts == ("blue ring",)
    assert RED.prompts(PROMPTS).summary() == "3 prompts from somewhere (left out: 1 blank, 1 of other students)"


def test_the_only_student_has_the_very_same_prompts() -> None:
    alone = Part(0, 1, lambda prompts: [0] * len(prompts)).prompts(PROMPTS)
    assert alone == PROMPTS
    assert alone.fingerprint == PROMPTS.fingerprint


def test_a_student_without_prompts_or_images_is_told() -> None:
    with pytest.raises(UserError, match="none of the 4 prompts belongs to student 3 of 3"):
        NOBODY.prompts(PROMPTS)
    with pytest.raises(UserError, match="none of 20 captions belongs to student 3 of 3"):
        NOBODY.images(load_images("shapes"), 20)
    with pytest.raises(UserError, match="have no end; say how many the students are to share"):
        RED.images(load_images("shapes"), None)


def test_rendered_images_are_divided_by_caption() -> None:
    shapes = load_images("shapes")
    shares = [part.images(shapes, 30) for part in (BLUE, RED)]
    assert sum(share.length for share in shares) == 30
    assert all(share.length for share in shares)
    for part, share in zip((BLUE, RED), shares, strict=True):
        made = share.batch(range(share.length))
        assert by_colour(made.captions) == [part.number] * share.length
        assert made.captions == share.texts(range(share.length))
        assert made.captions == [text for text in shapes.texts(range(30)) if by_colour([text]) == [part.number]]
    assert shares[0].fingerprint != shares[1].fingerprint
    first = shares[1].batch([0])
    assert torch.equal(first.images, shapes.batch([shapes.texts(range(30)).index(first.captions[0])]).images)


def test_an_epoch_of_a_share_plays_each_image_once(tmp_path: Path) -> None:
    for name in ("red a", "blue b", "red c"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name[-1]}.png")
        (tmp_path / f"{name[-1]}.txt").write_text(name)
    share = RED.images(load_images(tmp_path, size=8), None)
    assert share.texts(share.indices(0, 0, 2)) in (["red a", "red c"], ["red c", "red a"])
    assert sorted(share.indices(0, 2, 2)) == [0, 1]
    assert share.summary().startswith("2 of one student among: 3 images")
