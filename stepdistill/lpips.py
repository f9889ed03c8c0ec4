"""LPIPS on VGG16 features (Zhang et al. 2018, arXiv 1801.03924), with weights from a local file only.

The network is torchmetrics'; the linear layers come with that package, VGG16's weights do not and are the user's.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import interpolate

from stepdistill.errors import UserError


SIDE = 224  # DMD (arXiv 2311.18828), appendix B: smaller images are enlarged, bilinearly, to what VGG16 was trained on
PREFIX = "features."  # of torchvision's names for what LPIPS uses of VGG16
REMEDY = 'save_file(torchvision.models.vgg16(weights="IMAGENET1K_V1").features.state_dict(prefix="features."), FILE)'


class LPIPS(nn.Module):
    """Two batches of images, (B, 3, H, W) in [0, 1] => distances, (B,).

    Args:
        network: torchmetrics' network, frozen.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        distances: Tensor = self.network(_enlarged(images), _enlarged(others), normalize=True)
        return distances.flatten()


@lru_cache(maxsize=1)  # objectives hold options only; their loss asks for the network again at every step
def load_lpips(path: str, device: torch.device) -> LPIPS:
    """The network on a device.

    Args:
        path: safetensors file with VGG16's convolutions under torchvision's names.
        device: where it works.

    Raises:
        UserError: the file is missing, unreadable, or holds something else; says how to make it.
    """
    from torchmetrics.functional.image.lpips import _LPIPS  # the public class can only download VGG16's weights
    from torchvision.models import vgg

    try:
        given = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"lpips: {path} cannot be read as safetensors ({error}); make it with {REMEDY}") from error
    with torch.device("meta"):
        shapes = vgg.make_layers(vgg.cfgs["D"], batch_norm=False).state_dict(prefix=PREFIX)
    wrong = [name for name, tensor in shapes.items() if name not in given or given[name].shape != tensor.shape]
    if wrong:
        raise UserError(f"lpips: {path} holds no VGG16: {wrong[0]} is absent or misshapen; make it with {REMEDY}")
    with torch.random.fork_rng(devices=[]):  # it draws values that are replaced below; the step's own stay as they are
        network: Any = _LPIPS(net="vgg", pnet_rand=True)
    # slice3.10.weight <= features.10.weight
    network.net.load_state_dict({n: given[PREFIX + n.partition(".")[2]].float() for n in network.net.state_dict()})
    return LPIPS(network.requires_grad_(False).eval()).to(device)


def _enlarged(images: Tensor) -> Tensor:
    if min(images.shape[-2:]) >= SIDE:
        return images
    return interpolate(images, (SIDE, SIDE), mode="bilinear", align_corners=False)
