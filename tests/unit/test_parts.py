"""One student's share of prompts, images and stored pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from stepdistill.console import Display
from stepdistill.data.batches import Batches
from stepdistill.data.cache import EncodedOnTheFly
from stepdistill.data.images import load_images
from stepdistill.data.pair_maker import PairSettings, make_pairs
from stepdistill.data.pairs import PairStream, load_pairs
from stepdistill.data.parts import Part
from stepdistill.data.prompts import PromptSet
from stepdistill.errors import UserError
from stepdistill.families.base import ModelFamily
from stepdistill.objectives.dmd import DMD
from stepdistill.recipe import Recipe
from stepdistill.run_folder import RunFolder
from stepdistill.streams import open_batches
from tests.tiny import PROMPTS as LETTERS
from tests.tiny import tiny_recipe


def by_colour(prompts: Sequence[str]) -> list[int]:
    return [int("red" in prompt) for prompt in prompts]


BLUE, RED, NOBODY = (Part(number, 3, by_colour) for number in range(3))
PROMPTS = PromptSet(("red ring", "blue ring", "red ring", "red disc"), "somewhere", {"blank": 1})


def test_prompts_are_divided_without_rest_in_their_order_and_as_often_as_they_come() -> None:
    assert RED.prompts(PROMPTS).prompts == ("red ring", "red ring", "red disc")
    assert BLUE.prompts(PROMPTS).prompts == ("blue ring",)
    assert RED.prompts(PROMPTS).summary() == "3 prompts from somewhere (left out: 1 blank, 1 of other students)"


def test_a_student_without_prompts_is_found_before_the_first_is_trained() -> None:
    with pytest.raises(UserError, match="none of the 4 prompts belongs to student 3 of 3; give more prompts or fewer"):
        RED.check_everyone(PROMPTS)
    Part(0, 2, by_colour).check_everyone(PROMPTS)


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


def test_stored_pairs_are_divided_by_prompt_with_all_that_belongs_to_them(dit: ModelFamily, tmp_path: Path) -> None:
    settings = PairSettings(count=7, steps=2, guidance=(1.5, 4.0), shard_size=3, states="all", predictions=True)
    pairs = make_pairs(dit, PromptSet(("0", "1", "2", "3")), tmp_path / "pairs", settings)

    def odd(prompts: Sequence[str]) -> list[int]:
        return [int(prompt) % 2 for prompt in prompts]

    for number, places in enumerate([[0, 2, 4, 6], [1, 3, 5]]):
        share = Part(number, 2, odd).pairs(pairs)
        assert len(share) == len(places) and share.summary().startswith(f"{len(places)} pairs from")
        assert share.prompts.prompts == (("0", "2"), ("1", "3"))[number]
        own, all_pairs = share.batch(range(len(share))), pairs.batch(places)
        assert own.prompts == all_pairs.prompts
        assert torch.equal(own.noise, all_pairs.noise) and torch.equal(own.latents, all_pairs.latents)
        visited = share.states(range(share.num_states))
        expected = pairs.states([2 * place + way for place in places for way in (0, 1)])
        assert visited.prompts == expected.prompts
        assert all(torch.equal(a, b) for a, b in zip(visited[:4], expected[:4], strict=True))
        stream = PairStream(share, EncodedOnTheFly(dit, share.prompts))
        for found, condition in (stream.draw(0, 0, 20), stream.draw_states(0, 0, 20)):
            assert set(found.prompts) == set(share.prompts.prompts)
            assert condition.tensors["class_labels"].tolist() == [int(prompt) for prompt in found.prompts]
    with pytest.raises(IndexError):
        Part(1, 2, odd).pairs(pairs).batch([3])
    with pytest.raises(UserError, match=r"none of the 7 pairs belongs to student 3 of 3; make pairs of more prompts"):
        Part(2, 3, odd).pairs(pairs)


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "made"])
def test_a_run_of_one_student_draws_no_pair_of_another(stored: bool, sd: ModelFamily, tmp_path: Path) -> None:
    """Free and paired samples of `dmd` come from this stream, while its critic sees the part's prompts alone."""

    def halves(prompts: Sequence[str]) -> list[int]:
        return [int(prompt > "l") for prompt in prompts]

    def opened(data: dict[str, Any]) -> Batches:
        content = tiny_recipe("teacher", tmp_path / "run")
        content["data"] |= data
        return open_batches(
            Recipe.from_mapping(content), [DMD()], sd, RunFolder(tmp_path / "run"), accelerator=Accelerator(cpu=True),
            display=Display(None), part=Part(1, 2, halves),
        )  # fmt: skip

    if stored:
        make_pairs(sd, PromptSet(LETTERS), tmp_path / "pairs", PairSettings(steps=1))
        batches = opened({"pairs": str(tmp_path / "pairs")})
    else:
        batches = opened({"make_pairs": {"count": 14, "steps": 1}})
        assert set(halves(load_pairs(tmp_path / "run" / "cache" / "pairs").texts)) == {1}
    own = {letter for letter in LETTERS if letter > "l"}
    assert len(own) == 12
    for stream in ("pairs", "prompts"):
        assert {prompt for _ in range(7) for prompt in batches.next(stream, 2).prompts} == own
    if stored:
        make_pairs(sd, PromptSet(LETTERS[:2]), tmp_path / "few", PairSettings(steps=1))
        with pytest.raises(UserError, match=r"none of the 2 pairs belongs to student 2 of 2; make pairs of"):
            opened({"pairs": str(tmp_path / "few")})
