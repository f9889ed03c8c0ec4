"""A cache made before the training: what runs take from it, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from stepdistill.data.images import load_images
from stepdistill.data.latents import LatentCache
from stepdistill.data.prepared import LATENTS, open_conditions, open_latents, prepare_conditions
from stepdistill.data.prompts import PromptSet
from stepdistill.errors import UserError
from stepdistill.families import load_family


@pytest.fixture
def family(sd_folder: str):
    return load_family(sd_folder)


def test_a_run_takes_its_prompts_from_among_those_that_were_prepared(family, tmp_path: Path) -> None:
    prepare_conditions(tmp_path, family, ["a", "b", "c", "b"])
    prompts = PromptSet(("c", "a", "c"))
    found = open_conditions(tmp_path, family, prompts).conditions([0, 1, 2]).tensors["prompt_embeds"]
    assert torch.equal(found, family.encode_prompts(["c", "a", "c"]).tensors["prompt_embeds"])
    with pytest.raises(UserError, match=r"it lacks 1 of 2 prompts, for example 'z'.*stepdistill data cache"):
        open_conditions(tmp_path, family, PromptSet(("a", "z")))
    prepare_conditions(tmp_path, family, ["a", "z"])
    assert len(open_conditions(tmp_path, family, PromptSet(("a", "z"))).conditions([0, 1])) == 2


def test_encodings_of_another_text_encoder_are_refused_by_name(family, tmp_path: Path) -> None:
    prepare_conditions(tmp_path, family, ["a"])
    with torch.no_grad():
        next(family.pipeline.text_encoder.parameters()).add_(1)
    with pytest.raises(
        UserError, match=r"do not fit this run \(text encoder \(text_encoder\): \w{8} there, \w{8} here"
    ):
        open_conditions(tmp_path, family, PromptSet(("a",)))


def test_an_empty_or_unfinished_cache_says_how_to_make_it(family, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no encoded prompts; make it with: stepdistill data cache"):
        open_conditions(tmp_path, family, PromptSet(("a",)))
    (prepare_conditions(tmp_path, family, ["a"]).folder / "texts.json").unlink()
    with pytest.raises(UserError, match="is not finished"):
        open_conditions(tmp_path, family, PromptSet(("a",)))


def pictures(folder: Path, count: int = 3) -> Path:
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (20, 20), (90 * number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("abc"[number])
    return folder


def test_latents_of_another_autoencoder_or_of_other_images_are_refused_by_name(family, tmp_path: Path) -> None:
    images = load_images(pictures(tmp_path / "images"), size=16)
    LatentCache(tmp_path / LATENTS, family, images, 3).build()
    assert set(open_latents(tmp_path, family, images, 3).batch(0, 0, 3).captions) == {"a", "b", "c"}
    with pytest.raises(UserError, match="count: 3 there, 2 here"):
        open_latents(tmp_path, family, images, 2)
    (tmp_path / "images" / "0.txt").write_text("other")
    with pytest.raises(UserError, match=r"do not fit this run \(images: \w{8} there, \w{8} here\)"):
        open_latents(tmp_path, family, load_images(tmp_path / "images", size=16), 3)
    with torch.no_grad():
        family.pipeline.vae.encoder.conv_in.weight.add_(1)
    with pytest.raises(UserError, match=r"do not fit this run \(autoencoder \(vae\): \w{8} there, \w{8} here\)"):
        open_latents(tmp_path, family, images, 3)


def test_another_scaling_of_the_same_autoencoder_is_refused_too(family, tmp_path: Path) -> None:
    images = load_images(pictures(tmp_path / "images"), size=16)
    LatentCache(tmp_path / LATENTS, family, images, 3).build()
    family.pipeline.vae.register_to_config(scaling_factor=0.7)
    with pytest.raises(UserError, match="scaling of latents"):
        open_latents(tmp_path, family, images, 3)


def test_an_incomplete_cache_of_latents_is_refused(family, tmp_path: Path) -> None:
    images: Any = load_images(pictures(tmp_path / "images"), size=16)
    cache = LatentCache(tmp_path / LATENTS, family, images, 3)
    cache.build()
    (cache.folder / "shard-00000.json").unlink()
    with pytest.raises(UserError, match="is not complete"):
        open_latents(tmp_path, family, images, 3)
