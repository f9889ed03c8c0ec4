"""Metrics against independent implementations on the same arrays, and what their intervals promise."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from torch import Tensor, nn

from stepdistill.bench.intervals import Resamples, groups_of, spread
from stepdistill.bench.metrics.base import MissingError, Seen
from stepdistill.bench.metrics.clip_score import clip_scores
from stepdistill.bench.metrics.figures import FeatureDistances, FeatureVariety, ImageDistances, MeanScore, Reference
from stepdistill.bench.metrics.frechet import (
    Moments,
    frechet_distance,
    kernel_distance,
    kernel_influence,
    resampled_frechet,
)
from stepdistill.bench.metrics.manifold import coverage, precision_recall
from stepdistill.bench.metrics.networks import as_bytes, clean_resized, middle, square
from stepdistill.bench.metrics.weights import Weights
from stepdistill.errors import UserError


DIM = 6


class Grid(nn.Module):
    """Features by hand: mean colours of the ninths of an image, (B, 27)."""

    num_features = 27

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images.float(), 3).flatten(1)


def pictures(count: int, seed: int, *, bright: float = 0.0) -> Tensor:
    """Coarse coloured noise with sharp edges, as 8-bit values in [0, 1]."""
    blocks = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return as_bytes((blocks + bright).clamp(0, 1)).repeat_interleave(5, 2).repeat_interleave(5, 3).float() / 255


def draw(count: int, seed: int, *, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    return shift + scale * torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(features: Tensor) -> Moments:
    return Moments(features.shape[1]).add(features)


def seen(features: Tensor, images_per_prompt: int = 1, **others: object) -> Seen:
    prompts = [""] * (len(features) // images_per_prompt)
    return Seen(prompts, images_per_prompt, {"net": features}, torch.empty(0), **others)


def sqrtm(matrix: np.ndarray, disp: bool = True) -> Any:
    """SciPy's as clean-fid calls it, with the argument that SciPy 1.18 has no more."""
    root = scipy.linalg.sqrtm(matrix)
    return root if disp else (root, 0.0)


def test_our_distance_is_that_of_clean_fid_with_the_same_extractor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cleanfid import fid

    monkeypatch.setattr(fid, "linalg", SimpleNamespace(sqrtm=sqrtm))
    sets = pictures(40, 1), pictures(40, 2, bright=0.2)
    for name, images in zip("ab", sets, strict=True):
        (tmp_path / name).mkdir()
        for i, image in enumerate(as_bytes(images)):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name / f"{i:03d}.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = fid.compute_fid(
            str(tmp_path / "a"), str(tmp_path / "b"), mode="clean", custom_feat_extractor=Grid(), num_workers=0,
            device=torch.device("cpu"), use_dataparallel=False, verbose=False,
        )  # fmt: skip
    ours = frechet_distance(*(moments(Grid()(clean_resized(images))) for images in sets))
    assert expected > 100, "the sets must differ for the comparison to mean something"
    assert ours == pytest.approx(expected, rel=1e-3)


def test_our_distances_are_those_of_torchmetrics_with_the_same_module() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    real, made = pictures(60, 1), pictures(60, 2, bright=0.2)
    theirs = FrechetInceptionDistance(feature=Grid(), normalize=True)
    kernel = KernelInceptionDistance(feature=Grid(), normalize=True, subsets=1, subset_size=60)
    for metric in (theirs, kernel):
        metric.update(real, real=True)
        metric.update(made, real=False)
    features = Grid()(made), Grid()(real)
    assert frechet_distance(*map(moments, features)) == pytest.approx(float(theirs.compute()), rel=1e-3)
    assert kernel_distance(*features) == pytest.approx(float(kernel.compute()[0]), rel=1e-3)


@pytest.mark.parametrize(("shift", "scale", "expected"), [(0.5, 1.0, 0.25 * DIM), (0.0, 3.0, DIM * (1 - 3) ** 2)])
def test_samples_of_gaussians_are_apart_as_the_closed_form_says(shift: float, scale: float, expected: float) -> None:
    # a^2 d for a shift by a, d (1 - b)^2 for a scale b; of samples, up to their number
    real, made = draw(200_000, 1), draw(200_000, 2, shift=shift, scale=scale)
    assert frechet_distance(moments(made), moments(real)) == pytest.approx(expected, rel=0.01)


def covered(points: Tensor, centres: Tensor, k: int = 3) -> list[bool]:
    """By differences, one pair after another."""
    radii = [sorted((c - o).norm().item() for j, o in enumerate(centres) if j != i)[k - 1]
             for i, c in enumerate(centres)]  # fmt: skip
    return [any((p - c).norm().item() <= r for c, r in zip(centres, radii, strict=True)) for p in points]


def share(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


def test_precision_and_recall_are_those_of_a_direct_search() -> None:
    made, real = draw(50, 1, scale=0.7), draw(60, 2)
    found = precision_recall(made, real, 3)
    assert found == pytest.approx((share(covered(made, real)), share(covered(real, made))))
    assert found.recall < 0.9, "a narrow set must miss something"


def test_products_find_the_neighbours_of_a_direct_search_far_from_zero_and_among_twins() -> None:
    # Far from zero the product form cancels; twins of a collapsed generator have balls without extent.
    real = draw(50, 1, shift=1000.0)
    made = torch.cat([draw(30, 2, shift=1000.0, scale=1.2), real[:10], real[:1].repeat(6, 1), real[:1] + 1e-4])
    good, met = coverage(made, real, 3)
    assert good.tolist() == covered(made, real)
    assert met.tolist() == covered(real, made)
    assert 0 < good.double().mean() < 1 and 0 < met.double().mean() < 1
    collapsed = real[:1].repeat(5, 1)
    assert coverage(collapsed, real)[1].tolist() == [True] + [False] * 49


@pytest.mark.parametrize(("images", "references", "used"), [(60, 25, 24), (20, 50, 20)])
def test_precision_and_recall_compare_equally_many_by_whole_prompts(images: int, references: int, used: int) -> None:
    made, real = draw(images, 1, scale=0.8), draw(references, 2)
    metric = FeatureDistances("net", lambda i, p: i, Reference(moments(real), real),
                              {"precision": "precision", "recall": "recall"})  # fmt: skip
    found = metric.figures(seen(made, 4), Resamples(images // 4))
    expected = share(covered(made[:used], real[:used])), share(covered(real[:used], made[:used]))
    assert (found["precision"].value, found["recall"].value) == pytest.approx(expected)
    whole = share(covered(made, real)), share(covered(real, made))
    assert expected != pytest.approx(whole), "the sets' sizes must matter for the comparison to mean something"


def test_a_clip_score_is_the_cosine_by_hand() -> None:
    images, texts = draw(5, 1), draw(5, 2)
    expected = [
        100 * max(0.0, float(a @ b / (a @ a).sqrt() / (b @ b).sqrt())) for a, b in zip(images, texts, strict=True)
    ]
    assert clip_scores(images, texts).tolist() == pytest.approx(expected)


def test_moments_of_weighted_groups_are_those_of_the_repeated_vectors() -> None:
    parts = [draw(7, 1, shift=50), draw(9, 2), draw(4, 3)]
    mixed = Moments.mixed([moments(part) for part in parts], torch.tensor([2, 0, 1]))
    whole = moments(torch.cat([parts[0], parts[0], parts[2]]))
    assert mixed.count == whole.count
    torch.testing.assert_close(mixed.mean, whole.mean)
    torch.testing.assert_close(mixed.covariance, whole.covariance)


def test_intervals_of_a_mean_are_as_wide_as_the_standard_error_says() -> None:
    values = draw(400, 1)[:, 0]
    estimate = Resamples(400).mean(values)
    low, high = estimate.interval
    assert estimate.value == pytest.approx(float(values.mean()))
    assert (high - low) / 2 == pytest.approx(1.96 * float(values.std()) / 20, rel=0.2)


def test_images_of_one_prompt_do_not_count_as_independent() -> None:
    values = draw(50, 1)[:, :1].expand(50, 8)  # eight equal images each
    many, alone = Resamples(50).mean(values), Resamples(50).mean(values[:, 0])
    assert many.interval == pytest.approx(alone.interval)


@pytest.mark.parametrize("column", ["frechet", "kernel"])
def test_intervals_of_distances_hold_what_other_samples_give(column: str) -> None:
    real = draw(1000, 0)
    metric = FeatureDistances("net", lambda images, prompts: images, Reference(moments(real), real), {column: "x"})
    found = [metric.figures(seen(draw(300, s, shift=0.4)), Resamples(300))["x"] for s in range(1, 21)]
    values = torch.tensor([estimate.value for estimate in found])
    widths = torch.tensor([e.interval[1] - e.interval[0] for e in found]) / 2
    assert float(widths.mean()) == pytest.approx(1.96 * float(values.std()), rel=0.5)
    inside = sum(e.interval[0] <= values.mean() <= e.interval[1] for e in found)
    assert inside >= 17


def test_what_a_vector_adds_to_the_kernel_distance_is_its_projection() -> None:
    made, real = draw(40, 1, shift=0.3), draw(50, 2)
    inner, outer = ((made @ other.T / DIM + 1) ** 3 for other in (made, real[:50]))
    inner.fill_diagonal_(0)
    expected = [2 * float(inner[i].sum() / 39 - outer[i].mean()) for i in range(40)]
    assert kernel_influence(made, real).tolist() == pytest.approx(expected)


def test_a_resampled_distance_of_one_kind_of_image_does_not_vary() -> None:
    group = moments(draw(30, 1))
    distances = resampled_frechet([group] * 5, moments(draw(200, 2)), count=4)
    assert float(distances.std()) == pytest.approx(0, abs=1e-9)


def test_groups_of_prompts_cover_all_of_them_once() -> None:
    assert [i for part in groups_of(103, 10) for i in part] == list(range(103))
    assert len(groups_of(3, 10)) == 3


def test_an_interval_cannot_leave_what_is_possible() -> None:
    assert spread(0.99, torch.tensor([0.9, 1.0, 1.0]), (0, 1)).interval[1] == 1


def test_equal_images_have_no_variety_and_orthogonal_ones_all_of_it() -> None:
    metric = FeatureVariety("net", lambda i, p: i, ("vendi", "feature_diversity", "clip_distance"))
    same = torch.ones(8, 4)
    apart = torch.eye(4).repeat(2, 1)
    for features, vendi, distance in ((same, 1, 0), (apart, 4, 1)):
        found = metric.figures(seen(features, 4), Resamples(2))
        assert found["vendi"].value == pytest.approx(vendi)
        assert found["feature_diversity"].value == pytest.approx(distance, abs=1e-12)
        assert found["clip_distance"].value is None
    to_first = metric.figures(seen(apart, 4, baseline=seen(same, 4)), Resamples(2))["clip_distance"]
    assert to_first.value == pytest.approx(0.5)


def test_distances_between_images_pair_the_same_noise() -> None:
    metric = ImageDistances(lambda a, b: (a - b).abs().mean((1, 2, 3)), ("lpips", "lpips_diversity"))
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 2, 2) * 51
    first = Seen(["", ""], 2, {}, images)
    found = metric.figures(Seen(["", ""], 2, {}, images + 51, first), Resamples(2))
    assert found["lpips"].value == pytest.approx(0.2)
    assert found["lpips_diversity"].value == pytest.approx(0.2)
    assert metric.figures(first, Resamples(2))["lpips"].value is None
    wide = Seen(["", ""], 2, {}, images.repeat(1, 1, 1, 2), first)
    found = metric.figures(wide, Resamples(2))
    assert found["lpips"].value is None and "4 x 2 pixels, the first model's 2 x 2" in found["lpips"].why
    assert found["lpips_diversity"].value == pytest.approx(0.2), "which needs no other model"


def test_a_function_of_ones_own_is_averaged() -> None:
    found = MeanScore("net", lambda i, p: i).figures(seen(torch.tensor([1.0, 2.0, 6.0])), Resamples(3))
    assert found["net"].value == pytest.approx(3)


def test_images_are_cut_and_resized_as_pil_does_it() -> None:
    image = pictures(1, 1)[..., :30]  # 40 high, 30 wide
    whole = Image.fromarray(as_bytes(image)[0].permute(1, 2, 0).numpy())
    cut = whole.crop((0, 5, 30, 35)).resize((16, 16), Image.Resampling.LANCZOS)
    expected = torch.from_numpy(np.asarray(cut).copy()).permute(2, 0, 1).float() / 255
    assert torch.equal(square(image, 16)[0], expected)
    assert middle(image, 20).shape == (1, 3, 20, 20)
    assert torch.equal(middle(image, 20), image[..., 10:30, 5:25])


def test_a_patch_that_does_not_fit_is_a_clear_error() -> None:
    with pytest.raises(UserError, match="patch_fid"):
        middle(pictures(1, 1), 299)


def test_weights_are_found_by_option_then_by_environment_and_asked_for_by_path(tmp_path: Path, monkeypatch) -> None:
    file, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    file.touch()
    other.touch()
    with pytest.raises(MissingError, match=r"--weights vgg16=PATH or STEPDISTILL_WEIGHTS_VGG16"):
        Weights(offline=True).find("vgg16")
    monkeypatch.setenv("STEPDISTILL_WEIGHTS_VGG16", str(other))
    assert Weights().find("vgg16") == str(other)
    assert Weights({"vgg16": str(file)}).find("vgg16") == str(file)
    with pytest.raises(MissingError, match="gone"):
        Weights({"vgg16": str(tmp_path / "gone")}).find("vgg16")
    with pytest.raises(UserError, match="vgg17"):
        Weights({"vgg17": "x"})


def test_offline_nothing_is_asked_of_the_network(monkeypatch, tmp_path: Path) -> None:
    import socket

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("inception", "dinov2", "clip", "pickscore"):
        with pytest.raises(MissingError, match=f"--weights {name}=PATH"):
            Weights(offline=True).find(name)
