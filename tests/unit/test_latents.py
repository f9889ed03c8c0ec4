"""Encoded images on disk and the micro-batches made from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stepdistill.data.batches import Batches
from stepdistill.data.cache import EncodedOnTheFly
from stepdistill.data.images import load_images
from stepdistill.data.latents import LatentCache, LatentsOnTheFly
from stepdistill.data.parts import PartOfImages
from stepdistill.data.prompts import load_prompts
from stepdistill.errors import UserError
from stepdistill.families import load_family


@pytest.fixture(scope="module")
def family(sd_folder: str):
    return load_family(sd_folder)


def built(folder: Path, family, count: int = 6) -> LatentCache:
    images = load_images("shapes", size=family.image_size)
    cache = LatentCache(folder, family, images, count, shard_size=4)
    cache.build()
    return cache


def test_cached_latents_have_the_posterior_of_the_images(tmp_path: Path, family) -> None:
    cache = built(tmp_path, family)
    images = load_images("shapes", size=family.image_size).batch(range(6))
    posterior = family.pipeline.vae.encode(images.images).latent_dist
    scale = family.pipeline.vae.config.scaling_factor
    torch.manual_seed(0)
    draws = torch.stack([cache.batch(seed=3, start=0, count=6).latents for _ in range(400)])
    order = [images.captions.index(c) for c in cache.batch(seed=3, start=0, count=6).captions]
    assert sorted(order) == list(range(6))
    expected = posterior.mean[order] * scale
    error = (draws.mean(0) - expected).abs() / (posterior.std[order] * scale / 20)
    assert error.max() < 6  # twenty is the square root of the number of draws: six standard errors
    torch.testing.assert_close(draws.std(0), posterior.std[order] * scale, rtol=0.25, atol=1e-6)


def test_an_interrupted_build_goes_on_and_keeps_finished_shards(tmp_path: Path, family) -> None:
    cache = built(tmp_path, family)
    first = cache.folder / "shard-00000.safetensors"
    kept = first.stat().st_mtime_ns
    (cache.folder / "shard-00001.json").unlink()
    again = built(tmp_path, family)
    assert first.stat().st_mtime_ns == kept
    assert (again.folder / "shard-00001.json").is_file()
    assert len(again.batch(0, 0, 6).captions) == 6


def test_another_count_or_another_autoencoder_gets_a_cache_of_its_own(tmp_path: Path, family) -> None:
    one = built(tmp_path, family)
    assert built(tmp_path, family, count=5).folder != one.folder
    with torch.no_grad():
        weight = family.pipeline.vae.encoder.conv_in.weight
        weight.add_(1)
        try:
            assert built(tmp_path, family).folder != one.folder
        finally:
            weight.sub_(1)


def test_a_share_of_a_cache_plays_what_a_cache_of_the_share_would(tmp_path: Path, family) -> None:
    images = load_images("shapes", size=family.image_size)
    share = PartOfImages(images, (5, 1, 2), images.size)
    own, whole = LatentCache(tmp_path / "own", family, share, 3, shard_size=2), built(tmp_path, family)
    own.build()
    whole.keep(share.numbers)
    for start in (0, 2):
        played = []
        for cache in (own, whole):
            torch.manual_seed(0)
            played.append(cache.batch(7, start, 3))
        assert played[0].captions == played[1].captions
        torch.testing.assert_close(played[0].latents, played[1].latents, rtol=0, atol=1e-5)
    assert set(whole.captions) == set(share.texts(range(3)))


def batches(family, latents=None, **changes) -> Batches:
    prompts = load_prompts("shapes", count=10)
    return Batches(family, prompts, EncodedOnTheFly(family, prompts), latents, seed=1, **changes)


def test_restored_batches_go_on_with_the_same_data(family) -> None:
    straight = batches(family)
    wanted = [straight.next("prompts", 3).condition.tensors["prompt_embeds"] for _ in range(5)][3:]
    resumed = batches(family)
    resumed.restore({"prompts": 3})
    for tensor in wanted:
        assert torch.equal(resumed.next("prompts", 3).condition.tensors["prompt_embeds"], tensor)


def test_two_processes_draw_disjoint_samples_that_make_up_one_process_batch(family) -> None:
    whole = batches(family).next("prompts", 4).condition.tensors["prompt_embeds"]
    parts = [batches(family, rank=rank, num_processes=2).next("prompts", 2) for rank in (0, 1)]
    assert torch.equal(torch.cat([p.condition.tensors["prompt_embeds"] for p in parts]), whole)


def test_the_null_condition_has_a_row_for_every_sample(family) -> None:
    batch = batches(family).next("prompts", 3)
    expected = family.null_condition(3).tensors["prompt_embeds"]
    assert torch.equal(batch.null.tensors["prompt_embeds"], expected)


def test_images_carry_the_encoding_of_their_own_captions(family) -> None:
    images = load_images("shapes", size=family.image_size)
    batch = batches(family, LatentsOnTheFly(family, images)).next("images", 2)
    captions = images.batch(images.indices(1, 0, 2)).captions
    assert torch.equal(
        batch.condition.tensors["prompt_embeds"], family.encode_prompts(captions).tensors["prompt_embeds"]
    )
    assert batch.latents is not None
    assert batch.latents.shape == (2, *family.latent_shape())


def test_a_phase_that_wants_images_says_what_is_missing(family) -> None:
    with pytest.raises(UserError, match=r"data\.images"):
        batches(family).next("images", 2)
