"""What every step of a pipeline predicts, as pictures side by side: where an image's content is settled, and when.

Gandikota and Bau 2025, arXiv 2503.10637, show with such pictures that a few-step student settles the layout in its
first step. Letters: B images, H height, W width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.previews import labelled_grid
from stepdistill.stretch import Seen


SMALLEST, LARGEST = 128, 256  # sides of a picture in pixels: captions fit above the one, fifty stand beside each other


class Trace:
    """Collects what `stepdistill.hybrid.watched` tells, and draws it."""

    def __init__(self) -> None:
        self.calls: list[Seen] = []

    def __call__(self, seen: Seen) -> None:
        """Takes note of a network call."""
        self.calls.append(seen)

    def clear(self) -> None:
        """Forgets them, before the next prompt."""
        self.calls.clear()

    def images(self, pipeline: Any, count: int, size: tuple[int, int] | None = None) -> list[Tensor]:
        """The clean prediction of each call, decoded: (B, 3, H, W) in [0, 1] with B = `count`; `size` as `decoded`."""
        return [decoded(pipeline, seen.x0[:count], size) for seen in self.calls]

    def picture(self, pipeline: Any, count: int, size: tuple[int, int] | None = None) -> Image.Image:
        """A row for each image and a column for each call, from noise to the finished image; `size` as `decoded`."""
        steps = self.images(pipeline, count, size)
        captions = [
            f"step {number} at {seen.timestep:g}" + (", base model" if seen.base else "")
            for number, seen in enumerate(self.calls, start=1)
        ]
        rows = {str(row): torch.stack([images[row] for images in steps]) for row in range(count)}
        return labelled_grid(rows, captions, cell=min(max(SMALLEST, *steps[0].shape[-2:]), LARGEST))


@torch.no_grad()
def decoded(pipeline: Any, latents: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Scaled latents => images (B, 3, H, W) in [0, 1], float32 on the CPU, as stock pipelines decode them.

    Args:
        pipeline: whose autoencoder decodes.
        latents: (B, C, h, w), or FLUX's packed ones, (B, N, 4 C).
        size: width and height of the images in pixels, which packed latents do not tell; None: they are square.

    Raises:
        UserError: latents that are no pictures, or packed ones of pictures of another size.
    """
    vae = pipeline.components.get("vae")
    if vae is not None and latents.ndim == 3:
        latents = _unpacked(latents, vae.config, size)
    if latents.ndim != 4 or vae is None:
        raise UserError(f"the latents of a {type(pipeline).__name__} cannot be decoded; --trace knows latents that "
                        "are pictures, and FLUX's packed ones of images of a known size: leave it out")  # fmt: skip
    shift = vae.config.get("shift_factor") or 0.0
    # Stable Diffusion XL's first autoencoder overflows in half precision; its pipeline decodes like this, too.
    overflows = vae.dtype == torch.float16 and vae.config.get("force_upcast")
    if overflows:
        vae.to(torch.float32)
    images: Tensor = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor + shift).sample
    if overflows:
        vae.to(torch.float16)
    return (images / 2 + 0.5).clamp(0, 1).float().cpu()


def _unpacked(tokens: Tensor, config: Any, size: tuple[int, int] | None) -> Tensor:
    """FLUX's packed latents (B, N, 4 C) => (B, C, H, W); those that are not of this size are returned as they are."""
    from stepdistill.families.flux import PATCH, unpacked

    step = 2 ** (len(config.block_out_channels) - 1) * PATCH  # pixels of a token's side
    side = math.isqrt(tokens.shape[1])
    width, height = (side, side) if size is None else (size[0] // step, size[1] // step)
    if width * height != tokens.shape[1] or tokens.shape[2] != int(config.latent_channels) * PATCH**2:
        return tokens
    return unpacked(tokens, height, width)
