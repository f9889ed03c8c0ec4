"""Aspect buckets: sizes, order, what the network is told, and latents of several shapes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from stepdistill.condition import Condition
from stepdistill.data.batches import Batches
from stepdistill.data.buckets import BucketOrder, nearest_bucket, parse_buckets
from stepdistill.data.cache import EncodedOnTheFly
from stepdistill.data.images import load_images
from stepdistill.data.latents import LatentCache, LatentsOnTheFly
from stepdistill.data.prompts import load_prompts
from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.framing import Size, framing_of


SQUARE, TALL, WIDE = Size(16, 16), Size(24, 12), Size(12, 24)
BUCKETS = (SQUARE, TALL, WIDE)


@pytest.fixture(scope="module")
def family(sd_folder: str):
    return load_family(sd_folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five squares, three tall and two wide images, whose colours say which they are."""
    place = tmp_path_factory.mktemp("pictures")
    sizes = [(40, 40)] * 5 + [(30, 60)] * 3 + [(60, 32)] * 2
    for number, size in enumerate(sizes):
        Image.new("RGB", size, (25 * number, 0, 0)).save(place / f"{number}.png")
        (place / f"{number}.txt").write_text("abcdefghij"[number])
    return place


def test_sizes_are_written_as_width_and_height_and_have_to_fit_the_autoencoder() -> None:
    assert parse_buckets(["832x1216", "1024x1024"], 1024, 8) == (Size(1216, 832), Size(1024, 1024))
    for given, said in ((["832"], "is no size"), (["100x96"], "multiples of 8"), ([], "is empty")):
        with pytest.raises(UserError, match=said):
            parse_buckets(given, 1024, 8)


def test_automatic_buckets_have_about_the_area_of_the_square_and_whole_latents() -> None:
    found = parse_buckets("auto", 1024, 8)
    assert Size(1024, 1024) in found
    assert {Size(1280, 832), Size(832, 1280)} <= set(found)
    assert len(found) > 8
    for size in found:
        assert size.height % 64 == size.width % 64 == 0
        assert 0.9 < size.height * size.width / 1024**2 < 1.1


def test_the_nearest_bucket_is_the_one_of_the_nearest_ratio_whatever_the_size() -> None:
    assert [nearest_bucket(Size(*size), BUCKETS) for size in ((900, 1000), (2000, 900), (10, 17))] == [
        SQUARE, TALL, WIDE,
    ]  # fmt: skip


def test_a_framing_tells_the_original_the_crop_and_the_target() -> None:
    framing = framing_of(Size(100, 300), Size(50, 100))  # halved, then 25 of 150 pixels fall away at either side
    assert (framing.original, framing.crop, framing.target) == (Size(100, 300), (0, 25), Size(50, 100))
    assert framing_of(Size(64, 64), Size(64, 64)).crop == (0, 0)


def test_an_epoch_draws_groups_of_one_bucket_and_every_image() -> None:
    targets = [SQUARE] * 5 + [TALL] * 3 + [WIDE] * 2
    order = BucketOrder(targets)
    epochs = [[order.group(7, epoch * 6 + number, 2) for number in range(6)] for epoch in (0, 1)]  # 3 + 2 + 1 groups
    for groups in epochs:
        assert all(len({targets[i] for i in group}) == 1 for group in groups)
        played = Counter(index for group in groups for index in group)
        assert set(played) == set(range(10))
        assert max(played.values()) == 2, "a bucket's last group is filled up, no more"
    assert epochs[0] != epochs[1]
    again = BucketOrder(targets)
    assert [again.group(7, number, 2) for number in (11, 3)] == [epochs[1][5], epochs[0][3]]
    assert order.group(8, 3, 2) != epochs[0][3] or order.group(8, 4, 2) != epochs[0][4]


def batches(family, latents, **changes) -> Batches:
    prompts = load_prompts("shapes", count=4)
    return Batches(family, prompts, EncodedOnTheFly(family, prompts), latents, seed=1, **changes)


def test_micro_batches_have_the_shape_of_their_bucket_cached_or_not(family, folder: Path, tmp_path: Path) -> None:
    images = load_images(folder, size=16, buckets=BUCKETS)
    cache = LatentCache(tmp_path, family, images, 10, shard_size=4)
    cache.build()
    for latents in (LatentsOnTheFly(family, images), cache):
        source = batches(family, latents)
        found = [source.next("images", 2) for _ in range(6)]
        assert {batch.latent_shape for batch in found} == {(4, 8, 8), (4, 12, 6), (4, 6, 12)}
        for batch in found:
            assert batch.latents is not None
            assert batch.latents.shape == (2, *batch.latent_shape)
        assert {text for batch in found for text in batch.prompts} == set("abcdefghij")


def test_a_cached_latent_is_that_of_its_image(family, folder: Path, tmp_path: Path) -> None:
    images = load_images(folder, size=16, buckets=BUCKETS)
    cache = LatentCache(tmp_path, family, images, 10, shard_size=4)
    cache.build()
    for number in range(6):
        batch = cache.batch(seed=1, start=2 * number, count=2)
        assert batch.framings is not None
        indices = ["abcdefghij".index(c) for c in batch.captions]
        assert batch.framings == [images.framing(i) for i in indices]
        mean, std = family.image_moments(images.batch(indices).images)
        assert ((batch.latents - mean).abs() <= 6 * std + 1e-6).all()


def test_processes_share_a_group_of_one_bucket(family, folder: Path) -> None:
    images = load_images(folder, size=16, buckets=BUCKETS)

    def draw(rank: int, processes: int, count: int, groups: int = 1) -> list[tuple[str, ...]]:
        latents = LatentsOnTheFly(family, images, num_processes=processes)
        source = batches(family, latents, rank=rank, num_processes=processes)
        return [source.next("images", count, groups).prompts for _ in range(8 // groups)]

    whole, first, second = draw(0, 1, 2), draw(0, 2, 1), draw(1, 2, 1)
    assert [a + b for a, b in zip(first, second, strict=True)] == whole
    ranks = [draw(rank, 4, 1, groups=2) for rank in range(4)]  # two micro-batches at a time, each of two processes
    assert [part for a, b, c, d in zip(*ranks, strict=True) for part in (a + b, c + d)] == whole


def test_the_network_is_told_how_images_were_cut_out(family, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def framed(condition: Condition, framings) -> Condition:
        told = torch.tensor([[*f.original, *f.crop, *f.target] for f in framings])
        return Condition({**condition.tensors, "time_ids": told})

    monkeypatch.setattr(family, "framed", framed)
    source = batches(family, LatentsOnTheFly(family, load_images(folder, size=16, buckets=BUCKETS)))
    told = {tuple(row) for _ in range(6) for row in source.next("images", 2).null.tensors["time_ids"].tolist()}
    assert told == {(40, 40, 0, 0, 16, 16), (60, 30, 0, 0, 24, 12), (32, 60, 0, 0, 12, 24)}


def test_threads_that_read_ahead_change_nothing(family, folder: Path) -> None:
    images = load_images(folder, size=16)
    plain, ahead = (LatentsOnTheFly(family, images, workers=workers) for workers in (0, 3))
    for start in (0, 4, 8, 40, 12):  # also where the guess of what comes next is wrong
        torch.manual_seed(start)
        one = plain.batch(5, start, 4)
        torch.manual_seed(start)
        other = ahead.batch(5, start, 4)
        assert torch.equal(one.latents, other.latents)
        assert one.captions == other.captions


def test_images_smaller_than_their_bucket_are_left_out(folder: Path) -> None:
    images = load_images(folder, size=32, buckets=[Size(32, 32), Size(64, 32)])
    assert images.length == 7, "squares and the wide ones, which are nearer to a square than to a tall image"
    assert "3 smaller than their bucket" in images.summary()


def test_scenes_without_end_need_no_buckets() -> None:
    with pytest.raises(UserError, match="are squares"):
        load_images("shapes", buckets=BUCKETS)
