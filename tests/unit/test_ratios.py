"""Density ratios from logits, and their normalisation by noise level and over processes."""

from __future__ import annotations

import math
import multiprocessing
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.ratios import RatioDiscriminator, density_ratio, over_mean


def test_logits_are_averaged_over_heads_then_clamped_and_ratios_clipped() -> None:
    logits = torch.tensor([[1.0, -2.0], [30.0, 2.0], [-3.0, -3.0], [0.0, 0.0]])
    assert density_ratio(logits, 10.0, (1e-9, 1e9)).log().tolist() == pytest.approx([-0.5, 10.0, -3.0, 0.0], abs=1e-6)
    assert density_ratio(logits, 10.0, (0.1, 20.0)).tolist() == pytest.approx([0.6065307, 20.0, 0.1, 1.0])


def test_ratios_of_half_precision_logits_are_float32() -> None:
    logits = torch.full((2, 3), 2.71875, dtype=torch.bfloat16)
    ratio = density_ratio(logits, 10.0, (0.1, 20.0))
    assert ratio.dtype == torch.float32
    assert ratio.tolist() == pytest.approx([math.exp(2.71875)] * 2, rel=1e-6)


def test_equal_ratios_become_one_at_every_noise_level() -> None:
    discriminator = RatioDiscriminator([], 10)
    place = torch.linspace(0, 1, 200)
    normal = discriminator.normalize(torch.full((200,), 3.7), place, 0.0)
    torch.testing.assert_close(normal, torch.ones(200), rtol=1e-6, atol=0)
    torch.testing.assert_close(discriminator.mean_ratios, torch.full((10,), 3.7))


def test_every_noise_level_has_its_own_mean_and_an_empty_one_keeps_its_value() -> None:
    discriminator = RatioDiscriminator([], 4)
    ratio = torch.tensor([1.0, 3.0, 8.0, 5.0, 7.0])
    place = torch.tensor([0.0, 0.2, 0.3, 0.8, 1.1])  # the highest index of a schedule lies just above t_max
    normal = discriminator.normalize(ratio, place, 0.0)
    assert discriminator.mean_ratios.tolist() == [2.0, 8.0, 1.0, 6.0]
    assert normal.tolist() == pytest.approx([1 / 2, 3 / 2, 1.0, 5 / 6, 7 / 6], rel=1e-5)
    discriminator.normalize(ratio[:1], place[:1], 0.0)
    assert discriminator.mean_ratios.tolist() == [1.0, 8.0, 1.0, 6.0]


def test_a_bin_with_memory_divides_by_its_mean_after_the_update() -> None:
    discriminator = RatioDiscriminator([], 2)
    normal = discriminator.normalize(torch.tensor([5.0]), torch.tensor([0.9]), 0.5)
    assert discriminator.mean_ratios.tolist() == [1.0, 3.0]
    assert normal.item() == pytest.approx(5 / 3, rel=1e-6)
    discriminator.normalize(torch.tensor([5.0]), torch.tensor([0.9]), 0.5)
    assert discriminator.mean_ratios.tolist() == [1.0, 4.0]


def normalise_every_other(rank: int, folder: Path, ratio: Tensor, place: Tensor) -> None:
    """What each of two processes does with its half of a batch."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        discriminator = RatioDiscriminator([], 10)
        weight = over_mean(discriminator.normalize(ratio[rank::2], place[rank::2], 0.5))
        save_file({"means": discriminator.mean_ratios, "weight": weight}, folder / f"{rank}.safetensors")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.dist
def test_two_processes_normalise_as_one_with_the_whole_batch(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    ratio, place = torch.rand(9, generator=generator) + 0.5, torch.rand(9, generator=generator)
    alone = RatioDiscriminator([], 10)
    weight = over_mean(alone.normalize(ratio, place, 0.5))
    # Forked, since a fresh interpreter would spend ten seconds on imports; the tensors are too small for threads.
    other = multiprocessing.get_context("fork").Process(
        target=normalise_every_other, args=(1, tmp_path, ratio, place), daemon=True
    )
    other.start()
    normalise_every_other(0, tmp_path, ratio, place)
    other.join(timeout=60)
    assert other.exitcode == 0
    halves = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    assert torch.equal(halves[0]["means"], halves[1]["means"])
    torch.testing.assert_close(halves[0]["means"], alone.mean_ratios)
    for rank in range(2):
        torch.testing.assert_close(halves[rank]["weight"], weight[rank::2])
