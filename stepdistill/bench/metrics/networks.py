"""Networks that metrics look through: Inception as clean-fid has it, DINOv2, CLIP, and any function of the user's.

Each takes images (B, 3, H, W) in [0, 1] and their prompts and gives one row of features for each. Letters: B images, D
features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stepdistill.bench.metrics.weights import INCEPTION_FILE
from stepdistill.clip_model import ImageTextModel
from stepdistill.errors import UserError


PATCH = 299  # Inception's side


class Inception:
    """Pool features, 2048, of clean-fid's Inception network (Parmar et al. 2022, arXiv 2104.11222), mode "clean".

    Args:
        path: its TorchScript file.
        device: where it computes.
        patch: look at the middle 299 x 299 pixels as they are, instead of at the whole image resized: patch FID
            (SDXL-Lightning, arXiv 2402.13929, section 5).
    """

    def __init__(self, path: str, device: str, *, patch: bool = False) -> None:
        from cleanfid.inception_torchscript import InceptionV3W

        if Path(path).name != INCEPTION_FILE:
            raise UserError(f"{path}: clean-fid opens this network only under the name {INCEPTION_FILE}; rename it")
        # Its own way to find a network may download; this does not.
        self._network: Any = InceptionV3W(str(Path(path).parent), download=False).to(device).eval()
        self._device, self._patch = device, patch

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        pixels = middle(images, PATCH) * 255 if self._patch else clean_resized(images)
        features: Tensor = self._network(pixels.to(self._device))
        return features.float().cpu()


def clean_resized(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] => (B, 3, 299, 299) in [0, 255], by clean-fid's resize of 8-bit images.

    Each channel by PIL's bicubic filter in float, with no rounding afterwards.
    """
    from cleanfid.resize import build_resizer

    resize: Callable[[np.ndarray], np.ndarray] = build_resizer("clean")
    each = as_bytes(images).permute(0, 2, 3, 1).numpy()
    return torch.from_numpy(np.stack([resize(image) for image in each])).permute(0, 3, 1, 2)


class DinoV2:
    """The class token of DINOv2, behind its last norm (Stein et al. 2023, arXiv 2306.04675): FD-DINOv2 is over these.

    Args:
        path: folder of a Dinov2Model.
        device: where it computes.
    """

    SIDE = 224
    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet

    def __init__(self, path: str, device: str) -> None:
        from transformers import Dinov2Model

        self._network: Any = Dinov2Model.from_pretrained(
            path, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
        self._network.eval().to(device)
        self._device = device

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        resized = by_pil(images, lambda image: image.resize((self.SIDE, self.SIDE), Image.Resampling.BICUBIC))
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (self.MEAN, self.STD))
        output = self._network(pixel_values=((resized - mean) / std).to(self._device))
        features: Tensor = output.last_hidden_state[:, 0]
        return features.cpu()


class Clip:
    """A CLIP model's projected features of images, and of texts behind a prefix.

    Args:
        path: folder of a `CLIPModel`.
        device: where it computes.
        prefix: put before every prompt.
    """

    def __init__(self, path: str, device: str, prefix: str = "") -> None:
        self._model, self._prefix = ImageTextModel(path, device, "CLIP model"), prefix

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        return self._model.image_features(images).cpu()

    @torch.no_grad()
    def texts(self, prompts: Sequence[str], chunk: int = 256) -> Tensor:
        """Prompts => (P, D)."""
        full = [self._prefix + prompt for prompt in prompts]
        parts = [self._model.text_features(full[i : i + chunk]).cpu() for i in range(0, len(full), chunk)]
        return torch.cat(parts)


def by_path(text: str) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """ "package.module:name" => that function or object; it is called with images and prompts.

    Raises:
        UserError: there is none, or it cannot be called.
    """
    module, colon, name = text.partition(":")
    try:
        found: Any = getattr(import_module(module), name) if colon else None
    except (ImportError, AttributeError) as error:
        raise UserError(f"metric {text!r}: {error}") from error
    if not callable(found):
        raise UserError(f"metric {text!r}: give it as package.module:name, a function of images and prompts")

    def call(images: Tensor, prompts: Sequence[str]) -> Tensor:
        rows: Tensor = found(images, prompts)
        return rows.detach().float().cpu()

    return call


def as_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] => what a PNG file of them holds, (B, 3, H, W) uint8."""
    return images.clamp(0, 1).mul(255).round().to(torch.uint8)


def by_pil(images: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] => the same after a change to each as an 8-bit picture, in [0, 1]."""
    pictures = [Image.fromarray(image) for image in as_bytes(images).permute(0, 2, 3, 1).numpy()]
    changed = np.stack([np.asarray(change(picture)) for picture in pictures])
    return torch.from_numpy(changed).permute(0, 3, 1, 2).float() / 255


def middle(images: Tensor, side: int) -> Tensor:
    """The middle square of images (B, 3, H, W) as 8-bit values in [0, 1].

    Raises:
        UserError: they are smaller.
    """
    height, width = images.shape[-2:]
    if min(height, width) < side:
        raise UserError(f"a patch of {side} pixels was asked of images of {width} x {height}; leave out patch_fid")
    top, left = (height - side) // 2, (width - side) // 2
    return as_bytes(images[..., top : top + side, left : left + side]).float() / 255


def square(images: Tensor, side: int) -> Tensor:
    """The middle square of images, resized by Lanczos's filter, (B, 3, side, side): how DMD2 prepares both sides."""
    height, width = images.shape[-2:]
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    cut = images[..., top : top + edge, left : left + edge]
    return by_pil(cut, lambda image: image.resize((side, side), Image.Resampling.LANCZOS))
