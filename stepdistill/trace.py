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

    def images(self, pipeline: Any, count: int) -> list[Tensor]:
        """The clean prediction of each call, decoded: (B, 3, H, W) in [0, 1] with B = `count`."""
        return [decoded(pipeline, seen.x0[:count]) for seen in self.calls]

    def picture(self, pipeline: Any, count: int) -> Image.Image:
        """A row for each image and a column for each call, from noise to the finished image."""
        steps = self.images(pipeline, count)
        captions = [
            f"step {number} at {seen.timestep:g}" + (", base model" if seen.base else "")
            for number, seen in enumerate(self.calls, start=1)
        ]
        rows = {str(row): torch.stack([images[row] for images in steps]) for row in range(count)}
        return labelled_grid(rows, captions, cell=min(max(SMALLEST, steps[0].shape[-1]), LARGEST))


@torch.no_grad()
def decoded(pipeline: Any, latents: Tensor) -> Tensor:
    """Scaled latents => images (B, 3, H, W) in [0, 1], float32 on the CPU, as stock pipelines decode them.

    Raises:
        UserError: latents that are no pictures, or FLUX's packed ones of pictures that are not square.
    """
    vae = pipeline.components.get("vae")
    if vae is not None and latents.ndim == 3:
        latents = _of_square(latents, int(vae.config.latent_channels))
    if latents.ndim != 4 or vae is None:
        raise UserError(f"the latents of a {type(pipeline).__name__} cannot be decoded; --trace knows latents that "
                        "are pictures, and FLUX's packed ones of square images: leave it out")  # fmt: skip
    shift = vae.config.get("shift_factor") or 0.0
    # Stable Diffusion XL's first autoencoder overflows in half precision; its pipeline decodes like this, too.
    overflows = vae.dtype == torch.float16 and vae.config.get("force_upcast")
    if overflows:
        vae.to(torch.float32)
    images: Tensor = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor + shift).sample
    if overflows:
        vae.to(torch.float16)
    return (images / 2 + 0.5).clamp(0, 1).float().cpu()


def _of_square(tokens: Tensor, channels: int) -> Tensor:
    """FLUX's packed latents (B, N, 4 C) of a square image => (B, C, H, W); others are returned as they are."""
    from stepdistill.families.flux import PATCH, unpacked

    side = math.isqrt(tokens.shape[1])
    if side**2 != tokens.shape[1] or tokens.shape[2] != channels * PATCH**2:
        return tokens
    return unpacked(tokens, side, side)
