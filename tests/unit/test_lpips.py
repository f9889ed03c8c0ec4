"""The perceptual distance: VGG16's weights from a local file, and its gradient to the student's sample."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import vgg

from stepdistill import lpips
from stepdistill.errors import UserError
from stepdistill.families.base import ModelFamily
from stepdistill.lpips import load_lpips
from stepdistill.objectives.regression import Regression


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def features() -> nn.Sequential:
    """VGG16's convolutions with random weights; the real ones are not ours to ship."""
    torch.manual_seed(0)
    return vgg.make_layers(vgg.cfgs["D"], batch_norm=False).eval()


@pytest.fixture(scope="module")
def weights(features: nn.Sequential, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    save_file(features.state_dict(prefix="features."), path)
    return str(path)


@pytest.fixture(autouse=True)
def small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lpips, "SIDE", 32)  # 224 costs seconds


def test_every_layer_gets_its_own_weights_and_the_steps_random_numbers_stay_as_they_are(
    features: nn.Sequential, weights: str
) -> None:
    before = torch.get_rng_state()
    network = load_lpips(weights, CPU).network
    assert torch.equal(before, torch.get_rng_state())
    images = torch.randn(1, 3, 32, 32)
    outputs = network.net(images)
    for output, layers in zip(outputs, (4, 9, 16, 23, 30), strict=True):
        torch.testing.assert_close(output, features[:layers](images))


def test_equal_images_have_no_distance_and_each_row_has_its_own(weights: str) -> None:
    torch.manual_seed(1)
    images = torch.rand(3, 3, 16, 16)
    others = images.clone()
    others[1] = torch.rand(3, 16, 16)
    distances = load_lpips(weights, CPU)(images, others)
    assert distances.shape == (3,)
    assert distances[0] == distances[2] == 0
    assert distances[1] > 0


def test_small_images_are_enlarged_and_large_ones_are_not() -> None:
    assert lpips._enlarged(torch.zeros(1, 3, 16, 16)).shape == (1, 3, 32, 32)
    assert lpips._enlarged(torch.zeros(1, 3, 40, 40)).shape == (1, 3, 40, 40)


def test_the_regression_loss_has_the_gradient_of_the_whole_chain(sd: ModelFamily, weights: str) -> None:
    torch.manual_seed(2)
    x0, target = torch.randn(2, 2, *sd.latent_shape()).unbind()
    cast, objective = SimpleNamespace(family=sd), Regression(distance="lpips", lpips=weights)
    sample = x0.clone().requires_grad_(True)
    value = objective.error(cast, sample, target)
    value.backward()
    direct = x0.clone().requires_grad_(True)
    network = load_lpips(weights, CPU)
    expected = network(sd.decode_latents(direct), sd.decode_latents(target)).mean()
    expected.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(sample.grad, direct.grad)
    assert sample.grad.abs().max() > 0
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())


def test_images_are_decoded_and_compared_in_full_precision_under_autocast(
    sd: ModelFamily, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x0, target = torch.randn(2, 2, *sd.latent_shape()).unbind()
    decode, seen = sd.decode_latents, []

    def decoding(latents: torch.Tensor) -> torch.Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return decode(latents)

    monkeypatch.setattr(sd, "decode_latents", decoding)
    cast, objective = SimpleNamespace(family=sd), Regression(distance="lpips", lpips=weights)
    plain = objective.error(cast, x0, target)
    with torch.autocast("cpu", torch.bfloat16):
        value = objective.error(cast, x0, target)
    assert seen == [False] * 4
    torch.testing.assert_close(value, plain)


def test_a_missing_or_wrong_file_is_told_with_the_way_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"nothing\.safetensors cannot be read as safetensors .* make it with save_file"
    ):
        load_lpips(str(tmp_path / "nothing.safetensors"), CPU)
    save_file({"features.0.weight": torch.zeros(2)}, tmp_path / "wrong.safetensors")
    with pytest.raises(UserError, match=r"holds no VGG16: features\.0\.weight is absent or misshapen"):
        load_lpips(str(tmp_path / "wrong.safetensors"), CPU)
